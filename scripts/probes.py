"""One question over HTTP, with one deadline: is a service there, and what does it say?"""

import asyncio
import json
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass

ANSWER_BYTES = 1 << 20
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """Where a service listens; `tls` is not verified, as the question stays on this machine."""

    host: str
    port: int
    tls: bool = False


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True)
class Activity:
    """What the gateway's /health tells of its work: requests at the backend and waiting, seconds of silence."""

    active: int
    queued: int
    backend_silent_s: float
    idle_s: float

    @property
    def working(self) -> bool:
        return bool(self.active or self.queued)


async def ask(address: Address, path: str, timeout_s: float, key: str | None = None) -> Answer | None:
    """GET a path; None where nobody answers within `timeout_s`, whatever the reason."""
    # Not wait_for: before Python 3.12 it may swallow the cancellation of whoever asks.
    exchange = asyncio.ensure_future(_exchange(address, path, key))
    try:
        done, _ = await asyncio.wait([exchange], timeout=timeout_s)
    finally:
        exchange.cancel()
    return exchange.result() if done else None


async def _exchange(address: Address, path: str, key: str | None) -> Answer | None:
    with suppress(OSError):
        return await _get(address, path, key)
    return None


async def _get(address: Address, path: str, key: str | None) -> Answer | None:
    host = ANYWHERE.get(address.host, address.host)
    reader, writer = await asyncio.open_connection(host, address.port, ssl=_trusting() if address.tls else None)
    try:
        fields = f"Host: {host}\r\nConnection: close\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        writer.write(f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode())
        return _answer(await _read_all(reader))
    finally:
        writer.transport.abort()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    raw = b""
    while len(raw) < ANSWER_BYTES and (more := await reader.read(65536)):
        raw += more
    return raw


def _answer(raw: bytes) -> Answer | None:
    match = re.match(rb"HTTP/1\.[01] ([0-9]{3})[ \r]", raw)
    return Answer(int(match[1]), raw.partition(b"\r\n\r\n")[2]) if match else None


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def parse_activity(answer: Answer | None) -> Activity | None:
    """Read the gateway's /health; None where it does not answer or does not tell."""
    try:
        told = json.loads(answer.body) if answer else {}
        silent_s = float(told["backend_silent_s"] or 0)
        return Activity(int(told["active"]), int(told.get("queued", 0)), silent_s, float(told["idle_s"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
