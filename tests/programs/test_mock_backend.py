"""mock_backend.py answers as llama-server does. The expected answers are those of b11434 with a tiny model."""

import asyncio
import json
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mock_backend import MockBackend, MockRouter, Settings, backend_of, load_settings
from support.boot import PATIENCE_S
from support.paths import SCRIPTS

SCRIPT = SCRIPTS / "mock_backend.py"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
QUICK = {"tokens_per_second": 0.0, "prompt_ms": 0.0, "poll_ms": 5.0}
SLOW = {"tokens_per_second": 0.001, "prompt_ms": 0.0, "poll_ms": 5.0}


@dataclass
class Answer:
    status: int
    fields: dict[str, str]
    body: bytes
    chunks: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """(name, JSON) of each event. The JSON of the last may be the string [DONE]."""
        return [parse_event(text) for text in self.body.decode().split("\n\n")[:-1]]


def parse_event(text: str) -> tuple[str, Any]:
    name, _, data = text.rpartition("data: ")
    return name.strip(), data if data == "[DONE]" else json.loads(data)


class Client:
    """A raw connection to the mock."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, method: str, path: str, body: object = None, *lines: str) -> None:
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(payload)}", *lines, "", ""]
        self.writer.write("\r\n".join(head).encode() + payload)

    async def read_head(self) -> tuple[int, dict[str, str]]:
        line, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        return int(line.split()[1]), dict(pair.split(": ", 1) for pair in rest)

    async def read_chunk(self) -> bytes:
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def read(self, *, head_only: bool = False) -> Answer:
        status, fields = await self.read_head()
        answer = Answer(status, fields, b"")
        if "Transfer-Encoding" in fields:
            while chunk := await self.read_chunk():
                answer.chunks.append(chunk)
            answer.body = b"".join(answer.chunks)
        elif not head_only:
            answer.body = await self.reader.readexactly(int(fields["Content-Length"]))
        return answer

    async def call(self, method: str, path: str, body: object = None, *lines: str) -> Answer:
        self.send(method, path, body, *lines)
        return await self.read(head_only=method == "HEAD")


def play(scenario: Callable[[Any, int], Awaitable[None]], **settings: Any) -> None:
    """Run a scenario against a mock on a free port."""

    async def run() -> None:
        backend = backend_of(Settings(**{**QUICK, **settings}))
        server = await backend.start()
        async with server:
            await asyncio.wait_for(scenario(backend, server.sockets[0].getsockname()[1]), PATIENCE_S)

    asyncio.run(run())


def fetch(method: str, path: str, body: object = None, *lines: str, **settings: Any) -> Answer:
    """Send one request on its own connection to its own mock."""
    answers: list[Answer] = []

    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            answers.append(await client.call(method, path, body, *lines))

    play(scenario, **settings)
    return answers[0]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition is true. play() limits the time."""
    while not condition():
        await asyncio.sleep(0.001)


# The head


def test_the_head_contains_server_origin_and_keep_alive() -> None:
    answer = fetch("GET", "/health", None, "Origin: https://page.example")
    assert answer.json == {"status": "ok"}
    assert answer.fields == {
        "Server": "llama.cpp",
        "Access-Control-Allow-Origin": "https://page.example",
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": "15",
        "Keep-Alive": "timeout=5, max=100",
    }


def test_error_answers_close_the_connection() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        for method, path in (
            ("GET", "/nope"),
            ("GET", "/v1/chat/completions"),
            ("DELETE", "/health"),
            ("POST", "/nope"),
        ):
            async with Client(port) as client:
                answer = await client.call(method, path)
                assert (answer.status, answer.fields["Connection"]) == (404, "close")
                assert answer.json["error"] == {"message": "File Not Found", "type": "not_found_error", "code": 404}
                assert await client.reader.read() == b""

    play(scenario)


def test_the_hundredth_answer_closes_the_connection() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            for _ in range(99):
                assert "Connection" not in (await client.call("GET", "/health")).fields
            assert (await client.call("GET", "/health")).fields["Connection"] == "close"
            assert await client.reader.read() == b""

    play(scenario)


def test_a_stream_closes_the_connection_despite_keep_alive_in_its_head() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            assert "Connection" not in (await client.call("POST", "/v1/chat/completions", CHAT)).fields
            stream = await client.call("POST", "/v1/chat/completions", {**CHAT, "stream": True})
            assert stream.fields["Keep-Alive"] == "timeout=5, max=100"
            assert await client.reader.read() == b""

    play(scenario)


@pytest.mark.parametrize(
    ("head", "closes"),
    [
        ("GET /health HTTP/1.1\r\n\r\n", False),
        ("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", True),
        ("GET /health HTTP/1.0\r\n\r\n", True),
        ("GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
    ],
)
def test_the_connection_is_closed_if_the_request_asks_for_it(head: str, closes: bool) -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.writer.write(head.encode())
            assert ("Connection" in (await client.read()).fields) is closes

    play(scenario)


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
        b"x" * 70000,
    ],
)
def test_malformed_http_is_answered_with_400_and_close(raw: bytes) -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.writer.write(raw)
            assert (await client.read()).status == 400
            assert await client.reader.read() == b""

    play(scenario)


def test_head_answers_have_no_body_and_pipelined_requests_are_answered_in_order() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.send("HEAD", "/v1/models")
            client.send("GET", "/health")
            assert (await client.read(head_only=True)).fields["Content-Length"] != "0"
            assert (await client.read()).json == {"status": "ok"}

    play(scenario)


def test_chunked_bodies_and_100_continue() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.writer.write(
                b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
            )
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.writer.write(b'8\r\n{"conten\r\n8\r\nt":"hi"}\r\n0\r\nTrailer: x\r\n\r\n')
            assert (await client.read()).json == {"tokens": [104, 105]}

    play(scenario)


def test_a_preflight_needs_neither_key_nor_model() -> None:
    answer = fetch("OPTIONS", "/v1/models", keys=frozenset({"secret"}), load_seconds=60.0)
    assert (answer.status, answer.body) == (200, b"")


# Loading and the key


def test_while_loading_every_request_gets_503_before_its_key_is_checked() -> None:
    for path in ("/health", "/v1/models", "/nope"):
        answer = fetch("GET", path, keys=frozenset({"secret"}), load_seconds=60.0)
        assert (answer.status, answer.fields["Connection"]) == (503, "close")
        assert answer.json == {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([], 401),
        (["Authorization: Bearer secret"], 200),
        (["Authorization: secret"], 200),
        (["X-Api-Key: secret"], 200),
        (["Authorization: Bearer other", "X-Api-Key: secret"], 401),
    ],
)
def test_the_key_is_checked(lines: list[str], status: int) -> None:
    answer = fetch("GET", "/v1/models", None, *lines, keys=frozenset({"secret"}))
    assert answer.status == status
    if status == 401:
        assert answer.json == {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}


def test_a_host_that_ends_in_sock_is_a_unix_socket(tmp_path: Path) -> None:
    async def run() -> bytes:
        path = str(tmp_path / "m.sock")
        server = await MockBackend(Settings(host=path)).start()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        server.close()
        return answer

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 OK\r\n")


def test_health_needs_no_key() -> None:
    assert fetch("GET", "/v1/health", keys=frozenset({"secret"})).status == 200


# Pages


def test_props_contains_the_slots_and_models_the_model() -> None:
    assert fetch("GET", "/props", slots=3).json["total_slots"] == 3
    for path in ("/v1/models", "/models"):
        assert [model["id"] for model in fetch("GET", path, model="tiny").json["data"]] == ["tiny"]
    assert fetch("GET", "/lora-adapters").json == []
    assert fetch("POST", "/lora-adapters", []).json == {"success": True}
    assert fetch("POST", "/props", {}).status == fetch("POST", "/slots/0?action=erase", {}).status == 501
    assert fetch("POST", "/slots/3?action=erase", {}, empties_slots=True).json == {"id_slot": 0, "n_erased": 0}


def test_metrics_count_tokens() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            await client.call("POST", "/v1/chat/completions", CHAT)
            await client.call("POST", "/v1/embeddings", {"input": "abc"})
            await client.call("POST", "/embedding", {"content": "abc"})
            page = await client.call("GET", "/metrics")
        values = dict(line.split() for line in page.body.decode().splitlines() if not line.startswith("#"))
        assert page.fields["Content-Type"] == "text/plain; version=0.0.4"
        assert values["llamacpp:prompt_tokens_total"] == str(53 - 10 + 4)
        assert values["llamacpp:prompt_tokens_cached_total"] == "10"
        assert values["llamacpp:tokens_predicted_total"] == "3"
        assert values["llamacpp:requests_processing"] == values["llamacpp:requests_deferred"] == "0"

    play(scenario, cached_tokens=10)


# Generating


def deltas_of(answer: Answer) -> list[str]:
    deltas = [event["choices"][0]["delta"].get("content") for _, event in answer.events[:-1] if event["choices"]]
    return [delta for delta in deltas if delta]


def test_a_chat_has_the_same_text_with_and_without_a_stream() -> None:
    whole, stream = (
        fetch("POST", "/v1/chat/completions", CHAT),
        fetch("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    )
    message = whole.json["choices"][0]
    assert message["finish_reason"] == "length"
    assert message["message"] == {"role": "assistant", "content": "This is the"}
    assert whole.json["usage"] == {
        "completion_tokens": 3,
        "prompt_tokens": 53,
        "total_tokens": 56,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert deltas_of(stream) == ["This", " is", " the"]


def test_the_chunks_of_a_chat_stream() -> None:
    answer = fetch("POST", "/v1/chat/completions", {**CHAT, "stream": True})
    assert answer.fields["Content-Type"] == "text/event-stream"
    assert [chunk.count(b"data: ") for chunk in answer.chunks] == [2, 1, 1, 1, 1]
    events = [event for _, event in answer.events]
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert [("timings" in event, "usage" in event) for event in events[:-1]] == [(False, False)] * 4 + [(True, False)]
    assert events[-2]["choices"] == [{"finish_reason": "length", "index": 0, "delta": {}}]
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}


def test_usage_is_sent_on_request_and_then_contains_the_timings() -> None:
    answer = fetch("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    finish, usage, end = [event for _, event in answer.events][-3:]
    assert (finish["choices"][0]["finish_reason"], "timings" in finish) == ("length", False)
    assert (usage["choices"], usage["usage"]["completion_tokens"], "timings" in usage) == ([], 3, True)
    assert end == "[DONE]"


def test_timings_are_part_of_an_answer() -> None:
    timings = fetch("POST", "/v1/chat/completions", CHAT, cached_tokens=20).json["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (20, 33, 3)
    one = fetch("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 0}).json
    assert (one["usage"]["completion_tokens"], one["timings"]["predicted_per_second"]) == (1, 0.0)


def test_the_length_is_that_of_the_request_or_the_default() -> None:
    def last(body: dict[str, int]) -> tuple[int, str]:
        choice = fetch("POST", "/v1/completions", {"prompt": "x", **body}, tokens=5).json
        return choice["usage"]["completion_tokens"], choice["choices"][0]["finish_reason"]

    assert last({}) == (5, "stop")
    assert last({"max_tokens": -1}) == (5, "stop")
    assert last({"max_tokens": 7}) == (7, "length")
    assert last({"max_completion_tokens": 6, "max_tokens": 7}) == (6, "length")


def test_text_completions_always_contain_usage_and_native_ones_have_no_done() -> None:
    stream = fetch("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 2, "stream": True}).events
    assert [event["choices"][0]["text"] for _, event in stream[:-1]] == ["This", " is", ""]
    assert stream[-2][1]["usage"]["total_tokens"] == 5
    assert "timings" in stream[-2][1]
    for path in ("/completion", "/completions"):
        native = [event for _, event in fetch("POST", path, {"prompt": [1, 2], "n_predict": 2, "stream": True}).events]
        assert [(event["content"], event["stop"]) for event in native] == [("This", False), (" is", False), ("", True)]
        assert (native[-1]["tokens_evaluated"], native[-1]["stop_type"]) == (2, "limit")
    infill = fetch("POST", "/infill", {"input_prefix": "a", "input_suffix": "b"}, tokens=2).json
    assert (infill["content"], infill["prompt"], infill["stop_type"]) == ("This is", "ab", "eos")


def test_messages_contain_usage_at_both_ends_and_no_done() -> None:
    body = {**CHAT, "system": "be brief", "stream": True}
    answer = fetch("POST", "/v1/messages", body, cached_tokens=10)
    names = [name.removeprefix("event: ") for name, _ in answer.events]
    deltas = ["content_block_delta"] * 3
    ends = ["content_block_stop", "message_delta", "message_stop"]
    assert names == ["message_start", "content_block_start", *deltas, *ends]
    assert [event["type"] for _, event in answer.events] == names
    prompt_tokens = fetch("POST", "/v1/messages/count_tokens", body).json["input_tokens"]
    usage = {"cache_read_input_tokens": 10, "input_tokens": prompt_tokens - 10, "output_tokens": 0}
    assert answer.events[0][1]["message"]["usage"] == usage
    assert answer.events[-2][1]["usage"] == {"output_tokens": 3}
    whole = fetch("POST", "/v1/messages", CHAT).json
    assert (whole["type"], whole["stop_reason"], whole["content"]) == (
        "message",
        "max_tokens",
        [{"type": "text", "text": "This is the"}],
    )


def test_responses_end_with_usage() -> None:
    stream = fetch("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2, "stream": True}).events
    assert [name.removeprefix("event: response.") for name, _ in stream] == [
        *[
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
        ],
        *["output_text.done", "content_part.done", "output_item.done", "completed"],
    ]
    completed = stream[-1][1]["response"]
    assert completed["output"][0]["content"][0]["text"] == "This is"
    assert completed["usage"]["total_tokens"] == 55
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    whole = fetch("POST", "/responses", {"input": parts, "max_output_tokens": 2, "instructions": "x"}).json
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("completed", 2)


# Answers without a generation


def test_answers_with_and_without_a_slot_are_sent_as_json() -> None:
    assert fetch("POST", "/tokenize", {"content": "hi"}).json == {"tokens": [104, 105]}
    assert fetch("POST", "/v1/embeddings", {"input": "a"}).json["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b"{"),
        ("/v1/chat/completions", []),
        ("/v1/chat/completions", {"messages": "x"}),
        ("/v1/completions", {}),
        ("/v1/responses", {}),
        ("/v1/embeddings", {}),
        ("/v1/rerank", {"query": "q"}),
        ("/v1/chat/completions/control", {}),
    ],
)
def test_invalid_bodies_are_refused_in_the_format_of_llama_server(path: str, body: object) -> None:
    answer = fetch("POST", path, body)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")


# Slots


def test_a_request_without_a_slot_waits_and_slots_shows_the_busy_one() -> None:
    async def scenario(backend: MockBackend, port: int) -> None:
        async with Client(port) as first, Client(port) as second, Client(port) as watcher:
            first.send("POST", "/v1/chat/completions", {**CHAT, "stream": True})
            assert (await first.read_head())[0] == 200
            second.send("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 1, "stream": True})
            await until(lambda: backend.deferred == 1)
            assert [slot["is_processing"] for slot in (await watcher.call("GET", "/slots")).json] == [True]
            assert b"llamacpp:requests_deferred 1" in (await watcher.call("GET", "/metrics")).body
            first.writer.close()
            assert (await second.read()).status == 200
            assert [slot["is_processing"] for slot in (await watcher.call("GET", "/slots")).json] == [False]

    play(scenario, slots=1, tokens_per_second=0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
def test_a_client_that_disconnects_frees_its_slot(how: str, stream: bool) -> None:
    async def scenario(backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.send("POST", "/v1/chat/completions", {**CHAT, "stream": stream})
            await until(lambda: len(backend.busy) == 1)
            if how == "half-close":
                client.writer.write_eof()
                await until(lambda: not backend.busy)
                await client.reader.read()
                return
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.writer.close()
            await until(lambda: not backend.busy)

    play(scenario, **SLOW)


def test_a_waiting_client_that_disconnects_gets_no_slot() -> None:
    async def scenario(backend: MockBackend, port: int) -> None:
        async with Client(port) as first, Client(port) as second:
            first.send("POST", "/v1/chat/completions", CHAT)
            await until(lambda: len(backend.busy) == 1)
            second.send("POST", "/v1/chat/completions", CHAT)
            await until(lambda: backend.deferred == 1)
            second.writer.close()
            await until(lambda: backend.deferred == 0)
            assert len(backend.busy) == 1

    play(scenario, slots=1, **SLOW)


def test_with_a_conversation_id_the_generation_continues_after_a_disconnect() -> None:
    async def scenario(backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.send(
                "POST", "/v1/completions", {"prompt": "x", "max_tokens": 50, "stream": True}, "X-Conversation-Id: c"
            )
            await client.read_head()
        await until(lambda: not backend.busy)
        assert backend.totals["tokens_predicted"] == 50

    play(scenario, tokens_per_second=2000.0)


def test_a_stream_sends_its_head_at_once_and_pings_while_it_waits() -> None:
    async def scenario(_backend: MockBackend, port: int) -> None:
        async with Client(port) as client:
            client.send("POST", "/v1/chat/completions", {**CHAT, "stream": True})
            assert (await client.read_head())[0] == 200
            assert await client.read_chunk() == b":\n\n"

    play(scenario, prompt_ms=60_000.0, ping_s=0.001)


def test_timings_per_token_are_sent_on_request() -> None:
    answer = fetch("POST", "/v1/chat/completions", {**CHAT, "stream": True, "timings_per_token": True})
    assert [event["timings"]["predicted_n"] for _, event in answer.events if "timings" in event] == [1, 2, 3, 3]


# Several models


def models_in(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    return tmp_path


def as_router(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"models_dir": str(folder), "models_max": 1, "autoload": False, **settings}


async def statuses(port: int) -> dict[str, str]:
    async with Client(port) as client:
        rows = (await client.call("GET", "/v1/models")).json["data"]
        return {row["id"]: row["status"]["value"] for row in rows}


async def tell(port: int, path: str, name: str) -> int:
    async with Client(port) as client:
        return (await client.call("POST", path, {"model": name})).status


def test_a_router_lists_its_models_with_their_states(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, port: int) -> None:
        assert await statuses(port) == {"chat": "unloaded", "embed": "unloaded"}
        assert await tell(port, "/models/load", "chat") == 200
        await until(lambda: router.table.models["chat"].status == "loaded")
        assert await statuses(port) == {"chat": "loaded", "embed": "unloaded"}
        async with Client(port) as client:
            (row, _) = (await client.call("GET", "/models")).json["data"]
            assert (row["id"], row["object"], row["source"]) == ("chat", "model", "models_dir")
            assert str(tmp_path / "chat.gguf") in row["status"]["args"]
            assert (await client.call("GET", "/props")).json["role"] == "router"
            assert (await client.call("GET", "/props?model=chat")).json["total_slots"] == 4
            assert len((await client.call("GET", "/slots?model=chat")).json) == 4
            assert (await client.call("GET", "/health")).status == 200

    play(scenario, **as_router(models_in(tmp_path, "chat", "embed")))


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("POST", "/v1/chat/completions", CHAT, "model name is missing from the request"),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "gone"}, "model 'gone' not found"),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "chat"}, "model is not loaded"),
        ("GET", "/slots", None, "model name is missing from the request"),
        ("GET", "/props?model=chat", None, "model is not loaded"),
        ("POST", "/models/unload", {"model": "chat"}, "model is not running"),
        ("POST", "/models/unload", {"model": "gone"}, "model is not found"),
    ],
)
def test_a_router_refuses_what_no_loaded_model_can_answer(
    method: str, path: str, body: object, message: str, tmp_path: Path
) -> None:
    answer = fetch(method, path, body, **as_router(models_in(tmp_path, "chat")))
    assert (answer.status, answer.json["error"]["message"]) == (400, message)


def test_a_router_has_the_other_answers_of_llama_server(tmp_path: Path) -> None:
    settings = as_router(models_in(tmp_path, "chat"))
    assert fetch("POST", "/models/load", {"model": "gone"}, **settings).status == 404
    assert fetch("GET", "/nowhere", **settings).status == fetch("POST", "/nowhere", {}, **settings).status == 404
    assert fetch("GET", "/models", keys=frozenset({"k"}), **settings).status == 401
    assert fetch("POST", "/models/load", {"model": "chat"}, **settings).json == {"success": True}


def test_with_autoload_a_request_loads_its_model_in_place_of_an_idle_one(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, port: int) -> None:
        async with Client(port) as client:
            for name in ("chat", "other", "chat"):
                answer = await client.call("POST", "/v1/chat/completions", {**CHAT, "model": name})
                assert (answer.status, answer.json["model"]) == (200, name)
        assert await statuses(port) == {"chat": "loaded", "other": "unloaded"}

    play(scenario, **as_router(models_in(tmp_path, "chat", "other"), autoload=True))


def test_a_model_with_requests_is_not_unloaded_for_another(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, port: int) -> None:
        await tell(port, "/models/load", "chat")
        await until(lambda: router.table.models["chat"].status == "loaded")
        async with Client(port) as client:
            client.send("POST", "/v1/chat/completions", {**CHAT, "model": "chat", "stream": True, "max_tokens": 9**9})
            await client.read_head()
            assert await tell(port, "/models/load", "other") == 500
        await until(lambda: not router.table.models["chat"].requests)
        assert await tell(port, "/models/load", "other") == 200

    play(scenario, **as_router(models_in(tmp_path, "chat", "other"), tokens_per_second=1000.0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_unloaded_ends_its_answers(stream: bool, tmp_path: Path) -> None:
    async def scenario(router: MockRouter, port: int) -> None:
        await tell(port, "/models/load", "chat")
        await until(lambda: router.table.models["chat"].status == "loaded")
        async with Client(port) as client:
            body = {**CHAT, "model": "chat", "stream": stream, "max_tokens": 9**9}
            client.send("POST", "/v1/chat/completions", body)
            await until(lambda: bool(router.table.models["chat"].requests))
            assert await tell(port, "/models/unload", "chat") == 200
            answer = await client.read()
            assert (answer.status, answer.body.endswith(b"proxy error: Failed to read connection")) == (
                (200, True) if stream else (500, True)
            )

    play(scenario, **as_router(models_in(tmp_path, "chat"), tokens_per_second=1000.0, prompt_ms=0.0))


def test_a_load_that_fails_and_all_changes_are_told(tmp_path: Path) -> None:
    (models_in(tmp_path, "chat") / "broken.gguf").write_bytes(b"nonsense")

    async def scenario(router: MockRouter, port: int) -> None:
        async with Client(port) as client:
            client.send("GET", "/models/sse")
            await client.read_head()
            await tell(port, "/models/load", "broken")
            events = [json.loads((await client.read_chunk())[6:]) for _ in range(2)]
        assert [event["event"] for event in events] == ["model_status", "status_change"]
        assert events[1]["model"] == "broken"
        assert events[1]["data"] == {"status": "unloaded", "exit_code": 1}
        async with Client(port) as client:
            (row, _) = (await client.call("GET", "/models")).json["data"]
            assert (row["status"]["failed"], row["status"]["exit_code"]) == (True, 1)
            answer = await client.call("POST", "/v1/chat/completions?autoload=true", {**CHAT, "model": "broken"})
            assert (answer.status, answer.json["error"]["message"]) == (500, "model name=broken failed to load")

    play(scenario, **as_router(tmp_path))


def test_a_loading_model_is_503_without_autoload(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, port: int) -> None:
        await tell(port, "/models/load", "chat")
        assert await tell(port, "/models/load", "chat") == 400
        async with Client(port) as client:
            assert (await client.call("POST", "/v1/embeddings", {"input": "x", "model": "chat"})).status == 503
        assert await tell(port, "/models/unload", "chat") == 200
        assert await statuses(port) == {"chat": "unloaded"}

    play(scenario, **as_router(models_in(tmp_path, "chat"), load_seconds=60.0))


def test_a_preset_gives_names_slots_and_what_is_loaded_at_the_start(tmp_path: Path) -> None:
    preset = tmp_path / "models.ini"
    preset.write_text("[*]\nparallel = 2\n[chat]\nalias = gpt-4o, x\n[embed]\nnp = 1\nload-on-startup = true\n")

    async def scenario(router: MockRouter, port: int) -> None:
        await until(lambda: router.table.models["embed"].status == "loaded")
        async with Client(port) as client:
            answer = await client.call("POST", "/v1/chat/completions?autoload=1", {**CHAT, "model": "gpt-4o"})
            assert answer.json["model"] == "chat"
            assert (await client.call("GET", "/props?model=x")).json["total_slots"] == 2
            assert (await client.call("GET", "/metrics?model=chat")).status == 200
            answer = await client.call("POST", "/slots/0?action=erase", {"model": "chat"})
            assert answer.status == 501

    play(scenario, models_preset=str(preset), models_max=0, autoload=False)


# Settings and the process


def test_known_flags_of_llama_server_have_an_effect_and_others_are_ignored(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\none\n\ntwo\n")
    argv = ["-m", "/models/tiny.gguf", "-ngl", "99", "-c", "4096", "-t", "2", "--jinja", "--metrics", "--slots"]
    argv += ["--host", "::1", "--port", "8081", "-np", "3", "--api-key-file", str(keys), "--sse-ping-interval", "7"]
    settings = load_settings(argv, {"LLAMA_API_KEY": "three,four", "MOCK_TOKENS": "9", "MOCK_POLL_MS": ""})
    assert (settings.host, settings.port, settings.slots, settings.ping_s) == ("::1", 8081, 3, 7.0)
    assert settings.keys == {"one", "two", "three", "four"}
    assert (settings.model, settings.tokens, settings.poll_ms) == ("tiny.gguf", 9, 1000.0)


def test_flags_of_a_router_have_no_effect_with_a_model() -> None:
    argv = ["--models-dir", "/m", "--models-preset", "/p.ini", "--models-max", "2", "--no-models-autoload"]
    settings = load_settings(argv, {})
    assert (settings.models_dir, settings.models_preset, settings.models_max) == ("/m", "/p.ini", 2)
    assert (settings.autoload, load_settings([], {}).autoload) == (False, True)
    alone = load_settings(["-m", "m.gguf", *argv], {})
    assert (alone.models_dir, alone.models_preset) == ("", "")


def test_variables_override_flags_and_an_alias_overrides_the_path() -> None:
    settings = load_settings(
        ["-np", "3", "-m", "x.gguf", "--alias", "tiny"], {"MOCK_SLOTS": "5", "MOCK_PROMPT_MS": "0"}
    )
    assert (settings.slots, settings.model, settings.prompt_ms) == (5, "tiny", 0.0)


def test_the_process_serves_until_sigterm_and_exits_with_0() -> None:
    process = subprocess.Popen([sys.executable, SCRIPT, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        try:
            port = int(process.stderr.readline().rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_S) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_sigterm_before_the_port_is_bound() -> None:
    environ = {"MOCK_BIND_SECONDS": "60", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen([sys.executable, SCRIPT], stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    with process:
        try:
            assert process.stderr.readline() == "mock_backend: port not bound for 60 s\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_help_is_printed() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "MOCK_TOKENS_PER_SECOND" in done.stdout


@pytest.mark.parametrize(
    ("argv", "environ", "error"),
    [
        ([], {"MOCK_TOKENS": "many"}, "MOCK_TOKENS: 'many' is not a number"),
        (["--port", "http"], {}, "--port: 'http' is not a number"),
        (["-np", "x"], {}, "--parallel: 'x' is not a number"),
        (["--models-dir", "/nowhere"], {}, "[Errno 2] No such file or directory: '/nowhere'"),
    ],
)
def test_an_invalid_number_is_an_error(argv: list[str], environ: dict[str, str], error: str) -> None:
    command = [sys.executable, str(SCRIPT), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"mock_backend: error: {error}\n")
