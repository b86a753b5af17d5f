"""A response and its access line are the same on a new and on a kept backend connection, whole and in pieces."""

import re
from typing import Any

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, get, post, scenario
from support.rawclient import RawClient

ID = b"X-Request-Id: t-1"
USAGE = b'{"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 7}}'
LARGE = b"x" * (300 << 10)
STREAM = STREAM_HEAD + chunk(event("1")) + chunk(event(USAGE.decode())) + chunk(event("[DONE]")) + LAST_CHUNK
INTERIM = b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n"

# The steps of the backend, and whether the client's connection stays open after the response.
RESPONSES: dict[str, tuple[list[Step], bool]] = {
    "sized": ([send(answer())], True),
    "large": ([send(answer(LARGE))], True),
    "empty": ([send(answer(b""))], True),
    "without content": ([send(b"HTTP/1.1 204 No Content\r\n\r\n")], True),
    "error of the backend": ([send(answer(b'{"error": 1}', b"500 Internal Server Error", b"Connection: close"))], True),
    "usage": ([send(answer(USAGE))], True),
    "content coding": ([send(answer(USAGE, b"200 OK", b"Content-Encoding: gzip"))], True),
    "interim before it": ([send(b"HTTP/1.1 100 Continue\r\n\r\n" + answer())], True),
    "interim with a length": ([send(INTERIM), send(answer())], True),
    "stream": ([send(STREAM)], True),
    "close-delimited": ([send(b"HTTP/1.1 200 OK\r\n\r\nhello"), close()], True),
    "bytes after the end": ([send(answer() + b"more")], True),
    "malformed": ([send(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n")], True),
    "ambiguous": ([send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")], True),
    "head too large": ([send(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000)], True),
    "switching protocols": ([send(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")], True),
    "reset in the head": ([send(b"HTTP/1.1 2"), reset()], True),
    "cut head": ([send(b"HTTP/1.1 200 OK\r\nCont"), close()], True),
    "cut body": ([send(answer()[:-3]), close()], False),
    "cut stream": ([send(STREAM_HEAD + chunk(event("1"))), close()], False),
}


async def keep_a_connection(stack: Stack) -> None:
    """Leave one idle connection in the pool."""
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(CHAT, b"{}"))).status == 200


async def received(stack: Stack, steps: list[Step], stays_open: bool) -> bytes:
    """Send one request; return what the client receives, without what differs between any two requests."""
    stack.backend.script(*steps)
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID))
    if stays_open:
        response = await client.response()
        client.send(get(b"/ping"))
        assert (await client.response()).body == b"pong\n"
        raw = response.head + response.coded
    else:
        raw = await client.take_all()
    client.close()
    return re.sub(rb"(remaining-requests|Date): [^\r]+", rb"\1: x", raw)


async def access_lines(stack: Stack) -> list[dict[str, Any]]:
    """The access lines of the requests that were compared. The clock stands still, so that durations are equal."""
    await stack.stop()
    return [{**line, "ts": 0} for line in stack.lines if line["id"] == "t-1"]


@pytest.mark.parametrize("name", RESPONSES)
@scenario()
async def test_a_kept_connection_makes_no_difference(stack: Stack, name: str) -> None:
    steps, stays_open = RESPONSES[name]
    on_new = await received(stack, steps, stays_open)
    stack.app.pool.close_idle()
    await keep_a_connection(stack)
    calls = len(stack.backend.calls)
    on_kept = await received(stack, steps, stays_open)
    assert on_kept == on_new
    assert stack.backend.calls[calls].connection is stack.backend.calls[calls - 1].connection
    first, second = await access_lines(stack)
    assert first == second


@pytest.mark.parametrize(
    "raw",
    [answer(), answer(USAGE), answer(LARGE), answer(b""), STREAM, INTERIM + answer(USAGE), answer() + b"more"],
    ids=["sized", "usage", "large", "empty", "stream", "interim", "bytes after the end"],
)
@scenario()
async def test_pieces_make_no_difference(stack: Stack, raw: bytes) -> None:
    head = raw.index(b"\r\n\r\n") + 4
    whole = await received(stack, [send(raw)], True)
    assert await received(stack, [send(raw[:head]), send(raw[head:])], True) == whole
    assert await received(stack, [send(raw, piece=max(7, len(raw) // 1000))], True) == whole
    lines = await access_lines(stack)
    assert lines == [lines[0]] * 3


@pytest.mark.parametrize("piece", [7, 1000], ids=["in pieces", "whole"])
@pytest.mark.parametrize(("minor", "fields"), [(1, [b"Connection: close"]), (0, []), (0, [b"Connection: keep-alive"])])
@scenario()
async def test_the_response_says_what_becomes_of_the_connection(
    stack: Stack, minor: int, fields: list[bytes], piece: int
) -> None:
    stack.backend.script(send(answer(), piece))
    client = await stack.client()
    client.send(post(CHAT, b"{}", *fields, minor=minor))
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)
    keeps = b"Connection: keep-alive" in fields
    assert response.field(b"connection") == (b"keep-alive" if keeps else b"close")
    if not keeps:
        await client.until(lambda: client.ended == "fin")


@scenario()
async def test_an_interim_response_with_a_length_is_not_the_response(stack: Stack) -> None:
    await keep_a_connection(stack)
    stack.backend.script(send(INTERIM), stall(stack.finish), send(answer()))
    client: RawClient = await stack.client()
    client.send(post())
    await stack.backend.call(1)
    await client.silent()
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)
