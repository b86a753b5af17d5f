"""A real Gateway in this process, on port 0, over a scripted backend; the clock stands still unless a test moves it.

    @scenario(MAX_QUEUE_SIZE="1")
    async def test_something(stack: Stack) -> None: ...

After each scenario, whatever happened in it: no slot, waiter, held byte, connection or task is left, nothing failed
unseen, and there is one access line for each request counted.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import turns
from client_wire import ClientWire
from config import load_config
from gateway import Gateway
from parts import Parts
from support.backend import Backend
from support.clock import HURRY, Clock
from support.hurry import HurriedLoop, HurriedSelector
from support.rawclient import PATIENCE_S, RawClient, Response
from turns import Outbox

KEY = b"sk-alice-0123456789abcdef"
OPERATOR_KEY = b"sk-olga-0123456789abcdef"
OTHER_KEY = b"sk-bob-0123456789abcdef"
BACKEND_KEY = "gateway-" + "B" * 43
KEYS = f"""alice:{KEY.decode()}:1000000
bob:{OTHER_KEY.decode()}:1000000
olga:{OPERATOR_KEY.decode()}:1000000 role=operator
"""
CHAT = b"/v1/chat/completions"
SCENARIO_S = 60.0 * HURRY

Setting = str | Callable[[Path], str]

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "BACKEND_API_KEY": BACKEND_KEY,
    "MAX_CONCURRENT_REQUESTS": "1000",
    "KEYS_WATCH_SECONDS": "0",
    "USAGE_FILE": "",
    "LOG_FORMAT": "json",
}


def request(
    method: bytes, target: bytes, body: bytes | None = None, *fields: bytes, key: bytes | None = KEY, minor: int = 1
) -> bytes:
    """A request as bytes. `fields` are whole lines without their CRLF."""
    lines = [b"%b %b HTTP/1.%d" % (method, target, minor), b"Host: gateway"]
    if key is not None:
        lines.append(b"Authorization: Bearer " + key)
    lines += fields
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body or b""])


def get(target: bytes, *fields: bytes, key: bytes | None = KEY, minor: int = 1) -> bytes:
    return request(b"GET", target, None, *fields, key=key, minor=minor)


def post(target: bytes = CHAT, body: bytes = b"{}", *fields: bytes, key: bytes | None = KEY, minor: int = 1) -> bytes:
    return request(b"POST", target, body, *fields, key=key, minor=minor)


def undated(raw: bytes) -> bytes:
    """An answer without the Date that the gateway adds to those of a backend that gives none."""
    rest, dates = re.subn(rb"(\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT)(?=\r\n)", b"", raw)
    assert dates == 1
    return rest


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Let the loop turn until something is so; fail where it never is."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, f"never came true: {what or inspect.getsource(condition)}"
        await asyncio.sleep(0.001)


class Unseen(logging.Handler):
    """Keeps what the gateway logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Stack:
    """The gateway, its backend, its clients, and what it has written down."""

    def __init__(self, folder: Path, settings: dict[str, Any], clock: Callable[[], float]) -> None:
        self.folder = folder
        self.settings = settings
        self.clock = clock
        self.backend = Backend()
        self.keys_file = folder / "keys.txt"
        self.state_file = folder / "state.json"
        self.access_file = folder / "access.log"
        self.finish = asyncio.Event()  # for a script to stall on
        self.log = Unseen()
        self.problems: list[dict[str, Any]] = []
        self._clients: list[RawClient] = []
        self._stopped = False
        self.outbox = Outbox()

    # --- Life ---

    async def start(self) -> None:
        self._main = asyncio.current_task()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.problems.append(context))
        logging.getLogger("gateway").addHandler(self.log)
        await self.backend.listen()
        if not self.keys_file.exists():
            self.keys_file.write_text(self.settings.pop("KEYS", KEYS))
        self.set_state(self.settings.pop("STATE", "ready"))
        made = {name: value(self.folder) if callable(value) else value for name, value in self.settings.items()}
        environ = {
            **DEFAULTS,
            "PORT_BACKEND": str(self.backend.port),
            "DATA_DIR": str(self.folder),
            "AUTH_KEYS_FILE": str(self.keys_file),
            "STATE_FILE": str(self.state_file),
            "ACCESS_LOG": str(self.access_file),
            **made,
        }
        settings = load_config({name: value for name, value in environ.items() if value != "unset"})
        self.parts = Parts(settings, self.clock, self.outbox)
        self.gateway = Gateway(self.parts)
        self.parts.reload()
        self.port = await self.gateway.start()
        if environ["STATE_FILE"] != "unset" and '"ready"' in self.state_file.read_text():
            await until(lambda: self.parts.readiness.ready, "ready")

    async def stop(self) -> None:
        """Let everybody leave; what is left then was leaked."""
        if self._stopped:
            return
        self._stopped = True
        for client in self._clients:
            client.close()
        await until(lambda: not self.parts.clients and not self.open_clients, "no connection is left")
        letting_go = self.parts.letting_go  # these wait for /slots; the gateway's end ends that
        await until(lambda: self.parts.gate.active == len(letting_go), "no slot is held")
        self.advance(4)  # a backend connection that was made for one who left in that moment has its time, too
        await self._close()
        self._check_nothing_left()

    async def _close(self) -> None:
        self._stopped = True
        await self.gateway.close()
        logging.getLogger("gateway").removeHandler(self.log)
        for client in self._clients:
            client.close()
        with contextlib.suppress(AssertionError):
            await until(lambda: not self.backend.open)
        await self.backend.stop()

    def _check_nothing_left(self) -> None:
        parts = self.parts
        left = (parts.gate.active, parts.gate.queued, parts.buffered_bytes, parts.relaying, len(self.backend.open))
        assert left == (0, 0, 0, 0, 0), f"slots, waiters, held bytes, relays, backend connections: {left}"
        tasks = asyncio.all_tasks() - {asyncio.current_task(), self._main}
        assert not tasks, tasks
        assert not self.problems, self.problems
        bugs = [record.exc_text or record.getMessage() for record in self.log.records if record.exc_info]
        assert not bugs, bugs
        lines, counted = self._text.count("\n"), sum(parts.metrics.requests._readings().values())
        assert lines == counted, f"{lines} access lines, {counted} requests counted"

    # --- Clients ---

    async def client(self, **names: Any) -> RawClient:
        client = await RawClient.connect(self.port, **names)
        self._clients.append(client)
        return client

    @property
    def open_clients(self) -> list[ClientWire]:
        """Every connection with a client, those included that only wait for their last bytes to be taken."""
        return [wire for wire in self.parts.deadlines if isinstance(wire, ClientWire)]

    async def ask(self, raw: bytes) -> Response:
        """One request on a connection of its own."""
        client = await self.client()
        client.send(raw)
        response = await client.response(raw.partition(b" ")[0])
        client.close()
        assert not client.received
        return response

    # --- Time, and the backend's state ---

    def advance(self, seconds: float) -> None:
        """Let that much time pass at once."""
        assert isinstance(self.clock, Clock)
        self.clock.advance(seconds)
        self.parts.deadlines.tick()

    def set_state(self, state: str) -> None:
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps({"state": state, "since": "2026-01-01T00:00:00Z", "detail": "", "backend_pid": 1}))
        part.replace(self.state_file)

    async def turn(self, state: str) -> None:
        """Change the state file, and wait until the gateway has seen it."""
        self.set_state(state)
        await until(lambda: self.parts.readiness.state == state, state)

    # --- What was written down ---

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The access lines, once the stack has stopped."""
        return [json.loads(line) for line in self._text.splitlines()]

    @property
    def _text(self) -> str:
        assert self._stopped
        text = self.access_file.read_text()
        assert text == "" or text.endswith("\n")
        return text

    def counted(self, name: str, *labels: str) -> float:
        """A counter's value."""
        self.parts.observer.flush()
        return float(getattr(self.parts.metrics, name).value(labels))

    def logged(self) -> list[str]:
        return [record.getMessage() for record in self.log.records]


def scenario(
    clock: Callable[[], Callable[[], float]] = Clock, **settings: Setting
) -> Callable[..., Callable[..., None]]:
    """Make a test of a coroutine function whose first parameter is a Stack; others come from pytest as ever.

    A setting may be a function of the scenario's folder. KEYS and STATE are what the keys file and the state file say
    at first; `unset` stands for no setting at all.
    """

    def decorate(play: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(play)
        def test(tmp_path: Path, **names: Any) -> None:
            stack = Stack(tmp_path, dict(settings), clock())
            turns.run(_play(play, stack, names), HurriedLoop(HurriedSelector(stack.outbox)))

        parameters = list(inspect.signature(play).parameters.values())[1:]
        own = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return test

    return decorate


def tls_scenario(**settings: Setting) -> Callable[..., Callable[..., None]]:
    """As `scenario`, over TLS, with a certificate for localhost: server.crt in the scenario's folder."""
    tls: dict[str, Setting] = {
        "TLS_CERT_FILE": lambda folder: str(make_certificate(folder)),
        "TLS_KEY_FILE": lambda folder: str(folder / "server.key"),
    }
    skip = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
    return lambda play: skip(scenario(**tls, **settings)(play))


async def _play(play: Callable[..., Awaitable[None]], stack: Stack, names: dict[str, Any]) -> None:
    await stack.start()
    try:
        await asyncio.wait_for(play(stack, **names), SCENARIO_S)
        await stack.stop()
    finally:
        if not stack._stopped:
            await stack._close()


def make_certificate(folder: Path, name: str = "server") -> Path:
    """Write NAME.crt and NAME.key, self-signed, with the openssl command; return the former's path."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    words = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    words += " -addext subjectAltName=DNS:localhost"
    subprocess.run([*words.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate


def trusting(certificate: Path) -> ssl.SSLContext:
    """A client's context that trusts one certificate."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    return context
