"""Parts of the soak under faults: start.sh as an operator runs it, clients that keep count, and what must agree.

A request counts as answered when its client has the whole response. Each answered request must have one access line,
whatever happens meanwhile. Only those that ended shortly before a kill (see Books.excuse) may lack it.
"""

import asyncio
import errno
import json
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from support.boot import command_line, descendants
from support.faults import Fault, Faults, NoCompiler
from support.ports import free_ports
from support.soaking import ANY_RATE, LOST, TESTS, Client, Finding, chat, secret_of

SCRIPTS = TESTS.parent / "scripts"
PATIENCE_S = 120.0  # for what must happen at some time, on a busy machine, too
DRAIN_S = 3.0
MARGIN_S = 3.0  # after DRAIN_TIMEOUT each process has ended
LOSS_S = 2.0  # what ended so long before a kill may not be written: 0.5 s, and more on a busy machine
OPERATOR = "operator"
ROUTE = "/v1/chat/completions"
PROGRAMS = ("supervisor.py", "gateway.py", "health_server.py", "mock_backend.py")
VOLUME = ("write", "stat", "fstat", "open", "fsync", "rename")


class Books:
    """What clients have seen, and when a loss is excused."""

    def __init__(self) -> None:
        self.answered: dict[str, tuple[int, float]] = {}  # id: status and when it ended
        self.broken = 0  # responses that did not arrive whole: a client sees that
        self.excused: list[tuple[float, float]] = []

    def excuse(self, since_s: float) -> None:
        """Excuse what is lost of the requests that have ended since then."""
        self.excused.append((since_s - LOSS_S, asyncio.get_running_loop().time()))

    def must_be_known(self) -> dict[str, int]:
        """Return the requests that must have an access line, with their statuses."""
        return {
            name: status
            for name, (status, ended_s) in self.answered.items()
            if not any(since_s <= ended_s <= until_s for since_s, until_s in self.excused)
        }


class Service:
    """start.sh with the mock, always in the same folder and at the same ports."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder = folder
        self.keys_file = folder / "api_keys.txt"
        self.keys = [*keys, OPERATOR]
        self.port, self.port_health, port_backend = free_ports(3)
        try:
            self.faults: Faults | None = Faults(folder, spare="mock_backend")
        except NoCompiler:
            self.faults = None
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "PORT_HEALTH": str(self.port_health),
            "PORT_BACKEND": str(port_backend),
            "DATA_DIR": str(folder / "data"),
            "STATE_FILE": str(folder / "state" / "state.json"),
            "AUTH_KEYS_FILE": str(self.keys_file),
            "KEYS_WATCH_SECONDS": "0.5",
            "ACCESS_LOG": str(folder / "data" / "access.log"),
            "USAGE_FILE": str(folder / "data" / "usage.db"),
            "INSTANCE_ID": "soak",
            "MOCK_BACKEND": "true",
            "MOCK_SLOTS": "8",
            "MOCK_TOKENS_PER_SECOND": "200",
            "LOG_FORMAT": "json",
            "DRAIN_TIMEOUT": f"{DRAIN_S:g}",
            "MAX_RESTARTS": "1000",
            "KEEPALIVE_TIMEOUT": "600",
            "CLIENT_HEADER_TIMEOUT": "600",
            **(self.faults.env if self.faults else {}),
        }

    def write_keys(self, *more: str) -> None:
        role = {OPERATOR: " role=operator"}
        lines = [f"{name}:{secret_of(name)}:{ANY_RATE}{role.get(name, '')}\n" for name in (*self.keys, *more)]
        new = self.keys_file.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(self.keys_file)

    async def start(self) -> None:
        for name in ("data", "state"):
            (self.folder / name).mkdir(exist_ok=True)
        with (self.folder / "output.log").open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                str(SCRIPTS / "start.sh"), env=self.env, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        await until(self.is_ready, "start.sh is not ready")

    async def is_ready(self) -> bool:
        return await self.get("/ready", self.port_health) == 200 and await self.get("/health") == 200

    async def get(self, path: str, port: int = 0, key: str = OPERATOR) -> int:
        """Return the status of a GET; 0 without a response."""
        return (await self.fetch(path, port, key))[0]

    async def fetch(self, path: str, port: int = 0, key: str = OPERATOR) -> tuple[int, bytes]:
        try:
            client = await Client.connect(port or self.port)
            head = (
                f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {secret_of(key)}\r\n\r\n"
            )
            client.send(head.encode())
            answer = await asyncio.wait_for(client.response(), PATIENCE_S)
            client.close()
        except LOST:
            return 0, b""
        return answer.status, answer.body

    def pid(self, program: str) -> int | None:
        if program == "supervisor.py":
            return None if self.process.returncode is not None else self.process.pid
        found = (pid for pid in descendants(self.process.pid) if program in command_line(pid))
        return next(found, None)

    def send(self, program: str, number: int) -> None:
        pid = self.pid(program)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def stop(self) -> float:
        """Stop it, and return the seconds that it took beyond those that this process was delayed itself."""
        loop = asyncio.get_running_loop()
        begun_s, delay = loop.time(), asyncio.ensure_future(measure_delay())
        self.send("supervisor.py", signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), PATIENCE_S)
        took_s = loop.time() - begun_s
        delay.cancel()
        with suppress(asyncio.CancelledError):
            await delay
        return took_s - Delay.total_s

    def access_lines(self) -> list[dict[str, Any]]:
        """Return all access lines of chats, also of rotated files. A line that a kill has cut is left out."""
        lines = []
        for path in sorted((self.folder / "data").glob("access.log*")):
            for text in path.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(text))
        return [line for line in lines if line["route"] == ROUTE]

    async def requests_of_metrics(self) -> int:
        _, page = await self.fetch("/metrics")
        pattern = rb'^gateway_requests_total\{route="/v1/chat/completions",code="\d+"\} ([0-9.e+]+)$'
        return int(sum(float(number) for number in re.findall(pattern, page, re.MULTILINE)))

    async def requests_of_ledger(self) -> int:
        status, page = await self.fetch("/usage?since=2d")
        return sum(row["requests"] for row in json.loads(page)["rows"]) if status == 200 else -1


class Delay:
    """How long the event loop of the soak itself was late: its machine is busy."""

    total_s = 0.0


async def measure_delay() -> None:
    Delay.total_s = 0.0
    loop = asyncio.get_running_loop()
    while True:
        begun_s = loop.time()
        await asyncio.sleep(0.05)
        Delay.total_s += loop.time() - begun_s - 0.05


async def until(condition: Callable[[], Awaitable[object]], message: str) -> None:
    end_s = asyncio.get_running_loop().time() + PATIENCE_S
    while not await condition():
        if asyncio.get_running_loop().time() > end_s:
            raise RuntimeError(message)
        await asyncio.sleep(0.1)


class Load:
    """Clients that chat one request after the other, half of them streamed. They can be paused."""

    def __init__(self, service: Service, books: Books, clients: int) -> None:
        self._service = service
        self._books = books
        self._go = asyncio.Event()
        self._numbers = iter(range(1 << 60))
        self._asking = 0
        self._clients: dict[int, Client] = {}  # connections that can be used again
        self._tasks = [asyncio.ensure_future(self._run(number)) for number in range(clients)]

    def resume(self) -> None:
        self._go.set()

    async def pause(self) -> None:
        """Begin no further request, and wait for those in progress."""
        self._go.clear()

        async def quiet() -> bool:
            return self._asking == 0

        await until(quiet, "requests are neither answered nor refused")

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for number in tuple(self._clients):
            self._close(number)

    def _close(self, number: int) -> None:
        if client := self._clients.pop(number, None):
            client.close()

    async def _run(self, number: int) -> None:
        while True:
            await self._go.wait()
            self._asking += 1
            try:
                await self._ask(number)
            finally:
                self._asking -= 1
            await asyncio.sleep(0.01)

    async def _ask(self, number: int) -> None:
        """Ask once; keep the connection if it can be used again."""
        name, stream = f"f-{next(self._numbers)}", number % 2 == 0
        key = self._service.keys[number % (len(self._service.keys) - 1)]
        try:
            if number not in self._clients:
                connected = await Client.connect(self._service.port)
                assert isinstance(connected, Client)
                self._clients[number] = connected
            status, _ = await self._clients[number].ask(chat(key, name, tokens=4, stream=stream), stream=stream)
        except LOST:
            self._books.broken += 1
        else:
            self._books.answered[name] = (status, asyncio.get_running_loop().time())
            if status in (200, 429):
                return
        self._close(number)
        await asyncio.sleep(0.05)


class FaultSoak:
    """Episodes of faults, one after the other. Each lasts some seconds; `calm` ends all of them."""

    def __init__(self, service: Service, books: Books, load: Load, finding: Finding, draw: random.Random) -> None:
        self.service, self.books, self.load, self.finding, self.draw = service, books, load, finding, draw
        self.played: Counter[str] = Counter()
        self.whole_life = True  # no gateway was killed since the start: the metrics are those of all requests
        self.before = (0, 0)
        self.stops_s: list[float] = []
        self.extra_keys = 0

    # --- Faults of volumes ---

    async def _during(self, *faults: Fault) -> None:
        """Keep faults for a while. Meanwhile both services must answer."""
        assert self.service.faults is not None
        with self.service.faults.during(*faults):
            await asyncio.sleep(self.draw.uniform(1, 4))
            for port, path in ((self.service.port, "/ping"), (self.service.port_health, "/")):
                if await self.service.get(path, port) != 200:
                    self.finding.lost.append(f"faults: {path} was not answered during {', '.join(map(str, faults))}")

    async def blocked_log(self) -> None:
        await self._during(Fault("write", "*/output.log", wait_s=inf))

    async def hanging_volume(self) -> None:
        await self._during(*(Fault(call, "*/data/*", wait_s=inf) for call in VOLUME))

    async def hanging_keys(self) -> None:
        await self._during(*(Fault(call, "*/api_keys.txt", wait_s=inf) for call in ("stat", "open")))

    async def hanging_state(self) -> None:
        await self._during(*(Fault(call, "*/state/*", wait_s=inf) for call in VOLUME))

    async def slow_volume(self) -> None:
        wait_s = self.draw.uniform(0.05, 1)
        await self._during(*(Fault(call, "*/data/*", wait_s=wait_s) for call in ("write", "stat", "fstat", "fsync")))

    async def full_disk(self) -> None:
        calls = ("write", "open", "truncate")
        await self._during(
            *(Fault(call, f"*/{name}/*", errno=errno.ENOSPC) for call in calls for name in ("data", "state"))
        )

    async def no_locks(self) -> None:
        await self._during(Fault("flock", errno=errno.ENOLCK), Fault("fcntl", "*/data/*", errno=errno.ENOLCK))

    async def failing_volume(self) -> None:
        await self._during(*(Fault(call, "*/data/*", errno=errno.EIO) for call in ("write", "fsync", "stat")))

    # --- Signals ---

    async def stopped_process(self) -> None:
        program = self.draw.choice(PROGRAMS)
        pid = self.service.pid(program)
        self.service.send(program, signal.SIGSTOP)
        await asyncio.sleep(self.draw.uniform(0.5, 3))
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def stray_signals(self) -> None:
        for _ in range(50):
            number = self.draw.choice((signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))
            self.service.send(self.draw.choice(PROGRAMS), number)
            await asyncio.sleep(0.01)

    async def rotation(self) -> None:
        with suppress(FileNotFoundError):
            path = self.service.folder / "data" / "access.log"
            path.rename(path.with_name(f"access.log.{self.draw.random()}"))
        self.service.send("supervisor.py", signal.SIGHUP)

    async def key_change(self) -> None:
        self.extra_keys += 1
        name = f"extra{self.extra_keys}"

        async def accepted() -> bool:
            return await self.service.get("/v1/models", key=name) in (200, 503)

        async def refused() -> bool:
            return await self.service.get("/v1/models", key=name) == 401

        self.service.write_keys(name)
        await until(accepted, "a new key is not accepted")
        self.service.write_keys()
        await until(refused, "a key that was removed is accepted")

    async def killed_gateway(self) -> None:
        self.whole_life = False
        at_s = asyncio.get_running_loop().time()
        self.service.send("gateway.py", signal.SIGKILL)
        self.books.excuse(at_s)

    async def killed_process(self) -> None:
        self.service.send(self.draw.choice(("health_server.py", "mock_backend.py")), signal.SIGKILL)

    async def killed_supervisor(self) -> None:
        at_s = asyncio.get_running_loop().time()
        self.service.send("supervisor.py", signal.SIGKILL)
        await self.service.process.wait()
        self.books.excuse(at_s)
        await self._restart()

    async def stop_under_fault(self) -> None:
        if self.service.faults is None:
            return
        at_s = asyncio.get_running_loop().time()
        with self.service.faults.during(
            *(Fault(call, f"*/{name}", wait_s=inf) for call in VOLUME for name in ("data/*", "output.log"))
        ):
            await asyncio.sleep(self.draw.uniform(0, 1))
            await self._stop()
        self.books.excuse(at_s)
        await self._restart()

    async def stop(self) -> None:
        await self._stop()
        await self._restart()

    # --- The whole ---

    async def _stop(self) -> None:
        took_s = await self.service.stop()
        self.stops_s.append(took_s)
        if self.service.process.returncode != 0:
            self.finding.lost.append(f"faults: start.sh ended with status {self.service.process.returncode}")
        if took_s > DRAIN_S + MARGIN_S:
            self.finding.missed.append(f"faults: a stop took {took_s:.1f} s (target {DRAIN_S + MARGIN_S:g} s)")

    async def _restart(self) -> None:
        """Start again without load, so that the metrics begin at a known number of lines."""
        await self.load.pause()
        await self.service.start()
        self.before = (len(self.service.access_lines()), await self.service.requests_of_ledger())
        self.whole_life = True
        self.load.resume()

    async def play(self, seconds: float) -> None:
        """Play episodes, each kind once before any comes twice, and compare all accounts after every few."""
        own = [self.stopped_process, self.stray_signals, self.rotation, self.key_change, self.killed_gateway]
        own += [self.killed_process, self.killed_supervisor, self.stop]
        volume = [self.blocked_log, self.hanging_volume, self.hanging_keys, self.hanging_state, self.slow_volume]
        volume += [self.full_disk, self.no_locks, self.failing_volume, self.stop_under_fault]
        kinds = [*own, *(volume if self.service.faults else [])]
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        await self._restart()
        due: list[Callable[[], Awaitable[None]]] = []
        while loop.time() < end_s:
            due = due or self.draw.sample(kinds, len(kinds))
            episode = due.pop()
            self.played[episode.__name__] += 1
            await episode()
            await until(self.service.is_ready, f"it is not ready again after {episode.__name__}")
            await asyncio.sleep(self.draw.uniform(0, 1))
            if sum(self.played.values()) % 5 == 0:
                await self.audit()
        await self.audit()
        await self.load.pause()
        await self._stop()

    async def audit(self) -> None:
        """Compare clients, access lines, metrics and ledger, without load."""
        await self.load.pause()
        problems: list[str] = []

        async def agree() -> bool:
            problems[:] = await self._problems()
            return not problems

        try:
            await until(agree, "")
        except RuntimeError:
            self.finding.lost += problems
        self.load.resume()

    async def _problems(self) -> list[str]:
        lines = self.service.access_lines()
        statuses = {line["id"]: line["status"] for line in lines}
        wanted = self.books.must_be_known()
        problems = [f"faults: {name} was answered, but has no access line" for name in wanted if name not in statuses]
        problems += [
            f"faults: {name} has status {statuses[name]}, its client got {status}"
            for name, status in wanted.items()
            if statuses.get(name, status) != status
        ]
        twice = [name for name, times in Counter(line["id"] for line in lines).items() if times > 1]
        problems += [f"faults: {name} has two access lines" for name in twice]
        if self.whole_life:
            own = len(lines) - self.before[0]
            metrics, ledger = await self.service.requests_of_metrics(), await self.service.requests_of_ledger()
            if not own == metrics == ledger - self.before[1]:
                counts = f"{own} access lines, {metrics} in the metrics, {ledger - self.before[1]} in the ledger"
                problems.append(f"faults: since the last start {counts}")
        return problems
