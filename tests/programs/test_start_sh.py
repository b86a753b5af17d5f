"""The whole boot as an operator sees it: start.sh with an environment, its output, its end; and start.sh itself."""

import hashlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import pytest

from boot.start_check import check_start
from support.boot import (
    FOR_COVERAGE,
    PATIENCE_S,
    SCRIPTS,
    SUPPORT,
    UNSET,
    Boot,
    alive,
    ask,
    command_line,
    program,
)
from support.fileserver import Site, serve
from support.in_turn import Case, Outcome, run_in_turn
from support.ports import free_port
from support.together import aside

START, SUPERVISOR = SCRIPTS / "start.sh", SCRIPTS / "supervisor.py"
GGUF = b"GGUF" + bytes(5000)
SHA256 = hashlib.sha256(GGUF).hexdigest()
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass(frozen=True)
class World:
    """What the tables of boots share: a folder of models, a web server, a port in use, programs of all kinds."""

    models: Path
    url: str
    taken_port: int
    programs: Path


@contextmanager
def made_world(folder: Path) -> Iterator[World]:
    models, programs = folder / "models", folder / "programs"
    models.mkdir()
    programs.mkdir()
    contents = {
        "good.gguf": GGUF, "bad.gguf": b"\x80\x02}q\x00" * 9, "empty.gguf": b"", "page.gguf": b"<!DOCTYPE html>",
        "pointer.gguf": b"version https://git-lfs.github.com/spec/v1\n", "half-00001-of-00002.gguf": GGUF,
        "set-00001-of-00002.gguf": GGUF, "set-00002-of-00002.gguf": GGUF,
    }  # fmt: skip
    for name, content in contents.items():
        (models / name).write_bytes(content)
    program(programs / "llama-server", sys.executable, str(SUPPORT / "stub_llama.py"))
    (programs / "garbage").write_bytes(b"\x7fELF but not really")
    (programs / "garbage").chmod(0o755)
    site = Site(files={"good.gguf": GGUF, "page.gguf": b"<html>"}, missing="none.gguf")
    with serve(site) as url, socket.create_server(("127.0.0.1", 0)) as port:
        yield World(models, url, port.getsockname()[1], programs)


Settings = Callable[[World, Path], Mapping[str, str]]


def given(**settings: str) -> Settings:
    return lambda world, folder: settings


def named(name: str, **settings: str) -> Settings:
    return lambda world, folder: {"MODEL_PATH": str(world.models / name), **settings}


def good(**settings: str) -> Settings:
    return named("good.gguf", **settings)


def fetched(name: str, **settings: str) -> Settings:
    return lambda world, folder: {"MODEL_URL": f"{world.url}/{name}", **settings}


def below_a_file(setting: str) -> Settings:
    """A folder that cannot be made, even by root."""

    def settings(world: World, folder: Path) -> Mapping[str, str]:
        (folder / "file").touch()
        return {**good()(world, folder), setting: str(folder / "file" / "inside")}

    return settings


def in_use(setting: str) -> Settings:
    return lambda world, folder: {**good()(world, folder), setting: str(world.taken_port)}


def binary(name: str) -> Settings:
    return lambda world, folder: {**good()(world, folder), "LLAMA_BIN": str(world.programs / name)}


# Boots that must fail: exit status, the one error (a pattern), settings, orders to the stub


@dataclass(frozen=True)
class Failing:
    status: int
    error: str
    settings: Settings
    orders: Mapping[str, str] = field(default_factory=dict)


# Before anything is started
REFUSED = {
    "no model set": Failing(3, "no model is set: set MODEL_PATH", given()),
    "plain http without a digest": Failing(2, r"MODEL_SHA256", given(MODEL_URL="http://models.example/m.gguf")),
    "two sources": Failing(2, r"MODEL_HF excludes MODEL_PATH", good(MODEL_HF="a/b")),
    "LLAMA_BIN that is not there": Failing(2, r"LLAMA_BIN: .*none is not an executable file", binary("none")),
    "no llama-server": Failing(2, r"llama-server is neither /app/llama-server nor on the PATH", good(LLAMA_BIN=UNSET)),
    "PORT in use": Failing(5, r"PORT: cannot listen on 127.0.0.1 port \d+: it is already in use", in_use("PORT")),
    "PORT_HEALTH in use": Failing(5, r"PORT_HEALTH: cannot listen on .* already in use", in_use("PORT_HEALTH")),
    "PORT_BACKEND in use": Failing(5, r"PORT_BACKEND: cannot listen on .* already in use", in_use("PORT_BACKEND")),
    "another machine's address": Failing(
        5, r"HOST: cannot listen on 192.0.2.1 port .*no such address .*assign", good(HOST="192.0.2.1")
    ),
    "STATE_FILE that cannot be written": Failing(
        2, r"STATE_FILE: .*inside cannot be written", below_a_file("STATE_FILE")
    ),
    "a boolean that is none": Failing(2, r"AUTH_ENABLED: the value .*ture", good(AUTH_ENABLED="ture")),
    "DEBUG_SHELL that is none": Failing(2, r"DEBUG_SHELL: the value", good(DEBUG_SHELL="maybe")),
    "one port twice": Failing(2, r"PORT and PORT_HEALTH are both", good(PORT="20001", PORT_HEALTH="20001")),
    "EXTRA_ARGS with a host": Failing(2, r"EXTRA_ARGS: .*--host", good(EXTRA_ARGS="--host 0.0.0.0")),
    "EXTRA_ARGS with half a quote": Failing(2, r"EXTRA_ARGS: .*quote", good(EXTRA_ARGS="--alias 'x")),
    "a backend key that is none": Failing(2, r"BACKEND_API_KEY: the value does not", good(BACKEND_API_KEY="hush")),
    "a backend key's file that is not there": Failing(2, r"BACKEND_API_KEY_FILE: ", good(BACKEND_API_KEY_FILE="/none")),
    "a certificate that is not there": Failing(
        2, r"TLS_CERT_FILE, TLS_KEY_FILE: .* No such file", good(TLS_CERT_FILE="/none", TLS_KEY_FILE="/none")
    ),
    "a certificate that is none": Failing(
        2, r"TLS_CERT_FILE, TLS_KEY_FILE: .* cannot be loaded: not a certificate",
        lambda w, f: {**good()(w, f), **dict.fromkeys(("TLS_CERT_FILE", "TLS_KEY_FILE"), str(w.models / "page.gguf"))},
    ),
}  # fmt: skip
# By the process that finds the model
NO_MODEL = {
    "no such file": Failing(3, r"none.gguf does not exist", named("none.gguf")),
    "no such name": Failing(
        3, r"nope does not exist \(.* contains bad", lambda w, f: {"MODEL_NAME": "nope", "MODELS_DIR": str(w.models)}
    ),
    "not a GGUF file": Failing(3, r"bad.gguf is not a GGUF file", named("bad.gguf")),
    "a folder": Failing(3, r"models/. is a folder|is a folder", named(".")),
    "a part of a set is missing": Failing(
        3, r"half-00002-of-00002.gguf does not exist", named("half-00001-of-00002.gguf")
    ),
    "a set by its second part": Failing(3, r"is not the first part", named("set-00002-of-00002.gguf")),
    "a wrong digest": Failing(3, r"MODEL_SHA256 is 0000", good(MODEL_SHA256="0" * 64)),
    "a download that is refused": Failing(3, r"cannot be fetched: HTTP status 404", fetched("none.gguf")),
    "a download that is a page": Failing(3, r"the file at http\S+ is a web page", fetched("page.gguf")),
    "a download with a wrong digest": Failing(
        3, r"MODEL_SHA256 is 0000", fetched("good.gguf", MODEL_SHA256="0" * 64)
    ),
    "a download from nowhere": Failing(
        6, r"cannot be fetched: .*refused",
        given(MODEL_URL="http://127.0.0.1:1/m.gguf", MODEL_FETCH_TIMEOUT="0"),
    ),
}  # fmt: skip
# By llama-server
NO_BACKEND = {
    "another machine's llama-server": Failing(
        2, r"cannot be executed .*not a program for this machine", binary("garbage")
    ),
    "an argument that llama-server does not know": Failing(
        2, r"EXTRA_ARGS: llama-server does not know the argument --no$",
        good(EXTRA_ARGS="--no 1"), {"exit": "1", "lines": "error: invalid argument: --no"},
    ),
    "CUDA is missing": Failing(
        4, r"exit status 127; CUDA is missing \(libcuda.so.1\)",
        good(MAX_RESTARTS="0"), {"exit": "127", "lines": "x: error while loading shared libraries: libcuda.so.1: no"},
    ),
}  # fmt: skip
FAILING = {**REFUSED, **NO_MODEL, **NO_BACKEND}
# One for each status with which the supervisor follows the process that finds the model, too
BOOTED = (*NO_BACKEND, "not a GGUF file", "a download from nowhere")


# What only the start itself can find out: what llama-server does, and what a whole download contains.
UNCHECKED = {name for name, case in FAILING.items() if case.orders} | {"a download with a wrong digest"}


def made_boot(world: World, folder: Path, case: Failing, *, stub_gateway: bool = False) -> Boot:
    folder.mkdir()
    return Boot(folder, case.settings(world, folder), stub_gateway=stub_gateway, orders=case.orders)


def leftovers(boot: Boot) -> list[str]:
    left = [str(path) for path in boot.folder.glob("state.json*")]
    if boot.starts:
        left += [str(boot.key_file)] if boot.key_file.parent.exists() else []
        left += [f"llama-server {start['pid']}" for start in boot.starts if alive(start["pid"])]
    return left


def ask_supervisor(boots: list[Boot], arguments: list[list[str]]) -> list[Outcome]:
    """Run supervisor.py with the settings of each boot and its list of arguments."""
    cases = [Case(boot.folder, boot.env, each) for boot, each in zip(boots, arguments, strict=True)]
    return run_in_turn("import supervisor, boot.model_files", "sys.exit(supervisor.main(arguments))", cases)


def assert_one_error(case: Failing, status: int, lines: list[str]) -> None:
    assert status == case.status, lines
    assert len([line for line in lines if re.search(f"error: .*(?:{case.error})", line)]) == 1, lines
    assert not any("Traceback" in line or "error: error: " in line for line in lines), lines


def assert_remedy(status: int, lines: list[str]) -> None:
    assert any(f": exit status {status}: " in line for line in lines), lines


def run_failing(tmp_path: Path, cases: Mapping[str, Failing], *arguments: str) -> list[tuple[Boot, list[str]]]:
    """Run supervisor.py for each. Asserts that each has its status and its error; returns the boots and their lines."""
    with made_world(tmp_path) as world:
        boots = [made_boot(world, tmp_path / str(number), case) for number, case in enumerate(cases.values())]
        asked = ask_supervisor(boots, [list(arguments)] * len(boots))
    for case, (status, lines) in zip(cases.values(), asked, strict=True):
        assert_one_error(case, status, lines)
    return [(boot, lines) for boot, (_, lines) in zip(boots, asked, strict=True)]


@aside
def test_what_is_refused_before_anything_is_started_has_one_error_and_its_status(tmp_path: Path) -> None:
    for case, (boot, lines) in zip(REFUSED.values(), run_failing(tmp_path, REFUSED), strict=True):
        assert_remedy(case.status, lines)
        assert boot.starts == leftovers(boot) == []


@aside
def test_a_model_that_is_not_found_has_one_error_and_its_status(tmp_path: Path) -> None:
    for boot, lines in run_failing(tmp_path, NO_MODEL, "--find-model", "result"):
        assert not (boot.folder / "result").exists(), lines


@pytest.mark.parametrize("name", BOOTED)
@aside
def test_a_boot_that_must_fail_has_one_error_and_its_status(tmp_path: Path, name: str) -> None:
    case = FAILING[name]
    with made_world(tmp_path) as world, made_boot(world, tmp_path / "boot", case, stub_gateway=True) as boot:
        assert_one_error(case, boot.end(), boot.lines)
        assert_remedy(case.status, boot.lines)
        assert leftovers(boot) == []


@pytest.mark.parametrize("name", FAILING)
def test_a_check_makes_nothing_and_finds_what_the_start_would_refuse_with_its_status(tmp_path: Path, name: str) -> None:
    case, folder, out = FAILING[name], tmp_path / "boot", io.StringIO()
    with made_world(tmp_path) as world:
        environ = made_boot(world, folder, case).env
        if environ.get("LLAMA_BIN") == str(folder / "stub-llama"):
            program(folder / "stub-llama", "/bin/true")  # asked for its version, for which Python takes time to start
        status = check_start(environ, out)
    assert {path.name for path in folder.iterdir()} <= {"control", "file", "stub-llama"}
    if name not in UNCHECKED:
        assert status == case.status, out.getvalue()
        assert re.search(f"error: .*(?:{case.error})", out.getvalue()), out.getvalue()


@aside
def test_a_check_as_a_process(tmp_path: Path) -> None:
    done = run([str(START), "--check"], tmp_path, **Boot(tmp_path).env)
    assert (done.returncode, done.stderr) == (3, "")
    assert any(line.startswith("error: no model is set: set MODEL_PATH") for line in done.stdout.splitlines())


@aside
def test_all_wrong_settings_are_reported_at_once(tmp_path: Path) -> None:
    """Also DEBUG_SHELL, the only setting that start.sh reads."""
    wrong = {"AUTH_ENABLED": "ture", "PORT": "x", "NGL": "-1", "LOG_LEVEL": "loud", "EXTRA_ARGS": "--port 1"}
    wrong["DEBUG_SHELL"] = "maybe"
    with Boot(tmp_path, wrong, by_shell=True) as boot:
        assert boot.end() == 2
    for name in wrong:
        assert len([line for line in boot.lines if line.startswith(f"supervisor: error: {name}:")]) == 1, boot.output
    assert_remedy(2, boot.lines)


# Boots that must succeed


def argv_of(boot: Boot) -> list[str]:
    return list(boot.starts[0]["argv"])


def model_of(boot: Boot) -> Path:
    return Path(argv_of(boot)[argv_of(boot).index("-m") + 1])


def statuses(boot: Boot, path: str, key: str = "") -> list[int]:
    """Ask gateway and health server, on whichever ports they listen; return the statuses in their order as numbers."""
    ports = map(int, re.findall(r"listen\w* on \S+ port (\d+)", boot.output))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return sorted(ask(boot.env["HOST"], port, path, headers) or 0 for port in ports)


@contextmanager
def served(folder: Path, settings: Mapping[str, str]) -> Iterator[Boot]:
    """Boot by start.sh until everything has started. Asserts, then and at the end, what holds for each boot."""
    with Boot(folder, settings, by_shell=True, covered=False) as boot:
        boot.await_ready()
        boot.await_line("health.*listening")
        boot.await_line("gateway.*the backend is ready")
        assert "supervisor.py" in command_line(boot.process.pid)
        # The health server knows /ready, the gateway does not.
        assert statuses(boot, "/ready") in ([200, 401], [200, 404]), boot.output
        yield boot
        pids = boot.family()
        assert boot.stop() == 0, boot.output
        assert "Traceback" not in boot.output
        assert leftovers(boot) == []
        assert [command_line(pid) for pid in pids if alive(pid)] == []


@aside
def test_every_setting_has_its_effect_and_a_slow_gpu_tool_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "boot"
    (folder / "bin").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data/api_keys.txt").write_text("# no key yet\n")
    (folder / "mine").write_text("gateway-" + "k" * 43 + "\n")
    smi = folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho asked > /proc/$PPID/fd/1\nexec sleep 600\n")
    smi.chmod(0o755)
    with made_world(tmp_path) as world:
        settings = {
            "MODEL_NAME": "set-00001-of-00002", "MODELS_DIR": str(world.models),
            "LLAMA_BIN": UNSET, "PATH": f"{folder / 'bin'}:{world.programs}:{PATH}",
            "WORKER_TYPE": "chat", "INSTANCE_ID": "box",
            "NGL": "7", "CTX": "0", "THREADS": "2", "PARALLEL": "3", "DRAIN_TIMEOUT": "1",
            "EXTRA_ARGS": """--chat-template-kwargs '{"a": 1}' --alias "two words" """,
            "AUTH_ENABLED": "1", "BACKEND_API_KEY_FILE": str(folder / "mine"),
            "PORT": UNSET, "GATEWAY_PORT": str(free_port()),
        }  # fmt: skip
        with served(folder, settings) as boot:
            assert (folder / "data/logs/llama-chat/latest").exists()
            assert model_of(boot).name == "set-00001-of-00002.gguf"
            assert argv_of(boot)[-12:] == [
                *("-ngl", "7", "-c", "0", "-t", "2", "-np", "3"),
                *("--chat-template-kwargs", '{"a": 1}', "--alias", "two words"),
            ]
            assert boot.status("/v1/models", port="GATEWAY_PORT") == 401
            assert boot.status("/v1/models", port="GATEWAY_PORT", key="sk-any") == 401
            assert "GATEWAY_PORT" in boot.output  # the old name of PORT
            assert boot.key_file.read_text() == (folder / "mine").read_text()
            boot.await_line("asked")
            # It may be between two programs, when it has no command line.
            boot.until(lambda: any(re.search("nvidia-smi|sleep 600", command_line(pid)) for pid in boot.family()))


@aside
def test_without_a_data_folder_and_keys_a_hugging_face_model_is_served_over_ipv6(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no folder can be made below a file, even by root
    off = {"DATA_DIR": str(tmp_path / "file" / "inside"), "AUTH_ENABLED": "off", "HOST": "::1", "BACKEND_HOST": "::1"}
    with served(tmp_path, {**off, "MODEL_HF": "someone/something:Q4_K_M"}) as boot:
        assert argv_of(boot)[6:8] == ["-hf", "someone/something:Q4_K_M"]
        assert boot.starts[0]["environ"]["LLAMA_CACHE"] == str(tmp_path / "file/inside/models")
        assert re.search(r"WARNING .* cannot be kept in \S+/file/inside/logs/llama .*: Not a dir", boot.output)
        assert boot.status("/v1/models") == 200


@aside
def test_a_download_goes_on_and_what_is_not_wanted_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "boot"
    (folder / "data/models").mkdir(parents=True)
    (folder / "data/models/good.gguf.part").write_bytes(GGUF[:1234])
    (folder / "file").touch()
    off = {"ACCESS_LOG": "", "USAGE_FILE": "", "LOG_DIR": str(folder / "file/inside")}
    with made_world(tmp_path) as world:
        settings = {**fetched("good.gguf", MODEL_SHA256=SHA256, LOG_FORMAT="json")(world, folder), **off}
        with served(folder, {**settings, "PORT": "0", "PORT_HEALTH": "0"}) as boot:
            assert model_of(boot).read_bytes() == GGUF
            assert 401 in statuses(boot, "/v1/models", key="sk-any")  # there is no keys file
            boot.await_line("GPU: ")  # they are reported in the background
            logged = [json.loads(line) for line in boot.lines]
            assert {line["process"] for line in logged} >= {"supervisor", "health"}
            (warning,) = [line for line in logged if "/file/inside/llama " in line["msg"]]
            assert warning["level"] == "WARNING"
            assert re.search(r" cannot be kept in \S+/file/inside/llama .*: Not a dir", warning["msg"])
            assert sorted(path.name for path in (folder / "data").iterdir()) == ["models"]


# A boot with a stream


MOCK = {"MOCK_BACKEND": "true", "LLAMA_BIN": UNSET, "AUTH_ENABLED": "false"}
SIGNED = "https://models.example/m.gguf?signature=secret"
KEY = "sk-operator-0123456789"
ENDLESS, SHORT = 1000, 5


@contextmanager
def streaming(boot: Boot, tokens: int = ENDLESS) -> Iterator[HTTPResponse]:
    """Start a stream and read its first event."""
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"messages": messages, "stream": True, "max_tokens": tokens})
    connection = HTTPConnection(boot.env["HOST"], int(boot.env["PORT"]), timeout=PATIENCE_S)
    with closing(connection):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        with connection.getresponse() as response:
            assert response.status == 200
            assert response.readline().startswith(b"data: ")
            yield response


@aside
def test_a_stream_that_ends_within_drain_timeout_is_complete_and_an_endless_one_is_cut_with_0(tmp_path: Path) -> None:
    more = {"MODEL_URL": SIGNED, "DATA_DIR": UNSET, "PARALLEL": "2", "MOCK_TOKENS_PER_SECOND": "10"}
    with Boot(tmp_path, {**MOCK, **more, "DRAIN_TIMEOUT": "5"}, by_shell=True) as boot:
        boot.await_line("the built-in mock answers")  # also if a model is set
        boot.await_line("gateway: the backend is ready")
        with streaming(boot) as endless, streaming(boot, SHORT) as short:
            pids = boot.family()
            boot.signal(signal.SIGTERM)
            assert short.read().rstrip().endswith(b"data: [DONE]")
            # The connection is aborted, so that the client sees the truncation.
            with suppress(HTTPException, OSError):
                assert b"[DONE]" not in endless.read()
        assert boot.end() == 0
        assert Path("/data").exists() or (tmp_path / "data/logs/llama/latest").exists()
        assert not re.search("Traceback|secret", boot.output)
        assert [command_line(pid) for pid in pids if alive(pid)] == []


def drain(boot: Boot) -> None:
    connection = HTTPConnection(boot.env["HOST"], int(boot.env["PORT"]), timeout=PATIENCE_S)
    with closing(connection):
        connection.request("POST", "/drain", headers={"Authorization": f"Bearer {KEY}"})
        assert connection.getresponse().status == 202


@aside
def test_an_operators_drain_is_reported_to_probes_while_streams_finish_and_ends_everything_with_0(
    tmp_path: Path,
) -> None:
    (tmp_path / "keys").write_text(f"ops:{KEY} role=operator\n")
    auth = {"AUTH_ENABLED": "true", "AUTH_KEYS_FILE": str(tmp_path / "keys"), "ADMIN_ROUTES": "true"}
    settings = {**MOCK, **auth, "MOCK_TOKENS_PER_SECOND": "10", "DRAIN_TIMEOUT": "1000"}
    with Boot(tmp_path, settings, by_shell=True) as boot:
        boot.await_line("gateway: the backend is ready")
        boot.await_line("health: listening")
        with streaming(boot) as response:
            drain(boot)
            boot.await_line("state draining")
            assert boot.status("/ready", port="PORT_HEALTH") == 503
            assert boot.status("/", port="PORT_HEALTH") == 200
            assert boot.state["detail"] == "the gateway drains"
            events = [line for line in (response.readline() for _ in range(10)) if line.startswith(b"data: {")]
            assert len(events) >= 4
            assert "the gateway has drained and ended" not in boot.output
        # Its client has left, so the last stream is over.
        assert boot.end() == 0
        assert "the gateway has drained and ended" in boot.output


# start.sh itself


def shell(tmp_path: Path, *argv: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run([str(START), *argv], tmp_path, **environ)


def run(argv: list[str], tmp_path: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        argv,
        env=environ,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def tools(folder: Path, **pythons: str) -> str:
    """Return a PATH with the tools that start.sh needs, and these Pythons (bodies of shell scripts)."""
    folder.mkdir()
    for name in ("bash", "dirname", "env", "sleep", "cat", "sh"):
        (folder / name).symlink_to(shutil.which(name) or "/bin/false")
    for name, body in pythons.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_it_is_short_and_strict() -> None:
    lines = START.read_text().splitlines()
    assert len(lines) < 200
    assert "set -Eeuo pipefail" in lines
    assert START.stat().st_mode & stat.S_IXUSR


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=PATH)
    if not shellcheck:
        pytest.skip("no shellcheck here")
    done = subprocess.run([shellcheck, str(START)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_sourcing_it_does_nothing() -> None:
    done = subprocess.run(["bash", "-c", f"source {START}; type -t main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "function\n", "")


def test_it_has_no_arithmetic_command() -> None:
    """`((n++))` from 0 has the status 1, which ends the script under `set -e`."""
    assert "((" not in START.read_text()


@aside
def test_no_python_is_one_line(tmp_path: Path) -> None:
    done = shell(tmp_path, PATH=tools(tmp_path / "bin", python3="exit 1", python3_10="exit 127"))
    assert done.returncode == 5
    assert done.stderr == "start: error: no Python 3.10 or later found (python3, python3.13 … python3.10)\n"


@aside
def test_an_old_python3_is_skipped_and_an_empty_argument_is_ignored(tmp_path: Path) -> None:
    """A template makes an empty argument from a variable that is not set."""
    path = tools(tmp_path / "bin", python3="exit 1", python3_12=f'exec {sys.executable} "$@"')
    done = shell(tmp_path, "", PATH=path, DATA_DIR=str(tmp_path), LLAMA_BIN="/none")
    assert (done.returncode, "no model is set" in done.stdout) == (3, True)


@aside
def test_the_gpu_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA A100, 80 GiB'\necho 'NVIDIA T4, 16 GiB'\n")
    smi.chmod(0o755)
    report = " supervisor: GPU: NVIDIA A100, 80 GiB; NVIDIA T4, 16 GiB\n"
    done = run([sys.executable, str(SUPERVISOR), "--report-gpu"], tmp_path, PATH=str(smi.parent), **FOR_COVERAGE)
    assert (done.returncode, report in done.stdout) == (0, True)


WRONG_ARGUMENTS = [["--hlep"], ["--quick"], ["--debug"], ["serve"], ["--quickstart", "now"]]


@pytest.mark.parametrize("option", ["--help", "-h"])
@aside
def test_help_is_printed_and_nothing_is_started(tmp_path: Path, option: str) -> None:
    """No model is set, so a start would end with status 3."""
    done = run([str(START), option], tmp_path, PATH=PATH, DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: start.sh")


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
@aside
def test_an_unknown_argument_is_status_2_and_starts_nothing(tmp_path: Path, arguments: list[str]) -> None:
    done = run([str(START), *arguments], tmp_path, PATH=PATH, DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("start: error: .*", done.stderr.splitlines()[-1])


@aside
def test_the_supervisor_has_the_same_help_and_refuses_the_same_arguments(tmp_path: Path) -> None:
    arguments = [["--help"], ["-h"], *WRONG_ARGUMENTS]
    asked = ask_supervisor([Boot(tmp_path)] * len(arguments), arguments)
    for status, lines in asked[:2]:
        assert (status, lines[0].partition(" [")[0]) == (0, "usage: supervisor.py")
    for status, lines in asked[2:]:
        assert (status, lines[0].partition(" [")[0]) == (2, "usage: supervisor.py")
        assert re.fullmatch("supervisor.py: error: .*", lines[-1])


def test_debug_shell_without_a_terminal_waits_for_a_signal(tmp_path: Path) -> None:
    with Boot(tmp_path, {"DEBUG_SHELL": "yes", "PORT": "nonsense"}, by_shell=True) as boot:
        boot.await_line("DEBUG_SHELL is on: no service is started")
        assert boot.stop() == 0


def exit_status(pid: int) -> int:
    """Wait for a child of pty.fork and return its exit status; kill it if it does not end."""
    handle = os.pidfd_open(pid)
    if not select.select([handle], [], [], PATIENCE_S)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_debug_shell_on_a_terminal_is_a_shell(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(START, [str(START)], {"PATH": PATH, "DEBUG_SHELL": "1", "PS1": "", "HOME": str(tmp_path)})
    os.write(terminal, b"echo $((40+2)); exit 7\n")
    output = b""
    while b"42" not in output:
        output += os.read(terminal, 1000)
    assert exit_status(pid) == 7
    os.close(terminal)


def test_a_closed_terminal_stops_everything(tmp_path: Path) -> None:
    env = Boot(tmp_path, MOCK).env
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(SUPERVISOR)], env)
    output = b""
    while b"state ready" not in output:
        output += os.read(terminal, 1000)
    os.close(terminal)
    assert exit_status(pid) == 0
    assert ask(env["HOST"], int(env["PORT"]), "/ping", {}) is None
