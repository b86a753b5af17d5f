"""One peer's byte stream and its timeouts: the only module that touches a socket's bytes.

Connections come from `asyncio.start_server` and `asyncio.open_connection`; a wire then takes its transport over
(`set_protocol`), so that bytes go from transport to transport without a task, a future or a timer each. What a wire does
not do: read HTTP (http1 does, over the bytes it is handed), or decide anything about a request.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from math import inf
from typing import TypeVar, cast

from errors import BACKEND_MALFORMED, BACKEND_UNAVAILABLE, REQUEST_TIMEOUT, GatewayError, Kind, PeerGone
from http1 import HEAD_END, HeadScanner, Limits, RequestBody, RequestHead, parse_request_head

T = TypeVar("T")

_AHEAD_BYTES = 65536  # pipelined bytes held while an answer is under way; more stay in the kernel
_LINGER_S = 2.0
_LINGER_BYTES = 16 << 20


class Deadlines:
    """One coarse clock for all wires: a timer a wait would cost more than the bytes that it guards.

    Deadlines are met to within one tick. `now_s` is monotonic, as of the last tick.
    """

    TICK_S = 0.25

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wires: set[Wire] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.now_s = clock()

    def add(self, wire: "Wire") -> None:
        self._wires.add(wire)

    def discard(self, wire: "Wire") -> None:
        self._wires.discard(wire)

    def __iter__(self) -> Iterator["Wire"]:
        return iter(tuple(self._wires))

    def tick(self) -> None:
        """Let every wire that is due act."""
        now_s = self.now_s = self._clock()
        for wire in self:
            if wire.deadline_s <= now_s:
                wire.expire(now_s)
            if wire.beat_s <= now_s:
                wire.beat(now_s)

    def start(self) -> None:
        """Tick from now on, until `stop`."""
        self.tick()
        self._timer = asyncio.get_running_loop().call_later(self.TICK_S, self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Wire(asyncio.Protocol):
    """What both kinds of peer have in common: a transport, a buffer, and somebody whom received bytes go to."""

    __slots__ = (
        "_buffer",
        "_deadlines",
        "_sink",
        "_writer",
        "beat_s",
        "deadline_s",
        "ended",
        "feeder",
        "heard",
        "on_end",
        "orderly",
        "transport",
    )

    def __init__(self, writer: asyncio.StreamWriter, deadlines: Deadlines) -> None:
        self._writer = writer  # kept, since a StreamWriter that is collected closes its transport
        self.transport = cast(asyncio.Transport, writer.transport)
        self._deadlines = deadlines
        self._buffer = bytearray()
        self._sink: Callable[[bytes], None] | None = None
        self.on_end: Callable[[bool], None] | None = None  # called once with "was it an orderly close?"
        self.feeder: Wire | None = None  # whose reading pauses while this peer does not read
        self.ended = False
        self.orderly = False  # it ended by the peer's FIN, not by a reset or by us
        self.heard = False
        self.deadline_s = inf
        self.beat_s = inf
        deadlines.add(self)
        self.transport.set_protocol(self)

    # --- Bytes in ---

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._sink is not None:
            self._sink(data)
        else:
            self._buffer += data
            if len(self._buffer) > _AHEAD_BYTES:
                self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._end(orderly=True)
        return False  # asyncio closes the transport: a half-closed peer has left

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadlines.discard(self)
        self._end(orderly=exc is None)
        if self.feeder is not None:
            self.feeder.transport.resume_reading()

    def _end(self, *, orderly: bool) -> None:
        if not self.ended:
            self.ended = True
            self.orderly = orderly
            if self.on_end is not None:
                self.on_end(orderly)

    def _receive(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self.transport.resume_reading()

    # --- Bytes out, with the peer's reading speed as the limit ---

    def pause_writing(self) -> None:
        if self.feeder is not None:
            self.feeder.transport.pause_reading()

    def resume_writing(self) -> None:
        self.heard = True
        if self.feeder is not None:
            self.feeder.transport.resume_reading()

    # --- Time ---

    def expire(self, now_s: float) -> None:
        """The deadline has passed: nobody waits for this wire unless a subclass knows better."""
        self.abort()

    def beat(self, now_s: float) -> None:
        """A moment asked for by `beat_s` has come."""

    # --- The end ---

    def abort(self) -> None:
        """Close at once; the peer sees a reset or a truncated message, the owner is told nothing more."""
        self.ended = True
        self.transport.abort()


class ClientWire(Wire):
    """A client's connection. Whatever its request waits for ends when the client leaves or the time is up."""

    __slots__ = ("_kind", "_limit_s", "_limits", "_pending", "_renewal_s", "_scanner", "on_beat", "peer", "sent_bytes")

    def __init__(self, writer: asyncio.StreamWriter, deadlines: Deadlines, limits: Limits) -> None:
        super().__init__(writer, deadlines)
        address = writer.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) else "local"
        self._limits = limits
        self._scanner = HeadScanner(limits)
        self._pending: asyncio.Future[object] | None = None
        self._kind: Kind | None = None
        self._renewal_s = 0.0
        self._limit_s = inf
        self.on_beat: Callable[[float], None] | None = None
        self.sent_bytes = 0

    def write(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self.transport.write(data)

    # --- Waiting ---

    async def wait(
        self, future: "asyncio.Future[T]", seconds: float, kind: Kind | None, *, renewing: bool = False
    ) -> T:
        """Wait for `future` as long as the client stays, for `seconds` (0 = without end) at most.

        `renewing`: any activity grants the time anew. Raises PeerGone, GatewayError(kind) when the time is up (with no
        kind that, too, is PeerGone), or what the future raises.
        """
        if self.ended:
            raise PeerGone
        self._pending = cast("asyncio.Future[object]", future)
        self._kind = kind
        self._renewal_s = seconds if renewing else 0.0
        self.heard = False
        self.deadline_s = min(self._deadlines.now_s + seconds if seconds else inf, self._limit_s)
        try:
            return await future
        finally:
            self._pending = None
            self.deadline_s = inf

    async def run(self, work: Coroutine[None, None, T], seconds: float, kind: Kind | None) -> T:
        """As `wait`, for a coroutine; it is cancelled where the wait ends before it does."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def hand_over(task: "asyncio.Task[T]") -> None:
            if future.done() or task.cancelled():
                return
            error = task.exception()
            if error is None:
                future.set_result(task.result())
            else:
                future.set_exception(error)

        task = asyncio.ensure_future(work)
        task.add_done_callback(hand_over)
        try:
            return await self.wait(future, seconds, kind)
        finally:
            task.cancel()

    def limit(self, seconds: float) -> None:
        """No wait from now on ends later than in `seconds` (0 = no such limit)."""
        self._limit_s = self._deadlines.now_s + seconds if seconds else inf

    def interrupt(self, error: Exception) -> None:
        """End what is being waited for, if anything is."""
        if self._pending is not None and not self._pending.done():
            self._pending.set_exception(error)

    def _end(self, *, orderly: bool) -> None:
        super()._end(orderly=orderly)
        self.interrupt(PeerGone())

    def expire(self, now_s: float) -> None:
        if self._pending is None:
            self.abort()  # it lingered, or its last bytes were not taken in time
        elif self._renewal_s and self.heard and now_s < self._limit_s:
            self.heard = False
            self.deadline_s = min(now_s + self._renewal_s, self._limit_s)
        else:
            self.deadline_s = inf
            self.interrupt(PeerGone() if self._kind is None else GatewayError(self._kind))

    def beat(self, now_s: float) -> None:
        if self.on_beat is not None:
            self.on_beat(now_s)

    # --- Requests ---

    async def read_head(self, idle_s: float, whole_s: float) -> RequestHead:
        """Read one request head: `idle_s` for its first byte, then `whole_s` for all of it.

        Raises PeerGone where the peer sends nothing more, REQUEST_TIMEOUT, or what http1 finds wrong.
        """
        self._scanner.reset()
        end = self._scanner.scan(self._buffer) if self._buffer else 0
        if not end:
            end = await self._more_head(idle_s, whole_s)
        raw = bytes(self._buffer[:end])
        del self._buffer[:end]
        return parse_request_head(raw, self._limits)

    async def _more_head(self, idle_s: float, whole_s: float) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        begun = bool(self._buffer)

        def arrived(data: bytes) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._kind = REQUEST_TIMEOUT
                self.deadline_s = self._deadlines.now_s + whole_s
            self._buffer += data
            if future.done():
                return
            try:
                end = self._scanner.scan(self._buffer)
            except GatewayError as error:
                future.set_exception(error)
            else:
                if end:
                    future.set_result(end)

        self._receive(arrived)
        try:
            if begun:
                return await self.wait(future, whole_s, REQUEST_TIMEOUT)
            return await self.wait(future, idle_s, None)
        finally:
            self._sink = None

    def skip_body(self, octets: int) -> bool:
        """Drop a body that nobody will read, if all of it is here already."""
        if octets > len(self._buffer):
            return False
        del self._buffer[:octets]
        return True

    @property
    def has_unread(self) -> bool:
        return bool(self._buffer)

    async def read_body(self, body: RequestBody, seconds: float, hold: Callable[[int], None]) -> None:
        """Fill `body`, with `seconds` between reads; `hold` is told of every octet kept, and may refuse it.

        Raises PeerGone, REQUEST_TIMEOUT, BAD_REQUEST, PAYLOAD_TOO_LARGE, or what `hold` raises.
        """
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            self._feed(body, data, hold)
        if not body.done:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def arrived(data: bytes) -> None:
                if future.done():
                    self._buffer += data
                    return
                try:
                    self._feed(body, data, hold)
                except GatewayError as error:
                    future.set_exception(error)
                else:
                    if body.done:
                        future.set_result(None)

            self._receive(arrived)
            try:
                await self.wait(future, seconds, REQUEST_TIMEOUT, renewing=True)
            finally:
                self._sink = None

    def _feed(self, body: RequestBody, data: bytes, hold: Callable[[int], None]) -> None:
        before = body.octets
        body.feed(data)
        hold(body.octets - before)
        self._buffer += body.surplus

    # --- The end ---

    def truncate(self, *, reset: bool, flush_s: float) -> None:
        """End an answer that is not whole, visibly. `reset`: an orderly close would look like its end."""
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.abort()
        else:
            self._buffer.clear()
            self.close(unread=False, flush_s=flush_s)

    def close(self, *, unread: bool, flush_s: float) -> None:
        """Close once what was written has been taken, within `flush_s`.

        `unread`: the client may still be sending what nobody will read. Closing on that would reset the connection and
        could destroy the answer on its way, so its bytes are discarded for a moment (RFC 9112 section 9.6).
        """
        self.ended = True
        if not unread and not self._buffer:
            self.deadline_s = self._deadlines.now_s + flush_s if flush_s else inf
            self.transport.close()
            return
        self.deadline_s = self._deadlines.now_s + _LINGER_S
        left = _LINGER_BYTES

        def discard(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                self.abort()

        self._sink = discard
        self._buffer.clear()
        if self.transport.is_closing():
            return
        self.transport.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()


class BackendWire(Wire):
    """A connection to the backend. It is abandoned, never repaired: what surprises it aborts it."""

    __slots__ = ("_head", "_head_bytes", "_searched", "born_s", "requests")

    def __init__(self, writer: asyncio.StreamWriter, deadlines: Deadlines, head_bytes: int) -> None:
        super().__init__(writer, deadlines)
        self._head_bytes = head_bytes
        self._head: asyncio.Future[bytes] | None = None
        self._searched = 0
        self.requests = 0

    def send(self, pieces: list[bytes]) -> None:
        self.requests += 1
        self.transport.writelines(pieces)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._sink is not None:
            self._sink(data)
        elif self._head is None:
            self._end(orderly=False)  # it speaks without being asked
            self.abort()
        else:
            self._buffer += data
            self._find_head()

    def next_head(self) -> "asyncio.Future[bytes]":
        """The bytes of the next response head, its empty line included. Fails with BACKEND_UNAVAILABLE or _MALFORMED."""
        self._head = asyncio.get_running_loop().create_future()
        self._searched = 0
        if self._buffer:
            self._find_head()
        if self.ended:
            self._cut_before_head()
        return self._head

    def _end(self, *, orderly: bool) -> None:
        super()._end(orderly=orderly)
        self._cut_before_head()

    def _cut_before_head(self) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(GatewayError(BACKEND_UNAVAILABLE, "The backend closed before it answered."))

    def _find_head(self) -> None:
        if self._head is None or self._head.done():
            return
        found = self._buffer.find(HEAD_END, max(0, self._searched - 3))
        self._searched = len(self._buffer)
        if max(found, 0 if found >= 0 else self._searched) > self._head_bytes:
            words = f"The backend's response head exceeds MAX_RESPONSE_HEADER_SIZE ({self._head_bytes} octets)."
            self._head.set_exception(GatewayError(BACKEND_MALFORMED, words))
        elif found >= 0:
            head = bytes(self._buffer[: found + 4])
            del self._buffer[: found + 4]
            self._head.set_result(head)

    def pass_to(self, sink: Callable[[bytes], None]) -> bytes:
        """From now on every received byte goes to `sink`; what is there already is returned."""
        self._head = None
        self._sink = sink
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def rest(self) -> None:
        """Nobody expects bytes any more; any that come abort the connection."""
        self._sink = self._head = self.on_end = None
