"""llama-server as a process, with a stub in its place: its phases, its output, and the reasons for its end."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from boot.backend_process import NAME, BackendProcess, setup_output_log
from boot.boot_log import BootLog
from boot.probes import Activity
from boot.processes import Child, Children
from config.loader import load_config
from support.boot import FOR_COVERAGE, PATIENCE_S, SUPPORT, waitpid_of_this_thread
from support.clock import HURRY, Clock
from support.hurry import HurriedLoop, HurriedSelector
from support.ports import free_port
from transport import write_batching
from transport.write_batching import WriteBatcher

KEY = "gateway-" + "k" * 43
BUSY = Activity(active=1, queued=0, backend_silent_s=9000, idle_s=0)


class Log(logging.Handler):
    """What is logged of llama-server, line by line; the test can wait for a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        self._news.set()

    async def until(self, line: str, times: int = 1) -> None:
        while self.lines.count(line) < times:
            self._news.clear()
            await self._news.wait()


class RecordingChildren(Children):
    """Children that remember the pipe of the last one. If they are `hasty`, it has ended when `spawn` returns."""

    pipe, hasty = "", False

    def spawn(self, *args: Any, output: int | None = None, **names: Any) -> Child:
        self.pipe = os.readlink(f"/proc/self/fd/{output}")
        child = super().spawn(*args, output=output, **names)
        if self.hasty:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            self.reap()
        return child


def open_files() -> list[str]:
    """Return what this process has open. Other tests run at the same time and open other files."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed in the meantime
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return links


class Case:
    """A BackendProcess over the stub. Orders are files that the stub looks for: see support.stub_llama.

    Its clock stands still unless the test advances it, so no slow response of the stub is a wedge.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        port = free_port()
        self.folder = folder
        self.key_file = folder / "key"
        self.key_file.write_text(KEY)
        given = {"DATA_DIR": str(folder), "PORT_BACKEND": str(port), "HEALTH_TIMEOUT": "60", **settings}
        self.config = load_config(given)
        self.activity: Activity | None = None
        self.clock = Clock()
        self.states: list[tuple[bool, bool]] = []
        self.log = Log()
        self._changed = asyncio.Event()
        self.children = RecordingChildren(lambda: None, waitpid_of_this_thread)
        self.boot_log = BootLog(folder / "logs", "box", datetime(2026, 1, 1, tzinfo=timezone.utc))
        self.backend = BackendProcess(
            self.config, self.children, self.boot_log, KEY, self._on_change, self._activity, self.clock
        )

    def _on_change(self) -> None:
        self.states.append((bool(self.backend.child and self.backend.child.alive), self.backend.ready))
        self._changed.set()

    async def _activity(self) -> Activity | None:
        return self.activity

    def order(self, name: str, content: str = "") -> None:
        (self.folder / name).write_text(content)

    async def run(self) -> str:
        argv = [sys.executable, str(SUPPORT / "stub_llama.py"), "--host", self.config.backend.host]
        argv += ["--port", str(self.config.backend.port), "--api-key-file", str(self.key_file)]
        return await self.backend.run(argv, {**FOR_COVERAGE, "STUB_DIR": str(self.folder), "PATH": os.environ["PATH"]})

    async def until_ready(self) -> None:
        while not self.backend.ready:
            self._changed.clear()
            await self._changed.wait()


def scenario(play: Callable[[Case], Awaitable[None]], folder: Path, **settings: str) -> Case:
    """Play a scenario in an event loop, with what is logged; no process is left."""
    logger = logging.getLogger()

    async def run() -> Case:
        case = Case(folder, **settings)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, case.children.reap)
        logger.addHandler(case.log)
        try:
            await asyncio.wait_for(play(case), PATIENCE_S * HURRY)
        finally:
            logger.removeHandler(case.log)
            case.children.kill_all()
            await case.children.sweep()
            loop.remove_signal_handler(signal.SIGCHLD)
            case.boot_log.close()
        return case

    return write_batching.run(run(), HurriedLoop(HurriedSelector(WriteBatcher())))


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_it_is_ready_once_health_is_200_and_not_after_its_end(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        running = asyncio.ensure_future(case.run())
        await case.until_ready()
        assert case.backend.child
        os.kill(case.backend.child.pid, signal.SIGKILL)
        assert (await running).startswith("was killed (SIGKILL) ")
        assert not case.backend.ready

    case = scenario(play, tmp_path)
    assert case.states == [(True, False), (True, True)]
    assert any(line.startswith("INFO llama-server is ready after ") for line in case.log.lines)


def test_an_end_while_it_loads_is_explained_from_its_last_lines(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.order("lines", "hello\nerror: invalid argument: --no")
        case.order("exit", "1")
        reason = await case.run()
        assert reason == "ended with exit status 1; it does not know the argument --no: check EXTRA_ARGS"

    case = scenario(play, tmp_path)
    assert case.states == [(True, False)]
    assert case.boot_log.path.read_text() == "hello\nerror: invalid argument: --no\n"


def test_a_program_that_cannot_be_executed_is_an_os_error(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        with pytest.raises(FileNotFoundError):
            await case.backend.run(["/none"], {})
        assert case.children.pipe.startswith("pipe:")
        assert case.children.pipe not in open_files()

    assert scenario(play, tmp_path).states == []


def test_a_load_that_takes_longer_than_its_limit_is_stopped(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.order("loading")
        case.order("talkative")
        running = asyncio.ensure_future(case.run())
        await case.log.until("INFO asked /health")
        case.clock.advance(0.2)
        assert await running == "did not load within 0.2 s (MODEL_LOAD_TIMEOUT)"
        assert case.backend.child
        assert not case.backend.child.alive

    scenario(play, tmp_path, MODEL_LOAD_TIMEOUT="0.2")


def test_health_that_does_not_answer_is_a_wedge(tmp_path: Path) -> None:
    fault = "is wedged: /health has not answered for 4 s (WEDGE_TIMEOUT)"

    async def play(case: Case) -> None:
        running = asyncio.ensure_future(case.run())
        await case.until_ready()
        case.order("deaf")
        case.order("talkative")
        await case.log.until("INFO asked /health")
        case.clock.advance(4.1)
        assert await running == fault

    case = scenario(play, tmp_path, WEDGE_TIMEOUT="4", HEALTH_TIMEOUT="2")
    assert f"ERROR llama-server {fault}: stopping it" in case.log.lines


def test_requests_without_a_byte_are_a_wedge_if_slots_does_not_answer(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        running = asyncio.ensure_future(case.run())
        await case.until_ready()
        case.activity = BUSY
        case.order("deaf_slots")
        case.clock.advance(4)  # only a longer silence of /health would be a sign
        assert await running == "is wedged: no byte for 4 s (WEDGE_TIMEOUT) and /slots does not answer"

    # With one thread, that it works alone says nothing: the other sign of a wedge cannot come first.
    scenario(play, tmp_path, WEDGE_TIMEOUT="4", HEALTH_TIMEOUT="2", THREADS="1")


def test_requests_without_a_byte_are_a_prefill_if_slots_answers(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.activity = BUSY
        case.order("talkative")
        running = asyncio.ensure_future(case.run())
        await case.until_ready()
        case.clock.advance(90)
        await case.log.until("INFO asked /slots", times=2)
        assert not running.done()
        running.cancel()

    scenario(play, tmp_path, WEDGE_TIMEOUT="90", THREADS="1")


def test_it_is_ready_only_if_a_protected_route_needs_the_key(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        running = asyncio.ensure_future(case.run())
        await case.log.until("INFO llama-server requires its key")
        running.cancel()

    assert scenario(play, tmp_path).states == [(True, False), (True, True)]


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ("open", "answers without its key: clients that reach its port bypass the gateway"),
        ("own_key", "refuses its own key"),
    ],
)
def test_it_is_stopped_if_it_does_not_check_the_key_or_has_another(tmp_path: Path, order: str, fault: str) -> None:
    async def play(case: Case) -> None:
        case.order(order)
        assert await case.run() == fault

    case = scenario(play, tmp_path)
    assert case.states == [(True, False)]
    assert f"ERROR llama-server {fault}: stopping it" in case.log.lines


def test_a_protected_route_that_does_not_respond_delays_readiness(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.order("deaf_slots")
        case.order("talkative")
        running = asyncio.ensure_future(case.run())
        await case.log.until("INFO asked /props", times=2)
        assert not case.backend.ready
        (case.folder / "deaf_slots").unlink()
        await case.until_ready()
        running.cancel()

    scenario(play, tmp_path, HEALTH_TIMEOUT="2")


def test_it_is_not_ready_while_another_process_has_its_port(tmp_path: Path) -> None:
    """The other one answers as llama-server does, and gets neither the key nor anything but probes of /health."""

    async def play(case: Case) -> None:
        heads: list[bytes] = []

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        case.order("unbound")
        server = await asyncio.start_server(impostor, "127.0.0.1", case.config.backend.port)
        running = asyncio.ensure_future(case.run())
        line = "ERROR another process listens at the address of llama-server (PORT_BACKEND, BACKEND_HOST)"
        await case.log.until(line)
        assert not case.backend.ready
        server.close()
        await server.wait_closed()
        (case.folder / "unbound").unlink()
        await case.until_ready()
        assert {head.split(b" ")[1] for head in heads} == {b"/health"}
        assert not any(KEY.encode() in head for head in heads)
        assert case.log.lines.count(line) == 1
        running.cancel()

    scenario(play, tmp_path)


def test_health_of_another_process_is_no_sign_of_life(tmp_path: Path) -> None:
    """llama-server has lost its port to one that answers: it is replaced, and the other one gets no key."""

    async def play(case: Case) -> None:
        heads: list[bytes] = []
        met = asyncio.Event()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.read(65536))
            met.set()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        running = asyncio.ensure_future(case.run())
        await case.until_ready()
        case.order("closed")
        while True:
            try:
                server = await asyncio.start_server(impostor, "127.0.0.1", case.config.backend.port)
                break
            except OSError:
                await asyncio.sleep(0.01)
        await met.wait()
        case.clock.advance(4.1)
        assert (await running).startswith("is wedged: /health has not answered for 4 s")
        assert heads == [b""] * len(heads)
        server.close()

    scenario(play, tmp_path, WEDGE_TIMEOUT="4", HEALTH_TIMEOUT="2")


def test_it_may_listen_at_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"

    async def play(case: Case) -> None:
        for _ in range(2):  # the second one finds the socket of the first
            running = asyncio.ensure_future(case.run())
            await case.until_ready()
            assert case.backend.child
            assert case.backend.listener == case.backend.child.pid
            os.kill(case.backend.child.pid, signal.SIGKILL)
            await running
            assert path.is_socket()

    scenario(play, tmp_path, BACKEND_HOST=str(path))


def test_its_lines_are_logged_with_their_own_levels(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.order("lines", "0.00.1 W slow\n0.00.2 E broken\n0.00.3 D detail\n\nplain")
        case.order("exit", "0")
        await case.run()
        assert case.log.lines[-3:] == ["WARNING 0.00.1 W slow", "ERROR 0.00.2 E broken", "INFO plain"]

    scenario(play, tmp_path)


def test_the_lines_of_a_process_that_ends_at_once_explain_its_end(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.children.hasty = True
        case.order("lines", "error while loading shared libraries: libcuda.so.1: cannot open shared object file")
        case.order("exit", "127")
        assert "libcuda.so.1" in await case.run()
        assert case.log.lines[-1].startswith("INFO error while loading")

    scenario(play, tmp_path)


def test_a_routers_lines_of_a_model_have_their_levels_and_explain_no_end_of_the_router(tmp_path: Path) -> None:
    async def play(case: Case) -> None:
        case.order("lines", "[51777] 0.00.1 E failed to load model, '/m.gguf'\n[  777] 0.00.2 W slow")
        case.order("exit", "1")
        assert await case.run() == "ended with exit status 1"
        levels = ["ERROR [51777] 0.00.1 E failed to load model, '/m.gguf'", "WARNING [  777] 0.00.2 W slow"]
        assert case.log.lines[-2:] == levels

    scenario(play, tmp_path)


def test_its_lines_are_printed_under_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    output_log = logging.getLogger(NAME)
    before = output_log.handlers[:], output_log.propagate
    try:
        setup_output_log("text")
        output_log.warning("a line")
    finally:
        output_log.handlers[:], output_log.propagate = before
    assert capsys.readouterr().out.endswith("Z WARNING llama-server: a line\n")
