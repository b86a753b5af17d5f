"""A boot as an operator's: start.sh or supervisor.py as a process, its lines, its children, its end."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
SCRIPTS = SUPPORT.parent.parent / "scripts"
NICE = [found] if (found := shutil.which("nice")) else []
PATIENCE_S = 30.0
FIRST_PORT, PORTS = 20000, 12000
FOR_COVERAGE = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}


def _ports() -> Iterator[int]:
    """Free ports below those that the kernel hands out by itself, so that nobody takes one before it is used."""
    first = os.getpid() * 101 % PORTS
    for number in itertools.count(first):
        port = FIRST_PORT + number % PORTS
        if _is_free(port):
            yield port


def _is_free(port: int) -> bool:
    with socket.socket() as sock, suppress(OSError):
        sock.bind(("127.0.0.1", port))
        return True
    return False


_PORTS = _ports()
_PORTS_LOCK = threading.Lock()


def free_ports(count: int) -> list[int]:
    with _PORTS_LOCK:
        return list(itertools.islice(_PORTS, count))


def program(path: Path, *argv: str) -> Path:
    """Write an executable that becomes another program, with its own arguments behind."""
    words = " ".join(f"'{word}'" for word in argv)
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def scripts_without(name: str, tmp_path: Path) -> Path:
    """Copy the scripts, all but one."""
    return shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__", name))


class Boot:
    """One boot, with a stub llama-server unless LLAMA_BIN or MOCK_BACKEND says otherwise. A context manager.

    With `stub_gateway` the gateway is one to order, too: support.stub_gateway.
    The parent test's environment does not leak in, but for the PATH and, where `covered`, what coverage needs: it makes
    each of the processes start much later.
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
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
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
        self._argv = [*NICE, *before, *self._argv, *after]  # other tests run meanwhile, and come first
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
        # Asked twice it ends at once, in order; what does not, dies, and its children with it.
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), "somebody who should be gone still holds the output"
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

    # What happens

    def await_line(self, pattern: str, times: int = 1) -> None:
        """Wait until a pattern has come so often; a line of output is an event, so nothing is polled."""

        def come() -> bool:
            return sum(bool(re.search(pattern, line)) for line in self.lines) >= times or not self._reader.is_alive()

        with self._news:
            self._news.wait_for(come, PATIENCE_S)
        assert sum(bool(re.search(pattern, line)) for line in self.lines) >= times, f"no {pattern!r} in:\n{self.output}"

    def await_ready(self, times: int = 1) -> None:
        self.await_line("state ready", times)

    def end(self) -> int:
        """Wait for the end; return the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.end()

    # What there is

    @property
    def state(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return told

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
        """The pids of all its descendants."""
        return descendants(self.process.pid)

    def status(self, path: str, *, port: str = "PORT", key: str = "") -> int | None:
        """GET a path; None where nobody answers."""
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
        mine = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return mine + [deeper for child in mine for deeper in descendants(child)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """A zombie that nobody has collected yet counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
