"""token_limiter.py: no 60 seconds contain more tokens than the limit, and a refusal says when the request fits in."""

import random

import pytest

from core.errors import TOKEN_RATE_EXCEEDED, GatewayError
from policy.token_limiter import TokenLimiter
from support.clock import Clock

LIMIT = 1000


class Limited:
    """A limiter on a fake clock, and what it is asked."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limiter = TokenLimiter(self.clock)

    def refusal(self, tokens: int) -> GatewayError:
        with pytest.raises(GatewayError) as refused:
            self.limiter.reserve("alice", LIMIT, tokens)
        assert refused.value.kind is TOKEN_RATE_EXCEEDED
        return refused.value


def test_what_is_reserved_counts_until_it_is_settled() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 600)
    assert (first.remaining, own.limiter.used("alice")) == (400, (600, 60.0))
    own.refusal(401)
    first.settle(50)
    assert own.limiter.used("alice") == (50, 60.0)
    assert own.limiter.reserve("alice", LIMIT, 950).remaining == 0


def test_keys_have_windows_of_their_own() -> None:
    own = Limited()
    own.limiter.reserve("alice", LIMIT, LIMIT)
    assert own.limiter.reserve("bob", LIMIT, LIMIT).remaining == 0
    assert own.limiter.used("carol") == (0, 0.0)


@pytest.mark.parametrize("tokens", [LIMIT, LIMIT + 1])
def test_a_request_that_may_use_the_whole_limit_is_told_when_it_begins(tokens: int) -> None:
    own = Limited()
    own.limiter.reserve("alice", LIMIT, 300)
    whole = "This request may use the whole limit, so it begins when no other tokens of the key count"
    assert own.refusal(tokens).message == (
        f"This API key is limited to 1000 tokens per minute. {whole}; 700 are left now."
    )


def test_a_refusal_reports_the_limit_and_when_the_request_fits() -> None:
    own = Limited()
    own.limiter.reserve("alice", LIMIT, 300)
    own.clock.advance(10)
    own.limiter.reserve("alice", LIMIT, 600)
    own.clock.advance(5)
    error = own.refusal(200)
    assert error.retry_after_s == 45
    assert dict(error.fields) == {
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"100",
        b"x-ratelimit-reset-tokens": b"55s",
    }
    assert error.message.endswith(" per minute. This request needs 200 of them to begin; 100 are left now.")
    assert own.refusal(500).retry_after_s == 55
    own.clock.advance(44.9)
    own.refusal(200)
    own.clock.advance(0.1)
    own.limiter.reserve("alice", LIMIT, 200)


def test_a_request_for_more_than_the_limit_runs_alone() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 10)
    assert own.refusal(5000).retry_after_s == 60
    first.settle(0)
    big = own.limiter.reserve("alice", LIMIT, 5000)
    assert big.remaining == 0
    own.refusal(1)
    big.settle(5000)
    assert own.refusal(1).retry_after_s == 60


def test_a_request_reserves_at_least_one_token() -> None:
    own = Limited()
    for _ in range(LIMIT):
        own.limiter.reserve("alice", LIMIT, 0)
    own.refusal(0)


def test_what_was_used_besides_counts_from_the_end_on() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 100)
    own.clock.advance(59)
    first.settle(900)
    assert own.limiter.used("alice") == (900, 60.0)
    own.clock.advance(1)
    assert own.limiter.used("alice") == (800, 59.0)


def test_what_waits_is_refused_if_others_have_used_more_than_they_had_reserved() -> None:
    own = Limited()
    own.limiter.check("alice", LIMIT, 10)
    first = own.limiter.reserve("alice", LIMIT, 400)
    own.clock.advance(5)
    waits = own.limiter.reserve("alice", LIMIT, 600)
    own.limiter.check("alice", LIMIT, waits.tokens)
    first.settle(LIMIT - 1)  # what it was promised holds, though both are too much
    own.limiter.check("alice", LIMIT, waits.tokens)
    first.settle(LIMIT)
    own.clock.advance(5)
    with pytest.raises(GatewayError) as refused:
        own.limiter.check("alice", LIMIT, waits.tokens)
    assert refused.value.kind is TOKEN_RATE_EXCEEDED
    assert refused.value.message == "This API key is limited to 1000 tokens per minute. Its requests have used 1000."
    assert refused.value.retry_after_s == 55
    assert (b"x-ratelimit-remaining-tokens", b"0") in dict(refused.value.fields).items()
    own.limiter.check("bob", LIMIT, 10)
    own.clock.advance(55)
    own.limiter.check("alice", LIMIT, waits.tokens)


def test_what_does_not_count_any_more_is_not_returned() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 900)
    own.clock.advance(60)
    own.limiter.reserve("alice", LIMIT, 700)
    first.settle(100)
    assert own.limiter.used("alice")[0] == 700


def test_a_reservation_is_settled_after_its_window_was_removed() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 100)
    own.clock.advance(61)
    own.limiter.reserve("bob", LIMIT, 1)
    assert len(own.limiter) == 1
    first.settle(300)
    assert own.limiter.used("alice")[0] == 200
    own.clock.advance(30)
    own.limiter.reserve("carol", LIMIT, 1)
    assert len(own.limiter) == 3


def test_settling_again_replaces_what_was_settled() -> None:
    own = Limited()
    first = own.limiter.reserve("alice", LIMIT, 100)
    for used in (30, 30, 70):
        first.settle(used)
        assert own.limiter.used("alice")[0] == used


@pytest.mark.parametrize("seed", range(10))
def test_no_minute_contains_more_admitted_tokens_than_the_limit_and_retry_after_is_exact(seed: int) -> None:
    own, dice = Limited(), random.Random(seed)
    admitted: list[tuple[float, int]] = []
    for _ in range(300):
        own.clock.advance(dice.choice([0, 0.3, 2, 9]))
        tokens = dice.randrange(1, 400)
        try:
            own.limiter.reserve("alice", LIMIT, tokens)
        except GatewayError as error:
            own.clock.advance(error.retry_after_s or 0)
            own.limiter.reserve("alice", LIMIT, tokens)
        admitted.append((own.clock(), tokens))
        start_s = own.clock() - 60 + 1e-6  # a floating-point error is no overlap
        assert sum(number for at_s, number in admitted if at_s > start_s) <= LIMIT
