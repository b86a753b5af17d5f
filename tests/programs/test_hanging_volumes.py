"""Every write and every look at a file hangs, and the three programs do not notice: /ping, the crash watch, SIGTERM.

Nothing is measured: each assertion holds while the calls are known to hang.
"""

import os
import signal
from http.client import HTTPConnection
from math import inf
from pathlib import Path

from support.boot import PATIENCE_S, Boot
from support.faults import Fault, Faults, make_faults
from support.together import aside

SECRET = "sk-alice-0123456789abcdef"
CALLS = ("write", "stat", "fstat", "fsync", "statvfs", "rename", "flock", "fcntl")
# The kernel's own file systems respond, and a socket is no file.
SPARED = ("/proc/*", "/sys/*", "socket:*", "anon_inode:*")
EVERYTHING_HANGS = [
    *(Fault(call, pattern) for call in CALLS for pattern in SPARED),
    *(Fault(call, wait_s=inf) for call in CALLS),
]
SETTINGS = {"KEYS_WATCH_SECONDS": "0.1", "DRAIN_TIMEOUT": "1"}


def settings_in(folder: Path) -> dict[str, str]:
    (folder / "data").mkdir()
    (folder / "data" / "api_keys.txt").write_text(f"alice:{SECRET}\n")
    return {"MODEL_HF": "user/repository", "USAGE_FILE": str(folder / "usage" / "usage.db"), **SETTINGS}


def chat(boot: Boot, secret: str) -> int:
    connection = HTTPConnection(boot.env["HOST"], int(boot.env["PORT"]), timeout=PATIENCE_S)
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", b"{}", headers)
        return connection.getresponse().status
    finally:
        connection.close()


def assert_served(boot: Boot, faults: Faults, hanging: tuple[str, str, int]) -> None:
    """Assert that the services answer while a call hangs."""
    faults.await_stalled(*hanging)
    for _ in range(3):
        assert boot.status("/ping") == 200
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        assert boot.status("/", port="PORT_HEALTH") == 200
    assert faults.stalled(*hanging) > 0


@aside
def test_hanging_volumes_and_a_hanging_reader_of_the_log_are_not_noticed(tmp_path: Path) -> None:
    faults = make_faults(tmp_path, spare="stub")
    settings = {**settings_in(tmp_path), **faults.env}
    with Boot(tmp_path, settings, covered=False, orders=["talkative"]) as boot:
        boot.await_line("gateway: the backend is ready")
        assert boot.status("/ready", port="PORT_HEALTH") == 200
        gateway, health, supervisor = boot.pid_of("gateway.py"), boot.pid_of("health_server.py"), boot.process.pid
        faults.set(*EVERYTHING_HANGS)
        # The keys file, the state file, standard output, the access log and the ledger, llama-server's log
        assert_served(boot, faults, ("stat", "api_keys", gateway))
        assert_served(boot, faults, ("stat", "state.json", gateway))
        assert_served(boot, faults, ("stat", "state.json", health))
        assert chat(boot, "sk-wrong-0123456789abcdef") == 401
        assert_served(boot, faults, ("write", "pipe:", gateway))
        assert chat(boot, SECRET) == 501  # of the stub
        assert_served(boot, faults, ("write", "api_access", gateway))
        assert_served(boot, faults, ("", "usage", gateway))
        assert_served(boot, faults, ("", "/logs/llama", supervisor))
        assert_served(boot, faults, ("write", "pipe:", supervisor))
        for pid in (gateway, health, supervisor):
            os.kill(pid, signal.SIGHUP)
        assert chat(boot, SECRET) == 501
        # The crash watch
        os.kill(boot.starts[0]["pid"], signal.SIGKILL)
        boot.until(lambda: len(boot.starts) >= 2)
        assert boot.status("/ping") == 200
        # The end, in spite of all these threads
        hanging = faults.stalled("", "", supervisor)
        boot.signal(signal.SIGTERM)
        assert boot.process.wait(PATIENCE_S) == 0
        assert hanging > 1
        assert faults.stalled("", "", supervisor) >= hanging


@aside
def test_volumes_that_hang_from_the_start_delay_no_service(tmp_path: Path) -> None:
    faults = make_faults(tmp_path, spare="stub")
    settings = {**settings_in(tmp_path), **faults.env}
    faults.set(
        *(Fault(call, f"*/{name}", wait_s=inf) for call in ("open", "stat") for name in ("logs/*", "api_keys.txt"))
    )
    with Boot(tmp_path, settings, covered=False) as boot:
        boot.await_line("gateway: the backend is ready")
        boot.await_ready()
        boot.await_line("WARNING gateway: keys: the keys file does not respond")
        for name in ("logs/llama", "logs/api_access", "api_keys"):
            assert faults.stalled("", name) > 0
        assert boot.status("/ping") == 200
        assert chat(boot, SECRET) == 503  # it may be a key
        faults.set()
        boot.await_line("gateway: keys: 1 in force")
        assert chat(boot, SECRET) == 501
        assert boot.stop() == 0
