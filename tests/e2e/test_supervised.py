"""The whole boot with a real llama-server, on a port and on a Unix socket: ready, crashed, and what is answered."""

import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from stack import ENDLESS, KEYS_FILE, SCRIPTS, TEAM_KEY, Process, bearer, eventually, fetch, free_port, running

RESTART_S = 20.0


class Service(Process):
    """start.sh's supervisor, with everything that it starts."""

    name = "supervisor"

    def __init__(self, folder: Path, binary: str, model: Path, **settings: str) -> None:
        super().__init__(folder, free_port())
        (folder / "keys.txt").write_text(KEYS_FILE)
        self.hold = folder / "hold"  # while it is there, llama-server does not start
        held = folder / "llama-server"
        held.write_text(f'#!/bin/sh\nwhile [ -e {self.hold} ]; do sleep 0.05; done\nexec {binary} "$@"\n')
        held.chmod(0o755)
        self.state_file = folder / "state.json"
        self.key = "gateway-" + secrets.token_urlsafe(32)
        self.settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "PORT_HEALTH": str(free_port()),
            "DATA_DIR": str(folder),
            "AUTH_KEYS_FILE": str(folder / "keys.txt"),
            "STATE_FILE": str(self.state_file),
            "BACKEND_API_KEY": self.key,
            "LLAMA_BIN": str(held),
            "MODEL_PATH": str(model),
            "PARALLEL": "2",
            "CTX": "2048",
            "EXTRA_ARGS": "--threads 1 --no-webui --context-shift",
        } | settings

    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPTS / "supervisor.py")]

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | self.settings

    @property
    def backend_pid(self) -> int | None:
        pid = json.loads(self.state_file.read_text())["backend_pid"]
        return None if pid is None else int(pid)

    def ask(self, path: str, body: object = None) -> tuple[int, bytes]:
        return fetch(self.url + path, TEAM_KEY, body)

    def crash(self) -> None:
        """Kill llama-server, and wait until the gateway has noticed. It starts again in `await_ready`."""
        self.hold.touch()
        pid = self.backend_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: fetch(self.url + "/health")[0], lambda status: status == 503, RESTART_S)

    def await_ready(self) -> None:
        self.hold.unlink(missing_ok=True)
        eventually(lambda: fetch(self.url + "/health")[0], lambda status: status == 200, RESTART_S)


@pytest.fixture(scope="module", params=["port", "socket"])
def service(
    request: pytest.FixtureRequest, llama_bin: str, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("boot")
    on_port = request.param == "port"
    address = {"PORT_BACKEND": str(free_port())} if on_port else {"BACKEND_HOST": str(folder / "b.sock")}
    yield from running(Service(folder, llama_bin, model, **address))


COMPLETION = {"prompt": "once upon", "max_tokens": 4}


def test_it_is_ready_and_serves(service: Service) -> None:
    status, body = service.ask("/v1/completions", COMPLETION)
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 4
    assert "llama-server requires its key" in service.log.read_text()


def test_its_version_is_logged(service: Service) -> None:
    output = service.log.read_text()
    assert "the version of llama-server cannot be read" in output or "supervisor: llama-server is b" in output


def test_after_a_crash_lists_of_models_come_from_memory_and_inference_waits(service: Service) -> None:
    lists = {path: service.ask(path) for path in ("/v1/models", "/models")}
    assert {status for status, _ in lists.values()} == {200}
    service.crash()
    for path, answer in lists.items():
        assert service.ask(path) == answer
    status, body = service.ask("/tokenize", {"content": "a"})
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    service.await_ready()
    assert service.ask("/tokenize", {"content": "a"})[0] == 200
    assert service.ask("/v1/completions", COMPLETION)[0] == 200


def test_the_slot_of_a_stream_whose_reader_leaves_is_free_again(service: Service) -> None:
    """On a Unix socket, too, llama-server sees that the gateway has closed the connection."""
    for _ in range(3):  # there are two slots
        begin_endless_stream_and_leave(service)
    assert service.ask("/v1/completions", COMPLETION)[0] == 200


def begin_endless_stream_and_leave(service: Service) -> None:
    connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
    body = json.dumps({"prompt": "a", "max_tokens": ENDLESS, "stream": True})
    connection.request("POST", "/v1/completions", body, bearer(TEAM_KEY) | {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.read(5) == b"data:"
    response.close()
    connection.close()
