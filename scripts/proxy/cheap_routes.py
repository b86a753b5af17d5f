"""Bounds of the routes that take no slot but the backend's CPU time: tokenizing, templates, counting of tokens.

llama-server works on them at once, besides its slots. So it is bounded how many run at once, in fair order between
keys, how large each may be, and how many a key may send per minute: they cannot starve the work in the slots.
"""

from collections.abc import Callable
from dataclasses import replace

from auth import Caller, RateLimiter
from config.settings import CheapSettings
from core.errors import PAYLOAD_TOO_LARGE, RATE_LIMIT_EXCEEDED, GatewayError
from policy.fair_queue import FairQueue


class CheapRoutes:
    """Decides whether a request for one of these routes may go on. `queue` admits them."""

    def __init__(
        self, settings: CheapSettings, max_waiting: int, clock: Callable[[], float], *, rated: bool = True
    ) -> None:
        """`max_waiting` bounds how many of them wait; 0 is no limit. Without `rated` their rate has no limit."""
        self._settings = settings
        self._rated = rated
        self._limiter = RateLimiter(clock)
        self.queue = FairQueue(settings.max_concurrent, max_waiting, clock)

    def check_size(self, length: int) -> None:
        """Raise PAYLOAD_TOO_LARGE if a body is longer than allowed."""
        if length > self._settings.body_bytes:
            message = f"The request body exceeds MAX_CHEAP_BODY_SIZE ({self._settings.body_bytes} bytes) of this route."
            raise GatewayError(PAYLOAD_TOO_LARGE, message)

    def count(self, caller: Caller) -> None:
        """Count a request against the rate of a key on these routes. Raises RATE_LIMIT_EXCEEDED."""
        if not self._rated:
            return
        limit = self._settings.max_requests_per_minute
        try:
            self._limiter.acquire(replace(caller, rate_limit=limit))
        except GatewayError as error:
            routes = "that tokenize, fill a template, count tokens or read /props"
            message = (
                f"Each API key is limited to {limit} requests per minute {routes} (MAX_CHEAP_REQUESTS_PER_MINUTE)."
            )
            raise GatewayError(
                RATE_LIMIT_EXCEEDED, message, fields=error.fields, retry_after_s=error.retry_after_s
            ) from None
