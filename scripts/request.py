"""The life of one request, in the order in which it happens: route, caller, rate, body, slot, backend, answer."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from math import inf

import callers
import local
from admission import Ticket
from answer import CLOSE, Answer, Opening, open_response
from auth import Caller
from backend_wire import BackendWire
from bodies import RequestBody
from client_wire import ClientWire
from errors import (
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    DRAINING,
    INTERNAL_ERROR,
    LOADING,
    MEMORY_FULL,
    QUEUE_TIMEOUT,
    REQUEST_TIMEOUT,
    GatewayError,
    PeerGone,
)
from exchange import Exchange, Outcome, Stage
from heartbeat import sign_of_life
from http1 import CONTINUE, CRLF
from parts import Parts
from plan import Plan
from readiness import DEAD, READY
from relay import Asked, Relay
from routes import PREFLIGHT
from usage import keep_whole
from waiting import Promise

log = logging.getLogger("gateway")

_TIMEOUTS = frozenset((REQUEST_TIMEOUT, QUEUE_TIMEOUT, BACKEND_TIMEOUT))


class Request:
    """One request of one client's connection, from its head to the record of what became of it.

    What is at hand is taken at once, in the callback that brought the head, and what is not is waited for in a
    conversation. Most requests find their body, a slot and a connection to the backend there already, and most answers
    that are no streams come in one piece: these never need one.
    """

    __slots__ = (
        "_answer",
        "_backend",
        "_beaten_s",
        "_caller",
        "_charged",
        "_client",
        "_held_bytes",
        "_length",
        "_lines",
        "_parts",
        "_pieces",
        "_plan",
        "_relay",
        "_slot",
        "_then",
        "_ticket",
        "_unread",
        "exchange",
    )
    _then: Callable[["Request", bool], None]

    def __init__(
        self, parts: Parts, client: ClientWire, plan: Plan, length: int | None, stage: str = Stage.AUTHENTICATING
    ) -> None:
        """`length` is the body's, None where that is chunked."""
        self._parts = parts
        self._client = client
        self._plan = plan
        self._length = length
        self._beaten_s = 0.0  # when the client last got a sign of life; 0 = not yet, inf = it wants none
        self._unread = length != 0 or plan.fault is not None  # bytes may come that nobody will read
        self._pieces: Sequence[bytes] = ()
        self._held_bytes = 0
        self._caller: Caller | None = None
        self._charged = False  # it counts towards the key's rate
        self._slot: str | None = None  # the key's that holds one without a ticket
        self._ticket: Ticket | None = None
        self._backend: BackendWire | None = None  # that was asked without a conversation
        self._relay: Relay | None = None
        self._answer: Answer | None = None
        name = plan.request_id or next(parts.ids)
        self._lines = b"X-Request-Id: %b\r\n%b" % (name, plan.own_lines)
        self.exchange = Exchange(name, client.peer, plan, parts.clock(), stage)
        client.sent_bytes = 0

    def begin(self, then: Callable[["Request", bool], None]) -> None:
        """Answer the request, whatever happens, and observe it once.

        `then` is called when it is over, with whether its connection can carry another.
        """
        self._then = then
        if self._parts.duration_s:
            self._client.limit(self._parts.duration_s)
        try:
            self._check()
            backend = self._take_all() if self._plan.is_straight else None
        except Exception as error:
            self._end_by(error)
            self.finish()
            self._end(self._keeps_alive())
            return
        if backend is None:
            self._client.converse(self._converse(), self._end)
        else:
            self._ask(backend)

    async def _converse(self) -> bool:
        """Wait for what was not at hand, to the request's end; return whether its connection can carry another."""
        try:
            if self._plan.route.kind.local:
                await self._answer_locally()
            else:
                if self._unread:
                    await self._read_body()
                await self._admit_and_relay()
        except Exception as error:
            self._end_by(error)
        finally:
            self.finish()
        return self._keeps_alive()

    def _keeps_alive(self) -> bool:
        keep_alive = self._plan.keep_alive if self._answer is None else self._answer.keep_alive
        return keep_alive and not self._client.ended and not self._parts.draining

    def _end(self, keep: bool) -> None:
        self._then(self, keep)

    @property
    def stage(self) -> str:
        return self.exchange.stage

    @property
    def holds_backend(self) -> bool:
        """Whether the backend works on it in a slot."""
        return self._plan.slot and self.stage in (Stage.AWAITING_RESPONSE, Stage.STREAMING)

    @property
    def answer(self) -> Answer:
        """The client's side of the answer, for all answers but whole ones of the backend's."""
        if self._answer is None:
            keep_alive = self._plan.keep_alive and not self._parts.draining
            self._answer = Answer(self._client, self._plan, self._lines, keep_alive=keep_alive)
        return self._answer

    # --- What the head says ---

    def _check(self) -> None:
        """Find out who is calling, raise what forbids the request, and count it towards its key's rate."""
        parts, plan = self._parts, self._plan
        if plan.fault is not None:
            raise plan.fault
        caller = self._caller = callers.identify(parts, self._client, plan)
        if caller is not None:
            self.exchange.key_id = caller.key_id
        if plan.is_special or parts.draining:
            callers.check(parts, plan, caller)
        if plan.rated and parts.auth_enabled and caller is not None:
            self._lines += callers.charge(parts, plan, caller)
            self._charged = True

    async def _answer_locally(self) -> None:
        self._skip_body()
        if self._plan.route is PREFLIGHT:
            self.answer.send(204, b"", b"", self._plan.preflight)
        else:
            await local.serve(self._parts, self._client, self.answer, self._plan, self._caller)
        self.exchange.stage = Stage.DONE

    # --- The body, read whole before a slot is asked for: a slow uploader never holds one ---

    async def _read_body(self) -> None:
        self.exchange.stage = Stage.READING_BODY
        if self._plan.expects and not self._client.has_unread:
            self._client.write(CONTINUE)
        body = RequestBody(self._length, self._parts.config.limits)
        self._pieces = body.pieces
        try:
            await self._client.read_body(body, self._parts.config.timeouts.client_body_s, self._hold)
        finally:
            self.exchange.bytes_in = body.octets
        self._unread = False

    def _hold(self, octets: int) -> None:
        parts = self._parts
        parts.buffered_bytes += octets
        self._held_bytes += octets
        if parts.buffered_bytes > parts.most_buffered_bytes:
            limit = parts.most_buffered_bytes
            raise GatewayError(MEMORY_FULL, f"Request bodies held exceed MAX_BUFFERED_BYTES ({limit} octets).")

    def _let_body_go(self) -> None:
        self._parts.buffered_bytes -= self._held_bytes
        self._held_bytes = 0
        self._pieces = ()

    def _skip_body(self) -> None:
        """Drop a body that nobody reads, if all of it is here already; else the answer is this connection's last."""
        if self._unread:
            if self._length and self._client.take_sized_body(self._length) is not None:
                self._unread = False
            else:
                self.answer.keep_alive = False

    # --- The straight way: all that it needs is at hand, and the answer comes in one piece ---

    def _take_all(self) -> BackendWire | None:
        """Take the body, a slot and a connection to the backend, as far as they are there; the latter, if all are."""
        parts, caller, exchange = self._parts, self._caller, self.exchange
        if caller is None:
            return None
        if self._unread:
            length = self._length
            assert length is not None  # that is no straight way
            body = self._client.take_sized_body(length)
            if body is None:
                return None
            self._unread = False
            self._pieces = (body,)
            exchange.bytes_in = length
            self._hold(length)
        if self._client.ended or parts.readiness.state != READY:
            return None
        if self._plan.slot:
            if not parts.gate.take(caller.key_id, caller.parallel, caller.priority):
                return None
            self._slot = caller.key_id
            exchange.left_queue_s = exchange.started_s
        exchange.queued_s = exchange.started_s
        return parts.pool.take()

    def _ask(self, backend: BackendWire) -> None:
        """Send the request on; `keep` or `fail` will be told of the answer's head."""
        self._backend = backend
        self.exchange.stage = Stage.AWAITING_RESPONSE
        backend.ask(self._request_bytes(), self)
        self._client.expect(self, self._parts.patience.request_s, BACKEND_TIMEOUT)

    def keep(self, head: bytes) -> None:
        """The backend's head is here."""
        backend = self._backend
        assert backend is not None  # that is who calls
        try:
            opening = open_response(head, self._plan.method)
        except GatewayError:
            opening = None  # the conversation will meet it
        if opening is not None and opening.framing.length == len(backend.rest) and self._answer is None:
            self._pass_whole(backend, opening)
        else:
            heard: Promise[bytes] = Promise()
            heard.keep(head)
            self._hand_over(backend, heard)

    def fail(self, error: Exception) -> None:
        """The backend's head will not come: the client has left, or its time is up, or the backend failed."""
        backend = self._backend
        assert backend is not None  # it has been asked
        heard: Promise[bytes] = Promise()
        heard.fail(error)
        backend.hear(heard)  # in this request's place
        self._hand_over(backend, heard)

    def _hand_over(self, backend: BackendWire, heard: Promise[bytes]) -> None:
        """Go on in a conversation, as if that had asked."""
        self._client.settle()
        self._have_ticket()
        self._backend = None
        self._open_relay(Asked(backend, heard))
        self._client.converse(self._converse(), self._end)

    def _pass_whole(self, backend: BackendWire, opening: Opening) -> None:
        parts, exchange, plan = self._parts, self.exchange, self._plan
        exchange.first_byte_s = parts.clock()
        exchange.backend_status = exchange.status = opening.status
        exchange.stage = Stage.DONE
        payload = backend.rest
        if opening.tells and plan.metered:
            exchange.told = keep_whole(plan.label, payload)
        if parts.draining:
            self._client.settle()
            self._lines += CLOSE
        date = b"" if opening.dated else parts.date
        self._client.write(b"".join((opening.lines, date, self._lines, CRLF, payload)))
        parts.pool.take_back(backend, reusable=opening.keeps_alive)
        self.finish()
        self._then(self, not parts.draining)

    def _request_bytes(self) -> bytes:
        return self._plan.backend_request(self.exchange.id, self.exchange.bytes_in, self._pieces)

    # --- The conversation: a slot and the backend, as long as they take ---

    async def _admit_and_relay(self) -> None:
        """Wait for a slot and for the backend to be ready, then relay, until the backend has taken the request.

        Where it refused the connection nothing was sent and nothing is lost: the process may only be loading.
        """
        parts, exchange, repeatable = self._parts, self.exchange, self._plan.route.kind.repeatable
        while True:
            relay = self._relay
            if relay is None:
                await self._admit()
                exchange.stage = Stage.AWAITING_RESPONSE
                relay = self._open_relay()
            try:
                await relay.run(parts.pool, repeatable=repeatable)
                break
            except GatewayError as error:
                if error.kind is not BACKEND_UNAVAILABLE or relay.sent:
                    raise
            parts.readiness.doubt()
            self._relay = None
        if relay.error is None:
            exchange.stage = Stage.DONE
        else:
            exchange.outcome = Outcome.TIMED_OUT if relay.error.kind is BACKEND_TIMEOUT else Outcome.TRUNCATED

    async def _admit(self) -> None:
        parts = self._parts
        if not self.exchange.queued_s:
            self._apply()
        else:
            self._have_ticket()
        if parts.readiness.state != READY:
            await self._until_ready()
        if self._ticket is not None:
            if self._ticket.waiting is not None:
                await self._until_admitted(self._ticket.waiting)
            self.exchange.left_queue_s = parts.clock()

    def _have_ticket(self) -> None:
        """Hold a slot that was taken on the straight way as a conversation does: by a ticket."""
        if self._slot is not None and self._caller is not None:
            self._ticket = self._parts.gate.ticket(self._slot, self._caller.parallel)
            self._slot = None

    def _apply(self) -> None:
        """Get into the queue, and into a slot if one is free."""
        parts, caller = self._parts, self._caller
        assert caller is not None  # only local routes are public
        if parts.readiness.state == DEAD:
            raise GatewayError(LOADING, "The backend is down; it is being restarted.")
        self.exchange.queued_s = parts.clock()
        if self._plan.slot:
            self._ticket = parts.gate.apply(caller.key_id, parallel=caller.parallel, priority=caller.priority)

    def _begin_waiting(self) -> None:
        self.exchange.stage = Stage.QUEUED
        if self._parts.draining:  # since the request was checked, which began before its body came
            raise GatewayError(DRAINING)

    async def _until_ready(self) -> None:
        """The model loads: wait for it, COLD_START_WAIT at most from when the request was ready to go."""
        self._begin_waiting()
        left_s = self.exchange.queued_s + self._parts.config.queue.cold_start_wait_s - self._parts.clock()
        if left_s <= 0:
            raise GatewayError(LOADING)
        ready = self._parts.readiness.when_ready()
        try:
            await self._client.wait_for(ready, left_s, LOADING)
        finally:
            ready.cancel()  # it is kept for as long as the model loads

    async def _until_admitted(self, waiting: "asyncio.Future[None]") -> None:
        self._begin_waiting()
        await self._client.wait_for(waiting, self._parts.config.queue.timeout_s, QUEUE_TIMEOUT)

    def _open_relay(self, asked: Asked | None = None) -> Relay:
        parts = self._parts
        self._relay = Relay(
            self._client, self.answer, self._request_bytes, self._answered, parts.patience, parts.clock, asked
        )
        return self._relay

    def _answered(self, opening: Opening) -> str | None:
        """The backend has answered: nothing needs the request's body any more, and no heartbeat may come between.

        Returns as which route's answer the payload is metered, if it is.
        """
        self.exchange.stage = Stage.STREAMING
        self._let_body_go()
        if self._parts.draining:
            self.answer.keep_alive = False
        return self._plan.label if opening.tells and self._plan.metered else None

    def beat(self, now_s: float) -> None:
        """Give a sign of life where the backend has been silent for so long that one is due."""
        if not self._plan.heartbeats or self.stage not in (Stage.QUEUED, Stage.AWAITING_RESPONSE):
            return
        if now_s < (self._beaten_s or self.exchange.queued_s) + self._parts.beat_s:
            return
        ticket = self._ticket
        waits = ticket is not None and ticket.waiting is not None and not ticket.waiting.done()
        goes_on = sign_of_life(self.answer, self._pieces, ticket.position() if ticket is not None and waits else 0)
        self._beaten_s = now_s if goes_on else inf

    # --- The end ---

    def _end_by(self, error: Exception) -> None:
        """End the request as an exception says."""
        if self.exchange.stage is Stage.QUEUED:  # it has waited, though it was not admitted
            self.exchange.left_queue_s = self._parts.clock()
        if isinstance(error, PeerGone):
            self.cancel()
        elif isinstance(error, GatewayError):
            self.refuse(error)
        else:
            log.error("request %s failed", self.exchange.id.decode(), exc_info=error)
            self.refuse(GatewayError(INTERNAL_ERROR))
        error.with_traceback(None)  # whose frames hold the error and this request: a cycle

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error of the gateway's own. It gives back what the key's rate was charged."""
        if self._charged and self._caller is not None:
            self._parts.rates.give_back(self._caller)
        if self._client.ended:
            self.cancel()
        else:
            self.exchange.refusal = error.kind
            self.exchange.outcome = Outcome.TIMED_OUT if error.kind in _TIMEOUTS else Outcome.REFUSED
            if not error.kind.closes:
                self._skip_body()
            self.answer.send_error(error)

    def cancel(self) -> None:
        """The client has left; there is nobody to answer."""
        self.exchange.outcome = Outcome.CANCELLED

    def finish(self) -> None:
        """Give back what the request holds, and hand over what became of it: once, in the end."""
        parts, client, exchange = self._parts, self._client, self.exchange
        exchange.ended_s = now_s = parts.clock()
        exchange.bytes_out = client.sent_bytes
        parts.buffered_bytes -= self._held_bytes
        if parts.duration_s:
            client.limit(0)
        if self._slot is not None:
            parts.gate.give(self._slot)
            parts.last_work_s = now_s
        elif self._ticket is not None:
            self._release(self._ticket)
            parts.last_work_s = now_s
        if self._answer is not None and self._answer.started:
            exchange.status = self._answer.status
        relay = self._relay
        if relay is not None:
            exchange.backend_status, exchange.first_byte_s, exchange.told = relay.status, relay.first_byte_s, relay.told
            self._relay = None  # it knows this request: the two would keep each other from being freed at once
        parts.observer.observe(exchange)

    def _release(self, ticket: Ticket) -> None:
        """Free the slot; where the backend was cut short, only once it has let go."""
        relay = self._relay
        if relay is not None and relay.sent and not relay.whole:
            self._parts.letting_go.release(ticket, streamed=self.answer.is_stream)
        else:
            ticket.release()

    def close(self) -> None:
        """End the connection behind the answer, unless the answer has ended it already."""
        if self.exchange.outcome is Outcome.CANCELLED:
            self._client.abort()
        elif not self._client.ended:
            self._client.close(unread=self._unread, flush_s=self._parts.config.timeouts.stream_idle_s)
