"""llama-server's own metrics for the gateway's page, from one cached scrape for any number of scrapers.

Each scrape resets llama-server's averages, so there must be only one scraper.
"""

from collections.abc import Awaitable, Callable

from core.errors import GatewayError
from metrics import ScrapedFamilies


class ScrapedMetrics:
    """`families` are the metrics of the last scrape. Call `refresh` before showing them if `due`.

    `fetch` sends a GET request to the backend and returns status and body; it may raise GatewayError. `interval_s` is
    the shortest time between scrapes, 0 for no scrapes. `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        fetch: Callable[[bytes], Awaitable[tuple[int, bytes]]],
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.families = ScrapedFamilies("llamacpp_")
        self._fetch = fetch
        self._interval_s = interval_s
        self._clock = clock
        self._scraped_s: float | None = None

    @property
    def due(self) -> bool:
        if not self._interval_s:
            return False
        return self._scraped_s is None or self._clock() - self._scraped_s >= self._interval_s

    async def refresh(self) -> None:
        """Scrape the backend. If it does not respond, or has no such page, its metrics are removed."""
        self._scraped_s = self._clock()
        try:
            status, page = await self._fetch(b"/metrics")
        except GatewayError:
            status, page = 0, b""
        self.families.replace(page.decode("utf-8", "replace") if status == 200 else "")
