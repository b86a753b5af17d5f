"""Ways in which the same bytes can arrive, and what http1 makes of them, told in one line of text.

The readers here do what the gateway's wires do, without a socket: a head, its framing, a body, and again with what is
left over.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from bodies import Body, RequestBody, response_body
from errors import GatewayError
from http1 import (
    HEAD_END,
    HeadScanner,
    Limits,
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


def in_pieces(raw: bytes, octets: int) -> list[bytes]:
    return [raw[at : at + octets] for at in range(0, len(raw), octets)]


FEEDS: dict[str, Feed] = {
    "whole": lambda raw: [raw],
    "bytewise": lambda raw: in_pieces(raw, 1),
    "torn crlf": lambda raw: re.split(rb"(?<=\r)(?=\n)", raw),
    "pairs": lambda raw: in_pieces(raw, 2),
    "halves": lambda raw: [raw[: len(raw) // 2], raw[len(raw) // 2 :]],
}


def halves(raw: bytes) -> Iterable[list[bytes]]:
    """The bytes in two pieces, torn at every position."""
    return ([raw[:at], raw[at:]] for at in range(len(raw) + 1))


# --- Requests ---


class RequestReader:
    """Reads the requests of one connection; `seen` has a line for each, and the refusal's code comes last."""

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
            while self.error is None and (data := self._take(data)):
                pass
        except GatewayError as error:
            self.error = error
            self.seen.append(error.kind.code)

    def _take(self, data: bytes) -> bytes:
        """Take bytes for one head or one body; return what is left of them."""
        if self._body is None:
            raw = self._scanner.feed(data)
            if raw is None:
                return b""
            data = self._scanner.rest
            self._begin(raw)
        assert self._body is not None
        left = data
        if not self._body.done:
            self._body.feed(data)
            left = self._body.surplus if self._body.done else b""
        if self._body.done:
            self._end(self._body)
        return left

    def _begin(self, raw: bytes) -> None:
        self._head = parse_request_head(raw, self._limits)
        framing = request_framing(self._head, self._limits)
        expects_continue(self._head)
        self._body = RequestBody(framing.length, self._limits)

    def _end(self, body: RequestBody) -> None:
        assert self._head is not None
        payload = b"".join(body.pieces)
        assert len(payload) == body.octets
        self.heads.append(self._head)
        self.payloads.append(payload)
        self.seen.append(told_request(self._head, payload))
        self._body = None

    @property
    def waits(self) -> bool:
        """Whether a request has begun and is neither whole nor refused."""
        return self.error is None and (self._body is not None or self._scanner.begun)

    def told(self) -> str:
        return " then ".join([*self.seen, "more"] if self.waits else self.seen)


def read_requests(pieces: Iterable[bytes], limits: Limits) -> RequestReader:
    reader = RequestReader(limits)
    for piece in pieces:
        reader.feed(piece)
    return reader


def told_request(head: RequestHead, payload: bytes) -> str:
    words = [head.method.decode(), head.target.decode()]
    if head.minor == 0:
        words.append("HTTP/1.0")
    words += told_fields(head)
    if payload:
        words.append(told_octets(payload))
    if not wants_keep_alive(head.minor, connection_options(head.known)):
        words.append("close")
    return " ".join(words)


def told_fields(head: RequestHead | ResponseHead) -> list[str]:
    """The fields that no rule of the gateway's own is about, which corpus files name x-something."""
    return [f"{name.decode()}={told_octets(value)}" for name, value in head.fields if name[:2].lower() == b"x-"]


def told_octets(octets: bytes) -> str:
    return repr(octets)[1:] if len(octets) <= 64 else f"{len(octets)} octets"


# --- Responses ---


class Relayed:
    """One response, read as the relay reads it: the payload, and the bytes that may be passed on as they are."""

    def __init__(self, method: bytes) -> None:
        self._method = method
        self._raw = b""
        self._head: ResponseHead | None = None
        self.body: Body | None = None
        self.payload = b""
        self.passed = b""
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
            self.body.surplus += data
            return
        self.payload += self.body.feed(data)
        self.passed += data[: getattr(self.body, "passable", 0)]

    def _begin(self) -> bool:
        """Read heads from what has come, interim ones too; whether the final one was among them."""
        while self.body is None and HEAD_END in self._raw:
            raw, _, self._raw = self._raw.partition(HEAD_END)
            self._head = parse_response_head(raw + HEAD_END)
            if self._head.status >= 200:
                self.body = response_body(response_framing(self._head, self._method))
        return self.body is not None

    def told(self) -> str:
        if self.error is not None:
            return self.error.kind.code
        if self._head is None or self.body is None:
            return "more"
        words = [self._head.status_line.decode("latin-1"), *told_fields(self._head)]
        if self.payload:
            words.append(told_octets(self.payload))
        if not self.body.done:
            words.append("until close" if self.body.ends_at_close() else "more")
        elif not wants_keep_alive(self._head.minor, connection_options(self._head.known)):
            words.append("close")
        if self.body.surplus:
            words.append(f"surplus={told_octets(self.body.surplus)}")
        return " ".join(words)


def read_response(pieces: Sequence[bytes], method: bytes = b"GET") -> Relayed:
    relayed = Relayed(method)
    for piece in pieces:
        relayed.feed(piece)
    return relayed
