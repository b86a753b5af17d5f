"""The limits on a key's tokens: what it has used up, what a request may use, and what its answer reports."""

from collections.abc import Callable
from math import ceil

from accounting.ledger import Ledger
from accounting.token_estimates import TokenEstimator
from auth import Caller
from core.errors import TOKEN_QUOTA_EXCEEDED, GatewayError
from core.sliding_window import WINDOW_S
from http1.grammar import field_lines
from policy.routes import Route
from policy.token_limiter import Reservation, TokenLimiter, token_allowance
from policy.token_limits import TokensAsked


class TokenQuotas:
    """Compares what requests ask for with the limits of their keys.

    Every comparison is with current numbers: all requests that have ended by then are charged first.
    """

    def __init__(
        self, ledger: Ledger, limiter: TokenLimiter, estimator: TokenEstimator, flush_accounts: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._limiter = limiter
        self._estimator = estimator
        self._flush_accounts = flush_accounts

    def check(self, caller: Caller) -> None:
        """Raise TOKEN_QUOTA_EXCEEDED if the key's tokens for today or this month are used up."""
        day, month = caller.tokens_per_day, caller.tokens_per_month
        if day is None and month is None:
            return
        self._flush_accounts()
        ledger, key_id = self._ledger, caller.key_id
        if month is not None and ledger.spent_this_month(key_id) >= month:
            raise _used_up(month, "a month, and this month's", ledger.next_month(), ledger.month_resets_in_s())
        if day is not None and ledger.spent_today(key_id) >= day:
            raise _used_up(day, "a day, and today's", ledger.next_day(), ledger.resets_in_s())

    def check_again(self, caller: Caller, reservation: Reservation | None) -> None:
        """Do what `check` does for a request that has waited, and raise TOKEN_RATE_EXCEEDED if others have used more.

        What a request has reserved may be far below what it uses: how long its prompt is, is only an estimate.
        """
        self.check(caller)
        if caller.tokens_per_minute is not None and reservation is not None:
            self._flush_accounts()
            self._limiter.check(caller.key_id, caller.tokens_per_minute, reservation.tokens)

    def reserve(self, caller: Caller, route: Route, body_bytes: int, asked: TokensAsked) -> Reservation | None:
        """Reserve what a request may use within a minute. Raises TOKEN_RATE_EXCEEDED."""
        limit = caller.tokens_per_minute
        if limit is None:
            return None
        self._flush_accounts()
        prompt = self._estimator.prompt_tokens(caller.key_id, route.label, body_bytes)
        tokens = prompt + (asked.max_tokens or 0) * asked.answers
        return self._limiter.reserve(caller.key_id, limit, tokens)

    def report(self, caller: Caller) -> dict[str, object]:
        """Return the limits on a key's tokens, what is used of them, what is left, and when that changes."""
        # What was counted before a limit was lifted says nothing.
        minute, minute_resets_s = (0, 0.0) if caller.tokens_per_minute is None else self._limiter.used(caller.key_id)
        ledger, key_id = self._ledger, caller.key_id
        return {
            "tokens_per_minute": standing(caller.tokens_per_minute, minute, minute_resets_s),
            "tokens_per_day": standing(caller.tokens_per_day, ledger.spent_today(key_id), ledger.resets_in_s()),
            "tokens_per_month": standing(
                caller.tokens_per_month, ledger.spent_this_month(key_id), ledger.month_resets_in_s()
            ),
            "max_tokens": caller.max_tokens,
        }


def standing(limit: int | None, used: int, resets_in_s: float) -> dict[str, object]:
    """Return a limit, what is used of it, what is left, and the whole seconds until nothing counts any more."""
    left = None if limit is None else max(limit - used, 0)
    return {"limit": limit, "used": used, "left": left, "resets_in_s": ceil(resets_in_s)}


def _used_up(limit: int, period: str, resets_on: str, resets_in_s: float) -> GatewayError:
    new = f"new ones come on {resets_on} at 00:00 UTC"
    message = f"This API key is limited to {limit} tokens {period} are used up; {new}."
    return GatewayError(TOKEN_QUOTA_EXCEEDED, message, retry_after_s=ceil(resets_in_s))


def allowance_lines(caller: Caller, reservation: Reservation) -> bytes:
    """Return the field lines that report what a key's tokens per minute leave, just after they were reserved."""
    assert caller.tokens_per_minute is not None  # else there is no reservation
    return field_lines(token_allowance(caller.tokens_per_minute, reservation.remaining, WINDOW_S))
