"""The life of one request, in the order in which it happens: route, caller, rate, body, slot, backend, answer."""

import asyncio
import json
import logging
import time

import local
from admission import Ticket
from answer import Answer
from auth import Caller, credential, unauthorized
from errors import (
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    DRAINING,
    INTERNAL_ERROR,
    LENGTH_REQUIRED,
    LOADING,
    MEMORY_FULL,
    QUEUE_TIMEOUT,
    REQUEST_TIMEOUT,
    ROUTE_NOT_ALLOWED,
    TOKEN_QUOTA_EXCEEDED,
    TOO_MANY_CONNECTIONS,
    GatewayError,
    PeerGone,
)
from exchange import CLIENT_CLOSED_REQUEST, Exchange, Outcome, Stage
from heartbeat import Heartbeat
from http1 import (
    CONTINUE,
    NO_BODY,
    Framing,
    RequestBody,
    RequestHead,
    ResponseHead,
    connection_options,
    expects_continue,
    request_framing,
    wants_keep_alive,
)
from parts import Parts
from readiness import DEAD
from relay import Relay, request_bytes
from routes import PREFLIGHT, Role, Route
from usage import Meter
from wire import ClientWire

log = logging.getLogger("gateway")

_TIMEOUTS = frozenset((REQUEST_TIMEOUT, QUEUE_TIMEOUT, BACKEND_TIMEOUT))
_DAY_S = 86400


class Request:
    """One request of one client's connection. `run` answers it, whatever happens, and observes it once."""

    __slots__ = (
        "_body",
        "_caller",
        "_charged",
        "_client",
        "_framing",
        "_head",
        "_held_bytes",
        "_meter",
        "_parts",
        "_public_only",
        "_relay",
        "_sent_before",
        "_unread",
        "answer",
        "exchange",
    )

    def __init__(self, parts: Parts, client: ClientWire, head: RequestHead | None, *, public_only: bool) -> None:
        self._parts = parts
        self._client = client
        self._head = head
        self._public_only = public_only
        self._framing: Framing | None = None
        self._unread = True
        self._caller: Caller | None = None
        self._charged = False
        self._held_bytes = 0
        self._body: RequestBody | None = None
        self._meter: Meter | None = None
        self._relay: Relay | None = None
        self._sent_before = client.sent_bytes
        self.exchange = Exchange(parts.ids.of(head), client.peer, parts.clock(), head)
        keeps = head is not None and wants_keep_alive(head.minor, connection_options(head.known))
        self.answer = Answer(
            client,
            method=b"GET" if head is None else head.method,
            minor=1 if head is None else head.minor,
            keep_alive=keeps and not parts.draining,
        )
        self.answer.add(((b"X-Request-Id", self.exchange.id.encode()), *parts.cors.fields(head)))

    async def run(self) -> bool:
        """Serve the request; return whether its connection can carry another."""
        assert self._head is not None
        try:
            await self._serve(self._head)
        except GatewayError as error:
            self.refuse(error)
        except PeerGone:
            self.exchange.outcome = Outcome.CANCELLED
        except Exception:
            log.exception("request %s failed", self.exchange.id)
            self.refuse(GatewayError(INTERNAL_ERROR))
        finally:
            self.finish()
        return self._may_carry_another()

    # --- From the head to the caller ---

    async def _serve(self, head: RequestHead) -> None:
        self.exchange.stage = Stage.AUTHENTICATING
        framing = self._framing = request_framing(head, self._parts.config.limits)
        self._unread = framing != NO_BODY
        expects = expects_continue(head)
        route = self.exchange.route = self._parts.routes.find(head.method, head.target)
        self.answer.dialect = route.dialect
        if route is PREFLIGHT:
            self.answer.send(204, b"", b"", self._parts.cors.preflight(head))
            self.exchange.stage = Stage.DONE
            return
        caller = self._caller = self._identify(route, head)
        route.check()
        if route.kind.role is Role.OPERATOR and (caller is None or caller.role != "operator"):
            raise GatewayError(ROUTE_NOT_ALLOWED)
        if route.kind.local:
            await local.serve(self._parts, self._client, self.answer, head, route, caller)
            self.exchange.stage = Stage.DONE
            return
        assert caller is not None  # only local routes are public
        self._check_gateway_open()
        if route.needs_body and b"content-length" not in head.known and not framing.chunked:
            raise GatewayError(LENGTH_REQUIRED)
        self._charge(route, caller)
        body = self._body = RequestBody(framing, self._parts.config.limits)
        if not body.done:
            await self._read_body(body, expects)
        await self._admit_and_relay(head, route, caller, body)

    def _identify(self, route: Route, head: RequestHead) -> Caller | None:
        """Who is calling; None only where the route is public. A bad credential on a public route is no credential."""
        parts = self._parts
        if not parts.config.auth.enabled:
            return parts.anonymous
        public = route.kind.role is Role.PUBLIC
        if self._public_only and not public:
            raise GatewayError(TOO_MANY_CONNECTIONS)
        try:
            secret = credential(head.known)
            if secret is None:
                raise unauthorized()
            caller = parts.keys.keyring.find(secret, time.time())
        except GatewayError:
            if public:
                return None
            raise
        self.exchange.key_id = caller.key_id
        return caller

    def _check_gateway_open(self) -> None:
        if self._parts.draining:
            raise GatewayError(DRAINING)

    def _charge(self, route: Route, caller: Caller) -> None:
        """Count the request against the key's rate, and hold its quota of tokens against what it has spent today."""
        parts = self._parts
        if not route.kind.rated or not parts.config.auth.enabled:
            return
        if route.kind.metered and caller.tokens_per_day is not None:
            if parts.ledger.spent_today(caller.key_id) >= caller.tokens_per_day:
                raise GatewayError(TOKEN_QUOTA_EXCEEDED, retry_after_s=_DAY_S - int(time.time()) % _DAY_S)
        self.answer.add(parts.rates.take(caller).fields())
        self._charged = True

    # --- The body ---

    async def _read_body(self, body: RequestBody, expects: bool) -> None:
        self.exchange.stage = Stage.READING_BODY
        if not self._client.take_body(body, self._hold):
            if expects and not body.octets:
                self._client.write(CONTINUE)
            await self._client.read_body(body, self._parts.config.timeouts.client_body_s, self._hold)
        self.exchange.bytes_in = body.octets
        self._unread = False

    def _hold(self, octets: int) -> None:
        parts = self._parts
        if parts.buffered_bytes + octets > parts.config.queue.max_buffered_bytes:
            limit = parts.config.queue.max_buffered_bytes
            raise GatewayError(MEMORY_FULL, f"Request bodies held exceed MAX_BUFFERED_BYTES ({limit} octets).")
        parts.buffered_bytes += octets
        self._held_bytes += octets

    def _let_body_go(self) -> None:
        self._parts.buffered_bytes -= self._held_bytes
        self._held_bytes = 0
        if self._body is not None:
            self._body.pieces.clear()

    # --- The slot and the backend ---

    async def _admit_and_relay(self, head: RequestHead, route: Route, caller: Caller, body: RequestBody) -> None:
        parts, exchange = self._parts, self.exchange
        if parts.readiness.state == DEAD:
            raise GatewayError(LOADING, "The backend is down; it is being restarted.")
        exchange.queued_s = parts.clock()
        ticket = None
        if route.kind.slot:
            ticket = parts.gate.apply(caller.key_id, parallel=caller.parallel, priority=caller.priority)
            self._start_heartbeat(body, ticket)
        try:
            while True:
                if not parts.readiness.ready:
                    await self._until_ready()
                if ticket is not None:
                    if ticket.waiting is not None:
                        await self._until_admitted(ticket)
                    exchange.admitted_s = parts.clock()
                if await self._relay_once(head, route, body):
                    return
        finally:
            self._client.stop_beating()
            if ticket is not None:
                parts.last_work_s = parts.clock()
                self._release(ticket)

    def _start_heartbeat(self, body: RequestBody, ticket: Ticket) -> None:
        interval_s = self._parts.config.queue.sse_heartbeat_s
        if interval_s and self.answer.method == b"POST":
            beat = Heartbeat(self._client, self.answer, body.pieces, interval_s, ticket).beat
            self._client.beat_s = self._parts.deadlines.now_s + interval_s
            self._client.on_beat = beat

    async def _until_ready(self) -> None:
        """The model loads: wait for it, COLD_START_WAIT at most from when the request was ready to go."""
        self.exchange.stage = Stage.QUEUED
        left_s = self.exchange.queued_s + self._parts.config.queue.cold_start_wait_s - self._parts.clock()
        if left_s <= 0:
            raise GatewayError(LOADING)
        await self._client.wait_for(self._parts.readiness.when_ready(), left_s, LOADING)

    async def _until_admitted(self, ticket: Ticket) -> None:
        assert ticket.waiting is not None
        self.exchange.stage = Stage.QUEUED
        await self._client.wait_for(ticket.waiting, self._parts.config.queue.timeout_s, QUEUE_TIMEOUT)

    async def _relay_once(self, head: RequestHead, route: Route, body: RequestBody) -> bool:
        """Relay; False where the backend refused the connection, so that nothing was sent and nothing is lost."""
        parts, exchange = self._parts, self.exchange
        exchange.stage = Stage.AWAITING_RESPONSE
        if parts.config.timeouts.duration_s:
            self._client.limit(parts.config.timeouts.duration_s)
        own_fields = b"%bX-Request-Id: %b\r\n" % (parts.backend_fields, exchange.id.encode())
        request = request_bytes(head, body.pieces, body.octets, own_fields)
        relay = self._relay = Relay(self._client, self.answer, parts.patience, parts.clock)
        slots = route.kind.slot
        parts.relaying += slots
        try:
            await relay.run(parts.pool, request, self._answered)
        except GatewayError as error:
            if error.kind is not BACKEND_UNAVAILABLE or relay.sent:
                raise
            parts.readiness.doubt()  # the process may only be loading
            return False
        finally:
            parts.relaying -= slots
            self._client.limit(0)
            exchange.backend_status = relay.status
            exchange.first_byte_s = relay.first_byte_s
        self._conclude(relay)
        return True

    def _answered(self, head: ResponseHead) -> Meter | None:
        """The backend has answered: nothing needs the request's body any more, and no heartbeat may come between."""
        self.exchange.stage = Stage.STREAMING
        self._client.stop_beating()
        self._let_body_go()
        kind = self.exchange.route.kind
        if kind.metered and head.status == 200 and b"content-encoding" not in head.known:
            self._meter = Meter(self.exchange.route.label)
        return self._meter

    def _conclude(self, relay: Relay) -> None:
        error = relay.error
        if error is None:
            self.exchange.stage = Stage.DONE
        else:
            self.exchange.outcome = Outcome.TIMED_OUT if error.kind is BACKEND_TIMEOUT else Outcome.TRUNCATED
            self.answer.keep_alive = False

    def _release(self, ticket: Ticket) -> None:
        """Free the slot; where the backend was cut short, only once it has let go."""
        relay = self._relay
        if relay is not None and relay.sent and not relay.whole:
            self._parts.letting_go.release(ticket)
        else:
            ticket.release()

    # --- The end ---

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error of the gateway's own. It gives back what the key's rate was charged."""
        exchange = self.exchange
        exchange.error = error
        exchange.outcome = Outcome.TIMED_OUT if error.kind in _TIMEOUTS else Outcome.REFUSED
        if self._charged and self._caller is not None:
            self._parts.rates.give_back(self._caller)
        if self._client.ended:
            exchange.outcome = Outcome.CANCELLED
        else:
            self.answer.send_error(error)

    def cancel(self) -> None:
        """The client left before there was a request to serve."""
        self.exchange.outcome = Outcome.CANCELLED

    def finish(self) -> None:
        """Observe the exchange, once, whatever became of it."""
        exchange, parts = self.exchange, self._parts
        self._let_body_go()
        exchange.ended_s = parts.clock()
        exchange.status = self.answer.status if self.answer.started else CLIENT_CLOSED_REQUEST
        exchange.bytes_out = self._client.sent_bytes - self._sent_before
        if self._meter is not None:
            exchange.events = self._meter.events
            exchange.tokens = self._meter.finish()
        if exchange.route.kind.metered and exchange.key_id != "-":
            parts.ledger.record(exchange.key_id, exchange.tokens, exchange.outcome)
        parts.observer.observe(exchange)

    def _may_carry_another(self) -> bool:
        if self._client.ended or self.exchange.outcome is Outcome.CANCELLED or not self.answer.keep_alive:
            return False
        if self._unread:
            length = None if self._framing is None else self._framing.length
            return length is not None and self._client.skip_body(length)
        return True

    def close(self) -> None:
        """End the connection behind the answer, unless the answer has ended it already."""
        if self.exchange.outcome is Outcome.CANCELLED:
            self._client.abort()
        elif not self._client.ended:
            self._client.close(unread=self._unread, flush_s=self._parts.config.timeouts.stream_idle_s)
