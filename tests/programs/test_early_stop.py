"""A stop signal while a program makes its event loop, which has no handlers yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import SCRIPTS
from support.ports import free_ports

PATIENCE_S = 300.0
# Runs a program. The signal comes when the loop is half made.
SIGNALLED = """
import os, runpy, signal, socket, sys
sys.argv[:], number = sys.argv[1:2], signal.Signals[sys.argv[2]]
make = socket.socketpair
def make_and_signal(*args):
    socket.socketpair = make
    os.kill(os.getpid(), number)
    return make(*args)
socket.socketpair = make_and_signal
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("program", ["health_server.py", "supervisor.py"])
def test_it_ends_with_0_and_no_traceback(tmp_path: Path, program: str, number: str) -> None:
    ports = zip(("PORT", "PORT_HEALTH", "PORT_BACKEND"), map(str, free_ports(3)), strict=True)
    folders = {"DATA_DIR": str(tmp_path), "STATE_FILE": str(tmp_path / "state.json")}
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(SCRIPTS / program), number],
        env={"PATH": os.environ["PATH"], "HOST": "127.0.0.1", "MOCK_BACKEND": "true", **folders, **dict(ports)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Traceback" not in done.stdout
