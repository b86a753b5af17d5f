"""One peer's byte stream and its deadlines: what clients' and the backend's connections have in common.

Connections come from `asyncio.start_server` and `asyncio.open_connection`; a wire then takes the transport over
(`set_protocol`), so that bytes go from transport to transport, and one coarse clock stands for all timers. The wires
are the only ones that touch a socket's bytes.

What a wire does not do: read HTTP (http1 does, over the bytes it is handed), or decide anything about a request.
"""

import asyncio
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

from turns import Outbox
from waiting import Deadlines


class Expectant(Protocol):
    """Somebody who is told once what has become of something: a Promise, or who needs none."""

    def keep(self, value: Any) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Wire(asyncio.Protocol):
    """What both kinds of peer have in common: a transport, and somebody whom received bytes go to."""

    __slots__ = (
        "_deadlines",
        "_former",
        "_outbox",
        "_sink",
        "_writer",
        "choked",
        "deadline_s",
        "ended",
        "feeder",
        "on_end",
        "orderly",
        "transport",
        "watched",
    )

    def __init__(
        self, writer: asyncio.StreamWriter, transport: asyncio.Transport, deadlines: Deadlines, outbox: Outbox
    ) -> None:
        """`transport` is the writer's own, or the one of TLS above it."""
        self._writer = writer  # kept, since a StreamWriter that is collected closes its transport
        self.transport = transport
        self._deadlines = deadlines
        self._outbox = outbox
        self._sink: Callable[[bytes], None] | None = None
        self.on_end: Callable[[bool], None] | None = None  # called once with "was it an orderly close?"
        self.feeder: Wire | None = None  # whose reading pauses while this peer does not read
        self.ended = False
        self.orderly = False  # it ended by the peer's FIN, not by a reset or by us
        self.choked = False  # the peer does not take what is written
        self.deadline_s = inf
        self.watched = False
        deadlines.add(self)
        self._former = self.transport.get_protocol()
        self.transport.set_protocol(self)

    def eof_received(self) -> bool:
        self._end(orderly=True)
        return False  # asyncio closes the transport: a half-closed peer has left

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadlines.discard(self)
        self._end(orderly=exc is None)
        self._sink = None  # it may be this wire's own: a cycle
        if self.feeder is not None:
            self.feeder.transport.resume_reading()
        self.transport.close()  # before Python 3.11 one of TLS that its peer has ended does not count as closed
        self._former.connection_lost(None)  # it lets the writer go, and the writer the transport

    def _end(self, *, orderly: bool) -> None:
        if not self.ended:
            self.ended = True
            self.orderly = orderly
            if self.on_end is not None:
                self.on_end(orderly)

    # --- This peer's reading speed is the limit for the one that feeds it ---

    def pause_writing(self) -> None:
        self.choked = True
        if self.feeder is not None:
            self.feeder.transport.pause_reading()

    def resume_writing(self) -> None:
        self.choked = False
        if self.feeder is not None:
            self.feeder.transport.resume_reading()

    # --- Time ---

    def expire(self, now_s: float) -> None:
        """The deadline has passed: nobody waits for this wire unless a subclass knows better."""
        self.abort()

    def watch(self, now_s: float) -> None:
        """What is asked for by `watched`, at each tick."""

    def abort(self) -> None:
        """Close at once; the peer sees a reset or a truncated message, the owner is told nothing more."""
        self.ended = True
        self._outbox.flush()
        self.transport.abort()
