"""The mock speaks as llama-server does. What is asserted here was seen on llama.cpp b11434 with a tiny model."""

import asyncio
import base64
import json
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from mock_backend import MockBackend, Settings, load_settings
from mock_wire import FILLER, WIRE, Generation, fill, parse_wire, to_event

SCRIPT = Path(__file__).parent.parent / "scripts" / "mock_backend.py"
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
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """(name, JSON) of each event; the end is the string."""
        texts = self.body.decode().split("\n\n")[:-1]
        return [self._event(text) for text in texts]

    @staticmethod
    def _event(text):
        name, _, data = text.rpartition("data: ")
        return name.strip(), data if data == "[DONE]" else json.loads(data)


class Client:
    """One raw connection to the mock."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    def send(self, method, path, body=None, *fields):
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(payload)}", *fields, "", ""]
        self.writer.write("\r\n".join(lines).encode() + payload)

    async def read_head(self):
        line, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        return int(line.split()[1]), dict(pair.split(": ", 1) for pair in rest)

    async def read_chunk(self):
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def read(self, *, head_only=False):
        status, fields = await self.read_head()
        answer = Answer(status, fields, b"")
        if "Transfer-Encoding" in fields:
            while chunk := await self.read_chunk():
                answer.chunks.append(chunk)
            answer.body = b"".join(answer.chunks)
        elif not head_only:
            answer.body = await self.reader.readexactly(int(fields["Content-Length"]))
        return answer

    async def call(self, method, path, body=None, *fields):
        self.send(method, path, body, *fields)
        return await self.read(head_only=method == "HEAD")


def play(scenario: Callable[[MockBackend, int], Awaitable[None]], **settings) -> None:
    """Run a scenario against a mock on a free port."""

    async def run():
        backend = MockBackend(Settings(**{**QUICK, **settings}))
        server = await backend.start()
        async with server:
            await asyncio.wait_for(scenario(backend, server.sockets[0].getsockname()[1]), 20)

    asyncio.run(run())


def ask(method, path, body=None, *fields, **settings) -> Answer:
    """One request on a connection of its own."""
    answers = []

    async def scenario(_backend, port):
        async with Client(port) as client:
            answers.append(await client.call(method, path, body, *fields))

    play(scenario, **settings)
    return answers[0]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until the condition holds; play() bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


# The head


def test_head_names_server_and_origin_and_keeps_the_connection():
    answer = ask("GET", "/health", None, "Origin: https://page.example")
    assert answer.json == {"status": "ok"}
    assert answer.fields == {
        "Server": "llama.cpp",
        "Access-Control-Allow-Origin": "https://page.example",
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": "15",
        "Keep-Alive": "timeout=5, max=100",
    }


def test_every_refusal_closes():
    async def scenario(_backend, port):
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


def test_the_hundredth_answer_closes_the_connection():
    async def scenario(_backend, port):
        async with Client(port) as client:
            for _ in range(99):
                assert "Connection" not in (await client.call("GET", "/health")).fields
            assert (await client.call("GET", "/health")).fields["Connection"] == "close"
            assert await client.reader.read() == b""

    play(scenario)


def test_a_stream_ends_the_connection_though_its_head_says_keep_alive():
    async def scenario(_backend, port):
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
def test_who_asks_for_close_gets_it(head, closes):
    async def scenario(_backend, port):
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
def test_what_is_not_http_gets_400_and_close(raw):
    async def scenario(_backend, port):
        async with Client(port) as client:
            client.writer.write(raw)
            assert (await client.read()).status == 400
            assert await client.reader.read() == b""

    play(scenario)


def test_head_requests_get_no_body_and_pipelined_ones_are_answered_in_order():
    async def scenario(_backend, port):
        async with Client(port) as client:
            client.send("HEAD", "/v1/models")
            client.send("GET", "/health")
            assert (await client.read(head_only=True)).fields["Content-Length"] != "0"
            assert (await client.read()).json == {"status": "ok"}

    play(scenario)


def test_chunked_bodies_and_100_continue():
    async def scenario(_backend, port):
        async with Client(port) as client:
            client.writer.write(
                b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
            )
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.writer.write(b'8\r\n{"conten\r\n8\r\nt":"hi"}\r\n0\r\nTrailer: x\r\n\r\n')
            assert (await client.read()).json == {"tokens": [104, 105]}

    play(scenario)


def test_preflight_passes_without_a_key_or_a_model():
    answer = ask("OPTIONS", "/v1/models", keys=frozenset({"secret"}), load_seconds=60.0)
    assert (answer.status, answer.body) == (200, b"")


# Loading and the key


def test_loading_is_told_to_everybody_before_the_key_is_looked_at():
    for path in ("/health", "/v1/models", "/nope"):
        answer = ask("GET", path, keys=frozenset({"secret"}), load_seconds=60.0)
        assert (answer.status, answer.fields["Connection"]) == (503, "close")
        assert answer.json == {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([], 401),
        (["Authorization: Bearer secret"], 200),
        (["Authorization: secret"], 200),
        (["X-Api-Key: secret"], 200),
        (["Authorization: Bearer other", "X-Api-Key: secret"], 401),
    ],
)
def test_key(fields, status):
    answer = ask("GET", "/v1/models", None, *fields, keys=frozenset({"secret"}))
    assert answer.status == status
    if status == 401:
        assert answer.json == {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}


def test_health_needs_no_key():
    assert ask("GET", "/v1/health", keys=frozenset({"secret"})).status == 200


# Pages


def test_props_tells_the_slots_and_models_the_model():
    assert ask("GET", "/props", slots=3).json["total_slots"] == 3
    for path in ("/v1/models", "/models"):
        assert [model["id"] for model in ask("GET", path, model="tiny").json["data"]] == ["tiny"]
    assert ask("GET", "/lora-adapters").json == []
    assert ask("POST", "/lora-adapters", []).json == {"success": True}
    assert ask("POST", "/props", {}).status == ask("POST", "/slots/0?action=erase", {}).status == 501


def test_metrics_count_what_was_sent():
    async def scenario(_backend, port):
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


def words_of(answer: Answer) -> list[str]:
    deltas = [event["choices"][0]["delta"].get("content") for _, event in answer.events[:-1] if event["choices"]]
    return [word for word in deltas if word]


def test_chat_whole_and_streamed_say_the_same():
    whole, stream = (
        ask("POST", "/v1/chat/completions", CHAT),
        ask("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
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
    assert words_of(stream) == ["This", " is", " the"]


def test_chat_stream_chunk_by_chunk():
    answer = ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
    assert answer.fields["Content-Type"] == "text/event-stream"
    assert [chunk.count(b"data: ") for chunk in answer.chunks] == [2, 1, 1, 1, 1]
    events = [event for _, event in answer.events]
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert [("timings" in event, "usage" in event) for event in events[:-1]] == [(False, False)] * 4 + [(True, False)]
    assert events[-2]["choices"] == [{"finish_reason": "length", "index": 0, "delta": {}}]
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}


def test_usage_comes_where_it_is_asked_for_and_takes_the_timings_along():
    answer = ask("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    finish, usage, end = [event for _, event in answer.events][-3:]
    assert (finish["choices"][0]["finish_reason"], "timings" in finish) == ("length", False)
    assert (usage["choices"], usage["usage"]["completion_tokens"], "timings" in usage) == ([], 3, True)
    assert end == "[DONE]"


def test_timings_add_up():
    timings = ask("POST", "/v1/chat/completions", CHAT, cached_tokens=20).json["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (20, 33, 3)
    assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / 2)
    one = ask("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 0}).json
    assert (one["usage"]["completion_tokens"], one["timings"]["predicted_per_second"]) == (1, 0.0)


def test_length_is_the_requests_or_the_mocks_own():
    def last(body):
        choice = ask("POST", "/v1/completions", {"prompt": "x", **body}, tokens=5).json
        return choice["usage"]["completion_tokens"], choice["choices"][0]["finish_reason"]

    assert last({}) == (5, "stop")
    assert last({"max_tokens": -1}) == (5, "stop")
    assert last({"max_tokens": 7}) == (7, "length")
    assert last({"max_completion_tokens": 6, "max_tokens": 7}) == (6, "length")


def test_the_text_says_what_it_is_and_depends_on_the_prompt_alone():
    bodies = [{**CHAT, "max_tokens": 40}] * 2 + [{"messages": [{"role": "user", "content": "ho"}], "max_tokens": 40}]
    texts = [ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"] for body in bodies]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(
        "This is the mock backend: no model is loaded. Your prompt of 53 tokens has the checksum"
    )
    assert FILLER in texts[0]


def test_text_completion_carries_usage_always_and_the_native_one_has_no_end():
    stream = ask("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 2, "stream": True}).events
    assert [event["choices"][0]["text"] for _, event in stream[:-1]] == ["This", " is", ""]
    assert stream[-2][1]["usage"]["total_tokens"] == 5
    assert "timings" in stream[-2][1]
    for path in ("/completion", "/completions"):
        native = [event for _, event in ask("POST", path, {"prompt": [1, 2], "n_predict": 2, "stream": True}).events]
        assert [(event["content"], event["stop"]) for event in native] == [("This", False), (" is", False), ("", True)]
        assert (native[-1]["tokens_evaluated"], native[-1]["stop_type"]) == (2, "limit")
    infill = ask("POST", "/infill", {"input_prefix": "a", "input_suffix": "b"}, tokens=2).json
    assert (infill["content"], infill["prompt"], infill["stop_type"]) == ("This is", "ab", "eos")


def test_messages_tell_usage_at_both_ends_and_no_done():
    body = {**CHAT, "system": "be brief", "stream": True}
    answer = ask("POST", "/v1/messages", body, cached_tokens=10)
    names = [name.removeprefix("event: ") for name, _ in answer.events]
    deltas = ["content_block_delta"] * 3
    ends = ["content_block_stop", "message_delta", "message_stop"]
    assert names == ["message_start", "content_block_start", *deltas, *ends]
    assert [event["type"] for _, event in answer.events] == names
    prompt_tokens = ask("POST", "/v1/messages/count_tokens", body).json["input_tokens"]
    usage = {"cache_read_input_tokens": 10, "input_tokens": prompt_tokens - 10, "output_tokens": 0}
    assert answer.events[0][1]["message"]["usage"] == usage
    assert answer.events[-2][1]["usage"] == {"output_tokens": 3}
    whole = ask("POST", "/v1/messages", CHAT).json
    assert (whole["type"], whole["stop_reason"], whole["content"]) == (
        "message",
        "max_tokens",
        [{"type": "text", "text": "This is the"}],
    )


def test_responses_end_with_usage():
    stream = ask("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2, "stream": True}).events
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
    whole = ask("POST", "/responses", {"input": parts, "max_output_tokens": 2, "instructions": "x"}).json
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("completed", 2)


# Answers without a generation


def test_counting_routes_agree_with_what_a_generation_is_charged():
    assert ask("POST", "/v1/chat/completions/input_tokens", CHAT).json["input_tokens"] == 53
    assert ask("POST", "/responses/input_tokens", {"input": "hi"}).json == {
        "input_tokens": 53,
        "object": "response.input_tokens",
    }


def test_tokens_are_bytes_there_and_back():
    tokens = ask("POST", "/tokenize", {"content": "grün"}).json["tokens"]
    assert ask("POST", "/detokenize", {"tokens": tokens}).json == {"content": "grün"}
    assert ask("POST", "/detokenize", {"tokens": "x"}).status == 400
    prompt = ask("POST", "/apply-template", CHAT).json["prompt"]
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_embeddings_of_one_of_many_and_packed():
    one, many = (
        ask("POST", "/v1/embeddings", {"input": "a"}).json,
        ask("POST", "/embeddings", {"input": ["a", "bc"]}).json,
    )
    assert one["data"][0]["embedding"] == many["data"][0]["embedding"] != many["data"][1]["embedding"]
    assert sum(value * value for value in one["data"][0]["embedding"]) == pytest.approx(1.0)
    assert many["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    packed = ask("POST", "/v1/embeddings", {"input": [1, 2], "encoding_format": "base64"}).json
    values = struct.unpack("<64f", base64.b64decode(packed["data"][0]["embedding"]))
    assert (len(values), packed["usage"]["prompt_tokens"]) == (64, 2)


def test_rerank_names_the_best_first():
    answer = ask("POST", "/v1/rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}).json
    scores = [row["relevance_score"] for row in answer["results"]]
    assert (len(scores), scores) == (2, sorted(scores, reverse=True))
    assert len(ask("POST", "/rerank", {"query": "q", "documents": ["a"]}).json["results"]) == 1


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
def test_bad_bodies_are_refused_in_llama_servers_shape(path, body):
    answer = ask("POST", path, body)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")


# Slots


def test_a_request_without_a_slot_waits_silently_and_slots_tell():
    async def scenario(backend, port):
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
def test_a_client_that_leaves_frees_its_slot(how, stream):
    async def scenario(backend, port):
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


def test_a_waiter_that_leaves_never_gets_a_slot():
    async def scenario(backend, port):
        async with Client(port) as first, Client(port) as second:
            first.send("POST", "/v1/chat/completions", CHAT)
            await until(lambda: len(backend.busy) == 1)
            second.send("POST", "/v1/chat/completions", CHAT)
            await until(lambda: backend.deferred == 1)
            second.writer.close()
            await until(lambda: backend.deferred == 0)
            assert len(backend.busy) == 1

    play(scenario, slots=1, **SLOW)


def test_with_a_conversation_id_the_generation_outlives_its_client():
    async def scenario(backend, port):
        async with Client(port) as client:
            client.send(
                "POST", "/v1/completions", {"prompt": "x", "max_tokens": 50, "stream": True}, "X-Conversation-Id: c"
            )
            await client.read_head()
        await until(lambda: not backend.busy)
        assert backend.totals["tokens_predicted"] == 50

    play(scenario, tokens_per_second=2000.0)


def test_a_silent_stream_is_pinged_and_its_head_comes_at_once():
    async def scenario(_backend, port):
        async with Client(port) as client:
            client.send("POST", "/v1/chat/completions", {**CHAT, "stream": True})
            assert (await client.read_head())[0] == 200
            assert await client.read_chunk() == b":\n\n"

    play(scenario, prompt_ms=60_000.0, ping_s=0.001)


def test_timings_per_token_on_request():
    answer = ask("POST", "/v1/chat/completions", {**CHAT, "stream": True, "timings_per_token": True})
    assert [event["timings"]["predicted_n"] for _, event in answer.events if "timings" in event] == [1, 2, 3, 3]


# The wire's table


def test_every_template_is_json_and_names_what_a_generation_has():
    page = SimpleNamespace(**dict.fromkeys(("slots", "model", "created"), 0))
    made = Generation("x", "mock", 1, limit=1, reason="stop")
    made.next_word()
    for answer, parts in parse_wire(WIRE).items():
        if not answer.startswith("/"):
            assert {"delta", "closing", "whole"} <= set(parts)
        for template in (template for templates in parts.values() for template in templates):
            event = fill(to_event(template), page if answer.startswith("/") else made)
            data = event.rpartition("data: ")[2].strip()
            assert data == "[DONE]" or isinstance(json.loads(data), (dict, list))
    assert to_event("message_stop {}") == 'event: message_stop\ndata: {"type":"message_stop"}\n\n'


# Settings and the process


def test_flags_of_llama_server_are_taken_and_the_rest_ignored(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\none\n\ntwo\n")
    argv = ["-m", "/models/tiny.gguf", "-ngl", "99", "-c", "4096", "-t", "2", "--jinja", "--metrics", "--slots"]
    argv += ["--host", "::1", "--port", "8081", "-np", "3", "--api-key-file", str(keys), "--sse-ping-interval", "7"]
    settings = load_settings(argv, {"LLAMA_API_KEY": "three,four", "MOCK_TOKENS": "9", "MOCK_POLL_MS": ""})
    assert (settings.host, settings.port, settings.slots, settings.ping_s) == ("::1", 8081, 3, 7.0)
    assert settings.keys == {"one", "two", "three", "four"}
    assert (settings.model, settings.tokens, settings.poll_ms) == ("tiny.gguf", 9, 1000.0)


def test_knobs_win_over_flags_and_an_alias_over_the_path():
    settings = load_settings(
        ["-np", "3", "-m", "x.gguf", "--alias", "tiny"], {"MOCK_SLOTS": "5", "MOCK_PROMPT_MS": "0"}
    )
    assert (settings.slots, settings.model, settings.prompt_ms) == (5, "tiny", 0.0)


def test_the_process_serves_until_sigterm_and_ends_well():
    process = subprocess.Popen([sys.executable, SCRIPT, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        try:
            port = int(process.stderr.readline().rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_sigterm_while_the_port_is_unbound():
    environ = {"MOCK_BIND_SECONDS": "60", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen([sys.executable, SCRIPT], stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    with process:
        try:
            assert "unbound" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_help_and_a_bad_knob():
    helped = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "MOCK_TOKENS_PER_SECOND" in helped.stdout
    failed = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, env={"MOCK_TOKENS": "many"}
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "many" in failed.stderr
