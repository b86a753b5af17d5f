"""How many requests run, who waits and who is next: fair between keys.

One Gate belongs to one event loop and is not thread-safe. It knows no sockets, no timeouts and no roles: whoever
applies bounds its own wait, and releases its ticket exactly when the slot is truly free.

Who is next, when a slot frees:

1. The class (`priority`) that counts highest. A class counts one higher for every AGEING_S seconds in which it had a
   waiter and none of its waiters was admitted, so a lower class is served rarely, but is served. The class ages, not
   the waiter: otherwise the longest backlog would overtake every newcomer of its own class.
2. Within the class, the key that was served longest ago. One that neither runs nor was served since the queue was last
   empty comes before all others; equals take turns in order of arrival. This is round-robin between keys which a key
   cannot cheat by leaving the queue and coming back.
3. Within the key, first come first served. A key at its `parallel` limit is passed over and blocks nobody.

A full queue refuses the newcomer, unless some key has at least two more waiters than the newcomer's key: then the
newest waiter of the longest backlog is refused in its place, so that one key cannot keep the others out of the queue.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable

from errors import QUEUE_FULL, GatewayError

AGEING_S = 30.0
# The OpenAI clients ignore a Retry-After of more than a minute and come back after half a second instead.
MAX_RETRY_AFTER_S = 60
# Weight of the newest interval between two releases: about the last ten count.
SMOOTHING = 0.2


class Ticket:
    """One request's place: in the queue while `waiting` is not done, then in a slot, until `release`.

    `waiting` is None for a request that was admitted at once. Otherwise its result is None once a slot is held, or it
    raises the GatewayError (QUEUE_FULL) that refused the waiter.
    """

    __slots__ = ("_gate", "_lane", "_runs", "key_id", "parallel", "waiting")

    def __init__(self, gate: "Gate", key_id: str, parallel: int | None, runs: bool) -> None:
        self._gate = gate
        self._lane: _Lane | None = None
        self._runs = runs
        self.key_id = key_id
        self.parallel = parallel
        self.waiting: asyncio.Future[None] | None = None

    def position(self) -> int:
        """Return the place in the queue, 1 for the next, at the cost of a walk; 0 once it waits no more.

        An estimate: it knows neither who will leave, nor ageing, nor `parallel`.
        """
        lane = self._lane
        return 0 if lane is None else self._gate._place(self, lane)

    def release(self) -> None:
        """Leave the queue or give the slot back, whichever is held; harmless in any state, any number of times."""
        if self._runs:
            self._runs = False
            self._gate.give(self.key_id)
        elif self._lane is not None:
            self._gate._leave(self, self._lane)
        if self.waiting is not None:
            self.waiting.cancel()  # also of a refusal that nobody will read: asyncio does not log it as lost then


class _Lane:
    """One key's waiters of one class, in order of arrival. The lane with the smallest `turn` is next in its class."""

    __slots__ = ("key_id", "priority", "tickets", "turn")

    def __init__(self, key_id: str, priority: int, turn: int) -> None:
        self.key_id = key_id
        self.priority = priority
        self.turn = turn
        self.tickets: OrderedDict[Ticket, asyncio.Future[None]] = OrderedDict()


class Gate:
    """Slots, and the queue in front of them.

    `slots` is at least 1; `max_waiting` of 0 is no bound; `clock` tells monotonic seconds. `active` and `queued` are
    there to be read at any time.
    """

    def __init__(self, slots: int, max_waiting: int, clock: Callable[[], float], *, ageing_s: float = AGEING_S) -> None:
        self.slots = slots
        self.max_waiting = max_waiting
        self.active = 0
        self.queued = 0
        self.open = True
        self._clock = clock
        self._ageing_s = ageing_s
        self._running: dict[str, int] = {}
        self._lanes: dict[tuple[int, str], _Lane] = {}
        self._class_since_s: dict[int, float] = {}
        self._turn = 0
        self._turns: dict[str, int] = {}
        self._interval_s: float | None = None
        self._marked_s = 0.0

    # Coming and going

    def take(self, key_id: str, parallel: int | None, priority: int) -> bool:
        """Take a slot for one request of a key, until `give`, if one is free for it just now; whether one was."""
        running = self._running.get(key_id, 0)
        if (
            self.active < self.slots
            and self.open
            and (parallel is None or running < parallel)
            and (not self.queued or (priority, key_id) not in self._lanes)
        ):
            self._running[key_id] = running + 1
            self.active += 1
            if self.queued:  # it was served before others, who wait
                self._turn += 1
                self._turns[key_id] = self._turn
            if self.active >= self.slots:
                self._marked_s = self._clock()
            return True
        return False

    def ticket(self, key_id: str, parallel: int | None) -> Ticket:
        """A ticket for a slot that has been taken without one."""
        return Ticket(self, key_id, parallel, True)

    def apply(self, key_id: str, *, parallel: int | None = None, priority: int = 0) -> Ticket:
        """Take a slot, or a place in the queue, for one request of a key.

        `parallel` (at least 1, None for no limit) bounds how many requests of the key run at once. Needs a running loop
        where it has to wait. Raises GatewayError(QUEUE_FULL) with the Retry-After that the recent rate suggests.
        """
        if self.take(key_id, parallel, priority):
            return self.ticket(key_id, parallel)
        if self.max_waiting and self.queued >= self.max_waiting:
            self._make_room(key_id)
        return self._enqueue(Ticket(self, key_id, parallel, False), priority)

    def resize(self, slots: int) -> None:
        """Change the number of slots. More admit waiters at once; fewer interrupt nobody."""
        if slots < 1:
            raise ValueError(f"a gate needs at least one slot, not {slots}")
        self.slots = slots
        self._marked_s = self._clock()
        self._admit()

    def hold(self) -> None:
        """Admit nobody until `resume`; who applies waits."""
        self.open = False

    def resume(self) -> None:
        """Admit again, in fair order. Nobody was passed over meanwhile, so the classes begin to age now."""
        if self.open:
            return
        self.open = True
        self._marked_s = self._clock()
        self._class_since_s = dict.fromkeys(self._class_since_s, self._marked_s)
        self._admit()

    def retry_after_s(self) -> int | None:
        """Return whole seconds in which the queue as it stands should have been served; None where no rate is known."""
        if self._interval_s is None:
            return None
        interval_s = self._interval_s
        if self.active >= self.slots:
            # A backend that has released nothing for long is slower than its average tells.
            interval_s = max(interval_s, self._clock() - self._marked_s)
        return min(max(math.ceil(interval_s * max(self.queued, 1)), 1), MAX_RETRY_AFTER_S)

    # Slots

    def give(self, key_id: str) -> None:
        """Take a slot back, measure the rate where all were taken, and admit who is next."""
        if self.active >= self.slots:
            self._measure()
        self.active -= 1
        running = self._running[key_id] - 1
        if running:
            self._running[key_id] = running
        else:
            del self._running[key_id]
        if self.queued:
            self._admit()

    def _measure(self) -> None:
        now_s = self._clock()
        interval_s = now_s - self._marked_s
        self._marked_s = now_s
        if self._interval_s is None:
            self._interval_s = interval_s
        else:
            self._interval_s += SMOOTHING * (interval_s - self._interval_s)

    def _admit(self) -> None:
        """Fill the free slots from the queue: afterwards no slot is free while somebody might take it."""
        while self.open and self.active < self.slots and self.queued:
            lane = self._next()
            if lane is None:
                return
            ticket, waiting = next(iter(lane.tickets.items()))
            self._forget(ticket, lane)
            # A future that is done was cancelled by whoever waits on it and has not released the ticket yet.
            if not waiting.done():
                self._start(ticket, lane)
                waiting.set_result(None)

    def _start(self, ticket: Ticket, lane: _Lane) -> None:
        now_s = self._clock()
        ticket._runs = True
        self.active += 1
        self._running[lane.key_id] = self._running.get(lane.key_id, 0) + 1
        self._turn += 1
        lane.turn = self._turn
        if self.queued:
            self._turns[lane.key_id] = self._turn
        if lane.priority in self._class_since_s:
            self._class_since_s[lane.priority] = now_s
        self._marked_s = now_s

    # The queue

    def _enqueue(self, ticket: Ticket, priority: int) -> Ticket:
        ticket.waiting = waiting = asyncio.get_running_loop().create_future()
        address = (priority, ticket.key_id)
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = _Lane(ticket.key_id, priority, self._first_turn(ticket.key_id))
            self._class_since_s.setdefault(priority, self._clock())
        lane.tickets[ticket] = waiting
        ticket._lane = lane
        self.queued += 1
        return ticket

    def _first_turn(self, key_id: str) -> int:
        """Return the turn of a key that begins to wait: its last one; else of one that runs now, or of a newcomer."""
        return self._turns.get(key_id, self._turn if key_id in self._running else -1)

    def _next(self) -> _Lane | None:
        """Return the lane to serve; None where every key that waits is at its own limit."""
        now_s = self._clock()
        best: _Lane | None = None
        best_rank = (0.0, 0)
        for lane in self._lanes.values():
            parallel = next(iter(lane.tickets)).parallel
            if parallel is not None and self._running.get(lane.key_id, 0) >= parallel:
                continue
            aged = (now_s - self._class_since_s[lane.priority]) / self._ageing_s
            rank = (lane.priority + aged, -lane.turn)
            if best is None or rank > best_rank:
                best, best_rank = lane, rank
        return best

    def _leave(self, ticket: Ticket, lane: _Lane) -> None:
        """Let a waiter go; one that its key's limit held back may have stood before one that it does not."""
        self._forget(ticket, lane)
        self._admit()

    def _forget(self, ticket: Ticket, lane: _Lane) -> None:
        """Take a waiter out of the queue, and with the last one of a lane, a class, a queue what was kept for it."""
        ticket._lane = None
        del lane.tickets[ticket]
        self.queued -= 1
        if not lane.tickets:
            del self._lanes[lane.priority, lane.key_id]
            if all(other.priority != lane.priority for other in self._lanes.values()):
                del self._class_since_s[lane.priority]
            if not self.queued:
                self._turns.clear()

    def _place(self, ticket: Ticket, lane: _Lane) -> int:
        before = list(lane.tickets).index(ticket)
        place = before + 1
        older = True
        for other in self._lanes.values():
            if other is lane:
                older = False
            elif other.priority > lane.priority:
                place += len(other.tickets)
            elif other.priority == lane.priority:
                goes_first = other.turn < lane.turn or (older and other.turn == lane.turn)
                place += min(len(other.tickets), before + goes_first)
        return place

    # Refusals

    def _make_room(self, key_id: str) -> None:
        """Refuse the newest waiter of the longest backlog where that is fairer than to refuse this key; else raise."""
        full = GatewayError(
            QUEUE_FULL,
            f"The queue is full: {self.queued} requests wait (MAX_QUEUE_SIZE).",
            retry_after_s=self.retry_after_s(),
        )
        backlogs: dict[str, int] = {}
        for lane in self._lanes.values():
            backlogs[lane.key_id] = backlogs.get(lane.key_id, 0) + len(lane.tickets)
        longest = max(backlogs, key=backlogs.__getitem__)
        if backlogs[longest] < backlogs.get(key_id, 0) + 2:
            raise full
        victim = min((lane for lane in self._lanes.values() if lane.key_id == longest), key=lambda lane: lane.priority)
        ticket, waiting = next(reversed(victim.tickets.items()))
        self._forget(ticket, victim)
        if not waiting.done():
            waiting.set_exception(full)
