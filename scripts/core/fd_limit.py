"""The process's limit on file descriptors: raise it at start, and log briefly if it is reached."""

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable
from typing import Any

log = logging.getLogger("gateway")

_SPARE = 256  # files, listeners, probes, connections that are closing
_ACCEPT_FAILED = "socket.accept() out of system resource"  # asyncio's message
_LOG_INTERVAL_S = 60.0


def raise_fd_limit(connections: int, handshakes: int = 0) -> None:
    """Raise the limit so that each client connection can have one to the backend; warn if that is impossible.

    `handshakes` counts connections whose TLS handshake is in progress.
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
        message = (
            "MAX_CONNECTIONS=%d may need %d file descriptors%s, but the limit is %d:"
            " raise the limit (ulimit -n) or lower MAX_CONNECTIONS"
        )
        log.warning(message, connections, wanted, " with TLS" if handshakes else "", soft)


class AcceptErrorHandler:
    """An exception handler for the event loop that logs failed accepts once a minute.

    When file descriptors run out, asyncio reports each connection that it could not accept, with a traceback, each time
    it tries. All other errors go to the loop's default handler. `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged_s: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") != _ACCEPT_FAILED:
            loop.default_exception_handler(context)
            return
        now_s = self._clock()
        if self._logged_s is None or now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            log.error("out of file descriptors: new connections wait (%s)", context.get("exception"))
