"""scraped_metrics.py: one cached scrape of the backend's metrics."""

import asyncio

import pytest

from backend.scraped_metrics import ScrapedMetrics
from core.errors import BACKEND_UNAVAILABLE, GatewayError
from support.clock import Clock

PAGE = b"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 2\n"


class Backend:
    """Responds to GET /metrics with a page, or with an error if there is none."""

    def __init__(self) -> None:
        self.page: tuple[int, bytes] | None = (200, PAGE)
        self.scrapes = 0

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        assert target == b"/metrics"
        self.scrapes += 1
        if self.page is None:
            raise GatewayError(BACKEND_UNAVAILABLE)
        return self.page


def names(metrics: ScrapedMetrics) -> list[str]:
    return [family.name for family in metrics.families.families()]


def test_a_scrape_is_due_at_first_and_after_each_interval() -> None:
    backend, clock = Backend(), Clock()
    metrics = ScrapedMetrics(backend.fetch, 10.0, clock)
    assert metrics.due
    asyncio.run(metrics.refresh())
    clock.advance(9.5)
    assert not metrics.due
    clock.advance(0.5)
    assert metrics.due
    assert names(metrics) == ["llamacpp_requests_processing"]


def test_without_an_interval_no_scrape_is_due() -> None:
    assert not ScrapedMetrics(Backend().fetch, 0, Clock()).due


@pytest.mark.parametrize("page", [None, (501, b"{}"), (404, PAGE), (200, b"\xff\xfe")])
def test_a_failed_scrape_removes_the_metrics(page: tuple[int, bytes] | None) -> None:
    backend = Backend()
    metrics = ScrapedMetrics(backend.fetch, 10.0, Clock())
    asyncio.run(metrics.refresh())
    backend.page = page
    asyncio.run(metrics.refresh())
    assert names(metrics) == []
    assert not metrics.due
    assert backend.scrapes == 2
