"""A client's connection: its heads and bodies, how long they may take, and how it ends.

Whoever waits for something is told in the callback in which it comes: a callback of his own, or a conversation, which
is a coroutine that the wire resumes itself. No task, no future and no turn of the loop stand between a byte and its
answer.
"""

import asyncio
import select
import socket
import struct
import types
from collections.abc import Callable, Coroutine, Generator
from math import inf
from typing import Any, Protocol, TypeVar

from bodies import RequestBody
from errors import REQUEST_TIMEOUT, GatewayError, Kind, PeerGone
from http1 import HeadScanner, Limits
from turns import Outbox
from waiting import Deadlines, Promise
from wire import Expectant, Wire

T = TypeVar("T")

_AHEAD_BYTES = 65536  # pipelined bytes held while an answer is under way; more stay in the kernel
_TOO_LONG = "The request took longer than MAX_REQUEST_DURATION allows."
_LINGER_S = 2.0
_LINGER_BYTES = 16 << 20
_LEFT = getattr(select, "POLLRDHUP", 0)  # the peer will send no more; resets are told in any case


class Occupant(Protocol):
    """The request that a client's connection is about."""

    @property
    def stage(self) -> str: ...

    @property
    def holds_backend(self) -> bool: ...

    def beat(self, now_s: float) -> None:
        """Give a sign of life, if one is due."""


class ClientWire(Wire):
    """A client's connection and its conversation. Whatever that waits for ends when the client leaves or time is up."""

    __slots__ = (
        "_ahead",
        "_awaits_room",
        "_conversation",
        "_kind",
        "_limit_s",
        "_paused",
        "_pending",
        "_renewal_s",
        "_scanner",
        "_then",
        "_whole_s",
        "heard",
        "on_lost",
        "peer",
        "request",
        "sent_bytes",
    )
    _whole_s: float  # how long a head may take once it has begun

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        transport: asyncio.Transport,
        deadlines: Deadlines,
        outbox: Outbox,
        limits: Limits,
    ) -> None:
        super().__init__(writer, transport, deadlines, outbox)
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) else "local"
        self.heard = False  # since `wait` last granted time anew
        self._scanner = HeadScanner(limits)
        self._ahead = b""  # received, and not yet anybody's
        self._conversation: Coroutine[None, None, Any] | None = None
        self._then: Callable[[Any], None] | None = None
        self._pending: Expectant | None = None
        self._paused = False
        self._kind: Kind | None = None
        self._renewal_s = 0.0
        self._limit_s = inf
        self._awaits_room = False
        self.request: Occupant | None = None
        self.on_lost: Callable[[ClientWire], None] | None = None  # called when the last byte has gone
        self.sent_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._sink is not None:
            self._sink(data)
        else:
            self._ahead += data
            if len(self._ahead) > _AHEAD_BYTES:
                self._paused = self.watched = True
                self.transport.pause_reading()

    def write(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self._outbox.put((self.transport, data))

    # --- The conversation ---

    def converse(self, conversation: Coroutine[None, None, T], then: Callable[[T], None]) -> None:
        """Begin a coroutine that speaks with this client; `then` gets what it returns.

        It may only await what this wire offers, and never ends by an exception.
        """
        self._conversation = conversation
        self._then = then
        self.resume()

    def resume(self) -> None:
        """Go on with the conversation where it waits."""
        if self._conversation is not None:
            try:
                self._conversation.send(None)
            except StopIteration as end:
                then, self._conversation, self._then = self._then, None, None
                if then is not None:
                    then(end.value)

    def hang_up(self) -> None:
        """End whatever is waited for, and the connection."""
        self.ended = True
        self.interrupt(PeerGone())
        self.abort()

    # --- Waiting ---

    def expect(self, expectant: Expectant, seconds: float, kind: Kind | None) -> None:
        """Let `expectant` fail when the client leaves (PeerGone) or time is up (GatewayError(kind), or with no kind
        PeerGone, too). 0 seconds are without end. It holds until `settle`.
        """
        self._pending = expectant
        self._kind = kind
        deadline_s = self._deadlines.now_s + seconds if seconds else inf
        self.deadline_s = deadline_s if deadline_s < self._limit_s else self._limit_s

    def settle(self) -> None:
        """What was expected has come, or will not."""
        self._pending = None
        self._awaits_room = False
        self.deadline_s = inf

    @types.coroutine
    def wait(
        self, promise: Promise[T], seconds: float, kind: Kind | None, *, renewing: bool = False
    ) -> Generator[None, None, T]:
        """Wait in the conversation for what has been promised, as long as `expect` allows.

        `renewing`: any activity grants the time anew. Raises PeerGone, GatewayError(kind), or what the promise fails
        with.
        """
        if self.ended:
            raise PeerGone
        if not promise.done:
            self.expect(promise, seconds, kind)
            if renewing:
                self._renewal_s = seconds
                self.heard = False
                self.watched = True
            promise.wake = self.resume
            try:
                yield
            finally:
                promise.wake = None
                self._renewal_s = 0.0
                self.watched = self._paused
                self.settle()
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
        expectant = self._pending
        if expectant is not None:
            self.settle()
            expectant.fail(error)

    def _end(self, *, orderly: bool) -> None:
        super()._end(orderly=orderly)
        self.interrupt(PeerGone())

    def expire(self, now_s: float) -> None:
        if self._pending is None:
            self.abort()  # it lingered, or its last bytes were not taken in time
        else:
            words = _TOO_LONG if now_s >= self._limit_s else ""
            self.interrupt(PeerGone() if self._kind is None else GatewayError(self._kind, words))

    def watch(self, now_s: float) -> None:
        """Grant time anew where anything has happened, and see whether one has left whose bytes are not being read."""
        if self._renewal_s and self.heard:
            self.heard = False
            self.deadline_s = min(now_s + self._renewal_s, self._limit_s)
        if self._paused and has_left(self.transport):
            self.hang_up()

    # --- Requests ---

    def read_head(self, reader: Expectant, idle_s: float, whole_s: float) -> None:
        """Let `reader` have the next head, its empty line included, or what HeadScanner finds wrong with it.

        It may take `idle_s` to its first byte, then `whole_s` for all of it.
        """
        self._whole_s = whole_s
        self.expect(reader, idle_s, None)
        if self._ahead:  # pipelined: who came meanwhile has a turn first
            asyncio.get_running_loop().call_soon(self._scan_ahead, reader)
        else:
            self._sink = self._scan_head
            if self._paused:
                self._read_on()

    def _scan_ahead(self, reader: Expectant) -> None:
        if self._pending is reader:
            ahead, self._ahead = self._ahead, b""
            self._sink = self._scan_head
            self._scan_head(ahead)
            self._read_on()

    def _scan_head(self, data: bytes) -> None:
        try:
            raw = self._scanner.feed(data)
        except GatewayError as error:
            self._sink = None
            self.interrupt(error)
            return
        if raw is not None:
            self._sink = None
            self._ahead = self._scanner.rest
            reader, self._pending = self._pending, None  # who has it says at once what is waited for next
            if reader is not None:
                reader.keep(raw)
        elif self._kind is None and self._scanner.begun:
            self._kind = REQUEST_TIMEOUT
            self.deadline_s = self._deadlines.now_s + self._whole_s

    def _read_on(self) -> None:
        """Read again, unless as much as may be is still here."""
        if self._paused and len(self._ahead) <= _AHEAD_BYTES and not self.ended:
            self._paused = False
            self.watched = self._renewal_s > 0
            self.transport.resume_reading()

    @property
    def has_unread(self) -> bool:
        """Whether bytes are here that nobody has taken yet."""
        return bool(self._ahead) or self._scanner.begun

    def take_sized_body(self, octets: int) -> bytes | None:
        """A body of so many octets, if all of it is here already."""
        ahead = self._ahead
        if len(ahead) == octets:
            self._ahead = b""
            return ahead
        if len(ahead) < octets:
            return None
        self._ahead = ahead[octets:]
        self._read_on()
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
        try:
            arrived(ahead)
            self._read_on()
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

    def expect_room(self, expectant: Expectant, seconds: float) -> None:
        """Let `expectant` know once the client has taken what was written, but for a little."""
        self._awaits_room = True
        self.expect(expectant, seconds, None)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.heard = True
        if self._awaits_room and self._pending is not None:
            expectant = self._pending
            self.settle()
            expectant.keep(None)

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
        self._outbox.flush()
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
        self._paused = self.watched = False
        if not self.transport.is_closing():
            self.transport.resume_reading()
            try:
                if self.transport.can_write_eof():  # TLS cannot: there the answer's own end has to do
                    self.transport.write_eof()
            except OSError:  # it has reset the connection, which nobody has been told yet
                self.abort()


def has_left(transport: asyncio.Transport) -> bool:
    """Whether a peer has closed or reset its connection, as the kernel knows before anything is read."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _LEFT)
    return bool(poll.poll(0))
