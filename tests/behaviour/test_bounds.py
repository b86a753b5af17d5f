"""Limits on what a client may send and on what the gateway holds. Refusals arrive even if the body is not read."""

import asyncio

import pytest

from support.backend import HELLO, answer, send, stall
from support.gateway import CHAT, KEY, OPERATOR_KEY, Stack, get, post, request, scenario, until

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = b"Expect: 100-continue"
CODED = b"Transfer-Encoding: chunked"


# --- Bodies ---


@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_both_sides_of_the_body_limit(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, b"x" * 1000))
    assert (await client.response()).status == 200
    client.send(
        request(b"POST", CHAT, None, CODED) + b"1F4\r\n" + b"x" * 500 + b"\r\n1f4\r\n" + b"x" * 500 + b"\r\n0\r\n\r\n"
    )
    assert (await client.response()).status == 200
    assert [len(call.body) for call in stack.backend.calls] == [1000, 1000]


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 1001\r\n\r\n",
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"Content-Length: 9999999999999999999\r\n\r\n" + b"x" * 5000,
        b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1001,
    ],
)
@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_a_body_that_is_too_large_is_refused_as_early_as_possible(stack: Stack, body: bytes) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT)[:-2] + body)
    response = await client.response()
    digits = b"99999999999999999999" in body
    assert (response.status, response.code) == ((400, "bad_request") if digits else (413, "payload_too_large"))
    if not digits:
        assert "MAX_REQUEST_BODY_SIZE (1000 bytes)" in response.json["error"]["message"]
    assert (await client.take_all(), client.ended) == (b"", "fin")
    assert not stack.backend.calls


@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_chunk_sizes_are_bounded_as_a_sum(stack: Stack) -> None:
    """The second chunk is refused at its size line, before its data arrives."""
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, CODED) + b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    await until(lambda: stack.app.memory.held_bytes == 1000)
    client.send(b"3e8\r\n" + b"x" * 1000)
    assert (await client.response()).status == 413
    assert stack.app.memory.held_bytes == 0


@scenario()
async def test_a_route_that_needs_a_body_answers_411_without_one(stack: Stack) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT) + get(b"/ping"))
    response = await client.response()
    assert (response.status, response.code) == (411, "length_required")
    assert (await client.response()).status == 200


@scenario(MAX_BUFFERED_BYTES="2000")
async def test_the_memory_for_bodies_is_bounded_and_released(stack: Stack) -> None:
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    first, second = await stack.client(), await stack.client()
    first.send(post(CHAT, b"x" * 1500))
    await stack.backend.call()
    assert stack.app.memory.held_bytes == 1500
    for raw in (post(CHAT, b"x" * 501), request(b"POST", CHAT, None, CODED) + b"1f5\r\n" + b"x" * 501 + b"\r\n"):
        response = await stack.ask(raw)
        assert (response.status, response.code, response.field(b"retry-after")) == (503, "memory_full", b"2")
        assert "MAX_BUFFERED_BYTES (2000 bytes)" in response.json["error"]["message"]
        assert stack.app.memory.held_bytes == 1500
    second.send(post(CHAT, b"x" * 500))
    assert (await second.response()).status == 200
    finish.set()
    assert (await first.response()).status == 200
    assert stack.app.memory.held_bytes == 0
    second.send(post(CHAT, b"x" * 2000))
    assert (await second.response()).status == 200


@scenario(MAX_BUFFERED_BYTES="2000")
async def test_a_body_is_released_when_the_response_begins(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\n\r\n"), stall())
    first = await stack.client()
    first.send(post(CHAT, b"x" * 2000))
    await first.take_through(b"\r\n\r\n")
    assert (await stack.ask(post(CHAT, b"x" * 2000))).status == 200


# --- Refusals, and bodies that are not read ---


@pytest.mark.parametrize("key", [None, b"sk-nobody-0123456789abcdef"])
@scenario()
async def test_the_key_is_checked_before_the_body_is_read(stack: Stack, key: bytes | None) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, b"Content-Length: 10000000", key=key))
    response = await client.response()
    assert (response.status, response.code) == (401, "invalid_api_key")
    assert response.field(b"connection") == b"close"  # since a body may still come
    await client.until(lambda: bool(client.ended))
    assert stack.app.memory.held_bytes == 0


@pytest.mark.parametrize("size", [2 << 10, 1 << 20, 8 << 20])
@scenario()
async def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(stack: Stack, size: int) -> None:
    """The client sends its whole body before it reads. It gets the refusal, and then an orderly end."""
    client = await stack.client()
    client.transport.pause_reading()
    client.send(post(CHAT, b"x" * size, key=None))
    await until(lambda: not client.transport.get_write_buffer_size(), "all is sent")
    client.transport.resume_reading()
    assert (await client.response()).status == 401
    if size > 1 << 16:
        assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario()
async def test_an_unread_body_that_was_received_does_not_end_the_connection(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, b"x" * 100, key=None) + post(b"/nowhere", b"{}") + post(CHAT, b"y"))
    assert [(await client.response()).status for _ in range(3)] == [401, 404, 200]
    assert stack.backend.calls[0].body == b"y"


@scenario()
async def test_a_chunked_body_after_a_refusal_ends_the_connection(stack: Stack) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, CODED, key=None) + b"2\r\n{}\r\n0\r\n\r\n" + get(b"/ping"))
    assert (await client.response()).status == 401
    assert await client.take_all() == b""


# --- Expect: 100-continue ---


@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_100_continue_is_sent_after_all_checks(stack: Stack) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, EXPECT, b"Content-Length: 3"))
    assert await client.take_through(b"\r\n\r\n") == CONTINUE
    assert not stack.backend.calls
    client.send(b"abc")
    assert (await client.response()).body == HELLO
    assert b"expect" not in stack.backend.calls[0].fields
    client.send(request(b"POST", CHAT, None, EXPECT, CODED))
    assert await client.take_through(b"\r\n\r\n") == CONTINUE
    client.send(b"3\r\nabc\r\n0\r\n\r\n")
    assert (await client.response()).body == HELLO


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request(b"POST", CHAT, None, EXPECT, b"Content-Length: 3", key=None), 401),
        (request(b"POST", CHAT, None, EXPECT, b"Content-Length: 1001"), 413),
        (request(b"POST", b"/nowhere", None, EXPECT, b"Content-Length: 3"), 404),
        (request(b"POST", b"/props", None, EXPECT, b"Content-Length: 3"), 403),
        (request(b"POST", CHAT, None, b"Expect: a-pony", b"Content-Length: 3"), 417),
        (request(b"POST", CHAT, None, EXPECT, EXPECT, b"Content-Length: 3"), 417),
    ],
)
@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_a_refusal_is_sent_instead_of_100_continue(stack: Stack, raw: bytes, status: int) -> None:
    client = await stack.client()
    client.send(raw)
    assert (await client.response()).status == status
    assert await client.take_all() == b""


@scenario()
async def test_no_100_continue_if_the_client_does_not_wait_for_it(stack: Stack) -> None:
    client = await stack.client()
    for raw in (
        request(b"POST", CHAT, None, EXPECT, b"Content-Length: 3") + b"abc",
        request(b"POST", CHAT, None, EXPECT, b"Content-Length: 0"),
        request(b"POST", CHAT, None, EXPECT, b"Content-Length: 3", b"Connection: keep-alive", minor=0),
    ):
        client.send(raw)
        if raw.endswith(b"\r\n\r\n") and b"HTTP/1.0" in raw:
            client.send(b"abc")
        assert (await client.response()).status == 200


@scenario()
async def test_no_100_continue_once_the_body_has_begun(stack: Stack) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, EXPECT, b"Content-Length: 3") + b"a")
    await until(lambda: stack.app.memory.held_bytes == 1)
    client.send(b"bc")
    assert (await client.response()).status == 200


# --- Heads ---


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /" + b"a" * 70000, 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70000, 431, "header_fields_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: a\r\n" * 70, 431, "header_fields_too_large"),
    ],
)
@scenario()
async def test_an_endless_head_is_answered_and_logged_at_its_limit(
    stack: Stack, sent: bytes, status: int, code: str
) -> None:
    client = await stack.client()
    client.send(sent)
    response = await client.response()
    assert (response.status, response.code) == (status, code)
    await client.until(lambda: bool(client.ended))
    await stack.stop()
    (line,) = stack.lines
    assert (line["status"], line["stage"], line["outcome"], line["route"]) == (
        status,
        "reading_head",
        "refused",
        "none",
    )


@pytest.mark.parametrize("length", [b"+5", b"5_0", b"-5", b"0x5", b"5 5", b"5,5", b"\xd9\xa5", b"", b"5.0", b"1e1"])
@scenario()
async def test_a_content_length_that_is_not_ascii_digits_is_refused(stack: Stack, length: bytes) -> None:
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, b"Content-Length: " + length) + b"hello")
    assert (await client.response()).code == "bad_request"
    await client.until(lambda: bool(client.ended))
    assert not stack.backend.calls


@scenario()
async def test_repeated_header_fields_are_forwarded_apart_and_in_order(stack: Stack) -> None:
    await stack.ask(post(CHAT, b"{}", b"A: 1", b"B: 2", b"a: 3", b"A: 1"))
    head = stack.backend.calls[0].head
    assert b"A: 1\r\nB: 2\r\na: 3\r\nA: 1\r\n" in head


@pytest.mark.parametrize(
    "lines",
    [
        b"no colon\r\n",
        b"A : b\r\n",
        b"A: b\r\n folded\r\n",
        b"A: b\rc\r\n",
        b"A: b\n",
        b"A: \0\r\n",
        b": b\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Host: second\r\n",
    ],
)
@scenario()
async def test_an_ambiguous_head_is_refused(stack: Stack, lines: bytes) -> None:
    client = await stack.client()
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: " + KEY + b"\r\n" + lines + b"\r\n{}")
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (400, b"close")
    await client.until(lambda: bool(client.ended))
    assert not stack.backend.calls


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /ping HTTP/2.0", 505),
        (b"GET /ping HTTP/0.9", 505),
        (b"GET /ping", 400),
        (b"GET  /ping HTTP/1.1", 400),
        (b"GET ftp://gateway/ping HTTP/1.1", 400),
        (b"CONNECT gateway:80 HTTP/1.1", 400),
    ],
)
@scenario()
async def test_unsupported_versions_and_malformed_request_lines_are_refused(
    stack: Stack, line: bytes, status: int
) -> None:
    client = await stack.client()
    client.send(line + b"\r\nHost: x\r\n\r\n")
    assert (await client.response()).status == status
    await client.until(lambda: bool(client.ended))


@scenario()
async def test_nothing_after_a_refused_head_is_read(stack: Stack) -> None:
    """What follows a refused head is not read as another request."""
    client = await stack.client()
    client.send(b"GET /ping HTTP/9.9\r\n\r\n" + request(b"POST", b"/drain", b"", key=OPERATOR_KEY) + get(b"/ping"))
    assert (await client.response()).status == 505
    assert await client.take_all() == b""
    assert not stack.app.lifecycle.draining


@pytest.mark.parametrize("method", [b"GET", b"OPTIONS"])
@scenario()
async def test_the_gateways_own_answers_say_close_if_a_body_may_follow(stack: Stack, method: bytes) -> None:
    client = await stack.client()
    client.send(request(method, b"/ping", b"{}") + request(method, b"/ping", None, b"Content-Length: 3"))
    assert (await client.response()).field(b"connection") is None
    assert (await client.response()).field(b"connection") == b"close"
    assert (await client.take_all(), client.ended) == (b"", "fin")
