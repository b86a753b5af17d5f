"""gateway.py: its command line, its listener, and its life as a process. behaviour/test_drain.py has how it drains."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config.loader import load_config
from gateway import EXIT_SETTINGS, Gateway, main
from proxy.app import App
from support.boot import PATIENCE_S
from support.clock import HURRY
from support.gateway import KEYS, Stack, get, scenario
from support.paths import ROOT, SCRIPTS
from support.ports import free_ports
from support.together import ENVIRON, aside

# --- The command line ---


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment with no settings but the folder for files."""
    for name in list(os.environ):
        if name != "PATH":
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return monkeypatch


def test_check_config_prints_each_setting_and_where_it_comes_from(
    environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ.setenv("MAX_QUEUE_SIZE", "7")
    assert main(["--check-config"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"(?m)^MAX_QUEUE_SIZE\s.*\b7\b", page)
    assert re.search(r"(?m)^MAX_CONNECTIONS\s", page)


def test_settings_that_cannot_be_used_are_all_reported(
    environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ.setenv("MAX_QUEUE_SIZE", "-1")
    environ.setenv("AUTH_ENABLED", "ture")
    assert main([]) == EXIT_SETTINGS
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 2
    assert all(re.match(r"gateway: error: (MAX_QUEUE_SIZE|AUTH_ENABLED): ", line) for line in complaints)


@pytest.mark.parametrize(("option", "status"), [("--nonsense", 2), ("--help", 0)])
def test_options_are_those_of_the_help(option: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == status
    printed = capsys.readouterr()
    assert "--check-config" in printed.out + printed.err


# --- The listener ---


@scenario()
async def test_it_listens_on_any_free_port_if_the_port_is_0(stack: Stack) -> None:
    assert stack.port > 0
    assert (await stack.ask(get(b"/ping"))).body == b"pong\n"


@scenario()
async def test_an_address_that_is_in_use_is_an_error(stack: Stack) -> None:
    config = load_config({"HOST": "127.0.0.1", "PORT": str(stack.port), "DATA_DIR": str(stack.folder)})
    second = Gateway(App(config), config)
    with pytest.raises(OSError, match="address"):
        await second.start()
    await second.close()


def test_a_listener_that_is_inherited_must_listen(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as deaf:
        for option, message in (
            (str(deaf.fileno()), f"file descriptor {deaf.fileno()} is not a socket that listens"),
            ("1000000", "file descriptor 1000000: Bad file descriptor"),
            ("three", "invalid"),
        ):
            with pytest.raises(SystemExit) as end:
                main(["--listen-fd", option])
            assert end.value.code == 2
            assert message in capsys.readouterr().err
        deaf.detach()


@scenario()
async def test_a_gateway_that_is_stopped_ends_at_once(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping")[:5])
    stack.gateway.stop()
    await asyncio.wait_for(stack.gateway.run_until_ended(), PATIENCE_S * HURRY)
    assert not stack.app.lifecycle.draining


def test_a_loop_that_fails_is_in_the_log_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    again = asyncio.Event()

    async def fail() -> None:
        if "no more keys" in caplog.text:
            again.set()
        raise RuntimeError("no more keys")

    async def start() -> None:
        config = load_config({"HOST": "127.0.0.1", "PORT": "0", "DATA_DIR": str(tmp_path)})
        app = App(config)
        monkeypatch.setattr(app, "watch_keys", fail)
        gateway = Gateway(app, config)
        await gateway.start()
        await asyncio.wait_for(again.wait(), PATIENCE_S)
        await gateway.close()

    asyncio.run(start())
    assert "RuntimeError: no more keys" in caplog.text


# --- The process ---


@aside
def test_it_announces_its_address_and_ends_with_0_at_a_signal(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    settings = {"HOST": "127.0.0.1", "PORT": "0", "DATA_DIR": str(tmp_path), "AUTH_KEYS_FILE": str(keys)}
    settings["PORT_BACKEND"] = str(free_ports(1)[0])  # at the default port a backend may be at work, as after make run
    command = [sys.executable, str(SCRIPTS / "gateway.py")]
    environ = {name: value for name, value in ENVIRON.items() if name == "PATH" or name.startswith("COV")}
    version = (ROOT / "VERSION").read_text().strip()
    with subprocess.Popen(command, env=environ | settings, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = None
            while found is None and (line := process.stdout.readline()):
                found = re.search(rf"version {re.escape(version)} listens on 127\.0\.0\.1 port (\d+)$", line)
            assert found is not None
            with socket.create_connection(("127.0.0.1", int(found[1])), PATIENCE_S) as client:
                client.sendall(get(b"/ping", b"Connection: close"))
                assert client.makefile("rb").read().endswith(b"pong\n")
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=PATIENCE_S)[0].splitlines()
        finally:
            process.kill()
    assert process.returncode == 0
    assert [line.partition("gateway: ")[2] for line in rest] == [
        "draining: 0 connections, 0 requests in progress",
        "stopped",
    ]
