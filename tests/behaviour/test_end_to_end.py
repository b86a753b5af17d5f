"""Everything at once: whatever backend and clients do, each request has one status line, one access line, one count.

The single rules are tested in test_relay, test_malformed_backend, test_disconnect, test_timeouts,
test_connections, test_bounds, test_callers, test_cold_start, test_heartbeats and test_drain; all of them end with the
invariants of support.gateway.
"""

import asyncio
import random
import re
from collections import Counter

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, KEY, KEYS, OPERATOR_KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

ANSWERS = [
    answer(),
    answer(b"", b"404 Not Found"),
    answer(HELLO, b"200 OK", b"Connection: close"),
    STREAM_HEAD + b"".join(chunk(event(str(number))) for number in range(5)) + LAST_CHUNK,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil close",
    b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
]
TARGETS = [
    CHAT,
    b"/v1/messages",
    b"/v1/responses",
    b"/tokenize",
    b"/v1/models",
    b"/slots",
    b"/nowhere",
    b"/ping",
    b"/health",
]
BODIES = [b"{}", b'{"stream": true}', b"", b"x" * 3000]


def faulty(draw: random.Random) -> tuple[Step, ...]:
    """Return steps for one request: a response that is whole, cut or garbled, in pieces, and an end."""
    raw = draw.choice(ANSWERS)
    if draw.random() < 0.5:
        at = draw.randrange(len(raw) + 1)
        raw = draw.choice([raw[:at], raw[:at] + draw.randbytes(draw.randrange(1, 9)) + raw[at:]])
    end = draw.choice([close, close, reset])
    return (send(raw, draw.choice([1, 7, 100000])), end())


def any_request(draw: random.Random, name: bytes) -> bytes:
    fields = [b"X-Request-Id: " + name, b"Connection: close"]
    fields += draw.sample(
        [b"Expect: 100-continue", b"Accept: */*", b"X-Api-Key: " + KEY, b"Expect: a-pony"], draw.randrange(3)
    )
    key = draw.choice([KEY, KEY, OTHER_KEY, OPERATOR_KEY, None])
    method = draw.choice([b"GET", b"POST", b"POST", b"HEAD", b"PUT", b"OPTIONS"])
    body = draw.choice(BODIES) if method == b"POST" else None
    return request(method, draw.choice(TARGETS), body, *fields, key=key, minor=draw.choice([0, 1, 1]))


async def status_of(client: RawClient) -> int:
    """Return the status that the client receives; 0 if a reset comes before it. Asserts that there is no second one."""
    data = await client.take_all()
    data = data.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert data.count(b"HTTP/1.") == bool(data), data
    if not data:
        assert client.ended == "reset"
        return 0
    return int(data[9:12])


@pytest.mark.parametrize("seed", range(6))
@scenario(MAX_REQUEST_BODY_SIZE="2000", MAX_CONCURRENT_REQUESTS="3", MAX_QUEUE_SIZE="0")
async def test_each_request_has_one_status_line_one_access_line_and_one_count(stack: Stack, seed: int) -> None:
    draw = random.Random(seed)
    stack.backend.choose = lambda call: faulty(draw)
    stack.backend.own[b"/slots"] = answer(b"{}")
    statuses: dict[str, int] = {}

    async def ask(number: int) -> None:
        client = await stack.client()
        client.send(any_request(draw, b"r-%d" % number))
        if draw.random() < 0.2:
            for _ in range(draw.randrange(10)):
                await asyncio.sleep(0)
            draw.choice([RawClient.close, RawClient.reset, RawClient.half_close])(client)
        else:
            statuses[f"r-{number}"] = await status_of(client)

    for start in range(0, 150, 15):
        await asyncio.gather(*(ask(number) for number in range(start, start + 15)))
    pool = stack.app.pool  # requests whose clients have left are recorded once the backend has noticed
    await until(lambda: not len(stack.app.reclaimer))
    stack.advance(4)  # a connection that was opened for a client that had left waits so long for another use
    await until(lambda: not len(stack.app.reclaimer) and len(pool) == pool.idle_count)
    page = await stack.ask(get(b"/metrics", b"X-Request-Id: page", key=None))
    await stack.stop()

    lines = {line["id"]: line for line in stack.lines}
    assert len(lines) == len(stack.lines)
    for name, status in statuses.items():
        assert status in (0, lines[name]["status"]), (name, status, lines[name])
        assert lines[name]["outcome"] != "cancelled"
    counted = Counter[int]()
    for code, number in re.findall(rb'gateway_requests_total\{route="[^"]*",code="([0-9]+)"\} ([0-9]+)', page.body):
        counted[int(code)] += int(number)
    assert counted == Counter(line["status"] for line in stack.lines if line["id"] != "page")


@pytest.mark.parametrize("seed", range(4))
@scenario()
async def test_any_bytes_of_a_client_are_answered_once_or_not_at_all(stack: Stack, seed: int) -> None:
    """Requests with bytes changed, dropped or inserted: the gateway answers each head that it can read."""
    draw = random.Random(seed)
    for _ in range(100):
        raw = bytearray(
            post(CHAT, b"{}", b"Connection: close") if draw.random() < 0.5 else get(b"/ping", b"Connection: close")
        )
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(raw))
            raw[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        client = await stack.client()
        client.send(bytes(raw))
        client.half_close()
        data = await client.take_all()
        assert data == b"" or re.match(rb"HTTP/1\.1 [1-5][0-9]{2} ", data)
        assert b"500 Internal" not in data
    client = await stack.client()
    client.send(post())
    assert (await client.response()).status == 200


@scenario(
    KEYS=KEYS + "".join(f"k{number}:sk-key-{number:02}-0123456789\n" for number in range(20)),
    MAX_CONCURRENT_REQUESTS="1",
)
async def test_keys_are_served_in_turn(stack: Stack) -> None:
    """Key A posts many requests, then key B posts one: B is served next. Requests of one key are served in order."""
    stack.backend.script(stall(stack.finish), send(answer()))
    clients = [await stack.client() for _ in range(12)]
    for number, client in enumerate(clients[:11]):
        client.send(post(CHAT, b"a%d" % number))
        await until(lambda number=number: stack.app.queue.queued == number)
    clients[11].send(post(CHAT, b"b", key=OTHER_KEY))
    await until(lambda: stack.app.queue.queued == 11)
    stack.finish.set()
    for client in clients:
        assert (await client.response()).status == 200
    assert [call.body for call in stack.backend.calls] == [b"a0", b"b"] + [b"a%d" % number for number in range(1, 11)]


@scenario(
    KEYS=f"alice:{KEY.decode()}:1000 parallel=1\nbob:{OTHER_KEY.decode()} priority=5\n", MAX_CONCURRENT_REQUESTS="2"
)
async def test_the_options_parallel_and_priority_of_a_key(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    alice = [await stack.client() for _ in range(3)]
    for number, client in enumerate(alice):
        client.send(post(CHAT, b"a%d" % number))
        await until(lambda number=number: stack.app.queue.queued == number)
    assert stack.app.queue.active == 1
    response = await stack.ask(post(CHAT, b"b", key=OTHER_KEY))
    assert response.status == 200
    stack.finish.set()
    for client in alice:
        assert (await client.response()).status == 200
    assert [call.body for call in stack.backend.calls] == [b"a0", b"b", b"a1", b"a2"]


@scenario(MAX_CONCURRENT_REQUESTS="1", MAX_QUEUE_SIZE="1")
async def test_a_full_queue_reports_when_to_retry(stack: Stack) -> None:
    """Retry-After follows the recent service rate."""
    for number in range(3):
        stack.backend.script(stall(stack.finish), send(answer()))
        client = await stack.client()
        client.send(post())
        await stack.backend.call(number)
        stack.advance(7)
        stack.finish.set()
        assert (await client.response()).status == 200
        stack.finish.clear()
    stack.backend.script(stall(stack.finish), send(answer()))
    first, second = await stack.client(), await stack.client()
    first.send(post())
    await stack.backend.call(3)
    second.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    response = await stack.ask(post(key=KEY))
    assert (response.status, response.code, response.field(b"retry-after")) == (503, "queue_full", b"7")
    stack.finish.set()
    assert (await first.response()).status == 200
    assert (await second.response()).status == 200


@scenario(MAX_CONCURRENT_REQUESTS="1", MAX_QUEUE_SIZE="2")
async def test_a_full_queue_makes_room_for_another_key(stack: Stack) -> None:
    """If one key fills the queue, its newest request makes room for the first one of another key."""
    stack.backend.script(stall(stack.finish), send(answer()))
    clients = [await stack.client() for _ in range(4)]
    for number, client in enumerate(clients[:3]):
        client.send(post(CHAT, b"a%d" % number))
        await until(lambda number=number: stack.app.queue.queued == number)
    clients[3].send(post(CHAT, b"b", key=OTHER_KEY))
    assert (await clients[2].response()).code == "queue_full"
    stack.finish.set()
    for client in (clients[0], clients[1], clients[3]):
        assert (await client.response()).status == 200
    assert [call.body for call in stack.backend.calls] == [b"a0", b"b", b"a1"]


@scenario(LOG_FORMAT="text")
async def test_an_access_line_in_text_form(stack: Stack) -> None:
    body = b'{"timings": {"cache_n": 3, "prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 5, "predicted_ms": 2.5}}'
    stack.backend.script(send(answer(body)))
    await stack.ask(post(CHAT + b"?secret=1", b"{}", b"X-Request-Id: t-1"))
    await stack.stop()
    (line,) = stack.access_file.read_text().splitlines()
    moment, rest = line.split(" | ", 1)
    assert re.fullmatch(r"20[0-9-]{8}T[0-9:.]+Z", moment)
    assert re.sub("bytes_out=[0-9]+", "bytes_out=N", rest) == (
        "alice | POST /v1/chat/completions | 200 | id=t-1 peer=127.0.0.1 route=/v1/chat/completions backend_status=200"
        " outcome=done stage=done bytes_in=2 bytes_out=N queue_ms=0 first_byte_ms=0 total_ms=0 prompt_tokens=7"
        " cached_tokens=3 completion_tokens=5 estimated_tokens=0 model=-"
    )
