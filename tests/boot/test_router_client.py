"""router_client.py: a router's own answers, from the mock over a real socket, and answers that no router gives."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from boot.probes import Address, ProbeResponse
from boot.router_client import ModelState, RouterClient, parse_models
from mock_backend import MockRouter, Settings

KEY = "k" * 20


def play(scenario: Callable[[RouterClient, MockRouter], Awaitable[None]], folder: Path) -> None:
    """Run a scenario against a router with the models `chat` and `embed`."""

    async def run() -> None:
        for name in ("chat", "embed"):
            (folder / f"{name}.gguf").write_bytes(b"GGUF")
        router = MockRouter(Settings(models_dir=str(folder), models_max=1, autoload=False, keys=frozenset({KEY})))
        server = await router.start()
        async with server:
            await scenario(RouterClient(Address("127.0.0.1", server.sockets[0].getsockname()[1]), KEY, 20), router)

    asyncio.run(asyncio.wait_for(run(), 60))


async def until_loaded(client: RouterClient, name: str) -> None:
    while (await client.models() or {})[name].status != "loaded":
        await asyncio.sleep(0.01)


def test_models_are_listed_loaded_and_unloaded(tmp_path: Path) -> None:
    async def scenario(client: RouterClient, router: MockRouter) -> None:
        assert await client.models() == {name: ModelState(name, "unloaded") for name in ("chat", "embed")}
        assert await client.load("chat") == ""
        await until_loaded(client, "chat")
        assert (await client.models() or {})["chat"].running
        assert await client.load("chat") == "model is already running"
        assert await client.load("gone") == "model is not found"
        assert await client.slots_respond("chat", 20)
        assert await client.unload("chat") == ""
        assert await client.unload("chat") == "model is not running"

    play(scenario, tmp_path)


def test_a_question_to_a_model_loads_none(tmp_path: Path) -> None:
    async def scenario(client: RouterClient, router: MockRouter) -> None:
        assert await client.slots_respond("embed", 20)  # 400: it is not loaded
        assert not (await client.models() or {})["embed"].running

    play(scenario, tmp_path)


def test_without_a_router_there_is_no_answer() -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            client = RouterClient(Address("127.0.0.1", server.sockets[0].getsockname()[1]), KEY, 20)
            assert await client.models() is None
            assert await client.load("a") == "llama-server does not answer"
            assert not await client.slots_respond("a", 20)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, '{"error": {"message": "model limit reached"}}', "model limit reached"),
        (500, "proxy error", "llama-server answers with status 500"),
        (404, "[]", "llama-server answers with status 404"),
    ],
)
def test_a_refusal_is_told_and_a_model_that_cannot_be_reached_does_not_respond(
    status: int, body: str, message: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            client = RouterClient(Address("127.0.0.1", server.sockets[0].getsockname()[1]), KEY, 20)
            assert await client.load("a") == message
            assert await client.slots_respond("a", 20) is (status < 500)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_row_has_the_port_of_its_process_and_how_it_has_failed() -> None:
    failed = {"value": "unloaded", "args": ["llama-server", "--port", "51777"], "exit_code": 1, "failed": True}
    asleep = {"value": "sleeping", "args": ["llama-server", "--port", "0"]}
    rows = [{"id": "a", "status": failed}, {"id": "b", "status": asleep}, {"id": "c", "status": {"value": "loaded"}}]
    assert parse_models(ProbeResponse(200, json.dumps({"data": rows}).encode())) == {
        "a": ModelState("a", "unloaded", 51777, 1),
        "b": ModelState("b", "sleeping"),
        "c": ModelState("c", "loaded"),
    }


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"data": 1}', '{"data": [1]}', '{"data": [{"id": "a", "status": 1}]}']
)
def test_what_is_no_list_of_a_router_is_none(body: str) -> None:
    assert parse_models(ProbeResponse(200, body.encode())) is None
    assert parse_models(ProbeResponse(503, b'{"data": []}')) is None
    assert parse_models(None) is None
