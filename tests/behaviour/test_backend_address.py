"""Only the listener that the supervisor has found to be llama-server's gets prompts and key; and Unix sockets."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from core.listener import find_listener
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Connection, answer, chunk, close, event, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, until

linux_only = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux reports who listens")


def publish(stack: Stack, state: str, listener: int | None) -> None:
    part = stack.state_file.with_suffix(".part")
    part.write_text(json.dumps({"state": state, "backend_listener": listener}))
    part.replace(stack.state_file)


def own_listener(stack: Stack) -> int:
    found = find_listener("127.0.0.1", stack.backend.port, os.getpid())
    assert found
    return found


async def ready(stack: Stack) -> None:
    """As the supervisor does once it has found the backend's listener."""
    await stack.turn("loading")
    publish(stack, "ready", own_listener(stack))
    await until(lambda: stack.app.readiness.ready)


class Impostor:
    """A process that has taken the backend's port."""

    def __init__(self) -> None:
        self.connections = 0
        self.received = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.received += await reader.read(65536)
            writer.write(answer(b'{"total_slots": 4}'))
        finally:
            writer.close()


@asynccontextmanager
async def impostor(stack: Stack) -> AsyncIterator[Impostor]:
    """The backend has died, and an impostor listens in its place."""
    stack.backend.refuse()
    for connection in stack.backend.connections:
        connection.transport.abort()
    one = Impostor()
    server = await asyncio.start_server(one.serve, "127.0.0.1", stack.backend.port)
    try:
        yield one
    finally:
        server.close()


@linux_only
@scenario(STATE="loading", MAX_CONCURRENT_REQUESTS="auto")
async def test_the_backends_own_listener_is_served_from(stack: Stack) -> None:
    stack.backend.own[b"/props"] = answer(b'{"total_slots": 3}')
    await ready(stack)
    assert stack.app.queue.slots == 3
    for _ in range(2):
        stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
        assert (await stack.ask(post())).status == 200
        assert (await stack.ask(post())).body == HELLO


@linux_only
@scenario(STATE="loading")
async def test_an_impostor_gets_no_prompt_between_a_death_and_the_supervisors_word(stack: Stack) -> None:
    """The state file still says ready: the gateway finds out by itself, and the request waits for the restart."""
    await ready(stack)
    async with impostor(stack) as one:
        clients = [await stack.client() for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(post(CHAT, b"%d" % number))
        await until(lambda: one.connections)
        assert (await stack.ask(get(b"/v1/models"))).code == "loading"
        await until(lambda: stack.app.readiness.state == "loading")
        publish(stack, "loading", None)
        await asyncio.sleep(1)  # a few looks, on the scenario's fast clock
    await stack.backend.listen()
    publish(stack, "ready", own_listener(stack))
    for client in clients:
        assert (await client.response()).body == HELLO
    assert one.received == b""
    assert sorted(call.body for call in stack.backend.calls) == [b"0", b"1", b"2"]


@linux_only
@scenario(STATE="loading", MAX_CONCURRENT_REQUESTS="auto", METRICS_BACKEND_SECONDS="1")
async def test_an_impostor_gets_no_key(stack: Stack) -> None:
    """Neither when the gateway asks for slots before it is ready, nor when it scrapes metrics."""
    await ready(stack)
    async with impostor(stack) as one:
        stack.advance(2)
        assert (await stack.ask(get(b"/metrics", key=None))).status == 200
        assert one.connections == 1
        publish(stack, "loading", None)
        await until(lambda: stack.app.readiness.state == "loading")
        publish(stack, "ready", own_listener(stack) + 1)
        await until(lambda: one.connections == 2)  # /props
        stack.advance(2)
        assert (await stack.ask(get(b"/metrics", key=None))).status == 200
        await until(lambda: one.connections == 3)
        assert one.received == b""


@linux_only
@scenario(STATE="loading")
async def test_a_state_without_a_listener_connects_to_nobody(stack: Stack) -> None:
    publish(stack, "ready", None)
    await until(lambda: stack.app.readiness.ready)
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.readiness.state == "loading")
    await ready(stack)
    assert (await client.response()).body == HELLO
    assert len(stack.backend.calls) == 1


# --- Unix sockets ---

SOCKET = "b.sock"


@asynccontextmanager
async def unix_backend(stack: Stack) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: Connection(stack.backend), str(stack.folder / SOCKET))
    try:
        yield
    finally:
        (stack.folder / SOCKET).unlink(missing_ok=True)
        for _ in range(3):  # asyncio forgets a connection that it has accepted if the server is closed at once
            await asyncio.sleep(0)
        server.close()


@scenario(STATE="loading", BACKEND_HOST=lambda folder: str(folder / SOCKET), MAX_CONCURRENT_REQUESTS="auto")
async def test_unix_socket(stack: Stack) -> None:
    stack.backend.own[b"/props"] = answer(b'{"total_slots": 3}')
    stack.backend.script(send(answer()))
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), stall())
    stack.backend.script(close())
    async with unix_backend(stack):
        publish(stack, "ready", os.getpid())
        await until(lambda: stack.app.readiness.ready)
        assert stack.app.queue.slots == 3
        assert (await stack.ask(post())).body == HELLO
        assert stack.backend.calls[0].fields[b"host"] == b"localhost"
        client = await stack.client()
        client.send(post())
        await client.take_through(event("1"))
        client.reset()
        await stack.backend.calls[1].gone.wait()
        assert (await stack.ask(post())).status == 502  # a new connection that is closed is no kept one
        assert stack.backend.calls[0].connection is stack.backend.calls[1].connection
    waiting = await stack.client()
    waiting.send(post())
    await until(lambda: stack.app.readiness.state == "loading")
    async with unix_backend(stack):
        assert (await waiting.response()).body == HELLO


@linux_only
@scenario(STATE="loading", BACKEND_HOST=lambda folder: str(folder / SOCKET))
async def test_unix_impostor(stack: Stack) -> None:
    async with unix_backend(stack):
        publish(stack, "ready", os.getpid() + 1)
        await until(lambda: stack.app.readiness.ready)
        client = await stack.client()
        client.send(post())
        await until(lambda: stack.app.readiness.state == "loading")
        publish(stack, "ready", os.getpid())
        assert (await client.response()).body == HELLO
        assert len(stack.backend.calls) == 1


@scenario(STATE_FILE="unset", BACKEND_HOST=lambda folder: str(folder / SOCKET))
async def test_unix_socket_without_supervisor(stack: Stack) -> None:
    async with unix_backend(stack):
        stack.app.readiness.doubt()
        await until(lambda: stack.app.readiness.ready)
        assert (await stack.ask(post())).body == HELLO
