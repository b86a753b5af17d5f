"""The supervisor with real processes: what it starts, in which order it stops, what it logs, what is left.

The scenarios mostly wait, so several run at once. Each is a test of its own.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from boot.run_dir import RunDir
from boot.service_manager import VARIABLES
from core import signals
from support.boot import PATIENCE_S, UNSET, Boot, alive, command_line, signal_is_default
from support.together import ENVIRON, aside

GGUF = b"GGUF" + bytes(1000)
ACTIVITY = {"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0}
# Each sign of a wedge has its own scenarios, in which the others cannot come first. The stub has HEALTH_TIMEOUT to
# answer, also under load; and if llama-server computes in one thread, that it works alone says nothing.
WEDGE = {"WEDGE_TIMEOUT": "4", "HEALTH_TIMEOUT": "3", "THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """A scenario's folder, and the setting that names a model: one that llama-server fetches itself, or a file."""

    folder: Path
    model: dict[str, str]
    model_file: dict[str, str]


Scenario = Callable[[Place], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def scenario_of(*cases: tuple[object, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a scenario for each case, whose values are the function's further arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for case in cases:
            SCENARIOS[f"{function.__name__}: {case[0]} {len(SCENARIOS)}"] = partial(_call, function, case)
        return function

    return register


def _call(function: Callable[..., None], case: tuple[object, ...], place: Place) -> None:
    function(place, *case)


def set_activity(boot: Boot, **activity: float) -> None:
    """Set what the stub gateway reports."""
    new = boot.control / "new.json"
    new.write_text(json.dumps({**ACTIVITY, **activity}))
    new.replace(boot.control / "health.json")


def environ_of(pid: int) -> bytes:
    """The environment of a process; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def sockets_of(pid: int) -> list[str]:
    return [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]


def assert_nothing_left(boot: Boot, pids: list[int]) -> None:
    assert [command_line(pid) for pid in pids if alive(pid)] == []
    assert not (boot.folder / "state.json").exists()
    if boot.starts:
        assert not boot.key_file.parent.exists()


# The order of the start


@scenario
def probes_are_answered_while_the_model_loads_and_while_it_is_started_again(place: Place) -> None:
    with Boot(place.folder, place.model, orders=["unbound"]) as boot:
        boot.await_line("llama-server started")
        boot.await_line("INFO supervisor: GPU: ")
        boot.await_line("health: listening")
        boot.await_line("gateway: .* listens on")
        assert boot.status("/ready", port="PORT_HEALTH") == 204
        assert boot.status("/", port="PORT_HEALTH") == 200
        assert boot.status("/ping") == 200
        assert boot.status("/health") == 503
        boot.unorder("unbound")
        boot.await_ready()
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        (boot.control / "exit").write_text("1")  # a second pause comes if the first is too short to be seen
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("state dead")
        boot.until(lambda: boot.status("/ready", port="PORT_HEALTH") == 503)
        boot.unorder("exit")
        assert boot.status("/", port="PORT_HEALTH") == 200
        boot.await_line("starting it again in 1 s")
        boot.await_ready(2)
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert len(boot.starts) >= 2


@scenario
def llama_server_gets_the_port_that_replaces_a_default_in_use_and_json_logs_are_json_line_by_line(place: Place) -> None:
    settings = {**place.model_file, "PORT_BACKEND": UNSET, "LOG_FORMAT": "json"}
    lines = '{"a": 1}\n\x1b[31mred\x1b[0m\nnot \\ json "'
    with ExitStack() as held:
        with suppress(OSError):  # the port may be in use by a program of this machine: that is the same case
            held.enter_context(socket.create_server(("127.0.0.1", 8080)))
        with Boot(place.folder, settings, orders={"lines": lines}) as boot:
            boot.await_ready()
            assert boot.stop() == 0
    logged = [json.loads(line) for line in boot.lines]
    assert {line["process"] for line in logged} >= {"supervisor", "llama-server", "gateway", "health"}
    messages = {line["msg"] for line in logged}
    assert {"\x1b[31mred\x1b[0m", '{"a": 1}'} <= messages
    argv = boot.starts[0]["argv"]
    port = argv[argv.index("--port") + 1]
    assert f"PORT_BACKEND is not set, and its default 8080 is taken: it is {port}" in messages


def router_of(place: Place, **settings: str) -> dict[str, str]:
    """Make a folder of models, one of them broken; return the settings of the mock as a router over it."""
    folder = place.folder / "models"
    folder.mkdir()
    for name in ("chat", "embed", "broken"):
        (folder / f"{name}.gguf").write_bytes(b"nonsense" if name == "broken" else GGUF)
    return {"MOCK_BACKEND": "true", "MODELS": "router", "MODELS_DIR": str(folder), "MODELS_MAX": "3", **settings}


@scenario
def a_router_is_ready_once_its_models_are_loaded_or_have_failed(place: Place) -> None:
    with Boot(place.folder, router_of(place, MODELS_PRELOAD="broken,embed")) as boot:
        boot.await_line(r"state loading: the model broken is loading \(1 of 2\)")
        boot.await_line(r"state loading: the model embed is loading \(2 of 2\)")
        boot.await_line("the model embed is loaded after ")
        boot.await_line("state ready: serving; the model broken ended with exit status 1")
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert list(boot.state["model_failures"]) == ["broken"]
        assert boot.stop() == 0


@scenario
def a_router_is_not_ready_while_a_model_loads(place: Place) -> None:
    settings = router_of(place, MODELS_PRELOAD="chat", MOCK_LOAD_SECONDS="600")
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_line("the model chat is loading")
        assert boot.status("/ready", port="PORT_HEALTH") == 204
        assert boot.state["backend_listener"] is None
        assert boot.stop() == 0


@scenario
def a_router_with_a_wrong_preset_is_not_started(place: Place) -> None:
    preset = place.folder / "models.ini"
    preset.write_text("[chat]\nmodel = /none.gguf\n")
    with Boot(place.folder, {"MODELS": "router", "MODELS_PRESET": str(preset)}, stub_gateway=True) as boot:
        assert boot.end() == 3
    assert "error: MODELS_PRESET: the model chat: /none.gguf does not exist" in boot.output
    assert boot.starts == []


@scenario
def probes_are_answered_while_the_model_is_fetched(place: Place) -> None:
    # The kernel accepts the connection into the backlog, and no response comes.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/m.gguf"
        with Boot(place.folder, {"MODEL_URL": url}, stub_gateway=True) as boot:
            boot.await_line("fetching http")
            boot.await_line("health: listening")
            assert boot.status("/ready", port="PORT_HEALTH") == 204
            # It is written in a thread.
            boot.until(lambda: boot.state["detail"] == "finding or fetching the model")
            pids = boot.family()
            assert boot.stop() == 0
            assert_nothing_left(boot, pids)


@scenario
def a_load_is_limited_by_model_load_timeout(place: Place) -> None:
    settings = {**place.model, "MODEL_LOAD_TIMEOUT": "0.3", "MAX_RESTARTS": "0"}
    with Boot(place.folder, settings, stub_gateway=True, orders=["loading"]) as boot:
        assert boot.end() == 4
        assert "did not load within 0.3 s (MODEL_LOAD_TIMEOUT)" in boot.output
        assert_nothing_left(boot, [])


# The service manager

SYSTEMD = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def received_until(manager: socket.socket, last: bytes) -> list[bytes]:
    received: list[bytes] = []
    while last not in received:
        received.append(manager.recv(1000))
    return received


@scenario
def systemd_gets_reports_and_opens_the_port(place: Place) -> None:
    settings = {**place.model, "NOTIFY_SOCKET": str(place.folder / "notify"), "WATCHDOG_USEC": "200000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(settings["NOTIFY_SOCKET"])
        manager.settimeout(PATIENCE_S)
        with Boot(place.folder, settings, before=[sys.executable, "-c", SYSTEMD]) as boot:
            received = received_until(manager, b"STATUS=ready: serving")
            assert {b"READY=1", b"WATCHDOG=1", b"STATUS=loading: starting"} <= set(received)
            assert not boot.starts[0]["environ"].keys() & VARIABLES
            os.kill(boot.pid_of("gateway.py"), signal.SIGKILL)
            assert boot.status("/ping") == 200  # the port stays open, and the connection waits for the next gateway
            received_until(manager, b"WATCHDOG=1")
            boot.signal(signal.SIGTERM)
            assert received_until(manager, b"STOPPING=1")
            assert boot.end() == 0


@scenario
def a_socket_of_another_port_is_an_error(place: Place) -> None:
    (place.folder / "systemd.py").write_text(SYSTEMD.replace('int(os.environ["PORT"])', "0"))
    with Boot(place.folder, place.model, before=[sys.executable, str(place.folder / "systemd.py")]) as boot:
        assert boot.end() == 2
        assert re.search(r"LISTEN_FDS: the socket that systemd has opened has the port \d+, but PORT is", boot.output)


# llama-server: its pid, its environment, its key, its output


def gpu_tool(folder: Path, script: str) -> str:
    """Write an nvidia-smi; return the PATH that has it."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@scenario
def llama_server_is_described_and_gets_no_secret(place: Place) -> None:
    """Its pid, its lines, its version and its GPU are known. No secret is in an environment or on a command line."""
    key = "gateway-" + "k" * 43
    secrets = {"AIP_MODE": "PREDICTION", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "x", "BACKEND_API_KEY": key}
    secrets["API_KEYS"] = "alice:sk-handed-in-0123456789abcdef"
    settings = {"HF_TOKEN": "hf", "WORKER_TYPE": "chat", "INSTANCE_ID": "box", "PATH": gpu_tool(place.folder, "echo 0")}
    orders = {"version": "version: 100 (abc)"}
    with Boot(place.folder, {**place.model_file, **secrets, **settings}, stub_gateway=True, orders=orders) as boot:
        boot.await_ready()
        with_keys = [pid for pid in boot.family()[1:] if b"sk-handed-in" in environ_of(pid)]
        assert [command_line(pid).partition("gateway.py")[1] for pid in with_keys] == ["gateway.py"]
        assert all(key not in command_line(pid) for pid in boot.family())
        (start,) = boot.starts
        assert not start["environ"].keys() & secrets.keys()
        assert start["environ"]["HF_TOKEN"] == "hf"
        assert boot.key_file.read_text() == key + "\n"
        assert boot.key_file.stat().st_mode & 0o777 == 0o600
        assert boot.key_file.parent.stat().st_mode & 0o777 == 0o700

        state = boot.state
        assert (state["state"], state["detail"], state["backend_pid"]) == ("ready", "serving", start["pid"])
        assert f"socket:[{state['backend_listener']}]" in sockets_of(start["pid"])
        (parent,) = re.findall(r"PPid:\t(\d+)", Path(f"/proc/{start['pid']}/status").read_text())
        assert int(parent) == boot.process.pid

        boot.await_line("WARNING supervisor: llama-server is b100, which is older than the tested b11434: update it$")
        boot.await_line("WARNING supervisor: the model has .*, the GPU 0 B: llama-server may fail or be slow")
        boot.await_line("INFO supervisor: GPU: 0$")
        boot.await_line("INFO llama-server: 0.00.026.518 I srv  llama_server: listening")
        boot.await_line("WARNING llama-server: 0.00.026.519 W srv  a warning")
        latest = place.folder / "data" / "logs" / "llama-chat" / "latest"
        assert re.fullmatch(r"\d{8}T\d{6}Z_server_box\.log", os.readlink(latest))
        boot.until(lambda: "llama_server: listening\n" in latest.read_text())  # it is written a moment later
        assert "sk-handed-in" not in boot.output
        assert key not in boot.output


@scenario
def from_an_early_sighup_to_a_drain_in_order(place: Place) -> None:
    """The gateway gets the signal once it has its handler, and it drains before llama-server is stopped.

    Its activity is not requested before it can matter: each request is a line in its access log. The operator's own
    file of a key stays.
    """
    own = place.folder / "own.key"
    own.write_text("gateway-" + "k" * 43 + "\n")
    settings = {"BACKEND_API_KEY_FILE": str(own), "WEDGE_TIMEOUT": "600", "IDLE_STOP_SECONDS": "600"}
    with Boot(place.folder, {**place.model, **settings}, stub_gateway=True, orders=["undrained"]) as boot:
        boot.await_line("state loading: starting")
        boot.signal(signal.SIGHUP)
        boot.await_line("stub gateway: reloading")
        boot.await_ready()
        assert boot.key_file.read_text() == own.read_text()
        boot.await_line("llama-server requires its key")
        boot.order("talkative")
        # When llama-server is asked again, the first round of checks is over.
        boot.await_line("llama-server: asked /health$", times=2)
        assert "stub gateway: asked /health" not in boot.output

        pids = boot.family()
        boot.signal(signal.SIGTERM)
        boot.await_line("stub gateway: signal 15")
        assert boot.state["state"] == "draining"
        assert alive(boot.starts[0]["pid"])
        assert boot.status("/ready", port="PORT_HEALTH") == 503
        assert boot.status("/", port="PORT_HEALTH") == 200
        boot.unorder("undrained")
        assert boot.end() == 0
        assert "SIGTERM: stopping everything" in boot.output
        assert "Traceback" not in boot.output
        assert_nothing_left(boot, pids)
    assert own.exists()


@contextmanager
def thief(port: int) -> Iterator[list[bytes]]:
    """Take a port as soon as it is free, answer as llama-server does, and keep what comes."""
    received: list[bytes] = []
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not over.is_set():
            with suppress(OSError), listener.accept()[0] as client:
                client.settimeout(PATIENCE_S)
                received.append(client.recv(65536))
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def steal() -> None:
        while not over.is_set():
            with socket.socket() as listener, suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen()
                listener.settimeout(0.1)
                serve(listener)

    thread = threading.Thread(target=steal)
    thread.start()
    try:
        yield received
    finally:
        over.set()
        thread.join()


@scenario
def whoever_takes_the_port_gets_neither_prompts_nor_the_key(place: Place) -> None:
    with Boot(place.folder, {**place.model, "AUTH_ENABLED": "false"}) as boot:
        boot.await_line("gateway: the backend is ready")
        assert boot.status("/v1/models") == 200
        with thief(int(boot.env["PORT_BACKEND"])) as received:
            os.kill(boot.state["backend_pid"], signal.SIGKILL)
            while not received:
                assert boot.status("/v1/models") == 200  # the last list, as long as there is no other
                assert boot.status("/models") in (200, 502, 503)
            boot.await_line("llama-server ended with exit status 1")
            assert boot.status("/v1/models") == 200
            assert boot.status("/models") == 503
        boot.await_ready(2)
        boot.await_line("gateway: the backend is ready", times=2)
        assert boot.status("/v1/models") == 200
        assert [data for data in received if data and not data.startswith(b"GET /health ")] == []
        assert not any(b"uthorization" in data for data in received)


@scenario
def llama_server_may_listen_at_a_unix_socket(place: Place) -> None:
    path = place.folder / "b.sock"
    with Boot(place.folder, {**place.model, "BACKEND_HOST": str(path), "AUTH_ENABLED": "false"}) as boot:
        boot.await_line("gateway: the backend is ready")
        assert boot.state["backend_listener"] == boot.state["backend_pid"]
        assert boot.status("/v1/models") == 200
        assert boot.status("/health", port="PORT_BACKEND") is None
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("gateway: the backend is ready", times=2)
        assert boot.status("/v1/models") == 200
        assert boot.stop() == 0
        assert not path.exists()


# Crashes


@scenario_of(
    ("exit", "1", "llama-server ended with exit status 1; bad model"),
    ("signal", "9", r"llama-server was killed \(SIGKILL\) from outside, most often by the kernel, out of memory"),
)
def a_crash_is_explained(place: Place, order: str, content: str, reason: str) -> None:
    orders = {order: content, "lines": "error: failed to load model" if content == "1" else "hello"}
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "0"}, stub_gateway=True, orders=orders) as boot:
        assert boot.end() == 4
        giving_up = r"giving up \(MAX_RESTARTS=0 within 10 minutes\)$"
        assert re.search(f" ERROR supervisor: error: {reason}.*; {giving_up}", boot.output, re.MULTILINE)
        assert_nothing_left(boot, [])


@scenario
def a_death_that_a_request_is_blamed_for_is_no_crash_and_each_process_must_require_its_key(place: Place) -> None:
    health = '{"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0, "blamed": true}'
    settings = {**place.model, "MAX_RESTARTS": "1"}
    with Boot(place.folder, settings, stub_gateway=True, orders={"health.json": health}) as boot:
        boot.await_line("llama-server requires its key")
        for number in range(1, 4):
            boot.await_ready(number)
            os.kill(boot.state["backend_pid"], signal.SIGKILL)
            boot.await_line("which the gateway holds back or repeats; starting it again in 0.1 s", times=number)
        boot.await_ready(4)
        assert "state dead" not in boot.output
        boot.order("open")
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("ERROR supervisor: llama-server answers without its key")


@scenario
def a_crash_loop_ends_with_its_status_and_never_with_0(place: Place) -> None:
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "1"}, stub_gateway=True, orders={"exit": "0"}) as boot:
        assert boot.end() == 4
        assert len(boot.starts) == 2
        assert "ended with exit status 0; giving up (MAX_RESTARTS=1 within 10 minutes)" in boot.output
        assert_nothing_left(boot, [])


@scenario
def sighup_reloads_and_killed_services_are_started_again(place: Place) -> None:
    """Without a gateway the state is dead. llama-server runs on."""
    keys = place.folder / "keys.txt"
    keys.write_text("alice:sk-alice-0123456789abcdef\n")
    with Boot(place.folder, {**place.model, "AUTH_KEYS_FILE": str(keys), "KEYS_WATCH_SECONDS": "0"}) as boot:
        boot.await_line("health: listening")
        boot.await_line("gateway: the backend is ready")
        bob = "sk-bob-0123456789abcdef0"
        assert boot.status("/v1/models", key=bob) == 401
        keys.write_text(f"bob:{bob}\n")
        boot.signal(signal.SIGHUP)
        boot.await_line("gateway: keys: 1 in force", times=2)
        assert boot.status("/v1/models", key=bob) == 200

        os.kill(boot.pid_of("gateway.py"), signal.SIGKILL)
        os.kill(boot.pid_of("health_server.py"), signal.SIGKILL)
        boot.await_line(r"the health server was killed \(SIGKILL\); starting it again in 1 s")
        boot.await_line("state dead")
        boot.await_line("state loading: the gateway is starting")
        boot.await_ready(2)
        boot.await_line("health: listening", times=2)
        boot.await_line("gateway: the backend is ready", times=2)
        assert boot.status("/health") == 200
        assert len(boot.starts) == 1
        pids = boot.family()
        assert boot.stop() == 0
        assert_nothing_left(boot, pids)


@scenario
def all_services_count_towards_the_limit(place: Place) -> None:
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "1"}, stub_gateway=True) as boot:
        boot.await_ready()
        boot.await_line("health: listening")
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("starting it again in 1 s")
        boot.await_ready(2)
        os.kill(boot.pid_of("health_server.py"), signal.SIGKILL)
        assert boot.end() == 5
        assert "the health server was killed (SIGKILL); giving up (MAX_RESTARTS=1" in boot.output
        assert_nothing_left(boot, [])


@scenario
def a_gateway_that_cannot_start_is_not_started_again(place: Place) -> None:
    for status, expected in (("1", 5), ("2", 2)):
        with Boot(place.folder, place.model, stub_gateway=True, orders={"gateway_exit": status}) as boot:
            assert boot.end() == expected
            reason = f"the gateway ended with exit status {status} before it answered: it cannot start"
            assert f" ERROR supervisor: error: {reason}" in boot.output
            assert_nothing_left(boot, [])


# Wedged or busy


@scenario
def a_frozen_llama_server_is_replaced_and_its_children_are_killed(place: Place) -> None:
    """A stop while the next one is being ended is clean."""
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=["family"]) as boot:
        boot.await_ready()
        grandchild = int((boot.control / "grandchild").read_text())
        os.kill(boot.state["backend_pid"], signal.SIGSTOP)
        boot.await_line("is wedged: /health has not answered for 4 s")
        boot.await_ready(2)
        assert not alive(boot.starts[0]["pid"])
        assert not alive(grandchild)

        boot.order("stubborn")
        boot.order("deaf")
        boot.await_line("stopping it", times=2)
        assert_stops_cleanly(boot, signal.SIGTERM)


@scenario
def neither_a_load_nor_a_prefill_is_a_wedge_but_requests_without_a_byte_and_slots_are(place: Place) -> None:
    orders = ["loading", "deaf", "talkative"]
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=orders) as boot:
        # A load may take as long as the process lives. Each request takes HEALTH_TIMEOUT: three exceed WEDGE_TIMEOUT.
        boot.await_line("llama-server: asked /health$", times=3)
        assert boot.state["state"] == "loading"
        set_activity(boot, active=2, queued=3, backend_silent_s=9000)
        boot.unorder("deaf")
        boot.unorder("loading")
        boot.await_ready()
        # A long prefill
        boot.await_line("llama-server: asked /slots$", times=5)
        assert len(boot.starts) == 1
        assert boot.state["state"] == "ready"
        # A wedge
        boot.order("deaf_slots")
        set_activity(boot, active=1, backend_silent_s=4.1)
        boot.await_line(r"is wedged: no byte for 4 s \(WEDGE_TIMEOUT\) and /slots does not answer")
        set_activity(boot)
        boot.unorder("deaf_slots")
        boot.await_ready(2)


@scenario
def a_loop_in_which_one_thread_works_alone_is_a_wedge_in_seconds(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE, "THREADS": "2"}, stub_gateway=True) as boot:
        boot.await_ready()
        set_activity(boot, active=1)
        boot.order("spinning")
        boot.order("deaf_slots")
        boot.await_line(r"is wedged: one thread has worked alone for \d+ s and /slots does not answer")
        set_activity(boot)
        boot.unorder("spinning")
        boot.unorder("deaf_slots")
        boot.await_ready(2)


# Idle


@scenario
def an_idle_machine_stops_with_0(place: Place) -> None:
    settings, orders = {**place.model, "IDLE_STOP_SECONDS": "0.4"}, ["loading", "talkative"]
    with Boot(place.folder, settings, stub_gateway=True, orders=orders) as boot:
        set_activity(boot, idle_s=1000)
        # A load is no idle time: these requests have pauses of 0.1 s.
        boot.await_line("llama-server: asked /health$", times=8)
        set_activity(boot, active=1, idle_s=1000)
        boot.unorder("loading")
        boot.await_ready()
        # Neither is work.
        boot.await_line("stub gateway: asked /health$", times=3)
        set_activity(boot, idle_s=1000)
        assert boot.end() == 0
        assert "no work for 0.4 s (IDLE_STOP_SECONDS): stopping everything" in boot.output
        assert_nothing_left(boot, [])


@scenario
def on_idle_is_run_each_time_with_default_signals_and_its_failure_is_logged(place: Place) -> None:
    hook = "echo idle hook $(grep SigIgn /proc/self/status); exit 3"
    with Boot(place.folder, {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": hook}, stub_gateway=True) as boot:
        set_activity(boot, idle_s=1000)
        boot.await_line("^idle hook SigIgn:", times=2)
        boot.await_line("ON_IDLE ended with exit status 3", times=2)
        assert boot.stop() == 0
        (ignored, *_) = [int(line.split()[-1], 16) for line in boot.lines if line.startswith("idle hook")]
        assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))


@scenario
def a_hook_and_a_gpu_tool_that_hang_delay_nothing_and_are_killed_at_the_end(place: Place) -> None:
    settings = {
        **place.model_file,
        "IDLE_STOP_SECONDS": "0.2",
        "ON_IDLE": "echo idle hook; sleep 600",
        "PATH": gpu_tool(place.folder, "echo asked > /proc/$PPID/fd/1\nexec sleep 601"),
    }
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_ready()
        boot.await_line("^asked$", times=2)  # for the report, and for the model
        set_activity(boot, idle_s=1000)
        boot.await_line("ON_IDLE is still running", times=2)
        assert boot.lines.count("idle hook") == 1
        pids = boot.family()
        assert any("sleep 600" in command_line(pid) for pid in pids)
        assert any(re.search("nvidia-smi|sleep 601", command_line(pid)) for pid in pids)
        assert boot.stop() == 0
        assert_nothing_left(boot, pids)


@scenario
def on_idle_has_a_time_limit(place: Place) -> None:
    settings = {
        **place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "echo idle hook; sleep 600", "ON_IDLE_TIMEOUT": "0.5"
    }  # fmt: skip
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        set_activity(boot, idle_s=1000)
        boot.await_line(r"ON_IDLE has run for 0.5 s \(ON_IDLE_TIMEOUT\): ending it")
        boot.await_line(r"ON_IDLE was killed \(SIGKILL\)")
        boot.await_line("^idle hook$", times=2)
        assert boot.stop() == 0


# Signals and the end


@scenario
def a_gateway_that_does_not_drain_is_killed_after_drain_timeout(place: Place) -> None:
    with Boot(
        place.folder, {**place.model, "DRAIN_TIMEOUT": "0.2"}, stub_gateway=True, orders=["undrained", "stubborn"]
    ) as boot:
        boot.await_ready()
        pids = boot.family()
        assert boot.stop() == 0
        assert_nothing_left(boot, pids)


@scenario
def a_second_sigterm_ends_at_once(place: Place) -> None:
    with Boot(
        place.folder, {**place.model, "DRAIN_TIMEOUT": "600"}, stub_gateway=True, orders=["undrained", "stubborn"]
    ) as boot:
        boot.await_ready()
        pids = boot.family()
        boot.signal(signal.SIGTERM)
        boot.await_line("stub gateway: signal 15")
        boot.signal(signal.SIGTERM)
        assert boot.end() == 0
        assert "SIGTERM again: ending at once" in boot.output
        assert_nothing_left(boot, pids)


def assert_stops_cleanly(boot: Boot, number: signal.Signals) -> None:
    pids = boot.family()
    boot.signal(number)
    assert boot.end() == 0
    assert "Traceback" not in boot.output
    assert f"{number.name}: stopping everything" in boot.output
    assert_nothing_left(boot, pids)


@scenario_of(
    ("services starting", "unbound", "state loading: starting"),
    ("finding the model", "unbound", "finding or fetching the model"),
    ("port unbound", "unbound", "llama-server started"),
    ("loading", "loading", "llama-server started"),
    ("back-off", "exit", "starting it again in 1 s"),
)
def a_stop_in_each_phase_is_clean(place: Place, phase: str, order: str, line: str) -> None:
    settings = place.model_file if phase == "finding the model" else place.model
    with Boot(place.folder, settings, stub_gateway=True, orders={order: "1"}) as boot:
        boot.await_line(line)
        assert_stops_cleanly(boot, signal.SIGINT if phase == "loading" else signal.SIGTERM)


@scenario
def a_stray_signal_changes_nothing_in_any_program(place: Place) -> None:
    keys = place.folder / "keys.txt"
    keys.write_text("alice:sk-alice-0123456789abcdef\n")
    settings = {**place.model_file, "AUTH_KEYS_FILE": str(keys)}
    with Boot(place.folder, settings, by_shell=True, covered=False) as boot:

        def unprotected(pid: int) -> list[int]:
            return [number for number in signals.STRAY if signal_is_default(pid, number)]

        # From the first line of start.sh to the end, to each process that is there
        boot.until(lambda: not unprotected(boot.process.pid), 0.001)

        def send_until_ready() -> bool:
            for pid in [boot.process.pid, *boot.family()]:
                if not unprotected(pid):
                    with suppress(ProcessLookupError):
                        for number in signals.STRAY:
                            os.kill(pid, number)
            return any("the backend is ready" in line for line in boot.lines)

        boot.until(send_until_ready, 0.002)
        assert [pid for pid in boot.family() if unprotected(pid)] == []
        boot.await_ready()
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert boot.status("/health") == 200
        assert len(boot.starts) == 1
        assert "draining" not in boot.output
        assert boot.stop() == 0


@scenario
def a_drain_of_the_gateway_ends_everything_with_0_unless_it_dies_meanwhile(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True, orders=["undrained"]) as boot:
        boot.await_ready()
        gateway = boot.pid_of("gateway.py")
        os.kill(gateway, signal.SIGTERM)
        boot.await_line("state draining")
        os.kill(gateway, signal.SIGKILL)
        boot.await_line("state dead")
        boot.await_ready(2)  # it is started again, and the drain is over
        assert boot.output.count("state draining") == 1
        boot.unorder("undrained")
        pids = boot.family()
        os.kill(boot.pid_of("gateway.py"), signal.SIGTERM)
        assert boot.end() == 0
        assert "the gateway has drained and ended" in boot.output
        assert_nothing_left(boot, pids)


@scenario
def children_die_with_a_killed_supervisor_and_the_next_boot_removes_its_folder(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        boot.until(lambda: len(boot.family()) == 3)  # llama-server may still be asked for its version
        pids = [os.pidfd_open(pid) for pid in boot.family()]
        boot.signal(signal.SIGKILL)
        boot.end()
        for fd in pids:
            assert select.select([fd], [], [], PATIENCE_S)[0] == [fd]
            os.close(fd)
        left = boot.key_file.parent
    RunDir().remove()  # what the next boot begins with
    assert not left.exists()


# As PID 1


AS_PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@scenario
def pid_1_reaps_orphans_and_stops_in_order(place: Place) -> None:
    """An orphan becomes PID 1's child, and must not stay a zombie."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    if subprocess.run([*AS_PID_1, "true"], env=ENVIRON, capture_output=True, check=False).returncode:
        pytest.skip("no PID namespaces here")
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "(setsid sleep 0.1 & ); echo orphaned"}
    with Boot(place.folder, settings, stub_gateway=True, before=AS_PID_1) as boot:
        boot.await_ready()
        (supervisor,) = [pid for pid in boot.family() if "supervisor.py" in command_line(pid)]
        set_activity(boot, idle_s=1000)
        # The last one may not have ended yet, but those before it have been collected.
        boot.await_line("orphaned", times=5)
        boot.until(lambda: len([pid for pid in boot.family() if not alive(pid)]) <= 2)
        os.kill(supervisor, signal.SIGHUP)
        boot.await_line("stub gateway: reloading")
        os.kill(supervisor, signal.SIGTERM)
        assert boot.end() == 0
        assert "stub gateway: signal 15" in boot.output
        assert not (place.folder / "state.json").exists()


# Running them


@pytest.mark.parametrize("name", SCENARIOS)
@aside
def test_supervisor(tmp_path: Path, name: str) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(GGUF)
    SCENARIOS[name](Place(tmp_path, {"MODEL_HF": "user/repository"}, {"MODEL_PATH": str(model)}))
