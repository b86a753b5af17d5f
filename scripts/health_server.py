"""Liveness and readiness for the platform, from the supervisor's state file. It never contacts gateway or backend.

`/ping` and `/ready` report the backend's state, the latter in any spelling: 204 loading, 200 ready, 503 draining or
dead. Any other path is 200 while this process lives. A connection serves one request, within one deadline. At
MAX_CONNECTIONS the oldest connection is closed, so idle and slow clients cannot delay a probe.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from core import signals

if __name__ == "__main__":
    signals.ignore(*signals.STRAY)

import argparse
import asyncio
import logging
import posixpath
import re
import signal
import time
from collections.abc import Sequence
from urllib.parse import unquote

from config.loader import load_config
from config.settings import Config, ConfigError
from core import logs
from core.installation import add_version, shown
from core.off_loop import finishes_within, run_off_loop
from core.state_file import DEAD, DRAINING, LOADING, READY, StateReader

HEAD_BYTES = 8192  # a browser's head fits; a probe's has about 100
HEAD_END = b"\r\n\r\n"
DEADLINE_S = 5.0
LOOK_S = 0.5  # for the state file: probes often wait no longer than a second
MAX_CONNECTIONS = 512  # well below the usual limit of 1024 open files
EXIT_SETTINGS = 2
EXIT_CANNOT_START = 5
STATUS_OF_STATE = {LOADING: 204, READY: 200, DRAINING: 503, DEAD: 503}
READY_NAMES = frozenset(("ready", "readyz", "readiness"))
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}

log = logging.getLogger(__name__)


def respond(head: bytes, state: str, now_s: float) -> bytes:
    """Serialize the response to a request head. `now_s` is the time for the Date field, in seconds since the epoch."""
    line = re.match(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.[01]\r\n", head)
    if line is None:
        return serialize(400, "bad request", now_s)
    if line[1] not in (b"GET", b"HEAD"):
        return serialize(405, "method not allowed", now_s, "Allow: GET, HEAD\r\n")
    status, text = (STATUS_OF_STATE[state], state) if is_probe(line[2].decode()) else (200, "alive")
    return serialize(status, text, now_s, with_body=line[1] == b"GET")


def is_probe(target: str) -> bool:
    """Whether a request target asks for the state: /ping, or /ready in any spelling.

    A platform whose probe is spelled in another way would take the 200 of another path for ready.
    """
    path = re.sub(r"[?#].*", "", re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", "", target))
    return path == "/ping" or posixpath.normpath("/" + unquote(path)).strip("/").lower() in READY_NAMES


def serialize(status: int, text: str, now_s: float, fields: str = "", *, with_body: bool = True) -> bytes:
    """Serialize a response. `with_body` is false for a HEAD request, whose response has no body."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now_s))
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nDate: {date}\r\nCache-Control: no-store\r\nConnection: close\r\n"
    if status == 204:
        return f"{head}\r\n".encode()
    body = f"{text}\n"
    head += f"{fields}Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body * with_body).encode()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """Read a request head up to its empty line. It is empty, which `respond` refuses, if a line ends without CRLF.

    Raises LimitOverrunError, and IncompleteReadError if the client leaves before.
    """
    head = b""
    while not head.endswith(HEAD_END):
        head += await reader.readuntil(b"\n")
        if len(head) > HEAD_BYTES:
            raise asyncio.LimitOverrunError("the head is too long", len(head))
        if not head.endswith(b"\r\n"):
            return b""  # its end may never come: the client may send bare LFs only
    return head


class HealthServer:
    """The listening socket and its connections. `deadline_s` bounds each connection from accept to close."""

    def __init__(
        self, state: StateReader, *, deadline_s: float = DEADLINE_S, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self._state = state
        self._look: asyncio.Future[str] | None = None
        self._hangs = False
        self._deadline_s = deadline_s
        self._max_connections = max_connections
        self._oldest_first: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. Raises OSError if the address cannot be bound."""
        self._server = await asyncio.start_server(
            self._accept, host, port, limit=HEAD_BYTES - len(HEAD_END), backlog=MAX_CONNECTIONS, reuse_address=True
        )
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine: a task that asyncio makes logs a traceback when it is cancelled (Python 3.11).
        if len(self._oldest_first) >= self._max_connections:
            oldest = next(iter(self._oldest_first))
            oldest.transport.abort()
            del self._oldest_first[oldest]
        self._oldest_first[writer] = asyncio.ensure_future(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Aborting the transport ends every wait below.
        deadline = asyncio.get_running_loop().call_later(self._deadline_s, writer.transport.abort)
        try:
            writer.write(await self._respond(reader))
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # the client left, missed the deadline or was the oldest
        finally:
            deadline.cancel()
            self._oldest_first.pop(writer, None)

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await read_head(reader)
        except asyncio.LimitOverrunError:
            return serialize(431, "request header fields too large", time.time())
        return respond(head, await self._current_state(), time.time())

    async def _current_state(self) -> str:
        """Read the state file off the loop. While its volume hangs, the state is the one that was read last."""
        if self._look is None or self._look.done():
            self._look, self._hangs = run_off_loop(self._state.read), False
        if not self._hangs:
            self._hangs = not await finishes_within(self._look, LOOK_S)
        return self._state.state

    async def close(self) -> None:
        """Stop listening and abort all open connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._oldest_first.values())
        for writer in self._oldest_first:
            writer.transport.abort()
        await asyncio.gather(*tasks)


async def serve(settings: Config) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals.STOP:
        loop.add_signal_handler(number, stop.set)
    signals.quieten_wakeups()
    signals.release_stops()
    # A state file that was removed means that the supervisor has gone.
    server = HealthServer(StateReader(settings.supervision.state_file, when_removed=DEAD))
    listen = settings.listen
    try:
        port = await server.start(listen.host, listen.port_health)
    except OSError as error:
        reason = error.strerror or str(error)
        log.error("error: cannot listen on %s port %d (HOST, PORT_HEALTH): %s", listen.host, listen.port_health, reason)
        return EXIT_CANNOT_START
    log.info("listening on %s port %d", listen.host, port)
    await stop.wait()
    await server.close()
    signals.ignore(*signals.STOP, signal.SIGHUP)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    # A stop signal before the event loop has its handlers is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    description = "Liveness and readiness for the platform. Settings are environment variables (docs/CONFIGURATION.md)."
    parser = argparse.ArgumentParser(prog=shown("health_server"), description=description)
    add_version(parser)
    parser.parse_args(argv)
    try:
        settings = load_config(os.environ)
    except ConfigError as error:
        for complaint in error.complaints:
            print(f"health: error: {complaint}", file=sys.stderr)
        return EXIT_SETTINGS
    signals.hold_stops()
    logs.setup("health", settings.log.level, settings.log.format)
    return asyncio.run(serve(settings))


if __name__ == "__main__":
    sys.exit(main())
