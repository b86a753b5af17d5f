"""What the connections to clients and to the backend have in common: a transport, its end, back-pressure, a deadline.

Connections come from `asyncio.start_server` and `asyncio.open_connection`. A PeerProtocol then replaces the stream
protocol (`set_protocol`), so that bytes go from transport to transport. It reads no HTTP and decides nothing about a
request.
"""

import asyncio
from collections.abc import Callable
from math import inf

from transport.ticker import Ticker
from transport.write_batching import WriteBatcher


class PeerProtocol(asyncio.Protocol):
    """One connection. Received bytes go to `_sink`, if one is set.

    The owner of the connection calls `on_tick` at each tick; `wants_tick` and `deadline_s` say what it does.
    """

    __slots__ = (
        "_batcher",
        "_previous_protocol",
        "_sink",
        "_ticker",
        "_writer",
        "closed_cleanly",
        "deadline_s",
        "ended",
        "on_end",
        "transport",
        "upstream",
        "wants_tick",
        "write_paused",
    )

    def __init__(
        self, writer: asyncio.StreamWriter, transport: asyncio.Transport, ticker: Ticker, batcher: WriteBatcher
    ) -> None:
        """`transport` is the writer's own, or the TLS transport above it."""
        self._writer = writer  # a StreamWriter that is collected closes its transport
        self.transport = transport
        self._ticker = ticker
        self._batcher = batcher
        self._sink: Callable[[bytes], None] | None = None
        self.on_end: Callable[[bool], None] | None = None  # called once, with `closed_cleanly`
        self.upstream: PeerProtocol | None = None  # its reading pauses while this peer does not read
        self.ended = False
        self.closed_cleanly = False  # ended by the peer's FIN, not by a reset or by us
        self.write_paused = False  # the peer does not take what is written
        self.deadline_s = inf  # monotonic seconds
        self.wants_tick = False
        self._previous_protocol = transport.get_protocol()
        transport.set_protocol(self)

    def eof_received(self) -> bool:
        self._end(cleanly=True)
        return False  # asyncio closes the transport: a peer that half-closes has left

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(cleanly=exc is None)
        self._sink = None  # it may be a method of this object: a cycle
        if self.upstream is not None:
            self.upstream.transport.resume_reading()
        self.transport.close()  # before Python 3.11 a TLS transport that its peer has ended does not count as closed
        self._previous_protocol.connection_lost(None)  # it releases the writer, and the writer its transport

    def _end(self, *, cleanly: bool) -> None:
        if not self.ended:
            self.ended = True
            self.closed_cleanly = cleanly
            if self.on_end is not None:
                self.on_end(cleanly)

    # --- Back-pressure: `upstream` is read no faster than this peer reads ---

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.upstream is not None:
            self.upstream.transport.resume_reading()

    # --- Time ---

    def check_time(self, now_s: float) -> None:
        """Do what is due at this tick."""
        if self.wants_tick:
            self.on_tick(now_s)
        if self.deadline_s <= now_s:
            self.on_timeout(now_s)

    def on_tick(self, now_s: float) -> None:
        """Called at each tick while `wants_tick` is set."""

    def on_timeout(self, now_s: float) -> None:
        """The deadline has passed."""
        self.abort()

    def abort(self) -> None:
        """Close at once. The peer sees a reset or a truncated message; `on_end` is not called."""
        self.ended = True
        self._batcher.flush()
        self.transport.abort()
