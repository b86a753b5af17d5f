"""Signs of life in a silence in the middle of a stream: between two events only, and nothing else changes."""

import asyncio

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, Step, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, post, scenario, until
from support.rawclient import RawClient

BODY = b'{"stream": true}'
BEAT_S = 15.0
LITTLE_S = 0.01
WAITING = b": waiting\n\n"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
HELD_OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # its end is that of the connection
ON = {"SSE_HEARTBEAT": "15"}


async def silent_after(stack: Stack, head: bytes, sent: bytes, *then: Step, target: bytes = CHAT) -> RawClient:
    """A client of a backend that has sent so much, then is silent until `stack.finish`, and then goes on."""
    stack.backend.script(send(head + sent), stall(stack.finish), *then)
    client = await stack.client()
    client.send(post(target, BODY))
    await client.take_through(b"\r\n\r\n")
    await client.take_through(sent)
    stack.advance(0)  # the gateway notes when it passed something on
    return client


@scenario(**ON)
async def test_a_silence_in_a_stream_is_broken_once_an_interval(stack: Stack) -> None:
    rest = chunk(event("2")) + LAST_CHUNK
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")), send(rest))
    for _ in range(3):
        stack.advance(BEAT_S - LITTLE_S)
        await client.silent()
        stack.advance(LITTLE_S)
        assert await client.take_through(b"\n\n\r\n") == chunk(WAITING)
    stack.finish.set()
    assert await client.take_through(LAST_CHUNK) == rest
    await stack.stop()
    (line,) = stack.lines
    assert (line["outcome"], line["status"]) == ("done", 200)


@scenario(**ON)
async def test_the_interval_begins_with_the_last_event(stack: Stack) -> None:
    go_on = asyncio.Event()
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")), send(chunk(event("2"))), stall(go_on))
    stack.advance(BEAT_S - LITTLE_S)
    stack.finish.set()
    await client.take_through(chunk(event("2")))
    stack.advance(0)
    stack.advance(BEAT_S - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert await client.take_through(b"\n\n\r\n") == chunk(WAITING)


@scenario(**ON)
async def test_anthropics_clients_get_its_ping(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")), target=b"/v1/messages")
    stack.advance(BEAT_S)
    assert await client.take_through(b"\n\n\r\n") == chunk(PING)


@scenario(**ON)
async def test_a_stream_that_has_only_a_head(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, b"")
    stack.advance(BEAT_S)
    assert await client.take_through(b"\n\n\r\n") == chunk(WAITING)


@scenario(**ON)
async def test_a_stream_that_ends_with_the_connection(stack: Stack) -> None:
    client = await silent_after(stack, HELD_OPEN, chunk(event("1"))[3:-2], send(event("2")), close())
    stack.advance(BEAT_S)
    assert b": waiting" in await client.take_through(b"\n\n\r\n")
    stack.finish.set()
    assert await client.take_through(LAST_CHUNK) == chunk(event("2")) + LAST_CHUNK


@pytest.mark.parametrize(
    "sent",
    [
        chunk(b"data: 1"),
        chunk(b"data: 1\n"),
        chunk(event("1") + b"d"),
        chunk(event("1") + b"data: 2\n"),
        chunk(event("1"))[:-1],
        chunk(event("1"))[:-2],
        chunk(event("1")) + b"8\r\n",
        chunk(event("1")) + b"8",
        chunk(event("1")) + LAST_CHUNK[:3],
    ],
)
@scenario(**ON)
async def test_nothing_comes_inside_an_event_or_a_chunk(stack: Stack, sent: bytes) -> None:
    client = await silent_after(stack, STREAM_HEAD, sent)
    for _ in range(4):
        stack.advance(BEAT_S)
    await client.silent()


@scenario(**ON)
async def test_events_may_end_with_crlf(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, chunk(b"data: 1\r\n\r\n"))
    stack.advance(BEAT_S)
    assert await client.take_through(b"\n\n\r\n") == chunk(WAITING)


@pytest.mark.parametrize(
    "head",
    [
        STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"),
        STREAM_HEAD.replace(b"text/event-stream", b"application/json"),
        STREAM_HEAD.replace(b"text/event-stream", b"text/plain"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 1000\r\n\r\n",
    ],
    ids=["coded", "JSON", "text", "sized"],
)
@scenario(**ON)
async def test_an_answer_with_no_room_for_a_comment_gets_none(stack: Stack, head: bytes) -> None:
    client = await silent_after(stack, head, chunk(event("1")))
    for _ in range(4):
        stack.advance(BEAT_S)
    await client.silent()


@scenario(SSE_HEARTBEAT="0", STREAM_IDLE_TIMEOUT="1000")
async def test_heartbeats_between_events_may_be_switched_off(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")))
    for _ in range(10):
        stack.advance(90)
    await client.silent()


@scenario(**ON, STREAM_IDLE_TIMEOUT="60")
async def test_heartbeats_do_not_keep_a_stalled_stream_alive(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")))
    for _ in range(4):
        stack.advance(BEAT_S)
    rest = await client.take_all()
    assert rest.startswith(chunk(WAITING) * 3)
    assert b"STREAM_IDLE_TIMEOUT" in rest
    assert not rest.endswith(LAST_CHUNK)
    await stack.stop()
    assert [line["outcome"] for line in stack.lines] == ["timed_out"]


@scenario(**ON)
async def test_http_1_0_clients_get_plain_comments(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), stall(stack.finish), send(LAST_CHUNK))
    client = await stack.client()
    client.send(post(CHAT, BODY, minor=0))
    await client.take_through(event("1"))
    stack.advance(0)
    stack.advance(BEAT_S)
    assert await client.take_through(b"\n\n") == WAITING
    stack.finish.set()
    assert await client.take_all() == b""
    assert client.ended == "fin"


@scenario(**ON)
async def test_a_client_that_takes_nothing_gets_no_heartbeats(stack: Stack) -> None:
    filler = chunk(b"data: " + b"x" * 60_000 + b"\n\n")
    stack.backend.script(send(STREAM_HEAD + filler * 200), stall())
    client = await stack.client(receive_buffer=4096)
    client.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post(CHAT, BODY))
    await until(lambda: stack.clients and stack.clients[0].write_paused, "the client takes nothing")
    stack.advance(0)
    sent = stack.clients[0].sent_bytes
    for _ in range(4):
        stack.advance(BEAT_S)
    assert stack.clients[0].sent_bytes == sent


@scenario(**ON)
async def test_a_cut_after_a_heartbeat_has_its_error_event(stack: Stack) -> None:
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")), reset())
    stack.advance(BEAT_S)
    await client.take_through(chunk(WAITING))
    stack.finish.set()
    assert b"backend_unavailable" in await client.take_all()


@scenario(**ON)
async def test_tokens_are_counted_as_ever(stack: Stack) -> None:
    last = b'data: {"choices":[],"timings":{"cache_n":1,"prompt_n":2,"predicted_n":3}}\n\ndata: [DONE]\n\n'
    client = await silent_after(stack, STREAM_HEAD, chunk(event("1")), send(chunk(last) + LAST_CHUNK))
    stack.advance(BEAT_S)
    await client.take_through(chunk(WAITING))
    stack.finish.set()
    await client.take_through(LAST_CHUNK)
    await stack.stop()
    (line,) = stack.lines
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (3, 1, 3)
