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

from boot.service_manager import VARIABLES
from support.boot import PATIENCE_S, UNSET, Boot, alive, command_line, signal_is_default
from support.together import ENVIRON, aside

GGUF = b"GGUF" + bytes(1000)
ACTIVITY = {"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0}
# Each sign of a wedge has its own scenarios, in which the others cannot come first. The stub has HEALTH_TIMEOUT to
# answer, also under load; and if llama-server computes in one thread, that it works alone says nothing.
WEDGE = {"WEDGE_TIMEOUT": "4", "HEALTH_TIMEOUT": "3", "THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """A scenario's folder, and the setting that names a model in it."""

    folder: Path
    model: dict[str, str]


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


def sockets_of(pid: int) -> list[str]:
    return [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]


def assert_nothing_left(boot: Boot, pids: list[int]) -> None:
    assert [command_line(pid) for pid in pids if alive(pid)] == []
    assert not (boot.folder / "state.json").exists()
    if boot.starts:
        assert not boot.key_file.parent.exists()


# The order of the start


@scenario
def probes_are_answered_while_the_model_loads(place: Place) -> None:
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


@scenario
def llama_server_gets_the_port_that_replaces_a_default_in_use(place: Place) -> None:
    with ExitStack() as held:
        with suppress(OSError):  # the port may be in use by a program of this machine: that is the same case
            held.enter_context(socket.create_server(("127.0.0.1", 8080)))
        with Boot(place.folder, {**place.model, "PORT_BACKEND": UNSET}) as boot:
            boot.await_line("PORT_BACKEND is not set, and its default 8080 is taken: it is ")
            boot.until(lambda: boot.starts)
            argv = boot.starts[0]["argv"]
            assert f"it is {argv[argv.index('--port') + 1]}\n" in boot.output
            boot.await_ready()


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
    with Boot(place.folder, router_of(place, MODELS_PRELOAD="chat", MOCK_LOAD_SECONDS="600")) as boot:
        boot.await_line("the model chat is loading")
        assert boot.status("/ready", port="PORT_HEALTH") == 204
        assert boot.state["backend_listener"] is None
        assert boot.stop() == 0


@scenario
def a_router_with_a_wrong_preset_is_not_started(place: Place) -> None:
    preset = place.folder / "models.ini"
    preset.write_text("[chat]\nmodel = /none.gguf\n")
    with Boot(place.folder, {"MODELS": "router", "MODELS_PRESET": str(preset)}) as boot:
        assert boot.end() == 3
    assert "error: MODELS_PRESET: the model chat: /none.gguf does not exist" in boot.output
    assert boot.starts == []


@scenario
def probes_are_answered_while_the_model_is_fetched(place: Place) -> None:
    # The kernel accepts the connection into the backlog, and no response comes.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/m.gguf"
        with Boot(place.folder, {"MODEL_URL": url}) as boot:
            boot.await_line("fetching http")
            boot.await_line("health: listening")
            assert boot.status("/ready", port="PORT_HEALTH") == 204
            # It is written in a thread.
            boot.until(lambda: boot.state["detail"] == "finding or fetching the model")
            pids = boot.family()
            assert boot.stop() == 0
            assert_nothing_left(boot, pids)


@scenario
def a_load_may_take_as_long_as_the_process_lives(place: Place) -> None:
    orders = ["loading", "deaf", "talkative"]
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=orders) as boot:
        # Each request takes HEALTH_TIMEOUT, so these take longer than WEDGE_TIMEOUT.
        boot.await_line("llama-server: asked /health$", times=3)
        assert boot.state["state"] == "loading"
        boot.unorder("deaf")
        boot.unorder("loading")
        boot.await_ready()
        assert len(boot.starts) == 1


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


@scenario
def the_pid_in_the_state_file_is_llama_servers(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pid, state = boot.starts[0]["pid"], boot.state
        assert (state["state"], state["detail"], state["backend_pid"]) == ("ready", "serving", pid)
        assert f"socket:[{state['backend_listener']}]" in sockets_of(pid)
        (parent,) = re.findall(r"PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())
        assert int(parent) == boot.process.pid


@scenario
def no_secret_is_in_the_environment_or_on_a_command_line(place: Place) -> None:
    key = "gateway-" + "k" * 43
    given = {"AIP_MODE": "PREDICTION", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "x", "BACKEND_API_KEY": key}
    given["API_KEYS"] = "alice:sk-handed-in-0123456789abcdef"
    with Boot(place.folder, {**place.model, **given, "HF_TOKEN": "hf"}, stub_gateway=True) as boot:
        boot.await_ready()
        environ = boot.starts[0]["environ"]
        with_keys = [pid for pid in boot.family()[1:] if b"sk-handed-in" in Path(f"/proc/{pid}/environ").read_bytes()]
        assert [command_line(pid).partition("gateway.py")[1] for pid in with_keys] == ["gateway.py"]
        assert "sk-handed-in" not in boot.output
        assert not environ.keys() & given.keys()
        assert environ["HF_TOKEN"] == "hf"
        assert boot.key_file.read_text() == key + "\n"
        assert boot.key_file.stat().st_mode & 0o777 == 0o600
        assert boot.key_file.parent.stat().st_mode & 0o777 == 0o700
        assert all(key not in command_line(pid) for pid in boot.family())
        assert key not in boot.output


@scenario
def the_operators_own_key_file_stays(place: Place) -> None:
    own = place.folder / "own.key"
    own.write_text("gateway-" + "k" * 43 + "\n")
    with Boot(place.folder, {**place.model, "BACKEND_API_KEY_FILE": str(own)}, stub_gateway=True) as boot:
        boot.await_ready()
        assert boot.key_file.read_text() == own.read_text()
        assert boot.stop() == 0
        assert_nothing_left(boot, [])
    assert own.exists()


@scenario
def the_key_is_checked_on_a_protected_route(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_line("llama-server requires its key")
        boot.order("open")
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("ERROR supervisor: llama-server answers without its key")


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


@scenario_of(("stub",), ("mock",))
def llama_server_may_listen_at_a_unix_socket(place: Place, backend: str) -> None:
    path = place.folder / "b.sock"
    settings = place.model if backend == "stub" else {"MOCK_BACKEND": "true"}
    with Boot(place.folder, {**settings, "BACKEND_HOST": str(path), "AUTH_ENABLED": "false"}) as boot:
        boot.await_line("gateway: the backend is ready")
        assert boot.state["backend_listener"] == boot.state["backend_pid"]
        assert boot.status("/v1/models") == 200
        assert boot.status("/health", port="PORT_BACKEND") is None
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("gateway: the backend is ready", times=2)
        assert boot.status("/v1/models") == 200
        assert boot.stop() == 0
        assert not path.exists()


@scenario
def the_version_of_llama_server_is_logged(place: Place) -> None:
    orders = {"version": "version: 100 (abc)"}
    with Boot(place.folder, place.model, stub_gateway=True, orders=orders) as boot:
        boot.await_line("WARNING supervisor: llama-server is b100, which is older than the tested b11434: update it$")
        boot.await_ready()
        assert len(boot.starts) == 1


@scenario
def llama_servers_lines_are_logged_and_kept(place: Place) -> None:
    settings = {**place.model, "WORKER_TYPE": "chat", "INSTANCE_ID": "box"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_line("INFO llama-server: 0.00.026.518 I srv  llama_server: listening")
        boot.await_line("WARNING llama-server: 0.00.026.519 W srv  a warning")
        latest = place.folder / "data" / "logs" / "llama-chat" / "latest"
        assert re.fullmatch(r"\d{8}T\d{6}Z_server_box\.log", os.readlink(latest))
        boot.until(lambda: "llama_server: listening\n" in latest.read_text())  # it is written a moment later


@scenario
def json_logs_are_json_line_by_line(place: Place) -> None:
    lines = '{"a": 1}\n\x1b[31mred\x1b[0m\nnot \\ json "'
    with Boot(place.folder, {**place.model, "LOG_FORMAT": "json"}, orders={"lines": lines}) as boot:
        boot.await_ready()
        assert boot.stop() == 0
        logged = [json.loads(line) for line in boot.lines]
    assert {line["process"] for line in logged} >= {"supervisor", "llama-server", "gateway", "health"}
    assert {"\x1b[31mred\x1b[0m", '{"a": 1}'} <= {line["msg"] for line in logged}


# Crashes


@scenario_of(
    ("exit", "1", "llama-server ended with exit status 1; bad model"),
    ("exit", "0", "llama-server ended with exit status 0"),
    ("signal", "9", r"llama-server was killed \(SIGKILL\) from outside, most often by the kernel, out of memory"),
    ("signal", "4", r"llama-server died of SIGILL \(illegal instruction"),
    ("signal", "11", r"llama-server died of SIGSEGV"),
)
def a_crash_is_explained_and_never_ends_with_0(place: Place, order: str, content: str, reason: str) -> None:
    orders = {order: content, "lines": "error: failed to load model" if content == "1" else "hello"}
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "0"}, stub_gateway=True, orders=orders) as boot:
        assert boot.end() == 4
        giving_up = r"giving up \(MAX_RESTARTS=0 within 10 minutes\)$"
        assert re.search(f" ERROR supervisor: error: {reason}.*; {giving_up}", boot.output, re.MULTILINE)
        assert_nothing_left(boot, [])


@scenario
def a_killed_llama_server_is_started_again(place: Place) -> None:
    with Boot(place.folder, place.model) as boot:
        boot.await_ready()
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("state dead")
        assert boot.status("/ready", port="PORT_HEALTH") == 503
        assert boot.status("/", port="PORT_HEALTH") == 200
        boot.await_line("starting it again in 1 s")
        boot.await_ready(2)
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert len(boot.starts) == 2


@scenario
def a_death_that_a_request_is_blamed_for_is_no_crash_and_the_state_is_loading(place: Place) -> None:
    health = '{"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0, "blamed": true}'
    settings = {**place.model, "MAX_RESTARTS": "1"}
    with Boot(place.folder, settings, stub_gateway=True, orders={"health.json": health}) as boot:
        for number in range(1, 4):
            boot.await_ready(number)
            os.kill(boot.state["backend_pid"], signal.SIGKILL)
            boot.await_line("which the gateway holds back or repeats; starting it again in 0.1 s", times=number)
        boot.await_ready(4)
        assert "state dead" not in boot.output


@scenario
def a_crash_loop_ends_with_its_status(place: Place) -> None:
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "1"}, stub_gateway=True, orders={"exit": "7"}) as boot:
        assert boot.end() == 4
        assert len(boot.starts) == 2
        assert "ended with exit status 7; giving up (MAX_RESTARTS=1 within 10 minutes)" in boot.output
        assert_nothing_left(boot, [])


@scenario
def killed_services_are_started_again_and_without_a_gateway_the_state_is_dead(place: Place) -> None:
    with Boot(place.folder, place.model) as boot:
        boot.await_line("health: listening")
        boot.await_line("gateway: the backend is ready")
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
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=["family"]) as boot:
        boot.await_ready()
        grandchild = int((boot.control / "grandchild").read_text())
        os.kill(boot.state["backend_pid"], signal.SIGSTOP)
        boot.await_line("is wedged: /health has not answered for 4 s")
        boot.await_ready(2)
        assert not alive(boot.starts[0]["pid"])
        assert not alive(grandchild)


@scenario
def requests_without_a_byte_are_a_wedge_if_slots_does_not_answer(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True) as boot:
        boot.await_ready()
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


@scenario
def a_long_prefill_is_not_a_wedge(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=["talkative"]) as boot:
        set_activity(boot, active=2, queued=3, backend_silent_s=9000)
        boot.await_ready()
        boot.await_line("llama-server: asked /slots$", times=5)
        assert len(boot.starts) == 1
        assert boot.state["state"] == "ready"


@scenario
def the_gateways_activity_is_not_requested_before_it_can_matter(place: Place) -> None:
    """Each request is a line in its access log and counts in its metrics."""
    settings = {**place.model, "WEDGE_TIMEOUT": "600", "IDLE_STOP_SECONDS": "600"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_ready()
        boot.await_line("llama-server requires its key")
        boot.order("talkative")
        # When llama-server is asked again, the first round of checks is over.
        boot.await_line("llama-server: asked /health$", times=2)
        assert "stub gateway: asked /health" not in boot.output


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
def on_idle_is_run_each_time_and_its_failure_is_logged(place: Place) -> None:
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "echo idle hook; exit 3"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        set_activity(boot, idle_s=1000)
        boot.await_line("^idle hook$", times=2)
        boot.await_line("ON_IDLE ended with exit status 3", times=2)
        assert boot.stop() == 0


@scenario
def on_idle_is_not_run_twice_at_once_and_is_killed_at_the_end(place: Place) -> None:
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "echo idle hook; sleep 600"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        set_activity(boot, idle_s=1000)
        boot.await_line("ON_IDLE is still running", times=2)
        assert boot.lines.count("idle hook") == 1
        pids = boot.family()
        assert any("sleep 600" in command_line(pid) for pid in pids)
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


@scenario
def a_gpu_tool_that_hangs_delays_no_load(place: Place) -> None:
    (place.folder / "bin").mkdir()
    smi = place.folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho asked > /proc/$PPID/fd/1\nexec sleep 600\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    with Boot(place.folder, {**place.model, "PATH": path}, stub_gateway=True) as boot:
        boot.await_ready()
        boot.await_line("^asked$")
        pids = boot.family()
        assert any(re.search("nvidia-smi|sleep 600", command_line(pid)) for pid in pids)
        assert boot.stop() == 0
        assert_nothing_left(boot, pids)


@scenario
def a_small_gpu_is_a_warning(place: Place) -> None:
    (place.folder / "bin").mkdir()
    smi = place.folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 0\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    with Boot(place.folder, {**place.model, "PATH": path}, stub_gateway=True) as boot:
        boot.await_line("WARNING supervisor: the model has .*, the GPU 0 B: llama-server may fail or be slow")
        boot.await_line("INFO supervisor: GPU: 0$")
        assert boot.stop() == 0


# Signals and the end


@scenario
def the_gateway_drains_before_llama_server_is_stopped(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True, orders=["undrained"]) as boot:
        boot.await_ready()
        pids = boot.family()
        boot.signal(signal.SIGTERM)
        boot.await_line("stub gateway: signal 15")
        assert boot.state["state"] == "draining"
        assert alive(boot.starts[0]["pid"])
        assert boot.status("/ready", port="PORT_HEALTH") == 503
        assert boot.status("/", port="PORT_HEALTH") == 200
        boot.unorder("undrained")
        assert boot.end() == 0
        assert_nothing_left(boot, pids)


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


@scenario_of(
    ("services starting", ["unbound"], "state loading: starting"),
    ("finding the model", ["unbound"], "finding or fetching the model"),
    ("port unbound", ["unbound"], "llama-server started"),
    ("loading", ["loading"], "llama-server started"),
    ("ready", [], "state ready"),
    ("back-off", ["exit"], "starting it again in 1 s"),
    ("wedged", ["stubborn"], "stopping it"),
)
def a_stop_in_each_phase_is_clean(place: Place, phase: str, orders: list[str], line: str) -> None:
    settings = {**place.model, **WEDGE} if phase == "wedged" else place.model
    given = dict.fromkeys(orders, "1")
    with Boot(place.folder, settings, stub_gateway=True, orders=given) as boot:
        if phase == "wedged":
            boot.await_ready()
            boot.order("deaf")
        boot.await_line(line)
        pids = boot.family()
        number = signal.SIGINT if phase == "loading" else signal.SIGTERM
        boot.signal(number)
        assert boot.end() == 0
        assert "Traceback" not in boot.output
        assert f"{number.name}: stopping everything" in boot.output
        assert_nothing_left(boot, pids)


@scenario
def sighup_makes_the_gateway_reload_and_ends_no_process(place: Place) -> None:
    keys = place.folder / "keys.txt"
    keys.write_text("alice:sk-alice-0123456789abcdef\n")
    with Boot(place.folder, {**place.model, "AUTH_KEYS_FILE": str(keys), "KEYS_WATCH_SECONDS": "0"}) as boot:
        boot.await_line("gateway: the backend is ready")
        bob = "sk-bob-0123456789abcdef0"
        assert boot.status("/v1/models", key=bob) == 401
        keys.write_text(f"bob:{bob}\n")
        boot.signal(signal.SIGHUP)
        boot.await_line("gateway: keys: 1 in force", times=2)
        boot.await_line("gateway: the backend is ready")  # it learns of the state a moment later
        assert boot.status("/v1/models", key=bob) == 200
        assert len(boot.starts) == 1


@scenario
def an_early_sighup_is_sent_once_the_gateway_has_its_handler(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_line("state loading: starting")
        boot.signal(signal.SIGHUP)
        boot.await_line("stub gateway: reloading")
        boot.await_ready()


@scenario_of(("SIGHUP", signal.SIGHUP), ("SIGUSR1", signal.SIGUSR1), ("SIGUSR2", signal.SIGUSR2))
def a_stray_signal_changes_nothing_in_any_program(place: Place, name: str, number: int) -> None:
    keys = place.folder / "keys.txt"
    keys.write_text("alice:sk-alice-0123456789abcdef\n")
    settings = {**place.model, "AUTH_KEYS_FILE": str(keys)}
    with Boot(place.folder, settings, by_shell=True, covered=False) as boot:
        # From the first line of start.sh to the end, to each process that is there
        boot.until(lambda: not signal_is_default(boot.process.pid, number), 0.001)

        def send_until_ready() -> bool:
            for pid in [boot.process.pid, *boot.family()]:
                if not signal_is_default(pid, number):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            return any("the backend is ready" in line for line in boot.lines)

        boot.until(send_until_ready, 0.002)
        assert [pid for pid in boot.family() if signal_is_default(pid, number)] == []
        boot.await_ready()
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert boot.status("/health") == 200
        assert len(boot.starts) == 1
        assert "draining" not in boot.output
        assert boot.stop() == 0


@scenario
def a_hook_gets_the_default_actions_of_all_signals(place: Place) -> None:
    settings = {
        **place.model,
        "IDLE_STOP_SECONDS": "0.2",
        "ON_IDLE": f"grep SigIgn /proc/self/status > {place.folder}/idle",
    }
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        set_activity(boot, idle_s=5)
        boot.await_line("running ON_IDLE")
        report = place.folder / "idle"
        boot.until(lambda: report.exists() and report.read_text().endswith("\n"))
        ignored = int(report.read_text().split()[1], 16)
        assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))


@scenario
def a_drain_of_the_gateway_ends_everything_with_0(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pids = boot.family()
        os.kill(boot.pid_of("gateway.py"), signal.SIGTERM)
        assert boot.end() == 0
        assert "the gateway has drained and ended" in boot.output
        assert_nothing_left(boot, pids)


@scenario
def a_gateway_that_dies_while_it_drains_is_started_again_and_the_drain_is_over(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True, orders=["undrained"]) as boot:
        boot.await_ready()
        gateway = boot.pid_of("gateway.py")
        os.kill(gateway, signal.SIGTERM)
        boot.await_line("state draining")
        os.kill(gateway, signal.SIGKILL)
        boot.await_line("state dead")
        boot.await_ready(2)
        assert boot.output.count("state draining") == 1
        boot.unorder("undrained")
        assert boot.stop() == 0


@scenario
def children_die_with_a_killed_supervisor_and_the_next_boot_removes_its_folder(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pids = [os.pidfd_open(pid) for pid in boot.family()]
        boot.signal(signal.SIGKILL)
        boot.end()
        assert len(pids) == 3
        for fd in pids:
            assert select.select([fd], [], [], PATIENCE_S)[0] == [fd]
            os.close(fd)
        left = boot.key_file.parent  # from here on any boot on this machine removes it
    (place.folder / "again").mkdir()
    with Boot(place.folder / "again", place.model, stub_gateway=True) as boot:
        boot.await_ready()
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
        assert len([pid for pid in boot.family() if not alive(pid)]) <= 2
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
    SCENARIOS[name](Place(tmp_path, {"MODEL_PATH": str(model)}))
