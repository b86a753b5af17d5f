"""One measured request to an OpenAI-compatible address: what its client receives, and when.

No client library is used, so that the time between the arrival of a token and its time stamp is short and the same for
every target. Token counts are those of llama-server (`timings`, else `usage`), never derived from the text. A failed
request is a result and is not retried.
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
    """One address to measure. The key appears in no report."""

    name: str
    url: str
    key: str = field(default="", repr=False)

    @property
    def address(self) -> tuple[str, int, bool]:
        """Return (host, port, whether TLS is used)."""
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        return parts.hostname or "", parts.port or (443 if tls else 80), tls

    def validate(self) -> None:
        """Raise ValueError if the URL or the key is invalid."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"--{self.name} {self.url!r} is not an http or https URL")
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError(f"the key for --{self.name} contains characters that are not allowed in a key")

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """Return a whole HTTP request. The body is sent as JSON; path is appended to the path of the URL."""
        payload = b"" if body is None else json.dumps(body).encode()
        parts = urlsplit(self.url)
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
        lines += [f"Authorization: Bearer {self.key}"] * bool(self.key)
        lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}", "", ""]
        return "\r\n".join(lines).encode() + payload


@dataclass(frozen=True)
class Sample:
    """The result of one request. Times are seconds since its first byte was sent. `error` is empty on success."""

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


class StaleConnection(Exception):
    """The target closed a kept-alive connection before it received this request."""


class RequestFailed(Exception):
    """The request failed. The report counts failures by this message."""


@dataclass
class Measurement:
    """What has been received of an answer so far, and when."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    ended: bool = False

    def add_event(self, data: bytes, now_s: float) -> None:
        """Record the data of one server-sent event that arrived at now_s."""
        if data == b"[DONE]":
            self.ended = True
            return
        event = parse_json(data)
        if "error" in event:
            raise RequestFailed(f"error in stream: {error_code(event)}")
        if any(has_text(choice) for choice in event.get("choices") or ()):
            self.arrivals_s.append(now_s)
        self.add_counts(event)

    def add_counts(self, answer: dict[str, Any]) -> None:
        """Record the token counts that an event or a whole answer contains."""
        self.timings = answer.get("timings") or self.timings
        self.usage = answer.get("usage") or self.usage

    def to_sample(self, now_s: float) -> Sample:
        arrivals = self.arrivals_s
        prompt = self.usage.get("prompt_tokens")
        if self.timings:
            prompt = self.timings.get("cache_n", 0) + self.timings.get("prompt_n", 0)
        return Sample(
            total_s=now_s - self.started_s,
            first_s=arrivals[0] - self.started_s if arrivals else None,
            gaps_s=tuple(later - earlier for earlier, later in pairwise(arrivals)),
            events=len(arrivals),
            tokens=self.timings.get("predicted_n", self.usage.get("completion_tokens")),
            prompt_tokens=prompt,
            cached_tokens=self.timings.get("cache_n"),
            predicted_per_second=self.timings.get("predicted_per_second"),
            prompt_per_second=self.timings.get("prompt_per_second"),
        )


def has_text(choice: dict[str, Any]) -> bool:
    """Return whether a choice of an event contains a part of the answer."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def parse_json(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        raise RequestFailed("answer is not JSON") from None
    return parsed if isinstance(parsed, dict) else {}


def error_code(answer: dict[str, Any]) -> str:
    """Return the code of an error answer, else its type."""
    error = answer.get("error")
    if not isinstance(error, dict):
        return "unknown"
    code = error.get("code")
    return str(code if isinstance(code, str) else error.get("type", "unknown"))


@dataclass(frozen=True)
class AnswerHead:
    """The head of an answer; the names of its fields are in lower case."""

    status: int
    fields: dict[str, str]


class TargetConnection:
    """A keep-alive connection to a target. It is opened again if the target closed it."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._served = False
        self._received = False

    async def open(self) -> None:
        """Connect unless connected. Called before the clock starts, so no time includes it. Raises RequestFailed."""
        if self._writer and not self._reader.at_eof():
            return
        self.close()
        host, port, tls = self._target.address
        context = ssl.create_default_context() if tls else None
        connecting = asyncio.open_connection(host, port, ssl=context, limit=HEAD_BYTES)
        try:
            self._reader, self._writer = await asyncio.wait_for(connecting, self._timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            raise RequestFailed(f"cannot connect: {error_name(error)}") from None
        self._served = False

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    async def measure(self, request: bytes) -> Sample:
        """Send the request, receive the whole answer and return its sample. A failure is a sample too.

        If a connection that served a request before returns no byte, the target had closed it, as llama-server does
        after every stream. The request is then sent again on a new connection, and the clock restarts.
        """
        try:
            return await self._attempt(request)
        except StaleConnection:
            return await self._attempt(request)

    async def _attempt(self, request: bytes) -> Sample:
        started_s = time.perf_counter()
        try:
            await self.open()
            started_s = time.perf_counter()
            measurement = await asyncio.wait_for(self._receive(request, started_s), self._timeout_s)
            return measurement.to_sample(time.perf_counter())
        except RequestFailed as failure:
            error = str(failure)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError) as exception:
            error = error_name(exception)
            if self._served and not self._received and not isinstance(exception, asyncio.TimeoutError):
                self.close()
                raise StaleConnection from None
        self.close()
        return Sample(error=error, total_s=time.perf_counter() - started_s)

    async def fetch(self, path: str) -> dict[str, Any]:
        """Return a JSON object from the target, or an empty one on any failure."""
        try:
            await self.open()
            body = await asyncio.wait_for(self._fetch(path), self._timeout_s)
            return parse_json(body)
        except (RequestFailed, OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError):
            self.close()
            return {}

    async def _fetch(self, path: str) -> bytes:
        self._send(self._target.request("GET", path))
        head = await self._read_head()
        return b"".join([piece async for piece in self._body(head)])

    async def _receive(self, request: bytes, started_s: float) -> Measurement:
        self._send(request)
        head = await self._read_head()
        measurement = Measurement(started_s)
        if head.status == 200 and "text/event-stream" in head.fields.get("content-type", ""):
            await self._receive_events(head, measurement)
        else:
            body = b"".join([piece async for piece in self._body(head)])
            if head.status != 200:
                raise RequestFailed(f"{head.status} {error_code(parse_json_or_empty(body))}")
            measurement.add_counts(parse_json(body))
        return measurement

    async def _receive_events(self, head: AnswerHead, measurement: Measurement) -> None:
        buffer = b""
        async for piece in self._body(head):
            now_s = time.perf_counter()
            *events, buffer = (buffer + piece).split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        measurement.add_event(line[5:].strip(), now_s)
        if not measurement.ended:
            raise RequestFailed("stream ended early")

    def _send(self, request: bytes) -> None:
        assert self._writer is not None
        self._received = False
        self._writer.write(request)

    async def _read_head(self) -> AnswerHead:
        head = await self._reader.readuntil(b"\r\n\r\n")
        self._received = True
        line, *rest = head.decode("latin-1").split("\r\n")
        version, _, status = line.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise RequestFailed("answer is not HTTP")
        pairs = (pair.partition(":") for pair in rest if pair)
        return AnswerHead(int(status[:3]), {name.lower(): value.strip() for name, _, value in pairs})

    async def _body(self, head: AnswerHead) -> AsyncIterator[bytes]:
        """Yield the body as it arrives, without its transfer coding. Then close a connection that cannot be reused."""
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


def parse_json_or_empty(body: bytes) -> dict[str, Any]:
    try:
        return parse_json(body)
    except RequestFailed:
        return {}


def error_name(error: BaseException) -> str:
    """Return the name under which the report counts an exception."""
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    if isinstance(error, EOFError):
        return "connection closed early"
    if isinstance(error, ValueError):
        return "answer is not HTTP"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else type(error).__name__
