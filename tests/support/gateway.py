"""A real Gateway in this process, over a scripted backend. The clock stands still unless a test advances it.

    @scenario(MAX_QUEUE_SIZE="1")
    async def test_something(stack: Stack) -> None: ...

After each scenario no slot, waiter, held byte, connection or task is left, no exception was logged, and there is one
access line for each request that was counted.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from config.loader import load_config
from gateway import Gateway
from proxy.app import App
from proxy.request import Request
from proxy.session import CLOSING
from support.backend import STREAM_HEAD, Backend, send, stall
from support.clock import HURRY, PATIENCE_S, Clock
from support.hurry import HurriedLoop, HurriedSelector
from support.rawclient import RawClient, Response
from transport import write_batching
from transport.client_protocol import ClientProtocol
from transport.write_batching import WriteBatcher

KEY = b"sk-alice-0123456789abcdef"
OPERATOR_KEY = b"sk-olga-0123456789abcdef"
OTHER_KEY = b"sk-bob-0123456789abcdef"
BACKEND_KEY = "gateway-" + "B" * 43
KEYS = f"""alice:{KEY.decode()}:1000000
bob:{OTHER_KEY.decode()}:1000000
olga:{OPERATOR_KEY.decode()}:1000000 role=operator
"""
CHAT = b"/v1/chat/completions"
CROSSING_MS = 60_000  # a loaded machine may take any time between a request and the end that crosses it
SCENARIO_S = 2 * PATIENCE_S * HURRY

Setting = str | Callable[[Path], str]

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "BACKEND_API_KEY": BACKEND_KEY,
    "MAX_CONCURRENT_REQUESTS": "1000",
    "KEYS_WATCH_SECONDS": "0",
    "USAGE_FILE": "",
    "METRICS_AUTH_ENABLED": "false",
    "LOG_FORMAT": "json",
    "HEALTH_TIMEOUT": "60",  # of its own requests to the backend: a busy machine may take any time
}


def request(
    method: bytes, target: bytes, body: bytes | None = None, *fields: bytes, key: bytes | None = KEY, minor: int = 1
) -> bytes:
    """Return a request as bytes. `fields` are whole lines without CRLF."""
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
    """Return a response without the Date that the gateway adds if the backend sends none."""
    rest, dates = re.subn(rb"(\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT)(?=\r\n)", b"", raw)
    assert dates == 1
    return rest


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until the condition is true. Asserts that it becomes true."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, f"never came true: {what or inspect.getsource(condition)}"
        await asyncio.sleep(0.001)


class LogRecords(logging.Handler):
    """Keeps what the gateway logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Stack:
    """The gateway, its backend, its clients, its log and its access log."""

    def __init__(self, folder: Path, settings: dict[str, Any], clock: Callable[[], float]) -> None:
        self.folder = folder
        self.settings = settings
        self.clock = clock
        self.backend = Backend()
        self.keys_file = folder / "keys.txt"
        self.state_file = folder / "state.json"
        self.access_file = folder / "access.log"
        self.finish = asyncio.Event()  # scripts can stall on it
        self.supervisor, self._drain_socket = socket.socketpair()
        self.log = LogRecords()
        self.problems: list[dict[str, Any]] = []
        self._clients: list[RawClient] = []
        self._stopped = False
        self._closed = False
        self.batcher = WriteBatcher()

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
        self.app = App(settings, self.clock, self.batcher, crossing_ms=CROSSING_MS)
        self.gateway = Gateway(self.app, settings, self._drain_socket)
        await self.app.reload()
        self.port = await self.gateway.start()
        if environ["STATE_FILE"] != "unset" and '"ready"' in self.state_file.read_text():
            await until(lambda: self.app.readiness.ready, "ready")

    async def stop(self) -> None:
        """Close all clients. Asserts that nothing is left then."""
        if self._stopped:
            return
        self._stopped = True
        for client in self._clients:
            client.close()
        await until(lambda: not len(self.app.sessions), "no connection is left")
        # The slots of cancelled requests wait for /slots, and are released when the gateway ends.
        await until(lambda: self.app.numbers.active == self.app.pending_releases, "no slot is held")
        self.advance(4)  # a connection to the backend whose client has just left is kept for a while
        await self.close()
        self._check_nothing_left()

    async def close(self) -> None:
        """End the gateway, the clients and the backend, in whatever state they are."""
        if self._closed:
            return
        self._stopped = self._closed = True
        await self.gateway.close()
        self.supervisor.close()
        self._drain_socket.close()
        logging.getLogger("gateway").removeHandler(self.log)
        for client in self._clients:
            client.close()
        self.backend.resume_reading()
        with contextlib.suppress(AssertionError):
            await until(lambda: not self.backend.open)
        await self.backend.stop()

    def _check_nothing_left(self) -> None:
        app = self.app
        left = (
            app.numbers.active,
            app.numbers.queued,
            app.memory.held_bytes,
            app.sessions.backend_slots,
            len(self.backend.open),
        )
        assert left == (0, 0, 0, 0, 0), f"slots, waiters, held bytes, relays, backend connections: {left}"
        tasks = asyncio.all_tasks() - {asyncio.current_task(), self._main}
        assert not tasks, tasks
        assert not self.problems, self.problems
        bugs = [record.exc_text or record.getMessage() for record in self.log.records if record.exc_info]
        assert not bugs, bugs
        lines, counted = (
            self._text.count("\n"),
            sum(number for family in app.metrics.requests.families() for _, number in family.series),
        )
        assert lines == counted, f"{lines} access lines, {counted} requests counted"

    # --- Clients ---

    async def client(self, **names: Any) -> RawClient:
        client = await RawClient.connect(self.port, **names)
        self._clients.append(client)
        return client

    @property
    def clients(self) -> list[ClientProtocol]:
        """The connections that are idle or served."""
        return [session.client for session in self.app.sessions if session.state != CLOSING]

    @property
    def requests(self) -> list[Request]:
        """The requests that are being served."""
        return [session.request for session in self.app.sessions if session.request is not None]

    @property
    def open_clients(self) -> list[ClientProtocol]:
        """All connections with clients, including those that only wait until their last bytes are sent."""
        return [session.client for session in self.app.sessions]

    async def occupy(self, number: int) -> list[RawClient]:
        """Return so many clients with a key, each with a request that does not end. They are the first requests."""
        clients = []
        for each in range(number):
            self.backend.script(send(STREAM_HEAD), stall())
            client = await self.client()
            client.send(post())
            await self.backend.call(each)
            clients.append(client)
        return clients

    async def ask(self, raw: bytes) -> Response:
        """Send one request on a new connection; return the response."""
        client = await self.client()
        client.send(raw)
        response = await client.response(raw.partition(b" ")[0])
        client.close()
        assert not client.received
        return response

    # --- The time and the backend's state ---

    def advance(self, seconds: float) -> None:
        """Advance the clock, and tick."""
        assert isinstance(self.clock, Clock)
        self.clock.advance(seconds)
        self.app.ticker.tick()

    def set_state(self, state: str) -> None:
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps({"state": state, "since": "2026-01-01T00:00:00Z", "detail": "", "backend_pid": 1}))
        part.replace(self.state_file)

    async def turn(self, state: str) -> None:
        """Change the state file, and let the gateway read it now, as a request that waits for the backend does."""
        self.set_state(state)
        await self.app.readiness.catch_up()
        await until(lambda: self.app.readiness.state == state, state)

    # --- Logs and counters ---

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The access lines. The stack must have stopped."""
        return [json.loads(line) for line in self._text.splitlines()]

    @property
    def _text(self) -> str:
        assert self._stopped
        text = self.access_file.read_text()
        assert text == "" or text.endswith("\n")
        return text

    def counted(self, name: str, *labels: str) -> float:
        """Return the value of a counter."""
        self.app.recorder.flush()
        return float(getattr(self.app.metrics, name).value(labels))

    def logged(self) -> list[str]:
        return [record.getMessage() for record in self.log.records]


def scenario(
    clock: Callable[[], Callable[[], float]] = Clock, **settings: Setting
) -> Callable[..., Callable[..., None]]:
    """Make a test of a coroutine function whose first parameter is a Stack. Others come from pytest.

    A setting may be a function of the scenario's folder. KEYS and STATE are the first contents of the keys file and the
    state file. `unset` removes a setting.
    """

    def decorate(play: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(play)
        def test(tmp_path: Path, **names: Any) -> None:
            stack = Stack(tmp_path, dict(settings), clock())
            write_batching.run(_play(play, stack, names), HurriedLoop(HurriedSelector(stack.batcher)))

        parameters = list(inspect.signature(play).parameters.values())[1:]
        own = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return test

    return decorate


def tls_scenario(**settings: Setting) -> Callable[..., Callable[..., None]]:
    """Like `scenario`, over TLS, with a certificate for localhost: server.crt in the scenario's folder."""
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
        await stack.close()


def make_certificate(folder: Path, name: str = "server") -> Path:
    """Write NAME.crt, self-signed, and NAME.key with the openssl command; return the path of NAME.crt."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    command += " -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate


def trusting(certificate: Path) -> ssl.SSLContext:
    """Return a context for clients that trusts one certificate."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    return context
