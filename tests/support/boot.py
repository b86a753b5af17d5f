"""A boot as an operator runs it: start.sh or supervisor.py as a process, its output, its children, its end."""

import inspect
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from support.ports import free_ports
from support.together import ENVIRON

SUPPORT = Path(__file__).parent
SCRIPTS = SUPPORT.parent.parent / "scripts"
# Tests in the foreground have priority, but beside other programs boots must go on, too.
NICE = [found, "-n", "5"] if (found := shutil.which("nice")) else []
PATIENCE_S = 300.0  # after which a test of processes gives up; far more than it needs, for machines under load
# Linux: leave the children of other threads alone, since those threads wait for them themselves.
WNOTHREAD = 0x20000000 if sys.platform.startswith("linux") else 0
FOR_COVERAGE = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}


def waitpid_of_this_thread(pid: int, options: int) -> tuple[int, int]:
    """Like os.waitpid. Boots run in other threads at the same time, and their exits must not be collected here."""
    return os.waitpid(pid, options | WNOTHREAD)


def program(path: Path, *argv: str) -> Path:
    """Write an executable that execs another program, with its own arguments appended."""
    command = " ".join(f"'{argument}'" for argument in argv)
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Boot:
    """One boot, with a stub llama-server unless LLAMA_BIN or MOCK_BACKEND is set. A context manager.

    `stub_gateway` replaces the gateway, too: see support.stub_gateway. `orders` are files for the stubs. Of the test's
    own environment only the PATH is passed on, and with `covered` the variables for coverage, which slows each process
    start down.
    """

    def __init__(
        self,
        tmp_path: Path,
        settings: Mapping[str, str] | None = None,
        *,
        scripts: Path = SCRIPTS,
        by_shell: bool = False,
        stub_gateway: bool = False,
        covered: bool = True,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        orders: Mapping[str, str] | Sequence[str] = (),
    ) -> None:
        self.folder = tmp_path
        self.control = tmp_path / "control"
        self.control.mkdir(exist_ok=True)
        for name in orders:
            (self.control / name).write_text(orders[name] if isinstance(orders, Mapping) else "")
        port, port_health, port_backend = free_ports(3)
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:{ENVIRON['PATH']}",
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "PORT_HEALTH": str(port_health),
            "PORT_BACKEND": str(port_backend),
            "DATA_DIR": str(tmp_path / "data"),
            "STATE_FILE": str(tmp_path / "state.json"),
            "STUB_DIR": str(self.control),
            "LLAMA_BIN": str(program(tmp_path / "stub-llama", sys.executable, str(SUPPORT / "stub_llama.py"))),
            **(FOR_COVERAGE if covered else {}),
            **({"PYTHONPATH": str(SUPPORT / "stand_in")} if stub_gateway else {}),
            **(settings or {}),
        }
        self.env = {name: value for name, value in self.env.items() if value != UNSET}
        self._scripts = scripts
        self._argv = [str(scripts / "start.sh")] if by_shell else [sys.executable, str(scripts / "supervisor.py")]
        self._argv = [*NICE, *before, *self._argv, *after]
        self.lines: list[str] = []
        self._news = threading.Condition()

    def __enter__(self) -> "Boot":
        self.process = subprocess.Popen(
            self._argv,
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        # At the second SIGTERM it ends at once, in order. If it does not, it is killed, and its children die with it.
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), "a process that should have ended still holds the output"
        assert self.process.stdout
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    # Events

    def await_line(self, pattern: str, times: int = 1) -> None:
        """Wait until so many lines match a pattern. A line of output is an event, so nothing is polled."""

        def arrived() -> bool:
            return sum(bool(re.search(pattern, line)) for line in self.lines) >= times or not self._reader.is_alive()

        with self._news:
            self._news.wait_for(arrived, PATIENCE_S)
        assert sum(bool(re.search(pattern, line)) for line in self.lines) >= times, f"no {pattern!r} in:\n{self.output}"

    def until(self, condition: Callable[[], object], pause_s: float = 0.01) -> None:
        """Wait for what no line tells. Asserts that it becomes true while the boot runs."""
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up_s, f"never: {inspect.getsource(condition)}"
            time.sleep(pause_s)

    def await_ready(self, times: int = 1) -> None:
        self.await_line("state ready", times)

    def end(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.end()

    # Properties

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.control / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def order(self, *names: str) -> None:
        for name in names:
            (self.control / name).touch()

    def unorder(self, name: str) -> None:
        (self.control / name).unlink()

    @property
    def key_file(self) -> Path:
        argv = self.starts[0]["argv"]
        return Path(argv[argv.index("--api-key-file") + 1])

    def pid_of(self, script: str) -> int:
        (pid,) = [pid for pid in self.family() if script in command_line(pid)]
        return pid

    def family(self) -> list[int]:
        """Return the pids of all its descendants."""
        return descendants(self.process.pid)

    def status(self, path: str, *, port: str = "PORT", key: str = "") -> int | None:
        """GET a path and return the status; None if there is no response."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return ask(self.env["HOST"], int(self.env[port]), path, headers)


UNSET = "(unset)"


def ask(host: str, port: int, path: str, headers: Mapping[str, str] | None = None) -> int | None:
    connection = HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def descendants(pid: int) -> list[int]:
    try:
        children = [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in descendants(child)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def signal_is_default(pid: int, number: int) -> bool:
    """Return whether a process would take a signal's default action: it runs, and neither ignores nor handles it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = re.findall(r"^Sig(?:Ign|Cgt):\t([0-9a-f]+)$", status, re.MULTILINE)
    return not any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
