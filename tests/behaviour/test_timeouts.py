"""Each timeout of the settings table: its limit and its response. The clock advances only if a test says so."""

import asyncio
import hashlib
import random

import pytest

from metrics import render
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, full_backlog, send, stall
from support.gateway import CHAT, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

LITTLE_S = 0.1


def only_line(stack: Stack) -> tuple[int, str, str]:
    (line,) = stack.lines
    return line["status"], line["stage"], line["outcome"]


async def unread(stack: Stack) -> None:
    await until(lambda: any(each.has_unread for each in stack.clients), "a part of a head has been received")


# --- The client ---


@scenario(CLIENT_HEADER_TIMEOUT="30")
async def test_a_connection_without_a_byte_is_closed_without_an_answer(stack: Stack) -> None:
    client = await stack.client()
    await until(lambda: stack.clients)
    stack.advance(30 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert await client.take_all() == b""
    await stack.stop()
    assert stack.lines == []


@scenario(CLIENT_HEADER_TIMEOUT="30")
async def test_one_deadline_covers_the_whole_head(stack: Stack) -> None:
    client = await stack.client()
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
    await unread(stack)
    for number in range(3):
        stack.advance(10 - LITTLE_S)
        client.send(b"X-Drip-%d: 1\r\n" % number)
        await asyncio.sleep(0)
    await client.silent()
    stack.advance(1)
    response = await client.response()
    assert (response.status, response.code, response.field(b"connection")) == (408, "request_timeout", b"close")
    await client.until(lambda: bool(client.ended))
    await stack.stop()
    assert only_line(stack) == (408, "reading_head", "timed_out")


@scenario(CLIENT_HEADER_TIMEOUT="30", KEEPALIVE_TIMEOUT="75")
async def test_the_deadline_of_a_head_begins_with_its_first_byte(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping"))
    await client.response()
    stack.advance(70)
    client.send(b"GET ")
    await unread(stack)
    stack.advance(30 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert (await client.response()).status == 408


@scenario(CLIENT_HEADER_TIMEOUT="30", KEEPALIVE_TIMEOUT="75")
async def test_a_second_head_has_the_same_deadline(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping") + b"GET /ping HT")
    await client.response()
    stack.advance(30)
    assert (await client.response()).status == 408


@scenario(KEEPALIVE_TIMEOUT="75")
async def test_an_idle_connection_is_closed_after_its_time(stack: Stack) -> None:
    client = await stack.client()
    for _ in range(2):
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200
        stack.advance(75 - LITTLE_S)
    stack.advance(LITTLE_S)
    assert await client.take_all() == b""
    assert client.ended == "fin"


@scenario(CLIENT_BODY_TIMEOUT="30", CLIENT_BODY_MIN_RATE="0")
async def test_a_body_may_be_slow_but_must_not_stop(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, b"x" * 100)[:-100])
    for size in (20, 40, 60):
        client.send(b"x" * 20)
        await until(lambda size=size: stack.app.memory.held_bytes == size)
        stack.advance(30 - LITTLE_S)
    stack.advance(30)
    stack.advance(30)
    response = await client.response()
    assert (response.status, response.code) == (408, "request_timeout")
    await client.until(lambda: bool(client.ended))
    client.close()
    await stack.stop()
    assert only_line(stack) == (408, "reading_body", "timed_out")
    assert not stack.backend.calls


@scenario(STREAM_IDLE_TIMEOUT="20")
async def test_a_client_that_does_not_read_its_last_response_is_dropped(stack: Stack) -> None:
    stack.backend.script(send(answer(b"x" * (16 << 20))))
    client = await stack.client(receive_buffer=4096)
    client.transport.pause_reading()
    client.send(post(CHAT, b"{}", b"Connection: close"))
    await stack.backend.call()
    await until(lambda: not stack.backend.used[0].can_write, "the buffers are full")
    stack.advance(20)
    stack.advance(20)
    await until(lambda: not stack.clients)


# --- The backend ---


@scenario(BACKEND_CONNECT_TIMEOUT="10", COLD_START_WAIT="5")
async def test_a_request_waits_for_a_backend_that_does_not_accept(stack: Stack) -> None:
    """It may be loading, like one that refuses connections. COLD_START_WAIT is the limit."""
    with full_backlog() as port:
        stack.app.pool.port = port
        client = await stack.client()
        client.send(post())
        await until(lambda: stack.app.queue.active)
        stack.advance(10)
        response = await client.response()
        assert (response.status, response.code) == (503, "loading")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nA:", b"HTTP/1.1 102 Processing\r\n\r\n"])
@scenario(REQUEST_TIMEOUT="300")
async def test_a_backend_that_does_not_answer_is_a_504(stack: Stack, sent: bytes) -> None:
    stack.backend.script(send(sent), stall())
    client = await stack.client()
    client.send(post())
    call = await stack.backend.call()
    if b"102" in sent:
        await until(lambda: stack.backend.sent_bytes == len(sent))
        for _ in range(20):
            await asyncio.sleep(0)
    stack.advance(300 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    response = await client.response()
    assert (response.status, response.code, response.json["error"]["type"]) == (504, "backend_timeout", "api_error")
    begun = "The backend's answer did not begin within 300 s (REQUEST_TIMEOUT), which bounds the whole generation"
    assert response.json["error"]["message"] == f"{begun} unless it streams."
    await call.gone.wait()
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    client.close()
    await stack.stop()
    assert [(line["status"], line["outcome"]) for line in stack.lines] == [(504, "timed_out"), (200, "done")]


@scenario(REQUEST_TIMEOUT="300", STREAM_IDLE_TIMEOUT="60")
async def test_a_long_stream_is_not_cut_and_a_silent_one_gets_no_second_status_line(stack: Stack) -> None:
    stream = [asyncio.Event() for _ in range(20)]
    steps = [step for each in stream for step in (send(chunk(event("tick"))), stall(each))]
    stack.backend.script(send(STREAM_HEAD), *steps, stall())
    client = await stack.client()
    client.send(post())
    for each in stream:
        await client.take_through(chunk(event("tick")))
        stack.advance(59)
        each.set()
    await asyncio.sleep(0)
    stack.advance(60)
    stack.advance(60)
    rest = await client.take_all()
    assert b"HTTP/1." not in rest
    assert rest.count(b"data: ") == 1
    assert b'"code": "backend_timeout"' in rest
    assert not rest.endswith(LAST_CHUNK)
    await (await stack.backend.call()).gone.wait()
    await stack.stop()
    assert only_line(stack) == (200, "streaming", "timed_out")
    assert stack.clock() > 1000 + 20 * 59


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_a_sized_response_that_stops_is_cut(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nxyz"), stall())
    client = await stack.client()
    client.send(post())
    await client.take_through(b"xyz")
    stack.advance(60)
    stack.advance(60)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(MAX_REQUEST_DURATION="100", STREAM_IDLE_TIMEOUT="60")
async def test_max_request_duration_cuts_a_stream_that_goes_on(stack: Stack) -> None:
    received = [asyncio.Event() for _ in range(3)]
    steps = [step for each in received for step in (send(chunk(event("tick"))), stall(each))]
    stack.backend.script(send(STREAM_HEAD), *steps)
    client = await stack.client()
    client.send(post())
    for each in received[:2]:
        await client.take_through(chunk(event("tick")))
        stack.advance(45)
        each.set()
    await client.take_through(chunk(event("tick")))
    stack.advance(10 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    rest = await client.take_all()
    assert b"backend_timeout" in rest
    assert not rest.endswith(LAST_CHUNK)


@scenario(MAX_REQUEST_DURATION="100")
async def test_max_request_duration_before_the_response_is_a_504_and_applies_to_one_request(stack: Stack) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    stack.advance(100)
    assert (await client.response()).status == 504
    stack.advance(50)
    client.send(post())
    assert (await client.response()).body == HELLO


@scenario(MAX_REQUEST_DURATION="100", MAX_CONCURRENT_REQUESTS="1", REQUEST_TIMEOUT="1000", QUEUE_TIMEOUT="1000")
async def test_max_request_duration_counts_the_time_in_the_queue(stack: Stack) -> None:
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    stack.backend.script(stall())
    first = await stack.client()
    first.send(post())
    await stack.backend.call()
    stack.advance(60)
    second = await stack.client()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(39)
    finish.set()
    assert (await first.response()).status == 200
    await stack.backend.call(1)
    stack.advance(60)
    await second.silent()
    stack.advance(1)
    response = await second.response()
    assert (response.status, b"MAX_REQUEST_DURATION" in response.body) == (504, True)


@scenario(MAX_CONCURRENT_REQUESTS="1", QUEUE_TIMEOUT="20")
async def test_queue_timeout_is_a_503_with_retry_after(stack: Stack) -> None:
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    first, second = await stack.client(), await stack.client()
    first.send(post())
    await stack.backend.call()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(20 - LITTLE_S)
    await second.silent()
    stack.advance(LITTLE_S)
    response = await second.response()
    assert (response.status, response.code, response.field(b"retry-after")) == (503, "queue_timeout", b"5")
    assert b'"No slot became free within 20 s (QUEUE_TIMEOUT)."' in response.body
    second.send(get(b"/ping"))
    assert (await second.response()).status == 200
    finish.set()
    assert (await first.response()).status == 200
    assert len(stack.backend.calls) == 1
    stack.app.recorder.flush()
    page = render(stack.app.registry, "text").decode()
    assert "\ngateway_queue_wait_seconds_count 2\n" in page
    assert "\ngateway_queue_wait_seconds_sum 20" in page
    await stack.stop()
    assert [line["queue_ms"] for line in stack.lines if line["outcome"] == "timed_out"] == [20_000]


@scenario()
async def test_the_ticker_goes_on_after_an_error_in_a_listener(stack: Stack) -> None:
    failures = 0

    def fail(now_s: float) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise RuntimeError("a bug")

    stack.app.ticker.add_listener(fail)
    await until(lambda: failures > 2)
    reported = [record for record in stack.log.records if record.exc_info]
    assert [record.getMessage() for record in reported] == ["a tick failed"] * 2
    for record in reported:
        stack.log.records.remove(record)


@scenario()
async def test_the_pool_closes_a_connection_before_the_backend_does(stack: Stack) -> None:
    """llama-server closes after 5 s. A request on its way at that time would be lost."""
    client = await stack.client()
    for wait_s in (3.4, 3.4, 3.5, 0):
        client.send(post())
        assert (await client.response()).status == 200
        stack.advance(wait_s)
    assert len(stack.backend.used) == 2
    await stack.backend.used[0].gone.wait()


# --- Slow readers ---


def held_bytes(stack: Stack) -> int:
    """Return how many bytes the gateway holds for its clients."""
    return sum(each.transport.get_write_buffer_size() for each in stack.clients)


async def stream_without_reading(stack: Stack, payload: bytes) -> RawClient:
    steps = [send(chunk(payload[at : at + 65536])) for at in range(0, len(payload), 65536)]
    stack.backend.script(send(STREAM_HEAD), *steps, send(LAST_CHUNK))
    client = await stack.client(receive_buffer=65536)
    client.send(post())
    await client.take_through(b"\r\n\r\n")
    client.transport.pause_reading()
    call = await stack.backend.call()
    await until(lambda: not call.connection.can_write, "the backend cannot send any more")
    return client


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_a_client_that_stops_reading_holds_bounded_memory_and_is_dropped(stack: Stack) -> None:
    client = await stream_without_reading(stack, b"x" * (64 << 20))
    assert 0 < held_bytes(stack) < 1 << 20
    assert stack.backend.sent_bytes < 32 << 20
    stack.advance(60)
    stack.advance(60)
    await stack.backend.calls[0].gone.wait()
    stack.advance(60)
    await until(lambda: not stack.clients and not stack.open_clients, "the client is dropped")
    client.transport.resume_reading()
    assert not (await client.take_all()).endswith(LAST_CHUNK)


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_a_client_that_pauses_and_continues_misses_nothing(stack: Stack) -> None:
    payload = random.Random(3).randbytes(24 << 20)
    client = await stream_without_reading(stack, payload)
    (connection,) = stack.clients
    for _ in range(3):
        stack.advance(50)
        sent = connection.sent_bytes
        client.transport.resume_reading()
        await client.until(lambda sent=sent: connection.sent_bytes > sent)
        client.transport.pause_reading()
    client.transport.resume_reading()
    _, body = await client.chunks()
    assert hashlib.sha256(body).digest() == hashlib.sha256(payload).digest()


@scenario()
async def test_pipelined_bytes_beyond_a_limit_are_not_read(stack: Stack) -> None:
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    client.send(get(b"/ping", b"X-Filler: " + b"x" * 4000) * 4000)  # 16 MB: more than the kernel buffers
    await until(lambda: client.transport.get_write_buffer_size() > 0)
    for _ in range(200):
        await asyncio.sleep(0)
    assert client.transport.get_write_buffer_size() > 0
    finish.set()
    assert (await client.response()).body == HELLO
    for _ in range(4000):
        assert (await client.response()).body == b"pong\n"
    client.send(request(b"HEAD", b"/ping"))
    assert (await client.response(b"HEAD")).status == 200


@scenario()
async def test_pipelined_requests_are_read_no_faster_than_they_are_answered(stack: Stack) -> None:
    """If each response allowed another read, what is held would grow for as long as the client sends."""
    client = await stack.client()
    ping = get(b"/ping", key=None)
    client.send(ping * ((16 << 20) // len(ping)))
    held = 0
    for _ in range(2000):
        assert (await client.response()).body == b"pong\n"
        held = max(held, *(each.buffered_bytes for each in stack.open_clients))
    assert (64 << 10) < held < (512 << 10)


@pytest.mark.parametrize("leave", ["close", "reset"])
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_client_that_leaves_with_unread_bytes_is_noticed(stack: Stack, leave: str) -> None:
    stack.backend.script(stall())
    first, second = await stack.client(), await stack.client()
    for client, phase in ((first, lambda: stack.backend.calls), (second, lambda: stack.app.queue.queued == 1)):
        client.send(post())
        await until(phase)
        client.send(b"G" * 100_000)
    await until(lambda: all(each.reading_paused for each in stack.open_clients))
    for client in (second, first):
        getattr(client, leave)()
    await until(lambda: not stack.open_clients)
    assert len(stack.backend.calls) == 1
    await stack.stop()
    assert {line["outcome"] for line in stack.lines} == {"cancelled"}


@pytest.mark.parametrize("part", [b"\r\n", b"\r"])
@scenario(CLIENT_HEADER_TIMEOUT="20", KEEPALIVE_TIMEOUT="60")
async def test_an_empty_line_after_a_request_does_not_begin_the_next_one(stack: Stack, part: bytes) -> None:
    client = await stack.client()
    client.send(get(b"/ping") + part)
    assert (await client.response()).status == 200
    await until(lambda: all(not each.buffered_bytes for each in stack.open_clients), "the empty line is read")
    stack.advance(50)
    client.send(b"\r\n"[len(part) :] + get(b"/ping") + b"\r\n")
    assert (await client.response()).status == 200
    client.send(b"\r\n\r\n")
    stack.advance(59)
    await client.silent()
    stack.advance(1)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(STREAM_IDLE_TIMEOUT="60", SSE_HEARTBEAT="0")
async def test_the_idle_time_of_a_stream_begins_with_its_last_bytes(stack: Stack) -> None:
    received = asyncio.Event()
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), stall(received), send(chunk(event("2"))), stall())
    client = await stack.client()
    client.send(post())
    await client.take_through(chunk(event("1")))
    stack.advance(30)
    received.set()
    await client.take_through(chunk(event("2")))
    stack.advance(0)
    stack.advance(60 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert b"backend_timeout" in await client.take_all()
