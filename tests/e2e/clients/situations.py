"""The situations: a gateway and its backend, brought to the point at which a client meets them."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from client_table import CHAT, PROMPT
from scripted import TEXT, Choose, LoopThread, answers, breaks_off, breaks_off_inside, held_until, once, scripted
from stack import Gateway, LlamaServer, eventually, fetch, running

from support.backend import Call, Step

CELL_KEY = "sk-e2e-cell-0123456789abcdef"
UNKNOWN_KEY = "sk-e2e-unknown-0123456789abcdef"
RATE = 1  # requests per minute
AGE_S = 15.0  # how long before the client the key's rate was used: Retry-After is what is left of a minute
WAIT_S = 30.0
LONG_PROMPT = "the cat " * 4000
OWN_ID = "harness"  # beginning of the X-Request-Id of requests that are not the client's


class Address(NamedTuple):
    """A backend as the gateway knows it."""

    port: int
    key: str


@dataclass
class Setup:
    """What a cell is made from. An agent's prompt is too long for the real server, so it gets the scripted one."""

    llama: LlamaServer
    loop: LoopThread
    folder: Path
    is_agent: bool


class CellGateway(Gateway):
    """A gateway for one cell; `tell` reports the model's state in the supervisor's place."""

    def __init__(self, folder: Path, backend: Address, key_options: str, **settings: str) -> None:
        self.state_file = folder / "state.json"
        defaults = {"MAX_CONCURRENT_REQUESTS": "4", "LOG_FORMAT": "json", "STATE_FILE": str(self.state_file)}
        super().__init__(folder, backend, **(defaults | settings))  # type: ignore[arg-type]
        with Path(self.settings["AUTH_KEYS_FILE"]).open("a") as keys:
            keys.write(f"cell:{CELL_KEY}:{key_options}\n")

    def tell(self, state: str) -> None:
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps({"state": state, "since": "2026-01-01T00:00:00Z", "detail": "", "backend_pid": 1}))
        part.replace(self.state_file)

    def is_ready(self) -> bool:
        state = json.loads(self.state_file.read_text())["state"]
        return super().is_ready() if state == "ready" else fetch(f"{self.url}/ping")[0] in (200, 204)

    def gauge(self, *names: str) -> float:
        _, page = fetch(f"{self.url}/metrics")
        found = dict(re.findall(r"^gateway_(\w+) ([0-9.]+)$", page.decode(), re.MULTILINE))
        return sum(float(found[name]) for name in names)

    def requests(self) -> list[dict[str, Any]]:
        """The access lines of the client's own requests so far."""
        text = self.access_log.read_text() if self.access_log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        public = ("/metrics", "/health", "/ping")
        return [line for line in lines if line["route"] not in public and not line["id"].startswith(OWN_ID)]


@dataclass
class Arranged:
    """What the client is given, and what happens while it runs: `meanwhile` ends early once its event is set."""

    gateway: CellGateway
    key: str = CELL_KEY
    text: str = ""  # what a success must contain; empty: anything
    meanwhile: Callable[[threading.Event], None] = field(default=lambda over: None)


Arrange = Callable[[Setup], AbstractContextManager[Arranged]]


class Situation(NamedTuple):
    """`wants`: the client must end with a "text", with an "error", or with "either".

    An error must match `reason`. The client sends `requests` at most, of which the `first` is answered with that
    status if it is not 0, and has ended `seconds` after it.
    """

    name: str
    title: str
    arrange: Arrange
    wants: str
    reason: str = ""
    requests: int = 1
    first: int = 0
    seconds: float = 20.0
    mode: str = "stream"
    prompt: str = PROMPT
    is_slow: bool = False  # it mostly waits, and beside others


@contextmanager
def gateway(setup: Setup, backend: Address, state: str, key_options: str, **settings: str) -> Iterator[CellGateway]:
    server = CellGateway(setup.folder, backend, key_options, **settings)
    server.tell(state)
    yield from running(server)


@contextmanager
def answering(
    setup: Setup, *, state: str = "ready", key_options: str = "100000", **settings: str
) -> Iterator[Arranged]:
    """A backend that answers, the real one if the client's prompt is ours, and a gateway."""
    if not setup.is_agent:
        address = Address(setup.llama.port, setup.llama.key)
        with gateway(setup, address, state, key_options, **settings) as server:
            yield Arranged(server)
        return
    with acting(setup, answers, state=state, key_options=key_options, **settings) as arranged:
        yield arranged


@contextmanager
def acting(
    setup: Setup, choose: Choose, *, state: str = "ready", key_options: str = "100000", **settings: str
) -> Iterator[Arranged]:
    with (
        scripted(setup.loop, choose) as backend,
        gateway(setup, Address(backend.port, ""), state, key_options, **settings) as server,
    ):
        yield Arranged(server, text=TEXT)


@contextmanager
def own_stream(server: CellGateway, key: str = CELL_KEY) -> Iterator[socket.socket]:
    """A stream of the harness's, which the scripted backend recognizes by its id."""
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "stream": True}).encode()
    fields = (f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", f"X-Request-Id: {OWN_ID}")
    head = "\r\n".join((f"POST {CHAT} HTTP/1.1", "Host: gateway", "Connection: close", *fields, "", ""))
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as stream:
        stream.sendall(head.encode() + body)
        yield stream


def read_until(stream: socket.socket, wanted: bytes) -> None:
    seen = b""
    while wanted not in seen:
        data = stream.recv(65536)
        assert data, seen
        seen += data


def spend(server: CellGateway) -> None:
    """One request with the cell's key, to its end."""
    with own_stream(server) as stream:
        read_until(stream, b"[DONE]")


def wait_for(condition: Callable[[], bool], over: threading.Event) -> bool:
    """Wait until the condition holds; False if the client has ended before."""
    while not over.wait(0.05):
        if condition():
            return True
    return False


# The situations, one function each


@contextmanager
def wrong_key(setup: Setup) -> Iterator[Arranged]:
    with answering(setup) as arranged:
        arranged.key = UNKNOWN_KEY
        yield arranged


@contextmanager
def rate_used_up(setup: Setup) -> Iterator[Arranged]:
    with answering(setup, key_options=str(RATE)) as arranged:
        spend(arranged.gateway)
        time.sleep(AGE_S)  # the window is a minute of real time
        yield arranged


@contextmanager
def quota_used_up(setup: Setup) -> Iterator[Arranged]:
    with answering(setup, key_options="1000 tokens_per_day=1") as arranged:
        spend(arranged.gateway)
        yield arranged


@contextmanager
def queue_full(setup: Setup) -> Iterator[Arranged]:
    """One request has the slot, another the only place in the queue, until the client has been refused once."""
    free = asyncio.Event()

    def choose(call: Call) -> tuple[Step, ...]:
        return held_until(free, call) if call.fields[b"x-request-id"] == OWN_ID.encode() else answers(call)

    with acting(setup, choose, MAX_CONCURRENT_REQUESTS="1", MAX_QUEUE_SIZE="1") as arranged:
        server = arranged.gateway

        def meanwhile(over: threading.Event) -> None:
            wait_for(lambda: bool(server.requests()), over)
            setup.loop.call(free.set)

        arranged.meanwhile = meanwhile
        with own_stream(server) as first:
            read_until(first, b"data:")
            with own_stream(server) as second:
                eventually(lambda: server.gauge("queue_depth"), lambda depth: depth == 1, WAIT_S)
                yield arranged
                read_until(second, b"[DONE]")


@contextmanager
def cut(setup: Setup) -> Iterator[Arranged]:
    with acting(setup, once(breaks_off)) as arranged:
        yield arranged


@contextmanager
def cut_inside(setup: Setup) -> Iterator[Arranged]:
    with acting(setup, once(breaks_off_inside)) as arranged:
        yield arranged


def loads(arranged: Arranged) -> Arranged:
    """The model is ready once the waiting client has had a heartbeat: a later request of ours has one by then."""
    server = arranged.gateway

    def meanwhile(over: threading.Event) -> None:
        if wait_for(lambda: server.gauge("requests_active", "queue_depth") > 0, over):
            with own_stream(server) as witness:
                read_until(witness, b": ")
                read_until(witness, b"\n: ")
            server.tell("ready")

    arranged.meanwhile = meanwhile
    return arranged


@contextmanager
def cold_start(setup: Setup) -> Iterator[Arranged]:
    with answering(setup, state="loading", SSE_HEARTBEAT="1") as arranged:
        yield loads(arranged)


@contextmanager
def too_long(setup: Setup, *, state: str = "ready", **settings: str) -> Iterator[Arranged]:
    """The real server, whose context is too short for the prompt."""
    address = Address(setup.llama.port, setup.llama.key)
    with gateway(setup, address, state, "100000", **settings) as server:
        yield Arranged(server)


@contextmanager
def too_long_late(setup: Setup) -> Iterator[Arranged]:
    with too_long(setup, state="loading", SSE_HEARTBEAT="1") as arranged:
        yield loads(arranged)


INVALID = r"Missing or invalid API key|invalid_api_key"
SPENT = r"limited to 1 tokens a day|insufficient_quota"
FULL = r"[Qq]ueue is full|queue_full"
CUT = r"closed in the middle|backend_unavailable"
NUMBERS = r"request \(\d+ tokens\) exceeds the available context size \(1024 tokens\)"
SITUATIONS = (
    Situation("stream", "success, streamed", answering, "text"),
    Situation("whole", "success, whole", answering, "text", mode="whole"),
    Situation("wrong-key", "wrong key: 401", wrong_key, "error", INVALID),
    Situation("rate", "rate used up: 429", rate_used_up, "either", "limited to 1 requests", 3, 429, 75.0, is_slow=True),
    Situation("quota", "quota used up: 429", quota_used_up, "error", SPENT),
    Situation("queue-full", "queue full: 503", queue_full, "either", FULL, 3, 503),
    Situation("cut", "stream cut between events", cut, "either", CUT, 2),
    Situation("cut-inside", "stream cut in an event", cut_inside, "either", ".", 2),
    Situation("cold-start", "model loads, then answer", cold_start, "text"),
    Situation("too-long", "prompt too long: 400", too_long, "error", NUMBERS, first=400, prompt=LONG_PROMPT),
    Situation(
        "too-long-late", "model loads, then prompt too long", too_long_late, "error", NUMBERS, prompt=LONG_PROMPT
    ),
)
