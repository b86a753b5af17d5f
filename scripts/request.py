"""The life of one request, in the order in which it happens: route, caller, rate, body, slot, backend, answer."""

import asyncio
import logging
import time

import local
from admission import Ticket
from answer import Answer, field_lines
from auth import Caller, credential, unauthorized
from bodies import RequestBody
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
from heartbeat import sign_of_life
from http1 import (
    CONTINUE,
    Framing,
    RequestHead,
    ResponseHead,
    expects_continue,
    keeps_alive,
    request_framing,
)
from parts import Parts
from readiness import DEAD, READY
from relay import Relay, request_bytes
from routes import PREFLIGHT, Role, Route
from usage import Meter
from wire import ClientWire

log = logging.getLogger("gateway")

_TIMEOUTS = frozenset((REQUEST_TIMEOUT, QUEUE_TIMEOUT, BACKEND_TIMEOUT))


class Request:
    """One request of one client's connection. `run` answers it, whatever happens, and observes it once."""

    __slots__ = (
        "_caller",
        "_client",
        "_framing",
        "_held_bytes",
        "_octets",
        "_parts",
        "_pieces",
        "_relay",
        "_sent_before",
        "_ticket",
        "_unread",
        "answer",
        "exchange",
    )

    def __init__(self, parts: Parts, client: ClientWire, head: RequestHead | None) -> None:
        self._parts = parts
        self._client = client
        self._framing: Framing | None = None
        self._unread = True  # bytes of the request may come that nobody will read
        self._pieces: list[bytes] = []
        self._octets = 0
        self._held_bytes = 0
        self._caller: Caller | None = None  # set once the request has been counted towards the key's rate
        self._ticket: Ticket | None = None
        self._relay: Relay | None = None
        self._sent_before = client.sent_bytes
        if head is None:
            method, minor, keeps, name = b"GET", 1, False, parts.ids.make()
        else:
            method, minor, keeps, name = head.method, head.minor, keeps_alive(head), parts.ids.of(head)
        self.exchange = Exchange(name, client.peer, parts.clock(), head)
        fields = b"X-Request-Id: %b\r\n" % name.encode()
        if parts.cors.on:
            fields += field_lines(parts.cors.fields(head))
        self.answer = Answer(client, fields, method=method, minor=minor, keep_alive=keeps and not parts.draining)

    async def run(self, head: RequestHead) -> bool:
        """Serve the request; return whether its connection can carry another."""
        try:
            await self._serve(head)
        except GatewayError as error:
            self.refuse(error.with_traceback(None))  # whose frames hold the error and this request: a cycle
        except PeerGone as left:
            left.with_traceback(None)
            self.cancel()
        except Exception:
            log.exception("request %s failed", self.exchange.id)
            self.refuse(GatewayError(INTERNAL_ERROR))
        finally:
            self.finish()
        if not self.answer.keep_alive or self._client.ended:
            return False
        if self._client.choked:
            await self._client.until_taken(self._parts.config.timeouts.stream_idle_s)
        return not self._parts.draining

    async def _serve(self, head: RequestHead) -> None:
        exchange, parts = self.exchange, self._parts
        exchange.stage = Stage.AUTHENTICATING
        framing = self._framing = request_framing(head, parts.config.limits)
        self._unread = framing.length != 0
        expects = b"expect" in head.known and expects_continue(head)
        route = exchange.route = parts.routes.find(head.method, head.target)
        self.answer.dialect = route.dialect
        if route is PREFLIGHT:
            self._skip_body()
            self.answer.send(204, b"", b"", parts.cors.preflight(head))
            exchange.stage = Stage.DONE
            return
        caller = self._identify(route, head)
        if route.refusal is not None:
            raise route.error()
        if route.kind.role is Role.OPERATOR and (caller is None or caller.role != "operator"):
            raise GatewayError(ROUTE_NOT_ALLOWED)
        if route.kind.local:
            self._skip_body()
            await local.serve(parts, self._client, self.answer, head, route, caller)
            exchange.stage = Stage.DONE
            return
        assert caller is not None  # only local routes are public
        if parts.draining:
            raise GatewayError(DRAINING)
        if route.needs_body and framing.length == 0 and b"content-length" not in head.known:
            raise GatewayError(LENGTH_REQUIRED)
        if route.kind.rated and parts.auth_enabled:
            self._charge(route, caller)
        if self._unread:
            await self._read_body(framing, expects)
        await self._admit_and_relay(head, route, caller)

    # --- The caller ---

    def _identify(self, route: Route, head: RequestHead) -> Caller | None:
        """Who is calling; None only where the route is public. A bad credential on a public route is no credential."""
        parts = self._parts
        public = route.kind.role is Role.PUBLIC
        if not public and self._client in parts.public_only:
            raise GatewayError(TOO_MANY_CONNECTIONS)
        if not parts.auth_enabled:
            return parts.anonymous
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

    def _charge(self, route: Route, caller: Caller) -> None:
        """Count the request against the key's rate, once the key's tokens for today are known not to be spent."""
        parts = self._parts
        if route.kind.metered and caller.tokens_per_day is not None:
            parts.observer.flush()
            if parts.ledger.spent_today(caller.key_id) >= caller.tokens_per_day:
                raise GatewayError(TOKEN_QUOTA_EXCEEDED, retry_after_s=int(parts.ledger.resets_in_s()) + 1)
        self.answer.add_lines(parts.rates.take(caller).lines())
        self._caller = caller

    # --- The body, read whole before a slot is asked for: a slow uploader never holds one ---

    async def _read_body(self, framing: Framing, expects: bool) -> None:
        self.exchange.stage = Stage.READING_BODY
        client, length = self._client, framing.length
        data = None if length is None else client.take_sized_body(length)
        if data is not None:
            self._hold(len(data))
            self._pieces.append(data)
            self._octets = len(data)
        else:
            if expects and not client.has_unread:
                client.write(CONTINUE)
            body = RequestBody(framing, self._parts.config.limits)
            self._pieces = body.pieces
            try:
                await client.read_body(body, self._parts.config.timeouts.client_body_s, self._hold)
            finally:
                self._octets = body.octets
        self.exchange.bytes_in = self._octets
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
        self._pieces.clear()

    def _skip_body(self) -> None:
        """Drop a body that nobody reads, if all of it is here already; else the answer is this connection's last."""
        if self._unread:
            length = None if self._framing is None else self._framing.length
            if length is not None and self._client.take_sized_body(length) is not None:
                self._unread = False
            else:
                self.answer.keep_alive = False

    # --- The slot and the backend ---

    async def _admit_and_relay(self, head: RequestHead, route: Route, caller: Caller) -> None:
        parts, exchange = self._parts, self.exchange
        if parts.readiness.state == DEAD:
            raise GatewayError(LOADING, "The backend is down; it is being restarted.")
        exchange.queued_s = parts.clock()
        ticket = None
        if route.kind.slot:
            ticket = parts.gate.apply(caller.key_id, parallel=caller.parallel, priority=caller.priority)
            self._ticket = ticket
            self._start_beating()
        try:
            while True:
                if parts.readiness.state != READY:
                    await self._until_ready()
                if ticket is not None:
                    if ticket.waiting is not None:
                        await self._until_admitted(ticket.waiting)
                    exchange.admitted_s = parts.clock()
                if await self._relay_once(head, route):
                    return
        finally:
            self._client.stop_beating()
            if ticket is not None:
                parts.last_work_s = parts.clock()
                self._release(ticket)

    async def _until_ready(self) -> None:
        """The model loads: wait for it, COLD_START_WAIT at most from when the request was ready to go."""
        self.exchange.stage = Stage.QUEUED
        left_s = self.exchange.queued_s + self._parts.config.queue.cold_start_wait_s - self._parts.clock()
        if left_s <= 0:
            raise GatewayError(LOADING)
        await self._client.wait_for(self._parts.readiness.when_ready(), left_s, LOADING)

    async def _until_admitted(self, waiting: "asyncio.Future[None]") -> None:
        self.exchange.stage = Stage.QUEUED
        await self._client.wait_for(waiting, self._parts.config.queue.timeout_s, QUEUE_TIMEOUT)

    async def _relay_once(self, head: RequestHead, route: Route) -> bool:
        """Relay; False where the backend refused the connection, so that nothing was sent and nothing is lost."""
        parts, exchange = self._parts, self.exchange
        exchange.stage = Stage.AWAITING_RESPONSE
        if parts.config.timeouts.duration_s:
            self._client.limit(parts.config.timeouts.duration_s)
        own_fields = b"%bX-Request-Id: %b\r\n" % (parts.backend_fields, exchange.id.encode())
        request = request_bytes(head, self._pieces, self._octets, own_fields)
        relay = self._relay = Relay(self._client, self.answer, self._answered, parts.patience, parts.clock)
        parts.relaying += route.kind.slot
        try:
            await relay.run(parts.pool, request, repeatable=route.kind.repeatable)
        except GatewayError as error:
            if error.kind is not BACKEND_UNAVAILABLE or relay.sent:
                raise
            parts.readiness.doubt()  # the process may only be loading
            return False
        finally:
            self._client.limit(0)
            parts.relaying -= route.kind.slot
            exchange.backend_status = relay.status
            exchange.first_byte_s = relay.first_byte_s
        if relay.error is None:
            exchange.stage = Stage.DONE
        else:
            exchange.outcome = Outcome.TIMED_OUT if relay.error.kind is BACKEND_TIMEOUT else Outcome.TRUNCATED
        return True

    def _answered(self, head: ResponseHead) -> Meter | None:
        """The backend has answered: nothing needs the request's body any more, and no heartbeat may come between."""
        exchange = self.exchange
        exchange.stage = Stage.STREAMING
        self._client.stop_beating()
        self._let_body_go()
        if self._parts.draining:
            self.answer.keep_alive = False
        if exchange.route.kind.metered and head.status == 200 and b"content-encoding" not in head.known:
            exchange.meter = Meter(exchange.route.label)
        return exchange.meter

    def _release(self, ticket: Ticket) -> None:
        """Free the slot; where the backend was cut short, only once it has let go."""
        relay = self._relay
        if relay is not None and relay.sent and not relay.whole:
            self._parts.letting_go.release(ticket, streamed=self.answer.is_stream)
        else:
            ticket.release()

    # --- Signs of life while the backend is silent ---

    def _start_beating(self) -> None:
        interval_s = self._parts.config.queue.sse_heartbeat_s
        if interval_s and self.answer.method == b"POST":
            self._client.beat_s = self._parts.deadlines.now_s + interval_s
            self._client.on_beat = self._beat

    def _beat(self, now_s: float) -> None:
        ticket = self._ticket
        waits = ticket is not None and ticket.waiting is not None and not ticket.waiting.done()
        if sign_of_life(self.answer, self._pieces, ticket.position() if ticket is not None and waits else 0):
            self._client.beat_s = now_s + self._parts.config.queue.sse_heartbeat_s
        else:
            self._client.stop_beating()

    # --- The end ---

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error of the gateway's own. It gives back what the key's rate was charged."""
        exchange = self.exchange
        exchange.refusal = error.kind
        if self._caller is not None:
            self._parts.rates.give_back(self._caller)
        if self._client.ended:
            self.cancel()
        else:
            exchange.outcome = Outcome.TIMED_OUT if error.kind in _TIMEOUTS else Outcome.REFUSED
            if not error.kind.closes:
                self._skip_body()
            self.answer.send_error(error)

    def cancel(self) -> None:
        """The client has left; there is nobody to answer."""
        self.exchange.outcome = Outcome.CANCELLED

    def finish(self) -> None:
        """Hand the exchange over to be observed, once, whatever became of it."""
        exchange, parts = self.exchange, self._parts
        if self._held_bytes:
            self._let_body_go()
        exchange.ended_s = parts.clock()
        exchange.ended_at = time.time()
        exchange.status = self.answer.status if self.answer.started else CLIENT_CLOSED_REQUEST
        exchange.bytes_out = self._client.sent_bytes - self._sent_before
        self._relay = None  # it knows this request: the two would keep each other from being freed at once
        parts.observer.observe(exchange)

    def close(self) -> None:
        """End the connection behind the answer, unless the answer has ended it already."""
        if self.exchange.outcome is Outcome.CANCELLED:
            self._client.abort()
        elif not self._client.ended:
            self._client.close(unread=self._unread, flush_s=self._parts.config.timeouts.stream_idle_s)
