"""The tokens that each key may use within a minute: reserved before a request runs, settled when it has ended."""

import math
from collections.abc import Callable
from typing import NoReturn

from auth import serialize_duration
from core.errors import TOKEN_RATE_EXCEEDED, Fields, GatewayError
from core.sliding_window import WINDOW_S, SlidingWindow, WindowTable


def token_allowance(limit: int, remaining: int, reset_s: float) -> Fields:
    """Return the x-ratelimit fields. `reset_s` is the time until no token of the key counts any more."""
    return (
        (b"x-ratelimit-limit-tokens", b"%d" % limit),
        (b"x-ratelimit-remaining-tokens", b"%d" % max(remaining, 0)),
        (b"x-ratelimit-reset-tokens", serialize_duration(reset_s)),
    )


class Reservation:
    """The `tokens` that one request may use, as far as is known. `remaining` is what was left besides."""

    __slots__ = ("_key_id", "_limiter", "_reserved_s", "remaining", "tokens")

    def __init__(self, limiter: "TokenLimiter", key_id: str, reserved: int, reserved_s: float, remaining: int) -> None:
        self._limiter = limiter
        self._key_id = key_id
        self.tokens = reserved
        self._reserved_s = reserved_s
        self.remaining = remaining

    def settle(self, used: int) -> None:
        """Let the request count with the tokens that it has used in place of those that it has reserved."""
        reserved, self.tokens = self.tokens, used
        self._limiter.correct(self._key_id, self._reserved_s, used - reserved)


class TokenLimiter:
    """Counts the tokens of each key in a sliding window of 60 s, and refuses requests that do not fit in.

    A request counts from its admission on, with what it has reserved and later with what it has used. Retry-After is
    the time after which the same request fits, unless another one of the key is admitted before.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds."""
        self._clock = clock
        self._windows = WindowTable(clock())

    def __len__(self) -> int:
        return len(self._windows)

    def reserve(self, key_id: str, limit: int, tokens: int) -> Reservation:
        """Reserve tokens. A request for more than the limit reserves all of it, so that it can run alone.

        Raises GatewayError(TOKEN_RATE_EXCEEDED) if they do not fit in now.
        """
        now_s = self._clock()
        window = self._windows.get(key_id) or self._windows.add_key(key_id, now_s)
        window.expire(now_s)
        tokens = min(max(tokens, 1), limit)
        remaining = limit - window.total - tokens
        if remaining < 0:
            needs = f"needs {tokens} of them to begin"
            if tokens == limit:
                needs = "may use the whole limit, so it begins when no other tokens of the key count"
            left = f"{max(limit - window.total, 0)} are left now"
            _refuse(window, limit, tokens, f"This request {needs}; {left}.", now_s)
        window.add(now_s, tokens)
        return Reservation(self, key_id, tokens, now_s, remaining)

    def check(self, key_id: str, limit: int, reserved: int) -> None:
        """Raise GatewayError(TOKEN_RATE_EXCEEDED) if other requests than that which has `reserved` use up the limit.

        They have used more than they had reserved then.
        """
        now_s = self._clock()
        window = self._windows.get(key_id)
        if window is not None:
            window.expire(now_s)
            if window.total - reserved >= limit:
                _refuse(window, limit, 0, f"Its requests have used {window.total - reserved}.", now_s)

    def correct(self, key_id: str, reserved_s: float, more: int) -> None:
        """Count `more` tokens of a request, or less if that is negative.

        Less is returned to the time at which they were reserved, unless that does not count any more. More counts from
        now on: what others were promised until now stays true.
        """
        now_s = self._clock()
        window = self._windows.get(key_id) or self._windows.add_key(key_id, now_s)
        window.expire(now_s)
        if more > 0:
            window.add(now_s, more)
        elif more and now_s - reserved_s < WINDOW_S:
            window.remove(reserved_s, -more)

    def used(self, key_id: str) -> tuple[int, float]:
        """Return how many tokens of a key count now, and the seconds until none does."""
        return self._windows.used(key_id, self._clock())


def _refuse(window: SlidingWindow, limit: int, tokens: int, reason: str, now_s: float) -> NoReturn:
    # Rounded to microseconds, so that a floating-point error is not rounded up to a whole second.
    raise GatewayError(
        TOKEN_RATE_EXCEEDED,
        f"This API key is limited to {limit} tokens per minute. {reason}",
        fields=token_allowance(limit, limit - window.total, round(window.reset_s(now_s), 6)),
        retry_after_s=math.ceil(round(window.wait_s(limit - tokens + 1, now_s), 6)),
    )
