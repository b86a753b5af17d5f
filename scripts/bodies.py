"""Message bodies: they consume bytes as they arrive, count them, and know where they end (RFC 9112 sections 6 and 7).

Each takes what was received and returns the payload among it; what follows the body is its `surplus`. No I/O.
"""

import re
from functools import lru_cache

from errors import BACKEND_MALFORMED, BAD_REQUEST, GatewayError, Kind
from http1 import CRLF, HEAD_END, TOKEN, Framing, Limits, parse_fields, too_large

LAST_CHUNK = b"0\r\n\r\n"

_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + _QUOTED + rb"))?"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:" + _EXTENSION + rb")*")
_PLAIN_DIGITS = 8
_PLAIN_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_CHUNK_LINE_BYTES = 1024  # room for any extension seen in the wild, none for a parser to be starved with
_TRAILER_BYTES = 8192


@lru_cache(maxsize=1024)
def plain_size(line: bytes) -> int:
    """The size that a chunk's line of digits alone tells; 0 for any other line."""
    return int(line, 16) if _PLAIN_SIZE.fullmatch(line) else 0


class SizedBody:
    """A body of a known number of octets."""

    __slots__ = ("_left", "done", "surplus")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.surplus = b""

    def feed(self, data: bytes) -> bytes:
        """Take received bytes and return the payload among them; what follows the body is `surplus`."""
        if len(data) > self._left:
            data, self.surplus = data[: self._left], data[self._left :]
        self._left -= len(data)
        self.done = self._left == 0
        return data

    def ends_at_close(self) -> bool:
        return self.done


class UnboundedBody:
    """A body that ends when its sender closes (responses only, RFC 9112 section 6.3 step 8)."""

    __slots__ = ("done", "surplus")

    def __init__(self) -> None:
        self.done = False
        self.surplus = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def ends_at_close(self) -> bool:
        return True


class ChunkedBody:
    """A body in chunked coding (RFC 9112 section 7.1). Trailer fields are checked and dropped.

    After `feed`, `passable` says how many of the bytes just fed may go on as they are, framing included: all up to the
    end of the last chunk's size line. Whoever passes them on ends the body with one CRLF of its own once `done`.
    """

    __slots__ = (
        "_kind",
        "_left",
        "_limits",
        "_line",
        "_octets",
        "_sound",
        "_state",
        "_trailer_bytes",
        "done",
        "passable",
        "surplus",
    )

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self, kind: Kind = BACKEND_MALFORMED, limits: Limits | None = None) -> None:
        """`kind` is raised for bytes that are no chunked body; `limits` bound the sum of the chunks' sizes."""
        self._kind = kind
        self._limits = limits
        self._state = self._SIZE
        self._left = 0  # octets of the chunk that are still to come
        self._octets = 0  # of all chunks announced, where they are limited
        self._line = b""
        self._trailer_bytes = 0
        self._sound = True
        self.passable = 0
        self.done = False
        self.surplus = b""

    def whole_chunk(self, data: bytes) -> bytes:
        """The payload of received bytes that are exactly one chunk, which is what a stream consists of: one event, one
        chunk, one read. For any others nothing has happened, and the payload is empty: they are to be fed."""
        if self._state != self._SIZE or self._line:
            return b""
        end = data.find(CRLF)
        size = plain_size(data[:end]) if 0 < end <= _PLAIN_DIGITS else 0
        return data[end + 2 : -2] if size and len(data) == end + size + 4 and data.endswith(CRLF) else b""

    def feed(self, data: bytes) -> bytes:
        """Take received bytes and return the payload among them. Raises the kind given, or PAYLOAD_TOO_LARGE."""
        payload: list[bytes] = []
        self._sound = False  # unless the end is reached
        at = self.passable = self._feed_whole_chunks(data, payload)
        while at < len(data) and not self.done:
            if self._state == self._DATA:
                piece = data[at : at + self._left]
                payload.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._state = self._DATA_END
            else:
                at = self._feed_line(data, at)
            if self._state != self._TRAILER:
                self.passable = at
        self.surplus = data[at:]
        self._sound = True
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _feed_whole_chunks(self, data: bytes, payload: list[bytes]) -> int:
        """Take the chunks that `data` begins with and that are here whole; return where they end."""
        at = 0
        if self._state != self._SIZE or self._line or self._limits is not None:
            return at
        while (end := data.find(CRLF, at, at + _PLAIN_DIGITS + 2)) > at and (size := plain_size(data[at:end])):
            after = end + size + 4
            if data[after - 2 : after] != CRLF:
                break
            payload.append(data[end + 2 : after - 2])
            at = after
        return at

    def _feed_line(self, data: bytes, at: int) -> int:
        """Take one line, or the part of it that is there; return where it ends in `data`."""
        newline = data.find(b"\n", at)
        end = len(data) if newline < 0 else newline + 1
        self._line += data[at:end]
        if self._state == self._DATA_END and not CRLF.startswith(self._line):
            raise GatewayError(self._kind, "A chunk's data is not followed by CRLF.")
        room = _TRAILER_BYTES - self._trailer_bytes if self._state == self._TRAILER else _CHUNK_LINE_BYTES
        if len(self._line) > room:
            raise GatewayError(self._kind, "A line of the chunked coding is too long.")
        if newline >= 0:
            line, self._line = self._line, b""
            if not line.endswith(CRLF):
                raise GatewayError(self._kind, "A line of the chunked coding ends without CRLF.")
            self._take_line(line[:-2])
            if self._state == self._TRAILER and not self.done and self._trailer_bytes == 0:
                self.passable = end  # the last chunk's own size line
        return end

    def _take_line(self, line: bytes) -> None:
        if self._state == self._DATA_END:
            self._state = self._SIZE
        elif self._state == self._SIZE:
            self._take_size(line)
        elif line:
            self._take_trailer(line)
        else:
            self.done = True

    def _take_size(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise GatewayError(self._kind, "A chunk size line is malformed.")
        self._left = int(match[1], 16)
        if self._limits is not None:
            self._octets += self._left
            if self._octets > self._limits.body_bytes:
                raise too_large(self._limits)
        self._state = self._DATA if self._left else self._TRAILER

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        parse_fields(line + HEAD_END, 0, self._kind)

    def ends_at_close(self) -> bool:
        return self.done

    def between_chunks(self) -> bool:
        """Whether the next byte passed on would begin a chunk. It would not where the last ones fed were refused."""
        return self._sound and self._state == self._SIZE and not self._line


Body = SizedBody | ChunkedBody | UnboundedBody


def response_body(framing: Framing) -> Body:
    if framing.chunked:
        return ChunkedBody()
    return UnboundedBody() if framing.length is None else SizedBody(framing.length)


class RequestBody:
    """A request body, collected whole: its payload, however it was framed, as the pieces in which it came."""

    __slots__ = ("_body", "octets", "pieces")

    def __init__(self, length: int | None, limits: Limits) -> None:
        """`length` is None where the body is chunked."""
        self._body = ChunkedBody(BAD_REQUEST, limits) if length is None else SizedBody(length)
        self.pieces: list[bytes] = []
        self.octets = 0

    @property
    def done(self) -> bool:
        return self._body.done

    @property
    def surplus(self) -> bytes:
        return self._body.surplus

    def feed(self, data: bytes) -> None:
        """Raises BAD_REQUEST or PAYLOAD_TOO_LARGE."""
        payload = self._body.feed(data)
        if payload:
            self.octets += len(payload)
            self.pieces.append(payload)


def encode_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
