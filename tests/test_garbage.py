"""A request that is over is gone at once: nothing of it waits for the garbage collector, which comes late."""

import asyncio
import gc
from asyncio.sslproto import SSLProtocol
from asyncio.streams import StreamReaderProtocol
from collections.abc import Awaitable, Callable

import pytest

from answer import Answer
from connection import Connection
from errors import GatewayError, PeerGone
from exchange import Exchange
from relay import Relay
from request import Request
from support.backend import STREAM_HEAD, answer, chunk, close, event, reset, send, stall
from support.clock import HURRY
from support.gateway import CHAT, Stack, post, scenario, tls_scenario, until
from tls import Usher
from waiting import Promise
from wire import Wire

OURS = (
    *(Answer, Connection, Exchange, GatewayError, PeerGone, Promise, Relay, Request, Usher, Wire),
    *(SSLProtocol, StreamReaderProtocol),  # asyncio's, and of 300 KiB
)

ENDS = {
    "whole": [send(answer())],
    "cut": [send(STREAM_HEAD + chunk(event("1"))), close()],
    "reset": [reset()],
    "malformed": [send(b"nonsense\r\n\r\n")],
    "cancelled while streaming": [send(STREAM_HEAD + chunk(event("1"))), stall()],
    "cancelled before the answer": [stall()],
    "kept, and closed by the client": [send(answer())],
}


@pytest.mark.parametrize("end", ENDS)
@scenario()
async def test_nothing_of_a_request_is_left_for_the_collector(stack: Stack, end: str) -> None:
    await leaves_nothing(stack, lambda: one(stack, end))


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "plain HTTP"])
@tls_scenario()
async def test_nothing_of_a_handshake_that_fails_is_left_for_the_collector(stack: Stack, said: bytes) -> None:
    async def fail() -> None:
        client = await stack.client()
        await until(lambda: stack.gateway._handshakes._writers)
        client.send(said)
        if said:
            await client.take_all()
        client.close()
        await until(lambda: not stack.gateway._handshakes._writers)

    await leaves_nothing(stack, fail)


async def leaves_nothing(stack: Stack, play: Callable[[], Awaitable[None]]) -> None:
    await play()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await play()
        stack.parts.observer.flush()
        gc.collect()
        found = sorted(type(thing).__name__ for thing in gc.garbage if isinstance(thing, OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert found == []


async def one(stack: Stack, end: str) -> None:
    """One request on a connection of its own, until the gateway has done with both of its connections."""
    stack.backend.script(*ENDS[end])
    seen = len(stack.backend.calls)
    client = await stack.client()
    kept = end.startswith("kept")
    client.send(post(CHAT, b'{"stream": true}', *([] if kept else [b"Connection: close"])))
    call = await stack.backend.call(seen)
    if kept:
        assert (await client.response()).status == 200
    elif not end.startswith("cancelled"):
        await client.take_all()
    client.close()
    await until(lambda: not stack.parts.clients, "the client's connection is gone")
    stack.parts.pool.close()
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await until(lambda: not stack.open_clients, "the wires are gone")
