"""Clients that do not read: what is held for them is bounded, and other clients are not affected."""

import asyncio
import socket
import ssl

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, tls_scenario, trusting, until
from support.rawclient import RawClient

BOUND_BYTES = 1 << 20


async def stalled_client(stack: Stack, tls: ssl.SSLContext | None = None) -> RawClient:
    """Return a client that reads nothing, on a connection whose kernel buffers are very small."""
    before = set(stack.clients)
    client = await stack.client(receive_buffer=4096, tls=tls)
    client.transport.pause_reading()
    await until(lambda: set(stack.clients) - before)
    (connection,) = set(stack.clients) - before
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


def held_bytes(stack: Stack) -> int:
    return sum(each.transport.get_write_buffer_size() for each in stack.open_clients)


async def settled(stack: Stack) -> None:
    """Wait until the gateway neither reads nor writes any more, or holds far too much."""
    still, before = 0, (-1, -1)
    while still < 50 and held_bytes(stack) < 8 * BOUND_BYTES:
        await asyncio.sleep(0.001)
        now = (held_bytes(stack), stack.backend.sent_bytes)
        still, before = (still + 1 if now == before else 0), now


@scenario()
async def test_a_backend_connection_that_was_paused_for_a_slow_reader_serves_the_next_request(stack: Stack) -> None:
    client = await stalled_client(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post())
    await until(lambda: stack.backend.calls and not stack.app.sessions.backend_slots)
    assert held_bytes(stack) > 1 << 16
    for _ in range(3):
        assert (await stack.ask(post())).body == HELLO
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000


@pytest.mark.parametrize("framing", ["sized", "chunked"])
@scenario()
async def test_little_is_held_for_a_client_that_reads_nothing(stack: Stack, framing: str) -> None:
    client = await stalled_client(stack)
    size = 16 << 20
    if framing == "sized":
        stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size, 1 << 20))
    else:
        stack.backend.script(send(STREAM_HEAD + chunk(b"x" * 65536) * (size >> 16) + LAST_CHUNK, 1 << 20))
    client.send(post())
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * size


@tls_scenario()
async def test_little_is_held_for_a_tls_client_that_reads_nothing(stack: Stack) -> None:
    client = await stalled_client(stack, trusting(stack.folder / "server.crt"))
    size = 16 << 20
    stack.backend.script(send(answer(b"x" * size), 1 << 20))
    client.send(post() + get(b"/ping"))
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < 2 * BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * size
    assert (await client.response()).status == 200


@scenario()
async def test_responses_to_pipelined_requests_do_not_accumulate(stack: Stack) -> None:
    client = await stalled_client(stack)
    client.send(get(b"/metrics", key=None) * 1000)
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    for _ in range(1000):
        assert (await client.response()).status == 200


@scenario()
async def test_the_second_response_waits_until_the_first_is_read(stack: Stack) -> None:
    client = await stalled_client(stack)
    stack.backend.script(send(answer(b"1" * 200_000), 1 << 20))
    stack.backend.script(send(answer(b"2" * (16 << 20)), 1 << 20))
    client.send(post(CHAT, b"1") + post(CHAT, b"2"))
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 200_000
    assert (await client.response()).body == b"2" * (16 << 20)


@scenario()
async def test_the_second_response_waits_until_the_first_has_left_the_buffer(stack: Stack) -> None:
    """The second request comes after the first one is over, while its response still waits in the gateway's buffer."""
    client = await stalled_client(stack)
    whole = answer(b"1" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    stack.backend.script(send(STREAM_HEAD + chunk(b"2" * 65536) * 256 + LAST_CHUNK, 1 << 20))
    client.send(post(CHAT, b"1"))
    await until(lambda: stack.backend.calls and not stack.app.sessions.backend_slots)
    client.send(post(CHAT, b"2"))
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 85_000
    assert (await client.response()).body == b"2" * (16 << 20)


@scenario()
async def test_a_backend_connection_that_was_paused_from_the_start_serves_the_next_request(stack: Stack) -> None:
    """The response arrives whole while the client has not read the one before."""
    client = await stalled_client(stack)
    whole = answer(b"1" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"1"))
    await until(lambda: stack.backend.calls and not stack.app.sessions.backend_slots and held_bytes(stack) > 1 << 16)
    stack.app.pool.close_idle()  # so that the next request needs a new connection
    client.send(post(CHAT, b"2"))
    await stack.backend.call(1)
    await until(lambda: stack.app.pool.idle_count)
    for _ in range(2):
        assert (await stack.ask(post())).body == HELLO
    assert len(stack.backend.used) == 2
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 85_000
    assert (await client.response()).body == HELLO


@scenario()
async def test_a_half_closed_client_with_unread_bytes_gets_its_last_response(stack: Stack) -> None:
    client = await stalled_client(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(stall(stack.finish), send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"{}", b"Connection: close"))
    await stack.backend.call()
    client.send(b"G" * 100_000)
    await until(lambda: all(each.reading_paused for each in stack.open_clients))
    stack.finish.set()
    await until(lambda: not stack.clients, "the response is sent")
    assert held_bytes(stack) > 30_000
    client.half_close()
    stack.advance(0)  # a tick before its bytes are read
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000


@pytest.mark.parametrize("end", ["drain", "keep-alive", "room"])
@scenario(KEEPALIVE_TIMEOUT="20", STREAM_IDLE_TIMEOUT="1000", MAX_CONNECTIONS="1")
async def test_a_response_that_is_still_being_sent_is_not_cut_by_the_end_of_its_connection(
    stack: Stack, end: str
) -> None:
    client = await stalled_client(stack)
    stack.backend.script(send(answer(b"x" * 60_000), 1 << 20))
    client.send(post())
    await until(lambda: stack.backend.calls and not stack.app.sessions.backend_slots and held_bytes(stack) > 30_000)
    if end == "drain":
        stack.app.lifecycle.drain()
        await until(lambda: not stack.clients, "its connection is closing")
    elif end == "keep-alive":
        stack.advance(20)
    else:
        await stack.ask(get(b"/ping"))
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 60_000
    if end == "room":
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200
    else:
        assert (await client.take_all(), client.ended) == (b"", "fin")


async def served_but_not_read(stack: Stack, *after: bytes) -> RawClient:
    """Return a client that asked for `close` and whose response has left the backend whole and the gateway in part."""
    client = await stalled_client(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"{}", b"Connection: close") + b"".join(after))
    await until(lambda: stack.backend.calls and not stack.clients)
    assert held_bytes(stack) > 1 << 16
    return client


@pytest.mark.parametrize("after", [b"", b"\r\n"])
@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_the_last_response_may_be_read_slowly(stack: Stack, after: bytes) -> None:
    """Some clients send an empty line after a body. That does not shorten the time."""
    client = await served_but_not_read(stack, after)
    stack.advance(59)
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(DRAIN_TIMEOUT="1000")
async def test_the_drain_waits_until_the_last_response_is_read(stack: Stack) -> None:
    client = await served_but_not_read(stack)
    stack.app.lifecycle.drain()
    end = asyncio.ensure_future(stack.gateway.run_until_ended())
    await settled(stack)
    assert not end.done()
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000
    await end


@scenario(MAX_CONNECTIONS="1")
async def test_a_connection_counts_until_its_last_response_is_read(stack: Stack) -> None:
    await served_but_not_read(stack)
    assert (await stack.ask(get(b"/ping", key=None))).status == 200
    assert (await stack.ask(post())).code == "too_many_connections"


@scenario(DRAIN_TIMEOUT="0.05")
async def test_a_client_that_reads_nothing_does_not_delay_the_drain(stack: Stack) -> None:
    client = await stalled_client(stack)
    client.send(get(b"/metrics", key=None) * 200)
    await settled(stack)
    stack.app.lifecycle.drain()
    await stack.gateway.run_until_ended()
    await until(lambda: not stack.clients)


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_a_client_that_reads_nothing_between_two_requests_is_dropped(stack: Stack) -> None:
    client = await stalled_client(stack)
    client.send(get(b"/metrics", key=None) * 200)
    await settled(stack)
    stack.advance(60)
    await until(lambda: not stack.open_clients, "the connection is dropped")
