"""Heartbeats on a waiting stream, as the OpenAI and Anthropic packages handle them: they only wait."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anthropic
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from stack import ENDLESS, SCRIPTS, TEAM_KEY, Gateway, Process, eventually, fetch, running

from support.ports import free_port

QUESTION = [{"role": "user", "content": "the cat is on the moon"}]
TOKENS = 7
CLIENT_ERRORS = (openai.OpenAIError, anthropic.APIError)


class Mock(Process):
    """scripts/mock_backend.py with one slot."""

    name = "mock"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, free_port())
        self.key = ""

    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPTS / "mock_backend.py"), "--port", str(self.port), "--parallel", "1"]


class HeldGateway(Gateway):
    """A gateway whose state file the test writes instead of the supervisor."""

    def __init__(self, folder: Path, backend: Mock, **settings: str) -> None:
        self.state_file = folder / "state.json"
        super().__init__(folder, backend, STATE_FILE=str(self.state_file), SSE_HEARTBEAT="1", **settings)  # type: ignore[arg-type]
        self.set_state("loading")

    def set_state(self, state: str) -> None:
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps({"state": state, "since": "2026-01-01T00:00:00Z", "detail": "", "backend_pid": 1}))
        part.replace(self.state_file)

    def is_ready(self) -> bool:
        return fetch(f"{self.url}/ping")[0] in (200, 204)

    def backend_is_ready(self) -> bool:
        return fetch(f"{self.url}/health")[0] == 200


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mock]:
    yield from running(Mock(tmp_path_factory.mktemp("mock")))


@pytest.fixture
def held(mock: Mock, tmp_path: Path) -> Iterator[HeldGateway]:
    yield from running(HeldGateway(tmp_path, mock))


@pytest.fixture
def impatient(mock: Mock, tmp_path: Path) -> Iterator[HeldGateway]:
    yield from running(HeldGateway(tmp_path, mock, COLD_START_WAIT="6"))


# Each client begins a stream, which returns as soon as its head has arrived, and yields an iterator of its text.

Texts = Iterator[str]


@contextmanager
def openai_stream(url: str) -> Iterator[Texts]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TEAM_KEY, max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(model="mock", max_tokens=TOKENS, messages=QUESTION, stream=True)
        yield (piece.choices[0].delta.content for piece in stream if piece.choices and piece.choices[0].delta.content)


@contextmanager
def openai_responses(url: str) -> Iterator[Texts]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TEAM_KEY, max_retries=0, timeout=60) as client:
        stream = client.responses.create(model="mock", max_output_tokens=TOKENS, input="the cat", stream=True)
        yield (text_of(event) for event in stream if event.type in ("response.output_text.delta", "error"))


def text_of(event: ResponseStreamEvent) -> str:
    """Return the event's text. Raises OpenAIError for an error event, which the package passes on like any other."""
    if event.type == "error":
        raise openai.OpenAIError(event.message)
    assert event.type == "response.output_text.delta"
    return event.delta


@contextmanager
def anthropic_stream(url: str) -> Iterator[Texts]:
    with (
        anthropic.Anthropic(base_url=url, api_key=TEAM_KEY, max_retries=0, timeout=60) as client,
        client.messages.stream(model="mock", max_tokens=TOKENS, messages=QUESTION) as stream,
    ):
        yield iter(stream.text_stream)


Begin = Callable[[str], "contextmanager[Texts]"]
streams = pytest.mark.parametrize("begin", [openai_stream, openai_responses, anthropic_stream])


@streams
def test_while_the_model_loads(held: HeldGateway, begin: Begin) -> None:
    with begin(held.url) as texts:
        assert not held.backend_is_ready()  # the head was sent by the gateway
        held.set_state("ready")
        assert len(list(texts)) == TOKENS


@streams
def test_while_queued(held: HeldGateway, begin: Begin) -> None:
    held.set_state("ready")
    eventually(held.backend_is_ready, bool, 10)
    with endless_stream(held) as before, begin(held.url) as texts:
        before.close()
        assert len(list(texts)) == TOKENS


@contextmanager
def endless_stream(gateway: Gateway) -> Iterator[socket.socket]:
    """Begin a stream that occupies the one slot until the socket is closed."""
    body = json.dumps({"messages": QUESTION, "max_tokens": ENDLESS, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as reader:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n"
        head += f"Authorization: Bearer {TEAM_KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall(head.encode() + body)
        assert reader.recv(20).startswith(b"HTTP/1.1 200 ")
        yield reader


@streams
def test_a_refusal_after_them_is_an_error_and_no_false_end(impatient: HeldGateway, begin: Begin) -> None:
    with begin(impatient.url) as texts, pytest.raises(CLIENT_ERRORS, match="The model was not ready"):
        list(texts)
