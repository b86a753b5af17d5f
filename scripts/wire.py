"""One peer's byte stream and its timeouts: the only module that touches a socket's bytes.

Connections come from `asyncio.start_server` and `asyncio.open_connection`; a wire then takes the transport over
(`set_protocol`), so that bytes go from transport to transport. A client's conversation is a coroutine that its wire
resumes itself, in the callback in which the awaited bytes arrive: no task, no future and no turn of the loop stand
between a byte and its answer, and one coarse clock stands for all timers.

What a wire does not do: read HTTP (http1 does, over the bytes it is handed), or decide anything about a request.
"""

import asyncio
import socket
import struct
import types
from collections.abc import Callable, Coroutine, Generator
from math import inf
from typing import Any, TypeVar, cast

from bodies import RequestBody
from errors import BACKEND_MALFORMED, BACKEND_UNAVAILABLE, REQUEST_TIMEOUT, GatewayError, Kind, PeerGone
from http1 import HEAD_END, HeadScanner, Limits, RequestHead, parse_request_head
from waiting import Deadlines, Promise

T = TypeVar("T")

_AHEAD_BYTES = 65536  # pipelined bytes held while an answer is under way; more stay in the kernel
_LINGER_S = 2.0
_LINGER_BYTES = 16 << 20


class Wire(asyncio.Protocol):
    """What both kinds of peer have in common: a transport, and somebody whom received bytes go to."""

    __slots__ = (
        "_deadlines",
        "_former",
        "_sink",
        "_writer",
        "beat_s",
        "choked",
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
        self._sink: Callable[[bytes], None] | None = None
        self.on_end: Callable[[bool], None] | None = None  # called once with "was it an orderly close?"
        self.feeder: Wire | None = None  # whose reading pauses while this peer does not read
        self.ended = False
        self.orderly = False  # it ended by the peer's FIN, not by a reset or by us
        self.heard = False
        self.choked = False  # the peer does not take what is written
        self.deadline_s = inf
        self.beat_s = inf
        deadlines.add(self)
        self._former = self.transport.get_protocol()
        self.transport.set_protocol(self)

    def eof_received(self) -> bool:
        self._end(orderly=True)
        return False  # asyncio closes the transport: a half-closed peer has left

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadlines.discard(self)
        self._end(orderly=exc is None)
        if self.feeder is not None:
            self.feeder.transport.resume_reading()
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
        self.heard = True
        if self.feeder is not None:
            self.feeder.transport.resume_reading()

    # --- Time ---

    def expire(self, now_s: float) -> None:
        """The deadline has passed: nobody waits for this wire unless a subclass knows better."""
        self.abort()

    def beat(self, now_s: float) -> None:
        """A moment asked for by `beat_s` has come."""

    def abort(self) -> None:
        """Close at once; the peer sees a reset or a truncated message, the owner is told nothing more."""
        self.ended = True
        self.transport.abort()


class ClientWire(Wire):
    """A client's connection and its conversation. Whatever that waits for ends when the client leaves or time is up."""

    __slots__ = (
        "_ahead",
        "_conversation",
        "_kind",
        "_limit_s",
        "_limits",
        "_pending",
        "_renewal_s",
        "_scanner",
        "_taken",
        "on_beat",
        "on_lost",
        "peer",
        "sent_bytes",
    )

    def __init__(self, writer: asyncio.StreamWriter, deadlines: Deadlines, limits: Limits) -> None:
        super().__init__(writer, deadlines)
        address = writer.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) else "local"
        self._limits = limits
        self._scanner = HeadScanner(limits)
        self._ahead = b""  # received, and not yet anybody's
        self._conversation: Coroutine[None, None, None] | None = None
        self._pending: Promise[Any] | None = None
        self._kind: Kind | None = None
        self._renewal_s = 0.0
        self._limit_s = inf
        self._taken: Promise[None] | None = None
        self.on_beat: Callable[[float], None] | None = None
        self.on_lost: Callable[[ClientWire], None] | None = None  # called when the last byte has gone
        self.sent_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._sink is not None:
            self._sink(data)
        else:
            self._ahead += data
            if len(self._ahead) > _AHEAD_BYTES:
                self.transport.pause_reading()

    def write(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self.transport.write(data)

    # --- The conversation ---

    def converse(self, conversation: Coroutine[None, None, None]) -> None:
        """Begin the coroutine that speaks with this client. It may only await what this wire offers."""
        self._conversation = conversation
        self.resume()

    def resume(self) -> None:
        """Go on with the conversation where it waits."""
        if self._conversation is not None:
            try:
                self._conversation.send(None)
            except StopIteration:
                self._conversation = None

    def hang_up(self) -> None:
        """End the conversation where it stands, and the connection."""
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            conversation.close()
        self.abort()

    # --- Waiting ---

    @types.coroutine
    def wait(
        self, promise: Promise[T], seconds: float, kind: Kind | None, *, renewing: bool = False
    ) -> Generator[None, None, T]:
        """Wait for `promise` as long as the client stays, for `seconds` (0 = without end) at most.

        `renewing`: any activity grants the time anew. Raises PeerGone, GatewayError(kind) when the time is up (with no
        kind that, too, is PeerGone), or what the promise fails with.
        """
        if self.ended:
            raise PeerGone
        if not promise.done:
            self._pending = promise
            self._kind = kind
            self._renewal_s = seconds if renewing else 0.0
            self.heard = False
            deadline_s = self._deadlines.now_s + seconds if seconds else inf
            self.deadline_s = deadline_s if deadline_s < self._limit_s else self._limit_s
            promise.wake = self.resume
            try:
                yield
            finally:
                promise.wake = self._pending = None
                self.deadline_s = inf
        return promise.result()

    async def wait_for(self, future: "asyncio.Future[T]", seconds: float, kind: Kind | None) -> T:
        """As `wait`, for a future of asyncio's."""
        promise: Promise[T] = Promise()
        future.add_done_callback(promise.settle)
        return await self.wait(promise, seconds, kind)

    async def run(self, work: Coroutine[Any, Any, T], seconds: float, kind: Kind | None) -> T:
        """As `wait`, for a coroutine of asyncio's; it is cancelled where the wait ends before it does."""
        task = asyncio.ensure_future(work)
        try:
            return await self.wait_for(task, seconds, kind)
        finally:
            task.cancel()

    def limit(self, seconds: float) -> None:
        """No wait from now on ends later than in `seconds` (0 = no such limit)."""
        self._limit_s = self._deadlines.now_s + seconds if seconds else inf

    def interrupt(self, error: Exception) -> None:
        """End what is being waited for, if anything is."""
        if self._pending is not None:
            self._pending.fail(error)

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

    def stop_beating(self) -> None:
        self.on_beat = None
        self.beat_s = inf

    # --- Requests ---

    async def read_head(self, idle_s: float, whole_s: float) -> RequestHead:
        """Read one request head: `idle_s` for its first byte, then `whole_s` for all of it.

        Raises PeerGone where the peer sends nothing more, REQUEST_TIMEOUT, or what http1 finds wrong.
        """
        scanner = self._scanner
        raw = scanner.feed(self._ahead) if self._ahead else None
        if raw is None:
            promise: Promise[bytes] = Promise()
            begun = scanner.begun

            def arrived(data: bytes) -> None:
                nonlocal begun
                if not begun:
                    begun = True
                    self._kind = REQUEST_TIMEOUT
                    self.deadline_s = self._deadlines.now_s + whole_s
                try:
                    head = scanner.feed(data)
                except GatewayError as error:
                    promise.fail(error)
                else:
                    if head is not None:
                        self._sink = None
                        promise.keep(head)

            self._ahead = b""
            self._sink = arrived
            self.transport.resume_reading()
            try:
                if begun:
                    raw = await self.wait(promise, whole_s, REQUEST_TIMEOUT)
                else:
                    raw = await self.wait(promise, idle_s, None)
            finally:
                self._sink = None
        self._ahead = scanner.rest
        return parse_request_head(raw, self._limits)

    @property
    def has_unread(self) -> bool:
        """Whether bytes are here that nobody has taken yet."""
        return bool(self._ahead) or self._scanner.begun

    def take_sized_body(self, octets: int) -> bytes | None:
        """A body of so many octets, if all of it is here already."""
        ahead = self._ahead
        if len(ahead) < octets:
            return None
        self._ahead = ahead[octets:]
        return ahead[:octets]

    async def read_body(self, body: RequestBody, seconds: float, hold: Callable[[int], None]) -> None:
        """Fill `body`, with `seconds` between reads; `hold` is told of every octet kept, and may refuse it.

        Raises PeerGone, REQUEST_TIMEOUT, BAD_REQUEST, PAYLOAD_TOO_LARGE, or what `hold` raises.
        """
        promise: Promise[None] = Promise()

        def arrived(data: bytes) -> None:
            if promise.done:
                self._ahead += data
                return
            try:
                self._feed(body, data, hold)
            except GatewayError as error:
                promise.fail(error)
            else:
                if body.done:
                    promise.keep(None)

        ahead, self._ahead = self._ahead, b""
        self._sink = arrived
        self.transport.resume_reading()
        try:
            arrived(ahead)
            await self.wait(promise, seconds, REQUEST_TIMEOUT, renewing=True)
        finally:
            self._sink = None

    def _feed(self, body: RequestBody, data: bytes, hold: Callable[[int], None]) -> None:
        before = body.octets
        body.feed(data)
        hold(body.octets - before)
        self._ahead += body.surplus

    # --- The end ---

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost(self)

    async def until_taken(self, seconds: float) -> None:
        """Wait until the client has taken what was written, but for a little. Raises PeerGone where it does not."""
        promise = self._taken = Promise[None]()
        try:
            await self.wait(promise, seconds, None)
        except GatewayError:
            raise PeerGone from None
        finally:
            self._taken = None

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taken is not None:
            self._taken.keep(None)

    def truncate(self, *, reset: bool, flush_s: float) -> None:
        """End an answer that is not whole, visibly. `reset`: an orderly close would look like its end."""
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.abort()
        else:
            self._ahead = b""
            self.close(unread=False, flush_s=flush_s)

    def close(self, *, unread: bool, flush_s: float) -> None:
        """Close once what was written has been taken, within `flush_s`.

        `unread`: the client may still be sending what nobody will read. Closing on that would reset the connection and
        could destroy the answer on its way, so its bytes are discarded for a moment (RFC 9112 section 9.6).
        """
        self.ended = True
        if not unread and not self._ahead:
            self.deadline_s = self._deadlines.now_s + flush_s if flush_s else inf
            self.transport.close()
            return
        linger_s = flush_s if self.transport.get_write_buffer_size() else _LINGER_S
        self.deadline_s = self._deadlines.now_s + linger_s if linger_s else inf
        left = _LINGER_BYTES

        def discard(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                self.abort()

        self._sink = discard
        self._ahead = b""
        if not self.transport.is_closing():
            self.transport.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:
                self.transport.close()


class BackendWire(Wire):
    """A connection to the backend. It is abandoned, never repaired: what surprises it aborts it."""

    __slots__ = ("_head", "_head_bytes", "_part", "_rest", "reused")

    def __init__(self, writer: asyncio.StreamWriter, deadlines: Deadlines, head_bytes: int) -> None:
        super().__init__(writer, deadlines)
        self._head_bytes = head_bytes
        self._head: Promise[bytes] | None = None
        self._part = b""
        self._rest = b""  # what came behind the last head
        self.reused = False

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._sink is not None:
            self._sink(data)
        elif self._head is None:
            self.abort()  # it speaks without being asked
        elif self._head.done:
            self._rest += data
        else:
            self._find_head(data)

    def ask(self, request: list[bytes]) -> Promise[bytes]:
        """Send a request; the promise is its response's head."""
        self.transport.writelines(request)
        return self.next_head()

    def next_head(self) -> Promise[bytes]:
        """The next response head, its empty line included. Fails with BACKEND_UNAVAILABLE or BACKEND_MALFORMED."""
        promise: Promise[bytes] = Promise()
        self._head = promise
        if self._rest:
            self._find_head(self.take_rest())
        if self.ended:
            self._cut_before_head()
        return promise

    def _find_head(self, data: bytes) -> None:
        assert self._head is not None  # only called while a head is awaited
        searched = len(self._part)
        data = self._part + data
        end = data.find(HEAD_END, max(0, searched - 3))
        if (end if end >= 0 else len(data)) > self._head_bytes:
            words = f"The backend's response head exceeds MAX_RESPONSE_HEADER_SIZE ({self._head_bytes} octets)."
            self._head.fail(GatewayError(BACKEND_MALFORMED, words))
        elif end < 0:
            self._part = data
        else:
            self._part = b""
            self._rest = data[end + 4 :]
            self._head.keep(data[: end + 4])

    def _end(self, *, orderly: bool) -> None:
        super()._end(orderly=orderly)
        self._cut_before_head()

    def _cut_before_head(self) -> None:
        if self._head is not None and not self._head.done:
            self._head.fail(GatewayError(BACKEND_UNAVAILABLE, "The backend closed before it answered."))

    def take_rest(self) -> bytes:
        """What has come behind the last head so far."""
        rest, self._rest = self._rest, b""
        return rest

    def pass_to(self, sink: Callable[[bytes], None], on_end: Callable[[bool], None]) -> None:
        """From now on every received byte goes to `sink`."""
        self._sink = sink
        self.on_end = on_end

    def rest_idle(self) -> None:
        """Nobody expects bytes any more; any that come abort the connection."""
        self._sink = self._head = self.on_end = None
        self.transport.resume_reading()
        self.reused = True

    def was_stale(self) -> bool:
        """Whether it was closed in an orderly way before it had said anything in answer to a request: as a server does
        with a connection that it has kept open long enough, and that a request has just missed."""
        return self.reused and self.orderly and not self._part and self._head is not None and self._head.failed
