"""A client that sends and reads plain bytes, with a strict response reader that is independent of the product."""

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.backend import reset_on_close
from support.clock import HURRY, PATIENCE_S


@dataclass(frozen=True)
class Response:
    """One response: `head` and `coded` (the body in its transfer coding) as received, and `body` decoded."""

    head: bytes
    coded: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head[9:12])

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        lines = self.head[:-4].split(b"\r\n")[1:]
        return [tuple(line.split(b": ", 1)) for line in lines]

    def all(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found.lower() == name.lower()]

    def field(self, name: bytes) -> bytes | None:
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error in the OpenAI dialect."""
        return str(self.json["error"]["code"])


class RawClient(asyncio.Protocol):
    """One connection. `ended` is empty while it is open, then "fin" or "reset"."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.received = bytearray()
        self.total = 0
        self.ended = ""
        self._changed = asyncio.Event()

    @classmethod
    async def connect(
        cls, port: int, *, tls: ssl.SSLContext | None = None, receive_buffer: int = 0, host: str = "127.0.0.1"
    ) -> "RawClient":
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (host, port))
            names = {"ssl": tls, "server_hostname": "localhost"} if tls else {}
            _, client = await loop.create_connection(cls, sock=sock, **names)
        except BaseException:
            sock.close()
            raise
        return client

    # --- The protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.total += len(data)
        self._changed.set()

    def eof_received(self) -> bool:
        self.ended = self.ended or "fin"
        self._changed.set()
        return self.transport.get_extra_info("sslcontext") is None  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.ended or ("reset" if isinstance(exc, ConnectionError) else "fin")
        self._changed.set()

    # --- Sending ---

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def half_close(self) -> None:
        self.transport.write_eof()

    def close(self) -> None:
        """Leave with a FIN. The kernel sends a reset instead if received bytes are unread."""
        self.transport.abort()

    def reset(self) -> None:
        reset_on_close(self.transport)
        self.transport.abort()

    # --- Reading ---

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), PATIENCE_S * HURRY)
            except asyncio.TimeoutError:
                raise AssertionError(
                    f"waited in vain; received {bytes(self.received[-2000:])!r} {self.ended}"
                ) from None

    async def take(self, size: int) -> bytes:
        """Read so many bytes."""
        await self.until(lambda: len(self.received) >= size or bool(self.ended))
        assert len(self.received) >= size, f"ended ({self.ended}) after {bytes(self.received)!r}"
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    async def take_through(self, mark: bytes) -> bytes:
        """Read up to the next `mark`, and the mark."""
        await self.until(lambda: mark in self.received or bool(self.ended))
        at = self.received.find(mark)
        assert at >= 0, f"ended ({self.ended}) after {bytes(self.received)!r}"
        return await self.take(at + len(mark))

    async def take_all(self) -> bytes:
        """Read up to the end of the connection."""
        await self.until(lambda: bool(self.ended))
        return await self.take(len(self.received))

    async def silent(self) -> None:
        """Assert that nothing arrives. What was sent before would arrive within a few iterations of the loop."""
        for _ in range(20):
            await asyncio.sleep(0)
        assert not self.received, f"received {bytes(self.received)!r}"
        assert not self.ended, f"ended ({self.ended})"

    async def response(self, method: bytes = b"GET") -> Response:
        """Read one whole response. An interim response counts as one."""
        head = await self.take_through(b"\r\n\r\n")
        response = Response(head, b"", b"")
        if method == b"HEAD" or response.status < 200 or response.status in (204, 304):
            return response
        if response.field(b"transfer-encoding") is not None:
            assert response.field(b"transfer-encoding") == b"chunked"
            assert response.field(b"content-length") is None
            coded, body = await self.chunks()
            return Response(head, coded, body)
        length = response.field(b"content-length")
        coded = await self.take_all() if length is None else await self.take(int(length))
        return Response(head, coded, coded)

    async def chunks(self) -> tuple[bytes, bytes]:
        """Read a chunked body. Returns it in its coding and decoded."""
        coded, payload, size = bytearray(), bytearray(), -1
        while size:
            line = await self.take_through(b"\r\n")
            size = int(line.split(b";")[0], 16)
            data = await self.take(size + 2)
            assert data.endswith(b"\r\n")
            coded += line + data
            payload += data[:-2]
        return bytes(coded), bytes(payload)
