"""pages.py: what a browser gets at /, whatever llama-server has there, and how fast a file is sent."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from backend.fetch import FetchedFile
from backend.readiness import DEAD, READY
from backend.readiness import LOADING as IS_LOADING
from core.errors import (
    BACKEND_UNAVAILABLE,
    LOADING,
    ROUTE_NOT_FOUND,
    TOO_MANY_CONNECTIONS,
    GatewayError,
    Kind,
    PeerGone,
)
from core.installation import page
from http1.grammar import parse_response_head
from proxy.page_files import PageFiles
from proxy.pages import Pages, has_copy
from proxy.response import Response
from support.clock import Clock
from support.gateway import get, request
from support.memory_gateway import EPOCH, ScriptedReadiness, prepare
from support.memory_transport import Link, MemoryTransport, memory_test, turns_until

BROWSER = b"Accept: text/html,application/xhtml+xml,*/*;q=0.8"
ACCEPT_GZIP = b"Accept-Encoding: gzip, br"
HTML = b"Content-Type: text/html"
INDEX = b"<!doctype html><p>llama"
BIG = bytes(range(256)) * 4096
PIECE_BYTES = 64 << 10
NONE = "no page for this client"


def file(body: bytes, *lines: bytes, status: bytes = b"200 OK") -> FetchedFile:
    return FetchedFile(parse_response_head(b"\r\n".join([b"HTTP/1.1 " + status, *lines, b"", b""])), (body,))


class Site:
    """The pages, and a llama-server with these files; without one of them it answers 404."""

    def __init__(self, clock: Clock) -> None:
        self.link = Link(clock)
        self.readiness = ScriptedReadiness()
        self.files: dict[bytes, FetchedFile | Kind] = {}
        self.asked: list[tuple[bytes, bytes]] = []
        self.transport = MemoryTransport()
        self.client = self.link.client(self.transport)
        self.page_files = PageFiles(self._fetch, clock)
        self.pages = Pages(self.page_files, self.readiness, 10.0)  # type: ignore[arg-type]
        self.ends: list[object] = []

    async def _fetch(self, target: bytes, lines: bytes, most_bytes: int) -> FetchedFile:
        self.asked.append((target, lines))
        found = self.files.get(target, file(b"{}", status=b"404 Not Found"))
        if isinstance(found, Kind):
            raise GatewayError(found)
        return found

    async def ask(self, raw: bytes) -> bytes:
        """Return the response, the error's code, or NONE."""
        self.begin(raw)
        await turns_until(lambda: self.ends)
        (end,) = self.ends
        if isinstance(end, GatewayError):
            return end.kind.code.encode()
        assert not isinstance(end, Exception), end
        return NONE.encode() if end is False else self.link.sent(self.client)

    def begin(self, raw: bytes) -> None:
        prepared = prepare(raw, ui=True)
        response = Response(self.client, prepared, b"r-1", EPOCH, True)
        path = prepared.target.partition(b"?")[0]
        answer: Callable[..., Coroutine[Any, Any, object]] = self.pages.answer_file
        if path == b"/":
            answer = self.pages.answer_index

        async def handler() -> object:
            try:
                return await answer(self.client, response, prepared)
            except Exception as error:
                return error

        self.ends = []
        self.client.run_handler(handler(), self.ends.append)


site_test = memory_test(Site)


def head_of(response: bytes) -> bytes:
    return response.partition(b"\r\n\r\n")[0]


def body_of(response: bytes) -> bytes:
    return response.partition(b"\r\n\r\n")[2]


# --- The page itself ---


@site_test
async def test_the_page_is_llama_servers(site: Site) -> None:
    site.files[b"/"] = file(INDEX, HTML, b'ETag: "1"')
    response = await site.ask(get(b"/", BROWSER, key=None))
    assert head_of(response).startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Length: %d\r\n" % len(INDEX) in response
    assert b"\r\nContent-Security-Policy: default-src 'self'" in response
    assert b'\r\nETag: "1"\r\n' in response
    assert b"\r\nX-Request-Id: r-1" in response
    assert body_of(response) == INDEX
    assert site.asked == [(b"/", b"")]


@site_test
async def test_the_query_is_not_passed_on(site: Site) -> None:
    site.files |= {b"/": file(INDEX, HTML), b"/sw.js": file(b"js")}
    await site.ask(get(b"/?x=/slots"))
    await site.ask(get(b"/sw.js?y"))
    assert [target for target, _ in site.asked] == [b"/", b"/sw.js"]


@pytest.mark.parametrize("path", [b"/", b"/index.html", b"/sw.js"])
@site_test
async def test_head_has_the_fields_alone(site: Site, path: bytes) -> None:
    site.files |= {b"/": file(INDEX, HTML), b"/sw.js": file(INDEX)}
    response = await site.ask(request(b"HEAD", path))
    assert b"\r\nContent-Length: %d\r\n" % len(INDEX) in response
    assert body_of(response) == b""


@site_test
async def test_a_copy_that_is_still_good_is_not_sent_again(site: Site) -> None:
    site.files[b"/"] = file(INDEX, HTML, b'ETag: "1"')
    response = await site.ask(get(b"/", b'If-None-Match: "0", W/"1"'))
    assert head_of(response).startswith(b"HTTP/1.1 304 Not Modified\r\n")
    assert b'\r\nETag: "1"\r\n' in response
    assert b"Content-Length" not in response
    assert body_of(response) == b""
    assert body_of(await site.ask(get(b"/", b'If-None-Match: "2"'))) == INDEX


@pytest.mark.parametrize(
    ("etags", "is_it"),
    [(b'"a"', True), (b'W/"a"', True), (b'"b", "a"', True), (b"*", True), (b"", False), (b'"b"', False), (b"a", False)],
)
def test_entity_tags(etags: bytes, is_it: bool) -> None:
    assert has_copy(etags, b'"a"') is is_it
    assert has_copy(etags, b'W/"a"') is is_it


@site_test
async def test_a_coded_file_goes_to_those_who_take_it(site: Site) -> None:
    site.files[b"/sw.js"] = file(b"js", b"Content-Encoding: gzip")
    response = await site.ask(get(b"/sw.js", ACCEPT_GZIP))
    assert b"\r\nContent-Encoding: gzip\r\n" in response
    site.files[b"/sw.js"] = file(b"no gzip", status=b"415 Unsupported Media Type")
    assert (await site.ask(get(b"/sw.js"))).startswith(b"HTTP/1.1 415 ")
    assert [lines for _, lines in site.asked] == [b"Accept-Encoding: gzip\r\n", b""]


@site_test
async def test_what_needs_gzip_is_no_page_for_others(site: Site) -> None:
    """llama-server answers 415, but a client may only ask whether its base URL is alive."""
    site.files[b"/"] = file(b"no gzip", status=b"415 Unsupported Media Type")
    assert await site.ask(request(b"HEAD", b"/")) == NONE.encode()


# --- Without llama-server's page ---


@pytest.mark.parametrize("path", [b"/", b"/index.html", b"/?x"])
@pytest.mark.parametrize("state", [IS_LOADING, DEAD, READY])
@site_test
async def test_while_nothing_answers_a_page_waits(site: Site, state: str, path: bytes) -> None:
    site.readiness.state = state
    site.files |= {b"/": BACKEND_UNAVAILABLE, b"/index.html": BACKEND_UNAVAILABLE}
    response = await site.ask(get(path, BROWSER, key=None))
    assert head_of(response).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nRetry-After: 2\r\n" in response
    assert b"\r\nCache-Control: no-store\r\n" in response
    assert body_of(response) == page("loading.html")


@site_test
async def test_a_page_without_its_files_is_none(site: Site) -> None:
    """With --path llama-server sends the page while the model loads, and 503 for its files."""
    site.readiness.state = IS_LOADING
    site.files[b"/"] = file(INDEX, HTML)
    site.files[b"/build.json"] = file(b"{}", status=b"503 Service Unavailable")
    assert body_of(await site.ask(get(b"/", BROWSER))) == page("loading.html")
    site.files[b"/build.json"] = file(b"{}")
    assert body_of(await site.ask(get(b"/", BROWSER))) == INDEX
    site.files[b"/build.json"] = BACKEND_UNAVAILABLE
    site.page_files.forget()
    assert body_of(await site.ask(get(b"/", BROWSER))) == page("loading.html")


@pytest.mark.parametrize("status", [b"404 Not Found", b"403 Forbidden", b"500 Internal Server Error"])
@site_test
async def test_a_llama_server_without_a_page_gets_a_chat(site: Site, status: bytes) -> None:
    site.files[b"/"] = file(b"{}", status=status)
    for path in (b"/", b"/index.html"):
        response = await site.ask(get(path, BROWSER, key=None))
        assert head_of(response).startswith(b"HTTP/1.1 200 OK\r\n")
        assert body_of(response) == page("chat.html")
    response = await site.ask(request(b"HEAD", b"/", None, BROWSER))
    assert b"\r\nContent-Length: %d\r\n" % len(page("chat.html")) in response
    assert body_of(response) == b""


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("state", [IS_LOADING, READY])
@site_test
async def test_what_is_no_browser_gets_no_page_of_ours(site: Site, state: str, method: bytes) -> None:
    site.readiness.state = state
    assert await site.ask(request(method, b"/", None, b"Accept: */*")) == NONE.encode()


@site_test
async def test_a_service_worker_keeps_no_page_of_ours(site: Site) -> None:
    worker = get(b"/?__WB_REVISION__=1", b"Accept: */*")
    assert await site.ask(worker) == ROUTE_NOT_FOUND.code.encode()
    site.readiness.state = IS_LOADING
    assert await site.ask(worker) == LOADING.code.encode()


@site_test
async def test_a_file_that_cannot_be_had_is_an_error(site: Site) -> None:
    assert await site.ask(get(b"/sw.js")) == ROUTE_NOT_FOUND.code.encode()
    assert await site.ask(get(b"/index.html")) == ROUTE_NOT_FOUND.code.encode()
    for status, kind in ((b"503 Service Unavailable", LOADING), (b"401 Unauthorized", ROUTE_NOT_FOUND)):
        site.files[b"/sw.js"] = file(b"{}", status=status)
        assert await site.ask(get(b"/sw.js")) == kind.code.encode()
    site.files[b"/sw.js"] = BACKEND_UNAVAILABLE
    assert await site.ask(get(b"/sw.js")) == BACKEND_UNAVAILABLE.code.encode()
    site.readiness.state = IS_LOADING
    assert await site.ask(get(b"/sw.js")) == LOADING.code.encode()


# --- Slow clients ---


@site_test
async def test_a_large_file_comes_whole(site: Site) -> None:
    site.files[b"/sw.js"] = FetchedFile(file(b"").head, (BIG[:300_000], BIG[300_000:]))
    assert body_of(await site.ask(get(b"/sw.js"))) == BIG


@site_test
async def test_little_waits_for_a_slow_client(site: Site) -> None:
    site.files[b"/sw.js"] = file(BIG)
    site.transport.stall()
    site.begin(get(b"/sw.js"))
    await turns_until(site.transport.get_write_buffer_size)
    for _ in range(20):
        await asyncio.sleep(0)
    assert site.transport.get_write_buffer_size() < 3 * PIECE_BYTES
    assert not site.ends
    site.transport.take_unsent()
    await turns_until(lambda: site.ends)
    assert body_of(site.link.sent(site.client)) == BIG


@pytest.mark.parametrize(
    "end",
    [
        lambda site: site.transport.lose(),
        lambda site: site.link.advance(31),
        lambda site: site.client.cancel_wait(GatewayError(TOO_MANY_CONNECTIONS)),
    ],
    ids=["it leaves", "it takes nothing", "it gives way"],
)
@site_test
async def test_a_file_that_is_not_sent_whole_ends_the_connection(site: Site, end: Callable[[Site], None]) -> None:
    site.files[b"/sw.js"] = file(BIG)
    site.transport.stall()
    site.begin(get(b"/sw.js"))
    await turns_until(lambda: site.client.write_paused)
    end(site)
    await turns_until(lambda: site.ends)
    assert isinstance(site.ends[0], PeerGone)
