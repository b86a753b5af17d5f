"""Ports that only their user has."""

import fcntl
import itertools
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

FIRST_PORT, BLOCK_PORTS, BLOCKS = 20000, 500, 24
_LOCKS: list[int] = []  # held as long as the process lives


def _ports() -> Iterator[int]:
    """Yield free ports below the range from which the kernel assigns ports, so that none is assigned before its use.

    They are those of a block that no other process of tests has: a port that a test will use again looks free between.
    """
    first = FIRST_PORT + _own_block() * BLOCK_PORTS
    for number in itertools.cycle(range(first, first + BLOCK_PORTS)):
        if _is_free(number):
            yield number


def _own_block() -> int:
    folder = Path(tempfile.gettempdir(), f"test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for number in range(BLOCKS):
        descriptor = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        _LOCKS.append(descriptor)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
    return os.getpid() % BLOCKS


def _is_free(port: int) -> bool:
    with socket.socket() as sock, suppress(OSError):
        sock.bind(("127.0.0.1", port))
        return True
    return False


_PORTS = _ports()
_PORTS_LOCK = threading.Lock()


def free_ports(count: int) -> list[int]:
    with _PORTS_LOCK:
        return list(itertools.islice(_PORTS, count))


def free_port() -> int:
    return free_ports(1)[0]


def reserved_port() -> socket.socket:
    """Return a socket on a free port of 127.0.0.1. It does not listen: connections are refused.

    A server that sets SO_REUSEADDR can listen on it. The kernel might assign a port of its own range to such a server
    of another test, although this socket has it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        with suppress(OSError):  # another run of the tests may have taken it in between
            sock.bind(("127.0.0.1", free_port()))
            return sock
