#!/usr/bin/env python3
"""The gateway's process: it listens, keeps the connections, and ends in order.

`python3 gateway.py` reads its settings from the environment (docs/CONFIGURATION.md); `--check-config` prints them and
exits. The supervisor runs it; so may anybody who has a llama-server already.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until it listens: it would look for garbage a dozen times, where all that is made is there to stay

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import cast

import config
import descriptors
import logs
import signals
import turns
from client_wire import ClientWire
from config import Config, ConfigError
from connection import Connection
from descriptors import Shortage
from errors import DRAINING, GatewayError, PeerGone
from exchange import Stage
from parts import Parts
from tls import Handshakes
from turns import Outbox
from waiting import end_tasks

log = logging.getLogger("gateway")

EXIT_SETTINGS = 2
EXIT_CANNOT_START = 5
_BACKLOG = 4096
_ACCEPTS = 64  # at once: asyncio takes its backlog for that, too, and goes on so often where nothing can be accepted
_TURN_AWAY_S = 0.1


class Gateway:
    """Every client's connection, from accept to the last byte."""

    def __init__(self, parts: Parts, parent: int | None = None) -> None:
        self._parts = parts
        self._parent = parent
        self._open: set[ClientWire] = set()  # every connection, until its last byte has gone
        self._empty = asyncio.Event()  # set while draining, once no connection is left
        self._ended = asyncio.Event()
        self._turned_away = False
        self._server: asyncio.Server | None = None
        most, seconds = parts.config.queue.max_connections, parts.config.timeouts.client_header_s
        self._handshakes = None if parts.tls is None else Handshakes(parts.tls, seconds, most)
        self._background: list[asyncio.Task[None]] = []
        parts.drain = self.drain

    async def start(self) -> int:
        """Listen, and return the port. Raises OSError where the address cannot be had."""
        listen = self._parts.config.listen
        self._server = await asyncio.start_server(
            self._accept, listen.host, listen.port, backlog=_ACCEPTS, reuse_address=True
        )
        for listener in self._server.sockets:
            with socket.socket(fileno=os.dup(listener.fileno())) as copy:
                copy.listen(_BACKLOG)
        self._parts.deadlines.start()
        self._background = [
            asyncio.ensure_future(self._parts.readiness.watch()),
            asyncio.ensure_future(self._parts.watch_keys()),
        ]
        return int(self._server.sockets[0].getsockname()[1])

    # --- Connections ---

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._handshakes is None:
            self._serve(writer, cast(asyncio.Transport, writer.transport))
        else:
            self._handshakes.begin(writer, self._serve)

    def _serve(self, writer: asyncio.StreamWriter, transport: asyncio.Transport, received: bytes = b"") -> None:
        if self._turned_away:  # its TLS handshake has taken that long
            transport.abort()
            return
        client = ClientWire(writer, transport, self._parts.deadlines, self._parts.outbox, self._parts.config.limits)
        client.on_lost = self._lost
        if len(self._open) >= self._parts.config.queue.max_connections:
            self._make_room(client)
        self._open.add(client)
        Connection(self._parts, client).begin()
        if received:
            client.data_received(received)

    def _make_room(self, newcomer: ClientWire) -> None:
        """At the bound the connection that has idled longest goes; where none idles, the newcomer has public routes."""
        for client in self._parts.idle:
            if not client.has_unread and not client.transport.get_write_buffer_size():
                del self._parts.idle[client]
                client.interrupt(PeerGone())
                return
        self._parts.public_only.add(newcomer)

    def _lost(self, client: ClientWire) -> None:
        self._open.discard(client)
        if self._parts.draining and not self._open:
            self._empty.set()

    # --- The end ---

    def drain(self) -> None:
        """Refuse newcomers and who waits, let streams finish within DRAIN_TIMEOUT."""
        if self._parts.draining:
            return
        log.info("draining: %d connections, %d requests at work", len(self._parts.clients), self._parts.gate.active)
        self._parts.draining = True
        self._tell_parent()
        for client in tuple(self._parts.clients):
            if client.request is not None and client.request.stage is Stage.QUEUED:
                client.interrupt(GatewayError(DRAINING))
        self._background.append(asyncio.ensure_future(self._finish()))

    def _tell_parent(self) -> None:
        """Say that the end has begun to who started this and wants to know; never to who has come in its place."""
        if self._parent and self._parent == os.getppid():
            with contextlib.suppress(OSError):
                os.kill(self._parent, signal.SIGUSR1)

    async def _finish(self) -> None:
        """Wait for what is under way; cut what is left when the time is up."""
        await self._turn_away()
        if self._open:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), self._parts.config.supervision.drain_timeout_s)
        for client in tuple(self._parts.clients):
            client.interrupt(GatewayError(DRAINING))
        await asyncio.sleep(0)  # the last bytes leave in the loop's next round
        self._ended.set()

    async def _turn_away(self) -> None:
        """Stop listening without a loss: a connection that has just been made may carry a request already.

        Such a request is answered with 503, which may be repeated elsewhere, instead of being reset.
        """
        await asyncio.sleep(_TURN_AWAY_S)
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(_TURN_AWAY_S)
        self._turned_away = True
        for client in tuple(self._parts.idle):
            if not client.has_unread:
                client.interrupt(PeerGone())

    def stop(self) -> None:
        """End at once (a second signal)."""
        self._ended.set()

    async def run_until_ended(self) -> None:
        await self._ended.wait()

    async def close(self) -> None:
        """Give everything back; nothing is left running."""
        if self._server is not None:
            self._server.close()
        await end_tasks(self._background)
        if self._handshakes is not None:
            await self._handshakes.end()
        for client in tuple(self._open):
            client.hang_up()
        await self._parts.close()


# --- The process ---


async def serve(settings: Config, outbox: Outbox, parent: int | None = None) -> int:
    """Run the gateway until it is told to stop; return the exit status."""
    try:
        parts = Parts(settings, outbox=outbox)
    except ConfigError as error:
        for complaint in error.complaints:
            log.error("%s", complaint)
        return EXIT_SETTINGS
    gateway = Gateway(parts, parent)
    parts.reload()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(Shortage(time.monotonic))
    most = settings.queue.max_connections
    descriptors.make_room(most, handshakes=0 if parts.tls is None else most)

    def terminate() -> None:
        gateway.stop() if parts.draining else gateway.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate)
    loop.add_signal_handler(signal.SIGHUP, parts.reload)
    try:
        port = await gateway.start()
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", settings.listen.host, settings.listen.port, error.strerror)
        await gateway.close()
        return EXIT_CANNOT_START
    # Requests leave no cycles behind, so the collector need not look often. But each closed transport of asyncio's is
    # one, of five objects and 2 KiB: 400 of them at most.
    gc.freeze()
    gc.set_threshold(2_000, 20, 20)
    gc.enable()
    log.info("version %s listens on %s port %d", parts.version, settings.listen.host, port)
    try:
        await gateway.run_until_ended()
    finally:
        await gateway.close()
        signals.ignore(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    log.info("stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The gateway in front of one llama-server.")
    parser.add_argument(
        "--check-config", action="store_true", help="print every setting and where it comes from, then exit"
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="the supervisor, which SIGUSR1 tells when a drain begins"
    )
    arguments = parser.parse_args(argv)
    if arguments.check_config:
        return config.check_config(os.environ, sys.stdout)
    try:
        settings = config.load_config(os.environ)
    except ConfigError as error:
        for complaint in error.complaints:
            print(f"gateway: {complaint}", file=sys.stderr)
        return EXIT_SETTINGS
    logs.setup("gateway", settings.log.level, settings.log.format)
    for warning in settings.warnings:
        log.warning("%s", warning)
    with contextlib.suppress(KeyboardInterrupt):
        outbox = Outbox()
        return turns.run(serve(settings, outbox, arguments.parent), turns.new_loop(outbox))
    return 0


if __name__ == "__main__":
    sys.exit(main())
