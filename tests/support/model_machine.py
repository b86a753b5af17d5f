"""A machine on which not all models fit, on a fake clock: it does what a ModelScheduler orders, and serves requests."""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from math import inf

from core.errors import GatewayError
from policy.fair_queue import Ticket
from policy.model_queue import SharedLimits
from policy.model_scheduler import ModelScheduler, Order
from support.clock import Clock


@dataclass
class Job:
    """One request. Times are seconds of the clock, infinite for what has not happened."""

    model: str
    key: str
    work_s: float
    arrived_s: float
    parallel: int | None = None
    priority: int = 0
    ticket: Ticket | None = None
    started_s: float = inf
    ended_s: float = inf
    error: GatewayError | None = None


@dataclass
class ModelMachine:
    """Loads take `load_s`, unloading takes `unload_s`; each model has `slots`.

    `loads` has the models in the order in which they were loaded. `failing` are those whose loads fail.
    """

    names: tuple[str, ...]
    max_loaded: int = 1
    switch_after_s: float = 30.0
    slots: int = 2
    load_s: float = 4.0
    unload_s: float = 0.5
    idle_unload_s: float = 0.0
    max_load_s: float = 300.0
    max_waiting: int = 0
    clock: Clock = field(default_factory=Clock)
    failing: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limits = SharedLimits(self.max_waiting)
        self.scheduler = ModelScheduler(
            self.limits,
            self.clock,
            max_loaded=self.max_loaded,
            switch_after_s=self.switch_after_s,
            idle_unload_s=self.idle_unload_s,
            max_load_s=self.max_load_s,
        )
        for name in self.names:
            self.scheduler.add(name)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()

    @property
    def swaps(self) -> int:
        """How often a model was loaded in place of another one."""
        return max(0, len(self.loads) - self.max_loaded)

    @property
    def served(self) -> Counter[str]:
        return Counter(job.key for job in self.jobs if job.ended_s < inf)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Let something happen at a time, in seconds from the clock's beginning."""
        heapq.heappush(self._events, (time_s, next(self._serials), action))

    def send(self, model: str, key: str = "alice", work_s: float = 1.0, **limits: int) -> Job:
        """Send a request now."""
        job = Job(model, key, work_s, self.clock(), **limits)
        self.jobs.append(job)
        one = self.scheduler.models[model]
        try:
            one.check()
            job.ticket = one.queue.acquire(key, job.parallel, job.priority)
        except GatewayError as error:
            job.error = error
        self.settle()
        return job

    def settle(self) -> None:
        """Start what was admitted, and do what is ordered."""
        while True:
            orders = self.scheduler.orders()
            for order in orders:
                self._obey(order)
            self._start()
            held = [model for model in self.scheduler.models.values() if model.state != "unloaded"]
            assert len(held) <= (self.max_loaded or inf)
            if not orders:
                return

    def _start(self) -> None:
        for job in self.jobs:
            ticket = job.ticket
            if ticket is None or job.started_s < inf or job.error is not None:
                continue
            if ticket.waiting is not None and ticket.waiting.done() and not ticket.waiting.cancelled():
                error = ticket.waiting.exception()
                if isinstance(error, GatewayError):
                    job.error = error
                    continue
            if ticket.running:
                assert self.scheduler.models[job.model].state == "loaded"
                job.started_s = self.clock()
                self.at(self.clock() + job.work_s, lambda job=job: self.end(job))  # type: ignore[misc]

    def end(self, job: Job) -> None:
        """A request ends, or its client leaves."""
        assert job.ticket is not None
        if job.started_s < inf:
            job.ended_s = self.clock()
        job.ticket.release()

    def _obey(self, order: Order) -> None:
        model = order.model
        if order.load:
            self.loads.append(model.name)
            if model.name in self.failing:
                self.at(self.clock() + self.load_s, lambda: self.scheduler.failed(model, "exit status 1"))
            elif model.name not in self.hanging:
                self.at(self.clock() + self.load_s, lambda: self.scheduler.loaded(model, self.slots))
        else:
            assert not model.is_at_work, "a model at work must never be unloaded"
            self.at(self.clock() + self.unload_s, lambda: self.scheduler.ended(model))

    def run(self, until_s: float = inf) -> None:
        """Let time pass until nothing more would happen, or until `until_s`."""
        self.settle()
        while True:
            event_s = self._events[0][0] if self._events else inf
            next_s = min(event_s, self.scheduler.next_s)
            if next_s > until_s or next_s == inf:
                break
            self.clock.now_s = max(self.clock.now_s, next_s)
            if event_s <= next_s:
                heapq.heappop(self._events)[2]()
            self.settle()
        if until_s < inf:
            self.clock.now_s = until_s
            self.settle()
