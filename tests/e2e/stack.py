"""A real llama-server, the gateway in front of it, and ways to watch both, for the end-to-end tests."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from support.ports import free_port

Value = TypeVar("Value")

HERE = Path(__file__).parent
SCRIPTS = HERE.parent.parent / "scripts"
START_S = 60.0
STOP_S = 15.0
SLOT_FREE_S = 20.0  # for a slot to be free after its client has left: it takes 1 to 2.5 s on an idle machine
TEAM_KEY = "sk-e2e-team-0123456789abcdef"
OPERATOR_KEY = "sk-e2e-operator-0123456789abcdef"
KEYS_FILE = f"team:{TEAM_KEY}:1000000\nops:{OPERATOR_KEY}:1000000 role=operator\n"
ENDLESS = 1_000_000  # max_tokens of a response that only the client ends


def eventually(
    read: Callable[[], Value], wanted: Callable[[Value], bool], within_s: float, every_s: float = 0.02
) -> Value:
    """Read until the value is as wanted; return it. Raises AssertionError with the last value if it never is."""
    deadline_s = time.monotonic() + within_s
    while True:
        value = read()
        if wanted(value):
            return value
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise AssertionError(f"still {value!r} after {within_s} s")
        time.sleep(min(every_s, left_s))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def fetch(url: str, key: str | None = None, body: object = None) -> tuple[int, bytes]:
    """Send one request on a new connection; return status and body, (0, b"") without a response."""
    headers = {"Content-Type": "application/json"} | (bearer(key) if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code), error.read()
    except OSError:
        return 0, b""


class Process:
    """A server on a loopback port, with its output in a file."""

    name = "process"

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{self.name}-{port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        eventually(self.is_ready, bool, START_S)

    def is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}")
        return fetch(f"{self.url}/health")[0] == 200

    def end(self, signal_number: int) -> int:
        """Send the signal; return the exit status. Kills the process if it does not end."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)
            raise
        finally:
            self.process = None


class LlamaServer(Process):
    """llama-server with the tiny model. Context shift is on, so that a response ends at max_tokens and not before."""

    name = "llama-server"
    slot_context = 1024  # tokens of a slot

    def __init__(self, folder: Path, binary: str, model: Path, slots: int, page: Path | None = None) -> None:
        """`page` is the folder of its page; it has none without."""
        super().__init__(folder, free_port())
        self.page = page
        self.binary, self.model, self.slot_count = binary, model, slots
        self.key = "gateway-" + secrets.token_urlsafe(32)
        self.key_file = folder / f"backend-key-{self.port}"
        self.key_file.write_text(self.key + "\n")

    def command(self) -> list[str]:
        context = self.slot_count * self.slot_context
        options = f"--host 127.0.0.1 --port {self.port} --parallel {self.slot_count} --ctx-size {context}"
        flags = "--alias tiny --metrics --slots --embeddings --pooling mean --context-shift --threads 1"
        page = ["--no-webui"] if self.page is None else ["--path", str(self.page)]
        files = ["-m", str(self.model), "--api-key-file", str(self.key_file), *page]
        return [self.binary, *files, *f"{options} {flags}".split()]

    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_ARG_", "AIP_"))}

    def busy(self) -> int:
        """Return how many slots are busy now."""
        status, body = fetch(f"{self.url}/slots", self.key)
        assert status == 200, body
        return sum(slot["is_processing"] for slot in json.loads(body))

    def all_free(self, within_s: float = SLOT_FREE_S, *, every_s: float = 1.1) -> None:
        """Wait until no slot is busy. Polls less than once per second.

        llama-server notices that the client of a response that is not streamed has left only after a second in which it
        produced no result, and each response to GET /slots is a result: polled faster, the slot would stay busy. The
        gateway polls too, so a test that watches it must look at the end only.
        """
        eventually(self.busy, lambda busy: busy == 0, within_s, every_s=every_s)

    def counters(self) -> dict[str, float]:
        """Return llama-server's own metrics, without their prefix."""
        _, body = fetch(f"{self.url}/metrics", self.key)
        lines = [line for line in body.decode().splitlines() if line.startswith("llamacpp:")]
        return {name.removeprefix("llamacpp:"): float(value) for name, value in map(str.split, lines)}


class RouterServer(LlamaServer):
    """llama-server as a router of all models in a folder, `most` of them loaded at once.

    With `autoload` it loads a model for each request itself, as it does without a gateway.
    """

    name = "llama-router"

    def __init__(
        self, folder: Path, binary: str, models: Path, slots: int, *, most: int, autoload: bool = False
    ) -> None:
        super().__init__(folder, binary, models, slots)
        self.most, self.autoload = most, autoload

    def command(self) -> list[str]:
        binary, _, models, *options = super().command()
        options[options.index("--alias") : options.index("--alias") + 2] = []
        more = ["--models-max", str(self.most), *([] if self.autoload else ["--no-models-autoload"])]
        return [binary, "--models-dir", models, *options, *more]

    def loads(self) -> int:
        """Return how many models were loaded since the start."""
        return self.log.read_text(errors="replace").count("spawning server instance with name=")

    def child_of(self, model: str) -> int:
        """Return the process id of a model that is loaded."""
        assert self.process is not None
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                arguments = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if model.encode() in arguments:
                    return int(child)
        raise AssertionError(f"no process of {model}")


class Gateway(Process):
    """scripts/gateway.py in front of a LlamaServer, with a keys file of two keys."""

    name = "gateway"

    def __init__(self, folder: Path, backend: LlamaServer, **settings: str) -> None:
        super().__init__(folder, free_port())
        keys_file = folder / f"keys-{self.port}.txt"
        keys_file.write_text(KEYS_FILE)
        self.access_log = folder / f"access-{self.port}.log"
        self.settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "PORT_BACKEND": str(backend.port),
            "BACKEND_API_KEY": backend.key,
            "DATA_DIR": str(folder),
            "AUTH_KEYS_FILE": str(keys_file),
            "USAGE_FILE": str(folder / f"usage-{self.port}.db"),
            "ACCESS_LOG": str(self.access_log),
            "METRICS_AUTH_ENABLED": "false",
        } | settings

    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPTS / "gateway.py")]

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | self.settings


def running(server: Process) -> Iterator[Any]:
    """Start the server, yield it, and stop it. Asserts that it ends in order."""
    server.start()
    try:
        yield server
    finally:
        status = server.end(signal.SIGTERM)
    output = server.log.read_text()
    assert status == 0, f"{server.name} ended with {status}:\n{output[-4000:]}"
    assert "Traceback" not in output, output[-4000:]
