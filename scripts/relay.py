"""One exchange with llama-server: a pooled connection, the request, its answer byte for byte.

`relay` raises before the first byte of an answer has gone to the client, and returns after it: from then on the answer
is whole or visibly cut, and there is nothing left to say in another status line.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Protocol

from answer import Answer, relayed_lines
from bodies import Body, ChunkedBody, response_body
from errors import (
    BACKEND_MALFORMED,
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    GatewayError,
)
from http1 import (
    CRLF,
    HOP_BY_HOP,
    RequestHead,
    ResponseHead,
    connection_options,
    keeps_alive,
    parse_response_head,
    response_framing,
)
from waiting import Deadlines, Promise
from wire import BackendWire, ClientWire

# llama-server closes a connection that has idled for 5 s, and says so itself before its hundredth answer.
_IDLE_S = 3.5
_INTERIM_RESPONSES = 16
_COLLECTED_BYTES = 1 << 20

# Credentials are the gateway's to check and the backend's own to carry. With X-Conversation-Id llama-server goes on
# generating after a disconnect.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-conversation-id",
    b"x-request-id",
}


class Meter(Protocol):
    """Reads tokens from an answer's payload in passing (usage.Meter)."""

    def feed(self, payload: bytes) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How long each step may take, in seconds; 0 = without end."""

    connect_s: float
    request_s: float
    stream_idle_s: float


class Pool:
    """Idle connections to the backend, the last used first: the rest age and go."""

    def __init__(self, host: str, port: int, deadlines: Deadlines, response_head_bytes: int) -> None:
        self._host = host
        self._port = port
        self._deadlines = deadlines
        self._head_bytes = response_head_bytes
        self._idle: list[BackendWire] = []
        self._resting: list[BackendWire] = []

    def take(self) -> BackendWire | None:
        while self._idle:
            wire = self._idle.pop()
            if not wire.ended:
                return wire
        return None

    def give(self, wire: BackendWire) -> None:
        """Keep a connection whose last answer was read to its end.

        It rests for a turn of the loop: llama-server closes behind every streamed answer without having said so, and
        that must be seen before another request is sent there.
        """
        wire.rest_idle()
        wire.deadline_s = self._deadlines.now_s + _IDLE_S
        if not self._resting:
            asyncio.get_running_loop().call_soon(self._end_rest)
        self._resting.append(wire)

    def _end_rest(self) -> None:
        self._idle += self._resting
        self._resting.clear()

    async def connect(self) -> BackendWire:
        """Open a connection. Raises BACKEND_UNAVAILABLE."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend does not accept connections.") from error
        wire = BackendWire(writer, self._deadlines, self._head_bytes)
        wire.deadline_s = self._deadlines.now_s + _IDLE_S  # should nobody be there any more to take it
        if reader.at_eof():
            wire.abort()
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend closed a new connection.")
        return wire

    def close(self) -> None:
        self._end_rest()
        for wire in self._idle:
            wire.abort()
        self._idle.clear()


def request_bytes(head: RequestHead, body: list[bytes], octets: int, own_fields: bytes) -> list[bytes]:
    """The request as the backend gets it: same method, target and fields, our Host, framing and credentials."""
    dropped = _NOT_FORWARDED
    if b"connection" in head.known:
        dropped = dropped | connection_options(head.known)
    lines = [head.method, b" ", head.target, b" HTTP/1.1\r\n", own_fields]
    for (name, value), lower in zip(head.fields, head.names, strict=True):
        if lower not in dropped:
            lines += (name, b": ", value, CRLF)
    if octets or head.method not in (b"GET", b"HEAD"):
        lines.append(b"Content-Length: %d\r\n" % octets)
    lines.append(CRLF)
    return lines + body


@lru_cache(maxsize=128)
def read_head(raw: bytes) -> tuple[ResponseHead, bytes]:
    """Parse a response's head, and serialize what of it goes on to the client. Raises BACKEND_MALFORMED.

    llama-server's heads differ in their length at most, and those of its streams not even in that.
    """
    head = parse_response_head(raw)
    return head, relayed_lines(head)


class Relay:
    """One request to the backend and its answer to the client; what became of it can be read at any time."""

    __slots__ = (
        "_answer",
        "_answered",
        "_body",
        "_client",
        "_clock",
        "_finished",
        "_last",
        "_meter",
        "_patience",
        "error",
        "first_byte_s",
        "sent",
        "status",
        "whole",
    )

    def __init__(
        self,
        client: ClientWire,
        answer: Answer,
        answered: Callable[[ResponseHead], Meter | None],
        patience: Patience,
        clock: Callable[[], float],
    ) -> None:
        """`answered` is called with the final response's head and says who reads the payload."""
        self._client = client
        self._answer = answer
        self._answered = answered
        self._patience = patience
        self._clock = clock
        self._meter: Meter | None = None
        self._last = b"\n\n"  # the end of what was passed; where a stream begins, an event may
        self.sent = False  # the request went out to the backend
        self.status = 0  # the backend's
        self.first_byte_s = 0.0
        self.whole = False
        self.error: GatewayError | None = None  # why an answer that had begun is not whole

    async def run(self, pool: Pool, request: list[bytes], *, repeatable: bool) -> None:
        """Raises GatewayError while nothing has been answered, PeerGone whenever the client has left.

        A request that missed a kept connection by a hair is sent again on a new one, if it is safe to repeat.
        """
        backend = pool.take()
        while True:
            if backend is None:
                backend = await self._client.run(pool.connect(), self._patience.connect_s, BACKEND_UNAVAILABLE)
            backend.deadline_s = inf
            reusable = False
            try:
                self.sent = True
                raw = await self._client.wait(backend.ask(request), self._patience.request_s, BACKEND_TIMEOUT)
                reusable = await self._pass_answer(backend, raw)
                return
            except GatewayError:
                if not (repeatable and backend.was_stale()):
                    raise
            finally:
                self._client.feeder = None
                if reusable and not backend.ended:
                    pool.give(backend)
                else:
                    backend.abort()
            backend = None

    async def _pass_answer(self, backend: BackendWire, raw: bytes) -> bool:
        """Pass the answer on, from its head; return whether the connection is fit for another."""
        head, lines = read_head(raw)
        if head.status < 200:
            head, lines = await self._after_interim(backend, head)
        self.status = head.status
        self.first_byte_s = self._clock()
        self._meter = self._answered(head)
        framing = response_framing(head, self._answer.method)
        self._body = body = response_body(framing)
        if not self._answer.started:
            begun = self._answer.begin_relayed(head, lines, framing)
        else:
            begun = await self._go_on(backend, head)
        taken = self._take(backend.take_rest())
        self._client.feeder = backend
        self._answer.write(begun + taken)
        self.whole = body.done or await self._pass_rest(backend)
        # llama-server closes behind a stream, whatever its head says, and not always before the next request.
        return body.done and not body.surplus and keeps_alive(head) and not isinstance(body, ChunkedBody)

    async def _after_interim(self, backend: BackendWire, head: ResponseHead) -> tuple[ResponseHead, bytes]:
        """Read on to the final response's head; interim ones are not passed on (RFC 9110 section 15.2)."""
        for _ in range(_INTERIM_RESPONSES):
            if head.status == 101:
                raise GatewayError(BACKEND_MALFORMED, "The backend switched protocols without being asked.")
            raw = await self._client.wait(backend.next_head(), self._patience.request_s, BACKEND_TIMEOUT)
            head, lines = read_head(raw)
            if head.status >= 200:
                return head, lines
        raise GatewayError(BACKEND_MALFORMED, "The backend sent too many interim responses.")

    # --- The answer ---

    async def _go_on(self, backend: BackendWire, head: ResponseHead) -> bytes:
        """Go on with a stream that the gateway has begun: it has its head."""
        if self._answer.continues(head, self._body):
            return b""
        # The backend refuses what the client has been promised: its own error can only become an event.
        payload = await self._client.run(_collect(backend, self._body), self._patience.request_s, BACKEND_TIMEOUT)
        raise GatewayError(BACKEND_UNAVAILABLE, backend_message(head, payload))

    async def _pass_rest(self, backend: BackendWire) -> bool:
        """Let bytes flow from transport to transport until the body is over; return whether all of it came."""
        finished: Promise[None] = Promise()
        self._finished = finished
        backend.pass_to(self._receive, self._backend_ended)
        if backend.ended:
            self._backend_ended(backend.orderly)
        try:
            await self._client.wait(finished, self._patience.stream_idle_s, BACKEND_TIMEOUT, renewing=True)
        except GatewayError as error:
            self.error = error.with_traceback(None)  # its frames hold this relay: a cycle
            self._answer.truncate(error, at_event=self._at_event(), flush_s=self._patience.stream_idle_s)
            return False
        return True

    def _take(self, data: bytes) -> bytes:
        """Measure bytes of the backend's; return what the client gets for them. Raises BACKEND_MALFORMED."""
        payload = self._body.feed(data)
        if payload:
            self._last = payload if len(payload) > 3 else (self._last + payload)[-4:]
            if self._meter is not None:
                self._meter.feed(payload)
        return self._answer.encode(self._body, data, payload)

    def _receive(self, data: bytes) -> None:
        """The backend's bytes arrive: the one function that runs for each event of a stream."""
        try:
            taken = self._take(data)
        except GatewayError as error:
            self._finished.fail(error)
            return
        self._client.heard = True
        self._client.write(taken)
        if self._body.done:
            self._finished.keep(None)

    def _backend_ended(self, orderly: bool) -> None:
        if self._finished.done:
            return
        if orderly and self._body.ends_at_close():
            self._client.write(self._answer.end_of_close_delimited())
            self._finished.keep(None)
        else:
            self._finished.fail(GatewayError(BACKEND_UNAVAILABLE, "The backend closed in the middle of its answer."))

    def _at_event(self) -> bool:
        """Whether an event of our own could follow what has been passed."""
        between = not isinstance(self._body, ChunkedBody) or self._body.between_chunks()
        return between and self._last.endswith((b"\n\n", b"\r\n\r\n"))


def backend_message(head: ResponseHead, payload: bytes) -> str:
    """What the backend's error answer says, in its own words where it is the JSON that llama-server sends."""
    try:
        message = json.loads(payload)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        message = ""
    return f"The backend answered {head.status}: {message}" if message else f"The backend answered {head.status}."


async def fetch(pool: Pool, target: bytes, own_fields: bytes, seconds: float) -> tuple[int, bytes]:
    """GET `target` for the gateway itself; return status and body. Raises GatewayError."""
    try:
        return await asyncio.wait_for(_fetch(pool, target, own_fields), seconds or None)
    except asyncio.TimeoutError:
        raise GatewayError(BACKEND_TIMEOUT) from None


async def _fetch(pool: Pool, target: bytes, own_fields: bytes) -> tuple[int, bytes]:
    backend = pool.take() or await pool.connect()
    backend.deadline_s = inf
    reusable = False
    try:
        head = parse_response_head(await backend.ask([b"GET ", target, b" HTTP/1.1\r\n", own_fields, CRLF]).in_task())
        body = response_body(response_framing(head, b"GET"))
        payload = await _collect(backend, body)
        reusable = body.done and not body.surplus and keeps_alive(head)
        return head.status, payload
    finally:
        if reusable and not backend.ended:
            pool.give(backend)
        else:
            backend.abort()


async def _collect(backend: BackendWire, body: Body) -> bytes:
    """Read a body whole, up to a bound that no answer meant for the gateway itself comes near."""
    finished: Promise[None] = Promise()
    collected = bytearray()

    def take(data: bytes) -> None:
        try:
            collected.extend(body.feed(data))
        except GatewayError as error:
            finished.fail(error)
            return
        if body.done or len(collected) > _COLLECTED_BYTES:
            finished.keep(None)

    backend.pass_to(take, lambda orderly: finished.keep(None))
    take(backend.take_rest())
    if backend.ended:
        finished.keep(None)
    await finished.in_task()
    return bytes(collected)
