"""The supervisor over real processes: what it starts, in what order it stops, what dies, what it says, what is left.

The scenarios wait most of the time, so several run at once; each is a test of its own.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from support.boot import PATIENCE_S, Boot, alive, command_line
from support.together import ENVIRON, together

GGUF = b"GGUF" + bytes(1000)
ACTIVITY = {"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0}
WEDGE = {"WEDGE_TIMEOUT": "1.5", "HEALTH_TIMEOUT": "1"}


@dataclass(frozen=True)
class Place:
    """A scenario's folder, and a model in it as settings."""

    folder: Path
    model: dict[str, str]


Scenario = Callable[[Place], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def scenario_of(*cases: tuple[object, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A scenario for each case; its values are the function's further arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for case in cases:
            SCENARIOS[f"{function.__name__}: {case[0]} {len(SCENARIOS)}"] = partial(_call, function, case)
        return function

    return register


def _call(function: Callable[..., None], case: tuple[object, ...], place: Place) -> None:
    function(place, *case)


def tell(boot: Boot, **activity: float) -> None:
    new = boot.control / "new.json"
    new.write_text(json.dumps({**ACTIVITY, **activity}))
    new.replace(boot.control / "health.json")


def stays(boot: Boot, seconds: float) -> None:
    """That nothing ends cannot be awaited but by the clock."""
    with pytest.raises(subprocess.TimeoutExpired):
        boot.process.wait(seconds)


def assert_nothing_left(boot: Boot, pids: list[int]) -> None:
    assert [command_line(pid) for pid in pids if alive(pid)] == []
    assert not (boot.folder / "state.json").exists()
    if boot.starts:
        assert not boot.key_file.parent.exists()


# The order of the start


@scenario
def pitfall_02_probes_are_answered_while_the_model_loads(place: Place) -> None:
    with Boot(place.folder, place.model, orders=["unbound"]) as boot:
        boot.await_line("llama-server started")
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
def pitfall_02_probes_are_answered_while_the_model_is_fetched(place: Place) -> None:
    # The server's backlog takes the connection; it never answers.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/m.gguf"
        with Boot(place.folder, {"MODEL_URL": url}) as boot:
            boot.await_line("fetching http")
            boot.await_line("health: listening")
            assert boot.status("/ready", port="PORT_HEALTH") == 204
            assert boot.state["detail"] == "finding or fetching the model"
            pids = boot.family()
            assert boot.stop() == 0
            assert_nothing_left(boot, pids)


@scenario
def pitfall_01_a_load_is_bounded_by_the_process_being_alive(place: Place) -> None:
    with Boot(
        place.folder,
        {**place.model, **WEDGE},
        stub_gateway=True,
        orders=["loading", "deaf"],
    ) as boot:
        boot.await_line("llama-server started")
        # Many times any timeout that there is.
        stays(boot, 4)
        assert boot.state["state"] == "loading"
        boot.unorder("deaf")
        boot.unorder("loading")
        boot.await_ready()
        assert len(boot.starts) == 1


@scenario
def a_load_may_be_bounded_by_the_clock(place: Place) -> None:
    settings = {**place.model, "MODEL_LOAD_TIMEOUT": "0.3", "MAX_RESTARTS": "0"}
    with Boot(place.folder, settings, stub_gateway=True, orders=["loading"]) as boot:
        assert boot.end() == 4
        assert "did not load within 0.3 s (MODEL_LOAD_TIMEOUT)" in boot.output
        assert_nothing_left(boot, [])


# llama-server: its call, its output, its pid


@scenario
def pitfall_03_llama_servers_pid_is_its_own(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pid = boot.starts[0]["pid"]
        assert boot.state == {"state": "ready", "since": boot.state["since"], "detail": "serving", "backend_pid": pid}
        (parent,) = re.findall(r"PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())
        assert int(parent) == boot.process.pid


@scenario
def the_environment_is_scrubbed_and_no_secret_is_on_a_command_line(place: Place) -> None:
    key = "gateway-" + "k" * 43
    given = {"AIP_MODE": "PREDICTION", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "x", "BACKEND_API_KEY": key}
    with Boot(place.folder, {**place.model, **given, "HF_TOKEN": "hf"}, stub_gateway=True) as boot:
        boot.await_ready()
        environ = boot.starts[0]["environ"]
        assert not environ.keys() & given.keys()
        assert environ["HF_TOKEN"] == "hf"
        assert boot.key_file.read_text() == key + "\n"
        assert boot.key_file.stat().st_mode & 0o777 == 0o600
        assert boot.key_file.parent.stat().st_mode & 0o777 == 0o700
        assert all(key not in command_line(pid) for pid in boot.family())
        assert key not in boot.output


@scenario
def a_key_file_of_the_operators_stays(place: Place) -> None:
    mine = place.folder / "mine.key"
    mine.write_text("gateway-" + "k" * 43 + "\n")
    with Boot(place.folder, {**place.model, "BACKEND_API_KEY_FILE": str(mine)}, stub_gateway=True) as boot:
        boot.await_ready()
        assert boot.key_file.read_text() == mine.read_text()
        assert boot.stop() == 0
        assert_nothing_left(boot, [])
    assert mine.exists()


@scenario
def pitfall_09_the_key_is_checked_on_a_route_that_is_not_public(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_line("asks for its key, as it should")
        boot.order("open")
        os.kill(boot.state["backend_pid"], signal.SIGKILL)
        boot.await_line("ERROR supervisor: llama-server answers without its key")


@scenario
def llama_servers_lines_are_kept_and_shown(place: Place) -> None:
    settings = {**place.model, "WORKER_TYPE": "chat", "INSTANCE_ID": "box"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_line("INFO llama-server: 0.00.026.518 I srv  llama_server: listening")
        boot.await_line("WARNING llama-server: 0.00.026.519 W srv  a warning")
        latest = place.folder / "data" / "logs" / "llama-chat" / "latest"
        assert re.fullmatch(r"\d{8}T\d{6}Z_server_box\.log", os.readlink(latest))
        assert "llama_server: listening\n" in latest.read_text()


@scenario
def json_logs_are_json_line_by_line(place: Place) -> None:
    lines = '{"a": 1}\n\x1b[31mred\x1b[0m\nnot \\ json "'
    with Boot(place.folder, {**place.model, "LOG_FORMAT": "json"}, orders={"lines": lines}) as boot:
        boot.await_ready()
        assert boot.stop() == 0
        told = [json.loads(line) for line in boot.lines]
    assert {line["process"] for line in told} >= {"supervisor", "llama-server", "gateway", "health"}
    assert {"\x1b[31mred\x1b[0m", '{"a": 1}'} <= {line["msg"] for line in told}


# Crashes


@scenario_of(
    ("exit", "1", "llama-server ended with exit status 1; bad model"),
    ("exit", "0", "llama-server ended with exit status 0"),
    ("signal", "9", r"llama-server was killed \(SIGKILL\) from outside, most often by the kernel, out of memory"),
    ("signal", "4", r"llama-server died of SIGILL \(illegal instruction"),
    ("signal", "11", r"llama-server died of SIGSEGV"),
)
def pitfall_05_a_crash_is_told_in_words_and_never_looks_like_success(
    place: Place, order: str, what: str, words: str
) -> None:
    orders = {order: what, "lines": "error: failed to load model" if what == "1" else "hello"}
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "0"}, stub_gateway=True, orders=orders) as boot:
        assert boot.end() == 4
        assert re.search(words, boot.output)
        assert "giving up (MAX_RESTARTS=0 within 10 minutes)" in boot.output
        assert_nothing_left(boot, [])


@scenario
def pitfall_05_a_killed_llama_server_is_started_again(place: Place) -> None:
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
def a_crash_loop_ends_truthfully(place: Place) -> None:
    with Boot(place.folder, {**place.model, "MAX_RESTARTS": "1"}, stub_gateway=True, orders={"exit": "7"}) as boot:
        assert boot.end() == 4
        assert len(boot.starts) == 2
        assert "ended with exit status 7; giving up (MAX_RESTARTS=1 within 10 minutes)" in boot.output
        assert_nothing_left(boot, [])


@scenario
def killed_services_are_started_again_and_a_dead_gateway_is_not_called_ready(place: Place) -> None:
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
def a_gateway_that_cannot_start_is_not_tried_again(place: Place) -> None:
    for status, expected in (("1", 5), ("2", 2)):
        with Boot(place.folder, place.model, stub_gateway=True, orders={"gateway_exit": status}) as boot:
            assert boot.end() == expected
            assert f"the gateway ended with exit status {status} before it answered: it cannot start" in boot.output
            assert_nothing_left(boot, [])


# Wedged, or only busy


@scenario
def a_frozen_llama_server_is_replaced_with_all_that_it_started(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=["family"]) as boot:
        boot.await_ready()
        grandchild = int((boot.control / "grandchild").read_text())
        os.kill(boot.state["backend_pid"], signal.SIGSTOP)
        boot.await_line("is wedged: /health has not answered for 1.5 s")
        boot.await_ready(2)
        assert not alive(boot.starts[0]["pid"])
        assert not alive(grandchild)


@scenario
def requests_without_a_byte_and_mute_slots_are_a_wedge(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True, orders=["deaf_slots"]) as boot:
        boot.await_ready()
        tell(boot, active=1, backend_silent_s=1.6)
        boot.await_line(r"is wedged: no byte for 1.5 s \(WEDGE_TIMEOUT\) and /slots does not answer")
        tell(boot)
        boot.await_ready(2)


@scenario
def a_long_prefill_is_no_wedge(place: Place) -> None:
    with Boot(place.folder, {**place.model, **WEDGE}, stub_gateway=True) as boot:
        tell(boot, active=2, queued=3, backend_silent_s=9000)
        boot.await_ready()
        stays(boot, 4)
        assert len(boot.starts) == 1
        assert boot.state["state"] == "ready"


@scenario
def the_gateway_is_not_asked_before_its_answer_can_matter(place: Place) -> None:
    """Each question is a line of its access log, a request in its metrics."""
    settings = {**place.model, "WEDGE_TIMEOUT": "600", "IDLE_STOP_SECONDS": "600"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        boot.await_ready()
        boot.await_line("asks for its key")
        boot.order("talkative")
        # When llama-server is asked again, the first look at everything is over.
        boot.await_line("llama-server: asked /health$", times=2)
        assert "stub gateway: asked /health" not in boot.output


# Idle


@scenario
def an_idle_machine_stops_with_0(place: Place) -> None:
    with Boot(place.folder, {**place.model, "IDLE_STOP_SECONDS": "0.4"}, stub_gateway=True, orders=["loading"]) as boot:
        tell(boot, idle_s=1000)
        boot.await_line("llama-server started")
        stays(boot, 1)
        tell(boot, active=1, idle_s=1000)
        boot.unorder("loading")
        boot.await_ready()
        stays(boot, 1)
        tell(boot, idle_s=1000)
        assert boot.end() == 0
        assert "no work for 0.4 s (IDLE_STOP_SECONDS): stopping everything" in boot.output
        assert_nothing_left(boot, [])


@scenario
def on_idle_is_run_and_again_and_its_failure_is_told(place: Place) -> None:
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "echo idle hook; exit 3"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        tell(boot, idle_s=1000)
        boot.await_line("^idle hook$", times=2)
        boot.await_line("ON_IDLE ended with exit status 3", times=2)
        assert boot.stop() == 0


@scenario
def on_idle_is_not_run_twice_at_once_and_ends_with_the_rest(place: Place) -> None:
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "echo idle hook; sleep 600"}
    with Boot(place.folder, settings, stub_gateway=True) as boot:
        tell(boot, idle_s=1000)
        boot.await_line("ON_IDLE is still running", times=2)
        assert boot.lines.count("idle hook") == 1
        pids = boot.family()
        assert any("sleep 600" in command_line(pid) for pid in pids)
        assert boot.stop() == 0
        assert_nothing_left(boot, pids)


# Signals and the end


@scenario
def pitfall_13_the_gateway_drains_before_llama_server_is_stopped(place: Place) -> None:
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
def a_gateway_that_does_not_drain_is_cut_off_after_drain_timeout(place: Place) -> None:
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
def pitfall_04_and_34_a_stop_in_each_phase_is_clean(place: Place, phase: str, orders: list[str], line: str) -> None:
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
def pitfall_06_sighup_reaches_the_gateway_and_kills_nobody(place: Place) -> None:
    keys = place.folder / "keys.txt"
    keys.write_text("alice:sk-alice-0123456789abcdef\n")
    with Boot(place.folder, {**place.model, "AUTH_KEYS_FILE": str(keys), "KEYS_WATCH_SECONDS": "0"}) as boot:
        boot.await_ready()
        bob = "sk-bob-0123456789abcdef0"
        assert boot.status("/v1/models", key=bob) == 401
        keys.write_text(f"bob:{bob}\n")
        boot.signal(signal.SIGHUP)
        boot.await_line("gateway: keys: 1 in force", times=2)
        assert boot.status("/v1/models", key=bob) == 200
        assert len(boot.starts) == 1


@scenario
def pitfall_06_an_early_sighup_waits_for_the_gateways_handler(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_line("state loading: starting")
        boot.signal(signal.SIGHUP)
        boot.await_line("stub gateway: reloading")
        boot.await_ready()


@scenario
def a_drain_that_was_asked_for_ends_everything_with_0(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pids = boot.family()
        os.kill(boot.pid_of("gateway.py"), signal.SIGTERM)
        assert boot.end() == 0
        assert "the gateway has drained and ended" in boot.output
        assert_nothing_left(boot, pids)


@scenario
def a_gateway_that_dies_while_it_drains_is_started_again_and_drains_no_more(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True, orders=["undrained"]) as boot:
        boot.await_ready()
        gateway = boot.pid_of("gateway.py")
        os.kill(gateway, signal.SIGTERM)
        boot.await_line("state draining")
        os.kill(gateway, signal.SIGKILL)
        boot.await_line("state dead")
        boot.await_ready(2)
        assert boot.output.count("state draining") == 1
        assert boot.stop() == 0


@scenario
def children_die_with_a_killed_supervisor_and_the_next_boot_sweeps(place: Place) -> None:
    with Boot(place.folder, place.model, stub_gateway=True) as boot:
        boot.await_ready()
        pids = [os.pidfd_open(pid) for pid in boot.family()]
        boot.signal(signal.SIGKILL)
        boot.end()
        assert len(pids) == 3
        for fd in pids:
            assert select.select([fd], [], [], PATIENCE_S)[0] == [fd]
            os.close(fd)
        left = boot.key_file.parent
        assert left.exists()
    (place.folder / "again").mkdir()
    with Boot(place.folder / "again", place.model, stub_gateway=True) as boot:
        boot.await_ready()
        assert not left.exists()


# As PID 1


AS_PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@scenario
def pid_1_reaps_strangers_and_stops_in_order(place: Place) -> None:
    """An orphan whose parent is gone becomes PID 1's child, and must not stay a zombie."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    if subprocess.run([*AS_PID_1, "true"], env=ENVIRON, capture_output=True, check=False).returncode:
        pytest.skip("no PID namespaces here")
    settings = {**place.model, "IDLE_STOP_SECONDS": "0.2", "ON_IDLE": "(setsid sleep 0.1 & ); echo orphaned"}
    with Boot(place.folder, settings, stub_gateway=True, before=AS_PID_1) as boot:
        boot.await_ready()
        (supervisor,) = [pid for pid in boot.family() if "supervisor.py" in command_line(pid)]
        tell(boot, idle_s=1000)
        # The last one may be on its way, but those before it have been collected.
        boot.await_line("orphaned", times=5)
        assert len([pid for pid in boot.family() if not alive(pid)]) <= 2
        os.kill(supervisor, signal.SIGHUP)
        boot.await_line("stub gateway: reloading")
        os.kill(supervisor, signal.SIGTERM)
        assert boot.end() == 0
        assert "stub gateway: signal 15" in boot.output
        assert not (place.folder / "state.json").exists()


# Their running


@pytest.fixture(scope="session")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], None]]:
    def place() -> Place:
        folder = tmp_path_factory.mktemp("place")
        (folder / "m.gguf").write_bytes(GGUF)
        return Place(folder, {"MODEL_PATH": str(folder / "m.gguf")})

    with together(request, {name: partial(play, place()) for name, play in SCENARIOS.items()}) as outcome:
        yield outcome


@pytest.mark.parametrize("name", SCENARIOS)
def test_supervisor(name: str, outcome: Callable[[str], None]) -> None:
    outcome(name)
