"""Heartbeats for large requests: their bodies are read in steps, and others are served meanwhile."""

import asyncio

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, until
from support.rawclient import RawClient

BEAT_S = 15.0
PROMPT = b'"messages": [{"role": "user", "content": "' + b"lorem ipsum \\n" * 100_000 + b'"}]'
STREAMS = b'{"model": "m", ' + PROMPT + b', "stream": true}'
DENSE = b'{"a": [' + b'"",' * 300_000 + b'0], "stream": true}'
SIGN = b": queued 1\n\n"


async def queued(stack: Stack, *bodies: bytes) -> list[RawClient]:
    """Clients that wait behind one that occupies the only slot."""
    stack.backend.script(stall(stack.finish), send(answer()))
    occupant = await stack.client()
    occupant.send(post())
    await stack.backend.call()
    clients = []
    for number, body in enumerate(bodies, 1):
        client = await stack.client()
        client.send(post(CHAT, body))
        await until(lambda number=number: stack.app.queue.queued == number)
        clients.append(client)
    return clients


@pytest.mark.parametrize("body", [STREAMS, b'{"stream" : true, ' + PROMPT + b"}"], ids=["at the end", "at the start"])
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_large_stream_is_begun_as_a_small_one(stack: Stack, body: bytes) -> None:
    (client,) = await queued(stack, body)
    stack.advance(BEAT_S)
    assert b"\r\nContent-Type: text/event-stream\r\n" in await client.take_through(b"\r\n\r\n")
    assert await client.take_through(b"\n\n\r\n") == chunk(SIGN)
    stack.advance(BEAT_S)
    assert await client.take_through(b"\n\n\r\n") == chunk(SIGN)
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    stack.finish.set()
    assert await client.take_through(LAST_CHUNK) == chunk(event("1")) + LAST_CHUNK
    assert stack.backend.calls[1].body == body


@pytest.mark.parametrize(
    "body",
    [
        b"{" + PROMPT + b"}",
        b"{" + PROMPT + b', "stream": false}',
        b'{"a": {"stream": true}, ' + PROMPT + b"}",
        b'{"a": "\\"stream\\": true", ' + PROMPT + b"}",
        b'{"stream": true, ' + PROMPT,
        b"[" + STREAMS + b"]",
        b"\xff" * 1_000_000,
    ],
    ids=["without", "false", "nested", "in a text", "no object", "in an array", "no JSON"],
)
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_what_does_not_stream_is_never_answered_early(stack: Stack, body: bytes) -> None:
    (client,) = await queued(stack, body)
    for _ in range(4):
        stack.advance(BEAT_S)
        for _ in range(200):
            await asyncio.sleep(0)
    assert not client.received
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_others_are_served_while_large_bodies_are_read(stack: Stack) -> None:
    clients = await queued(stack, *[DENSE] * 4)
    pinging = await stack.client()
    stack.advance(BEAT_S)
    pings = 0
    while not all(client.received for client in clients):
        pinging.send(get(b"/ping"))
        assert (await pinging.response()).status == 200
        pings += 1
    assert pings > 10


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_search_ends_with_its_request(stack: Stack) -> None:
    """One client leaves, one is refused, one is answered: no heartbeat comes after that."""
    first, second, third = await queued(stack, DENSE, DENSE, DENSE)
    stack.advance(BEAT_S)
    first.reset()
    stack.finish.set()
    for client in (second, third):
        response = await client.response()
        assert response.body in (HELLO, SIGN + HELLO)
    await until(lambda: not stack.app.memory.held_bytes)
