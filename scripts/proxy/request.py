"""The life of one request, in the order in which it happens: access, body, slot, backend, response, record."""

import logging
from dataclasses import replace
from functools import partial
from http import HTTPStatus

from accounting.request_record import NO_MODEL, Outcome, RequestRecord, Stage
from accounting.token_counter import TokenCounter, buffer_if_small, fast_tokens
from auth import Caller, KeyRefused
from backend.generation_watch import Generated
from backend.left_stream import LeftStream, Shown
from backend.models import Models
from backend.readiness import DEAD
from core.errors import (
    BACKEND_MALFORMED,
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    INTERNAL_ERROR,
    LOADING,
    QUEUE_TIMEOUT,
    REQUEST_TIMEOUT,
    GatewayError,
    PeerGone,
)
from http1.json_members import Members
from policy.fair_queue import FairQueue
from policy.prepared_request import PreparedRequest
from policy.routes import PREFLIGHT
from policy.slot_demand import ONE_SLOT, SlotDemand, asks_for_stream, check_batch, check_parallel
from policy.suspects import Suspect
from policy.token_limits import TokensAsked, limit_tokens, tokens_asked
from proxy.access import client_addresses
from proxy.admission import BACKEND_IS_DOWN, Admission, Unfinished, takes_free_slot
from proxy.endpoints import EndpointCall
from proxy.heartbeat import Heartbeats
from proxy.incoming_body import IncomingBody
from proxy.last_responses import PayloadCollector
from proxy.model_admission import ModelAdmission
from proxy.model_list import model_list
from proxy.relay import Relay, Remainder
from proxy.request_services import RequestServices
from proxy.response import Response
from proxy.response_info import ResponseInfo, parse_response
from proxy.router_relay import RouterRelay
from proxy.token_quotas import allowance_lines
from transport.backend_protocol import BackendProtocol, Missed
from transport.client_protocol import ClientProtocol

log = logging.getLogger("gateway")

_MAX_INTERIM_RESPONSES = 16
_BAD_REQUEST = 400
_KEPT_BYTES = 4096  # of the body of a stream: what it asks for bounds what its client is charged that leaves
_MAX_REPEATS = 3  # of a request that its connection's end crossed, or that was at work in a death
_TIMEOUTS = frozenset((REQUEST_TIMEOUT, QUEUE_TIMEOUT, BACKEND_TIMEOUT))


class Request:
    """One request of a client, from its head to its record."""

    __slots__ = (
        "_addresses",
        "_admission",
        "_admitted",
        "_body",
        "_caller",
        "_client",
        "_demand",
        "_error",
        "_has_free_slot",
        "_heartbeats",
        "_left",
        "_prepared",
        "_rate_lines",
        "_relay",
        "_remainder",
        "_response",
        "_sent",
        "_services",
        "record",
    )

    def __init__(
        self,
        services: RequestServices,
        client: ClientProtocol,
        prepared: PreparedRequest,
        length: int | None,
        stage: str = Stage.AUTHENTICATING,
    ) -> None:
        """`length` is the body's in bytes, None if it is chunked."""
        self._services = services
        self._client = client
        self._prepared = prepared
        self._body = IncomingBody(services, client, prepared, length)
        self._error: GatewayError | None = None  # known before anything is looked at
        self._caller: Caller | None = None
        self._rate_lines = b""  # what the rate leaves, if the request counts
        self._demand: SlotDemand = ONE_SLOT
        self._has_free_slot = False  # one that was free at once
        self._admission: Admission | None = None  # see _admission_of
        self._heartbeats: Heartbeats | None = None  # made if the request waits for long
        self._sent = False  # the backend works on it, as far as is known
        self._relay: Relay | None = None  # of a response that comes in pieces
        self._remainder: Remainder | None = None  # of a stream whose client has left
        self._left: BackendProtocol | None = None  # the connection of a request that was given up
        self._admitted = 0  # how many requests had had slots when its stream began
        request_id = prepared.request_id or next(services.request_ids)
        keep_alive = prepared.keep_alive and not services.lifecycle.draining
        self._response = Response(client, prepared, request_id, services.date, keep_alive)
        self._addresses = client_addresses(client, prepared)
        self.record = RequestRecord(request_id, self._addresses[0], prepared, services.clock(), stage)
        client.sent_bytes = 0

    async def handle(self) -> bool:
        """Serve the request, whatever happens, and record it; return whether its connection can carry another."""
        if self._services.timeouts.duration_s:
            self._client.limit_waits(self._services.timeouts.duration_s)
        try:
            self._check_access()
            if self._prepared.route.kind.local:
                await self._answer_locally()
            else:
                caller = self._caller
                assert caller is not None  # only the gateway's own routes are public
                if not self._has_checked_body(caller):
                    await self._read_and_check_body(caller)
                if self._services.models is None or not self._list_models(caller, self._services.models):
                    await self._relay_to_backend(caller)
        except Exception as error:
            self._end_by(error)
        except GeneratorExit:  # ClientProtocol ends a handler that awaits what it must not
            self.refuse(GatewayError(INTERNAL_ERROR))
            raise
        finally:
            self.finish()
        return self._response.keep_alive and not self._client.ended and not self._services.lifecycle.draining

    def forbid(self, error: GatewayError) -> None:
        """Let the request be refused with this error."""
        self._error = error

    @property
    def stage(self) -> str:
        return self.record.stage

    @property
    def backend_slots(self) -> int:
        """In how many slots the backend works on it."""
        if not self._prepared.route.kind.slot or self.stage not in (Stage.AWAITING_RESPONSE, Stage.STREAMING):
            return 0
        return 1 if self._admission is None else self._admission.slots

    @property
    def unanswered_bytes(self) -> int:
        """The size of its body, while the backend has it and has not begun to answer."""
        return self._body.size if self.stage is Stage.AWAITING_RESPONSE else 0

    @property
    def stream_events(self) -> int | None:
        """How many events of the backend's stream have come; None if it has begun none."""
        source = self.record.usage_source
        return source.events if self._response.is_event_stream and isinstance(source, TokenCounter) else None

    @property
    def is_unread(self) -> bool:
        """Whether its client does not take what it is sent."""
        return self._client.write_paused

    @property
    def is_at_work(self) -> bool:
        """Whether the backend works on what its body asks for, as far as is known."""
        return self._sent and self._prepared.route.kind.works

    @property
    def _queue(self) -> FairQueue:
        """The queue for the slots of its model."""
        models, name = self._services.models, self.record.model
        return self._services.queue if models is None or name == NO_MODEL else models.find(name).queue

    def suspect(self) -> Suspect:
        """Return what it is recognised by if the backend dies."""
        return Suspect(self.record.key_id, self._body.digest())

    # --- What the head says ---

    def _check_access(self) -> None:
        """Find the caller, raise what forbids the request, and count it towards the key's rate."""
        services, prepared = self._services, self._prepared
        if self._error is not None:
            raise self._error
        caller = self._caller = services.access.authenticate(prepared, self._addresses)
        if caller is not None:
            self.record.key_id = self._body.key_id = caller.key_id
            self._client.authenticated = True
        draining = services.lifecycle.draining
        if prepared.needs_authorization or draining:
            services.access.authorize(prepared, caller, draining)
            if prepared.route.kind.bounded and caller is not None:
                services.cheap_routes.check_size(self._body.length or 0)
                services.cheap_routes.count(caller)
        if caller is not None:
            lines = services.access.enforce_limits(prepared, caller)
            if lines is not None:
                self._rate_lines = lines
                self._response.lines += lines

    async def _answer_locally(self) -> None:
        self._skip_body()
        if self._prepared.route is PREFLIGHT:
            self._response.send(204, b"", b"", self._prepared.preflight)
        else:
            call = EndpointCall(self._client, self._response, self._prepared, self._caller)
            await self._services.endpoints.answer(call)
        self.record.stage = Stage.DONE

    # --- The body, read whole before a slot is asked for: a slow upload never holds one ---

    def _has_checked_body(self, caller: Caller) -> bool:
        """Take the body if all of it has been received; return whether it need not be read for its members either."""
        services, body = self._services, self._body
        if services.suspects.active:
            services.suspects.check_caller(caller.key_id)
        if body.unread and not body.take_if_received():
            return False
        if (caller.limits_tokens or services.reads_members) and self._reads_all_members(caller):
            return False
        return body.is_cleared()

    def _reads_all_members(self, caller: Caller) -> bool:
        """Whether the body is read whatever it looks like: for the limits of its key, or because members are added."""
        if caller.limits_tokens and self._prepared.route.kind.metered:
            return True
        if self._services.models is not None:
            return self._prepared.route.by_model
        return self._services.isolation is not None and self._prepared.route.kind.slot

    async def _read_and_check_body(self, caller: Caller) -> None:
        body = self._body
        if body.unread:
            self.record.stage = Stage.READING_BODY
            reads_all = self._reads_all_members(caller)
            await body.read(for_members=reads_all)
            if not reads_all and body.scan is None and body.is_cleared():
                return
        if self._prepared.route.screen is None:
            return
        members = await body.find_members()
        if members is not None:
            self._apply_limits(caller, members)

    def _apply_limits(self, caller: Caller, members: Members) -> None:
        """Apply the key's limits, and the one for all, to what the body asks for.

        Raises TOO_MANY_CHOICES, BATCH_TOO_LARGE, TOO_MANY_TOKENS_ASKED or TOKEN_RATE_EXCEEDED.
        """
        route, record = self._prepared.route, self.record
        record.asked = tokens_asked(route, members)
        if route.demand_rule is not None:
            self._demand = route.demand_rule.demand(members.found)
            check_parallel(self._demand, caller.parallel)
            check_batch(self._demand, self._services.limits.batch_size)
        if caller.limits_tokens and route.kind.metered:
            self._limit_tokens(caller, members, record.asked)

    def _skip_body(self) -> None:
        """Drop a body that will not be read, if all of it has been received; else the connection ends after this."""
        if not self._body.skip():
            self._response.keep_alive = False

    # --- The key's limits on tokens ---

    def _limit_tokens(self, caller: Caller, members: Members, asked: TokensAsked) -> None:
        """Apply the limits on what one request may generate and on what the key may use within a minute."""
        route, record = self._prepared.route, self.record
        if caller.max_tokens is not None:
            is_named, asked = asked.is_named, limit_tokens(asked, caller.max_tokens)
            record.asked = asked
            if asked.member and asked.max_tokens is not None and not is_named and members.end is not None:
                self._body.add(asked.member, asked.max_tokens)
        record.reservation = self._services.quotas.reserve(caller, route, self._body.size, asked)
        if record.reservation is not None:
            self._response.lines += allowance_lines(caller, record.reservation)

    # --- A slot, the backend, and its response ---

    async def _relay_to_backend(self, caller: Caller) -> None:
        """Wait for a slot and for the backend, send the request, and pass the response on.

        If the backend refuses the connection, nothing is lost: the process may only be loading. A request that crosses
        the end of its connection, so that the backend has not read it, is sent again on a new one.
        """
        services, record, body = self._services, self.record, self._body
        repeats = 0
        cut: GatewayError | None = None  # by which the last connection ended, if that may have been a death
        self._has_free_slot = is_admitted = takes_free_slot(services, record, caller, self._demand)
        while True:
            if not is_admitted and not self._admission_of(caller).try_at_once():
                if not await self._admission_of(caller).wait():
                    self._answer_without_backend()
                    return
                cut = None
            is_admitted = False  # if it is sent again, it must be ready again
            if services.suspects.active or caller.limits_tokens or services.isolation is not None:
                await self._clear_to_send(caller, was_cut=cut is not None)
            record.stage = Stage.AWAITING_RESPONSE
            backend = None if repeats else services.pool.acquire()
            if backend is None and (backend := await self._connect(cut)) is None:
                cut = None
                continue
            reusable = False
            try:
                # No variable holds the request: it would keep the body for as long as the response lasts.
                head = backend.send_request(body.request(record.id))
                self._sent = True
                raw = await self._client.wait(head, services.upstream_timeouts.request_s, BACKEND_TIMEOUT)
                info = parse_response(raw, self._prepared.method)
                if info.status >= _BAD_REQUEST and await self._is_missed(backend, info, repeats):
                    cut = None
                elif info.framing.length == len(backend.received) and not self._response.started:
                    self._begin_response(info, backend.received)
                    self._response.send_relayed(info, backend.received)
                    record.stage, self._sent, reusable = Stage.DONE, False, info.keeps_alive
                    return
                else:
                    reusable = await self._pass_in_pieces(backend, info)
                    return
            except GatewayError as error:
                if repeats == _MAX_REPEATS:
                    raise
                cut = self._check_end(error, backend)
            finally:
                if self._sent:  # the backend may be at work on it, until it closes the connection
                    self._left = backend
                    backend.give_up(services.upstream_timeouts.request_s)
                # Of other routes it is not certain that every llama-server reads a body before it answers.
                services.pool.release(backend, reusable and (self._prepared.route.needs_body or not body.size))
            self._sent = False
            repeats += 1

    async def _clear_to_send(self, caller: Caller, *, was_cut: bool) -> None:
        """Check what may have changed while the request waited, and get an isolated slot."""
        services, kind = self._services, self._prepared.route.kind
        if services.suspects.active and kind.works and not was_cut:
            await self._admission_of(caller).await_lane(self.suspect())
        if caller.limits_tokens and kind.metered:  # others of the key may have used them up meanwhile
            services.quotas.check_again(caller, self.record.reservation)
        if services.isolation is not None and kind.slot:
            await self._admission_of(caller).lease_slot(services.isolation, self._body)

    def _admission_of(self, caller: Caller) -> Admission:
        """Return the request's admission. It is made when it is needed: one that takes a free slot needs none."""
        if self._admission is None:
            services, client, record, models = self._services, self._client, self.record, self._services.models
            self._admission = (
                Admission(services, client, record, caller, self._demand, has_free_slot=self._has_free_slot)
                if models is None
                else ModelAdmission(services, client, record, caller, self._demand, self._body, models)
            )
        return self._admission

    async def _is_missed(self, backend: BackendProtocol, info: ResponseInfo, repeats: int) -> bool:
        """Whether an error response means that the model was not loaded any more, so that the request is sent again."""
        admission = self._admission  # there is one if there are several models
        return repeats < _MAX_REPEATS and admission is not None and await admission.is_missed(backend, info)

    def _check_end(self, error: GatewayError, backend: BackendProtocol) -> GatewayError | None:
        """Return None if the backend has missed the request, so that it can be sent again.

        Returns the error if it can be sent again only if the backend has died; else raises it.
        """
        if backend.missed >= self._enough_to_repeat:
            if backend.missed is Missed.IF_ALIVE and self._prepared.route.kind.works:
                self._services.suspects.note_cut()
            return None
        if error.kind is not BACKEND_UNAVAILABLE or not backend.ended or not self._sent or self.record.backend_status:
            raise error
        kind = self._prepared.route.kind
        if kind.works:
            self._services.suspects.note_cut()
        if not kind.works or not kind.repeatable:
            raise error
        return error.with_traceback(None)

    @property
    def _enough_to_repeat(self) -> Missed:
        """How certain it must be that the backend has not read the request."""
        return Missed.IF_ALIVE if self._prepared.route.kind.repeatable else Missed.SURELY

    async def _connect(self, cut: GatewayError | None) -> BackendProtocol | None:
        """Open a connection to the backend; None if it does not accept one now, or may have been started again.

        `cut` is the error by which the last connection ended. It is raised if the backend lives, and so has closed on
        purpose.
        """
        services = self._services
        connect_s = services.upstream_timeouts.connect_s
        try:
            if cut is None:
                backend = await self._client.run(services.pool.connect(), connect_s, BACKEND_UNAVAILABLE)
                if self._admission is None or not self._admission.has_stale_lease:
                    return backend
                services.pool.release(backend, False)
                return None
            # A process that dies may close its connections before its listener, so a connection proves nothing.
            lives = await self._client.run(services.backend_lives(), connect_s, BACKEND_UNAVAILABLE)
        except GatewayError as error:
            if error.kind is not BACKEND_UNAVAILABLE:
                raise
            lives = False
        if cut is not None and lives:
            services.suspects.note_alive()
            self._sent = True
            raise cut
        services.readiness.doubt()
        if services.suspects.active and self._prepared.route.kind.works:  # it may be held back by now
            services.suspects.must_run_alone(self.suspect())
        return None

    async def _pass_in_pieces(self, backend: BackendProtocol, info: ResponseInfo) -> bool:
        """Pass on a response of which more is to come; return whether the connection can carry another request."""
        services, record = self._services, self.record
        if info.status < 200:
            info = await self._skip_interim(backend, info)
        self._begin_response(info, None)
        counter = record.usage_source
        assert not isinstance(counter, bytes)
        collector = PayloadCollector() if self._prepared.route.kind.kept else None
        kind_of_relay = Relay if services.models is None else RouterRelay
        timeouts = services.upstream_timeouts
        relay = self._relay = kind_of_relay(
            self._client, self._response, collector or counter, timeouts, record.asked.answers
        )
        try:
            reusable = await relay.run(backend, info)
        finally:
            self._sent = not relay.complete
            if self._sent and self._prepared.route.generates:
                self._remainder = relay.count_remainder(backend)
        if relay.error is not None and relay.error.kind is BACKEND_UNAVAILABLE:
            if backend.ended:
                services.suspects.note_cut()
            elif services.models is not None:
                services.suspects.note_cut(record.model)
        if relay.error is None:
            record.stage = Stage.DONE
            if collector is not None:
                services.last_responses.keep(self._prepared, info, collector.payload)
        else:
            timed_out = relay.error.kind.code == BACKEND_TIMEOUT.code
            record.outcome = Outcome.TIMED_OUT if timed_out else Outcome.TRUNCATED
        return reusable

    def _begin_response(self, info: ResponseInfo, payload: bytes | None) -> None:
        """The backend has answered: the body is not needed any more, and no heartbeat may come between.

        `payload` is the response's, if it has been received whole.
        """
        services, record, route = self._services, self.record, self._prepared.route
        record.backend_status = info.status
        record.first_byte_s = services.clock()
        if info.has_usage and route.kind.metered:
            record.usage_source = (
                TokenCounter(route.label, record.asked.prompts)
                if payload is None
                else buffer_if_small(route.label, payload, record.asked.prompts)
            )
        elif route.kind.kept and payload is not None:
            services.last_responses.keep(self._prepared, info, payload)
        if payload is None:
            record.stage = Stage.STREAMING
            self._admitted = self._queue.admitted
            self._body.digest()  # it is needed when the body is gone
            self._body.release(keeps_bytes=_KEPT_BYTES)
        if services.lifecycle.draining:
            self._response.keep_alive = False

    async def _skip_interim(self, backend: BackendProtocol, info: ResponseInfo) -> ResponseInfo:
        """Read on to the final response's head; interim ones are not passed on (RFC 9110 section 15.2)."""
        for _ in range(_MAX_INTERIM_RESPONSES):
            if info.status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise GatewayError(BACKEND_MALFORMED, "The backend switched protocols without being asked.")
            request_s = self._services.upstream_timeouts.request_s
            raw = await self._client.wait(backend.expect_head(), request_s, BACKEND_TIMEOUT)
            info = parse_response(raw, self._prepared.method)
            if info.status >= 200:
                return info
        raise GatewayError(BACKEND_MALFORMED, "The backend sent too many interim responses.")

    def _list_models(self, caller: Caller, models: Models) -> bool:
        """Answer a route that lists models from memory, with what the caller's key may use and see.

        Returns False for other routes, and for an operator, who sees the backend's own list.
        """
        if not self._prepared.route.kind.kept or caller.is_operator:
            return False
        if not models.listed:
            raise GatewayError(LOADING, "llama-server has not listed its models yet.")
        self._response.send(200, b"application/json", model_list(models, caller.models))
        self.record.stage = Stage.DONE
        return True

    def _answer_without_backend(self) -> None:
        """Send the last good response of a route that has one. Raises LOADING for the others: none is held."""
        if not self._send_last_response():
            readiness = self._services.readiness
            down = readiness.state == DEAD
            raise GatewayError(LOADING, (readiness.detail or BACKEND_IS_DOWN) if down else "The model is loading.")

    def _send_last_response(self) -> bool:
        """Send the last good response of the request's route; return whether there is one, and it can be sent."""
        kept = self._services.last_responses.find(self._prepared)
        if kept is None or self._response.started:
            return False
        self._response.send(200, kept.content_type, kept.payload, ((b"Age", b"%d" % kept.age_s),))
        self.record.stage = Stage.DONE
        return True

    # --- Heartbeats ---

    def beat(self, now_s: float) -> None:
        """Send a heartbeat if the client has heard nothing for so long that one is due."""
        stage, relay = self.stage, self._relay
        if relay is not None:
            if stage is Stage.STREAMING:
                self._running_heartbeats().between_events(relay, now_s)
        elif stage in (Stage.QUEUED, Stage.AWAITING_RESPONSE) and self._prepared.wants_heartbeats:
            self._running_heartbeats().before_response(now_s)

    def _running_heartbeats(self) -> Heartbeats:
        if self._heartbeats is None:
            assert self._caller is not None  # by its stage it is waiting for the backend
            self._heartbeats = Heartbeats(
                self._client,
                self._response,
                self._body,
                self._admission_of(self._caller),
                self._services.body_scans,
                interval_s=self._services.timeouts.heartbeat_s,
                since_s=self.record.queued_s,
            )
        return self._heartbeats

    # --- The end ---

    def _end_by(self, error: Exception) -> None:
        """End the request as an exception says."""
        if self.record.stage is Stage.QUEUED:  # it has waited, though it was not admitted
            self.record.left_queue_s = self._services.clock()
        if isinstance(error, PeerGone):
            self.cancel()
        elif isinstance(error, GatewayError):
            if error.kind is not BACKEND_UNAVAILABLE or not self._send_last_response():
                self.refuse(error)
        else:
            log.error("request %s failed", self.record.id.decode(), exc_info=error)
            self.refuse(GatewayError(INTERNAL_ERROR))
        error.with_traceback(None)  # its frames hold the error and this request: a cycle

    def refuse(self, error: GatewayError) -> None:
        """Send one of the gateway's own errors. The key's rate counts the request only if the backend worked on it."""
        if self._rate_lines and self._caller is not None and not self._sent:
            lines = self._services.access.refund(self._caller, self.record.started_s)
            self._response.lines = self._response.lines.replace(self._rate_lines, lines)
        if self._client.ended:
            self.cancel()
            return
        if self._caller is None:
            self._client.authenticated = False  # its key is not valid any more
        if isinstance(error, KeyRefused):
            self.record.key_id, self.record.peer = error.key_id, error.address or self.record.peer
        self.record.refusal = error.kind
        self.record.outcome = Outcome.TIMED_OUT if error.kind in _TIMEOUTS else Outcome.REFUSED
        if not error.kind.closes:
            self._skip_body()
        self._response.send_error(self._with_limit(error))

    def _with_limit(self, error: GatewayError) -> GatewayError:
        """Say how long QUEUE_TIMEOUT or REQUEST_TIMEOUT is in the error of a wait that it has ended."""
        services, kind = self._services, error.kind
        if error.message != kind.message:
            return error
        if kind is QUEUE_TIMEOUT:
            return GatewayError(kind, f"No slot became free within {services.timeouts.queue_s:.15g} s (QUEUE_TIMEOUT).")
        if kind is BACKEND_TIMEOUT and self._sent:  # what comes before has limits of its own
            limit = f"{services.upstream_timeouts.request_s:.15g} s (REQUEST_TIMEOUT)"
            bounds = "which bounds the whole generation unless it streams"
            return GatewayError(kind, f"The backend's answer did not begin within {limit}, {bounds}.")
        return error

    def cancel(self) -> None:
        """The client has left: there is nothing to send."""
        self.record.outcome = Outcome.CANCELLED

    def finish(self) -> None:
        """Release what the request holds, and hand its record over."""
        services, client, record, body = self._services, self._client, self.record, self._body
        record.ended_s = services.clock()
        record.bytes_in = body.size
        record.bytes_out = client.sent_bytes
        if self._response.started:
            record.status = self._response.status
        if self._sent:
            self._leave_backend_at_work()
        else:
            if self._admission is not None:
                self._admission.release()
            elif self._has_free_slot:
                services.queue.release_one(record.key_id)
            services.recorder.record(record)
        body.release()
        if services.timeouts.duration_s:
            client.limit_waits(0)

    def _leave_backend_at_work(self) -> None:
        """Release what the request holds once the backend, which was cut short, has stopped working on it.

        It is recorded once it is known what the backend has generated.
        """
        services, record, body, left = self._services, self.record, self._body, self._left
        has_left = record.outcome is Outcome.CANCELLED
        if has_left and self.is_at_work:
            services.suspects.abandon(self.suspect(), record.model)
        streamed = self._response.is_event_stream
        route, members = self._prepared.route, body.members_if_small() if has_left else None
        if record.asked.max_tokens is None and members is not None:
            record.asked = tokens_asked(route, members)
        assert self._caller is not None  # its request was sent
        admission = self._admission_of(self._caller)
        may_stream = route.streams and (members is None or asks_for_stream(members))
        stream = self._follow_stream(admission)
        is_watched = has_left and not streamed and route.generates
        if stream is None and not is_watched:
            _record_left(services, record, admission)
        on_generated = partial(_record_whole, services, record, admission, left) if is_watched else None
        admission.release_unfinished(
            Unfinished(
                left,
                body.size,
                streamed=streamed,
                on_generated=on_generated,
                stream=stream,
                may_stream=may_stream,
            )
        )

    def _follow_stream(self, admission: Admission) -> LeftStream | None:
        """Let a stream whose client has left be recorded once it has ended; None if it is no such stream."""
        remainder, left = self._remainder, self._left
        has_left = self.record.outcome is Outcome.CANCELLED and self._response.is_event_stream
        if remainder is None and not (has_left and left is not None and left.leaving and not left.ended):
            return None
        record, queue, admitted = self.record, self._queue, self._admitted
        on_end = partial(_record_stream, self._services, record, admission)
        stream = LeftStream(
            lambda: self.stream_events or 0,
            on_end,
            record.left_queue_s,
            record.first_byte_s,
            may_be_reused=lambda: queue.admitted != admitted,
        )
        note_end = partial(_note_end, self._services, record, stream)
        if remainder is not None:
            remainder.when_counted(note_end)
        else:
            assert left is not None  # see above
            left.on_end = lambda _: note_end(is_behind=False)
        return stream

    def close(self) -> None:
        """End the connection after the response, unless the response has ended it already."""
        if self.record.outcome is Outcome.CANCELLED:
            self._client.abort()
        elif not self._client.ended:
            self._client.close(unread=self._body.unread, flush_s=self._services.timeouts.flush_s)


def _note_end(services: RequestServices, record: RequestRecord, stream: LeftStream, is_behind: bool) -> None:
    """The rest of a stream whose client has left has been counted."""
    record.left = replace(record.left, is_behind=is_behind, worked_until_s=services.clock())
    stream.note_end()


def _record_left(services: RequestServices, record: RequestRecord, admission: Admission) -> None:
    """Record a request on which the backend was at work when it ended."""
    record.left = replace(record.left, prompt_limit=admission.prompt_limit)
    services.recorder.record(record)


def _record_stream(services: RequestServices, record: RequestRecord, admission: Admission, shown: Shown) -> None:
    """Record a request for a stream whose client has left, once the backend has stopped working on it."""
    record.left = record.left.with_shown(shown)
    _record_left(services, record, admission)


def _record_whole(
    services: RequestServices,
    record: RequestRecord,
    admission: Admission,
    left: BackendProtocol | None,
    generated: Generated,
) -> None:
    """Record a request whose client has left before its answer. `left` is the connection on which it was sent.

    A busy llama-server may not have noticed that, and have sent the whole answer, with its report.
    """
    if left is not None:
        record.left = replace(record.left, worked_until_s=min(left.ended_s, services.clock()))
        reported = fast_tokens(left.late_end) if record.asked.answers == 1 else None
        if reported is not None:
            generated = Generated(reported.completion, reported.prompt, is_exact=True)
    record.left = replace(record.left, generated=generated)
    _record_left(services, record, admission)
