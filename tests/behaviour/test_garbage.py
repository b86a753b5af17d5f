"""A request that is over is freed at once. Nothing of it waits for the garbage collector, which runs late."""

import gc
from asyncio.sslproto import SSLProtocol
from asyncio.streams import StreamReaderProtocol
from collections.abc import Awaitable, Callable

import pytest

from accounting.request_record import RequestRecord
from core.errors import GatewayError, PeerGone
from proxy.relay import Relay
from proxy.request import Request
from proxy.response import Response
from proxy.session import ClientSession
from support.backend import STREAM_HEAD, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, post, scenario, tls_scenario, until
from transport.peer_protocol import PeerProtocol
from transport.tls import HandshakeReader
from transport.waiter import Waiter

OURS = (
    *(
        Response,
        ClientSession,
        RequestRecord,
        GatewayError,
        PeerGone,
        Waiter,
        Relay,
        Request,
        HandshakeReader,
        PeerProtocol,
    ),
    *(SSLProtocol, StreamReaderProtocol),  # of asyncio; they hold 300 KiB
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


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "plain HTTP"])
@tls_scenario()
async def test_nothing_of_a_failed_handshake_is_left_for_the_collector(stack: Stack, sent: bytes) -> None:
    async def fail() -> None:
        client = await stack.client()
        await until(lambda: len(stack.gateway.handshakes))
        client.send(sent)
        if sent:
            await client.take_all()
        client.close()
        await until(lambda: not len(stack.gateway.handshakes))

    await leaves_nothing(stack, fail)


async def leaves_nothing(stack: Stack, play: Callable[[], Awaitable[None]]) -> None:
    await play()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await play()
        stack.app.recorder.flush()
        gc.collect()
        found = sorted(type(thing).__name__ for thing in gc.garbage if isinstance(thing, OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert found == []


async def one(stack: Stack, end: str) -> None:
    """Send one request on a new connection, and wait until the gateway has finished with both of its connections."""
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
    await until(lambda: not stack.clients, "the client's connection is gone")
    stack.app.pool.close_idle()
    await call.gone.wait()
    await until(lambda: not stack.open_clients, "all connections are gone")
