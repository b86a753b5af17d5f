"""Connections to the backend, kept between requests."""

import asyncio
from collections.abc import Awaitable, Callable

from core.errors import BACKEND_UNAVAILABLE, GatewayError
from core.listener import is_listener, is_socket_path
from transport.backend_protocol import CROSSING_MS, BackendProtocol, LastActivity
from transport.tcp import open_connection
from transport.ticker import Ticker
from transport.write_batching import WriteBatcher

# llama-server closes a connection that has idled for 5 s, and announces it before the hundredth response.
_IDLE_S = 3.5

# Opens a connection to a host and port; raises OSError.
OpenConnection = Callable[[str, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class ConnectionPool:
    """Every connection to the backend, in use or idle. Of the idle ones the last used is taken first."""

    def __init__(
        self,
        host: str,
        port: int,
        ticker: Ticker,
        batcher: WriteBatcher,
        max_head_bytes: int,
        listener: Callable[[], int | None] | None = None,
        open_connection: OpenConnection = open_connection,
        crossing_ms: int = CROSSING_MS,
    ) -> None:
        """`host` may be a Unix socket's path.

        `listener` returns the identity of the only listener that may get anything (see core.listener). Without it
        every one may.
        """
        self._host = host
        self.port = port
        self._listener = listener
        self._ticker = ticker
        self._batcher = batcher
        self._max_head_bytes = max_head_bytes
        self._open_connection = open_connection
        self._crossing_ms = crossing_ms
        self._connections: dict[BackendProtocol, None] = {}
        self._idle: list[BackendProtocol] = []  # the last used at the end
        self.last_activity = LastActivity()

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def idle_count(self) -> int:
        """Connections that could carry a request at once."""
        return sum(not backend.ended for backend in self._idle)

    def acquire(self) -> BackendProtocol | None:
        """Return an idle connection, if there is one that has not ended."""
        idle = self._idle
        while idle:
            backend = idle.pop()
            if not backend.ended:
                return backend
        return None

    async def connect(self, *, shows_work: bool = True) -> BackendProtocol:
        """Open a connection. Raises BACKEND_UNAVAILABLE, also if another process has taken the backend's address.

        Without `shows_work` its bytes are no sign that the backend's work goes on.
        """
        listener = self._listener() if self._listener is not None else None  # known before connecting: see is_listener
        try:
            reader, writer = await self._open()
        except OSError as error:
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend does not accept connections.") from error
        if self._listener is not None and not is_listener(writer.get_extra_info("socket"), listener):
            writer.transport.abort()
            raise GatewayError(BACKEND_UNAVAILABLE, "Another process listens at the backend's address.")
        activity = self.last_activity if shows_work else LastActivity()
        backend = BackendProtocol(
            writer, self._ticker, self._batcher, self._max_head_bytes, activity, self._crossing_ms
        )
        backend.on_lost = self._forget
        backend.deadline_s = self._ticker.now_s + _IDLE_S  # if its request has ended before it was used
        self._connections[backend] = None
        if reader.at_eof():
            backend.abort()
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend closed a new connection.")
        return backend

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if is_socket_path(self._host):
            return await asyncio.open_unix_connection(self._host)
        return await self._open_connection(self._host, self.port)

    def release(self, backend: BackendProtocol, reusable: bool) -> None:
        """Keep a connection whose last response was read to its end; close one that cannot carry another request.

        A connection that has not taken all of its request cannot, whatever it has answered. One that is being left
        closes on its own.
        """
        if reusable and not backend.ended and not backend.transport.get_write_buffer_size():
            backend.park(_IDLE_S)
            self._idle.append(backend)
        elif not backend.leaving:
            backend.abort()

    def on_tick(self, now_s: float) -> None:
        for backend in tuple(self._connections):
            backend.check_time(now_s)

    def end_leaving(self) -> None:
        """Wait no longer for the backend to end connections that have been left."""
        for backend in tuple(self._connections):
            if backend.leaving and not backend.ended:
                backend.on_timeout(self._ticker.now_s)

    def close_idle(self) -> None:
        for backend in tuple(self._idle):
            backend.abort()

    def _forget(self, backend: BackendProtocol) -> None:
        self._connections.pop(backend, None)
        if backend in self._idle:
            self._idle.remove(backend)
