#!/usr/bin/env python3
"""The gateway's process: it listens, keeps the connections, and ends in order.

`python3 gateway.py` reads its settings from the environment (docs/CONFIGURATION.md); `--check-config` prints them and
exits. The supervisor runs it; so may anybody who has a llama-server already.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import ssl
import sys
from collections.abc import Sequence

import config
import logs
from config import Config, ConfigError
from errors import DRAINING, TOO_MANY_CONNECTIONS, GatewayError, PeerGone
from exchange import Stage
from parts import Parts
from request import Request
from waiting import end_tasks
from wire import ClientWire

log = logging.getLogger("gateway")

EXIT_SETTINGS = 2
EXIT_CANNOT_START = 5
_BACKLOG = 4096
_TURN_AWAY_S = 0.1
_PUBLIC_ONLY_CONNECTIONS = 16


class Gateway:
    """Every client's connection, from accept to close; what happens to a request is `Request`'s."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._open: set[ClientWire] = set()  # every connection, until its last byte has gone
        self._idle: dict[ClientWire, None] = {}  # connections between requests, the longest idle first
        self._empty = asyncio.Event()  # set while draining, once no connection is left
        self._ended = asyncio.Event()
        self._turned_away = False
        self._server: asyncio.Server | None = None
        self._background: list[asyncio.Task[None]] = []
        parts.drain = self.drain

    async def start(self) -> int:
        """Listen, and return the port. Raises OSError where the address cannot be had."""
        listen = self._parts.config.listen
        tls = self._parts.tls
        self._server = await asyncio.start_server(
            self._accept,
            listen.host,
            listen.port,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=self._parts.config.timeouts.client_header_s if tls else None,
            reuse_address=True,
        )
        self._parts.deadlines.start()
        self._background = [
            asyncio.ensure_future(self._parts.readiness.watch()),
            asyncio.ensure_future(self._parts.watch_keys()),
        ]
        return int(self._server.sockets[0].getsockname()[1])

    # --- Connections ---

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._turned_away:  # its TLS handshake has taken that long
            writer.transport.abort()
            return
        client = ClientWire(writer, self._parts.deadlines, self._parts.config.limits)
        client.on_lost = self._lost
        if len(self._open) >= self._parts.config.queue.max_connections:
            self._make_room(client)
        self._open.add(client)
        self._parts.exchanges[client] = None
        client.converse(self._serve(client))

    def _make_room(self, newcomer: ClientWire) -> None:
        """At the bound the connection that has idled longest goes; where none idles, the newcomer has public routes."""
        for client in self._idle:
            if not client.has_unread:
                del self._idle[client]
                client.interrupt(PeerGone())
                return
        self._parts.public_only.add(newcomer)

    async def _serve(self, client: ClientWire) -> None:
        """Serve one connection's requests, in order."""
        parts = self._parts
        timeouts = parts.config.timeouts
        idle_s = timeouts.client_header_s
        try:
            if len(parts.public_only) > _PUBLIC_ONLY_CONNECTIONS and client in parts.public_only:
                raise GatewayError(TOO_MANY_CONNECTIONS)
            while True:
                self._idle[client] = None
                head = await client.read_head(idle_s, timeouts.client_header_s)
                del self._idle[client]
                request = Request(parts, client, head)
                parts.exchanges[client] = request.exchange
                if not await request.run(head):
                    request.close()
                    return
                parts.exchanges[client] = None
                idle_s = timeouts.keepalive_s
                del head, request  # an idle connection holds nothing of its last request
        except GatewayError as error:
            self._refuse(client, error.with_traceback(None))
        except PeerGone as left:
            left.with_traceback(None)
            self._leave(client)
        finally:
            self._forget(client)

    def _forget(self, client: ClientWire) -> None:
        self._idle.pop(client, None)
        self._parts.public_only.discard(client)
        del self._parts.exchanges[client]

    def _lost(self, client: ClientWire) -> None:
        self._open.discard(client)
        if self._parts.draining and not self._open:
            self._empty.set()

    def _refuse(self, client: ClientWire, error: GatewayError) -> None:
        """Answer what never became a request."""
        request = Request(self._parts, client, None)
        request.refuse(error)
        request.finish()
        request.close()

    def _leave(self, client: ClientWire) -> None:
        """A connection ends between requests, or its client left in the middle of a head."""
        if client.has_unread:
            request = Request(self._parts, client, None)
            request.cancel()
            request.finish()
        client.abort()

    # --- The end ---

    def drain(self) -> None:
        """Refuse newcomers and who waits, let streams finish within DRAIN_TIMEOUT."""
        if self._parts.draining:
            return
        log.info("draining: %d connections, %d requests at work", len(self._parts.exchanges), self._parts.gate.active)
        self._parts.draining = True
        for client, exchange in tuple(self._parts.exchanges.items()):
            if exchange is not None and exchange.stage is Stage.QUEUED:
                client.interrupt(GatewayError(DRAINING))
        self._background.append(asyncio.ensure_future(self._finish()))

    async def _finish(self) -> None:
        """Wait for what is under way; cut what is left when the time is up."""
        await self._turn_away()
        if self._open:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), self._parts.config.supervision.drain_timeout_s)
        for client in tuple(self._parts.exchanges):
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
        for client in tuple(self._idle):
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
        for client in tuple(self._open):
            client.hang_up()
        await self._parts.close()


# --- The process ---


async def serve(settings: Config) -> int:
    """Run the gateway until it is told to stop; return the exit status."""
    try:
        parts = Parts(settings)
    except (OSError, ssl.SSLError) as error:
        log.error("TLS_CERT_FILE, TLS_KEY_FILE: the certificate cannot be used: %s", error)
        return EXIT_SETTINGS
    gateway = Gateway(parts)
    parts.reload()
    loop = asyncio.get_running_loop()

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
    # What is there by now is there to stay, and requests leave no cycles behind: the collector need not look often. But
    # each closed transport of asyncio's is one, of five objects and 2 KiB: 400 of them at most.
    gc.freeze()
    gc.set_threshold(2_000, 20, 20)
    log.info("version %s listens on %s port %d", parts.version, settings.listen.host, port)
    try:
        await gateway.run_until_ended()
    finally:
        await gateway.close()
    log.info("stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The gateway in front of one llama-server.")
    parser.add_argument(
        "--check-config", action="store_true", help="print every setting and where it comes from, then exit"
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
        return asyncio.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
