"""Parts of the soak: processes that report their state, patient clients, and findings."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.rawclient import RawClient

TESTS = Path(__file__).parent.parent
IMPORTS = f"{TESTS.parent / 'scripts'}:{TESTS}"
# Far more than is needed, for machines under load: what comes late is not lost.
START_S = 120.0
STOP_S = 60.0
SETTLE_S = 60.0  # for what is left at the end: an idle connection to the backend is kept for 3.5 s
LINE_BYTES = 1 << 26
LOST = (AssertionError, OSError, ValueError)  # the exceptions of a response that is not whole
ANY_RATE = 1_000_000_000


@dataclass
class Finding:
    """The result of one part of the soak. Each item in `lost`, `leaked` or `missed` is a failure."""

    name: str
    figures: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


# --- Processes ---


class Child:
    """A process that prints a JSON line at its start and at each SIGUSR1."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._look = asyncio.Lock()
        self.port = 0

    @classmethod
    async def start(cls, module: str, environ: Mapping[str, str], log: Path, *flags: str) -> "Child":
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": IMPORTS, "PYTHONDONTWRITEBYTECODE": "1", **environ}
        with log.open("ab") as stderr:
            child = cls(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", f"support.{module}", *flags),
                    env=environ,
                    cwd=log.parent,  # the first place that modules are looked for in
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=stderr,
                    limit=LINE_BYTES,
                ),
                log,
            )
        try:
            child.port = (await child.next_line())["port"]
        except BaseException:
            await child.kill()
            raise
        return child

    async def next_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        if not line:
            raise RuntimeError(f"it has ended: {self._log.read_text()[-1000:]}")
        state: dict[str, Any] = json.loads(line)
        return state

    async def look(self) -> dict[str, Any]:
        """Ask the process for its state."""
        async with self._look:
            self._process.send_signal(signal.SIGUSR1)
            return await self.next_line()

    @property
    def rss_bytes(self) -> int:
        """The memory that it occupies now."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_s(self) -> float:
        """The CPU time that it has used, user and system."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def end(self) -> int:
        """Stop it in an orderly way; return its exit status."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_S)
        except asyncio.TimeoutError:
            await self.kill()
            raise RuntimeError(f"{self._process.pid} did not end within {STOP_S:g} s of SIGTERM") from None

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Stack:
    """A gateway and a mock backend as processes. `settings` are the gateway's, `mock` the backend's."""

    def __init__(
        self,
        folder: Path,
        finding: Finding,
        *,
        keys: int = 1,
        slots: int = 4,
        settings: Mapping[str, str] | None = None,
        mock: Mapping[str, str] | None = None,
        probing: bool = False,
    ) -> None:
        """`probing`: the gateway probes the backend itself, and the stack does not wait until it is ready."""
        self.folder = folder
        self.finding = finding
        self.keys = [f"k{number:02}" for number in range(keys)]
        self.slots = slots
        self.seen: list[str] = []
        self._settings = dict(settings or {})
        self._mock = {"MOCK_SLOTS": str(slots), **(mock or {})}
        self._probing = probing
        self._at_rest: dict[str, int] = {}
        self._begun_cpu_s = 0.0

    async def __aenter__(self) -> "Stack":
        self.folder.mkdir(parents=True)
        self.backend = await Child.start(
            "watched_backend", self._mock, self.folder / "backend.log", "--host", "127.0.0.1", "--port", "0"
        )
        try:
            self.gateway = await Child.start("watched_gateway", self._environ(), self.folder / "gateway.log")
        except BaseException:
            await self.backend.kill()
            raise
        while not (self._probing or (await self.gateway.look())["ready"]):
            await asyncio.sleep(0.1)
        # The first look that shows it ready may come while it still prepares something.
        before = None
        while before != (held := (await self.gateway.look())["held"]):
            before = held
            await asyncio.sleep(0.1)
        self._at_rest = held
        self._begun_cpu_s = self.gateway.cpu_s
        return self

    def _environ(self) -> dict[str, str]:
        keys = "".join(f"{name}:{secret_of(name)}:{ANY_RATE}\n" for name in self.keys)
        (self.folder / "keys.txt").write_text(keys)
        environ = {
            "HOST": "127.0.0.1",
            "PORT": "0",
            "PORT_BACKEND": str(self.backend.port),
            "DATA_DIR": str(self.folder),
            "AUTH_KEYS_FILE": str(self.folder / "keys.txt"),
            "ACCESS_LOG": str(self.folder / "access.log"),
            "LOG_FORMAT": "json",
            "KEEPALIVE_TIMEOUT": "3600",  # a client under load may come back late
            **self._settings,
        }
        if not self._probing:
            state = {"state": "ready", "since": "2026-01-01T00:00:00Z", "detail": "", "backend_pid": 1}
            (self.folder / "state.json").write_text(json.dumps(state))
            environ["STATE_FILE"] = str(self.folder / "state.json")
        return environ

    async def __aexit__(self, *_: object) -> None:
        statuses = [await child.end() for child in (self.gateway, self.backend)]
        if statuses[0] != 0:
            self.finding.lost.append(f"{self.finding.name}: the gateway ended with status {statuses[0]}")
        if "Traceback" in (self.folder / "gateway.log").read_text():
            self.finding.lost.append(f"{self.finding.name}: a traceback in the gateway's log")

    # --- Held resources ---

    async def held(self) -> dict[str, int]:
        """Return what gateway and backend hold now, and add the requests that the backend has received to `seen`."""
        gateway, backend = await self.gateway.look(), await self.backend.look()
        self.seen += backend["seen"]
        return {**gateway["held"], **backend["held"]}

    async def settle(self) -> None:
        """Wait until all is as it was at rest. Add what is not released to `leaked`, and the CPU time to `figures`."""
        deadline_s = asyncio.get_running_loop().time() + SETTLE_S
        while left := self._left(await self.held()):
            if asyncio.get_running_loop().time() > deadline_s:
                self.finding.leaked += [f"{self.finding.name}: {number} {name}" for name, number in left.items()]
                break
            await asyncio.sleep(0.2)
        self.finding.figures.append(f"gateway's CPU time {self.gateway.cpu_s - self._begun_cpu_s:.1f} s")

    def _left(self, held: Mapping[str, int]) -> dict[str, int]:
        # A gateway that probes keeps a connection for its probes.
        spare = {"backend connections", "sockets at the backend", "tasks"} if self._probing else set()
        left = {name: number - self._at_rest.get(name, 0) - (name in spare) for name, number in held.items()}
        return {name: number for name, number in left.items() if number > 0}

    def access_lines(self) -> list[dict[str, Any]]:
        """Return the access lines. The stack must have stopped."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    # --- Clients ---

    async def client(self, receive_buffer: int = 0) -> "Client":
        client = await Client.connect(self.gateway.port, receive_buffer=receive_buffer)
        assert isinstance(client, Client)
        return client


def secret_of(key: str) -> str:
    return f"sk-soak-{key}-0123456789abcdef"


def chat(key: str, name: str, *, tokens: int, stream: bool) -> bytes:
    """Return a chat request as bytes. `name` is its X-Request-Id, which the backend and the access log get."""
    payload = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "stream": stream}
    body = json.dumps(payload).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {secret_of(key)}\r\n"
        f"X-Request-Id: {name}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client(RawClient):
    """A client that waits without a limit: the soak as a whole has one."""

    async def until(self, condition: Any) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def ask(self, request: bytes, *, stream: bool) -> tuple[int, bytes]:
        """Return status and payload. Raises one of LOST if the response is not whole."""
        self.send(request)
        answer = await self.response()
        if answer.status == 200:
            end = rb"data: \[DONE\]\n\n\Z" if stream else rb"\}\s*\Z"
            assert re.search(end, answer.body), f"{answer.body[-200:]!r} is not a whole response"
        return answer.status, answer.body

    async def leave(self, way: str) -> None:
        """Leave by "fin", "reset" or "half-close". The gateway closes the connection after the latter."""
        if way == "fin":
            self.close()
        elif way == "reset":
            self.reset()
        else:
            self.half_close()
            await self.until(lambda: bool(self.ended))
            self.close()


WAYS = ("fin", "reset", "half-close")
