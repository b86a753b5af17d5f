"""The queues in front of several models: one for each, as fair as a FairQueue, with limits that they share.

A model's slots are its own. What a key may have at once (`parallel`), and how many requests may wait, is counted over
all models.
"""

from collections.abc import Callable, Iterable
from itertools import chain

from core.errors import GatewayError
from policy.fair_queue import AGEING_S, FairQueue, Flow, Ticket


class SharedLimits:
    """What the queues of all models share. `max_waiting` limits how many requests wait in all of them; 0 is no limit.

    `on_change` is called if a request has begun or ceased to wait, or has left its slots.
    """

    def __init__(self, max_waiting: int, on_change: Callable[[], None] = lambda: None) -> None:
        self.max_waiting = max_waiting
        self.on_change = on_change
        self.queues: list[ModelQueue] = []
        self._running: dict[str, int] = {}  # what counts against `parallel`, by key

    def running(self, key_id: str) -> int:
        """Return how many requests of a key run, as they count against its `parallel`."""
        return self._running.get(key_id, 0)

    def count(self, key_id: str, number: int) -> None:
        """Count requests of a key that begin to run, or uncount those that end."""
        running = self._running.get(key_id, 0) + number
        if running:
            self._running[key_id] = running
        else:
            del self._running[key_id]

    @property
    def queued(self) -> int:
        return sum(queue.queued for queue in self.queues)


class ModelQueue(FairQueue):
    """The queue of one model. It is paused while the model is not loaded, and before it is unloaded for another."""

    def __init__(self, limits: SharedLimits, clock: Callable[[], float], *, ageing_s: float = AGEING_S) -> None:
        super().__init__(1, limits.max_waiting, clock, ageing_s=ageing_s)
        self._limits = limits
        limits.queues.append(self)
        self.pause()

    def try_acquire(self, key_id: str, parallel: int | None, priority: int) -> bool:
        if parallel is not None and self._limits.running(key_id) >= parallel:
            return False
        if not super().try_acquire(key_id, parallel, priority):
            return False
        self._limits.count(key_id, 1)
        return True

    def release_one(self, key_id: str) -> None:
        self.release(key_id)

    def release(self, key_id: str, slots: int = 1, counted: int = 1) -> None:
        limits = self._limits
        limits.count(key_id, -counted)
        super().release(key_id, slots, counted)
        for queue in limits.queues:  # where the key may have been at its limit
            if queue is not self and queue.queued:
                queue.admit()
        limits.on_change()

    @property
    def last_work_s(self) -> float:
        """When the last request left, or the queue was resumed."""
        return self._last_work_s

    def admit(self) -> None:
        """Admit what may run by now."""
        self._admit()

    def oldest_s(self, priority_s: float = 0.0) -> float | None:
        """Return since when the first request waits that its key's limits let run; None if there is none.

        Each priority counts as `priority_s` seconds more.
        """
        waits = []
        for flow in self._flows.values():
            ticket = next(iter(flow.tickets))
            if self._may_run(ticket):
                waits.append(ticket.since_s - flow.priority * priority_s)
        return min(waits, default=None)

    def refuse_all(self, error: Callable[[], GatewayError]) -> None:
        """Refuse all requests that wait, each with an error of its own."""
        for flow in tuple(self._flows.values()):
            for ticket, waiting in tuple(flow.tickets.items()):
                self._remove(ticket, flow)
                if not waiting.done():
                    waiting.set_exception(error())

    def _may_run(self, ticket: Ticket) -> bool:
        if not super()._may_run(ticket):
            return False
        needed = 1 if ticket.as_one else self._needed(ticket)
        return ticket.parallel is None or self._limits.running(ticket.key_id) + needed <= ticket.parallel

    def _occupy(self, ticket: Ticket) -> None:
        super()._occupy(ticket)
        self._limits.count(ticket.key_id, 1 if ticket.as_one else ticket.slots)

    def _all_queued(self) -> int:
        return self._limits.queued

    def _all_flows(self) -> Iterable[Flow]:
        return chain.from_iterable(queue._flows.values() for queue in self._limits.queues)

    def _enqueue(self, ticket: Ticket, priority: int) -> Ticket:
        super()._enqueue(ticket, priority)
        self._limits.on_change()
        return ticket

    def _leave(self, ticket: Ticket, flow: Flow) -> None:
        super()._leave(ticket, flow)
        self._limits.on_change()
