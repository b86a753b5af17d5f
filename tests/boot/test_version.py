"""The version of llama-server: what its programs have printed, which is warned of, and programs that do not say."""

import asyncio
import logging
import os
import signal
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import mock_backend
from boot.processes import Child, Children
from boot.version import TESTED_BUILD, check_version, parse_build
from support.boot import waitpid_of_this_thread
from support.paths import ROOT, TESTS


class RecordingChildren(Children):
    """Children that remember the pipe of the last one."""

    pipe = "none"

    def spawn(self, *args: Any, output: int | None = None, **names: Any) -> Child:
        self.pipe = os.readlink(f"/proc/self/fd/{output}")
        return super().spawn(*args, output=output, **names)


def open_files() -> set[str]:
    """What this process has open. Other tests run at the same time and open other files."""
    links = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed in the meantime
            links.add(os.readlink(f"/proc/self/fd/{number}"))
    return links


def program(folder: Path, script: str) -> str:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def logged(binary: str, caplog: pytest.LogCaptureFixture, timeout_s: float = 20) -> str:
    """Check the version of a program; return the level and the text of the line that is logged."""
    caplog.set_level(logging.INFO)

    async def run() -> None:
        children = RecordingChildren(lambda: None, waitpid_of_this_thread)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, children.reap)
        await check_version(children, binary, {"PATH": os.environ["PATH"]}, timeout_s)
        assert children.pipe not in open_files()
        await children.sweep()
        loop.remove_signal_handler(signal.SIGCHLD)

    asyncio.run(run())
    (record,) = [record for record in caplog.records if record.name != "asyncio"]  # of other tests' loops
    return f"{record.levelname} {record.getMessage()}"


@pytest.mark.parametrize(
    ("output", "build"),
    [
        ("version: 0.6.0 (build 11434, commit 5d1f1d2)\nbuilt with GNU 13.3.0 for Linux x86_64\n", 11434),
        ("version: 6000 (5d1f1d2)\nbuilt with cc (Ubuntu) 13 for x86_64-linux-gnu\n", 6000),
        ("ggml_cuda_init: found 1 CUDA devices:\n  Device 0: GPU\nversion: 9999 (abc)\n", 9999),
        ("version: 0.6.0-dev (build 0, commit unknown)\n", None),
        ("version: 0 (unknown)\n", None),
        ("error: invalid argument: --version\n", None),
        ("version: 12 monkeys", None),
        ("", None),
    ],
)
def test_the_build_is_parsed_from_what_is_printed(output: str, build: int | None) -> None:
    assert parse_build(output) == build


def test_an_older_build_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = TESTED_BUILD - 1
    binary = program(tmp_path, f"echo 'version: {old} (abc)' >&2")
    text = f"WARNING llama-server is b{old}, which is older than the tested b{TESTED_BUILD}: update it"
    assert logged(binary, caplog) == text


@pytest.mark.parametrize("build", [TESTED_BUILD, TESTED_BUILD + 1])
def test_a_tested_or_newer_build_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, build: int) -> None:
    assert logged(program(tmp_path, f"echo 'version: {build} (abc)'"), caplog) == f"INFO llama-server is b{build}"


@pytest.mark.parametrize("script", ["", "exit 1", "echo hello", "kill -9 $$", "sleep 600"])
def test_a_version_that_cannot_be_read_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    binary = program(tmp_path, script)
    text = f"WARNING the version of llama-server cannot be read ({binary} --version): b{TESTED_BUILD} is tested"
    assert logged(binary, caplog, timeout_s=0.1 if "sleep" in script else 20) == text


def test_a_program_that_cannot_be_executed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert logged("/none", caplog).startswith("WARNING the version of llama-server cannot be read (/none --version)")


def test_the_tested_build_is_that_of_the_image_the_tests_and_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"ARG LLAMA_BUILD=b{TESTED_BUILD}\n" in (ROOT / "Dockerfile").read_text()
    assert f"version={TESTED_BUILD}\n" in (TESTS / "e2e" / "get_llama_server.sh").read_text()
    assert f"b{TESTED_BUILD}" in (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    assert mock_backend.main(["--version"], {}) == 0
    assert parse_build(capsys.readouterr().out) == TESTED_BUILD
