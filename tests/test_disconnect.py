"""A client that leaves, in every phase and in every way: its work stops and what it held is given back."""

import asyncio
import random

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, full_backlog, reach, send, stall
from support.clock import HURRY
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
    """Leave, and wait until the gateway has let the connection go."""
    before = len(stack.parts.clients)
    WAYS[way](client)
    await until(lambda: len(stack.parts.clients) < before, "the connection is gone")
    if way == "half-close":
        await client.until(lambda: bool(client.ended))


async def told(stack: Stack, stage: str, *, status: int = 499, outcome: str = "cancelled") -> None:
    """Stop; there is one access line, and it says so, as does the counter."""
    await stack.stop()
    assert [(line["status"], line["stage"], line["outcome"]) for line in stack.lines] == [(status, stage, outcome)]
    assert stack.counted("cancelled", stage) == (outcome == "cancelled")


@ways
@scenario()
async def test_between_requests_nothing_is_counted(stack, way):
    await leave(stack, await stack.client(), way)
    await stack.stop()
    assert stack.lines == []


@ways
@pytest.mark.parametrize("sent", [b"G", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
@scenario()
async def test_in_the_middle_of_a_head(stack, way, sent):
    client = await stack.client()
    client.send(sent)
    await until(lambda: any(wire.has_unread for wire in stack.parts.clients), "the bytes are there")
    await leave(stack, client, way)
    await told(stack, "reading_head")


@ways
@pytest.mark.parametrize("chunked", [False, True])
@scenario()
async def test_in_the_middle_of_a_body(stack, way, chunked):
    client = await stack.client()
    coded = request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n"
    client.send(coded if chunked else post(CHAT, b"x" * 1000)[:-500])
    await until(lambda: stack.parts.buffered_bytes in (2, 500), "the bytes are there")
    await leave(stack, client, way)
    assert not stack.backend.calls
    await told(stack, "reading_body")


@ways
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_pitfall_17_queued_client_gives_up_its_place(stack, way):
    finish = asyncio.Event()
    stack.backend.script(stall(finish), send(answer()))
    first, second, third = [await stack.client() for _ in range(3)]
    first.send(post())
    await stack.backend.call()
    second.send(post(CHAT, b"second"))
    await until(lambda: stack.parts.gate.queued == 1)
    third.send(post(CHAT, b"third"))
    await until(lambda: stack.parts.gate.queued == 2)
    await leave(stack, second, way)
    assert (stack.parts.gate.queued, stack.parts.gate.active) == (1, 1)
    finish.set()
    assert (await first.response()).body == HELLO
    assert (await third.response()).body == HELLO
    assert [call.body for call in stack.backend.calls] == [b"{}", b"third"]
    assert stack.counted("cancelled", "queued") == 1


@ways
@scenario(STATE="loading")
async def test_held_while_the_model_loads(stack, way):
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.parts.gate.queued == 1)
    await leave(stack, client, way)
    await stack.turn("ready")
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert [call.target for call in stack.backend.calls] == [b"/v1/models"]
    assert stack.counted("cancelled", "queued") == 1


@ways
@scenario()
async def test_while_connecting_to_the_backend(stack, way):
    with full_backlog() as port:
        stack.parts.pool._port = port
        client = await stack.client()
        client.send(post())
        await until(lambda: stack.parts.relaying)
        await leave(stack, client, way)
        await until(lambda: not stack.parts.gate.active)
    await told(stack, "awaiting_response")


@ways
@pytest.mark.parametrize("body", [b"{}", STREAMING])
@scenario()
async def test_pitfall_16_before_the_first_byte(stack, way, body):
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post(CHAT, body))
    call = await stack.backend.call()
    await leave(stack, client, way)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await told(stack, "awaiting_response")


@ways
@scenario(SSE_HEARTBEAT="10")
async def test_pitfall_16_after_a_heartbeat(stack, way):
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    call = await stack.backend.call()
    stack.advance(10)
    await client.take_through(b": waiting\n\n")
    await leave(stack, client, way)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await told(stack, "awaiting_response", status=200)


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
async def test_pitfall_16_in_the_middle_of_the_answer(stack, way, begun):
    stack.backend.script(send(begun), stall())
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    await client.take_through(b"\r\n\r\n")
    call = await stack.backend.call()
    await leave(stack, client, way)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await told(stack, "streaming", status=200)


@ways
@scenario()
async def test_interim_answers_do_not_hide_that_the_client_left(stack, way):
    stack.backend.script(send(b"HTTP/1.1 102 Processing\r\n\r\n"), stall())
    client = await stack.client()
    client.send(post())
    call = await stack.backend.call()
    await leave(stack, client, way)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)


@ways
@scenario()
async def test_while_the_backend_sends_faster_than_the_client_reads(stack, way):
    stack.backend.script(send(STREAM_HEAD), send(chunk(b"x" * 65536) * 2000), stall())
    client = await stack.client(receive_buffer=65536)
    client.send(post(CHAT, STREAMING))
    await client.take_through(b"\r\n\r\n")
    client.transport.pause_reading()
    call = await stack.backend.call()
    await until(lambda: not call.connection.can_write, "the backend cannot send any more")
    await leave(stack, client, "reset" if way == "half-close" else way)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await told(stack, "streaming", status=200)


@ways
@scenario()
async def test_right_after_the_last_byte_it_was_served(stack, way):
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    client = await stack.client()
    client.send(post(CHAT, STREAMING))
    await client.take_through(LAST_CHUNK)
    await leave(stack, client, way)
    await told(stack, "done", status=200, outcome="done")


@scenario()
async def test_requests_that_were_pipelined_are_not_served_to_one_that_left(stack):
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post() + post(CHAT, b"second"))
    call = await stack.backend.call()
    await leave(stack, client, "half-close")
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert [call.body for call in stack.backend.calls] == [b"{}", b""]


@scenario()
async def test_control_and_cheap_routes_are_cancelled_as_well(stack):
    for number, raw in enumerate((get(b"/v1/models"), post(b"/v1/chat/completions/control"), post(b"/tokenize"))):
        stack.backend.script(stall())
        client = await stack.client()
        client.send(raw)
        call = await stack.backend.call(number)
        await leave(stack, client, "fin")
        await asyncio.wait_for(call.gone.wait(), 10 * HURRY)


@scenario(MAX_CONCURRENT_REQUESTS="4", MAX_QUEUE_SIZE="0")
async def test_two_hundred_clients_half_of_whom_leave_whenever_they_like(stack):
    """Nothing is left at the end, and no request of one that left while queued has reached the backend."""
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
async def test_two_connections_do_not_share_a_fate(stack):
    finish = asyncio.Event()
    started = [asyncio.Event(), asyncio.Event()]
    for each in started:
        stack.backend.script(reach(each), stall(finish), send(answer()))
    clients = [await stack.client(), await stack.client()]
    for client, each in zip(clients, started, strict=True):
        client.send(post())
        await each.wait()
    await leave(stack, clients[0], "reset")
    await asyncio.wait_for(stack.backend.calls[0].gone.wait(), 10 * HURRY)
    finish.set()
    assert (await clients[1].response()).body == HELLO
    assert not stack.backend.calls[1].gone.is_set()
