"""A client's connection: its request heads and bodies, how long they may take, and how the connection ends.

A request handler is a coroutine, but no asyncio task: this protocol resumes it in the callback that brings what it
waits for. No task, no future and no iteration of the event loop is between a byte and its response.
"""

import asyncio
import logging
import select
import socket
import struct
import types
from collections.abc import Callable, Coroutine, Generator
from math import inf
from typing import Any, TypeVar

from config.settings import Limits
from core.addresses import parse_address
from core.errors import REQUEST_TIMEOUT, GatewayError, Kind, PeerGone
from http1.bodies import RequestBody
from http1.grammar import HeadScanner
from transport.body_reader import BodyReader
from transport.peer_protocol import PeerProtocol
from transport.ticker import Ticker
from transport.waiter import SupportsResult, Waiter
from transport.write_batching import WriteBatcher

log = logging.getLogger("gateway")

T = TypeVar("T")

_MAX_PIPELINED_BYTES = 65536  # held while a request is served; more stay in the kernel
_UNCOUNTED_BYTES = 4096  # as much as the connection itself takes: a usual head may come when memory is full
_TOO_LONG = "The request took longer than MAX_REQUEST_DURATION allows."
# How long a client may go on sending what is not read, and how long it may be silent meanwhile; as in nginx.
_LINGER_S = 30.0
_LINGER_SILENCE_S = 5.0
_MAX_FOREIGN_AWAITS = 4
_POLLRDHUP = getattr(select, "POLLRDHUP", 0)  # the peer sends no more; poll reports resets in any case


class ForeignAwait(RuntimeError):
    """A request handler awaited something that would never resume it."""


class ClientProtocol(PeerProtocol):
    """A client's connection and its request handler. Each wait ends when the client leaves or the time is up."""

    __slots__ = (
        "_awaits_drain",
        "_count_unread",
        "_counted_bytes",
        "_drain_waiter",
        "_handler",
        "_limit_s",
        "_on_handler_done",
        "_rate_deadline_s",
        "_receive_buffer",
        "_renewal_s",
        "_scanner",
        "_timeout_kind",
        "_waiter",
        "_whole_head_s",
        "addresses",
        "authenticated",
        "is_proxy",
        "lingers",
        "on_lost",
        "peer",
        "reading_paused",
        "saw_activity",
        "sent_bytes",
    )
    _whole_head_s: float  # how long a head may take once it has begun

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        transport: asyncio.Transport,
        ticker: Ticker,
        batcher: WriteBatcher,
        limits: Limits,
        count_unread: Callable[[int], None],
    ) -> None:
        """`count_unread` gets by how many bytes more or less is held of heads and pipelined requests.

        It may raise GatewayError if these are more.
        """
        super().__init__(writer, transport, ticker, batcher)
        address = transport.get_extra_info("peername")
        host = str(address[0]) if isinstance(address, tuple) else "local"
        self.peer = str(parse_address(host)) if host.startswith("::ffff:") else host  # an IPv4 client of an IPv6 socket
        self.addresses: tuple[str, ...] = (self.peer,)
        self.is_proxy = False  # set by its owner: its peer is a trusted proxy
        self.authenticated = False  # set by its owner: its client has shown a valid key
        self.saw_activity = False  # since `wait` last renewed its deadline
        self._scanner = HeadScanner(limits)
        self._receive_buffer = b""  # received and not taken yet
        self._count_unread = count_unread
        self._counted_bytes = 0
        self._handler: Coroutine[Any, Any, Any] | None = None
        self._on_handler_done: Callable[[Any], None] | None = None
        self._waiter: SupportsResult | None = None
        self.reading_paused = False  # more than _MAX_PIPELINED_BYTES are held
        self._timeout_kind: Kind | None = None
        self._renewal_s = 0.0
        self._limit_s = inf
        self._rate_deadline_s = inf  # when a body is too late that arrives at the least rate
        self._awaits_drain = False
        self._drain_waiter: Waiter[None] | None = None
        self.lingers = False  # it is closing, and what its client still sends is discarded
        self.on_lost: Callable[[], None] | None = None  # called when the connection is closed
        self.sent_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.saw_activity = True
        if self._sink is not None:
            self._sink(data)
        else:
            self._receive_buffer += data
            self._bound_pipelined()

    def _bound_pipelined(self) -> None:
        """Read no more while much is held that comes after the request; hang up if the memory for it is used up."""
        if len(self._receive_buffer) > _MAX_PIPELINED_BYTES:
            self._pause_reading()
        try:
            self._count_held()
        except GatewayError:  # it cannot be sent: a response may be on its way
            self.hang_up()

    def _pause_reading(self) -> None:
        self.reading_paused = self.wants_tick = True
        self.transport.pause_reading()

    def _count_held(self) -> None:
        """Count what is held of heads and pipelined requests. Raises what `count_unread` raises."""
        held = max(0, len(self._receive_buffer) + self._scanner.held_bytes - _UNCOUNTED_BYTES)
        change, self._counted_bytes = held - self._counted_bytes, held
        if change:
            self._count_unread(change)

    def _drop_unread(self) -> None:
        """Hold nothing of heads and pipelined requests any more."""
        self._scanner.reset()
        self._receive_buffer = b""
        self._count_held()

    def write(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self._batcher.write((self.transport, data))

    # --- The request handler ---

    def run_handler(self, handler: Coroutine[Any, Any, T], on_done: Callable[[T], None]) -> None:
        """Run a coroutine that serves this client; `on_done` gets what it returns.

        It may await only `wait`, `wait_while_active`, `wait_for`, `run`, `read_body` and `drain`. Anything else would
        never resume it, and raises ForeignAwait in it.
        """
        self._handler = handler
        self._on_handler_done = on_done
        self._resume()

    def _resume(self) -> None:
        """Run the handler to its next wait, or to its end."""
        handler = self._handler
        if handler is None:
            return
        try:
            awaited = handler.send(None)
        except StopIteration as end:
            on_done, self._handler, self._on_handler_done = self._on_handler_done, None, None
            if on_done is not None:
                on_done(end.value)
        else:
            if awaited is not self._waiter or awaited is None:
                self._refuse_foreign_await(handler)

    def _refuse_foreign_await(self, handler: Coroutine[Any, Any, Any]) -> None:
        """Raise ForeignAwait in the handler; end a handler that does not catch it, or goes on regardless."""
        refusal = ForeignAwait("a request handler may await only what ClientProtocol offers")
        try:
            for _ in range(_MAX_FOREIGN_AWAITS):
                awaited = handler.throw(refusal)
                if awaited is not None and awaited is self._waiter:
                    return
            handler.close()
            raise refusal  # its traceback shows what the handler awaits
        except StopIteration as end:
            value = end.value
        except Exception:  # also of a coroutine that goes on although it was closed
            log.exception("a request handler awaits what ClientProtocol does not offer, and is ended")
            value = False
            self.hang_up()
        on_done, self._handler, self._on_handler_done = self._on_handler_done, None, None
        if on_done is not None:
            on_done(value)

    def hang_up(self) -> None:
        """End the current wait and the connection."""
        self.ended = True
        self.cancel_wait(PeerGone())
        self.abort()

    # --- Waiting ---

    def arm(self, waiter: SupportsResult, seconds: float, kind: Kind | None) -> None:
        """Let `waiter` fail if the client leaves (PeerGone) or the time is up, until `disarm`.

        A time-out is GatewayError(kind), or PeerGone if there is no kind. 0 seconds is no time-out.
        """
        self._waiter = waiter
        self._timeout_kind = kind
        deadline_s = self._ticker.now_s + seconds if seconds else inf
        self.deadline_s = deadline_s if deadline_s < self._limit_s else self._limit_s

    def disarm(self) -> None:
        self._waiter = None
        self._awaits_drain = False
        self.deadline_s = inf

    @types.coroutine
    def wait(self, waiter: Waiter[T], seconds: float, kind: Kind | None) -> Generator[SupportsResult, None, T]:
        """Wait in the request handler for a result, as long as `arm` allows.

        Raises PeerGone, GatewayError(kind), or the error that the waiter got.
        """
        if self.ended:
            raise PeerGone
        if not waiter.done:
            self._waiter = waiter
            self._timeout_kind = kind
            deadline_s = self._ticker.now_s + seconds if seconds else inf
            self.deadline_s = deadline_s if deadline_s < self._limit_s else self._limit_s
            waiter.on_done = self._resume
            try:
                yield waiter
            finally:
                waiter.on_done = self._waiter = None
                self.deadline_s = inf
        return waiter.value if waiter.error is None else waiter.result()

    async def wait_while_active(self, waiter: Waiter[T], seconds: float, kind: Kind | None) -> T:
        """Wait as `wait` does; any activity of either side renews the deadline."""
        self._renewal_s = seconds
        self.saw_activity = False
        self.wants_tick = True
        try:
            return await self.wait(waiter, seconds, kind)
        finally:
            self._renewal_s = 0.0
            self.wants_tick = self.reading_paused

    async def wait_for(self, future: "asyncio.Future[T]", seconds: float, kind: Kind | None) -> T:
        """Wait for an asyncio future, as `wait` does."""
        waiter: Waiter[T] = Waiter()
        future.add_done_callback(waiter.copy_from)
        return await self.wait(waiter, seconds, kind)

    async def run(self, work: Coroutine[Any, Any, T], seconds: float, kind: Kind | None) -> T:
        """Run an asyncio coroutine in a task and wait for it, as `wait` does; if the wait ends, cancel the task."""
        task = asyncio.ensure_future(work)
        try:
            return await self.wait_for(task, seconds, kind)
        finally:
            task.cancel()

    def limit_waits(self, seconds: float) -> None:
        """Let no wait from now on end later than in `seconds` (0: no limit)."""
        self._limit_s = self._ticker.now_s + seconds if seconds else inf

    def cancel_wait(self, error: Exception) -> None:
        """End the current wait, if there is one, with this error."""
        waiter = self._waiter
        if waiter is not None:
            self.disarm()
            waiter.set_exception(error)

    def _end(self, *, cleanly: bool) -> None:
        super()._end(cleanly=cleanly)
        self.cancel_wait(PeerGone())

    def on_timeout(self, now_s: float) -> None:
        if self._waiter is None:
            self.abort()  # it lingered, or did not take its last bytes in time
        elif self._timeout_kind is None:
            self.cancel_wait(PeerGone())
        else:
            too_long = now_s >= self._limit_s
            self.cancel_wait(GatewayError(self._timeout_kind, _TOO_LONG if too_long else "", final=too_long))

    def on_tick(self, now_s: float) -> None:
        """Renew the deadline after activity, and notice a client that left while its bytes are not being read."""
        if self._renewal_s and self.saw_activity:
            self.saw_activity = False
            self.deadline_s = min(now_s + self._renewal_s, self._limit_s, self._rate_deadline_s)
        if self.reading_paused and peer_has_closed(self.transport):
            self.hang_up()

    # --- Requests ---

    def expect_head(self, head_waiter: SupportsResult, idle_s: float, whole_s: float) -> None:
        """Give `head_waiter` the next head with its empty line, or the GatewayError that HeadScanner raises.

        The head may take `idle_s` to its first byte, then `whole_s` as a whole.
        """
        self._whole_head_s = whole_s
        self._waiter = head_waiter
        self._timeout_kind = None
        self.deadline_s = self._ticker.now_s + idle_s
        if self._receive_buffer:  # a pipelined request waits for other clients' callbacks first
            asyncio.get_running_loop().call_soon(self._scan_buffer, head_waiter)
        else:
            self._sink = self._scan_head
            if self.reading_paused:
                self._resume_reading()

    def _scan_buffer(self, head_waiter: SupportsResult) -> None:
        if self._waiter is head_waiter:
            buffered, self._receive_buffer = self._receive_buffer, b""
            self._sink = self._scan_head
            self._scan_head(buffered)
            self._resume_reading()

    def _scan_head(self, data: bytes) -> None:
        try:
            raw = self._scanner.feed(data)
        except GatewayError as error:
            self._sink = None
            self.cancel_wait(error)
            return
        if raw is not None:
            self._sink = None
            self._receive_buffer = self._scanner.trailing_data
            head_waiter, self._waiter = self._waiter, None  # it arms what it waits for next
            if head_waiter is not None:
                head_waiter.set_result(raw)
            if self._receive_buffer or self._counted_bytes:
                self._bound_pipelined()
            return
        if self._timeout_kind is None and self._scanner.begun:
            self._timeout_kind = REQUEST_TIMEOUT
            self.deadline_s = self._ticker.now_s + self._whole_head_s
        try:
            self._count_held()
        except GatewayError as error:
            self._sink = None
            self.cancel_wait(error)

    def _resume_reading(self) -> None:
        """Read again, unless the receive buffer is still full."""
        if self.reading_paused and len(self._receive_buffer) <= _MAX_PIPELINED_BYTES and not self.ended:
            self.reading_paused = False
            self.wants_tick = self._renewal_s > 0
            self.transport.resume_reading()

    @property
    def partial_head(self) -> bytes:
        """What has come of a head that is not whole, or cannot be."""
        return self._scanner.partial_head

    @property
    def buffered_bytes(self) -> int:
        """How many received bytes are held that nothing has taken yet."""
        return len(self._receive_buffer)

    @property
    def has_unread(self) -> bool:
        """Whether received bytes have not been taken yet."""
        return bool(self._receive_buffer) or self._scanner.begun

    def take_body_if_received(self, length: int) -> bytes | None:
        """Return a body of `length` bytes if all of it has been received; else None."""
        buffered = self._receive_buffer
        if len(buffered) == length:
            self._receive_buffer = b""
            return buffered
        if len(buffered) < length:
            return None
        self._receive_buffer = buffered[length:]
        self._resume_reading()
        return buffered[:length]

    async def read_body(
        self, body: RequestBody, seconds: float, least_rate: int, on_bytes: Callable[[int], None]
    ) -> None:
        """Fill `body`; `on_bytes` gets the number of bytes of each piece, and may raise.

        Each pause may take `seconds`. After as many seconds in all the body must have arrived with at least
        `least_rate` bytes per second on average (0: with any). Raises PeerGone, REQUEST_TIMEOUT, BAD_REQUEST,
        PAYLOAD_TOO_LARGE, or what `on_bytes` raises.
        """
        latest_s = self._ticker.now_s + seconds

        def count(payload_bytes: int) -> None:
            on_bytes(payload_bytes)
            if least_rate:
                self._rate_deadline_s = latest_s + body.payload_bytes / least_rate

        reader = BodyReader(body, count, self._pause_reading, self._resume_reading)
        buffered, self._receive_buffer = self._receive_buffer, b""
        self._count_held()
        self._sink = reader.receive
        try:
            reader.receive(buffered)
            if not reader.has_pending:
                self._resume_reading()
            await self.wait_while_active(reader.waiter, seconds, REQUEST_TIMEOUT)
        finally:
            self._sink = None
            self._rate_deadline_s = inf
            self._receive_buffer += reader.trailing_data
        self._count_held()

    # --- The end ---

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._drop_unread()
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()

    def expect_drain(self, waiter: SupportsResult, seconds: float) -> None:
        """Give `waiter` a result once the client has taken most of what was written."""
        self._awaits_drain = True
        self.arm(waiter, seconds, None)

    async def drain(self, seconds: float) -> None:
        """Let a request handler wait until the client has taken most of what was written. Raises PeerGone."""
        self._batcher.flush()
        if self.write_paused and not self.ended:
            waiter = self._drain_waiter = Waiter()
            try:
                await self.wait(waiter, seconds, None)
            finally:
                self._drain_waiter = None
        if self.ended:
            raise PeerGone

    def resume_writing(self) -> None:
        super().resume_writing()
        self.saw_activity = True
        if self._drain_waiter is not None:
            # Not at once: the handler may close the transport, and asyncio would report its end twice.
            asyncio.get_running_loop().call_soon(self._drain_waiter.set_result, None)
        if self._awaits_drain and self._waiter is not None:
            waiter = self._waiter
            self.disarm()
            waiter.set_result(None)

    def truncate(self, *, reset: bool, flush_s: float) -> None:
        """End a response that is not whole, visibly. `reset`: an orderly close would look like its end."""
        if reset:
            linger = struct.pack("ii", 1, 0)
            connection = self.transport.get_extra_info("socket")
            if connection is not None:  # see tcp_state
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.abort()
        else:
            self._drop_unread()
            self.close(unread=False, flush_s=flush_s)

    def close(self, *, unread: bool, flush_s: float) -> None:
        """Close once the client has taken what was written, at the latest in `flush_s` seconds.

        `unread`: the client may still be sending bytes that will not be read. Closing now would reset the connection
        and could destroy the response on its way, so its bytes are discarded for a while (RFC 9112 section 9.6): many
        clients read nothing before they have sent all.
        """
        self.ended = True
        self._batcher.flush()
        if not unread and not self._receive_buffer:
            self.deadline_s = self._ticker.now_s + flush_s
            self.transport.close()
            return
        self.lingers = True
        self._drop_unread()
        self._sink = _discard
        self.reading_paused = False
        if self.transport.get_write_buffer_size():
            self.deadline_s = self._ticker.now_s + flush_s
        else:
            self.limit_waits(_LINGER_S)
            self._renewal_s = _LINGER_SILENCE_S
            self.saw_activity = False
            self.deadline_s = self._ticker.now_s + _LINGER_SILENCE_S
        self.wants_tick = self._renewal_s > 0
        if not self.transport.is_closing():
            self.transport.resume_reading()
            try:
                if self.transport.can_write_eof():  # TLS cannot: there the response's own end has to do
                    self.transport.write_eof()
            except OSError:  # the client has reset the connection, which asyncio has not reported yet
                self.abort()

    def shorten_linger(self, seconds: float) -> None:
        """Discard what a client that lingers sends for at most so much longer."""
        self._limit_s = min(self._limit_s, self._ticker.now_s + seconds)
        self.deadline_s = min(self.deadline_s, self._limit_s)


def _discard(data: bytes) -> None:
    """Do nothing with received bytes."""


def peer_has_closed(transport: asyncio.Transport) -> bool:
    """Whether the peer has closed or reset its connection, as the kernel knows before anything is read."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _POLLRDHUP)
    return bool(poll.poll(0))
