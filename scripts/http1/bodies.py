"""Message bodies (RFC 9112 sections 6 and 7): received bytes in, payload out, no I/O.

A body consumes bytes as they arrive and detects its end. The bytes that follow it are in `trailing_data`.
"""

import re
from functools import lru_cache

from config.settings import Limits
from core.errors import BACKEND_MALFORMED, BAD_REQUEST, GatewayError, Kind
from http1.grammar import CRLF, HEAD_END, TOKEN, Framing, body_too_large, parse_fields
from http1.request_lines import RequestLines

LAST_CHUNK = b"0\r\n\r\n"

_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + _QUOTED + rb"))?"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:" + _EXTENSION + rb")*")
_PLAIN_DIGITS = 8
_PLAIN_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_CHUNK_LINE_BYTES = 1024  # enough for any chunk extension in use, too little to exhaust memory
_TRAILER_BYTES = 8192
# What the chunked coding of a request may add to its payload. Each chunk costs time, however small it is.
_FRAMING_BYTES = 256 << 10  # by which framing may exceed payload: 65535 chunks of one byte, or any number of 5 bytes
_EXTENSION_BYTES = 16 << 10  # of all chunk extensions; as in hyper, and no client is known to send any
# Chunks of 1 to 15 bytes without extension: the regular expression engine reads a run of them ten times faster than a
# loop. The first digit decides which alternative matches, so a run has one reading only.
_TINY_BYTES = 16
_TINY = b"(?:" + b"|".join([b"[%x%X]\r\n.{%d}" % (size, size, size) for size in range(1, _TINY_BYTES)]) + rb")\r\n"
_TINY_CHUNK = re.compile(_TINY, re.DOTALL)
_TINY_CHUNKS = re.compile(b"(?:" + _TINY + b"){1,4096}", re.DOTALL)
_SMALL_PIECE_BYTES = 4096  # pieces of a body below this are collected; each alone would take memory of its own
_COLLECTED_BYTES = 64 << 10


@lru_cache(maxsize=1024)
def plain_size(line: bytes) -> int:
    """The size in a chunk size line that consists of digits only; 0 for any other line."""
    return int(line, 16) if _PLAIN_SIZE.fullmatch(line) else 0


class SizedBody:
    """A body of a known number of bytes."""

    __slots__ = ("_remaining", "done", "trailing_data")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.done = length == 0
        self.trailing_data = b""

    def feed(self, data: bytes) -> bytes:
        """Consume received bytes and return the payload in them."""
        if len(data) > self._remaining:
            data, self.trailing_data = data[: self._remaining], data[self._remaining :]
        self._remaining -= len(data)
        self.done = self._remaining == 0
        return data

    def ends_at_close(self) -> bool:
        """Whether the body is complete if its sender closes the connection now."""
        return self.done


class UnboundedBody:
    """A body that ends when its sender closes (responses only, RFC 9112 section 6.3 step 8)."""

    __slots__ = ("done", "trailing_data")

    def __init__(self) -> None:
        self.done = False
        self.trailing_data = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def ends_at_close(self) -> bool:
        return True


class ChunkedBody:
    """A body in chunked coding (RFC 9112 section 7.1). Trailer fields are checked and dropped.

    After `feed`, `relayable` is how many of the bytes just fed may be relayed unchanged, framing included: all up to
    the end of the last chunk's size line. Once the body is `done`, the relay must end it with one CRLF.
    """

    __slots__ = (
        "_announced_bytes",
        "_extension_bytes",
        "_framing_bytes",
        "_kind",
        "_limits",
        "_line",
        "_refused",
        "_remaining",
        "_state",
        "_trailer_bytes",
        "done",
        "relayable",
        "trailing_data",
    )

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self, kind: Kind = BACKEND_MALFORMED, limits: Limits | None = None) -> None:
        """`kind` is the error for bytes that are not a chunked body.

        `limits` bound the sum of the chunk sizes. With them, framing and chunk extensions are bounded in sum as well.
        """
        self._kind = kind
        self._limits = limits
        self._state = self._SIZE
        self._remaining = 0  # bytes of the current chunk that have not arrived
        self._announced_bytes = 0  # the sum of the chunk sizes, if it is limited
        self._framing_bytes = 0  # of these chunks
        self._extension_bytes = 0
        self._line = b""
        self._trailer_bytes = 0
        self._refused = False  # whether the last `feed` raised
        self.relayable = 0
        self.done = False
        self.trailing_data = b""

    def whole_chunk(self, data: bytes) -> bytes:
        """Return the payload of received bytes that are exactly one chunk, else b"" without consuming anything.

        In a stream nearly every read is one chunk with one event. Other bytes must be passed to `feed`.
        """
        if self._state != self._SIZE or self._line:
            return b""
        end = data.find(CRLF)
        size = plain_size(data[:end]) if 0 < end <= _PLAIN_DIGITS else 0
        return data[end + 2 : -2] if size and len(data) == end + size + 4 and data.endswith(CRLF) else b""

    def feed(self, data: bytes) -> bytes:
        """Consume received bytes and return the payload in them. Raises GatewayError(kind) or PAYLOAD_TOO_LARGE."""
        payload: list[bytes] = []
        self._refused = True
        at = self.relayable = 0
        while at < len(data) and not self.done:
            if self._state == self._SIZE and not self._line and (after := self._feed_whole_chunks(data, at, payload)):
                at = after
            elif self._state == self._DATA:
                piece = data[at : at + self._remaining]
                payload.append(piece)
                at += len(piece)
                self._remaining -= len(piece)
                if self._remaining == 0:
                    self._state = self._DATA_END
                    if data.startswith(CRLF, at):  # as usual; `_feed_line` takes longer
                        at += 2
                        self._state = self._SIZE
            else:
                at = self._feed_line(data, at)
            if self._state != self._TRAILER:
                self.relayable = at
        self.trailing_data = data[at:]
        self._refused = False
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _feed_whole_chunks(self, data: bytes, start: int, payload: list[bytes]) -> int:
        """Consume the complete chunks that begin at `start`; return where they end, or 0 if there are none."""
        at = start
        already = len(payload)
        while (end := data.find(CRLF, at, at + _PLAIN_DIGITS + 2)) > at and (size := plain_size(data[at:end])):
            if size < _TINY_BYTES and (run := _TINY_CHUNKS.match(data, at)):
                payload += [chunk[3:-2] for chunk in _TINY_CHUNK.findall(data, at, run.end())]
                at = run.end()
                continue
            after = end + size + 4
            if data[after - 2 : after] != CRLF:
                break
            payload.append(data[end + 2 : after - 2])
            at = after
        if at == start:
            return 0
        if self._limits is not None:
            payload[already:] = [b"".join(payload[already:])]
            announced = len(payload[-1])
            self._count(self._limits, announced, at - start - announced, 0)
        return at

    def _count(self, limits: Limits, announced: int, framing: int, extensions: int) -> None:
        """Count chunks of a request body. Raises PAYLOAD_TOO_LARGE, or GatewayError(kind) for too much framing."""
        self._announced_bytes += announced
        self._framing_bytes += framing
        self._extension_bytes += extensions
        if self._announced_bytes > limits.body_bytes:
            raise body_too_large(limits)
        if self._extension_bytes > _EXTENSION_BYTES:
            message = f"The body's chunk extensions are longer than {_EXTENSION_BYTES} bytes in total."
            raise GatewayError(self._kind, message)
        if self._framing_bytes > self._announced_bytes + _FRAMING_BYTES:
            excess = f"their framing exceeds their data by more than {_FRAMING_BYTES} bytes"
            raise GatewayError(self._kind, f"The body's chunks are too small: {excess}.")

    def _feed_line(self, data: bytes, at: int) -> int:
        """Consume one line, or the part of it that has arrived; return where it ends in `data`."""
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
            self._parse_line(line[:-2])
            if self._state == self._TRAILER and not self.done and self._trailer_bytes == 0:
                self.relayable = end  # the size line of the last chunk
        return end

    def _parse_line(self, line: bytes) -> None:
        if self._state == self._DATA_END:
            self._state = self._SIZE
        elif self._state == self._SIZE:
            self._parse_size(line)
        elif line:
            self._parse_trailer(line)
        else:
            self.done = True

    def _parse_size(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise GatewayError(self._kind, "A chunk size line is malformed.")
        self._remaining = int(match[1], 16)
        if self._limits is not None:
            self._count(self._limits, self._remaining, len(line) + 4, len(line) - match.end(1))
        self._state = self._DATA if self._remaining else self._TRAILER

    def _parse_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        parse_fields(line + HEAD_END, 0, self._kind)

    def ends_at_close(self) -> bool:
        return self.done

    def between_chunks(self) -> bool:
        """Whether the next byte relayed would begin a chunk; False if the last `feed` raised."""
        return not self._refused and self._state == self._SIZE and not self._line


Body = SizedBody | ChunkedBody | UnboundedBody


def response_body(framing: Framing) -> Body:
    if framing.chunked:
        return ChunkedBody()
    return UnboundedBody() if framing.length is None else SizedBody(framing.length)


class RequestBody:
    """A request body in memory: its payload, without framing, in pieces."""

    __slots__ = ("_body", "_lines", "payload_bytes", "pieces")

    def __init__(self, length: int | None, limits: Limits, lines: RequestLines | None = None) -> None:
        """`length` is None if the body is chunked. `lines` gets the payload, too."""
        self._body = ChunkedBody(BAD_REQUEST, limits) if length is None else SizedBody(length)
        self._lines = lines
        self.pieces: list[bytes | bytearray] = []
        self.payload_bytes = 0

    @property
    def done(self) -> bool:
        return self._body.done

    @property
    def is_chunked(self) -> bool:
        return isinstance(self._body, ChunkedBody)

    @property
    def trailing_data(self) -> bytes:
        return self._body.trailing_data

    def feed(self, data: bytes) -> None:
        """Consume received bytes. Raises BAD_REQUEST or PAYLOAD_TOO_LARGE."""
        payload = self._body.feed(data)
        if payload:
            self.payload_bytes += len(payload)
            if self._lines is not None:
                self._lines.feed(payload)
            self._keep(payload)

    def _keep(self, payload: bytes) -> None:
        pieces = self.pieces
        if len(payload) >= _SMALL_PIECE_BYTES:
            pieces.append(payload)
        elif pieces and isinstance(pieces[-1], bytearray) and len(pieces[-1]) < _COLLECTED_BYTES:
            pieces[-1] += payload
        else:
            pieces.append(bytearray(payload))


def encode_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
