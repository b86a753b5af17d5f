"""One request to a local service, with one deadline: whether it responds, and what."""

import asyncio
import json
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass

from core.listener import is_listener, is_socket_path

MAX_RESPONSE_BYTES = 1 << 20
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - an address to connect to


@dataclass(frozen=True)
class Address:
    """Where a service listens. `host` may be a Unix socket's path.

    `tls` does not verify the certificate, since the connection stays on this machine.
    """

    host: str
    port: int
    tls: bool = False


@dataclass(frozen=True)
class ProbeResponse:
    """A whole response."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Activity:
    """The gateway's load as its /health reports it.

    Requests at the backend, requests that wait for a slot, seconds since the backend's last byte, and since the last
    request; bytes of the bodies that the backend has not begun to answer. `blamed`: if the backend has ended now, a
    request is the likely cause.
    """

    active: int
    queued: int
    backend_silent_s: float
    idle_s: float
    unanswered_bytes: int = 0
    blamed: bool = False

    @property
    def working(self) -> bool:
        return bool(self.active or self.queued)


async def probe(
    address: Address,
    path: str,
    timeout_s: float,
    key: str | None = None,
    *,
    listener: int | None = None,
    body: bytes | None = None,
) -> ProbeResponse | None:
    """GET a path, or POST a JSON `body`; return None if no response arrives within `timeout_s`, for any reason.

    With `listener` only the listener with this identity (see core.listener) gets the request.
    """
    # Not wait_for: before Python 3.12 it may swallow a cancellation.
    task = asyncio.ensure_future(_try_send(address, path, key, listener, body))
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
    finally:
        task.cancel()
    return task.result() if done else None


async def _try_send(
    address: Address, path: str, key: str | None, listener: int | None, body: bytes | None
) -> ProbeResponse | None:
    with suppress(OSError):
        return await _send(address, path, key, listener, body)
    return None


async def _send(
    address: Address, path: str, key: str | None, listener: int | None, body: bytes | None
) -> ProbeResponse | None:
    reader, writer = await _connect(address)
    try:
        if listener is not None and not is_listener(writer.get_extra_info("socket"), listener):
            return None
        host = "localhost" if is_socket_path(address.host) else LOOPBACK_OF.get(address.host, address.host)
        fields = f"Host: {host}\r\nConnection: close\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        if body is not None:
            fields += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        method = "GET" if body is None else "POST"
        writer.write(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + (body or b""))
        return _parse(await _read_all(reader))
    finally:
        writer.transport.abort()


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if is_socket_path(address.host):
        return await asyncio.open_unix_connection(address.host)
    host = LOOPBACK_OF.get(address.host, address.host)
    return await asyncio.open_connection(host, address.port, ssl=_unverified_tls() if address.tls else None)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    raw = b""
    while len(raw) < MAX_RESPONSE_BYTES and (more := await reader.read(65536)):
        raw += more
    return raw


def _parse(raw: bytes) -> ProbeResponse | None:
    match = re.match(rb"HTTP/1\.[01] ([0-9]{3})[ \r]", raw)
    return ProbeResponse(int(match[1]), raw.partition(b"\r\n\r\n")[2]) if match else None


def _unverified_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def parse_activity(response: ProbeResponse | None) -> Activity | None:
    """Parse the gateway's /health; None if there is no response or the body lacks a member."""
    try:
        fields = json.loads(response.body) if response else {}
        silent_s = float(fields["backend_silent_s"] or 0)
        return Activity(
            int(fields["active"]),
            int(fields.get("queued", 0)),
            silent_s,
            float(fields["idle_s"]),
            int(fields.get("unanswered_bytes", 0)),
            fields.get("blamed") is True,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
