"""Streams: the same events as without the gateway, the slot when a client leaves, and the death of the backend."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from stack import ENDLESS, SLOT_FREE_S, TEAM_KEY, Gateway, LlamaServer, bearer, eventually, fetch, running

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat is on the moon"}]}
SAME = {"stream": True, "temperature": 0, "cache_prompt": False}
ROUTES = {
    "/v1/chat/completions": CHAT | SAME | {"max_tokens": 40},
    "/v1/completions": SAME | {"prompt": "the dog", "max_tokens": 40},
    "/completion": SAME | {"prompt": "the dog", "n_predict": 40},
    "/v1/responses": SAME | {"input": "the cat", "max_output_tokens": 40},
    "/v1/messages": CHAT | SAME | {"max_tokens": 40},
}
# Fields that differ between two responses of the same server.
ALWAYS_DIFFERENT = {"id", "item_id", "created", "created_at", "completed_at", "timings", "sequence_number"}


def normal(value: object) -> object:
    if isinstance(value, dict):
        return {name: normal(inner) for name, inner in value.items() if name not in ALWAYS_DIFFERENT}
    return [normal(inner) for inner in value] if isinstance(value, list) else value


def events(raw: bytes) -> list[tuple[str, object]]:
    """Return an event stream as pairs of event name and parsed data, without the fields that always differ."""
    parsed = []
    for block in raw.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            data = fields["data"]
            parsed.append((fields.get("event", ""), data if data == "[DONE]" else normal(json.loads(data))))
    return parsed


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_events_as_without_the_gateway(url: str, backend: LlamaServer, route: str) -> None:
    direct = fetch(backend.url + route, backend.key, ROUTES[route])
    through = fetch(url + route, TEAM_KEY, ROUTES[route])
    assert (direct[0], through[0]) == (200, 200)
    assert events(through[1]) == events(direct[1])
    assert len(events(direct[1])) > 20


def test_the_same_response_as_without_the_gateway(url: str, backend: LlamaServer) -> None:
    request = CHAT | {"temperature": 0, "cache_prompt": False, "max_tokens": 400}
    direct = fetch(f"{backend.url}/v1/chat/completions", backend.key, request)
    through = fetch(f"{url}/v1/chat/completions", TEAM_KEY, request)
    assert normal(json.loads(through[1])) == normal(json.loads(direct[1]))


@contextmanager
def requesting(url: str, route: str, body: dict[str, object], *more: str) -> Iterator[socket.socket]:
    """Send a request on a plain socket and yield it, before anything is read. The block's end closes it."""
    host, port = url.removeprefix("http://").split(":")
    payload = json.dumps(body).encode()
    fields = ("Host: e2e", f"Authorization: Bearer {TEAM_KEY}", f"Content-Length: {len(payload)}", *more)
    head = "\r\n".join((f"POST {route} HTTP/1.1", *fields, "", ""))
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + payload)
        yield connection


ENDLESS_BODIES = {
    "chat": ("/v1/chat/completions", CHAT | {"max_tokens": ENDLESS}),
    "completion": ("/completion", {"prompt": "the dog", "n_predict": ENDLESS}),
    "responses": ("/v1/responses", {"input": "the cat", "max_output_tokens": ENDLESS}),
    "messages": ("/v1/messages", CHAT | {"max_tokens": ENDLESS}),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("endless", ENDLESS_BODIES.values(), ids=ENDLESS_BODIES.keys())
def test_a_client_that_leaves_a_stream_frees_the_real_slot(
    url: str, backend: LlamaServer, endless: tuple[str, dict[str, object]], stream: bool
) -> None:
    backend.all_free()
    with requesting(url, endless[0], endless[1] | {"stream": stream}) as connection:
        eventually(backend.busy, lambda busy: busy == 1, 10)
        if stream:
            assert connection.recv(20).startswith(b"HTTP/1.1 200 ")
    backend.all_free(every_s=1.1 if stream else 2.4)


def test_a_conversation_id_does_not_keep_the_slot(url: str, backend: LlamaServer) -> None:
    """If a request names a conversation, llama-server goes on generating for a client that has left."""
    backend.all_free()
    with requesting(
        url, "/v1/chat/completions", CHAT | {"max_tokens": ENDLESS, "stream": True}, "X-Conversation-Id: e2e"
    ):
        eventually(backend.busy, lambda busy: busy == 1, 10)
    backend.all_free()


def test_a_queued_client_that_leaves_never_reaches_the_backend(url: str, backend: LlamaServer) -> None:
    """All slots are busy. One more client waits and leaves. The backend must not count its prompt."""
    long = {"prompt": "the dog", "n_predict": ENDLESS, "stream": True}
    backend.all_free()
    streams = [requesting(url, "/completion", long) for _ in range(backend.slot_count)]
    for stream in streams:
        stream.__enter__()
    eventually(backend.busy, lambda busy: busy == backend.slot_count, 10)
    before = backend.counters()
    with requesting(url, "/completion", {"prompt": "the stone " * 50, "n_predict": 1, "cache_prompt": False}):
        eventually(lambda: waiting(url), lambda count: count == 1, 10)
    eventually(lambda: waiting(url), lambda count: count == 0, SLOT_FREE_S)
    for stream in streams:
        stream.__exit__(None, None, None)
    backend.all_free()
    assert backend.counters()["prompt_tokens_total"] == before["prompt_tokens_total"]


def waiting(url: str) -> int:
    _, page = fetch(f"{url}/metrics")
    return next(
        int(float(line.split()[1])) for line in page.decode().splitlines() if line.startswith("gateway_queue_depth")
    )


STREAMS = 32


class Reader(threading.Thread):
    """Reads one endless stream until it ends in any way."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.begun = threading.Event()
        self.received = b""
        self.status = 0
        self.cut: httpx.HTTPError | None = None

    def run(self) -> None:
        body = CHAT | {"max_tokens": ENDLESS, "stream": True}
        address = f"{self.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", address, headers=bearer(TEAM_KEY), json=body, timeout=30) as answer:
                self.status = answer.status_code
                for piece in answer.iter_raw():
                    self.received = (self.received + piece)[-4000:]
                    self.begun.set()
        except httpx.HTTPError as error:
            self.cut = error

    def has_seen_the_failure(self) -> bool:
        return self.cut is not None or b'data: {"error"' in self.received or self.status >= 500

    def has_seen_a_false_end(self) -> bool:
        return b"[DONE]" in self.received


@pytest.fixture
def fragile(llama_bin: str, model: Path, tmp_path: Path) -> Iterator[LlamaServer]:
    server = LlamaServer(tmp_path, llama_bin, model, STREAMS)
    server.start()
    yield server
    server.end(signal.SIGKILL)


@pytest.fixture
def wide_gateway(fragile: LlamaServer, tmp_path: Path) -> Iterator[Gateway]:
    yield from running(Gateway(tmp_path, fragile, MAX_CONCURRENT_REQUESTS=str(STREAMS)))


def test_each_reader_sees_that_the_backend_was_killed(fragile: LlamaServer, wide_gateway: Gateway) -> None:
    readers = [Reader(wide_gateway.url) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    assert all(reader.begun.wait(60) for reader in readers)
    fragile.end(signal.SIGKILL)
    for reader in readers:
        reader.join(10)
    assert [reader.is_alive() for reader in readers] == [False] * STREAMS
    assert [reader.has_seen_the_failure() for reader in readers] == [True] * STREAMS
    assert [reader.has_seen_a_false_end() for reader in readers] == [False] * STREAMS

    fragile.start()
    address, request = f"{wide_gateway.url}/v1/chat/completions", CHAT | {"max_tokens": 3}
    eventually(lambda: fetch(address, TEAM_KEY, request)[0], lambda status: status == 200, 20)
