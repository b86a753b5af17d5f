"""Liveness and readiness for the platform, from the supervisor's state file. It never touches gateway or backend.

`/ping` and `/ready` tell the backend's state: 204 loading, 200 ready, 503 draining or dead. Any other path is 200 while
this process lives. One request a connection, one deadline for the whole of it, and where too many connections are open
the oldest makes room: an idle or slow client costs a probe nothing.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import config
import logs
import signals
from config import Config, ConfigError

HEAD_BYTES = 8192  # a browser's head fits; a probe's has about 100
HEAD_END = b"\r\n\r\n"
DEADLINE_S = 5.0
MAX_CONNECTIONS = 512  # with room below the usual limit of 1024 open files
EXIT_SETTINGS = 2
EXIT_CANNOT_START = 5
STATUS_OF_STATE = {"loading": 204, "ready": 200, "draining": 503, "dead": 503}
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}

log = logging.getLogger(__name__)


class State:
    """The state file's state, read again when the file has changed.

    Until the file is there the state is "loading", and without a path it stays so. Once it has been there, its absence
    is "dead": whoever wrote it is gone. A file that cannot be understood changes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._state = "loading"
        self._seen = False

    def now(self) -> str:
        if self._path is not None:
            try:
                self._look(self._path)
            except FileNotFoundError:
                self._state, self._stamp = "dead" if self._seen else "loading", None
            except (OSError, ValueError, LookupError, TypeError) as error:
                log.debug("the state file cannot be read: %r", error)
        return self._state

    def _look(self, path: Path) -> None:
        stat = path.stat()
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if stamp != self._stamp:
            state = json.loads(path.read_bytes())["state"]
            self._state = state if state in STATUS_OF_STATE else self._state
            self._stamp, self._seen = stamp, True


def answer(head: bytes, state: str, now_s: float) -> bytes:
    """Serialize the answer to a request's head. `now_s` is the time for the Date field, since the epoch."""
    line = re.match(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.[01]\r\n", head)
    if line is None:
        return serialize(400, "bad request", now_s)
    if line[1] not in (b"GET", b"HEAD"):
        return serialize(405, "method not allowed", now_s, "Allow: GET, HEAD\r\n")
    told = line[2].partition(b"?")[0] in (b"/ping", b"/ready")
    status, text = (STATUS_OF_STATE[state], state) if told else (200, "alive")
    return serialize(status, text, now_s, with_body=line[1] == b"GET")


def serialize(status: int, text: str, now_s: float, fields: str = "", *, with_body: bool = True) -> bytes:
    """One whole response; with_body says whether it may have one, as that to HEAD may not."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now_s))
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nDate: {date}\r\nCache-Control: no-store\r\nConnection: close\r\n"
    if status == 204:
        return f"{head}\r\n".encode()
    body = f"{text}\n"
    head += f"{fields}Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body * with_body).encode()


class HealthServer:
    def __init__(self, state: State, *, deadline_s: float = DEADLINE_S, max_connections: int = MAX_CONNECTIONS) -> None:
        self._state = state
        self._deadline_s = deadline_s
        self._max_connections = max_connections
        self._oldest_first: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port. Raises OSError where the address cannot be had."""
        self._server = await asyncio.start_server(
            self._accept, host, port, limit=HEAD_BYTES - len(HEAD_END), backlog=MAX_CONNECTIONS, reuse_address=True
        )
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: those that asyncio makes end in a traceback when they are cancelled (Python 3.11).
        if len(self._oldest_first) >= self._max_connections:
            oldest = next(iter(self._oldest_first))
            oldest.transport.abort()
            del self._oldest_first[oldest]
        self._oldest_first[writer] = asyncio.ensure_future(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Aborting ends every wait below, whichever it is.
        deadline = asyncio.get_running_loop().call_later(self._deadline_s, writer.transport.abort)
        try:
            writer.write(await self._answer(reader))
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # the client has left, was too slow, or made room
        finally:
            deadline.cancel()
            self._oldest_first.pop(writer, None)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(HEAD_END)
        except asyncio.LimitOverrunError:
            return serialize(431, "request header fields too large", time.time())
        return answer(head, self._state.now(), time.time())

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._oldest_first.values())
        for writer in self._oldest_first:
            writer.transport.abort()
        await asyncio.gather(*tasks)


async def serve(settings: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # is meant for the gateway
    server = HealthServer(State(settings.supervision.state_file))
    listen = settings.listen
    try:
        port = await server.start(listen.host, listen.port_health)
    except OSError as error:
        reason = error.strerror or str(error)
        log.error("cannot listen on %s port %d (HOST, PORT_HEALTH): %s", listen.host, listen.port_health, reason)
        return EXIT_CANNOT_START
    log.info("listening on %s port %d", listen.host, port)
    await stop.wait()
    await server.close()
    signals.ignore(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    # Until the loop has its own handlers: to be asked to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    words = "Liveness and readiness for the platform; the settings come by environment (docs/CONFIGURATION.md)."
    argparse.ArgumentParser(description=words).parse_args(argv)
    try:
        settings = config.load_config(os.environ)
    except ConfigError as error:
        for complaint in error.complaints:
            print(f"health: {complaint}", file=sys.stderr)
        return EXIT_SETTINGS
    logs.setup("health", settings.log.level, settings.log.format)
    return asyncio.run(serve(settings))


if __name__ == "__main__":
    sys.exit(main())
