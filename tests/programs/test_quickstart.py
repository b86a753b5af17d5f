"""`make run`: one command, one key, one curl command that works; or one line with the error."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart
from boot.probes import Address
from boot.shutdown import StartupError
from config.loader import load_config
from support.boot import PATIENCE_S, SUPPORT, UNSET, Boot, alive, command_line, program
from support.fileserver import Site, serve
from support.in_turn import Case, Outcome, run_in_turn
from support.paths import SCRIPTS
from support.ports import free_ports
from support.together import ENVIRON, aside

LOCAL = {"DATA_DIR": UNSET, "HOST": UNSET, "LLAMA_BIN": UNSET, "STATE_FILE": UNSET}


def test_a_release_has_no_makefile(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import quickstart; print(quickstart.run_command())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "scripts", env=ENVIRON, capture_output=True, text=True, check=True
    )
    assert done.stdout == "start.sh --quickstart\n"
    assert quickstart.run_command() == "make run"


class Run(Boot):
    """start.sh --quickstart in an empty folder. Its ports come from the environment, as for any boot."""

    def __init__(self, tmp_path: Path, **settings: str) -> None:
        super().__init__(tmp_path, {**LOCAL, **settings}, by_shell=True, after=["--quickstart"])

    @property
    def curl(self) -> list[str]:
        (line,) = [line for line in self.lines if line.startswith("  curl ")]
        return shlex.split(line)


@aside
def test_one_command_creates_a_key_and_prints_a_curl_command_that_works(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    with Run(tmp_path) as run:
        run.await_line("^  curl ")
        ready = next(number for number, line in enumerate(run.lines) if line.startswith("Ready"))
        assert ready <= 6
        assert run.lines[0].startswith("No model is set")
        assert re.search(
            "\nFor a model: MODEL_HF=[^ ]+ make run .*\nFor a llama-server: https://.*LLAMA_BIN", run.output
        )
        assert run.lines[-1].startswith("  curl ")
        assert "the built-in mock answers" in run.lines[0]
        (key,) = re.findall(r"is shown this once: (\S+)", run.output)
        assert f"Ready (mock): http://127.0.0.1:{run.env['PORT']} " in run.output
        done = subprocess.run(run.curl, env=ENVIRON, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        assert '"choices"' in done.stdout
        assert key not in (tmp_path / "data" / "api_keys.txt").read_text()
        ports = {name: run.env[name] for name in ("PORT", "PORT_HEALTH", "PORT_BACKEND")}
        with Run(tmp_path, **ports) as again:
            assert again.end() == 5
        assert re.fullmatch(
            r"run: error: PORT: cannot listen on 127.0.0.1 port \d+: it is already in use .*", again.output
        )
        pids = run.family()
        run.signal(signal.SIGINT)
        assert run.end() == 0
        assert "Traceback" not in run.output
        assert [command_line(pid) for pid in pids if alive(pid)] == []


@aside
def test_with_a_model_it_starts_llama_server_and_with_a_key_it_creates_none(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "api_keys.txt").write_text("mine:sk-0123456789abcdef\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "llama-server", sys.executable, str(SUPPORT / "stub_llama.py"))
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{ENVIRON['PATH']}"
    with Run(tmp_path, MODEL_PATH=str(tmp_path / "m.gguf"), PATH=path) as run:
        run.await_line("^  curl ")
        run.await_line("YOUR_KEY is a key that exists already; to create another: python3 .*key_mgmt.py --file")
        assert len(run.starts) == 1
        assert "mock" not in run.output
        assert "is shown this once" not in run.output
        assert f"Ready: http://127.0.0.1:{run.env['PORT']} " in run.output
        assert run.stop() == 0


@aside
def test_a_boot_that_fails_is_not_announced(tmp_path: Path) -> None:
    with Run(tmp_path, MOCK_BACKEND="false") as run:
        assert run.end() == 3
    assert "Ready" not in run.output
    assert "no model is set" in run.output


ERRORS = [
    ({"AUTH_ENABLED": "ture"}, 2, r"run: error: AUTH_ENABLED: .*"),
    ({"DATA_DIR": "/dev/null/x"}, 2, r"No model.*\nrun: error: .*/dev/null/x/api_keys.txt.*Not a directory"),
    ({"AUTH_KEYS_FILE": "/"}, 2, r"No model.*\nrun: error: / cannot be read: .*"),
    (
        {"MODEL_PATH": "/nope/x.gguf", "MOCK_BACKEND": "false"}, 2,
        r"run: error: MODEL_PATH=/nope/x.gguf is set, but llama-server is neither /app/llama-server nor on the"
        r" PATH: set LLAMA_BIN \(or MOCK_BACKEND=true\)",
    ),
    (
        {"MODEL_PATH": "/nope/x.gguf", "LLAMA_BIN": "/none"}, 2,
        r"run: error: MODEL_PATH=/nope/x.gguf is set, but LLAMA_BIN: /none is not an executable file",
    ),
]  # fmt: skip


def run_without_llama_server(tmp_path: Path, code: str, all_settings: list[dict[str, str]]) -> list[Outcome]:
    """Run the code with each of the settings, each in an empty folder, and without a llama-server on the PATH."""
    cases = []
    for number, settings in enumerate(all_settings):
        folder = tmp_path / str(number)
        folder.mkdir()
        ports = dict(zip(("PORT", "PORT_HEALTH", "PORT_BACKEND"), map(str, free_ports(3)), strict=True))
        cases.append(Case(folder, {"PATH": str(folder), **ports, **settings}))
    return run_in_turn("import os, quickstart; from boot.probes import Address", code, cases)


@aside
def test_an_error_is_one_line(tmp_path: Path) -> None:
    ended = run_without_llama_server(tmp_path, "sys.exit(quickstart.main([]))", [settings for settings, _, _ in ERRORS])
    for (settings, status, output), found in zip(ERRORS, ended, strict=True):
        assert found.status == status, settings
        assert re.fullmatch(output, "\n".join(found.lines)), found.lines
    assert [path for folder in tmp_path.iterdir() for path in folder.iterdir()] == []


WITHOUT_LLAMA_SERVER = [
    ({"MODEL_PATH": "/nope/x.gguf"}, "MODEL_PATH=/nope/x.gguf"),
    ({"MODEL_NAME": "x.gguf"}, "MODEL_NAME=x.gguf"),
    ({"MODEL_HF": "a/b:Q4_0"}, "MODEL_HF=a/b:Q4_0"),
    ({"MODEL_URL": "https://h/x.gguf?signature=secret"}, "MODEL_URL"),
]
PREPARE = """
env, config, _ = quickstart.prepare(os.environ)
print(env["MOCK_BACKEND"], quickstart.is_mock_our_choice(os.environ, config))
print(quickstart.instructions(config, Address("h", 1), None))
"""


@aside
def test_a_model_without_a_llama_server_gets_the_mock_and_both_are_named(tmp_path: Path) -> None:
    given = [{"AUTH_ENABLED": "no", **settings} for settings, _ in WITHOUT_LLAMA_SERVER]
    ended = run_without_llama_server(tmp_path, PREPARE, [*given, {**given[0], "MOCK_BACKEND": "true"}])
    for (_, shown), found in zip(WITHOUT_LLAMA_SERVER, ended[:-1], strict=True):
        lacking = f"{shown} is set, but no llama-server was found (LLAMA_BIN, /app/llama-server, PATH)"
        said = f"{lacking}: the built-in mock answers in its place (MOCK_BACKEND=true)."
        assert found.lines[:2] == [said, "true True"]
        assert found.lines[2].startswith("Ready (mock): ")
        assert "secret" not in "".join(found.lines)
    # If the mock is asked for, nothing needs to be said.
    assert ended[-1].lines[0] == "true False"
    assert ended[-1].lines[1].startswith("Ready (mock): ")


def test_preparing_chooses_the_mock_and_creates_the_first_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "new" / "keys"
    environ = {"DATA_DIR": str(tmp_path), "AUTH_KEYS_FILE": str(keys), "HOST": "127.0.0.1"}
    port, port_health, port_backend = free_ports(3)
    environ |= {
        "PORT": str(port),
        "PORT_HEALTH": str(port_health),
        "PORT_BACKEND": str(port_backend),
        "GATEWAY_PORT": "",
    }
    env, _, key = quickstart.prepare(environ)
    assert env["MOCK_BACKEND"] == "true"
    assert "GATEWAY_PORT" not in env
    assert key
    assert key in capsys.readouterr().out
    trial = quickstart.prepare(env)[2]
    assert trial not in (None, key)
    assert quickstart.prepare(env)[2] not in (None, key, trial)
    assert [line.partition(":")[0] for line in keys.read_text().splitlines() if "sha256" in line] == ["first", "trial"]
    assert quickstart.prepare({**environ, "AUTH_ENABLED": "no"})[2] is None
    handed_in = {"AUTH_KEYS_FILE": str(tmp_path / "none"), "API_KEYS": "a:sk-0123456789abcdef"}
    assert quickstart.prepare({**environ, **handed_in})[2] is None
    with pytest.raises(StartupError):
        quickstart.create_first_key(Path("/dev/null/keys"))


def test_it_is_announced_when_it_is_ready_and_not_if_it_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.announce(-1, Address("127.0.0.1", 1), "Ready")
    assert capsys.readouterr().out == ""
    with serve(Site(statuses=[503])) as url:
        quickstart.announce(os.getppid(), Address("127.0.0.1", int(url.rpartition(":")[2])), "Ready")
    assert capsys.readouterr().out == "Ready\n"


@pytest.mark.parametrize(
    ("settings", "address", "curl"),
    [
        (
            {},
            Address("0.0.0.0", 8000),
            "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Authorization: Bearer K' -H",
        ),
        ({"AUTH_ENABLED": "no"}, Address("::", 1), "  curl http://[::1]:1/v1/chat/completions -H 'Content-Type"),
        ({"AUTH_ENABLED": "no"}, Address("h", 1, True), "  curl -k https://h:1/v1/chat/completions -H 'Content-Type"),
    ],
)
def test_the_curl_command_has_the_gateways_address(settings: dict[str, str], address: Address, curl: str) -> None:
    text = quickstart.instructions(load_config({"DATA_DIR": "/d", **settings}), address, "K")
    assert text.splitlines()[1].startswith(curl)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({}, ""),
        ({"MODELS": "router"}, "chat"),
        ({"MODELS": "router", "MODELS_PRESET": "models.ini", "MODELS_MAX": "2"}, "small"),
        ({"MODELS": "router", "MODELS_PRELOAD": "embed"}, "embed"),
        ({"MODELS": "router", "DEFAULT_MODEL": "embed"}, ""),
        ({"MODELS": "router", "DATA_DIR": "/none", "MODELS_DIR": "/none"}, ""),
    ],
)
def test_with_several_models_the_curl_command_names_one(tmp_path: Path, settings: dict[str, str], model: str) -> None:
    for name in ("chat", "embed"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + bytes(1000))
    preset = tmp_path / "models.ini"
    preset.write_text(f"[small]\nmodel = {tmp_path}/embed.gguf\nload-on-startup = true\n")
    settings = {"DATA_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path), **settings}
    if "MODELS_PRESET" in settings:
        settings["MODELS_PRESET"] = str(preset)
    config = load_config(settings)
    assert quickstart.model_to_name(config, settings) == model
    text = quickstart.instructions(config, Address("127.0.0.1", 1), "K", model)
    body = json.loads(shlex.split(text.splitlines()[1])[-1])
    assert body.get("model", "") == model
    assert body["messages"]


def test_a_router_is_started_as_it_is_set() -> None:
    environ = {"MODELS": "router", "MODELS_DIR": "/none"}
    assert quickstart.choose_backend(environ, load_config(environ)) == environ


def test_a_keys_file_that_cannot_be_trusted_counts_as_having_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert not quickstart.has_keys(keys)
    keys.write_text("# no key yet\n")
    assert not quickstart.has_keys(keys)
    keys.write_bytes(b"\xff\xfe not text\n")
    assert quickstart.has_keys(keys)
    keys.write_text("me:sk-0123456789abcdef\n")
    assert quickstart.has_keys(keys)


@aside
def test_help_is_printed_and_nothing_is_started(tmp_path: Path) -> None:
    (done,) = run_without_llama_server(tmp_path, "quickstart.main(['--help'])", [{}])
    assert (done.status, done.lines[0].partition(" [")[0]) == (0, "usage: quickstart.py")
    assert list((tmp_path / "0").iterdir()) == []
