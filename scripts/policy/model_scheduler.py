"""Which models are loaded, if not all fit at once: decided from clocks and queues alone, without any I/O.

A request for a model that is loaded runs at once. Requests for others wait, and a model is loaded for them:

1. at once if there is room;
2. else in place of a model that has nothing to do: of several the one that was used least recently. A model that has
   just ended its last request is kept for a moment, a fraction of the time that a load takes, because the next request
   of the same client is mostly on its way;
3. else once they have waited for `switch_after_s`. Then the model whose turn has lasted longest gets no new requests,
   ends those that run, and is replaced. So bursts are served in batches, and no request waits for ever. While several
   models wait, each turn lasts at least its part of `switch_after_s`.

Of the models that wait the one comes first whose first request has waited longest; a priority counts as AGEING_S
seconds. For a model that had its turn, the wait begins with the end of that turn. A model with a request at work is
never unloaded.

A load that fails is reported to the requests that wait for that model, and to those that come within a pause, which
doubles with each failure. A model that ends by itself is loaded again for the requests that wait, after such a pause.
"""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from math import inf
from typing import NamedTuple

from core.errors import MODEL_LOAD_FAILED, MODEL_NOT_FOUND, GatewayError
from policy.fair_queue import AGEING_S
from policy.model_queue import ModelQueue, SharedLimits

_KEPT_SHARE = 0.1  # of the time of a load: for so long a model without requests is kept, though others wait
_KEPT_S = (0.1, 2.0)  # its bounds
_PAUSE_S = 2.0  # after a failure
_MAX_PAUSE_S = 60.0
_STABLE_S = 60.0  # a model that was loaded for so long has not failed


class LoadState(str, Enum):
    """The state of a model, as clients see it too."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


class Order(NamedTuple):
    """What the backend must do: load or unload a model."""

    model: "Model"
    load: bool


class Visit:
    """A request that needs a model to be loaded, but no slot. `waiting` is None if it is loaded already."""

    __slots__ = ("_model", "since_s", "waiting")

    def __init__(self, model: "Model", since_s: float) -> None:
        self._model: Model | None = model
        self.since_s = since_s
        self.waiting: asyncio.Future[None] | None = None

    def refuse(self, error: GatewayError) -> None:
        """End the wait with an error. The model does not know it any more."""
        self._model = None
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(error)

    def release(self) -> None:
        """The request has ended, or waits no longer. Has no effect when called again."""
        model, self._model = self._model, None
        if model is not None:
            model.end_visit(self)
        if self.waiting is not None:
            self.waiting.cancel()


class Model:
    """One model: its state, its queue, and the requests that need it without a slot."""

    def __init__(self, name: str, limits: SharedLimits, clock: Callable[[], float]) -> None:
        self.name = name
        self.queue = ModelQueue(limits, clock)
        self.state = LoadState.UNLOADED
        self.is_ending = False  # it gets no new requests, because another model will take its place
        self.visits = 0  # requests at work without a slot
        self.waiting_visits: list[Visit] = []
        self.since_s = clock()  # when its state last changed
        self.used_s = clock()  # when its last visit ended, or it was loaded
        self.load_s = 0.0  # how long its last load took
        self.turn_ended_s = -inf
        self.failures = 0  # in a row
        self.failure = ""  # why the last load failed
        self.paused_until_s = -inf
        self._limits = limits
        self._clock = clock

    @property
    def is_open(self) -> bool:
        """Whether requests for it run without waiting for it."""
        return self.queue.open

    @property
    def is_at_work(self) -> bool:
        return self.queue.active > 0 or self.visits > 0

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return self.queue.queued + len(self.waiting_visits)

    def visit(self) -> Visit:
        """Let a request without a slot use the model as soon as it is loaded. Raises MODEL_LOAD_FAILED."""
        self.check()
        visit = Visit(self, self._clock())
        if self.is_open:
            self.visits += 1
        else:
            visit.waiting = asyncio.get_running_loop().create_future()
            self.waiting_visits.append(visit)
            self._limits.on_change()
        return visit

    def check(self) -> None:
        """Raise MODEL_LOAD_FAILED if the last load has failed, and it is too early for another one."""
        if self.failure and self._clock() < self.paused_until_s:
            raise self.error()

    def error(self) -> GatewayError:
        retry_after_s = max(1, round(self.paused_until_s - self._clock()))
        return GatewayError(MODEL_LOAD_FAILED, self.failure, retry_after_s=retry_after_s)

    def end_visit(self, visit: Visit) -> None:
        if visit in self.waiting_visits:
            self.waiting_visits.remove(visit)
        else:
            self.visits -= 1
            self.used_s = self._clock()
        self._limits.on_change()

    def wanted_since_s(self, priority_s: float = 0.0) -> float | None:
        """Return since when the first request waits, that may run if the model is loaded; None if there is none."""
        waits = [visit.since_s for visit in self.waiting_visits]
        oldest_s = self.queue.oldest_s(priority_s)
        if oldest_s is not None:
            waits.append(oldest_s)
        return max(min(waits), self.turn_ended_s) if waits else None

    def idle_since_s(self) -> float:
        """Return when the last request ended, of a model that is not at work."""
        return max(self.used_s, self.queue.last_work_s)

    # --- Its state ---

    def set_state(self, state: LoadState) -> None:
        self.state, self.since_s = state, self._clock()

    def open(self, slots: int) -> None:
        """It is loaded, with so many slots: let requests run."""
        self.set_state(LoadState.LOADED)
        self.used_s = self.since_s
        self.queue.resize(slots)
        self.reopen()

    def reopen(self) -> None:
        """Let requests run."""
        self.is_ending = False
        self.queue.resume()
        waiting, self.waiting_visits = self.waiting_visits, []
        for visit in waiting:
            self.visits += 1
            assert visit.waiting is not None
            if not visit.waiting.done():
                visit.waiting.set_result(None)

    def close(self) -> None:
        """Let no more requests run."""
        self.queue.pause()

    def refuse_all(self, error: Callable[[], GatewayError]) -> None:
        """Refuse all requests that wait."""
        self.queue.refuse_all(error)
        waiting, self.waiting_visits = self.waiting_visits, []
        for visit in waiting:
            visit.refuse(error())

    def note_failure(self, reason: str) -> None:
        self.failures += 1
        pause_s = min(_PAUSE_S * 2 ** (self.failures - 1), _MAX_PAUSE_S)
        self.failure, self.paused_until_s = reason, self._clock() + pause_s


class ModelScheduler:
    """Decides what is loaded and unloaded. `models` has every model by its name.

    `next_s` is when `orders` must be called again, besides after each change.
    """

    def __init__(
        self,
        limits: SharedLimits,
        clock: Callable[[], float],
        *,
        max_loaded: int,
        switch_after_s: float,
        idle_unload_s: float = 0.0,
        max_load_s: float = inf,
    ) -> None:
        """max_loaded 0 is no limit, idle_unload_s 0: never for that reason. `max_load_s` bounds a load."""
        self.models: dict[str, Model] = {}
        self.next_s = inf
        self._limits = limits
        self._clock = clock
        self._max_loaded = max_loaded or inf
        self._switch_after_s = switch_after_s
        self._idle_unload_s = idle_unload_s
        self._max_load_s = max_load_s or inf

    # --- What is known of the backend ---

    def add(self, name: str) -> Model:
        """Add a model that the backend has."""
        model = self.models[name] = Model(name, self._limits, self._clock)
        return model

    def remove(self, name: str) -> None:
        """Remove a model that the backend does not have any more. What waits for it is refused."""
        model = self.models.pop(name)
        model.close()
        model.refuse_all(lambda: GatewayError(MODEL_NOT_FOUND, f"The model {name} has been removed."))
        self._limits.queues.remove(model.queue)

    def loading(self, model: Model) -> None:
        """A model has begun to load."""
        if model.state is not LoadState.LOADING:
            self._end_turn(model)
            model.set_state(LoadState.LOADING)

    def loaded(self, model: Model, slots: int) -> None:
        """A model is loaded, and has so many slots."""
        if model.state is LoadState.LOADING:
            model.load_s = self._clock() - model.since_s
        model.failure = ""
        model.open(slots)

    def ended(self, model: Model, reason: str = "") -> None:
        """A model is not loaded any more. `reason` says why, if that was not ordered; it is empty if it was."""
        was = model.state
        self._end_turn(model)
        model.set_state(LoadState.UNLOADED)
        if not reason:
            return
        model.note_failure(reason)
        if was is LoadState.LOADING:
            model.refuse_all(model.error)
        else:  # it was loaded before, so it can be loaded again
            model.failure = ""

    def failed(self, model: Model, reason: str) -> None:
        """A load has failed, or was not begun: tell it to the requests that wait for the model."""
        self.loading(model)
        self.ended(model, reason)

    def postpone(self, model: Model, pause_s: float) -> None:
        """A load was not begun, for a reason that will pass: the requests that wait go on waiting."""
        self.ended(model)
        model.paused_until_s = self._clock() + pause_s

    def _end_turn(self, model: Model) -> None:
        now_s = self._clock()
        if model.is_open or model.is_ending:
            model.turn_ended_s = now_s
        if model.state is LoadState.LOADED and now_s - model.since_s >= _STABLE_S:
            model.failures = 0
        model.is_ending = False
        model.close()

    # --- Decisions ---

    def orders(self) -> list[Order]:
        """Return what must be done now. The state of each model follows its order at once."""
        now_s = self._clock()
        self.next_s = inf
        orders = [*self._end_overdue(now_s), *self._find_places(now_s)]
        if self._idle_unload_s:
            orders += self._unload_idle(now_s)
        return orders

    def _look_at(self, time_s: float) -> None:
        self.next_s = min(self.next_s, time_s)

    def _in(self, *states: LoadState) -> list[Model]:
        return [model for model in self.models.values() if model.state in states]

    def _end_overdue(self, now_s: float) -> Iterable[Order]:
        """Give up loads that take too long."""
        for model in self._in(LoadState.LOADING):
            if now_s >= model.since_s + self._max_load_s:
                self.failed(model, f"The model {model.name} was not loaded within COLD_START_WAIT.")
                yield self._unload(model)
            else:
                self._look_at(model.since_s + self._max_load_s)

    def _find_places(self, now_s: float) -> Iterable[Order]:
        wanted = self._wanted(now_s)
        held = self._in(LoadState.LOADING, LoadState.LOADED, LoadState.UNLOADING)
        free = self._max_loaded - len(held)
        coming = sum(model.state is LoadState.UNLOADING for model in held)
        ending = [model for model in held if model.is_ending]
        for model in wanted:
            if free > 0:
                free -= 1
                model.set_state(LoadState.LOADING)
                yield Order(model, load=True)
            elif coming > 0:
                coming -= 1
            elif ending:
                victim = ending.pop(0)
                if not victim.is_at_work:
                    yield self._unload(victim)
            else:
                victim_now = self._victim(model, len(wanted), now_s)
                if victim_now is not None:
                    yield self._unload(victim_now)
        for model in ending:  # nothing waits for their places any more
            model.reopen()

    def _wanted(self, now_s: float) -> list[Model]:
        """Return the models that must be loaded, the one that comes first first."""
        wanted = []
        for model in self._in(LoadState.UNLOADED):
            since_s = model.wanted_since_s(AGEING_S)
            if since_s is None:
                continue
            if now_s < model.paused_until_s:
                self._look_at(model.paused_until_s)
            else:
                wanted.append((since_s, model.name, model))
        return [model for _, _, model in sorted(wanted, key=lambda entry: entry[:2])]

    def _victim(self, wanted: Model, waiting: int, now_s: float) -> Model | None:
        """Return the model that is unloaded now for another one; None if there is none yet.

        One that is at work is closed, if the other has waited for long, and unloaded later.
        """
        since_s = wanted.wanted_since_s()
        assert since_s is not None
        is_urgent = now_s >= since_s + self._switch_after_s
        loaded = [model for model in self._in(LoadState.LOADED) if not model.is_ending]
        idle = [model for model in loaded if not model.is_at_work]
        for model in sorted(idle, key=Model.idle_since_s):
            kept_until_s = model.idle_since_s() + _kept_s(model)
            if is_urgent or now_s >= kept_until_s:
                return model
            self._look_at(kept_until_s)
        if not is_urgent:
            self._look_at(since_s + self._switch_after_s)
            return None
        for model in sorted(loaded, key=lambda model: model.since_s):
            turn_ends_s = model.since_s + self._switch_after_s / waiting
            if now_s >= turn_ends_s:
                model.close()
                model.is_ending = True
                return None
            self._look_at(turn_ends_s)
        return None

    def _unload_idle(self, now_s: float) -> Iterable[Order]:
        for model in self._in(LoadState.LOADED):
            if model.is_at_work:
                continue
            idle_until_s = model.idle_since_s() + self._idle_unload_s
            if now_s >= idle_until_s:
                yield self._unload(model)
            else:
                self._look_at(idle_until_s)

    def _unload(self, model: Model) -> Order:
        self._end_turn(model)
        model.set_state(LoadState.UNLOADING)
        return Order(model, load=False)


def _kept_s(model: Model) -> float:
    """Return for how long a model without requests is kept, though others wait."""
    least_s, most_s = _KEPT_S
    return min(max(model.load_s * _KEPT_SHARE, least_s), most_s)


class QueueTotals:
    """The numbers of all models' queues, as one queue has them. A request without a slot counts as one that waits.

    `slots` are those of the models that are loaded.
    """

    def __init__(self, scheduler: ModelScheduler, clock: Callable[[], float]) -> None:
        self._models = scheduler.models
        self._clock = clock
        self._began_s = clock()

    @property
    def slots(self) -> int:
        return sum(model.queue.slots for model in self._models.values() if model.is_open)

    @property
    def active(self) -> int:
        return sum(model.queue.active for model in self._models.values())

    @property
    def running(self) -> int:
        return sum(model.queue.running for model in self._models.values())

    @property
    def queued(self) -> int:
        return sum(model.queued for model in self._models.values())

    @property
    def queued_slots(self) -> int:
        return sum(model.queue.queued_slots + len(model.waiting_visits) for model in self._models.values())

    def order(self) -> list[tuple[str, int]]:
        """Return the key and the slots of each request that waits, model by model, as FairQueue does for one."""
        return [waiting for model in self._models.values() for waiting in model.queue.order()]

    def idle_s(self) -> float:
        """Return the seconds since the last request left; 0 while one runs or waits."""
        if any(model.is_at_work or model.queued for model in self._models.values()):
            return 0.0
        return self._clock() - max([self._began_s, *(model.idle_since_s() for model in self._models.values())])
