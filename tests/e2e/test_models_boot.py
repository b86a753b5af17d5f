"""The boot of a real llama-server as a router of tiny models: ready, wrong, wedged and dead models, and its end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path

import pytest
from stack import ENDLESS, KEYS_FILE, SCRIPTS, STOP_S, Process, bearer, eventually, fetch, free_port, running

from boot.router_watch import pids_by_port
from support.boot import alive, descendants

SOON_S = 30.0


class Service(Process):
    """start.sh's supervisor over a folder of models: `chat`, `embed` (a split-like folder) and `broken`."""

    name = "supervisor"

    def __init__(self, folder: Path, binary: str, model: Path, **settings: str) -> None:
        super().__init__(folder, free_port())
        (folder / "keys.txt").write_text(KEYS_FILE)
        self.folder = folder
        self.state_file = folder / "state.json"
        self.key = "gateway-" + "k" * 43
        self.backend = f"http://127.0.0.1:{free_port()}"
        make_models(folder / "models", model)
        self.settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "PORT_HEALTH": str(free_port()),
            "PORT_BACKEND": self.backend.rpartition(":")[2],
            "DATA_DIR": str(folder),
            "AUTH_KEYS_FILE": str(folder / "keys.txt"),
            "STATE_FILE": str(self.state_file),
            "BACKEND_API_KEY": self.key,
            "LLAMA_BIN": binary,
            "MODELS": "router",
            "MODELS_MAX": "2",
            "PARALLEL": "2",
            "CTX": "2048",
            "EXTRA_ARGS": "--threads 1 --no-webui --context-shift",
        } | settings

    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPTS / "supervisor.py")]

    def environment(self) -> dict[str, str]:
        # Variables of llama-server must not reach it, nor its children.
        scrubbed = {"LLAMA_ARG_CTX_SIZE": "64", "LLAMA_ARG_MODELS_AUTOLOAD": "1"}
        return {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | scrubbed | self.settings

    @property
    def state(self) -> dict[str, object]:
        state: dict[str, object] = json.loads(self.state_file.read_text())
        return state

    @property
    def router_pid(self) -> int:
        pid = self.state["backend_pid"]
        assert isinstance(pid, int)
        return pid

    def models(self) -> Mapping[str, str]:
        status, body = fetch(f"{self.backend}/models", self.key)
        assert status == 200, body
        return {row["id"]: row["status"]["value"] for row in json.loads(body)["data"]}

    def pid_of(self, name: str) -> int:
        """Return the pid of a model's process."""
        rows = json.loads(fetch(f"{self.backend}/models", self.key)[1])["data"]
        (arguments,) = [row["status"]["args"] for row in rows if row["id"] == name]
        port = int(arguments[arguments.index("--port") + 1])
        return eventually(lambda: pids_by_port(self.router_pid), lambda pids: port in pids, SOON_S)[port]

    def load(self, name: str) -> None:
        assert fetch(f"{self.backend}/models/load", self.key, {"model": name})[0] == 200

    def complete(self, name: str) -> int:
        body = {"model": name, "prompt": "once", "max_tokens": 4}
        return fetch(f"{self.backend}/v1/completions", self.key, body)[0]

    def decoded(self, name: str) -> int:
        """Return how many tokens the slots of a model have generated for what they work on now."""
        slots = json.loads(fetch(f"{self.backend}/slots?model={name}", self.key)[1])
        return sum(slot["next_token"][0]["n_decoded"] for slot in slots if slot["is_processing"])

    def stream(self, name: str, tokens: int) -> HTTPConnection:
        """Begin a stream at llama-server; the first bytes of its answer have arrived."""
        connection = HTTPConnection("127.0.0.1", int(self.backend.rpartition(":")[2]), timeout=60)
        body = json.dumps({"model": name, "prompt": "a", "max_tokens": tokens, "stream": True, "ignore_eos": True})
        fields = bearer(self.key) | {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, fields)
        return connection


def make_models(folder: Path, model: Path) -> None:
    (folder / "embed").mkdir(parents=True)
    shutil.copy(model, folder / "chat.gguf")
    shutil.copy(model, folder / "third.gguf")
    shutil.copy(model, folder / "embed" / "any-name.gguf")
    (folder / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)


@pytest.fixture(scope="module")
def service(llama_bin: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("models")
    yield from running(Service(folder, llama_bin, model, MODELS_PRELOAD="chat,broken", WEDGE_TIMEOUT="8"))


def test_it_is_ready_once_what_can_be_preloaded_is_loaded(service: Service) -> None:
    assert service.models() == {"broken": "unloaded", "chat": "loaded", "embed": "unloaded", "third": "unloaded"}
    assert service.complete("chat") == 200
    assert service.complete("embed") == 400  # no request loads a model by accident
    assert service.state["state"] == "ready"
    assert "the model broken ended with exit status 1; bad model: " in str(service.state["detail"])
    failures = service.state["model_failures"]
    assert isinstance(failures, dict)
    assert list(failures) == ["broken"]


def test_who_asks_for_a_model_that_cannot_be_loaded_is_told_why_in_llama_servers_words(service: Service) -> None:
    body = {"model": "broken", "prompt": "once", "max_tokens": 4}
    status, page = fetch(f"http://127.0.0.1:{service.port}/v1/completions", "sk-e2e-team-0123456789abcdef", body)
    error = json.loads(page)["error"]
    assert (status, error["code"]) == (502, "model_load_failed")
    assert "could not be loaded: it ended with exit status 1; bad model: " in error["message"]
    assert "failed to read header" in error["message"]
    assert str(service.folder) not in error["message"]


def test_a_child_has_our_key_our_stack_and_our_settings_and_no_others(service: Service) -> None:
    pid = service.pid_of("chat")
    port = next(port for port, other in pids_by_port(service.router_pid).items() if other == pid)
    assert [fetch(f"http://127.0.0.1:{port}/props", key)[0] for key in (None, "wrong", service.key)] == [401, 401, 200]
    props = json.loads(fetch(f"{service.backend}/props?model=chat", service.key)[1])
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, 1024)
    (stack,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max stack")]
    assert int(stack.split()[3]) > 64 << 20
    assert b"LLAMA_ARG_" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_model_that_is_killed_ends_alone(service: Service) -> None:
    service.load("embed")
    eventually(service.models, lambda models: models["embed"] == "loaded", SOON_S)
    router, connection = service.router_pid, service.stream("chat", ENDLESS)
    response = connection.getresponse()
    assert response.read(5) == b"data:"
    os.kill(service.pid_of("embed"), signal.SIGKILL)
    eventually(service.models, lambda models: models["embed"] == "unloaded", SOON_S)
    before = service.decoded("chat")
    eventually(lambda: service.decoded("chat"), lambda tokens: tokens > before, SOON_S)
    connection.close()
    eventually(lambda: service.state["model_failures"], lambda failures: "embed" in str(failures), SOON_S)
    assert (service.state["state"], service.router_pid) == ("ready", router)
    service.load("embed")
    eventually(service.models, lambda models: models["embed"] == "loaded", SOON_S)
    eventually(lambda: service.state["model_failures"], lambda failures: "embed" not in str(failures), SOON_S)
    assert service.complete("embed") == 200


def test_a_wedged_model_is_ended_alone(service: Service) -> None:
    """It is stopped while the gateway has a request for it. The other model goes on."""
    eventually(service.models, lambda models: models["embed"] == "loaded", SOON_S)
    router, pid = service.router_pid, service.pid_of("embed")
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    body = json.dumps({"model": "embed", "prompt": "a", "max_tokens": ENDLESS, "stream": True, "ignore_eos": True})
    fields = bearer("sk-e2e-team-0123456789abcdef") | {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, fields)
    assert connection.getresponse().read(5) == b"data:"
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: alive(pid), lambda runs: not runs, 60.0)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        connection.close()
    eventually(service.log.read_text, lambda text: "the model embed is wedged: " in text, SOON_S)
    assert service.router_pid == router
    assert service.complete("chat") == 200
    # The state's detail has it too, until the model is loaded again.
    eventually(service.log.read_text, lambda text: "the model embed was wedged: " in text, SOON_S)


def test_its_end_leaves_no_process(llama_bin: str, model: Path, tmp_path: Path) -> None:
    server = Service(tmp_path, llama_bin, model, MODELS_PRELOAD="chat,third")
    server.start()
    assert server.process
    pids = [server.process.pid, *descendants(server.process.pid), server.pid_of("chat"), server.pid_of("third")]
    assert server.end(signal.SIGTERM) == 0
    eventually(lambda: [pid for pid in pids if alive(pid)], lambda left: not left, STOP_S)


def test_not_even_a_killed_supervisor_leaves_a_model(llama_bin: str, model: Path, tmp_path: Path) -> None:
    server = Service(tmp_path, llama_bin, model, MODELS_PRELOAD="chat")
    server.start()
    assert server.process
    pids = [*descendants(server.process.pid), server.pid_of("chat")]
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: [pid for pid in pids if alive(pid)], lambda left: not left, STOP_S)


def test_it_stops_when_idle(llama_bin: str, model: Path, tmp_path: Path) -> None:
    server = Service(tmp_path, llama_bin, model, MODELS_PRELOAD="chat", IDLE_STOP_SECONDS="1")
    done = finished(server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(IDLE_STOP_SECONDS): stopping everything" in done.stdout + done.stderr


def finished(server: Service) -> "subprocess.CompletedProcess[str]":
    """Return the end of a service that ends by itself."""
    return subprocess.run(
        server.command(), env=server.environment(), capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("preset", "status", "message"),
    [
        ("[chat]\nmodel = /none.gguf\n", 3, "MODELS_PRESET: the model chat: /none.gguf does not exist"),
        ("[chat]\nmodel = {model}\n[chat]\nmodel = {model}\n", 3, "line 3: [chat] is there twice"),
        ("[chat]\nmodel = {model}\nnonsense = 1\n", 2, "it cannot use the models: option 'nonsense' not recognized"),
    ],
)
def test_a_wrong_preset_ends_the_start(
    preset: str, status: int, message: str, llama_bin: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "models.ini").write_text(preset.format(model=model))
    server = Service(tmp_path, llama_bin, model, MODELS_PRESET=str(tmp_path / "models.ini"), MAX_RESTARTS="0")
    done = finished(server)
    assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr


def test_a_preset_names_models_and_their_arguments(llama_bin: str, model: Path, tmp_path: Path) -> None:
    embed = "embeddings = 1\npooling = mean\nload-on-startup = 1\n"
    text = f"[*]\nparallel = 1\n[chat]\nmodel = {model}\nctx-size = 512\n[embed]\nmodel = {model}\n{embed}"
    (tmp_path / "models.ini").write_text(text)
    unset = {"MODELS_DIR": "", "PARALLEL": "", "CTX": ""}
    preset = {"MODELS_PRESET": str(tmp_path / "models.ini"), "MODELS_PRELOAD": "chat"}
    for server in running(Service(tmp_path, llama_bin, model, **unset, **preset)):
        eventually(server.models, lambda models: models == {"chat": "loaded", "embed": "loaded"}, SOON_S)
        props = json.loads(fetch(f"{server.backend}/props?model=chat", server.key)[1])
        assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (1, 512)
        body = {"model": "embed", "input": "x"}
        assert fetch(f"{server.backend}/v1/embeddings", server.key, body)[0] == 200
