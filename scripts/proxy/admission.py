"""When a request may go to the backend: the model is ready, and slots are free; and what it holds until its end."""

from collections.abc import Callable
from dataclasses import dataclass

from accounting.request_record import RequestRecord, Stage
from auth import Caller
from backend.generation_watch import Generated, GenerationWatch, GivenUp
from backend.left_stream import LeftStream
from backend.readiness import DEAD, READY
from backend.slot_isolation import SlotIsolation, SlotLease
from backend.slots import SlotReclaimer
from core.errors import BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, DRAINING, LOADING, QUEUE_TIMEOUT, GatewayError
from policy.fair_queue import FairQueue, Ticket
from policy.prefix_digests import prefix_digests
from policy.slot_demand import ONE_SLOT, SlotDemand
from policy.suspects import Suspect
from proxy.incoming_body import IncomingBody
from proxy.request_services import RequestServices
from proxy.response_info import ResponseInfo
from transport.backend_protocol import BackendProtocol
from transport.client_protocol import ClientProtocol

BACKEND_IS_DOWN = "The backend is down; it is being restarted."
_MAX_LIMIT = (1 << 31) - 1  # of tokens: llama-server takes another number than a larger one that it is given
_LANE_S = 60.0  # after which the next suspect runs as well; longer than it takes to find the backend hung


def takes_free_slot(services: RequestServices, record: RequestRecord, caller: Caller, demand: SlotDemand) -> bool:
    """Take a slot, until the queue's `release_one`, if one is free and nothing must be waited for.

    Most requests need nothing else: an Admission is made for the others, and for what else may happen to a request.
    """
    if demand is not ONE_SLOT or services.readiness.state != READY or not record.prepared.route.kind.slot:
        return False
    if services.models is not None or services.suspects.active:
        return False
    if not services.queue.try_acquire(caller.key_id, caller.parallel, caller.priority):
        return False
    record.queued_s = record.left_queue_s = services.clock()
    return True


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is left of a request at which the backend, as far as is known, is still at work.

    It may begin as long as `connection` has not ended. `sent_bytes` is the size of the body that it got.
    `on_generated` gets what it is seen to generate; `stream` learns of the slots that its events come from.
    `may_stream`: it may have asked for a stream that had not begun.
    """

    connection: BackendProtocol | None
    sent_bytes: int
    streamed: bool
    on_generated: Callable[[Generated], None] | None
    stream: LeftStream | None
    may_stream: bool = False


class Admission:
    """The admission of one request: a place in the queue, then slots.

    `demand` is how many slots its body asks for.
    """

    _suspect: Suspect  # once there is a lane
    __slots__ = (
        "_caller",
        "_client",
        "_demand",
        "_lane",
        "_lease",
        "_record",
        "_route",
        "_services",
        "_suspect",
        "_ticket",
    )

    def __init__(
        self,
        services: RequestServices,
        client: ClientProtocol,
        record: RequestRecord,
        caller: Caller,
        demand: SlotDemand,
        *,
        has_free_slot: bool = False,
    ) -> None:
        """`has_free_slot`: it has what `takes_free_slot` takes."""
        self._services = services
        self._client = client
        self._record = record
        self._route = record.prepared.route
        self._caller = caller
        self._demand = demand
        self._ticket: Ticket | None = services.queue.ticket(caller.key_id, caller.parallel) if has_free_slot else None
        self._lane: Ticket | None = None  # of a suspect that must run alone
        self._lease: SlotLease | None = None  # with the ticket's slots; only if they are isolated

    # --- The queue ---

    def try_at_once(self) -> bool:
        """Take a slot, or a place in the queue; return whether the request can go on without waiting."""
        kind, is_ready = self._route.kind, self._services.readiness.state == READY
        if self._record.queued_s:  # it was admitted before, but the backend did not accept the connection
            return is_ready
        self._begin()
        if not kind.slot:
            return is_ready and not (kind.bounded and self._waits_for_others())
        self._acquire_slots(self._services.queue)
        return False

    def _begin(self) -> None:
        """Note when the request is ready to go. Raises LOADING if it needs a backend that is down."""
        services = self._services
        if services.readiness.state == DEAD and self._route.kind.slot and not services.readiness.has_news():
            self._refuse_if_dead()
        self._record.queued_s = services.clock()

    def _acquire_slots(self, queue: FairQueue) -> Ticket:
        """Take slots, or a place in the queue for them. Raises QUEUE_FULL."""
        caller, suspects = self._caller, self._services.suspects
        slots, is_batch = self._demand
        parallel = caller.parallel
        if suspects.active and suspects.is_limited(caller.key_id):
            parallel = 1 if is_batch else slots
        ticket = self._ticket = queue.acquire(caller.key_id, parallel, caller.priority, slots, as_one=is_batch)
        return ticket

    def _refuse_if_dead(self) -> None:
        readiness = self._services.readiness
        if readiness.state == DEAD:
            raise GatewayError(LOADING, readiness.detail or BACKEND_IS_DOWN)

    def _waits_for_others(self) -> bool:
        """Take one of the places of the routes without slots, or wait for it; return whether it has to wait."""
        caller = self._caller
        ticket = self._ticket = self._services.cheap_routes.queue.acquire(caller.key_id, None, caller.priority)
        return ticket.waiting is not None

    async def wait(self) -> bool:
        """Wait for the backend to be ready, and for slots.

        Returns False if the backend is not ready, and the route does not wait for that.
        """
        services, ticket = self._services, self._ticket
        if services.readiness.state != READY:
            if self._route.kind.slot:
                await self._until_ready()
            elif not await self._is_ready_by_now():
                return False
        if ticket is not None and ticket.waiting is not None:
            self._begin_waiting()
            await self._client.wait_for(ticket.waiting, services.timeouts.queue_s, QUEUE_TIMEOUT)
        if ticket is not None:
            self._record.left_queue_s = services.clock()
        return True

    async def _is_ready_by_now(self) -> bool:
        """Whether the backend has become ready since the last look at its state: the platform may have said so."""
        services = self._services
        if services.readiness.has_news():
            await self._client.run(services.readiness.catch_up(), services.upstream_timeouts.connect_s, LOADING)
        return services.readiness.state == READY

    async def _until_ready(self) -> None:
        """Wait for the model to load, at most COLD_START_WAIT from the time when the request was ready to go."""
        self._begin_waiting()
        services = self._services
        if services.readiness.state == DEAD and not self._record.left_queue_s:  # there may be news: see try_at_once
            await self._is_ready_by_now()
            self._refuse_if_dead()
        left_s = self._record.queued_s + services.timeouts.cold_start_s - services.clock()
        if left_s <= 0:
            raise GatewayError(LOADING)
        ready = services.readiness.when_ready()
        try:
            await self._client.wait_for(ready, left_s, LOADING)
        finally:
            ready.cancel()  # readiness keeps it for as long as the model loads

    def _begin_waiting(self) -> None:
        self._record.stage = Stage.QUEUED
        if self._services.lifecycle.draining:  # since the request was checked, before its body came
            raise GatewayError(DRAINING)

    def position(self) -> int:
        """Return the place in the queue, in slots, 0 if it waits for something else."""
        ticket = self._ticket
        waits = ticket is not None and ticket.waiting is not None and not ticket.waiting.done()
        return ticket.position() if ticket is not None and waits else 0

    @property
    def slots(self) -> int:
        """How many slots it has, once it is admitted on a route that takes slots."""
        return 1 if self._ticket is None else self._ticket.slots

    @property
    def prompt_limit(self) -> int | None:
        """The most tokens that the request's prompts can have, once the slots have shown how much they hold."""
        context = self._reclaimer().context if self._route.kind.slot else None
        if context is None:
            return None
        return context * (self._record.asked.prompts if self._route.generates else self._demand.slots)

    # --- Suspects run one at a time (see policy.suspects) ---

    async def await_lane(self, suspect: Suspect) -> None:
        """Wait until no other suspect runs, if this is one. Raises REQUEST_HELD_BACK."""
        services = self._services
        if self._lane is not None or not services.suspects.must_run_alone(suspect):
            return
        self._suspect = suspect
        self._lane = services.suspects_lane.acquire(self._record.key_id)
        if self._lane.waiting is None:
            return
        self._begin_waiting()
        try:
            await self._client.wait_for(self._lane.waiting, _LANE_S, QUEUE_TIMEOUT)
        except GatewayError as error:
            if error.kind is not QUEUE_TIMEOUT:
                raise
        self._record.left_queue_s = services.clock()
        services.suspects.must_run_alone(suspect)

    def _leave_lane(self, lane: Ticket) -> None:
        """Let the next suspect run. One that has been answered is none any more."""
        if self._record.stage is Stage.DONE:
            self._services.suspects.clear(self._suspect)
        lane.release()

    # --- A slot in which nothing of another key is (PROMPT_CACHE=private) ---

    async def lease_slot(self, isolation: SlotIsolation, body: IncomingBody) -> None:
        """Get a slot that holds nothing of another key, unless the request has one of the backend's current process."""
        ticket = self._ticket
        assert ticket is not None  # it was admitted
        while self._lease is None or not self._lease.is_valid:
            if self._lease is not None:
                self._lease.release()
            if self._services.readiness.state != READY:
                await self._until_ready()
            digests = prefix_digests(body.pieces) if self._may_be_pinned(body) else None
            self._lease = ticket.lease = isolation.lease(ticket.key_id, digests)
            self._begin_waiting()
            request_s = self._services.upstream_timeouts.request_s
            try:
                await self._client.run(self._lease.acquire(), request_s, BACKEND_TIMEOUT)
            except GatewayError as error:  # the backend has ended while a slot was being emptied
                if error.kind is not BACKEND_UNAVAILABLE or not self._lease.is_outdated:
                    raise
            self._record.left_queue_s = self._services.clock()
            if self._lease.slot is not None:
                body.add("id_slot", self._lease.slot)
                body.add("cache_prompt", True)

    @property
    def has_stale_lease(self) -> bool:
        """Whether the backend may have been started again since it got its slot."""
        return self._lease is not None and not self._lease.is_valid

    def _may_be_pinned(self, body: IncomingBody) -> bool:
        """Whether the backend will obey an `id_slot` that is added to the body."""
        is_object = body.members is not None and body.members.end is not None
        return self._route.pins_slot and self._demand.slots == 1 and is_object

    # --- The end ---

    def release(self) -> None:
        """Leave the queue or the slots: the backend is not at work."""
        if self._lane is not None:
            self._leave_lane(self._lane)
        if self._ticket is not None:
            self._ticket.release()

    def release_unfinished(self, unfinished: Unfinished) -> None:
        """Release the slots once the backend, which was cut short, has stopped working."""
        if self._lane is not None:
            self._leave_lane(self._lane)
        ticket, stream = self._ticket, unfinished.stream
        if ticket is not None and self._route.kind.slot:
            watch = self._watch(ticket, unfinished)
            self._reclaimer().release(
                ticket, streamed=unfinished.streamed, watch=watch, stream=stream, connection=unfinished.connection
            )
            return
        if ticket is not None:
            ticket.release()
        if stream is not None:
            stream.end()

    def _watch(self, ticket: Ticket, unfinished: Unfinished) -> GenerationWatch | None:
        if unfinished.on_generated is None:
            return None
        record, asked = self._record, self._record.asked
        given_up = GivenUp(
            tasks=asked.answers,
            sent_s=record.left_queue_s,
            age_s=record.ended_s - record.left_queue_s,
            prompts=asked.prompts,
            at_once=min(ticket.slots, asked.answers),
            limit=None if asked.max_tokens is None or asked.max_tokens > _MAX_LIMIT else asked.max_tokens,
            slot=None if self._lease is None else self._lease.slot,
            body_bytes=unfinished.sent_bytes,
            key_id=record.key_id,
            may_stream=unfinished.may_stream,
        )
        return GenerationWatch(given_up, unfinished.on_generated)

    def _reclaimer(self) -> SlotReclaimer:
        return self._services.reclaimer

    async def is_missed(self, backend: BackendProtocol, info: ResponseInfo) -> bool:
        """Whether an error response of the backend means that the request must be sent again."""
        return False
