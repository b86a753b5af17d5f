"""page_files.py: each file is fetched once a minute, few at once, and is sent with the fields that a browser needs."""

import asyncio
import gzip
import re
from base64 import b64encode
from hashlib import sha256

import pytest

from backend.fetch import FetchedFile
from core.errors import BACKEND_UNAVAILABLE, LOADING, GatewayError
from http1.grammar import parse_response_head
from proxy.page_files import (
    KEPT_S,
    MAX_AT_ONCE,
    MAX_KEPT_BYTES,
    MAX_WAITING,
    PageFile,
    PageFiles,
    content_policy,
    page_file,
)
from support.clock import Clock
from support.memory_transport import memory_test, turns_until

GZIP = b"Accept-Encoding: gzip\r\n"
INLINE = b"\n start();\n"
INDEX = b"<html><script src='x.js'></script><script type=module>" + INLINE + b"</script>"
HASH = "'sha256-" + b64encode(sha256(INLINE).digest()).decode() + "'"


def fetched(*lines: bytes, body: bytes = b"x", status: bytes = b"200 OK") -> FetchedFile:
    head = parse_response_head(b"\r\n".join([b"HTTP/1.1 " + status, *lines, b"", b""]))
    return FetchedFile(head, (body[:1], body[1:]))


class Server:
    """The backend, which answers when it is let, and the files."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.asked: list[tuple[bytes, bytes]] = []
        self.answers: list[asyncio.Future[FetchedFile]] = []
        self.files = PageFiles(self._fetch, clock)

    async def _fetch(self, target: bytes, lines: bytes, most_bytes: int) -> FetchedFile:
        self.asked.append((target, lines))
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    def find(self, path: bytes = b"/x.js", *, gzip: bool = False) -> "asyncio.Task[PageFile]":
        return asyncio.ensure_future(self.files.find(path, gzip=gzip))

    async def answer(self, one: FetchedFile, number: int = -1) -> None:
        await turns_until(lambda: self.answers)
        self.answers[number].set_result(one)


serving = memory_test(Server)


@serving
async def test_many_clients_are_one_request(server: Server) -> None:
    clients = [server.find() for _ in range(100)]
    await server.answer(fetched(body=b"hello"))
    found = await asyncio.gather(*clients)
    assert {b"".join(each.pieces) for each in found} == {b"hello"}
    assert server.asked == [(b"/x.js", b"")]
    assert (await server.find()).length == 5
    assert server.files.kept(b"/x.js", gzip=False) is found[0]
    assert len(server.asked) == 1


@serving
async def test_a_coding_is_asked_for_only_for_clients_that_take_it(server: Server) -> None:
    clients = [server.find(gzip=True), server.find(gzip=False)]
    await turns_until(lambda: len(server.answers) == 2)
    for number, client in enumerate(clients):
        await server.answer(fetched(), number)
        await client
    assert server.asked == [(b"/x.js", GZIP), (b"/x.js", b"")]


@serving
async def test_a_file_is_fetched_again_after_a_minute(server: Server) -> None:
    client = server.find()
    await server.answer(fetched())
    await client
    server.files.on_tick(server.clock() + KEPT_S - 0.1)
    assert server.files.kept(b"/x.js", gzip=False)
    server.files.on_tick(server.clock() + KEPT_S)
    assert not server.files.kept(b"/x.js", gzip=False)
    server.files.on_tick(server.clock() + KEPT_S)


@serving
async def test_all_are_forgotten_when_the_backend_ends(server: Server) -> None:
    client = server.find()
    await server.answer(fetched())
    await client
    server.files.forget()
    assert not server.files.kept(b"/x.js", gzip=False)


@serving
async def test_only_what_exists_is_kept(server: Server) -> None:
    client = server.find()
    await server.answer(fetched(status=b"404 Not Found"))
    assert (await client).status == 404
    assert not server.files.kept(b"/x.js", gzip=False)


@serving
async def test_few_are_fetched_at_once_and_not_many_wait(server: Server) -> None:
    clients = [server.find(b"/%d.js" % number) for number in range(MAX_WAITING)]
    await turns_until(lambda: server.answers)
    await asyncio.sleep(0)
    assert len(server.asked) == MAX_AT_ONCE
    with pytest.raises(GatewayError) as refused:
        await server.find(b"/more.js")
    assert refused.value.kind is LOADING
    for number in range(MAX_WAITING):
        await turns_until(lambda number=number: len(server.answers) > number)
        assert len(server.asked) <= number + MAX_AT_ONCE
        await server.answer(fetched(), number)
    assert len(await asyncio.gather(*clients)) == MAX_WAITING


@serving
async def test_an_error_is_that_of_all_who_wait(server: Server) -> None:
    clients = [server.find(), server.find()]
    await turns_until(lambda: server.answers)
    server.answers[0].set_exception(GatewayError(BACKEND_UNAVAILABLE))
    for client in clients:
        with pytest.raises(GatewayError) as failed:
            await client
        assert failed.value.kind is BACKEND_UNAVAILABLE
    client = server.find()
    await turns_until(lambda: len(server.answers) == 2)
    await server.answer(fetched())
    assert (await client).status == 200


@serving
async def test_a_client_that_leaves_takes_the_file_from_no_other(server: Server) -> None:
    first, second = server.find(), server.find()
    await turns_until(lambda: server.answers)
    first.cancel()
    await asyncio.sleep(0)
    await server.answer(fetched())
    assert (await second).status == 200


@serving
async def test_what_is_kept_is_bounded(server: Server) -> None:
    third = FetchedFile(fetched().head, (bytes(MAX_KEPT_BYTES // 3),))
    for number in range(4):
        client = server.find(b"/%d.js" % number)
        await turns_until(lambda number=number: len(server.answers) > number)
        await server.answer(third)
        await client
    kept = [number for number in range(4) if server.files.kept(b"/%d.js" % number, gzip=False)]
    assert kept == [1, 2, 3]


@serving
async def test_the_end_gives_up_what_is_being_fetched(server: Server) -> None:
    client = server.find()
    await turns_until(lambda: server.answers)
    await server.files.close()
    with pytest.raises(asyncio.CancelledError):
        await client
    await server.files.close()


# --- The fields of a file ---


def fields_of(path: bytes, one: FetchedFile) -> dict[bytes, bytes]:
    return dict(page_file(path, one, 0.0).fields)


def test_what_describes_a_file_is_passed_on_and_nothing_else() -> None:
    lines = [b"Content-Type: text/css", b'ETag: "1"', b"Cache-Control: public", b"Last-Modified: x"]
    isolation = [b"Cross-Origin-Embedder-Policy: require-corp", b"Cross-Origin-Opener-Policy: same-origin"]
    others = [
        b"Server: llama.cpp",
        b"Access-Control-Allow-Origin: *",
        b"Set-Cookie: a=b",
        b"Content-Length: 1",
        b"X: y",
    ]
    found = page_file(b"/x.css", fetched(*lines, *isolation, *others), 7.0)
    assert found.fields == (
        (b"Content-Type", b"text/css"),
        (b"ETag", b'"1"'),
        (b"Cache-Control", b"public"),
        (b"Last-Modified", b"x"),
        (b"Cross-Origin-Embedder-Policy", b"require-corp"),
        (b"Cross-Origin-Opener-Policy", b"same-origin"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"X-Frame-Options", b"DENY"),
        (b"Referrer-Policy", b"no-referrer"),
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
    )
    assert (found.etag, found.length, found.fetched_s) == (b'"1"', 1, 7.0)


@pytest.mark.parametrize(
    ("path", "policy"),
    [
        (b"/", b"no-cache"),
        (b"/sw.js", b"no-cache"),
        (b"/_app/version.json", b"no-cache"),
        (b"/_app/immutable/bundle.1.js", b"public, max-age=31536000, immutable"),
    ],
)
def test_a_cache_policy_is_added_if_the_backend_has_none(path: bytes, policy: bytes) -> None:
    assert fields_of(path, fetched())[b"Cache-Control"] == policy


def test_a_coded_file_differs_by_what_the_client_takes() -> None:
    assert fields_of(b"/x.js", fetched(b"Content-Encoding: gzip"))[b"Vary"] == b"Accept-Encoding"
    assert b"Vary" not in fields_of(b"/x.js", fetched())


# --- The policy of a page ---


def scripts(policy: bytes) -> str:
    (found,) = re.findall(r"script-src ([^;]*)", policy.decode())
    return str(found)


def test_only_pages_have_a_policy() -> None:
    assert b"Content-Security-Policy" not in fields_of(b"/x.js", fetched(b"Content-Type: text/javascript"))
    policy = fields_of(b"/", fetched(b"Content-Type: text/html; charset=utf-8", body=INDEX))[b"Content-Security-Policy"]
    for part in ("default-src 'self'", "object-src 'none'", "frame-ancestors 'none'", "base-uri 'self'"):
        assert part in policy.decode().split("; "), part
    assert b"http" not in policy


def test_the_scripts_of_a_page_are_allowed_by_their_hashes() -> None:
    assert scripts(content_policy(fetched(body=INDEX))) == f"'self' {HASH}"
    assert scripts(content_policy(fetched(body=b"<html>"))) == "'self'"
    assert "unsafe" not in scripts(content_policy(fetched(body=INDEX)))


def test_the_scripts_of_a_compressed_page_are_found() -> None:
    coded = fetched(b"Content-Encoding: gzip", body=gzip.compress(INDEX))
    assert scripts(content_policy(coded)) == f"'self' {HASH}"
    assert scripts(content_policy(fetched(b"Content-Encoding: gzip", body=b"no gzip"))) == "'self'"


def test_a_page_that_unpacks_without_end_is_read_so_far() -> None:
    endless = fetched(b"Content-Encoding: gzip", body=gzip.compress(bytes(64 << 20) + INDEX))
    assert scripts(content_policy(endless)) == "'self'"
