"""Input that costs time or memory: tiny chunks, long heads, slow bodies. Others are served meanwhile."""

import asyncio

import pytest

from support.backend import HELLO, answer, chunk, send, stall
from support.gateway import CHAT, KEY, Stack, get, post, request, scenario, tls_scenario, trusting, until
from support.rawclient import RawClient

CODED = b"Transfer-Encoding: chunked"
LAST = b"0\r\n\r\n"
PING = get(b"/ping", key=None)


def chunked(coded: bytes, *fields: bytes, key: bytes | None = KEY) -> bytes:
    return request(b"POST", CHAT, None, CODED, *fields, key=key) + coded


# --- Chunks ---


@scenario()
async def test_a_body_of_tiny_chunks_is_refused_before_it_has_cost_much(stack: Stack) -> None:
    client = await stack.client()
    client.send(chunked(b"1\r\nx\r\n" * 200_000 + LAST))
    response = await client.response()
    assert (response.status, response.code) == (400, "bad_request")
    assert "chunks are too small" in response.json["error"]["message"]
    assert (await client.take_all(), client.ended) == (b"", "fin")
    assert not stack.backend.calls


@scenario()
async def test_chunk_extensions_are_refused_once_they_are_long_in_sum(stack: Stack) -> None:
    client = await stack.client()
    client.send(chunked((b"400;" + b"e" * 1000 + b"\r\n" + b"x" * 1024 + b"\r\n") * 20))
    response = await client.response()
    assert response.status == 400
    assert "chunk extensions are longer than 16384 bytes" in response.json["error"]["message"]


@pytest.mark.parametrize("size", [5, 100, 20_000, 300_000])
@scenario()
async def test_any_other_chunked_body_arrives_whole_with_what_follows_it(stack: Stack, size: int) -> None:
    body = bytes(range(256)) * 2400
    coded = b"".join(chunk(body[at : at + size]) for at in range(0, len(body), size))
    client = await stack.client()
    client.send(chunked(coded + LAST) + post(CHAT, b"next") + chunked(b"1\r\ny\r\n" + LAST))
    for _ in range(3):
        assert (await client.response()).body == HELLO
    assert [call.body for call in stack.backend.calls] == [body, b"next", b"y"]


@scenario()
async def test_others_are_served_between_the_slices_of_a_large_read(stack: Stack) -> None:
    """Eight uploads of small chunks go on while one client asks again and again."""
    uploads = [await stack.client() for _ in range(8)]
    pinging = await stack.client()
    for upload in uploads:
        upload.send(chunked(chunk(b"0123456789") * 100_000))
    pings = 0
    while stack.app.memory.held_bytes < 8_000_000:
        pinging.send(PING)
        assert (await pinging.response()).status == 200
        pings += 1
    assert pings > 2
    for upload in uploads:
        upload.send(LAST)
        assert (await upload.response()).body == HELLO
    assert {len(call.body) for call in stack.backend.calls} == {1_000_000}


@scenario()
async def test_a_client_that_leaves_between_slices_is_forgotten(stack: Stack) -> None:
    clients = [await stack.client() for _ in range(4)]
    for client in clients:
        client.send(chunked(chunk(b"0123456789") * 200_000))
    await until(lambda: stack.app.memory.held_bytes > 500_000)
    for client, leave in zip(clients, (RawClient.close, RawClient.reset, RawClient.half_close) * 2, strict=False):
        leave(client)
    await until(lambda: not stack.open_clients)
    assert stack.app.memory.held_bytes == 0


@tls_scenario()
async def test_slices_over_tls(stack: Stack) -> None:
    body = b"0123456789" * 60_000
    client = await stack.client(tls=trusting(stack.folder / "server.crt"))
    client.send(chunked(chunk(b"0123456789") * 60_000 + LAST) + PING)
    assert (await client.response()).body == HELLO
    assert stack.backend.calls[0].body == body
    assert (await client.response()).status == 200


# --- Heads ---


def long_head(size: int, key: bytes | None = None) -> bytes:
    """A request head of that many bytes in lines of the usual size, without its empty line."""
    head = request(b"GET", b"/ping", None, key=key)[:-2]
    while len(head) + 2 < size:
        line = b"x" * min(5000, size - len(head) - 7)
        head += b"A: " + line + b"\r\n" if size - len(head) > 5100 else b"A: " + b"x" * (size - len(head) - 7) + b"\r\n"
    return head


@pytest.mark.parametrize("pieces", [1, 100])
@scenario()
async def test_a_whole_head_is_bounded(stack: Stack, pieces: int) -> None:
    for size, status in ((65536, 200), (65537, 431)):
        raw = long_head(size) + b"\r\n"
        assert len(raw) == size
        client = await stack.client()
        step = len(raw) // pieces
        for at in range(0, len(raw), step):
            client.send(raw[at : at + step])
            await asyncio.sleep(0)
        response = await client.response()
        assert response.status == status
        if status == 431:
            assert response.code == "header_fields_too_large"
            assert "MAX_REQUEST_HEADER_SIZE (65536 bytes)" in response.json["error"]["message"]


@scenario(MAX_REQUEST_HEADER_SIZE="1000")
async def test_a_head_is_refused_as_soon_as_it_is_too_long(stack: Stack) -> None:
    client = await stack.client()
    client.send(long_head(1003))
    assert (await client.response()).status == 431
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(MAX_BUFFERED_BYTES="400000")
async def test_heads_that_are_not_over_count_as_held_and_leave_room_for_bodies(stack: Stack) -> None:
    """Clients without a key may hold half of MAX_BUFFERED_BYTES; 4096 bytes of each are not counted."""
    strangers = [await stack.client() for _ in range(4)]
    for number, stranger in enumerate(strangers, 1):
        stranger.send(long_head(54_096))
        await until(lambda number=number: stack.app.memory.held_bytes in range(number * 49_900, number * 50_001))
    refused = await stack.client()
    refused.send(long_head(10_000))
    response = await refused.response()
    assert (response.status, response.code, response.field(b"retry-after")) == (503, "memory_full", b"2")
    assert "MAX_BUFFERED_BYTES (400000 bytes)" in response.json["error"]["message"]
    short = await stack.client()
    short.send(PING[:20])
    await until(lambda: any(wire.has_unread for wire in stack.clients))
    short.send(PING[20:])
    assert (await short.response()).status == 200
    assert (await stack.ask(post(CHAT, b"x" * 150_000))).body == HELLO
    strangers[0].send(b"\r\n")
    assert (await strangers[0].response()).status == 200
    strangers[1].reset()
    await until(lambda: stack.app.memory.held_bytes <= 100_000)
    for stranger in strangers[2:]:
        stranger.send(b"\n")  # a line without CR
        assert (await stranger.response()).status == 400
    await until(lambda: stack.app.memory.held_bytes == 0)


@scenario(MAX_BUFFERED_BYTES="200000")
async def test_requests_behind_one_that_is_served_count_as_held(stack: Stack) -> None:
    """A client that exceeds its share of the memory so is disconnected: no error can be sent into a response."""
    stack.backend.script(stall(stack.finish), send(answer()))
    stack.backend.script(stall(stack.finish), send(answer()))
    first, second = await stack.client(), await stack.client()
    for client in (first, second):
        client.send(post())
    await stack.backend.call(1)
    pings = (60_000 // len(PING)) * PING
    first.send(pings)
    await until(lambda: 50_000 < stack.app.memory.held_bytes < 60_000)
    second.send(pings)
    await until(lambda: bool(second.ended))
    stack.finish.set()
    assert (await first.response()).body == HELLO
    for _ in range(60_000 // len(PING)):
        assert (await first.response()).status == 200
    await until(lambda: stack.app.memory.held_bytes == 0)


@scenario()
async def test_empty_lines_before_a_request_are_skipped_however_many_there_are(stack: Stack) -> None:
    client = await stack.client()
    client.send(b"\r\n" * 200_000 + PING + b"\r\n" * 1025 + PING)
    for _ in range(2):
        assert (await client.response()).status == 200


# --- Slow bodies ---


@pytest.mark.parametrize("coding", [b"Content-Length: 1000000", CODED])
@scenario(CLIENT_BODY_TIMEOUT="30", CLIENT_BODY_MIN_RATE="100")
async def test_a_body_that_trickles_is_ended(stack: Stack, coding: bytes) -> None:
    """No pause is too long, but after 30 s it must have come with 100 bytes per second on average."""
    byte = b"x" if coding != CODED else b"1\r\nx\r\n"
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, coding))
    for octets in (1, 2):
        client.send(byte)
        await until(lambda octets=octets: stack.app.memory.held_bytes == octets)
        await client.silent()
        stack.advance(14.9)
    client.send(byte)
    await until(lambda: stack.app.memory.held_bytes == 3)
    stack.advance(0.3)
    response = await client.response()
    assert (response.status, response.code) == (408, "request_timeout")
    assert "CLIENT_BODY_MIN_RATE" in response.json["error"]["message"]
    assert stack.app.memory.held_bytes == 0


@scenario(CLIENT_BODY_TIMEOUT="30", CLIENT_BODY_MIN_RATE="100", STREAM_IDLE_TIMEOUT="1000", REQUEST_TIMEOUT="1000")
async def test_a_slow_body_that_keeps_the_rate_is_read_however_long_it_takes(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    client = await stack.client()
    client.send(post(CHAT, b"x" * 30_000)[:-30_000])
    for octets in range(2000, 30_001, 2000):
        client.send(b"x" * 2000)
        if octets < 30_000:
            await until(lambda octets=octets: stack.app.memory.held_bytes == octets)
            stack.advance(20)
    await stack.backend.call()
    for _ in range(40):  # the rate is the body's: the response may take its time
        stack.advance(20)
        await client.silent()
    stack.finish.set()
    assert (await client.response()).body == HELLO


@scenario(CLIENT_BODY_TIMEOUT="30", CLIENT_BODY_MIN_RATE="0")
async def test_the_least_rate_may_be_switched_off(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, b"x" * 20)[:-20])
    for octets in range(1, 20):
        client.send(b"x")
        await until(lambda octets=octets: stack.app.memory.held_bytes == octets)
        stack.advance(20)
    client.send(b"x")
    assert (await client.response()).body == HELLO
