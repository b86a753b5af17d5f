"""A client that leaves, in every phase and in every way: its request stops and what it held is released."""

import asyncio
import random

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, full_backlog, reach, send, stall
from support.gateway import CHAT, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

WAYS = {
    "fin": RawClient.close,
    "reset": RawClient.reset,
    "half-close": RawClient.half_close,
}
STREAMING = b'{"stream": true}'
ways = pytest.mark.parametrize("way", WAYS)


async def leave(stack: Stack, client: RawClient, way: str) -> None:
    """Leave, and wait until the gateway has ended the connection."""
    before = len(stack.clients)
    WAYS[way](client)
    await until(lambda: len(stack.clients) < before, "the connection is gone")
    if way == "half-close":
        await client.until(lambda: bool(client.ended))


async def check_record(stack: Stack, stage: str, *, status: int = 499, outcome: str = "cancelled") -> None:
    """Stop, and check the only access line and the counter."""
    await stack.stop()
    assert [(line["status"], line["stage"], line["outcome"]) for line in stack.lines] == [(status, stage, outcome)]
    assert stack.counted("cancelled", stage) == (outcome == "cancelled")


@ways
@scenario()
async def test_between_requests_nothing_is_counted(stack: Stack, way: str) -> None:
    await leave(stack, await stack.client(), way)
    await stack.stop()
    assert stack.lines == []


@ways
@pytest.mark.parametrize("sent", [b"G", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
@scenario()
async def test_in_the_middle_of_a_head(stack: Stack, way: str, sent: bytes) -> None:
    client = await stack.client()
    client.send(sent)
    await until(lambda: any(each.has_unread for each in stack.clients), "the bytes are there")
    await leave(stack, client, way)
    await check_record(stack, "reading_head")


@ways
@pytest.mark.parametrize("chunked", [False, True])
@scenario()
async def test_in_the_middle_of_a_body(stack: Stack, way: str, chunked: bool) -> None:
    client = await stack.client()
    coded = request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n"
    client.send(coded if chunked else post(CHAT, b"x" * 1000)[:-500])
    await until(lambda: stack.app.memory.held_bytes in (2, 500), "the bytes are there")
    await leave(stack, client, way)
    assert not stack.backend.calls
    await check_record(stack, "reading_body")


@ways
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_queued_client_that_leaves_gives_up_its_place(stack: Stack, way: str) -> None:
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    first, second, third = [await stack.client() for _ in range(3)]
    first.send(post())
    await stack.backend.call()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.app.queue.queued == 1)
    third.send(post(CHAT, b"third"))
    await until(lambda: stack.app.queue.queued == 2)
    await leave(stack, second, way)
    assert (stack.app.queue.queued, stack.app.queue.active) == (1, 1)
    finish.set()
    assert (await first.response()).body == HELLO
    assert (await third.response()).body == HELLO
    assert [call.body for call in stack.backend.calls] == [b"{}", b"third"]
    assert stack.counted("cancelled", "queued") == 1


@ways
@scenario(STATE="loading")
async def test_held_while_the_model_loads(stack: Stack, way: str) -> None:
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    await leave(stack, client, way)
    await stack.turn("ready")
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert [call.target for call in stack.backend.calls] == [b"/v1/models"]
    assert stack.counted("cancelled", "queued") == 1


@ways
@scenario()
async def test_while_connecting_to_the_backend(stack: Stack, way: str) -> None:
    with full_backlog() as port:
        stack.app.pool.port = port
        client = await stack.client()
        client.send(post())
        await until(lambda: stack.app.sessions.backend_slots)
        await leave(stack, client, way)
        await until(lambda: not stack.app.queue.active)
    await check_record(stack, "awaiting_response")


@ways
@pytest.mark.parametrize("body", [b"{}", STREAMING])
@scenario()
async def test_before_the_first_byte_of_the_response(stack: Stack, way: str, body: bytes) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post(CHAT, body))
    call = await stack.backend.call()
    await leave(stack, client, way)
    await call.gone.wait()
    await check_record(stack, "awaiting_response")


@ways
@scenario(SSE_HEARTBEAT="10")
async def test_after_a_heartbeat(stack: Stack, way: str) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    call = await stack.backend.call()
    stack.advance(10)
    await client.take_through(b": waiting\n\n")
    await leave(stack, client, way)
    await call.gone.wait()
    await check_record(stack, "awaiting_response", status=200)


@ways
@pytest.mark.parametrize(
    "begun",
    [
        STREAM_HEAD + chunk(event("1")),
        STREAM_HEAD,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
    ],
    ids=["chunked", "no event yet", "sized", "close-delimited"],
)
@scenario()
async def test_in_the_middle_of_the_response(stack: Stack, way: str, begun: bytes) -> None:
    stack.backend.script(send(begun), stall())
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    await client.take_through(b"\r\n\r\n")
    call = await stack.backend.call()
    await leave(stack, client, way)
    await call.gone.wait()
    await check_record(stack, "streaming", status=200)


@ways
@scenario()
async def test_after_an_interim_response(stack: Stack, way: str) -> None:
    stack.backend.script(send(b"HTTP/1.1 102 Processing\r\n\r\n"), stall())
    client = await stack.client()
    client.send(post())
    call = await stack.backend.call()
    await leave(stack, client, way)
    await call.gone.wait()


@ways
@scenario()
async def test_while_the_backend_sends_faster_than_the_client_reads(stack: Stack, way: str) -> None:
    stack.backend.script(send(STREAM_HEAD), send(chunk(b"x" * 65536) * 2000), stall())
    client = await stack.client(receive_buffer=65536)
    client.send(post(CHAT, STREAMING))
    await client.take_through(b"\r\n\r\n")
    client.transport.pause_reading()
    call = await stack.backend.call()
    await until(lambda: not call.connection.can_write, "the backend cannot send any more")
    await leave(stack, client, "reset" if way == "half-close" else way)
    await call.gone.wait()
    await check_record(stack, "streaming", status=200)


@ways
@scenario()
async def test_right_after_the_last_byte_the_request_counts_as_served(stack: Stack, way: str) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    await client.take_through(LAST_CHUNK)
    await leave(stack, client, way)
    await check_record(stack, "done", status=200, outcome="done")


@scenario()
async def test_pipelined_requests_of_a_client_that_left_are_not_served(stack: Stack) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post() + post(CHAT, b"second"))
    call = await stack.backend.call()
    await leave(stack, client, "half-close")
    await call.gone.wait()
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert [call.body for call in stack.backend.calls] == [b"{}", b""]


@scenario()
async def test_control_and_cheap_routes_are_cancelled_as_well(stack: Stack) -> None:
    for number, raw in enumerate((get(b"/v1/models"), post(b"/v1/chat/completions/control"), post(b"/tokenize"))):
        stack.backend.script(stall())
        client = await stack.client()
        client.send(raw)
        call = await stack.backend.call(number)
        await leave(stack, client, "fin")
        await call.gone.wait()


@scenario(MAX_CONCURRENT_REQUESTS="4", MAX_QUEUE_SIZE="0")
async def test_two_hundred_clients_of_which_half_leave_at_random(stack: Stack) -> None:
    """Nothing is left at the end. No request whose client left while it was queued has reached the backend."""
    draw = random.Random(20)
    stack.backend.choose = lambda call: (
        send(STREAM_HEAD),
        *(send(chunk(event(str(number)))) for number in range(draw.randrange(20))),
        send(LAST_CHUNK),
    )

    async def one(number: int) -> None:
        client = await stack.client()
        client.send(post(CHAT, b"%d" % number, b"X-Request-Id: r-%d" % number))
        if number % 2:
            for _ in range(draw.randrange(60)):
                await asyncio.sleep(0)
            WAYS[draw.choice(list(WAYS))](client)
        else:
            assert (await client.response()).coded.endswith(LAST_CHUNK)

    await asyncio.gather(*(one(number) for number in range(200)))
    await stack.stop()
    assert sum(line["outcome"] == "done" for line in stack.lines) >= 100
    gave_up = {line["id"].encode() for line in stack.lines if line["stage"] == "queued"}
    assert gave_up
    assert not gave_up & {call.fields[b"x-request-id"] for call in stack.backend.calls}


@scenario()
async def test_a_client_that_leaves_does_not_affect_another_one(stack: Stack) -> None:
    finish = asyncio.Event()
    started = [asyncio.Event(), asyncio.Event()]
    for each in started:
        stack.backend.script(reach(each), stall(finish), send(answer()))
    clients = [await stack.client(), await stack.client()]
    for client, each in zip(clients, started, strict=True):
        client.send(post())
        await each.wait()
    await leave(stack, clients[0], "reset")
    await stack.backend.calls[0].gone.wait()
    finish.set()
    assert (await clients[1].response()).body == HELLO
    assert not stack.backend.calls[1].gone.is_set()
