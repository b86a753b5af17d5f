"""llama-server's own metrics on the gateway's page: one cached scrape, however many scrapers there are.

Each scrape resets llama-server's averages, so that there may be one scraper only.
"""

from collections.abc import Awaitable, Callable

from errors import GatewayError
from metrics import Borrowed


class BackendPage:
    """`borrowed` is shown; it is renewed when somebody looks and it is older than `interval_s` (0 = never)."""

    def __init__(
        self,
        fetch: Callable[[bytes], Awaitable[tuple[int, bytes]]],
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.borrowed = Borrowed("llamacpp_")
        self._fetch = fetch
        self._interval_s = interval_s
        self._clock = clock
        self._asked_s: float | None = None

    @property
    def due(self) -> bool:
        if not self._interval_s:
            return False
        return self._asked_s is None or self._clock() - self._asked_s >= self._interval_s

    async def renew(self) -> None:
        """Scrape. A backend that does not answer, or has no such page, takes its numbers away."""
        self._asked_s = self._clock()
        try:
            status, page = await self._fetch(b"/metrics")
        except GatewayError:
            status, page = 0, b""
        self.borrowed.replace(page.decode("utf-8", "replace") if status == 200 else "")
