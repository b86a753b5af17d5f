"""Admission to a limited number of slots, fair between keys.

A FairQueue belongs to one event loop and is not thread-safe. It knows no sockets, timeouts or roles: the caller limits
its own wait, and releases its ticket when the slot is really free.

When a slot becomes free, the next request is chosen in this order:

1. The priority class with the highest effective priority. A class gains one for every AGEING_S seconds in which it had
   waiters and none of them was admitted, so that a lower class is served rarely, but is served. The class ages, not
   the waiter: otherwise the longest backlog would overtake every newcomer of its own class.
2. Within the class, the least recently served key. A key that neither runs nor was served since the queue was last
   empty precedes all others; equal keys take turns in order of arrival. This is round-robin between keys, and a key
   gains nothing by leaving the queue and coming back.
3. Within the key, first come, first served. A key at its `parallel` limit is skipped and delays no other key. So is one
   whose next request cannot fit before its own requests have left.

A request may need several slots. If it is next, the slots that become free are kept for it until they are enough: no
smaller request passes it, except of a key that precedes its own. But one long request in another slot must not keep
them idle: after AGEING_S, requests that fit pass it for as long, then slots are kept for it again, for twice the time,
at most LONGEST_KEPT_S. So a request that fits waits for it no longer than that, and it gets its slots if the others
last no longer than that. Each slot is a turn: a key that took several slots at once lets as many turns pass, less one,
while other keys of its class wait. So in slots, too, the keys get equal shares.

A full queue refuses a new request, unless some key has at least two more waiters than the new request's key: then the
newest waiter of the key with the most waiters is refused instead, so that one key cannot keep others out of the queue.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice, zip_longest
from typing import Protocol

from core.errors import QUEUE_FULL, GatewayError

AGEING_S = 30.0
_MOST_DOUBLINGS = 2
LONGEST_KEPT_S = AGEING_S * (1 << _MOST_DOUBLINGS)
# OpenAI's clients ignore a Retry-After of more than a minute and retry after half a second instead.
MAX_RETRY_AFTER_S = 60
# Weight of the newest interval between two releases in the moving average: about the last ten intervals count.
SMOOTHING = 0.2


class Lease(Protocol):
    """What a request holds besides its slots' number."""

    def release(self) -> None: ...


class Ticket:
    """One request: in the queue while `waiting` is not done, then in its slots, until `release`.

    `waiting` is None if the request was admitted at once. Otherwise it is a future whose result is None once the
    request is admitted, or whose exception is the GatewayError that refused it: QUEUE_FULL, or in a ModelQueue why its
    model cannot be had. `wanted` is how many slots it keeps busy if there are so many, and `slots` how many it
    occupies. `as_one`: it counts as one against `parallel`.
    `lease` is released before the slots are, so that the next request finds it free.
    """

    __slots__ = (
        "_flow",
        "_queue",
        "as_one",
        "hold",
        "key_id",
        "lease",
        "parallel",
        "since_s",
        "slots",
        "waiting",
        "wanted",
    )

    since_s: float  # when it began to wait, if it had to

    def __init__(self, queue: "FairQueue", key_id: str, parallel: int | None, wanted: int, *, as_one: bool) -> None:
        self._queue = queue
        self._flow: Flow | None = None
        self.slots = 0
        self.wanted = wanted
        self.as_one = as_one
        self.key_id = key_id
        self.parallel = parallel
        self.waiting: asyncio.Future[None] | None = None
        self.lease: Lease | None = None
        self.hold: _Hold | None = None

    @property
    def running(self) -> bool:
        """Whether the request occupies slots."""
        return self.slots > 0

    def position(self) -> int:
        """Return the position in the queue, in slots: 1 for the next request, or 0 if it does not wait.

        Takes linear time. This is an estimate: it ignores requests that will leave, ageing and `parallel`.
        """
        flow = self._flow
        return 0 if flow is None else self._queue._position(self, flow)

    def release(self) -> None:
        """Leave the queue or the slots. Has no effect when called again."""
        if self.lease is not None:
            self.lease.release()
        if self.slots:
            slots, self.slots = self.slots, 0
            self._queue.release(self.key_id, slots, 1 if self.as_one else slots)
        elif self._flow is not None:
            self._queue._leave(self, self._flow)
        if self.waiting is not None:
            # Also after a refusal: asyncio then does not log an exception that was never retrieved.
            self.waiting.cancel()


class _Hold:
    """The times in which free slots are kept for a request that needs more of them; in between, others pass it."""

    __slots__ = ("_ends_s", "_keeps", "_longest_s", "_span_s")

    def __init__(self, now_s: float, ageing_s: float) -> None:
        self._keeps = True
        self._span_s = ageing_s
        self._longest_s = ageing_s * (1 << _MOST_DOUBLINGS)
        self._ends_s = now_s + ageing_s

    def keeps(self, now_s: float) -> bool:
        if now_s >= self._ends_s:
            self._keeps = not self._keeps
            if self._keeps:
                self._span_s = min(2 * self._span_s, self._longest_s)
            self._ends_s = now_s + self._span_s
        return self._keeps


class Flow:
    """The waiters of one key in one priority class, in order of arrival.

    In each class the flow with the smallest `last_served` is next.
    """

    __slots__ = ("key_id", "last_served", "priority", "tickets")

    def __init__(self, key_id: str, priority: int, last_served: int) -> None:
        self.key_id = key_id
        self.priority = priority
        self.last_served = last_served
        self.tickets: OrderedDict[Ticket, asyncio.Future[None]] = OrderedDict()


class FairQueue:
    """Slots, and the queue in front of them.

    `slots` is at least 1. `max_waiting` limits the queue; 0 is no limit. `clock` returns monotonic seconds. `active` is
    the number of slots that are occupied, `queued` that of the requests that wait, and `admitted` that of all that have
    had slots. `open` is False while the queue is paused.
    """

    def __init__(self, slots: int, max_waiting: int, clock: Callable[[], float], *, ageing_s: float = AGEING_S) -> None:
        self.slots = slots
        self.max_waiting = max_waiting
        self.active = 0
        self.queued = 0
        self.admitted = 0
        self.open = True
        self._clock = clock
        self._ageing_s = ageing_s
        self._keeps = False  # free slots for the request that is next, which needs more of them
        self._further_slots = 0  # of requests that occupy several, besides the first of each
        self._running: dict[str, int] = {}  # what counts against `parallel`, by key
        self._uncounted: dict[str, int] = {}  # slots besides that batches hold, by key
        self._flows: dict[tuple[int, str], Flow] = {}
        self._class_since_s: dict[int, float] = {}
        self._admissions = 0  # counts up; orders keys by when they were last served
        self._last_served: dict[str, int] = {}
        self._debts: dict[str, int] = {}  # turns that a key lets pass, since it took several slots in one
        self._release_interval_s: float | None = None
        self._interval_start_s = 0.0
        self._last_work_s = clock()

    # --- Admission ---

    def try_acquire(self, key_id: str, parallel: int | None, priority: int) -> bool:
        """Take a slot for one request of a key, until `release`, if one is free now; return whether it was."""
        running = self._running.get(key_id, 0)
        if (
            self.active < self.slots
            and self.open
            and (parallel is None or running < parallel)
            and (not self.queued or not (self._keeps or (priority, key_id) in self._flows))
        ):
            self._running[key_id] = running + 1
            self.active += 1
            self.admitted += 1
            if self.queued:  # it was served before others that wait
                self._admissions += 1
                self._last_served[key_id] = self._admissions
            if self.active >= self.slots:
                self._interval_start_s = self._clock()
            return True
        return False

    def ticket(self, key_id: str, parallel: int | None) -> Ticket:
        """Return a ticket for a slot that was taken by `try_acquire`."""
        ticket = Ticket(self, key_id, parallel, 1, as_one=False)
        ticket.slots = 1
        return ticket

    def acquire(
        self, key_id: str, parallel: int | None = None, priority: int = 0, slots: int = 1, *, as_one: bool = False
    ) -> Ticket:
        """Take slots, or a place in the queue, for one request of a key.

        The request gets `slots` slots, or all if there are fewer. `parallel` (at least 1, None for no limit) limits how
        many slots of the key are occupied at once; with `as_one` the request counts as one. Needs a running event loop
        if the request has to wait. Raises GatewayError(QUEUE_FULL), with a Retry-After that follows from the recent
        service rate.
        """
        if slots == 1 and self.try_acquire(key_id, parallel, priority):
            return self.ticket(key_id, parallel)
        ticket = Ticket(self, key_id, parallel, slots, as_one=as_one)
        if not self.queued and self.open and self._may_run(ticket) and self._fits(ticket):
            self._occupy(ticket)
            return ticket
        if self._is_full():
            self._shed_for_fairness(key_id)
        self._enqueue(ticket, priority)
        if self.active < self.slots:
            self._admit()
        return ticket

    def resize(self, slots: int) -> None:
        """Change the number of slots. More slots admit waiters at once; fewer slots interrupt no running request."""
        if slots < 1:
            raise ValueError(f"a queue needs at least one slot, not {slots}")
        self.slots = slots
        self._interval_start_s = self._clock()
        self._admit()

    def pause(self) -> None:
        """Admit no request until `resume`; new requests wait."""
        self.open = False

    def resume(self) -> None:
        """Admit requests again, in fair order. No class was passed over during the pause, so ageing starts now."""
        if self.open:
            return
        self.open = True
        self._interval_start_s = self._last_work_s = self._clock()
        self._class_since_s = dict.fromkeys(self._class_since_s, self._interval_start_s)
        self._admit()

    def on_tick(self, now_s: float) -> None:
        """Let others pass a request for which slots have been kept long enough: no event says so."""
        if self._keeps:
            self._admit()

    def retry_after_s(self) -> int | None:
        """Return the whole seconds in which the current queue should be served, or None if no rate is known."""
        if self._release_interval_s is None:
            return None
        interval_s = self._release_interval_s
        if self.active >= self.slots or self._keeps:
            # If nothing was released for long, the backend is now slower than its average.
            interval_s = max(interval_s, self._clock() - self._interval_start_s)
        return min(max(math.ceil(interval_s * max(self.queued_slots, 1)), 1), MAX_RETRY_AFTER_S)

    @property
    def queued_slots(self) -> int:
        """How many slots the requests need that wait. Takes linear time."""
        return sum(self._needed(ticket) for flow in self._flows.values() for ticket in flow.tickets)

    def order(self) -> list[tuple[str, int]]:
        """Return the key of each request that waits and how many slots it needs, in the order of their positions."""
        found: list[tuple[str, int]] = []
        for priority in sorted({flow.priority for flow in self._flows.values()}, reverse=True):
            flows = [flow for flow in self._flows.values() if flow.priority == priority]
            flows.sort(key=lambda flow: flow.last_served)
            for turn in zip_longest(*(flow.tickets for flow in flows)):
                found += [(ticket.key_id, self._needed(ticket)) for ticket in turn if ticket is not None]
        return found

    def idle_s(self) -> float:
        """Return the seconds since the last request left or the queue was resumed; 0 while a request runs or waits."""
        return 0.0 if self.active or self.queued else self._clock() - self._last_work_s

    # --- Slots ---

    @property
    def running(self) -> int:
        """How many requests occupy slots."""
        return self.active - self._further_slots

    def release_one(self, key_id: str) -> None:
        """Free the slot that `try_acquire` took, as `release` does. Every request runs this."""
        if self.active >= self.slots or self._keeps:
            self._measure_rate(1)
        self.active = active = self.active - 1
        if not active:
            self._last_work_s = self._clock()
        running = self._running
        if running[key_id] == 1:
            del running[key_id]
        else:
            running[key_id] -= 1
        if self.queued:
            self._admit()

    def release(self, key_id: str, slots: int = 1, counted: int = 1) -> None:
        """Free slots of a key, update the service rate if all slots were taken, and admit the next requests.

        `counted` is what they count against the key's `parallel`.
        """
        if self.active >= self.slots or self._keeps:
            self._measure_rate(slots)
        self.active -= slots
        self._further_slots -= slots - 1
        if slots != counted:
            self._count_no_more(key_id, slots - counted)
        if not self.active:
            self._last_work_s = self._clock()
        running = self._running[key_id] - counted
        if running:
            self._running[key_id] = running
        else:
            del self._running[key_id]
        if self.queued:
            self._admit()

    def _needed(self, ticket: Ticket) -> int:
        """How many slots a request occupies if it is admitted now."""
        return min(ticket.wanted, self.slots)

    def _fits(self, ticket: Ticket) -> bool:
        return self.active + self._needed(ticket) <= self.slots

    def _may_run(self, ticket: Ticket) -> bool:
        """Whether the limit and the other requests of its key let a request run now."""
        needed, running = self._needed(ticket), self._running.get(ticket.key_id, 0)
        if needed > 1 and running + self._uncounted.get(ticket.key_id, 0) + needed > self.slots:
            return False
        return ticket.parallel is None or running + (1 if ticket.as_one else needed) <= ticket.parallel

    def _occupy(self, ticket: Ticket) -> None:
        """Let a request that fits run."""
        key_id, ticket.slots = ticket.key_id, self._needed(ticket)
        self.active += ticket.slots
        self.admitted += 1
        self._further_slots += ticket.slots - 1
        counted = 1 if ticket.as_one else ticket.slots
        self._running[key_id] = self._running.get(key_id, 0) + counted
        if ticket.slots != counted:
            self._uncounted[key_id] = self._uncounted.get(key_id, 0) + ticket.slots - counted
        self._interval_start_s = self._clock()

    def _count_no_more(self, key_id: str, uncounted: int) -> None:
        """A batch has left."""
        left = self._uncounted[key_id] - uncounted
        if left:
            self._uncounted[key_id] = left
        else:
            del self._uncounted[key_id]

    def _measure_rate(self, slots: int) -> None:
        now_s = self._clock()
        interval_s = (now_s - self._interval_start_s) / slots
        self._interval_start_s = now_s
        if self._release_interval_s is None:
            self._release_interval_s = interval_s
        else:
            self._release_interval_s += SMOOTHING * (interval_s - self._release_interval_s)

    def _admit(self) -> None:
        """Fill the free slots from the queue. Afterwards those that are free are kept, or no waiter could take one."""
        self._keeps = False
        only_fitting = False
        while self.open and self.active < self.slots and self.queued:
            flow = self._next(only_fitting=only_fitting)
            if flow is None:
                return
            ticket, waiting = next(iter(flow.tickets.items()))
            # A future that is already done was cancelled by the caller, which has not released its ticket yet.
            if waiting.done():
                self._remove(ticket, flow)
            elif self._lets_pass(flow):
                continue
            elif self._fits(ticket):
                self._remove(ticket, flow)
                self._start(ticket, flow)
                waiting.set_result(None)
            elif self._is_kept_for(ticket):
                self._keeps = True
                return
            else:
                only_fitting = True

    def _is_kept_for(self, ticket: Ticket) -> bool:
        """Whether the free slots, which are too few for a request that is next, are kept for it."""
        now_s = self._clock()
        if ticket.hold is None:
            ticket.hold = _Hold(now_s, self._ageing_s)
        return ticket.hold.keeps(now_s)

    def _lets_pass(self, flow: Flow) -> bool:
        """Take a turn from a key that has had it in advance; return whether it had."""
        debt = self._debts.pop(flow.key_id, 0)
        if debt > 1:
            self._debts[flow.key_id] = debt - 1
        if debt:
            self._admissions += 1
            flow.last_served = self._last_served[flow.key_id] = self._admissions
        return debt > 0

    def _start(self, ticket: Ticket, flow: Flow) -> None:
        self._occupy(ticket)
        self._admissions += 1
        flow.last_served = self._admissions
        if self.queued:
            self._last_served[flow.key_id] = self._admissions
            if ticket.slots > 1:
                self._debts[flow.key_id] = self._debts.get(flow.key_id, 0) + ticket.slots - 1
        if flow.priority in self._class_since_s:
            self._class_since_s[flow.priority] = self._interval_start_s

    # --- The queue ---

    def _is_full(self) -> bool:
        return 0 < self.max_waiting <= self._all_queued()

    def _all_queued(self) -> int:
        """How many requests `max_waiting` limits."""
        return self.queued

    def _all_flows(self) -> "Iterable[Flow]":
        """The flows of these requests."""
        return self._flows.values()

    def _enqueue(self, ticket: Ticket, priority: int) -> Ticket:
        ticket.waiting = waiting = asyncio.get_running_loop().create_future()
        flow_id = (priority, ticket.key_id)
        flow = self._flows.get(flow_id)
        if flow is None:
            flow = self._flows[flow_id] = Flow(ticket.key_id, priority, self._initial_last_served(ticket.key_id))
            self._class_since_s.setdefault(priority, self._clock())
        flow.tickets[ticket] = waiting
        ticket._flow = flow
        ticket.since_s = self._clock()
        self.queued += 1
        return ticket

    def _initial_last_served(self, key_id: str) -> int:
        """Return when a key that begins to wait was last served; now if it runs, -1 if it is new."""
        return self._last_served.get(key_id, self._admissions if key_id in self._running else -1)

    def _next(self, *, only_fitting: bool) -> Flow | None:
        """Return the flow to serve; None if every waiting key is at its own limit, or has nothing that fits."""
        now_s = self._clock()
        best: Flow | None = None
        best_rank = (0.0, 0)
        for flow in self._flows.values():
            ticket = next(iter(flow.tickets))
            if not self._may_run(ticket) or (only_fitting and not self._fits(ticket)):
                continue
            aged = (now_s - self._class_since_s[flow.priority]) / self._ageing_s
            rank = (flow.priority + aged, -flow.last_served)
            if best is None or rank > best_rank:
                best, best_rank = flow, rank
        return best

    def _leave(self, ticket: Ticket, flow: Flow) -> None:
        """Remove a waiter that gives up. If it was delayed by its key's limit, the waiter after it may be admitted."""
        self._remove(ticket, flow)
        self._admit()

    def _remove(self, ticket: Ticket, flow: Flow) -> None:
        """Remove a waiter, and what is stored about its flow, its class and the queue if it was the last one."""
        ticket._flow = None
        del flow.tickets[ticket]
        self.queued -= 1
        self._last_work_s = self._clock()
        if not flow.tickets:
            del self._flows[flow.priority, flow.key_id]
            if all(other.priority != flow.priority for other in self._flows.values()):
                del self._class_since_s[flow.priority]
            if not self.queued:
                self._last_served.clear()
                self._debts.clear()

    def _position(self, ticket: Ticket, flow: Flow) -> int:
        before = list(flow.tickets).index(ticket)
        slots = self._slots_of(flow, before)
        older = True
        for other in self._flows.values():
            if other is flow:
                older = False
            elif other.priority > flow.priority:
                slots += self._slots_of(other, len(other.tickets))
            elif other.priority == flow.priority:
                goes_first = other.last_served < flow.last_served or (older and other.last_served == flow.last_served)
                slots += self._slots_of(other, before + goes_first)
        return slots + 1

    def _slots_of(self, flow: Flow, count: int) -> int:
        """How many slots the first `count` waiters of a flow need."""
        return sum(self._needed(ticket) for ticket in islice(flow.tickets, count))

    # --- Refusals ---

    def _shed_for_fairness(self, key_id: str) -> None:
        """Refuse the newest waiter of the key with the most waiters if that is fairer, else raise QUEUE_FULL."""
        queued = self._all_queued()
        error = GatewayError(
            QUEUE_FULL,
            f"The queue is full: {queued} {'request waits' if queued == 1 else 'requests wait'} (MAX_QUEUE_SIZE).",
            retry_after_s=self.retry_after_s(),
        )
        waiters: dict[str, int] = {}
        for flow in self._all_flows():
            waiters[flow.key_id] = waiters.get(flow.key_id, 0) + len(flow.tickets)
        longest = max(waiters, key=waiters.__getitem__)
        if waiters[longest] < waiters.get(key_id, 0) + 2:
            raise error
        victim = min((flow for flow in self._all_flows() if flow.key_id == longest), key=lambda flow: flow.priority)
        ticket, waiting = next(reversed(victim.tickets.items()))
        ticket._queue._remove(ticket, victim)
        if not waiting.done():
            waiting.set_exception(error)
