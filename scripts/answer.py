"""The client's side of one response: its head exactly once, then a body in the framing that this client understands.

Every response goes out through here, relayed or made by the gateway, so that no field can be on one kind and missing on
the other, and no second status line can follow a first.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from bodies import LAST_CHUNK, Body, ChunkedBody, encode_chunk
from client_wire import ClientWire
from errors import Dialect, Fields, GatewayError, envelope, event
from http1 import (
    CRLF,
    HOP_BY_HOP,
    UNTIL_CLOSE,
    Framing,
    ResponseHead,
    connection_options,
    field_lines,
    keeps_alive,
    parse_response_head,
    response_framing,
)
from plan import Plan

# Not the backend's to tell a client of the gateway: an id that is not the request's, its own origin policy and rates.
_NOT_PASSED = HOP_BY_HOP | {b"x-request-id"}
_NOT_PASSED_FAMILIES = (b"access-control-", b"x-ratelimit-")

CLOSE = b"Connection: close\r\n"


def date_line() -> bytes:
    """The Date of now (RFC 9110 section 5.6.7)."""
    return _date_line(int(time.time()))


@lru_cache(maxsize=1)
def _date_line(epoch_s: int) -> bytes:
    # No process of ours sets a locale: the names are English.
    return time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(epoch_s)).encode()


def relayed_lines(head: ResponseHead) -> bytes:
    """The status line and the field lines of a backend's response that go on to the client, in order and case."""
    dropped = connection_options(head.known) | _NOT_PASSED if b"connection" in head.known else _NOT_PASSED
    if head.status == HTTPStatus.NO_CONTENT:
        dropped |= {b"content-length"}  # RFC 9110 section 8.6
    blank = b"" if b" " in head.status_line else b" "  # RFC 9112 section 4: also where no reason follows
    lines = [b"HTTP/1.1 ", head.status_line, blank, CRLF]
    for (name, value), lower in zip(head.fields, head.names, strict=True):
        if lower not in dropped and not lower.startswith(_NOT_PASSED_FAMILIES):
            lines += (name, b": ", value, CRLF)
    return b"".join(lines)


def is_event_stream(head: ResponseHead) -> bool:
    types = head.known.get(b"content-type")
    return types is not None and types[0].lower().startswith(b"text/event-stream")


@dataclass(frozen=True, slots=True)
class Opening:
    """A response's head, and what follows from it alone."""

    head: ResponseHead
    status: int
    lines: bytes  # what of it goes on to the client
    framing: Framing
    is_stream: bool
    keeps_alive: bool
    dated: bool
    tells: bool  # a success in plain text, whose tokens can be read


@lru_cache(maxsize=128)
def open_response(raw: bytes, method: bytes) -> Opening:
    """Parse the head of a response to a request of that method. Raises BACKEND_MALFORMED.

    llama-server's heads differ in their length at most, and those of its streams not even in that.
    """
    head = parse_response_head(raw)
    framing = response_framing(head, method) if head.status >= 200 else UNTIL_CLOSE  # an interim one has no body
    tells = head.status == HTTPStatus.OK and b"content-encoding" not in head.known
    dated = b"date" in head.known
    lines, is_stream = relayed_lines(head), is_event_stream(head)
    return Opening(head, head.status, lines, framing, is_stream, keeps_alive(head), dated, tells)


def connection_line(minor: int, keep_alive: bool) -> bytes:
    """What a client of HTTP/1.<minor> has to be told of its connection (RFC 9112 section 9.3)."""
    if not keep_alive:
        return CLOSE
    return b"" if minor else b"Connection: keep-alive\r\n"


class Answer:
    """One response to one request. `keep_alive` may be taken back until the head is out, never granted later."""

    __slots__ = (
        "_chunked",
        "_client",
        "_lines",
        "_plan",
        "_sized",
        "is_stream",
        "is_verbatim",
        "keep_alive",
        "started",
        "status",
    )

    def __init__(self, client: ClientWire, plan: Plan, lines: bytes, *, keep_alive: bool) -> None:
        """`lines` are field lines that the head will carry whatever the answer is: request id, CORS."""
        self._client = client
        self._plan = plan
        self._lines = lines
        self._chunked = self._sized = False
        self.is_verbatim = False  # the backend's chunks go on as they are
        self.keep_alive = keep_alive
        self.started = False
        self.is_stream = False  # a text/event-stream, whose events may end with one of ours
        self.status = 0

    @property
    def method(self) -> bytes:
        return self._plan.method

    @property
    def dialect(self) -> Dialect:
        return self._plan.route.dialect

    def add_lines(self, lines: bytes) -> None:
        """More field lines that the head will carry."""
        self._lines += lines

    # --- Heads ---

    def begin_relayed(self, opening: Opening) -> bytes:
        """The head for a relayed response; `write` sends it together with the first of the body."""
        self.is_stream = opening.is_stream
        self._frame(opening.framing)
        self.is_verbatim = opening.framing.chunked and self._chunked
        return self._begin(opening.status, opening.lines if opening.dated else opening.lines + date_line())

    def begin_stream(self) -> None:
        """Begin an event stream before the backend has said anything."""
        self.is_stream = True
        self._frame(UNTIL_CLOSE)
        fields = b"Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
        self.write(self._begin(200, b"HTTP/1.1 200 OK\r\n" + date_line() + fields))

    def _frame(self, framing: Framing) -> None:
        """Decide the client's framing: HTTP/1.0 has no chunks, so a body of unknown length ends with the connection."""
        self._sized = framing.length is not None
        self._chunked = not self._sized and self._plan.minor == 1
        if not self._sized and not self._chunked:
            self.keep_alive = False

    def _begin(self, status: int, head: bytes) -> bytes:
        self.status = status
        if self._chunked:
            head += b"Transfer-Encoding: chunked\r\n"
        return head + connection_line(self._plan.minor, self.keep_alive) + self._lines + CRLF

    def write(self, data: bytes) -> None:
        """Write the head, with whatever follows it already; from here on there is no way back."""
        self.started = True
        self._client.write(data)

    # --- Bodies ---

    def encode(self, body: Body, data: bytes, payload: bytes) -> bytes:
        """What to write for `data`, just fed to the backend's `body`, which found `payload` in it."""
        if self.is_verbatim and isinstance(body, ChunkedBody):
            passed = data if body.passable == len(data) else data[: body.passable]
            return passed + CRLF if body.done else passed
        if not self._chunked:
            return payload
        return encode_chunk(payload) + LAST_CHUNK if body.done else encode_chunk(payload)

    def go_on(self, body: Body) -> None:
        """The backend's answer goes on in the stream that the gateway began; its chunks pass as they are."""
        self.is_verbatim = self._chunked and isinstance(body, ChunkedBody)

    def end_of_close_delimited(self) -> bytes:
        return LAST_CHUNK if self._chunked else b""

    def send_event(self, text: bytes) -> None:
        """Write one event, or comment, of the gateway's own into a stream that it has begun."""
        self._client.write(encode_chunk(text) if self._chunked else text)

    # --- Whole answers of the gateway's own ---

    def send(self, status: int, content_type: bytes, payload: bytes, fields: Fields = ()) -> None:
        """Answer with a whole response."""
        self._sized, self._chunked = True, False
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{date_line().decode()}"]
        if content_type:
            lines.append(f"Content-Type: {content_type.decode()}\r\n")
        if status != HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(payload)}\r\n")
        self.add_lines(field_lines(fields))
        head = self._begin(status, "".join(lines).encode())
        self.write(head if self.method == b"HEAD" else head + payload)

    def send_error(self, error: GatewayError) -> None:
        """Answer with an error; where a stream has begun, with its one error event and the stream's end."""
        if self.started:
            self.send_event(event(error, self.dialect))
            self._client.write(self.end_of_close_delimited())
            return
        fields = error.fields
        if error.retry_after_s is not None:
            fields += ((b"Retry-After", b"%d" % error.retry_after_s),)
        if error.kind.closes:
            self.keep_alive = False
        self.send(error.kind.status, b"application/json", envelope(error, self.dialect), fields)

    def truncate(self, error: GatewayError | None, *, at_event: bool, flush_s: float) -> None:
        """End an answer that cannot be completed, visibly; `error` says why where there is room."""
        if error is not None and self.is_stream and at_event and not self._sized:
            self.send_event(event(error, self.dialect))
        self._client.truncate(reset=not self._sized and not self._chunked, flush_s=flush_s)
