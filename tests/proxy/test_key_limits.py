"""key_limits.py: what /usage says of the limits of each key."""

from typing import Any

from accounting.token_estimates import TokenEstimator
from auth import Caller, Keyring, RateLimiter
from policy.routes import Routes
from policy.token_limiter import TokenLimiter
from policy.token_limits import TokensAsked
from proxy.key_limits import KeyLimits
from proxy.token_quotas import TokenQuotas
from support.clock import Clock
from support.memory_gateway import Ledger

CHAT = Routes().find(b"POST", b"/v1/chat/completions")
ALICE = Caller("alice", "infer", 60, 2, 0, 1000, 500, 9000, 64)
OLD_ALICE = Caller("alice", "infer", 5)
BOB = Caller("bob", "infer", 100)


class Keys:
    keyring = Keyring({b"1": OLD_ALICE, b"2": BOB, b"3": ALICE})


def test_each_limit_has_what_is_used_and_left_and_when_it_resets() -> None:
    clock, ledger, keys = Clock(), Ledger(), Keys()
    ledger.spent, ledger.spent_in_month = 1200, 3000
    rates, limiter = RateLimiter(clock), TokenLimiter(clock)
    parts: Any = (ledger, keys)
    quotas = TokenQuotas(parts[0], limiter, TokenEstimator(), lambda: None)
    rates.acquire(ALICE)
    quotas.reserve(ALICE, CHAT, 100, TokensAsked(max_tokens=10))
    clock.advance(12.5)
    alice, bob = KeyLimits(parts[1], rates, quotas).report(BOB, "")
    assert alice == {
        "key_id": "alice",
        "requests_per_minute": {"limit": 60, "used": 1, "left": 59, "resets_in_s": 48},
        "tokens_per_minute": {"limit": 500, "used": 40, "left": 460, "resets_in_s": 48},
        "tokens_per_day": {"limit": 1000, "used": 1200, "left": 0, "resets_in_s": 1235},
        "tokens_per_month": {"limit": 9000, "used": 3000, "left": 6000, "resets_in_s": 100_000},
        "max_tokens": 64,
        "parallel": 2,
    }
    assert bob["key_id"] == "bob"
    assert bob["tokens_per_minute"] == {"limit": None, "used": 0, "left": None, "resets_in_s": 0}
    assert bob["requests_per_minute"] == {"limit": 100, "used": 0, "left": 100, "resets_in_s": 0}


def test_one_key_is_reported_with_the_limits_of_the_line_that_was_sent() -> None:
    clock = Clock()
    parts: Any = (Ledger(), Keys())
    limits = KeyLimits(parts[1], RateLimiter(clock), TokenQuotas(parts[0], TokenLimiter(clock), TokenEstimator(), int))
    (one,) = limits.report(OLD_ALICE, "alice")
    assert one["requests_per_minute"]["limit"] == 5  # type: ignore[index]
    assert limits.report(BOB, "nobody") == []
