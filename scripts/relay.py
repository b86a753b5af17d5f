"""One exchange with llama-server: a pooled connection, the request, its answer byte for byte.

`relay` raises before the first byte of an answer has gone to the client, and returns after it: from then on the answer
is whole or visibly cut, and there is nothing left to say in another status line.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

from answer import Answer
from errors import (
    BACKEND_MALFORMED,
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    GatewayError,
    PeerGone,
)
from http1 import (
    CRLF,
    HOP_BY_HOP,
    Body,
    ChunkedBody,
    RequestHead,
    ResponseHead,
    connection_options,
    parse_response_head,
    response_body,
    response_framing,
    wants_keep_alive,
)
from wire import BackendWire, ClientWire, Deadlines

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


@dataclass
class Passed:
    """What became of an exchange: filled as it goes, since an exchange that fails has come some way, too."""

    sent: bool = False  # the request went out to the backend
    status: int = 0  # the backend's
    first_byte_s: float = 0.0
    whole: bool = False
    error: GatewayError | None = None  # why an answer that had begun is not whole


class Pool:
    """Idle connections to the backend, the last used first: the rest age and go."""

    def __init__(self, host: str, port: int, deadlines: Deadlines, response_head_bytes: int) -> None:
        self._host = host
        self._port = port
        self._deadlines = deadlines
        self._head_bytes = response_head_bytes
        self._idle: list[BackendWire] = []

    def take(self) -> BackendWire | None:
        while self._idle:
            wire = self._idle.pop()
            if not wire.ended:
                return wire
        return None

    def give(self, wire: BackendWire) -> None:
        """Keep a connection whose last answer was read to its end."""
        wire.rest()
        wire.deadline_s = self._deadlines.now_s + _IDLE_S
        self._idle.append(wire)

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
        for wire in self._idle:
            wire.abort()
        self._idle.clear()


def request_bytes(head: RequestHead, body: list[bytes], octets: int, own_fields: bytes) -> list[bytes]:
    """The request as the backend gets it: same method, target and fields, our Host, framing and credentials."""
    dropped = _NOT_FORWARDED
    if b"connection" in head.known:
        dropped = dropped | connection_options(head.known)
    lines = [head.method, b" ", head.target, b" HTTP/1.1\r\n", own_fields]
    for name, value in head.fields:
        if name.lower() not in dropped:
            lines += (name, b": ", value, CRLF)
    if octets or head.method not in (b"GET", b"HEAD"):
        lines.append(b"Content-Length: %d\r\n" % octets)
    lines.append(CRLF)
    return lines + body


async def connected(client: ClientWire, pool: Pool, seconds: float) -> BackendWire:
    """An idle connection, or a new one that the client has not waited for in vain."""
    wire = pool.take()
    if wire is None:
        wire = await client.run(pool.connect(), seconds, BACKEND_UNAVAILABLE)
    wire.deadline_s = inf
    return wire


class Relay:
    """One request to the backend and its answer to the client."""

    def __init__(self, client: ClientWire, answer: Answer, patience: Patience, clock: Callable[[], float]) -> None:
        self._client = client
        self._answer = answer
        self._patience = patience
        self._clock = clock
        self._meter: Meter | None = None
        self._finished: asyncio.Future[None] | None = None
        self._body: Body | None = None
        self._last = b""
        self.passed = Passed()

    async def run(self, pool: Pool, request: list[bytes], answered: Callable[[ResponseHead], Meter | None]) -> None:
        """Raises GatewayError while nothing has been answered, PeerGone whenever the client has left.

        `answered` is called with the final response's head and says who reads the payload.
        """
        backend = await connected(self._client, pool, self._patience.connect_s)
        reusable = False
        try:
            self.passed.sent = True
            backend.send(request)
            head = await self._final_head(backend)
            self.passed.first_byte_s = self._clock()
            self._meter = answered(head)
            reusable = await self._pass_answer(backend, head)
        finally:
            self._client.feeder = None
            if reusable and not backend.ended:
                pool.give(backend)
            else:
                backend.abort()
                await asyncio.sleep(0)  # the socket closes in the loop's next round: then the slot is free

    async def _final_head(self, backend: BackendWire) -> ResponseHead:
        """Wait for the final response's head; interim ones are not passed on (RFC 9110 section 15.2)."""
        for _ in range(_INTERIM_RESPONSES):
            raw = await self._client.wait(backend.next_head(), self._patience.request_s, BACKEND_TIMEOUT)
            head = parse_response_head(raw)
            if head.status >= 200:
                self.passed.status = head.status
                return head
            if head.status == 101:
                raise GatewayError(BACKEND_MALFORMED, "The backend switched protocols without being asked.")
        raise GatewayError(BACKEND_MALFORMED, "The backend sent too many interim responses.")

    # --- The answer ---

    async def _pass_answer(self, backend: BackendWire, head: ResponseHead) -> bool:
        """Pass the answer on; return whether the backend's connection is fit for another."""
        framing = response_framing(head, self._answer.method)
        body = self._body = response_body(framing)
        if not self._answer.started:
            begun = self._answer.begin_relayed(head, framing)
        elif self._answer.continues(head, body):
            begun = b""
        else:
            raise await self._refusal(backend, head, body)
        backend.on_end = self._backend_ended
        first = backend.pass_to(self._receive)
        self._answer.write(begun + self._take(first))
        if not body.done and not await self._pass_rest(backend):
            return False
        self.passed.whole = True
        keeps = wants_keep_alive(head.minor, connection_options(head.known))
        return keeps and body.done and not body.surplus

    async def _pass_rest(self, backend: BackendWire) -> bool:
        """Let bytes flow from transport to transport until the body is over; return whether all of it came."""
        finished = self._finished = asyncio.get_running_loop().create_future()
        if backend.ended:
            self._backend_ended(backend.orderly)
        self._client.feeder = backend
        try:
            await self._client.wait(finished, self._patience.stream_idle_s, BACKEND_TIMEOUT, renewing=True)
        except GatewayError as error:
            self.passed.error = error
            self._answer.truncate(error, at_event=self._at_event(), flush_s=self._patience.stream_idle_s)
            return False
        return True

    def _take(self, data: bytes) -> bytes:
        """Measure bytes of the backend's; return what the client gets for them. Raises BACKEND_MALFORMED."""
        body = self._body
        assert body is not None  # set before the first byte is taken
        payload = body.feed(data)
        if self._meter is not None:
            self._meter.feed(payload)
        self._last = payload or self._last
        return self._answer.encode(body, data, payload)

    def _receive(self, data: bytes) -> None:
        """The backend's bytes arrive: the one function that runs for each event of a stream."""
        finished = self._finished
        if finished is None or finished.done():
            return
        try:
            taken = self._take(data)
        except GatewayError as error:
            finished.set_exception(error)
            return
        self._client.heard = True
        self._client.write(taken)
        if self._body.done:  # type: ignore[union-attr]
            finished.set_result(None)

    def _backend_ended(self, orderly: bool) -> None:
        finished = self._finished
        if finished is None or finished.done():
            return
        if orderly and self._body is not None and self._body.ends_at_close():
            self._client.write(self._answer.end_of_close_delimited())
            finished.set_result(None)
        else:
            finished.set_exception(GatewayError(BACKEND_UNAVAILABLE, "The backend closed in the middle of its answer."))

    def _at_event(self) -> bool:
        """Whether an event of our own could follow what has been passed."""
        between = not isinstance(self._body, ChunkedBody) or self._body.between_chunks()
        return between and self._last.endswith((b"\n\n", b"\r\n\r\n"))

    async def _refusal(self, backend: BackendWire, head: ResponseHead, body: Body) -> GatewayError:
        """The backend's own error, read whole, for a client whose stream has begun: it can only become an event."""
        payload = await self._client.run(_collect(backend, body), self._patience.request_s, BACKEND_TIMEOUT)
        return GatewayError(BACKEND_UNAVAILABLE, backend_message(head, payload))


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
        backend.send([b"GET ", target, b" HTTP/1.1\r\n", own_fields, CRLF])
        head = parse_response_head(await backend.next_head())
        body = response_body(response_framing(head, b"GET"))
        payload = await _collect(backend, body)
        reusable = body.done and not body.surplus and wants_keep_alive(head.minor, connection_options(head.known))
        return head.status, payload
    finally:
        if reusable and not backend.ended:
            pool.give(backend)
        else:
            backend.abort()


async def _collect(backend: BackendWire, body: Body) -> bytes:
    """Read a body whole, up to a bound that no answer meant for the gateway itself comes near."""
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    collected = bytearray()

    def take(data: bytes) -> None:
        if finished.done():
            return
        try:
            collected.extend(body.feed(data))
        except GatewayError as error:
            finished.set_exception(error)
            return
        if body.done or len(collected) > _COLLECTED_BYTES:
            finished.set_result(None)

    def ended(orderly: bool) -> None:
        if not finished.done():
            finished.set_result(None)

    backend.on_end = ended
    take(backend.pass_to(take))
    if backend.ended:
        ended(backend.orderly)
    await finished
    return bytes(collected)
