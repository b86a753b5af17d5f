"""token_quotas.py: when a key's tokens are used up, and what a request reserves."""

from typing import Any

import pytest

from accounting.token_estimates import TokenEstimator
from auth import Caller
from core.errors import TOKEN_QUOTA_EXCEEDED, TOKEN_RATE_EXCEEDED, GatewayError
from policy.routes import Routes
from policy.token_limiter import TokenLimiter
from policy.token_limits import TokensAsked
from proxy.token_quotas import TokenQuotas, allowance_lines
from support.clock import Clock
from support.memory_gateway import Ledger

CHAT = Routes().find(b"POST", b"/v1/chat/completions")


class Quotas:
    """The quotas of alice, and what they keep accounts with."""

    def __init__(self) -> None:
        ledger: Any = Ledger()
        self.ledger = ledger
        self.flushes = 0
        self.quotas = TokenQuotas(ledger, TokenLimiter(Clock()), TokenEstimator(), self._flush)

    def _flush(self) -> None:
        self.flushes += 1

    def refusal(self, **limits: int) -> GatewayError:
        with pytest.raises(GatewayError) as refused:
            self.quotas.check(alice(**limits))
        assert refused.value.kind is TOKEN_QUOTA_EXCEEDED
        return refused.value


def alice(**limits: int) -> Caller:
    return Caller("alice", "infer", 100, **limits)  # type: ignore[arg-type]


def test_a_key_without_quotas_costs_nothing() -> None:
    own = Quotas()
    own.ledger.spent = own.ledger.spent_in_month = 10**9
    own.quotas.check(alice(max_tokens=1, tokens_per_minute=1))
    assert own.quotas.reserve(alice(tokens_per_day=1), CHAT, 100, TokensAsked()) is None
    assert own.flushes == 0


def test_a_day_and_a_month_end_with_their_tokens() -> None:
    own = Quotas()
    own.ledger.spent, own.ledger.spent_in_month = 99, 999
    own.quotas.check(alice(tokens_per_day=100, tokens_per_month=1000))
    assert own.flushes == 1
    own.ledger.spent = 100
    error = own.refusal(tokens_per_day=100, tokens_per_month=1000)
    used_up = "This API key is limited to 100 tokens a day, and today's are used up"
    assert error.message == f"{used_up}; new ones come on 2026-01-31 at 00:00 UTC."
    assert error.retry_after_s == 1235
    own.ledger.spent_in_month = 1000
    error = own.refusal(tokens_per_day=100, tokens_per_month=1000)
    used_up = "This API key is limited to 1000 tokens a month, and this month's are used up"
    assert error.message == f"{used_up}; new ones come on 2026-02-01 at 00:00 UTC."
    assert error.retry_after_s == 100_000


def test_a_request_reserves_its_prompt_and_what_it_may_generate() -> None:
    own = Quotas()
    caller = alice(tokens_per_minute=1000)
    reservation = own.quotas.reserve(caller, CHAT, 100, TokensAsked(2, 1, 300))
    assert reservation is not None
    assert own.flushes == 1
    assert allowance_lines(caller, reservation) == (
        b"x-ratelimit-limit-tokens: 1000\r\nx-ratelimit-remaining-tokens: 370\r\nx-ratelimit-reset-tokens: 1m0s\r\n"
    )
    with pytest.raises(GatewayError) as refused:
        own.quotas.reserve(caller, CHAT, 100, TokensAsked(1, 1, 341))
    assert refused.value.kind is TOKEN_RATE_EXCEEDED
    assert own.quotas.reserve(caller, CHAT, 100, TokensAsked(1, 1, None)) is not None


def test_a_request_that_has_waited_is_refused_if_others_have_used_more_than_they_had_reserved() -> None:
    own = Quotas()
    caller = alice(tokens_per_minute=1000)
    first, second = [own.quotas.reserve(caller, CHAT, 10, TokensAsked()) for _ in range(2)]
    assert first is not None
    own.quotas.check_again(caller, second)
    first.settle(1000)
    flushes = own.flushes
    with pytest.raises(GatewayError) as refused:
        own.quotas.check_again(caller, second)
    assert refused.value.kind is TOKEN_RATE_EXCEEDED
    assert own.flushes == flushes + 1
    own.quotas.check_again(alice(), None)


def test_without_a_limit_on_the_minute_nothing_counts_within_it() -> None:
    """Also of what was counted before the limit was lifted."""
    own = Quotas()
    assert own.quotas.reserve(alice(tokens_per_minute=1000), CHAT, 100, TokensAsked(1, 1, 300)) is not None
    nothing = {"limit": None, "used": 0, "left": None, "resets_in_s": 0}
    assert own.quotas.report(alice())["tokens_per_minute"] == nothing
