"""Connections in memory: a test says what the peer sends and takes, and reads what was written to it. No sockets.

    link = Link()
    client = link.client()
    client.transport.receive(b"GET / HTTP/1.1\\r\\n\\r\\n")
    assert link.sent(client) == b"…"

Time passes only by `link.advance`, or in `run` when nothing else is left to do.
"""

import asyncio
import functools
import inspect
import math
import selectors
import socket
import struct
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from config.settings import Limits
from core.errors import GatewayError
from core.off_loop import THREAD_NAME
from support.clock import Clock
from transport import write_batching
from transport.backend_protocol import BackendProtocol, LastActivity
from transport.client_protocol import ClientProtocol
from transport.peer_protocol import PeerProtocol
from transport.tcp import TcpState
from transport.ticker import Ticker
from transport.waiter import Waiter
from transport.write_batching import WriteBatcher

T = TypeVar("T")

HIGH_WATER_BYTES = 65536  # asyncio's default
PEER = ("192.0.2.7", 50000)
OPEN, CLOSING, ABORTED, LOST = "open", "closing", "aborted", "lost"


class PreviousProtocol(asyncio.Protocol):
    """What a transport has at first. A stream's protocol releases its writer when the connection is lost."""

    def __init__(self) -> None:
        self.lost = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


ESTABLISHED = TcpState(1, retransmissions=0, sent_ms=0, unacknowledged=0)


@functools.cache
def descriptor(*, unread: bool) -> int:
    """Return the descriptor of a socket whose peer is there, and has left a byte unread or not."""
    one, other = socket.socketpair()
    if unread:
        one.send(b"x")
    one.shutdown(socket.SHUT_WR)  # what is written reaches the transport alone
    other.detach()
    return one.detach()


class MemorySocket:
    """Keeps the options that are set. The kernel says of its connection what `tcp` holds."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.options: list[tuple[int, int, bytes]] = []
        self.tcp = ESTABLISHED

    def setsockopt(self, level: int, name: int, value: bytes) -> None:
        self.options.append((level, name, value))

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        """Return struct tcp_info of Linux, so much of it as is asked for."""
        assert (level, name) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        info = struct.pack("=BBB41xI", self.tcp.state, 0, self.tcp.retransmissions, self.tcp.sent_ms)
        assert size <= len(info)
        return info[:size]

    def fileno(self) -> int:
        """Return a descriptor of which TIOCOUTQ says whether anything is unacknowledged."""
        return descriptor(unread=self.tcp.unacknowledged > 0)


class MemoryTransport(asyncio.Transport):
    """A transport whose peer is the test.

    `state` is OPEN, CLOSING (once what is unsent is taken), ABORTED or LOST; `written` has one entry per write. The
    peer takes all bytes at once, unless it `stalls`.
    """

    def __init__(self, peername: object = PEER, sock: object | None = None, *, half_closes: bool = True) -> None:
        super().__init__()
        self.protocol: Any = PreviousProtocol()
        self.previous = self.protocol
        self.state = OPEN
        self.written: list[bytes] = []
        self.reading = True
        self.wrote_eof = False
        self.sock: Any = MemorySocket() if sock is None else sock
        self._peername = peername
        self._half_closes = half_closes
        self._stalled = False
        self._unsent_bytes = 0
        self._writing_paused = False

    # --- What the protocols use ---

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol  # type: ignore[no-any-return]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self._peername, "socket": self.sock}.get(name, default)

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return HIGH_WATER_BYTES // 4, HIGH_WATER_BYTES

    def is_closing(self) -> bool:
        return self.state != OPEN

    def write(self, data: bytes) -> None:
        """As asyncio has it: what is written after the end is ignored."""
        if self.state != OPEN:
            return
        self.written.append(bytes(data))
        if self._stalled:
            self._unsent_bytes += len(data)
            if self._unsent_bytes > HIGH_WATER_BYTES and not self._writing_paused:
                self._writing_paused = True
                self.protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return self._half_closes

    def write_eof(self) -> None:
        self.wrote_eof = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading and self.state == OPEN

    def close(self) -> None:
        if self.state == OPEN:
            self.state = CLOSING

    def abort(self) -> None:
        if self.state != LOST:
            self.state = ABORTED
            self._unsent_bytes = 0

    # --- What the peer does ---

    def receive(self, data: bytes) -> None:
        """The peer sends bytes; they arrive in one piece."""
        assert self.reading, "asyncio delivers nothing while reading is paused"
        assert self.state != LOST
        self.protocol.data_received(data)

    def receive_eof(self) -> None:
        """The peer ends its direction; the connection is lost if the protocol does not want it half open."""
        if not self.protocol.eof_received():
            self.close()
            self.lose()

    def lose(self, error: Exception | None = None) -> None:
        """The connection is gone: reset by the peer if there is an error, else closed."""
        self.state = LOST
        self._unsent_bytes = 0
        self.protocol.connection_lost(error)

    def stall(self) -> None:
        """The peer takes nothing from now on."""
        self._stalled = True

    def take_unsent(self) -> None:
        """The peer takes what it has left."""
        self._stalled = False
        self._unsent_bytes = 0
        if self._writing_paused:
            self._writing_paused = False
            self.protocol.resume_writing()

    def take(self) -> bytes:
        """Return what was written since the last call."""
        taken, self.written = b"".join(self.written), []
        return taken


class MemoryWriter:
    """In place of a StreamWriter, of which the protocols use nothing else."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.transport = transport

    def get_extra_info(self, name: str) -> Any:
        return self.transport.get_extra_info(name)


class Connector:
    """In place of asyncio.open_connection: keeps the transports that were opened.

    If there is an `error`, it is raised instead. `at_eof`: the peer has closed a new connection already. `hang`: it
    neither accepts nor refuses. `meanwhile` is what happens while a connection is made.
    """

    def __init__(self) -> None:
        self.transports: list[MemoryTransport] = []
        self.asked: list[tuple[str, int]] = []
        self.error: OSError | None = None
        self.at_eof = self.hang = False
        self.meanwhile: Callable[[], None] = lambda: None

    async def __call__(self, host: str, port: int) -> tuple[asyncio.StreamReader, MemoryWriter]:
        self.asked.append((host, port))
        if self.error is not None:
            raise self.error
        if self.hang:
            await asyncio.get_running_loop().create_future()
        self.meanwhile()
        reader = asyncio.StreamReader()
        if self.at_eof:
            reader.feed_eof()
        transport = MemoryTransport()
        self.transports.append(transport)
        return reader, MemoryWriter(transport)

    async def lives(self) -> bool:
        """Whether connections are accepted."""
        return self.error is None


class Link:
    """The clock, the ticker and the batcher that connections in memory share."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.ticker = Ticker(self.clock)
        self.batcher = WriteBatcher()
        self.batcher.flushed_by_loop()
        self.activity = LastActivity()

    def client(
        self,
        transport: MemoryTransport | None = None,
        limits: Limits | None = None,
        count_unread: Callable[[int], None] = lambda count: None,
    ) -> ClientProtocol:
        transport = transport or MemoryTransport()
        writer: Any = MemoryWriter(transport)
        client = ClientProtocol(writer, transport, self.ticker, self.batcher, limits or Limits(), count_unread)
        self.ticker.add_listener(client.check_time)
        return client

    def backend(self, transport: MemoryTransport | None = None, max_head_bytes: int = 65536) -> BackendProtocol:
        writer: Any = MemoryWriter(transport or MemoryTransport())
        backend = BackendProtocol(writer, self.ticker, self.batcher, max_head_bytes, self.activity)
        self.ticker.add_listener(backend.check_time)
        return backend

    def sent(self, peer: PeerProtocol) -> bytes:
        """Return what the peer was sent since the last call."""
        self.batcher.flush()
        return end_of(peer).take()

    def advance(self, seconds: float) -> None:
        """Let time pass at once, with one tick at its end."""
        self.clock.advance(seconds)
        self.ticker.tick()


def end_of(peer: PeerProtocol) -> MemoryTransport:
    """Return the transport of a protocol in memory."""
    assert isinstance(peer.transport, MemoryTransport)
    return peer.transport


def outcome(waiter: Waiter[Any]) -> Any:
    """Return a waiter's result, or its error in a form that can be compared; "waiting" if there is neither."""
    if not waiter.done:
        return "waiting"
    try:
        return waiter.result()
    except GatewayError as error:
        return error.kind
    except Exception as error:
        return type(error)


# --- An event loop without sleep ---


class ClockSelector(selectors.SelectSelector):
    """Sets the clock forward in place of waiting, to a whole step: asyncio would call a timer a nanosecond early."""

    _STEPS_PER_S = 1 << 20

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        while not ready and any(thread.name == THREAD_NAME for thread in threading.enumerate()):
            ready = super().select(0.01)
        if not ready and timeout is None:
            ready = super().select(20)  # another thread may be at work
            assert ready, "nothing is left to wait for"
        elif not ready and timeout is not None and timeout > 0:
            due_s = math.ceil((self._clock() + timeout) * self._STEPS_PER_S) / self._STEPS_PER_S
            self._clock.advance(due_s - self._clock())
        return ready


class ClockLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, whose time is a clock's: it runs the next timer at once, and no test waits."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(ClockSelector(clock))
        self._clock = clock

    def time(self) -> float:
        return self._clock()


def run(main: Coroutine[Any, Any, T], clock: Clock | None = None) -> T:
    """Run a coroutine on a loop that never sleeps."""
    return write_batching.run(main, ClockLoop(clock or Clock()))


def memory_test(
    make: Callable[[Clock], T], leave: Callable[[T], object] = lambda made: None
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Make tests of coroutine functions. Each gets what `make` returns, for the loop's clock; others come from pytest.

    `leave` is called afterwards, whatever happened.
    """

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        async def play(clock: Clock, names: dict[str, Any]) -> None:
            made = make(clock)
            try:
                await test(made, **names)
            finally:
                leave(made)

        @functools.wraps(test)
        def played(**names: Any) -> None:
            clock = Clock()
            run(play(clock, names), clock)

        parameters = list(inspect.signature(test).parameters.values())[1:]
        played.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return played

    return decorate


async def turns_until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is so, without any time to pass."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come true")


@types.coroutine
def bare_yield() -> Generator[None, None, None]:
    """Await nothing at all, as `asyncio.sleep(0)` does."""
    yield
