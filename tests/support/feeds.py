"""Ways in which the same bytes can arrive, and readers that summarize in one line what http1 parses from them.

The readers do what the gateway's protocols do, without a socket: read a head, its framing and a body, then start again
with the remaining bytes.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from config.settings import Limits
from core.errors import GatewayError
from http1.bodies import Body, RequestBody, response_body
from http1.grammar import (
    HEAD_END,
    HeadScanner,
    RequestHead,
    ResponseHead,
    connection_options,
    expects_continue,
    parse_request_head,
    parse_response_head,
    request_framing,
    response_framing,
    wants_keep_alive,
)

Feed = Callable[[bytes], list[bytes]]


def in_pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


FEEDS: dict[str, Feed] = {
    "whole": lambda raw: [raw],
    "bytewise": lambda raw: in_pieces(raw, 1),
    "torn crlf": lambda raw: re.split(rb"(?<=\r)(?=\n)", raw),
    "pairs": lambda raw: in_pieces(raw, 2),
    "halves": lambda raw: [raw[: len(raw) // 2], raw[len(raw) // 2 :]],
}


def halves(raw: bytes) -> Iterable[list[bytes]]:
    """The bytes in two pieces, split at every position."""
    return ([raw[:at], raw[at:]] for at in range(len(raw) + 1))


# --- Requests ---


class RequestReader:
    """Reads the requests of one connection; `seen` has a line for each, and then the error's code, if any."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scanner = HeadScanner(limits)
        self._head: RequestHead | None = None
        self._body: RequestBody | None = None
        self.heads: list[RequestHead] = []
        self.payloads: list[bytes] = []
        self.seen: list[str] = []
        self.error: GatewayError | None = None

    def feed(self, data: bytes) -> None:
        try:
            while self.error is None and (data := self._read(data)):
                pass
        except GatewayError as error:
            self.error = error
            self.seen.append(error.kind.code)

    def _read(self, data: bytes) -> bytes:
        """Consume bytes for one head or one body; return the remaining ones."""
        if self._body is None:
            raw = self._scanner.feed(data)
            if raw is None:
                return b""
            data = self._scanner.trailing_data
            self._begin(raw)
        assert self._body is not None
        remaining = data
        if not self._body.done:
            self._body.feed(data)
            remaining = self._body.trailing_data if self._body.done else b""
        if self._body.done:
            self._end(self._body)
        return remaining

    def _begin(self, raw: bytes) -> None:
        self._head = parse_request_head(raw, self._limits)
        framing = request_framing(self._head, self._limits)
        expects_continue(self._head)
        self._body = RequestBody(framing.length, self._limits)

    def _end(self, body: RequestBody) -> None:
        assert self._head is not None
        payload = b"".join(body.pieces)
        assert len(payload) == body.payload_bytes
        self.heads.append(self._head)
        self.payloads.append(payload)
        self.seen.append(describe_request(self._head, payload))
        self._body = None

    @property
    def incomplete(self) -> bool:
        """Whether a request has begun and is neither complete nor refused."""
        return self.error is None and (self._body is not None or self._scanner.begun)

    def summary(self) -> str:
        return " then ".join([*self.seen, "more"] if self.incomplete else self.seen)


def read_requests(pieces: Iterable[bytes], limits: Limits) -> RequestReader:
    reader = RequestReader(limits)
    for piece in pieces:
        reader.feed(piece)
    return reader


def describe_request(head: RequestHead, payload: bytes) -> str:
    parts = [head.method.decode(), head.target.decode()]
    if head.minor == 0:
        parts.append("HTTP/1.0")
    parts += describe_fields(head)
    if payload:
        parts.append(describe_bytes(payload))
    if not wants_keep_alive(head.minor, connection_options(head.known)):
        parts.append("close")
    return " ".join(parts)


def describe_fields(head: RequestHead | ResponseHead) -> list[str]:
    """The fields without a meaning to the gateway, which corpus files name x-something."""
    return [f"{name.decode()}={describe_bytes(value)}" for name, value in head.fields if name[:2].lower() == b"x-"]


def describe_bytes(value: bytes) -> str:
    return repr(value)[1:] if len(value) <= 64 else f"{len(value)} bytes"


# --- Responses ---


class ResponseReader:
    """Reads one response as the relay does: its payload, and the bytes that may be relayed unchanged."""

    def __init__(self, method: bytes) -> None:
        self._method = method
        self._raw = b""
        self._head: ResponseHead | None = None
        self.body: Body | None = None
        self.payload = b""
        self.relayed = b""
        self.error: GatewayError | None = None

    def feed(self, data: bytes) -> None:
        try:
            self._feed(data)
        except GatewayError as error:
            self.error = error

    def _feed(self, data: bytes) -> None:
        if self.error is not None:
            return
        if self.body is None:
            self._raw += data
            if not self._begin():
                return
            data = self._raw
        assert self.body is not None
        if self.body.done:
            self.body.trailing_data += data
            return
        self.payload += self.body.feed(data)
        self.relayed += data[: getattr(self.body, "relayable", 0)]

    def _begin(self) -> bool:
        """Read heads, interim ones included, from what has arrived; return whether the final one was among them."""
        while self.body is None and HEAD_END in self._raw:
            raw, _, self._raw = self._raw.partition(HEAD_END)
            self._head = parse_response_head(raw + HEAD_END)
            if self._head.status >= 200:
                self.body = response_body(response_framing(self._head, self._method))
        return self.body is not None

    def summary(self) -> str:
        if self.error is not None:
            return self.error.kind.code
        if self._head is None or self.body is None:
            return "more"
        parts = [self._head.status_line.decode("latin-1"), *describe_fields(self._head)]
        if self.payload:
            parts.append(describe_bytes(self.payload))
        if not self.body.done:
            parts.append("until close" if self.body.ends_at_close() else "more")
        elif not wants_keep_alive(self._head.minor, connection_options(self._head.known)):
            parts.append("close")
        if self.body.trailing_data:
            parts.append(f"trailing={describe_bytes(self.body.trailing_data)}")
        return " ".join(parts)


def read_response(pieces: Sequence[bytes], method: bytes = b"GET") -> ResponseReader:
    reader = ResponseReader(method)
    for piece in pieces:
        reader.feed(piece)
    return reader
