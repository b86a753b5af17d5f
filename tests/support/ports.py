"""Ports that only their user has."""

import itertools
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

FIRST_PORT, PORTS = 20000, 12000


def _ports() -> Iterator[int]:
    """Yield free ports below the range from which the kernel assigns ports, so that none is assigned before its use.

    They come in an order of this process's own: the two halves of the suite seldom take the same one at the same time.
    """
    ports = list(range(FIRST_PORT, FIRST_PORT + PORTS))
    random.shuffle(ports)
    yield from filter(_is_free, itertools.cycle(ports))


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
