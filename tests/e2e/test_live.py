"""tests/live/run.sh, the walk through a machine, with a real llama-server and a tiny model."""

import os
import re
import subprocess
from pathlib import Path

from support.paths import ROOT

SCRIPT = ROOT / "tests" / "live" / "run.sh"


def live(folder: Path, *options: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)} | settings
    command = [str(SCRIPT), *options]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)


def test_every_step_passes_and_the_report_is_written(llama_bin: str, model: Path, tmp_path: Path) -> None:
    settings = {"LLAMA_BIN": llama_bin, "MODEL_PATH": str(model), "PARALLEL": "2", "CTX": "8192", "THREADS": "1"}
    more = {"EXTRA_ARGS": "--context-shift --no-webui", "NGL": "0"}
    done = live(tmp_path, "--report", str(tmp_path / "report.md"), **settings, **more)
    assert (done.returncode, "**failed**" in done.stdout) == (0, False), done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report == done.stdout
    assert report.endswith("Every step passed.\n")
    steps = re.findall(r"^\| ([^|]+) \| passed \|", report, re.MULTILINE)
    assert {"start", "chat", "stream", "wrong key", "cancel", "usage", "drain"} <= set(steps)
    assert list(tmp_path.glob("live.*")) == []


def test_what_the_check_refuses_ends_it_before_the_start(tmp_path: Path) -> None:
    done = live(tmp_path, MAX_HEADERS="many")
    assert done.returncode == 2
    assert "MAX_HEADERS" in done.stderr
    assert "| settings | **failed** | exit status 2 |" in done.stdout


def test_a_start_that_fails_is_in_the_report(model: Path, tmp_path: Path) -> None:
    done = live(tmp_path, MODEL_PATH=str(model), LLAMA_BIN="/bin/false", MAX_RESTARTS="0")
    assert done.returncode == 1
    assert "| start | **failed** | not ready after" in done.stdout
    assert "llama-server ended with exit status 1" in done.stdout
