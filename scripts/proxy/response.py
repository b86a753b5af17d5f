"""The client's side of one response: its head exactly once, then a body in a framing that the client understands.

Every response goes out through here, relayed or the gateway's own. A field cannot be on one kind and missing on the
other, and no second status line can follow a first.
"""

from http import HTTPStatus

from core.dialects import Dialect
from core.errors import Fields, GatewayError
from http1.bodies import LAST_CHUNK, Body, ChunkedBody, encode_chunk
from http1.grammar import CRLF, UNTIL_CLOSE, Framing, field_lines
from policy.prepared_request import PreparedRequest
from proxy.response_info import DateField, ResponseInfo
from transport.client_protocol import ClientProtocol

_CLOSE = b"Connection: close\r\n"
# Without the last one nginx would hold heartbeats and events back; llama-server's own streams have it, too.
_STREAM_FIELDS = b"Content-Type: text/event-stream\r\nCache-Control: no-cache, no-store\r\nX-Accel-Buffering: no\r\n"


class Response:
    """One response to one request.

    `lines` are field lines of its head, for any kind of response. `keep_alive` may be cleared until the head is sent,
    and is never set again.
    """

    __slots__ = (
        "_chunked",
        "_client",
        "_date",
        "_prepared",
        "_request_id",
        "_sized",
        "accepts_events",
        "is_event_stream",
        "is_verbatim",
        "keep_alive",
        "lines",
        "started",
        "status",
    )

    def __init__(
        self, client: ClientProtocol, prepared: PreparedRequest, request_id: bytes, date: DateField, keep_alive: bool
    ) -> None:
        self._client = client
        self._prepared = prepared
        self._date = date
        self._request_id = request_id
        # A header for every response is added here; `response_lines` begins with CRLF.
        self.lines = b"X-Request-Id: " + request_id + prepared.response_lines
        if prepared.route.dialect.id_field:
            self.lines = prepared.route.dialect.id_field + request_id + CRLF + self.lines
        self._chunked = self._sized = False
        self.is_verbatim = False  # the backend's chunks are passed on as they are
        self.keep_alive = keep_alive
        self.is_event_stream = False
        self.accepts_events = False  # the gateway's own may come between its events
        self.started = False  # the head has been sent
        self.status = 0

    @property
    def dialect(self) -> Dialect:
        return self._prepared.route.dialect

    # --- Heads ---

    def send_relayed(self, info: ResponseInfo, payload: bytes) -> None:
        """Send a relayed response that has been received whole."""
        self.started = True
        self.status = info.status
        date = b"" if info.has_date else self._date.line
        connection = self._prepared.keep_alive_line if self.keep_alive else _CLOSE
        self._client.write(b"".join((info.lines, date, connection, self.lines, CRLF, payload)))

    def begin_relayed(self, info: ResponseInfo) -> bytes:
        """Return the head of a relayed response; `write` sends it together with the first bytes of the body."""
        self.is_event_stream = info.is_event_stream
        self._frame(info.framing)
        self.accepts_events = info.is_event_stream and not info.is_coded and not self._sized
        self.is_verbatim = info.framing.chunked and self._chunked
        return self._head(info.status, info.lines if info.has_date else info.lines + self._date.line)

    def begin_event_stream(self) -> None:
        """Begin an event stream before the backend has answered."""
        self.is_event_stream = self.accepts_events = True
        self._frame(UNTIL_CLOSE)
        self.write(self._head(200, b"HTTP/1.1 200 OK\r\n" + self._date.line + _STREAM_FIELDS))

    def _frame(self, framing: Framing) -> None:
        """Choose the client's framing: HTTP/1.0 has no chunks, so a body of unknown length ends with the connection."""
        self._sized = framing.length is not None
        self._chunked = not self._sized and self._prepared.minor == 1
        if not self._sized and not self._chunked:
            self.keep_alive = False

    def _head(self, status: int, lines: bytes) -> bytes:
        self.status = status
        coding = b"Transfer-Encoding: chunked\r\n" if self._chunked else b""
        connection = self._prepared.keep_alive_line if self.keep_alive else _CLOSE
        return b"%b%b%b%b\r\n" % (lines, coding, connection, self.lines)

    def write(self, data: bytes) -> None:
        """Write the head, with the part of the body that is there; nothing can be changed from here on."""
        self.started = True
        self._client.write(data)

    # --- Bodies ---

    def encode(self, body: Body, data: bytes, payload: bytes) -> bytes:
        """Return what to write for `data`, just fed to the backend's `body`, which found `payload` in it."""
        if self.is_verbatim and isinstance(body, ChunkedBody):
            passed = data if body.relayable == len(data) else data[: body.relayable]
            return passed + CRLF if body.done else passed
        if not self._chunked:
            return payload
        return encode_chunk(payload) + LAST_CHUNK if body.done else encode_chunk(payload)

    def continue_with(self, body: Body) -> None:
        """Continue an event stream that the gateway began with the backend's body; its chunks pass as they are."""
        self.is_verbatim = self._chunked and isinstance(body, ChunkedBody)

    def end_of_close_delimited(self) -> bytes:
        """Return what ends the response when the backend ends its own by closing."""
        return LAST_CHUNK if self._chunked else b""

    def insert_before_end(self, events: bytes, end: bytes) -> bytes:
        """Return the last bytes of a stream with the gateway's own events before its end, if that is still there."""
        if not events or not self._chunked:
            return end + events
        return end.removesuffix(LAST_CHUNK) + encode_chunk(events) + LAST_CHUNK if end.endswith(LAST_CHUNK) else end

    def send_event(self, text: bytes) -> None:
        """Write one of the gateway's own events or comments into an event stream."""
        self._client.write(encode_chunk(text) if self._chunked else text)

    # --- The gateway's own responses ---

    def begin(self, status: int, length: int | None, fields: Fields) -> None:
        """Send the head of a response whose body of `length` bytes the caller writes; None: it has none.

        `fields` say all else of it.
        """
        self._sized, self._chunked = True, False
        lines = b"HTTP/1.1 %d %b\r\n%b" % (status, HTTPStatus(status).phrase.encode(), self._date.line)
        if length is not None:
            lines += b"Content-Length: %d\r\n" % length
        self.write(self._head(status, lines + field_lines(fields)))

    def send(self, status: int, content_type: bytes, payload: bytes, fields: Fields = ()) -> None:
        """Send a whole response."""
        self._sized, self._chunked = True, False
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{self._date.line.decode()}"]
        if content_type:
            lines.append(f"Content-Type: {content_type.decode()}\r\n")
        if status != HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(payload)}\r\n")
        lines.append("Cache-Control: no-store\r\n")
        self.lines += field_lines(fields)
        head = self._head(status, "".join(lines).encode())
        self.write(head if self._prepared.method == b"HEAD" else head + payload)

    def send_error(self, error: GatewayError) -> None:
        """Send an error; if an event stream has begun, as its error event, and end the stream."""
        if self.started:
            self.send_event(self.error_event(error, 0))
            self._client.write(self.end_of_close_delimited())
            return
        fields = error.fields
        if error.retry_after_s is not None:
            fields += ((b"Retry-After", b"%d" % error.retry_after_s),)
        if error.final:
            fields += ((b"x-should-retry", b"false"),)
        if error.kind.closes:
            self.keep_alive = False
        payload = self.dialect.envelope(error, self._request_id.decode())
        self.send(error.kind.status, b"application/json", payload, fields)

    def error_event(self, error: GatewayError, number: int) -> bytes:
        return self.dialect.error_event(error, self._request_id.decode(), number)

    def truncate(self, error: GatewayError | None, number: int, flush_s: float) -> None:
        """End a response that cannot be completed, visibly.

        `error` is reported if it is given: an event may follow what was passed on. Its number would be `number`.
        """
        if error is not None and self.accepts_events:
            self.send_event(self.error_event(error, number))
            if self.dialect.ends_stream:
                self._client.write(self.end_of_close_delimited())
                return
        self._client.truncate(reset=not self._sized and not self._chunked, flush_s=flush_s)
