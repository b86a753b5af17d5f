"""Each timeout of the settings table, with a clock that moves only when told to: its bound and its answer."""

import asyncio
import hashlib
import random

import pytest

from metrics import render
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, full_backlog, send, stall
from support.clock import HURRY
from support.gateway import CHAT, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

LITTLE_S = 0.1


def only_line(stack: Stack) -> tuple[int, str, str]:
    (line,) = stack.lines
    return line["status"], line["stage"], line["outcome"]


async def unread(stack: Stack) -> None:
    await until(lambda: any(wire.has_unread for wire in stack.parts.clients), "bytes of a head are there")


# --- The client ---


@scenario(CLIENT_HEADER_TIMEOUT="30")
async def test_connection_that_never_speaks_is_closed_in_silence(stack):
    client = await stack.client()
    await until(lambda: stack.parts.clients)
    stack.advance(30 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert await client.take_all() == b""
    await stack.stop()
    assert stack.lines == []


@scenario(CLIENT_HEADER_TIMEOUT="30")
async def test_pitfall_25_one_deadline_for_the_whole_head(stack):
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
async def test_deadline_of_a_head_begins_with_its_first_byte(stack):
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
async def test_second_head_has_the_same_deadline(stack):
    client = await stack.client()
    client.send(get(b"/ping") + b"GET /ping HT")
    await client.response()
    stack.advance(30)
    assert (await client.response()).status == 408


@scenario(KEEPALIVE_TIMEOUT="75")
async def test_idle_connection_is_closed_after_its_time(stack):
    client = await stack.client()
    for _ in range(2):
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200
        stack.advance(75 - LITTLE_S)
    stack.advance(LITTLE_S)
    assert await client.take_all() == b""
    assert client.ended == "fin"


@scenario(CLIENT_BODY_TIMEOUT="30")
async def test_body_may_be_slow_but_not_silent(stack):
    client = await stack.client()
    client.send(post(CHAT, b"x" * 100)[:-100])
    for octets in (20, 40, 60):
        client.send(b"x" * 20)
        await until(lambda octets=octets: stack.parts.buffered_bytes == octets)
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


@scenario(CLIENT_BODY_TIMEOUT="30", STREAM_IDLE_TIMEOUT="1000")
async def test_client_that_goes_on_sending_after_a_refusal_is_not_listened_to_for_long(stack):
    client = await stack.client()
    client.send(post(CHAT, b"x" * 1000, key=None)[:-500])
    assert (await client.response()).status == 401
    client.send(b"x")
    stack.advance(2)
    await until(lambda: not stack.open_clients, "the connection is gone")


@scenario(STREAM_IDLE_TIMEOUT="20")
async def test_last_answer_that_is_not_taken_is_dropped(stack):
    stack.backend.script(send(answer(b"x" * (16 << 20))))
    client = await stack.client(receive_buffer=4096)
    client.transport.pause_reading()
    client.send(post(CHAT, b"{}", b"Connection: close"))
    await stack.backend.call()
    await until(lambda: not stack.backend.used[0].can_write, "all that fits is sent")
    stack.advance(20)
    stack.advance(20)
    await until(lambda: not stack.parts.clients)


# --- The backend ---


@scenario(BACKEND_CONNECT_TIMEOUT="10", COLD_START_WAIT="5")
async def test_backend_that_does_not_accept_is_waited_for(stack):
    """Like one that refuses, it may be loading; COLD_START_WAIT is the bound."""
    with full_backlog() as port:
        stack.parts.pool._port = port
        client = await stack.client()
        client.send(post())
        await until(lambda: stack.parts.gate.active)
        stack.advance(10)
        response = await client.response()
        assert (response.status, response.code) == (503, "loading")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nA:", b"HTTP/1.1 102 Processing\r\n\r\n"])
@scenario(REQUEST_TIMEOUT="300")
async def test_backend_that_does_not_answer_is_a_504(stack, sent):
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
    await call.gone.wait()
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    client.close()
    await stack.stop()
    assert [(line["status"], line["outcome"]) for line in stack.lines] == [(504, "timed_out"), (200, "done")]


@scenario(REQUEST_TIMEOUT="300", STREAM_IDLE_TIMEOUT="60")
async def test_pitfall_15_a_long_stream_is_not_cut_and_a_silent_one_has_no_second_status_line(stack):
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
async def test_silent_sized_answer_is_cut(stack):
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), stall())
    client = await stack.client()
    client.send(post())
    await client.take_through(b"abc")
    stack.advance(60)
    stack.advance(60)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(MAX_REQUEST_DURATION="100", STREAM_IDLE_TIMEOUT="60")
async def test_max_request_duration_cuts_even_a_lively_stream(stack):
    heard = [asyncio.Event() for _ in range(3)]
    steps = [step for each in heard for step in (send(chunk(event("tick"))), stall(each))]
    stack.backend.script(send(STREAM_HEAD), *steps)
    client = await stack.client()
    client.send(post())
    for each in heard[:2]:
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
async def test_max_request_duration_before_the_answer_is_a_504_and_holds_for_one_request(stack):
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
async def test_max_request_duration_counts_the_time_in_the_queue(stack):
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    stack.backend.script(stall())
    first = await stack.client()
    first.send(post())
    await stack.backend.call()
    stack.advance(60)
    second = await stack.client()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.parts.gate.queued == 1)
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
async def test_queue_timeout_is_a_503_with_retry_after(stack):
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    first, second = await stack.client(), await stack.client()
    first.send(post())
    await stack.backend.call()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.parts.gate.queued == 1)
    stack.advance(20 - LITTLE_S)
    await second.silent()
    stack.advance(LITTLE_S)
    response = await second.response()
    assert (response.status, response.code, response.field(b"retry-after")) == (503, "queue_timeout", b"5")
    assert b"QUEUE_TIMEOUT" in response.body
    second.send(get(b"/ping"))
    assert (await second.response()).status == 200
    finish.set()
    assert (await first.response()).status == 200
    assert len(stack.backend.calls) == 1
    stack.parts.observer.flush()
    page = render(stack.parts.registry, "text").decode()
    assert "\ngateway_queue_wait_seconds_count 2\n" in page
    assert "\ngateway_queue_wait_seconds_sum 20" in page
    await stack.stop()
    assert [line["queue_ms"] for line in stack.lines if line["outcome"] == "timed_out"] == [20_000]


@scenario()
async def test_clock_goes_on_whatever_fails_in_one_of_its_ticks(stack):
    class Failing:
        deadline_s = beat_s = 0.0
        watched = False
        failed = 0

        def expire(self, now_s):
            self.failed += 1
            raise RuntimeError("a bug")

    failing = Failing()
    stack.parts.deadlines.add(failing)
    await until(lambda: failing.failed == 2)
    stack.parts.deadlines.discard(failing)
    assert {str(problem["exception"]) for problem in stack.problems} == {"a bug"}
    stack.problems.clear()


@scenario()
async def test_pool_retires_a_connection_before_the_backend_does(stack):
    """llama-server closes after 5 s; a request on its way then would be lost."""
    client = await stack.client()
    for wait_s in (3.4, 3.4, 3.5, 0):
        client.send(post())
        assert (await client.response()).status == 200
        stack.advance(wait_s)
    assert len(stack.backend.used) == 2
    await stack.backend.used[0].gone.wait()


# --- Slow readers ---


def held_bytes(stack: Stack) -> int:
    """What the gateway holds for its clients, in octets."""
    return sum(wire.transport.get_write_buffer_size() for wire in stack.parts.clients)


async def stream_to_one_that_does_not_read(stack: Stack, payload: bytes) -> RawClient:
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
async def test_slow_reader_holds_bounded_memory_and_is_dropped(stack):
    client = await stream_to_one_that_does_not_read(stack, b"x" * (64 << 20))
    assert 0 < held_bytes(stack) < 1 << 20
    assert stack.backend.sent_bytes < 32 << 20
    stack.advance(60)
    stack.advance(60)
    await asyncio.wait_for(stack.backend.calls[0].gone.wait(), 10 * HURRY)
    stack.advance(60)
    await until(lambda: not stack.parts.clients and not stack.open_clients, "the client is dropped")
    client.transport.resume_reading()
    assert not (await client.take_all()).endswith(LAST_CHUNK)


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_reader_that_pauses_and_goes_on_misses_nothing(stack):
    payload = random.Random(3).randbytes(24 << 20)
    client = await stream_to_one_that_does_not_read(stack, payload)
    for _ in range(3):
        stack.advance(50)
        client.transport.resume_reading()
        octets = client.total + (1 << 20)
        await client.until(lambda octets=octets: client.total >= octets)
        client.transport.pause_reading()
        await asyncio.sleep(0)
    client.transport.resume_reading()
    _, body = await client._chunks()
    assert hashlib.sha256(body).digest() == hashlib.sha256(payload).digest()


@scenario()
async def test_pipelined_bytes_beyond_a_bound_stay_with_the_client(stack):
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    client.send(get(b"/ping", b"X-Filler: " + b"x" * 4000) * 4000)  # 16 MB: more than the kernel takes for us
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
async def test_pipelined_requests_are_read_no_faster_than_they_are_answered(stack):
    """Each answer must not let in another read: what is held would grow for as long as the client sends."""
    client = await stack.client()
    ping = get(b"/ping", key=None)
    client.send(ping * ((16 << 20) // len(ping)))
    held = 0
    for _ in range(2000):
        assert (await client.response()).body == b"pong\n"
        held = max(held, *(len(wire._ahead) for wire in stack.open_clients))
    assert (64 << 10) < held < (512 << 10)


@pytest.mark.parametrize("leave", ["close", "reset"])
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_one_that_leaves_behind_bytes_that_nobody_reads_yet_is_noticed(stack, leave):
    stack.backend.script(stall())
    first, second = await stack.client(), await stack.client()
    for client, phase in ((first, lambda: stack.backend.calls), (second, lambda: stack.parts.gate.queued == 1)):
        client.send(post())
        await until(phase)
        client.send(b"G" * 100_000)
    await until(lambda: all(wire._paused for wire in stack.open_clients))
    for client in (second, first):
        getattr(client, leave)()
    await until(lambda: not stack.open_clients)
    assert len(stack.backend.calls) == 1
    await stack.stop()
    assert {line["outcome"] for line in stack.lines} == {"cancelled"}


@pytest.mark.parametrize("part", [b"\r\n", b"\r"])
@scenario(CLIENT_HEADER_TIMEOUT="20", KEEPALIVE_TIMEOUT="60")
async def test_an_empty_line_behind_a_request_is_no_beginning_of_the_next(stack, part):
    client = await stack.client()
    client.send(get(b"/ping") + part)
    assert (await client.response()).status == 200
    await until(lambda: all(not wire._ahead for wire in stack.open_clients), "the empty line is read")
    stack.advance(50)
    client.send(b"\r\n"[len(part) :] + get(b"/ping") + b"\r\n")
    assert (await client.response()).status == 200
    client.send(b"\r\n\r\n")
    stack.advance(59)
    await client.silent()
    stack.advance(1)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@scenario(STREAM_IDLE_TIMEOUT="60")
async def test_time_is_granted_from_the_last_sign_of_life_on(stack):
    heard = asyncio.Event()
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), stall(heard), send(chunk(event("2"))), stall())
    client = await stack.client()
    client.send(post())
    await client.take_through(chunk(event("1")))
    stack.advance(30)
    heard.set()
    await client.take_through(chunk(event("2")))
    stack.advance(0)
    stack.advance(60 - LITTLE_S)
    await client.silent()
    stack.advance(LITTLE_S)
    assert b"backend_timeout" in await client.take_all()
