"""File descriptors that run out: the limit is raised in time, and the log says it in few lines."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from descriptors import Shortage
from support.clock import Clock

SCRIPTS = Path(__file__).parent.parent / "scripts"
RAISE = """
import logging, resource, sys
sys.path.insert(0, sys.argv[1])
import descriptors
logging.basicConfig(stream=sys.stdout, format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
descriptors.make_room(100, int(sys.argv[4]))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "handshakes", "limit", "warned"),
    [
        (64, 4096, 0, 456, ""),
        (1000, 4096, 0, 1000, ""),
        (64, 4096, 100, 556, ""),
        (64, 128, 0, 128, "MAX_CONNECTIONS=100 may need 456 file descriptors and"),
        (64, 128, 100, 128, "MAX_CONNECTIONS=100 may need 556 file descriptors with TLS and"),
    ],
)
def test_the_limit_is_raised_as_far_as_it_is_needed_and_may_be(
    soft: int, hard: int, handshakes: int, limit: int, warned: str
) -> None:
    command = [sys.executable, "-c", RAISE, str(SCRIPTS), str(soft), str(hard), str(handshakes)]
    *told, last = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    assert int(last) == limit
    assert len(told) == bool(warned)
    assert warned in "".join(told)


def test_a_shortage_is_told_once_a_minute_and_all_else_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    loop = asyncio.new_event_loop()
    tell = Shortage(clock)
    for _ in range(100):
        tell(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    clock.advance(60)
    tell(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    tell(loop, {"message": "a task failed"})
    loop.close()
    assert [record.name for record in caplog.records] == ["gateway", "gateway", "asyncio"]
