"""One measured request: what a client of an OpenAI-compatible address sees and when.

A client of its own rather than a library's, so that the time between a token's arrival and its time stamp is short and
the same for every target. It counts tokens by what llama-server says (`timings`, else `usage`) and never by looking at
the text. It retries nothing: a failed request is a result.
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

HEAD_BYTES = 65536
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}


@dataclass(frozen=True)
class Target:
    """One address under measurement; the key stays out of every report."""

    name: str
    url: str
    key: str = field(default="", repr=False)

    @property
    def address(self) -> tuple[str, int, bool]:
        """(host, port, TLS)."""
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        return parts.hostname or "", parts.port or (443 if tls else 80), tls

    def check(self) -> None:
        """Raises ValueError where the URL or the key cannot be used."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"--{self.name} {self.url!r} is not an http or https URL")
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError(f"the key for --{self.name} holds characters that no key has")

    def request(self, method: str, path: str, body: object = None) -> bytes:
        payload = b"" if body is None else json.dumps(body).encode()
        parts = urlsplit(self.url)
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
        lines += [f"Authorization: Bearer {self.key}"] * bool(self.key)
        lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}", "", ""]
        return "\r\n".join(lines).encode() + payload


@dataclass(frozen=True)
class Sample:
    """What one request came to; seconds from its first byte on. `error` is empty where all went well."""

    error: str = ""
    total_s: float = 0.0
    first_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    events: int = 0
    tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_per_second: float | None = None
    prompt_per_second: float | None = None


class Stale(Exception):
    """The target had closed a kept connection before this request came to it."""


class Failed(Exception):
    """The request came to nothing; the text is what the report counts it under."""


@dataclass
class Reading:
    """What is known of an answer so far."""

    began_s: float
    arrivals_s: list[float] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    ended: bool = False

    def take_event(self, data: bytes, now_s: float) -> None:
        """Note one event of a stream, which arrived now."""
        if data == b"[DONE]":
            self.ended = True
            return
        event = parse_json(data)
        if "error" in event:
            raise Failed(f"error in stream: {code_of(event)}")
        if any(has_text(choice) for choice in event.get("choices") or ()):
            self.arrivals_s.append(now_s)
        self.take_counts(event)

    def take_counts(self, answer: dict[str, Any]) -> None:
        self.timings = answer.get("timings") or self.timings
        self.usage = answer.get("usage") or self.usage

    def sample(self, now_s: float) -> Sample:
        arrivals = self.arrivals_s
        prompt = self.usage.get("prompt_tokens")
        if self.timings:
            prompt = self.timings.get("cache_n", 0) + self.timings.get("prompt_n", 0)
        return Sample(
            total_s=now_s - self.began_s,
            first_s=arrivals[0] - self.began_s if arrivals else None,
            gaps_s=tuple(later - earlier for earlier, later in pairwise(arrivals)),
            events=len(arrivals),
            tokens=self.timings.get("predicted_n", self.usage.get("completion_tokens")),
            prompt_tokens=prompt,
            cached_tokens=self.timings.get("cache_n"),
            predicted_per_second=self.timings.get("predicted_per_second"),
            prompt_per_second=self.timings.get("prompt_per_second"),
        )


def has_text(choice: dict[str, Any]) -> bool:
    """Tell whether a choice of an event brings a piece of the answer."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def parse_json(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        raise Failed("answer is not JSON") from None
    return parsed if isinstance(parsed, dict) else {}


def code_of(answer: dict[str, Any]) -> str:
    """Name an error by its code, or else by its type."""
    error = answer.get("error")
    if not isinstance(error, dict):
        return "unknown"
    code = error.get("code")
    return str(code if isinstance(code, str) else error.get("type", "unknown"))


@dataclass(frozen=True)
class Head:
    status: int
    fields: dict[str, str]


class Connection:
    """One client's connection to a target: kept alive, and opened anew where the target closed it."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._served = False
        self._received = False

    async def open(self) -> None:
        """Connect unless connected, so that no measurement contains a handshake. Raises Failed."""
        if self._writer and not self._reader.at_eof():
            return
        self.close()
        host, port, tls = self._target.address
        context = ssl.create_default_context() if tls else None
        opening = asyncio.open_connection(host, port, ssl=context, limit=HEAD_BYTES)
        try:
            self._reader, self._writer = await asyncio.wait_for(opening, self._timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            raise Failed(f"cannot connect: {name_of(error)}") from None
        self._served = False

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    async def measure(self, request: bytes) -> Sample:
        """Send the request and follow its answer to the end. Failures are samples, too.

        Where a connection that has served before brings nothing at all, the target had closed it (llama-server does so
        after every stream): the request is sent once more on a new one, and the clock starts anew.
        """
        try:
            return await self._attempt(request)
        except Stale:
            return await self._attempt(request)

    async def _attempt(self, request: bytes) -> Sample:
        began_s = time.perf_counter()
        try:
            await self.open()
            began_s = time.perf_counter()
            reading = await asyncio.wait_for(self._follow(request, began_s), self._timeout_s)
            return reading.sample(time.perf_counter())
        except Failed as failure:
            error = str(failure)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError) as broken:
            error = name_of(broken)
            if self._served and not self._received and not isinstance(broken, asyncio.TimeoutError):
                self.close()
                raise Stale from None
        self.close()
        return Sample(error=error, total_s=time.perf_counter() - began_s)

    async def fetch(self, path: str) -> dict[str, Any]:
        """Get a page of JSON; an empty one where there is none to be had."""
        try:
            await self.open()
            body = await asyncio.wait_for(self._fetch(path), self._timeout_s)
            return parse_json(body)
        except (Failed, OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError):
            self.close()
            return {}

    async def _fetch(self, path: str) -> bytes:
        self._send(self._target.request("GET", path))
        head = await self._read_head()
        return b"".join([piece async for piece in self._pieces(head)])

    async def _follow(self, request: bytes, began_s: float) -> Reading:
        self._send(request)
        head = await self._read_head()
        reading = Reading(began_s)
        if head.status == 200 and "text/event-stream" in head.fields.get("content-type", ""):
            await self._follow_events(head, reading)
        else:
            body = b"".join([piece async for piece in self._pieces(head)])
            if head.status != 200:
                raise Failed(f"{head.status} {code_of(json_or_nothing(body))}")
            reading.take_counts(parse_json(body))
        return reading

    async def _follow_events(self, head: Head, reading: Reading) -> None:
        rest = b""
        async for piece in self._pieces(head):
            now_s = time.perf_counter()
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        reading.take_event(line[5:].strip(), now_s)
        if not reading.ended:
            raise Failed("stream ended early")

    def _send(self, request: bytes) -> None:
        assert self._writer is not None
        self._received = False
        self._writer.write(request)

    async def _read_head(self) -> Head:
        head = await self._reader.readuntil(b"\r\n\r\n")
        self._received = True
        line, *rest = head.decode("latin-1").split("\r\n")
        version, _, status = line.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise Failed("answer is not HTTP")
        pairs = (pair.partition(":") for pair in rest if pair)
        return Head(int(status[:3]), {name.lower(): value.strip() for name, _, value in pairs})

    async def _pieces(self, head: Head) -> AsyncIterator[bytes]:
        """Yield the body as it comes, its transfer coding removed; then close what cannot be used again."""
        if "chunked" in head.fields.get("transfer-encoding", ""):
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readuntil(b"\r\n")
        elif "content-length" in head.fields:
            yield await self._reader.readexactly(int(head.fields["content-length"]))
        else:
            while piece := await self._reader.read(HEAD_BYTES):
                yield piece
        self._served = True
        if head.fields.get("connection", "").lower() == "close" or self._reader.at_eof():
            self.close()


def json_or_nothing(body: bytes) -> dict[str, Any]:
    try:
        return parse_json(body)
    except Failed:
        return {}


def name_of(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    if isinstance(error, EOFError):
        return "connection closed early"
    if isinstance(error, ValueError):
        return "answer is not HTTP"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else type(error).__name__
