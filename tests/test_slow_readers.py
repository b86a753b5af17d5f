"""Clients that do not read: what is held for them is bounded, whatever they had asked for, and nobody else notices."""

import asyncio
import socket
import ssl

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, send, stall
from support.clock import HURRY
from support.gateway import CHAT, Stack, get, post, scenario, tls_scenario, trusting, until
from support.rawclient import RawClient

BOUND_BYTES = 1 << 20


async def deaf(stack: Stack, tls: ssl.SSLContext | None = None) -> RawClient:
    """A client that reads nothing, on a connection whose buffers in the kernel hold next to nothing."""
    before = set(stack.parts.clients)
    client = await stack.client(receive_buffer=4096, tls=tls)
    client.transport.pause_reading()
    await until(lambda: set(stack.parts.clients) - before)
    (wire,) = set(stack.parts.clients) - before
    wire.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


def held_bytes(stack: Stack) -> int:
    return sum(wire.transport.get_write_buffer_size() for wire in stack.open_clients)


async def settled(stack: Stack) -> None:
    """Until the gateway neither reads nor writes any more; bounded, should it never settle."""
    still, before = 0, (-1, -1)
    while still < 50 and held_bytes(stack) < 8 * BOUND_BYTES:
        await asyncio.sleep(0.001)
        now = (held_bytes(stack), stack.backend.sent_bytes)
        still, before = (still + 1 if now == before else 0), now


@scenario()
async def test_backend_connection_that_was_paused_for_a_slow_reader_serves_the_next_request(stack):
    client = await deaf(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post())
    await until(lambda: stack.backend.calls and not stack.parts.relaying)
    assert held_bytes(stack) > 1 << 16
    for _ in range(3):
        assert (await stack.ask(post())).body == HELLO
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000


@pytest.mark.parametrize("framing", ["sized", "chunked"])
@scenario()
async def test_one_that_never_reads_a_byte_holds_little(stack, framing):
    client = await deaf(stack)
    octets = 48 << 20
    if framing == "sized":
        stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % octets + b"x" * octets, 1 << 20))
    else:
        stack.backend.script(send(STREAM_HEAD + chunk(b"x" * 65536) * (octets >> 16) + LAST_CHUNK, 1 << 20))
    client.send(post())
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * octets


@tls_scenario()
async def test_so_it_is_under_tls(stack):
    client = await deaf(stack, trusting(stack.folder / "server.crt"))
    octets = 24 << 20
    stack.backend.script(send(answer(b"x" * octets), 1 << 20))
    client.send(post() + get(b"/ping"))
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < 2 * BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * octets
    assert (await client.response()).status == 200


@scenario()
async def test_answers_to_pipelined_requests_do_not_pile_up(stack):
    client = await deaf(stack)
    client.send(get(b"/metrics", key=None) * 4000)
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    for _ in range(4000):
        assert (await client.response()).status == 200


@scenario()
async def test_second_answer_waits_until_the_first_is_taken(stack):
    client = await deaf(stack)
    stack.backend.script(send(answer(b"1" * 200_000), 1 << 20))
    stack.backend.script(send(answer(b"2" * (32 << 20)), 1 << 20))
    client.send(post(CHAT, b"1") + post(CHAT, b"2"))
    await stack.backend.call()
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 200_000
    assert (await client.response()).body == b"2" * (32 << 20)


@scenario()
async def test_second_answer_waits_though_the_first_had_left_the_gateway_s_hands(stack):
    """It asks again only when its answer waits in the gateway's own buffer, and its first request seems over."""
    client = await deaf(stack)
    whole = answer(b"1" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    stack.backend.script(send(STREAM_HEAD + chunk(b"2" * 65536) * 512 + LAST_CHUNK, 1 << 20))
    client.send(post(CHAT, b"1"))
    await until(lambda: stack.backend.calls and not stack.parts.relaying)
    client.send(post(CHAT, b"2"))
    await settled(stack)
    assert 0 < held_bytes(stack) < BOUND_BYTES
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 85_000
    assert (await client.response()).body == b"2" * (32 << 20)


@scenario()
async def test_backend_connection_paused_before_its_answer_serves_the_next_request(stack):
    """The answer begins while the client has yet to take the one before, and is here whole."""
    client = await deaf(stack)
    whole = answer(b"1" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"1"))
    await until(lambda: stack.backend.calls and not stack.parts.relaying and held_bytes(stack) > 1 << 16)
    stack.parts.pool.close()  # so that the next is asked in a conversation
    client.send(post(CHAT, b"2"))
    await stack.backend.call(1)
    await until(lambda: stack.parts.pool._idle)
    for _ in range(2):
        assert (await stack.ask(post())).body == HELLO
    assert len(stack.backend.used) == 2
    client.transport.resume_reading()
    assert (await client.response()).body == b"1" * 85_000
    assert (await client.response()).body == HELLO


@scenario()
async def test_one_whose_bytes_wait_gets_its_last_answer_though_it_has_said_its_end(stack):
    client = await deaf(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(stall(stack.finish), send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"{}", b"Connection: close"))
    await stack.backend.call()
    client.send(b"G" * 100_000)
    await until(lambda: all(wire._paused for wire in stack.open_clients))
    stack.finish.set()
    await until(lambda: not stack.parts.clients, "it is answered")
    assert held_bytes(stack) > 30_000
    client.half_close()
    stack.advance(0)  # a tick before what it has sent is read
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000


@pytest.mark.parametrize("end", ["drain", "keep-alive", "room"])
@scenario(KEEPALIVE_TIMEOUT="20", STREAM_IDLE_TIMEOUT="1000", MAX_CONNECTIONS="1")
async def test_an_answer_that_is_still_being_taken_is_not_cut_where_its_connection_would_end(stack, end):
    client = await deaf(stack)
    stack.backend.script(send(answer(b"x" * 60_000), 1 << 20))
    client.send(post())
    await until(lambda: stack.backend.calls and not stack.parts.relaying and held_bytes(stack) > 30_000)
    if end == "drain":
        stack.gateway.drain()
        await until(lambda: not stack.parts.clients, "it is told to go")
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


async def served_but_not_taken(stack: Stack, *after: bytes) -> RawClient:
    """A client whose answer has left the backend whole and the gateway in part; it asked to be closed behind it."""
    client = await deaf(stack)
    whole = answer(b"x" * 85_000)
    stack.backend.script(send(whole[:60_000], 1 << 20), send(whole[60_000:], 1 << 20))
    client.send(post(CHAT, b"{}", b"Connection: close") + b"".join(after))
    await until(lambda: stack.backend.calls and not stack.parts.clients)
    assert held_bytes(stack) > 1 << 16
    return client


@pytest.mark.parametrize("after", [b"", b"\r\n"])
@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_last_answer_may_be_taken_slowly(stack, after):
    """Some clients send an empty line behind a body: that does not shorten the time."""
    client = await served_but_not_taken(stack, after)
    stack.advance(59)
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(DRAIN_TIMEOUT="1000")
async def test_end_waits_until_the_last_answer_is_taken(stack):
    client = await served_but_not_taken(stack)
    stack.gateway.drain()
    end = asyncio.ensure_future(stack.gateway.run_until_ended())
    await settled(stack)
    assert not end.done()
    client.transport.resume_reading()
    assert (await client.response()).body == b"x" * 85_000
    await asyncio.wait_for(end, 20 * HURRY)


@scenario(MAX_CONNECTIONS="1")
async def test_connection_counts_until_its_last_answer_is_taken(stack):
    await served_but_not_taken(stack)
    assert (await stack.ask(get(b"/ping", key=None))).status == 200
    assert (await stack.ask(post())).code == "too_many_connections"


@scenario(DRAIN_TIMEOUT="0.05")
async def test_one_that_takes_nothing_does_not_hold_up_the_end(stack):
    client = await deaf(stack)
    client.send(get(b"/metrics", key=None) * 200)
    await settled(stack)
    stack.gateway.drain()
    await asyncio.wait_for(stack.gateway.run_until_ended(), 20 * HURRY)
    await until(lambda: not stack.parts.clients)


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_one_that_takes_nothing_between_two_requests_is_dropped(stack):
    client = await deaf(stack)
    client.send(get(b"/metrics", key=None) * 200)
    await settled(stack)
    stack.advance(60)
    await until(lambda: not stack.open_clients, "it is dropped")
