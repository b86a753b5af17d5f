"""fd_limit.py: the limit is raised at start, and running out of file descriptors is logged briefly."""

import asyncio
import subprocess
import sys

import pytest

from core.fd_limit import AcceptErrorHandler
from support.boot import PATIENCE_S
from support.clock import Clock
from support.paths import SCRIPTS

RAISE = """
import logging, resource, sys
sys.path.insert(0, sys.argv[1])
from core import fd_limit
logging.basicConfig(stream=sys.stdout, format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
fd_limit.raise_fd_limit(100, int(sys.argv[4]))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "handshakes", "limit", "warned"),
    [
        (64, 4096, 0, 456, ""),
        (1000, 4096, 0, 1000, ""),
        (64, 4096, 100, 556, ""),
        (64, 128, 0, 128, "MAX_CONNECTIONS=100 may need 456 file descriptors, but"),
        (64, 128, 100, 128, "MAX_CONNECTIONS=100 may need 556 file descriptors with TLS, but"),
    ],
)
def test_the_limit_is_raised_as_far_as_needed_and_allowed(
    soft: int, hard: int, handshakes: int, limit: int, warned: str
) -> None:
    command = [sys.executable, "-c", RAISE, str(SCRIPTS), str(soft), str(hard), str(handshakes)]
    *logged, last = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout.splitlines()
    assert int(last) == limit
    assert len(logged) == bool(warned)
    assert warned in "".join(logged)


def test_failed_accepts_are_logged_once_a_minute_and_other_errors_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    loop = asyncio.new_event_loop()
    handle = AcceptErrorHandler(clock)
    for _ in range(100):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    clock.advance(60)
    handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    handle(loop, {"message": "a task failed"})
    loop.close()
    assert [record.name for record in caplog.records] == ["gateway", "gateway", "asyncio"]
