"""One exchange with llama-server: a pooled connection, the request, its answer byte for byte.

`relay` raises before the first byte of an answer has gone to the client, and returns after it: from then on the answer
is whole or visibly cut, and there is nothing left to say in another status line.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

from answer import Answer, Opening, open_response
from backend_wire import BackendWire, Pulse
from bodies import Body, ChunkedBody, response_body
from client_wire import ClientWire
from errors import (
    BACKEND_MALFORMED,
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    GatewayError,
)
from http1 import (
    ResponseHead,
    parse_response_head,
    response_framing,
)
from turns import Outbox
from usage import Meter
from waiting import Deadlines, Promise

# llama-server closes a connection that has idled for 5 s, and says so itself before its hundredth answer.
_IDLE_S = 3.5
_INTERIM_RESPONSES = 16
_COLLECTED_BYTES = 1 << 20
_LAST_OCTETS = 4  # of an event, which tell that it is over


@dataclass(frozen=True)
class Patience:
    """How long each step may take, in seconds; 0 = without end."""

    connect_s: float
    request_s: float
    stream_idle_s: float


class Pool:
    """Idle connections to the backend, the last used first: the rest age and go."""

    def __init__(self, host: str, port: int, deadlines: Deadlines, outbox: Outbox, response_head_bytes: int) -> None:
        self._host = host
        self._port = port
        self._deadlines = deadlines
        self._outbox = outbox
        self._head_bytes = response_head_bytes
        self.pulse = Pulse()
        self._idle: list[BackendWire] = []

    def take(self) -> BackendWire | None:
        while self._idle:
            wire = self._idle.pop()
            if not wire.ended:
                return wire
        return None

    def take_back(self, wire: BackendWire, *, reusable: bool) -> None:
        """Keep a connection whose last answer was read to its end, or close one that cannot carry another.

        One that has not taken all of its request yet cannot, whatever it has answered.
        """
        if reusable and not wire.ended and not wire.transport.get_write_buffer_size():
            wire.rest_idle(_IDLE_S)
            self._idle.append(wire)
        else:
            wire.abort()

    def tick(self) -> None:
        """Let go of those that have ended."""
        self._idle = [wire for wire in self._idle if not wire.ended]

    async def connect(self) -> BackendWire:
        """Open a connection. Raises BACKEND_UNAVAILABLE."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend does not accept connections.") from error
        wire = BackendWire(writer, self._deadlines, self._outbox, self._head_bytes, self.pulse)
        wire.deadline_s = self._deadlines.now_s + _IDLE_S  # should nobody be there any more to take it
        if reader.at_eof():
            wire.abort()
            raise GatewayError(BACKEND_UNAVAILABLE, "The backend closed a new connection.")
        return wire

    def close(self) -> None:
        for wire in self._idle:
            wire.abort()
        self._idle.clear()


def ask(backend: BackendWire, request: bytes) -> Promise[bytes]:
    """Send a request; the promise is its response's head."""
    head: Promise[bytes] = Promise()
    backend.ask(request, head)
    return head


class Asked(NamedTuple):
    """A request that has gone out: to whom, and the promise of the answer's head."""

    backend: BackendWire
    head: Promise[bytes]


class Relay:
    """One request to the backend and its answer to the client; what became of it can be read at any time."""

    __slots__ = (
        "_answer",
        "_answered",
        "_asked",
        "_body",
        "_chunks",
        "_client",
        "_clock",
        "_finished",
        "_last",
        "_meter",
        "_patience",
        "_request",
        "error",
        "first_byte_s",
        "sent",
        "status",
        "told",
        "whole",
    )

    def __init__(
        self,
        client: ClientWire,
        answer: Answer,
        request: Callable[[], bytes],
        answered: Callable[[Opening], str | None],
        patience: Patience,
        clock: Callable[[], float],
        asked: Asked | None = None,
    ) -> None:
        """`request` makes the octets to be sent, which nobody keeps; `asked` is who has been sent them already.

        `answered` is called with the final response's opening and says as what the payload is metered, if it is.
        """
        self._client = client
        self._answer = answer
        self._request = request
        self._answered = answered
        self._patience = patience
        self._clock = clock
        self._meter: Meter | None = None
        self._last = b"\n\n"  # the end of what was passed; where a stream begins, an event may
        self._asked = asked
        self.sent = asked is not None
        self.status = 0  # the backend's
        self.first_byte_s = 0.0
        self.told: Meter | bytes | None = None  # of a metered answer: what has read it, or all of it
        self.whole = False
        self.error: GatewayError | None = None  # why an answer that had begun is not whole

    async def run(self, pool: Pool, *, repeatable: bool) -> None:
        """Raises GatewayError while nothing has been answered, PeerGone whenever the client has left.

        A request that missed a kept connection by a hair is sent again on a new one, if it is safe to repeat.
        """
        asked, self._asked = self._asked, None
        backend = pool.take() if asked is None else None
        while True:
            if asked is None:
                if backend is None:
                    backend = await self._client.run(pool.connect(), self._patience.connect_s, BACKEND_UNAVAILABLE)
                self.sent = True
                asked = Asked(backend, ask(backend, self._request()))
            backend = asked.backend
            reusable = False
            try:
                raw = await self._client.wait(asked.head, self._patience.request_s, BACKEND_TIMEOUT)
                reusable = await self._pass_answer(backend, raw)
                return
            except GatewayError:
                if not (repeatable and backend.was_stale()):
                    raise
            finally:
                self._client.feeder = None
                backend.transport.resume_reading()
                pool.take_back(backend, reusable=reusable)
            asked = backend = None
            self.sent = False  # as far as anybody can tell, and so it may wait again

    async def _pass_answer(self, backend: BackendWire, raw: bytes) -> bool:
        """Pass the answer on, from its head; return whether the connection is fit for another."""
        opening = open_response(raw, self._answer.method)
        if opening.status < 200:
            opening = await self._after_interim(backend, opening)
        self.status = opening.status
        self.first_byte_s = self._clock()
        kind = self._answered(opening)
        if kind is not None:
            self.told = self._meter = Meter(kind)
        return await self._pass_body(backend, opening)

    async def _pass_body(self, backend: BackendWire, opening: Opening) -> bool:
        """Pass on an answer of which more is to come; return whether the connection is fit for another."""
        self._body = body = response_body(opening.framing)
        if self._answer.started:
            await self._go_on(backend, opening)
            begun = b""
        else:
            begun = self._answer.begin_relayed(opening)
        self._client.feeder = backend
        if self._client.choked:  # by an earlier answer, and told before this backend was its feeder
            backend.transport.pause_reading()
        self._answer.write(begun + self._take(backend.take_rest()))
        self.whole = body.done or await self._pass_rest(backend)
        # llama-server closes behind a stream, whatever its head says, and not always before the next request.
        return body.done and opening.keeps_alive and not body.surplus and not opening.framing.chunked

    async def _after_interim(self, backend: BackendWire, opening: Opening) -> Opening:
        """Read on to the final response's head; interim ones are not passed on (RFC 9110 section 15.2)."""
        for _ in range(_INTERIM_RESPONSES):
            if opening.status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise GatewayError(BACKEND_MALFORMED, "The backend switched protocols without being asked.")
            head: Promise[bytes] = Promise()
            backend.hear(head)
            raw = await self._client.wait(head, self._patience.request_s, BACKEND_TIMEOUT)
            opening = open_response(raw, self._answer.method)
            if opening.status >= 200:
                return opening
        raise GatewayError(BACKEND_MALFORMED, "The backend sent too many interim responses.")

    # --- The answer ---

    async def _go_on(self, backend: BackendWire, opening: Opening) -> None:
        """Go on with a stream that the gateway has begun: it has its head."""
        if opening.tells and opening.is_stream:
            self._answer.go_on(self._body)
            return
        if opening.status == HTTPStatus.OK:
            raise GatewayError(
                BACKEND_UNAVAILABLE, "The backend's answer is not the plain event stream that has begun."
            )
        # The backend refuses what the client has been promised: its own error can only become an event.
        payload = await self._client.run(_collect(backend, self._body), self._patience.request_s, BACKEND_TIMEOUT)
        raise GatewayError(BACKEND_UNAVAILABLE, backend_message(opening.head, payload))

    async def _pass_rest(self, backend: BackendWire) -> bool:
        """Let bytes flow from transport to transport until the body is over; return whether all of it came."""
        finished: Promise[None] = Promise()
        self._finished = finished
        if self._answer.is_verbatim and isinstance(self._body, ChunkedBody):
            self._chunks = self._body
            backend.pass_to(self._receive_chunk, self._backend_ended)
        else:
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
            self._last = payload if len(payload) >= _LAST_OCTETS else (self._last + payload)[-_LAST_OCTETS:]
            if self._meter is not None:
                self._meter.feed(payload)
        return self._answer.encode(self._body, data, payload)

    def _receive_chunk(self, data: bytes) -> None:
        """The backend's bytes arrive: what runs for each event of a stream that passes chunk by chunk."""
        payload = self._chunks.whole_chunk(data)
        if len(payload) < _LAST_OCTETS:
            self._receive(data)
            return
        self._last = payload
        if self._meter is not None:
            self._meter.feed(payload)
        self._client.heard = True
        self._client.write(data)

    def _receive(self, data: bytes) -> None:
        """The backend's bytes arrive, whatever they are."""
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
    """GET `target` for the gateway itself, on a connection of its own; return status and body. Raises GatewayError.

    A kept one may have been closed just now, and a question that the gateway asks once in a while is not worth asking
    twice.
    """
    try:
        return await asyncio.wait_for(_fetch(pool, target, own_fields), seconds or None)
    except asyncio.TimeoutError:
        raise GatewayError(BACKEND_TIMEOUT) from None


async def _fetch(pool: Pool, target: bytes, own_fields: bytes) -> tuple[int, bytes]:
    backend = await pool.connect()
    try:
        raw = await ask(backend, b"GET %b HTTP/1.1\r\n%b\r\n" % (target, own_fields)).in_task()
        head = parse_response_head(raw)
        return head.status, await _collect(backend, response_body(response_framing(head, b"GET")))
    finally:
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
