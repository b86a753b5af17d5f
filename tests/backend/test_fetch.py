"""fetch.py: the gateway's own requests to the backend, and pages that are late, cut or without end."""

import asyncio
from collections.abc import Callable

import pytest

from backend.fetch import BackendFetcher, FetchedFile, PageTooLong
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from support.backend import LAST_CHUNK, answer, chunk
from support.clock import Clock
from support.feeds import FEEDS, Feed
from support.memory_transport import ABORTED, LOST, Connector, Link, MemoryTransport, memory_test, turns_until
from transport.pool import ConnectionPool

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"
MAX_PAGE_BYTES = 1 << 20
ENDED = (ABORTED, LOST)


class Fetching:
    """A page that is being fetched, and the backend that is asked for it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.link = Link(clock)
        self.connector = Connector()
        self.pool = pool = ConnectionPool(
            "backend", 8080, self.link.ticker, self.link.batcher, 65536, None, self.connector
        )
        self.fetch = BackendFetcher(pool, b"Host: backend\r\nAuthorization: Bearer key\r\n", 5.0)
        self.page = asyncio.ensure_future(self.fetch(b"/props"))

    async def asked(self) -> MemoryTransport:
        """Return the backend's end of the connection once the request is there."""
        transports = self.connector.transports
        await turns_until(lambda: self.link.batcher.flush() or (transports and transports[-1].written))
        return transports[-1]

    async def ended(self) -> object:
        """Return the page, or the error's kind."""
        try:
            return await self.page
        except GatewayError as error:
            return error.kind

    def leave(self) -> None:
        """No connection is used again."""
        assert [transport.state for transport in self.connector.transports if transport.state not in ENDED] == []


fetching = memory_test(Fetching, Fetching.leave)


@fetching
async def test_a_page_is_asked_for_with_the_gateways_own_fields(page: Fetching) -> None:
    backend = await page.asked()
    assert backend.take() == b"GET /props HTTP/1.1\r\nHost: backend\r\nAuthorization: Bearer key\r\n\r\n"
    backend.receive(answer(b'{"total_slots": 4}'))
    assert await page.ended() == (200, b'{"total_slots": 4}')


@fetching
async def test_any_status_is_an_answer(page: Fetching) -> None:
    (await page.asked()).receive(answer(b"no", b"501 Not Implemented"))
    assert await page.ended() == (501, b"no")


@fetching
async def test_the_status_alone_can_be_asked_for(page: Fetching) -> None:
    (await page.asked()).receive(answer())
    await page.page
    status = asyncio.ensure_future(page.fetch.status(b"/health"))
    await turns_until(lambda: page.link.batcher.flush() or len(page.connector.transports) == 2)
    await turns_until(lambda: page.link.batcher.flush() or page.connector.transports[1].written)
    page.connector.transports[1].receive(answer(b"", b"503 Service Unavailable"))
    assert await status == 503


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize(
    "raw", [answer(b"hello"), CHUNKED + chunk(b"he") + chunk(b"llo") + LAST_CHUNK, UNTIL_CLOSE + b"hello"]
)
@fetching
async def test_a_page_may_arrive_in_pieces(page: Fetching, raw: bytes, feed: Feed) -> None:
    backend = await page.asked()
    for piece in feed(raw):
        backend.receive(piece)
        await asyncio.sleep(0)
    if raw.startswith(UNTIL_CLOSE):
        backend.receive_eof()
    status, body = await page.page
    assert (status, body) == (200, b"hello")


# --- Pages that do not come whole ---


@fetching
async def test_a_page_that_is_late_is_a_time_out(page: Fetching) -> None:
    (await page.asked()).receive(answer(b"hello")[:-1])
    assert await page.ended() is BACKEND_TIMEOUT
    assert page.clock() == pytest.approx(1005)


@pytest.mark.parametrize("end", [MemoryTransport.receive_eof, lambda backend: backend.lose(ConnectionResetError())])
@pytest.mark.parametrize("raw", [answer(b"hello")[:-1], CHUNKED + chunk(b"hell"), UNTIL_CLOSE + b"hell"])
@pytest.mark.parametrize("at_once", [True, False])
@fetching
async def test_a_page_that_is_cut_is_an_error(
    page: Fetching, raw: bytes, end: Callable[[MemoryTransport], None], at_once: bool
) -> None:
    backend = await page.asked()
    backend.receive(raw)
    if not at_once:
        await asyncio.sleep(0.1)
    end(backend)
    is_whole = raw.startswith(UNTIL_CLOSE) and end is MemoryTransport.receive_eof
    assert await page.ended() == ((200, b"hell") if is_whole else BACKEND_UNAVAILABLE)


@fetching
async def test_a_page_that_is_malformed_is_an_error(page: Fetching) -> None:
    (await page.asked()).receive(CHUNKED + b"x\r\n")
    assert await page.ended() is BACKEND_MALFORMED


@fetching
async def test_a_page_that_becomes_malformed_is_an_error(page: Fetching) -> None:
    backend = await page.asked()
    backend.receive(CHUNKED + chunk(b"hello"))
    await asyncio.sleep(0.1)
    backend.receive(b"x\r\n")
    assert await page.ended() is BACKEND_MALFORMED


@fetching
async def test_a_head_that_is_malformed_is_an_error(page: Fetching) -> None:
    (await page.asked()).receive(b"HTTP/1.1 OK\r\n\r\n")
    assert await page.ended() is BACKEND_MALFORMED


@fetching
async def test_a_backend_that_closes_without_an_answer_is_unavailable(page: Fetching) -> None:
    (await page.asked()).receive_eof()
    assert await page.ended() is BACKEND_UNAVAILABLE


@fetching
async def test_a_backend_that_does_not_accept_is_unavailable(page: Fetching) -> None:
    page.connector.error = ConnectionRefusedError()
    assert await page.ended() is BACKEND_UNAVAILABLE


@fetching
async def test_a_page_without_end_is_read_so_far_and_no_further(page: Fetching) -> None:
    backend = await page.asked()
    backend.receive(UNTIL_CLOSE)
    await asyncio.sleep(0.1)
    backend.receive(b"x" * MAX_PAGE_BYTES)
    await asyncio.sleep(0.1)
    assert not page.page.done()
    backend.receive(b"x")
    with pytest.raises(PageTooLong):
        await page.page


# --- Files ---

MOST_BYTES = 10


def fetch_file(page: Fetching) -> "asyncio.Task[FetchedFile]":
    page.page.cancel()
    return asyncio.ensure_future(page.fetch.file(b"/sw.js", b"Accept-Encoding: gzip\r\n", MOST_BYTES))


async def file_asked(page: Fetching) -> MemoryTransport:
    """Return the backend's end of the connection of a file."""
    transports = page.connector.transports
    await turns_until(
        lambda: page.link.batcher.flush() or (transports and b"sw.js" in b"".join(transports[-1].written))
    )
    return transports[-1]


async def end_of_file(task: "asyncio.Task[FetchedFile]") -> object:
    try:
        return (await task).pieces
    except GatewayError as error:
        return error.kind


@fetching
async def test_a_file_is_asked_for_with_fields_of_its_own(page: Fetching) -> None:
    task = fetch_file(page)
    backend = await file_asked(page)
    lines = b"Host: backend\r\nAuthorization: Bearer key\r\nAccept-Encoding: gzip\r\n"
    assert backend.take() == b"GET /sw.js HTTP/1.1\r\n" + lines + b"\r\n"
    backend.receive(answer(b"hello", b"404 Not Found"))
    found = await task
    assert (found.head.status, found.pieces) == (404, (b"hello",))


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize(
    "raw", [answer(b"hello"), answer(b""), CHUNKED + chunk(b"he") + chunk(b"llo") + LAST_CHUNK, UNTIL_CLOSE + b"hello"]
)
@fetching
async def test_a_file_comes_whole(page: Fetching, raw: bytes, feed: Feed) -> None:
    task = fetch_file(page)
    backend = await file_asked(page)
    for piece in feed(raw):
        backend.receive(piece)
        await asyncio.sleep(0)
    if raw.startswith(UNTIL_CLOSE):
        backend.receive_eof()
    pieces = await end_of_file(task)
    assert isinstance(pieces, tuple)
    assert b"".join(pieces) == (b"" if raw == answer(b"") else b"hello")


@pytest.mark.parametrize("end", [MemoryTransport.receive_eof, lambda backend: backend.lose(ConnectionResetError())])
@pytest.mark.parametrize("raw", [answer(b"hello")[:-1], CHUNKED + chunk(b"hell"), answer(b"hello")[:20]])
@pytest.mark.parametrize("at_once", [True, False])
@fetching
async def test_a_file_that_is_cut_is_an_error(
    page: Fetching, raw: bytes, end: Callable[[MemoryTransport], None], at_once: bool
) -> None:
    task = fetch_file(page)
    backend = await file_asked(page)
    backend.receive(raw)
    if not at_once:
        await asyncio.sleep(0.1)
    end(backend)
    assert await end_of_file(task) is BACKEND_UNAVAILABLE


@pytest.mark.parametrize("raw", [answer(b"x" * 11), CHUNKED + chunk(b"x" * 11), CHUNKED + chunk(b"x") + b"z\r\n"])
@fetching
async def test_a_file_that_is_too_long_or_malformed_is_an_error(page: Fetching, raw: bytes) -> None:
    task = fetch_file(page)
    (await file_asked(page)).receive(raw)
    assert await end_of_file(task) is BACKEND_MALFORMED


@fetching
async def test_a_file_that_is_late_is_a_time_out(page: Fetching) -> None:
    task = fetch_file(page)
    (await file_asked(page)).receive(answer(b"hello")[:-1])
    assert await end_of_file(task) is BACKEND_TIMEOUT


@fetching
async def test_a_file_is_no_sign_of_work(page: Fetching) -> None:
    task = fetch_file(page)
    (await file_asked(page)).receive(answer(b"hello"))
    await task
    assert not page.pool.last_activity.seen
    transports, before = page.connector.transports, len(page.connector.transports)
    page.page = asyncio.ensure_future(page.fetch(b"/props"))
    await turns_until(lambda: page.link.batcher.flush() or (len(transports) > before and transports[-1].written))
    transports[-1].receive(answer(b"hello"))
    await page.page
    assert page.pool.last_activity.seen
