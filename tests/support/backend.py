"""A scripted backend: a list of steps for each request, over a real socket on a free port.

    backend.script(expect(b"GET / HTTP/1.1\\r\\n…"), send(b"HTTP/1.1 200 OK\\r\\n…"), stall(event), send(b"…"), reset())

Requests take the scripts in order. A request without a script gets `backend.default`. The gateway's own requests
(/health, /props, /slots) have no X-Request-Id: they are answered from `backend.own` and listed in `backend.probes`. All
others are in `backend.calls`, byte for byte.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from support.ports import reserved_port

PIECE_BYTES = 65536
HELLO = b'{"hello": "world"}'


def answer(body: bytes = HELLO, status: bytes = b"200 OK", *fields: bytes) -> bytes:
    """Return a sized response as bytes."""
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join([*lines, b"", body])


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(text: str) -> bytes:
    return b"data: %b\n\n" % text.encode()


def reset_on_close(transport: asyncio.BaseTransport) -> None:
    """Make the next close a reset."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def full_backlog() -> Iterator[int]:
    """Yield a port on which connecting neither succeeds nor fails, since its queue is full."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class Ended(Exception):
    """The connection is over, and so is the script."""


@dataclass
class Call:
    """One request as it arrived, and its connection."""

    raw: bytes
    connection: "Connection"
    arrived_s: float = 0.0

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def target(self) -> bytes:
        return self.raw.split(b" ", 2)[1]

    @property
    def fields(self) -> dict[bytes, bytes]:
        """Field values by lower-case name. Of several with one name, the last."""
        lines = self.head[:-4].split(b"\r\n")[1:]
        pairs = (line.split(b": ", 1) for line in lines)
        return {name.lower(): value for name, value in pairs}

    @property
    def gone(self) -> asyncio.Event:
        """Set once the gateway has closed this connection."""
        return self.connection.gone


Step = Callable[[Call], Awaitable[None]]


def send(data: bytes, piece: int = PIECE_BYTES) -> Step:
    """Send bytes in pieces, with an iteration of the loop between them, so that the gateway reads each alone."""

    async def step(call: Call) -> None:
        for start in range(0, len(data), piece):
            await call.connection.write(data[start : start + piece])
            await asyncio.sleep(0)

    return step


def stall(until: asyncio.Event | None = None) -> Step:
    """Send nothing until the event is set, or without one until the gateway closes the connection."""

    async def step(call: Call) -> None:
        gone = asyncio.ensure_future(call.gone.wait())
        waits = [gone] if until is None else [gone, asyncio.ensure_future(until.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if until is None or not until.is_set():
            raise Ended

    return step


def reach(event: asyncio.Event) -> Step:
    """Set the event: the script has come this far."""

    async def step(call: Call) -> None:
        event.set()

    return step


def reset() -> Step:
    async def step(call: Call) -> None:
        reset_on_close(call.connection.transport)
        call.connection.transport.abort()
        raise Ended

    return step


def close() -> Step:
    async def step(call: Call) -> None:
        call.connection.transport.close()
        raise Ended

    return step


def expect(raw: bytes) -> Step:
    """Assert that the request is exactly these bytes."""

    async def step(call: Call) -> None:
        assert call.raw == raw, f"\n{call.raw!r}\nis not\n{raw!r}"

    return step


class Connection(asyncio.Protocol):
    """One connection of the gateway: reads requests and plays the script of each one."""

    transport: asyncio.Transport

    def __init__(self, backend: "Backend") -> None:
        self.backend = backend
        self.gone = asyncio.Event()
        self.stays = False  # it does not close when the gateway has sent its last byte
        self.buffer = bytearray()
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.backend.connections.append(self)
        self.backend.open.add(self)
        self.task = asyncio.ensure_future(self.serve())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self._changed.set()

    def eof_received(self) -> bool:
        self._leave()
        return self.stays

    def connection_lost(self, exc: Exception | None) -> None:
        self.backend.open.discard(self)
        self._leave()

    def _leave(self) -> None:
        self.gone.set()
        self._changed.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    @property
    def can_write(self) -> bool:
        """Whether the gateway still reads what is sent."""
        return self._writable.is_set()

    async def write(self, data: bytes) -> None:
        await self._writable.wait()
        if self.gone.is_set():
            raise Ended
        self.transport.write(data)
        self.backend.sent_bytes += len(data)

    async def serve(self) -> None:
        try:
            while True:
                call = Call(await self._request(), self, asyncio.get_running_loop().time())
                for step in self.backend.steps(call):
                    await step(call)
        except Ended:
            pass
        except AssertionError as error:
            self.backend.failures.append(error)
            self.transport.abort()

    async def _request(self) -> bytes:
        while (length := request_length(bytes(self.buffer))) is None:
            if self.gone.is_set():
                raise Ended
            self._changed.clear()
            await self._changed.wait()
        raw = bytes(self.buffer[:length])
        del self.buffer[:length]
        return raw


def request_length(data: bytes) -> int | None:
    """Return the length of the first request; None if it is incomplete. The gateway always sends a Content-Length."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    assert b"transfer-encoding" not in head.lower()
    lengths = [line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    assert len(lengths) <= 1, head
    length = int(lengths[0]) if lengths else 0
    return len(head) + 4 + length if len(body) >= length else None


@dataclass
class Backend:
    """The listening socket, the requests that arrived, and the scripts."""

    default: tuple[Step, ...] = (send(answer()),)
    own: dict[bytes, bytes] = field(default_factory=dict)  # the responses to the gateway's own requests, by target
    calls: list[Call] = field(default_factory=list)
    probes: list[bytes] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    open: set[Connection] = field(default_factory=set)
    failures: list[AssertionError] = field(default_factory=list)
    choose: Callable[[Call], tuple[Step, ...]] | None = None
    own_steps: Callable[[Call], tuple[Step, ...] | None] | None = None  # before `own`
    sent_bytes: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.own = {b"/health": answer(b"{}"), **self.own}
        self._scripts: deque[tuple[Step, ...]] = deque()
        self._called = asyncio.Event()
        self._server: asyncio.AbstractServer | None = None
        self._reserved: socket.socket | None = None

    def script(self, *steps: Step) -> None:
        """Add the script for the next request that has none yet."""
        self._scripts.append(steps)

    def steps(self, call: Call) -> tuple[Step, ...]:
        if b"x-request-id" not in call.fields:
            self.probes.append(call.target)
            steps = None if self.own_steps is None else self.own_steps(call)
            if steps is not None:
                return steps
            return (send(self.own.get(call.target, answer(b"{}", b"501 Not Implemented"))),)
        self.calls.append(call)
        self._called.set()
        if self.choose is not None:
            return self.choose(call)
        return self._scripts.popleft() if self._scripts else self.default

    @property
    def used(self) -> list[Connection]:
        """The connections that carried requests of clients, each once, in order."""
        return list(dict.fromkeys(call.connection for call in self.calls))

    async def call(self, number: int = 0) -> Call:
        """Wait for the request with that number; return it."""
        while len(self.calls) <= number:
            self._called.clear()
            await self._called.wait()
        return self.calls[number]

    async def listen(self) -> None:
        """Listen: on a free port the first time, on the same one later."""
        if self._reserved is None:
            self._reserved = reserved_port()
            self.port = self._reserved.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=1024)

    def refuse(self) -> None:
        """Refuse new connections. Open ones stay, and the port is assigned to no other socket."""
        assert self._server is not None
        self._server.close()

    def resume_reading(self) -> None:
        """Let connections that a test has paused see that the gateway has closed them."""
        for connection in self.open:
            if not connection.transport.is_closing():
                connection.transport.resume_reading()

    async def stop(self) -> None:
        assert self._server is not None
        assert self._reserved is not None
        self._server.close()
        self._reserved.close()
        for connection in self.connections:
            if connection in self.open:  # asyncio cannot abort what has been closed with bytes to send
                connection.transport.abort()
            connection.task.cancel()
        await asyncio.gather(*(connection.task for connection in self.connections), return_exceptions=True)
        if self.failures:
            raise self.failures[0]
