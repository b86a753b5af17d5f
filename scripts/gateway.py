#!/usr/bin/env python3
"""The gateway's process: it listens, drains and ends.

`python3 gateway.py` reads its settings from the environment (docs/CONFIGURATION.md); `--check-config` prints them
and checks what a start needs. The supervisor runs it; it can also run by itself in front of a llama-server.
"""

import gc
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from core import signals

if __name__ == "__main__":
    signals.ignore(*signals.STRAY)
    gc.disable()  # until it listens: all that is made before then stays, so a collection would find nothing

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from accounting.request_record import Stage
from config.loader import load_config
from config.settings import Config, ConfigError
from core import fd_limit, logs
from core.errors import DRAINING, GatewayError
from core.fd_limit import AcceptErrorHandler
from core.installation import add_version, shown, version
from core.off_loop import finishes_within
from core.tasks import end_tasks
from proxy.app import App
from transport import write_batching
from transport.tcp import keep_alive
from transport.tls import Handshakes
from transport.write_batching import WriteBatcher

log = logging.getLogger("gateway")

EXIT_SETTINGS = 2
EXIT_CANNOT_START = 5
_BACKLOG = 4096
# Connections accepted at once: asyncio takes its `backlog` for that, and tries as often if accepting fails.
_ACCEPTS = 64
_STOP_LISTENING_S = 0.1
_AGAIN_S = 1.0  # after which a loop that has failed begins again
# How long the start waits for the keys: a volume that hangs must not keep the gateway from answering.
FIRST_RELOAD_S = 1.0


class Gateway:
    """The listener of an App, and its end."""

    def __init__(
        self,
        app: App,
        config: Config,
        supervisor: socket.socket | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """`supervisor` is a socket that only the supervisor reads: a drain is reported on it; None without one.

        `listener` is a socket that listens already; without one the gateway opens its own.
        """
        self._app = app
        self._config = config
        self._supervisor = supervisor
        self._listener = listener
        self._ended = asyncio.Event()
        self._refusing = False
        self._server: asyncio.Server | None = None
        most, seconds = config.queue.max_connections, config.timeouts.client_header_s
        self.handshakes = None if app.tls is None else Handshakes(app.tls, seconds, most)
        if self.handshakes is not None:
            app.ticker.add_listener(self.handshakes.gave_way.on_tick)
        self._background: list[asyncio.Task[None]] = []
        app.lifecycle.on_drain = self._begin_drain

    async def start(self) -> int:
        """Listen, and return the port. Raises OSError if the address cannot be used."""
        listen = self._config.listen
        if self._listener is not None:
            self._server = await asyncio.start_server(self._accept, sock=self._listener, backlog=_ACCEPTS)
        else:
            self._server = await asyncio.start_server(
                self._accept, listen.host, listen.port, backlog=_ACCEPTS, reuse_address=True
            )
        for listener in self._server.sockets:
            with socket.socket(fileno=os.dup(listener.fileno())) as copy:
                copy.listen(_BACKLOG)
                keep_alive(copy)
        self._app.ticker.start()
        self._run_beside(self._app.readiness.watch)
        self._run_beside(self._app.watch_keys)
        if self._app.models is not None:
            self._run_beside(self._app.models.watch)
            self._run_beside(self._app.models.listen)
        return int(self._server.sockets[0].getsockname()[1])

    def _run_beside(self, work: Callable[[], Awaitable[None]]) -> None:
        self._background.append(asyncio.ensure_future(_keep_up(work)))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.handshakes is None:
            self._serve(writer, cast(asyncio.Transport, writer.transport))
        else:
            self.handshakes.begin(writer, self._serve)

    def _serve(self, writer: asyncio.StreamWriter, transport: asyncio.Transport, received: bytes = b"") -> None:
        if self._refusing:  # the TLS handshake took until now
            transport.abort()
        else:
            self._app.sessions.open(writer, transport, received)

    # --- The end ---

    def _begin_drain(self) -> None:
        """Refuse new and queued requests, let the others finish within DRAIN_TIMEOUT."""
        app = self._app
        log.info("draining: %d connections, %d requests in progress", app.sessions.open_count, app.numbers.active)
        self._report_drain()
        app.sessions.cancel_waits(GatewayError(DRAINING), Stage.QUEUED)
        app.viewers.end()
        self._run_beside(self._finish)

    def _report_drain(self) -> None:
        """Report the drain to the supervisor, before the port is closed."""
        if self._supervisor is not None:
            with contextlib.suppress(OSError):
                self._supervisor.send(b"drain")

    async def _finish(self) -> None:
        """Wait for the requests in progress; cut those that are left when the time is up."""
        await self._stop_listening()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._app.sessions.wait_empty(), self._config.supervision.drain_timeout_s)
        self._app.sessions.cancel_waits(GatewayError(DRAINING))
        await asyncio.sleep(0)  # the last bytes leave in the loop's next iteration
        self._ended.set()

    async def _stop_listening(self) -> None:
        """Stop listening without losing a request: a connection that has just been made may carry one already.

        Such a request gets 503, which may be repeated elsewhere, instead of a reset.
        """
        await asyncio.sleep(_STOP_LISTENING_S)
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(_STOP_LISTENING_S)
        self._refusing = True
        self._app.sessions.close_idle()

    def stop(self) -> None:
        """End at once (a second signal)."""
        self._ended.set()

    async def run_until_ended(self) -> None:
        await self._ended.wait()

    async def close(self) -> None:
        """Release everything; nothing is left running."""
        if self._server is not None:
            self._server.close()
        await end_tasks(self._background)
        if self.handshakes is not None:
            await self.handshakes.end()
        self._app.sessions.hang_up()
        await self._app.close()


async def _keep_up(work: Callable[[], Awaitable[None]]) -> None:
    """Run what nothing waits for, so that a fault of it would stay unseen. After one it begins again."""
    while True:
        try:
            return await work()
        except Exception:
            log.exception("a part of the gateway has failed; it begins again in %g s", _AGAIN_S)
        await asyncio.sleep(_AGAIN_S)


# --- The process ---


async def serve(
    config: Config,
    batcher: WriteBatcher,
    supervisor: socket.socket | None = None,
    listener: socket.socket | None = None,
) -> int:
    """Run the gateway until a signal ends it; return the exit status."""
    try:
        app = App(config, batcher=batcher)
    except ConfigError as error:
        for complaint in error.complaints:
            log.error("error: %s", complaint)
        return EXIT_SETTINGS
    gateway = Gateway(app, config, supervisor, listener)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(AcceptErrorHandler(time.monotonic))
    most = config.queue.max_connections
    fd_limit.raise_fd_limit(most, handshakes=0 if app.tls is None else most)

    def terminate() -> None:
        gateway.stop() if app.lifecycle.draining else app.lifecycle.drain()

    for number in signals.STOP:
        loop.add_signal_handler(number, terminate)
    signals.on_hangup(loop, app.reload_soon)
    if not await finishes_within(asyncio.ensure_future(app.reload()), FIRST_RELOAD_S):
        log.warning("keys: the keys file does not respond; requests get 503 until it has been read")
    listen = config.listen
    try:
        port = await gateway.start()
    except OSError as error:
        log.error("error: cannot listen on %s port %d: %s", listen.host, listen.port, error.strerror)
        await gateway.close()
        return EXIT_CANNOT_START
    # Requests leave no cycles, so the collector need not run often. But each closed asyncio transport is one, of five
    # objects and 2 KiB: 400 of them at most.
    gc.freeze()
    gc.set_threshold(2_000, 20, 20)
    gc.enable()
    log.info("version %s listens on %s port %d", version(), listen.host, port)
    try:
        await gateway.run_until_ended()
    finally:
        await gateway.close()
        signals.ignore(*signals.STOP, signal.SIGHUP)
    log.info("stopped")
    return 0


def inherited_listener(fd: int) -> socket.socket:
    """Return the socket of a file descriptor as an option's value. Raises ArgumentTypeError if it does not listen."""
    try:
        listener = socket.socket(fileno=fd)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.detach()
            raise argparse.ArgumentTypeError(f"file descriptor {fd} is not a socket that listens")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"file descriptor {fd}: {error.strerror}") from None
    os.set_inheritable(fd, False)
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=shown("gateway"), description="The gateway in front of one llama-server.")
    parser.add_argument(
        "--check-config", action="store_true", help="print every setting and its source, check what a start needs, exit"
    )
    parser.add_argument(
        "--drain-socket", type=int, metavar="FD", help="a socket from the supervisor, for the report of a drain"
    )
    parser.add_argument(
        "--listen-fd",
        type=lambda text: inherited_listener(int(text)),
        metavar="FD",
        help="a file descriptor that listens already, in place of HOST and PORT",
    )
    add_version(parser)
    arguments = parser.parse_args(argv)
    if arguments.check_config:
        from boot.start_check import check_start  # noqa: PLC0415 - a gateway that serves needs nothing of boot/

        return check_start(os.environ, sys.stdout, gateway_alone=True)
    try:
        settings = load_config(os.environ)
    except ConfigError as error:
        for complaint in error.complaints:
            print(f"gateway: error: {complaint}", file=sys.stderr)
        return EXIT_SETTINGS
    logs.setup("gateway", settings.log.level, settings.log.format)
    for warning in settings.warnings:
        log.warning("%s", warning)
    with contextlib.suppress(KeyboardInterrupt):
        batcher = WriteBatcher()
        supervisor = None if arguments.drain_socket is None else socket.socket(fileno=arguments.drain_socket)
        served = serve(settings, batcher, supervisor, arguments.listen_fd)
        return write_batching.run(served, write_batching.new_loop(batcher))
    return 0


if __name__ == "__main__":
    sys.exit(main())
