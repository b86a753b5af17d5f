"""A response of llama-server that comes in pieces, passed on to the client byte for byte.

`Relay.run` raises before the first byte of the response has gone to the client, and returns after it: from then on the
response is whole or visibly cut, and no second status line can be sent.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Protocol

from accounting.token_counter import TokenCounter
from backend.fetch import read_page
from core.dialects import OPENAI
from core.errors import BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError, Kind, PeerGone
from http1.bodies import Body, ChunkedBody, response_body
from proxy.response import Response
from proxy.response_info import ResponseInfo
from transport.backend_protocol import BackendProtocol
from transport.client_protocol import ClientProtocol
from transport.waiter import Waiter

# What full sockets hold: Linux lets TCP's on this machine grow to several megabytes; a Unix socket holds much less.
_FULL_BYTES = 1 << 20
_LEAST_FULL_BYTES = 32 << 10
_EVENT_END_BYTES = 4  # the last bytes of an event, which show that it is over
_NUMBERS = re.compile(rb'"sequence_number":\s*([0-9]{1,12})[,}]')
_ERROR_EVENT = re.compile(rb'data: ?(\{ ?"error".*)\n\n')
_STATUS = re.compile(rb'"code": ?([45][0-9]{2})\b')
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
_STALLED = replace(BACKEND_TIMEOUT, message="The answer did not go on within STREAM_IDLE_TIMEOUT.", final=False)


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """How long each step may take, in seconds."""

    connect_s: float
    request_s: float
    stream_idle_s: float


class PayloadReader(Protocol):
    """Gets a response's payload as it passes."""

    def feed(self, payload: bytes) -> None: ...


class Relay:
    """One response from its head to its end. `error` says why a response that had begun is not whole."""

    __slots__ = (
        "_answers",
        "_body",
        "_chunks",
        "_client",
        "_counter",
        "_finished",
        "_last",
        "_response",
        "_timeouts",
        "complete",
        "error",
    )
    _chunks: ChunkedBody
    _finished: Waiter[None]

    def __init__(
        self,
        client: ClientProtocol,
        response: Response,
        counter: PayloadReader | None,
        timeouts: UpstreamTimeouts,
        answers: int = 1,
    ) -> None:
        """`counter` gets the response's payload, as one that counts its tokens does; None if there is none.

        `answers` is how many the request asks for.
        """
        self._client = client
        self._response = response
        self._counter = counter
        self._timeouts = timeouts
        self._answers = answers
        self._last = b"\n\n"  # the end of what was passed on; an event may follow the head
        self.complete = False
        self.error: GatewayError | None = None

    async def run(self, backend: BackendProtocol, info: ResponseInfo) -> bool:
        """Pass the response with this head on; return whether the connection can carry another request.

        Raises GatewayError while nothing has been passed on, PeerGone whenever the client has left.
        """
        client = self._client
        body: Body = response_body(info.framing)
        self._body = body
        try:
            if self._response.started:
                await self._continue_stream(backend, info)
                head = b""
            else:
                head = self._response.begin_relayed(info)
            client.upstream = backend
            if client.write_paused:  # by an earlier response, before this backend was its upstream
                backend.transport.pause_reading()
            self._response.write(head + self._take(backend.take_received()))
            self.complete = body.done or await self._pass_rest(backend)
        except PeerGone:
            self.complete = self._has_passed_all()
            if not self.complete:
                raise
        finally:
            client.upstream = None
            backend.transport.resume_reading()
        # llama-server closes after a stream, whatever its head says, and not always before the next request.
        return body.done and info.keeps_alive and not body.trailing_data and not info.framing.chunked

    async def _continue_stream(self, backend: BackendProtocol, info: ResponseInfo) -> None:
        """Continue an event stream whose head the gateway has sent. Raises if the response is no such stream."""
        if info.has_usage and info.is_event_stream:
            self._response.continue_with(self._body)
            return
        if info.status == HTTPStatus.OK:
            message = "The backend's answer is not the plain event stream that has begun."
            raise GatewayError(BACKEND_UNAVAILABLE, message)
        # The backend refuses, but 200 has been sent: its error can only become an event.
        page = await self._client.run(read_page(backend, self._body), self._timeouts.request_s, BACKEND_TIMEOUT)
        raise backend_error(info.status, page)

    async def _pass_rest(self, backend: BackendProtocol) -> bool:
        """Pass bytes from transport to transport until the body is over; return whether all of it came."""
        finished: Waiter[None] = Waiter()
        self._finished = finished
        if self._response.is_verbatim and isinstance(self._body, ChunkedBody):
            self._chunks = self._body
            backend.pass_to(self._receive_chunk, self._on_backend_end)
        else:
            backend.pass_to(self._receive, self._on_backend_end)
        if backend.ended:
            self._on_backend_end(backend.closed_cleanly)
        try:
            await self._client.wait_while_active(finished, self._timeouts.stream_idle_s, _STALLED)
        except GatewayError as error:
            self.error = error.with_traceback(None)  # its frames hold this relay: a cycle
            reported = error if self.is_between_events() else None
            self._response.truncate(reported, self._next_number(), self._timeouts.stream_idle_s)
            return False
        return True

    def count_remainder(self, backend: BackendProtocol) -> "Remainder | None":
        """Begin to count what the backend generates until it notices that the client has left; None for no stream.

        It may generate what makes no event, such as half a character, and then notices that as late as for an answer
        that is no stream.
        """
        counter = self._counter
        if backend.ended or not isinstance(counter, TokenCounter) or not self._response.is_event_stream:
            return None
        # While the client takes nothing, the backend is not read, so even a small socket may be full.
        full_bytes = _LEAST_FULL_BYTES if self._client.write_paused else _FULL_BYTES
        return Remainder(backend, self._body, counter, self._timeouts.request_s, full_bytes)

    def _take(self, data: bytes) -> bytes:
        """Count the backend's bytes; return what the client gets for them. Raises BACKEND_MALFORMED."""
        payload = self._body.feed(data)
        if payload:
            self._last = payload if len(payload) >= _EVENT_END_BYTES else (self._last + payload)[-_EVENT_END_BYTES:]
            if self._counter is not None:
                self._counter.feed(payload)
        encoded = self._response.encode(self._body, data, payload)
        return self._response.insert_before_end(self._own_end(), encoded) if self._body.done else encoded

    def _receive_chunk(self, data: bytes) -> None:
        """Pass on the backend's bytes; runs for each event of a stream that passes chunk by chunk."""
        payload = self._chunks.whole_chunk(data)
        if len(payload) < _EVENT_END_BYTES:
            self._receive(data)
            return
        self._last = payload
        if self._counter is not None:
            self._counter.feed(payload)
        self._client.saw_activity = True
        self._client.write(data)

    def _receive(self, data: bytes) -> None:
        """Pass on the backend's bytes, in any form."""
        try:
            encoded = self._take(data)
        except GatewayError as error:
            self._finished.set_exception(error)
            return
        self._client.saw_activity = True
        self._client.write(encoded)
        if self._body.done:
            self._finished.set_result(None)

    def _on_backend_end(self, cleanly: bool) -> None:
        if self._finished.done:
            return
        if cleanly and self._body.ends_at_close():
            self._client.write(
                self._response.insert_before_end(self._own_end(), self._response.end_of_close_delimited())
            )
            self._finished.set_result(None)
        else:
            message = "The backend closed in the middle of its answer."
            self._finished.set_exception(GatewayError(BACKEND_UNAVAILABLE, message))

    def is_between_events(self) -> bool:
        """Whether one of the gateway's own events could follow what has been passed on."""
        between_chunks = not isinstance(self._body, ChunkedBody) or self._body.between_chunks()
        return between_chunks and self._last.endswith((b"\n\n", b"\r\n\r\n"))

    def _own_end(self) -> bytes:
        """Return the events that must follow the backend's last one, if that is an error that clients do not look for.

        llama-server ends a stream of any kind with an error in the form that only OpenAI's older APIs have.
        """
        if self._response.dialect is OPENAI or not self._response.accepts_events:
            return b""
        found = _ERROR_EVENT.fullmatch(self._last_event())
        if found is None:
            return b""
        status = _STATUS.search(found[1])
        return self._response.error_event(backend_error(int(status[1]) if status else 500, found[1]), 0)

    def _next_number(self) -> int:
        """Return the sequence number that follows that of the last event, 0 if it has none."""
        numbers = _NUMBERS.findall(self._last_event())
        return int(numbers[-1]) + 1 if numbers else 0

    def _has_passed_all(self) -> bool:
        """Whether a client that has left got the stream's last event; many do not wait for the end that follows."""
        counter = self._counter
        if not isinstance(counter, TokenCounter) or self._client.write_paused:
            return False
        return counter.is_complete(self._answers)

    def _last_event(self) -> bytes:
        return self._counter.last_event if isinstance(self._counter, TokenCounter) else b""


class Remainder:
    """What the backend sends of a stream after its client has left: it is counted, and passed to no one.

    The backend may be far ahead of a client that reads slowly, and it notices the end only at its next event.
    """

    __slots__ = ("_backend", "_body", "_bytes", "_counter", "_full_bytes", "_on_end")

    def __init__(
        self, backend: BackendProtocol, body: Body, counter: TokenCounter, seconds: float, full_bytes: int
    ) -> None:
        """The backend may take `seconds` to notice it. If it has sent `full_bytes`, there may be more to send."""
        self._backend = backend
        self._body = body
        self._bytes = 0
        self._counter = counter
        self._full_bytes = full_bytes
        self._on_end: Callable[[bool], None] | None = None
        backend.leave(self._count, self._end, seconds)

    def when_counted(self, on_end: Callable[[bool], None]) -> None:
        """Call this once all has been counted, which mostly takes as long as one token.

        It gets whether that was so much that there may be more, which the backend could not send.
        """
        self._on_end = on_end

    def _count(self, data: bytes) -> None:
        self._bytes += len(data)
        try:
            payload = self._body.feed(data)
        except GatewayError:
            self._backend.on_timeout(0)
            return
        if payload:
            self._counter.feed(payload)

    def _end(self, cleanly: bool) -> None:
        on_end, self._on_end = self._on_end, None
        self._backend.on_end = None  # which is this method: a cycle
        if on_end is not None:
            on_end(self._bytes >= self._full_bytes)


def backend_error(status: int, page: bytes) -> GatewayError:
    """Return the error of a backend's error response: its own error object, if the page is llama-server's JSON."""
    try:
        reported = json.loads(page)["error"]
        message, own_type, own_code = str(reported["message"]), reported.get("type"), reported.get("code")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return GatewayError(BACKEND_UNAVAILABLE, f"The backend answered {status}.", final=is_final(status))
    name = own_type if isinstance(own_type, str) else "api_error"
    kind = Kind(status, own_code if isinstance(own_code, str) else name, name, message)
    return GatewayError(kind, final=is_final(status), reported=reported)


def is_final(status: int) -> bool:
    """Whether the backend would refuse the same request again."""
    return (400 <= status < 500 and status not in _PASSING) or status == HTTPStatus.NOT_IMPLEMENTED
