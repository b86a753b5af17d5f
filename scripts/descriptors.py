"""File descriptors: enough of them for as many connections as the settings allow, and few words where they run out."""

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable
from typing import Any

log = logging.getLogger("gateway")

_SPARE = 256  # files, listeners, probes, connections on their way out
_SHORTAGE = "socket.accept() out of system resource"  # asyncio's words
_QUIET_S = 60.0


def make_room(connections: int, handshakes: int = 0) -> None:
    """Raise the process's own limit so that each connection may have one to the backend; warn where it cannot be.

    `handshakes`: connections that are none yet.
    """
    wanted = 2 * connections + handshakes + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        words = (
            "MAX_CONNECTIONS=%d may need %d file descriptors%s and the limit is %d: raise it (ulimit -n), or lower that"
        )
        log.warning(words, connections, wanted, " with TLS" if handshakes else "", soft)


class Shortage:
    """An exception handler for the loop that tells once a minute that descriptors have run out.

    asyncio tells of each connection that it could not accept, with a traceback, as often as it tries.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told_s: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") != _SHORTAGE:
            loop.default_exception_handler(context)
            return
        now_s = self._clock()
        if self._told_s is None or now_s - self._told_s >= _QUIET_S:
            self._told_s = now_s
            log.error("out of file descriptors: new connections wait (%s)", context.get("exception"))
