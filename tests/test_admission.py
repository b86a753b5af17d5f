"""Who runs, who waits, who is next: each rule by itself, then random operations against a slow and obvious model."""

import asyncio
import gc
import heapq
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from admission import AGEING_S, MAX_RETRY_AFTER_S, Gate, Ticket
from errors import QUEUE_FULL, GatewayError


class Clock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def admitted(ticket: Ticket) -> bool:
    waiting = ticket.waiting
    return waiting is None or (waiting.done() and not waiting.cancelled() and waiting.exception() is None)


def refusal(ticket: Ticket) -> GatewayError:
    assert ticket.waiting is not None
    error = ticket.waiting.exception()
    assert isinstance(error, GatewayError)
    return error


def serve(gate: Gate, running: Ticket, waiters: dict[str, Ticket]) -> list[str]:
    """Release what runs, one after the other, and return the names of the waiters in the order they were served."""
    order: list[str] = []
    while True:
        running.release()
        fresh = [name for name, ticket in waiters.items() if name not in order and admitted(ticket)]
        if not fresh:
            return order
        assert len(fresh) == 1
        order += fresh
        running = waiters[fresh[0]]


# Coming and going


def test_a_free_slot_is_taken_at_once_without_a_future_and_without_a_loop() -> None:
    gate = Gate(2, 0, Clock())
    first, second = gate.apply("a"), gate.apply("b")
    assert (first.waiting, second.waiting) == (None, None)
    assert (gate.active, gate.queued, first.position()) == (2, 0, 0)
    first.release()
    first.release()
    assert gate.active == 1
    second.release()
    assert gate.active == 0


@in_loop
async def test_a_waiter_gets_the_slot_that_is_released() -> None:
    gate = Gate(1, 0, Clock())
    running, waiter = gate.apply("a"), gate.apply("a")
    assert waiter.waiting is not None
    assert not waiter.waiting.done()
    assert (gate.active, gate.queued, waiter.position()) == (1, 1, 1)
    running.release()
    await waiter.waiting
    assert (gate.active, gate.queued, waiter.position()) == (1, 0, 0)
    waiter.release()
    waiter.release()
    assert (gate.active, gate.queued) == (0, 0)


@in_loop
async def test_pitfall_17_a_waiter_that_leaves_goes_at_once() -> None:
    gate = Gate(1, 0, Clock())
    running, leaver, stayer = gate.apply("a"), gate.apply("a"), gate.apply("a")
    leaver.release()
    assert leaver.waiting is not None
    assert leaver.waiting.cancelled()
    assert (gate.queued, stayer.position()) == (1, 1)
    leaver.release()
    running.release()
    assert admitted(stayer)
    assert gate.active == 1


@in_loop
async def test_a_waiter_cancelled_but_not_yet_released_takes_no_slot() -> None:
    gate = Gate(1, 0, Clock())
    running, leaver, stayer = gate.apply("a"), gate.apply("a"), gate.apply("a")
    assert leaver.waiting is not None
    leaver.waiting.cancel()
    running.release()
    assert admitted(stayer)
    leaver.release()
    assert (gate.active, gate.queued) == (1, 0)


@in_loop
async def test_a_task_cancelled_between_admission_and_its_wake_up_gives_the_slot_back() -> None:
    gate = Gate(1, 0, Clock())
    running, waiter = gate.apply("a"), gate.apply("a")

    async def wait() -> None:
        try:
            assert waiter.waiting is not None
            await waiter.waiting
        finally:
            waiter.release()

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    running.release()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (gate.active, gate.queued) == (0, 0)


# The bounds of the queue


@in_loop
async def test_a_full_queue_refuses_and_names_the_setting() -> None:
    gate = Gate(1, 2, Clock())
    tickets = [gate.apply("a") for _ in range(3)]
    with pytest.raises(GatewayError, match=r"2 requests wait \(MAX_QUEUE_SIZE\)") as caught:
        gate.apply("a")
    assert caught.value.kind is QUEUE_FULL
    assert caught.value.retry_after_s == QUEUE_FULL.retry_after_s
    tickets[2].release()
    assert not admitted(gate.apply("a"))


@in_loop
async def test_a_queue_of_size_0_has_no_bound() -> None:
    gate = Gate(1, 0, Clock())
    tickets = [gate.apply("a") for _ in range(1001)]
    assert gate.queued == 1000
    assert tickets[-1].position() == 1000


@in_loop
async def test_one_key_cannot_keep_the_others_out_of_a_full_queue() -> None:
    gate = Gate(1, 3, Clock())
    running = gate.apply("a")
    waiters = {f"a{n}": gate.apply("a") for n in range(3)}
    waiters["b"] = gate.apply("b")
    error = refusal(waiters.pop("a2"))
    assert error.kind is QUEUE_FULL
    assert gate.queued == 3
    with pytest.raises(GatewayError):
        gate.apply("b")
    assert serve(gate, running, waiters) == ["b", "a0", "a1"]


@in_loop
async def test_the_newest_of_the_lowest_class_makes_room() -> None:
    gate = Gate(1, 3, Clock())
    gate.apply("a")
    high, low, newer = gate.apply("a", priority=1), gate.apply("a", priority=-1), gate.apply("a", priority=1)
    gate.apply("b", priority=-5)
    assert refusal(low).kind is QUEUE_FULL
    assert not any(ticket.waiting is None or ticket.waiting.done() for ticket in (high, newer))


@in_loop
async def test_a_waiter_that_was_cancelled_may_make_room_too() -> None:
    gate = Gate(1, 2, Clock())
    gate.apply("a")
    gate.apply("a")
    cancelled = gate.apply("a")
    assert cancelled.waiting is not None
    cancelled.waiting.cancel()
    gate.apply("b")
    cancelled.release()
    assert gate.queued == 2


# Retry-After


def released(gate: Gate, clock: Clock, intervals_s: list[float]) -> None:
    for interval_s in intervals_s:
        ticket = gate.apply("a")
        clock.now_s += interval_s
        ticket.release()


def test_without_a_measured_rate_there_is_no_suggestion() -> None:
    gate = Gate(2, 0, Clock())
    gate.apply("a").release()
    assert gate.retry_after_s() is None


@in_loop
async def test_retry_after_is_the_time_in_which_the_queue_should_be_served() -> None:
    clock = Clock()
    gate = Gate(1, 5, clock)
    released(gate, clock, [3.0] * 4)
    assert gate.retry_after_s() == 3
    for _ in range(6):
        gate.apply("a")
    with pytest.raises(GatewayError) as caught:
        gate.apply("a")
    assert caught.value.retry_after_s == 15


@pytest.mark.parametrize(("interval_s", "expected_s"), [(0.0, 1), (0.01, 1), (1.5, 2), (59.5, 60), (900.0, 60)])
def test_retry_after_is_clamped_to_whole_seconds_of_a_minute(interval_s: float, expected_s: int) -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    released(gate, clock, [interval_s])
    assert gate.retry_after_s() == expected_s <= MAX_RETRY_AFTER_S


def test_the_recent_rate_counts_most() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    released(gate, clock, [50.0] + [2.0] * 30)
    assert gate.retry_after_s() == 3


def test_a_backend_that_releases_nothing_is_slower_than_its_average() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    released(gate, clock, [1.0] * 5)
    gate.apply("a")
    clock.now_s += 20.0
    assert gate.retry_after_s() == 20


@in_loop
async def test_only_time_with_all_slots_taken_is_measured() -> None:
    clock = Clock()
    gate = Gate(2, 0, clock)
    first, second = gate.apply("a"), gate.apply("a")
    clock.now_s += 4.0
    first.release()
    clock.now_s += 100.0
    second.release()
    assert gate.retry_after_s() == 4


# Fair between keys


@in_loop
async def test_key_a_posts_50_then_key_b_posts_1_and_b_is_next() -> None:
    for slots in (1, 4):
        gate = Gate(slots, 0, Clock())
        backlog = [gate.apply("a") for _ in range(50)]
        lone = gate.apply("b")
        assert lone.position() == 1
        backlog[0].release()
        assert admitted(lone)


@in_loop
async def test_keys_take_turns_and_each_is_first_come_first_served() -> None:
    gate = Gate(1, 0, Clock())
    running = gate.apply("x")
    waiters = {name: gate.apply(name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    expected = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert sorted(waiters, key=lambda name: waiters[name].position()) == expected
    assert serve(gate, running, waiters) == expected


@in_loop
async def test_a_key_that_leaves_the_queue_and_comes_back_does_not_overtake() -> None:
    gate = Gate(1, 0, Clock())
    running = gate.apply("a")
    waiters = {"a1": gate.apply("a"), "a2": gate.apply("a"), "b1": gate.apply("b")}
    running.release()
    assert admitted(waiters["b1"])
    waiters["b2"] = gate.apply("b")
    assert serve(gate, waiters.pop("b1"), waiters) == ["a1", "b2", "a2"]


@in_loop
async def test_a_key_that_was_served_past_one_at_its_limit_is_no_newcomer() -> None:
    """While a waits at its own limit, b is served at once: behind c, which was served before, it has had its turn."""
    gate = Gate(3, 0, Clock())
    held = gate.apply("a", parallel=1)
    waiters = {"a2": gate.apply("a", parallel=1)}
    for key in ("c", "b"):
        gate.apply(key).release()
    running = [gate.apply("x"), gate.apply("y")]
    waiters["c"] = gate.apply("c")
    waiters["b"] = gate.apply("b")
    waiters["c2"] = gate.apply("c")
    running.pop().release()
    assert admitted(waiters["c"])
    running.pop().release()
    assert admitted(waiters["b"])
    assert not admitted(waiters["a2"])
    held.release()
    assert admitted(waiters["a2"])


@in_loop
async def test_what_is_kept_about_keys_goes_with_the_queue() -> None:
    gate = Gate(1, 0, Clock())
    running = gate.apply("a")
    waiters = {key: gate.apply(key, priority=len(key)) for key in ("b", "c", "dd")}
    serve(gate, running, waiters)
    assert (gate.active, gate.queued) == (0, 0)
    assert not any((gate._running, gate._lanes, gate._turns, gate._class_since_s))


def overload(weights: list[float], seconds: float = 60.0) -> Counter[str]:
    """Offer 10 times what 4 slots serve, split between keys by weight, and return how many of each were served."""
    clock, dice = Clock(), random.Random(4)
    gate = Gate(4, 100, clock)
    service_s, end_s = 0.1, clock.now_s + seconds
    arrivals_s = service_s / 4 / 10
    keys = [f"key{n}" for n in range(len(weights))]
    served: Counter[str] = Counter()
    waiting: set[Ticket] = set()
    events: list[tuple[float, int, Ticket | None]] = [(clock.now_s, 0, None)]
    number = 0
    while events[0][0] < end_s:
        clock.now_s, _, ticket = heapq.heappop(events)
        fresh: list[Ticket] = []
        if ticket is None:
            number += 1
            heapq.heappush(events, (clock.now_s + dice.expovariate(1 / arrivals_s), -number, None))
            try:
                applied = gate.apply(dice.choices(keys, weights)[0])
            except GatewayError:
                continue
            (waiting.add if applied.waiting else fresh.append)(applied)
        else:
            served[ticket.key_id] += 1
            ticket.release()
        assert gate.active <= 4
        assert gate.queued <= 100
        done = {other for other in waiting if other.waiting is not None and other.waiting.done()}
        waiting -= done
        for other in [*fresh, *(other for other in done if admitted(other))]:
            number += 1
            heapq.heappush(events, (clock.now_s + dice.uniform(0.5, 1.5) * service_s, number, other))
    return served


@pytest.mark.parametrize("weights", [[1.0] * 20, [60.0] + [3.0] * 19], ids=["alike", "one offers 20 times as much"])
def test_20_keys_under_10x_overload_get_their_fair_shares(weights: list[float]) -> None:
    async def run() -> Counter[str]:
        return overload(weights)

    served = asyncio.run(run())
    shares = [served[f"key{n}"] for n in range(20)]
    fair = sum(shares) / 20
    assert sum(shares) > 2000
    assert min(shares) >= 0.8 * fair
    assert sum(shares) ** 2 / (20 * sum(share * share for share in shares)) >= 0.95


# Priority


@in_loop
async def test_a_higher_class_is_served_first() -> None:
    gate = Gate(1, 0, Clock())
    running = gate.apply("x")
    waiters = {
        "batch": gate.apply("batch", priority=-1),
        "normal": gate.apply("normal"),
        "same key": gate.apply("normal", priority=2),
        "high": gate.apply("high", priority=2),
    }
    expected = ["same key", "high", "normal", "batch"]
    assert sorted(waiters, key=lambda name: waiters[name].position()) == expected
    assert serve(gate, running, waiters) == expected


@in_loop
async def test_a_lower_class_counts_one_higher_for_every_period_without_service() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    running = gate.apply("x")
    batch = [gate.apply("batch", priority=-1) for _ in range(3)]
    served_at_s = []
    start_s = clock.now_s
    while len(served_at_s) < 2:
        normal = gate.apply("normal")
        clock.now_s += 1.0
        running.release()
        if admitted(normal):
            running = normal
        else:
            served_at_s.append(clock.now_s - start_s)
            running = batch[len(served_at_s) - 1]
            normal.release()
    assert served_at_s == [AGEING_S + 1.0, 2 * (AGEING_S + 1.0)]


@in_loop
async def test_nobody_starves_below_a_class_that_always_waits() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock, ageing_s=5.0)
    running = gate.apply("x")
    low = [gate.apply(f"low{n}", priority=-3) for n in range(10)]
    for _ in range(400):
        high = gate.apply("high", priority=3)
        clock.now_s += 1.0
        running.release()
        if admitted(high):
            running = high
        else:
            high.release()
            running = next(ticket for ticket in low if admitted(ticket))
            low.remove(running)
    assert not low


@in_loop
async def test_a_backlog_does_not_age_past_newcomers_of_its_own_class() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    running = gate.apply("a")
    for _ in range(10):
        gate.apply("a")
    clock.now_s += 100 * AGEING_S
    lone = gate.apply("b")
    running.release()
    assert admitted(lone)


# A key's own limit


@in_loop
async def test_parallel_makes_a_key_wait_and_blocks_nobody() -> None:
    gate = Gate(4, 0, Clock())
    first, second = gate.apply("a", parallel=2), gate.apply("a", parallel=2)
    third, fourth = gate.apply("a", parallel=2), gate.apply("a", parallel=2)
    assert (gate.active, gate.queued) == (2, 2)
    assert gate.apply("b").waiting is None
    first.release()
    assert [admitted(third), admitted(fourth)] == [True, False]
    second.release()
    assert admitted(fourth)
    assert gate.active == 3


@in_loop
async def test_a_key_at_its_limit_is_passed_over_when_a_slot_frees() -> None:
    gate = Gate(2, 0, Clock())
    gate.apply("a", parallel=1)
    running = gate.apply("b")
    limited, other = gate.apply("a", parallel=1), gate.apply("b")
    running.release()
    assert [admitted(other), admitted(limited)] == [True, False]


@in_loop
async def test_a_newcomer_does_not_overtake_its_own_key() -> None:
    gate = Gate(3, 0, Clock())
    gate.apply("a", parallel=1)
    limited = gate.apply("a", parallel=1)
    unlimited = gate.apply("a")
    assert unlimited.waiting is not None
    limited.release()
    assert admitted(unlimited)
    assert gate.active == 2


# Resize, hold, drain


@in_loop
async def test_resize_up_admits_at_once_and_down_interrupts_nobody() -> None:
    gate = Gate(1, 0, Clock())
    tickets = [gate.apply("a") for _ in range(6)]
    gate.resize(4)
    assert [admitted(ticket) for ticket in tickets] == [True] * 4 + [False] * 2
    gate.resize(1)
    assert gate.active == 4
    for ticket in tickets[:3]:
        ticket.release()
    assert (gate.active, gate.queued) == (1, 2)
    tickets[3].release()
    assert (gate.active, gate.queued) == (1, 1)


def test_a_gate_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        Gate(1, 0, Clock()).resize(0)


@in_loop
async def test_a_held_gate_admits_nobody_and_resumes_in_fair_order() -> None:
    clock = Clock()
    gate = Gate(2, 5, clock)
    running = gate.apply("x")
    gate.hold()
    waiters = {name: gate.apply(name[0]) for name in ("a1", "a2", "a3", "b1")}
    running.release()
    assert not gate.open
    assert (gate.active, gate.queued) == (0, 4)
    low = gate.apply("c", priority=-1)
    with pytest.raises(GatewayError):
        gate.apply("a")
    clock.now_s += 10 * AGEING_S
    gate.resume()
    assert [name for name, ticket in waiters.items() if admitted(ticket)] == ["a1", "b1"]
    assert not admitted(low)


@in_loop
async def test_to_resume_an_open_gate_changes_nothing() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    running, normal, low = gate.apply("x"), gate.apply("a"), gate.apply("b", priority=-1)
    clock.now_s += AGEING_S
    running.release()
    clock.now_s += 1.0
    gate.apply("a")
    gate.resume()
    normal.release()
    assert admitted(low)


def test_a_refusal_that_nobody_reads_is_not_logged_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        gc.collect()
        caplog.clear()
        gate = Gate(1, 2, Clock())
        _, _, waiter, _ = [gate.apply(key) for key in "aaab"]
        assert waiter.waiting is not None
        assert waiter.waiting.done()
        waiter.release()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
        gc.collect()
    assert not caplog.records


# Random operations against a slow and obvious model


@dataclass
class Waiter:
    name: int
    key: str
    priority: int
    parallel: int | None
    real: Ticket


@dataclass
class Model:
    """The rules of the module's docstring, written for the reader and not for the machine."""

    slots: int
    clock: Clock
    open: bool = True
    waiting: list[Waiter] = field(default_factory=list)
    running: list[Waiter] = field(default_factory=list)
    turn: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    joined: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    unserved_since: dict[int, float] = field(default_factory=dict)

    def apply(self, waiter: Waiter) -> None:
        own = [other for other in self.waiting if (other.priority, other.key) == (waiter.priority, waiter.key)]
        if not own and self.open and len(self.running) < self.slots and self.may_run(waiter):
            self.running.append(waiter)
            if self.waiting:
                self.turn += 1
                self.turns[waiter.key] = self.turn
            return
        if not own:
            runs = any(other.key == waiter.key for other in self.running)
            turn = self.turns.get(waiter.key, self.turn if runs else -1)
            self.joined[waiter.priority, waiter.key] = (turn, waiter.name)
        self.waiting.append(waiter)
        self.unserved_since.setdefault(waiter.priority, self.clock.now_s)

    def may_run(self, waiter: Waiter) -> bool:
        return waiter.parallel is None or sum(r.key == waiter.key for r in self.running) < waiter.parallel

    def heads(self) -> list[Waiter]:
        first: dict[tuple[int, str], Waiter] = {}
        for waiter in self.waiting:
            first.setdefault((waiter.priority, waiter.key), waiter)
        return list(first.values())

    def rank(self, waiter: Waiter) -> tuple[float, int, int]:
        aged = (self.clock.now_s - self.unserved_since[waiter.priority]) / AGEING_S
        turn, arrival = self.joined[waiter.priority, waiter.key]
        return (-(waiter.priority + aged), turn, arrival)

    def settle(self) -> None:
        """Admit whoever the rules name until nobody may be."""
        self.tidy()
        while self.open and len(self.running) < self.slots:
            able = [waiter for waiter in self.heads() if self.may_run(waiter)]
            if not able:
                return
            chosen = min(able, key=self.rank)
            self.waiting.remove(chosen)
            self.running.append(chosen)
            self.turn += 1
            self.turns[chosen.key] = self.turn
            self.joined[chosen.priority, chosen.key] = (self.turn, 0)
            self.unserved_since[chosen.priority] = self.clock.now_s
            self.tidy()

    def tidy(self) -> None:
        classes = {waiter.priority for waiter in self.waiting}
        self.unserved_since = {level: at for level, at in self.unserved_since.items() if level in classes}
        if not self.waiting:
            self.turns.clear()


def random_operation(dice: random.Random, gate: Gate, model: Model, number: int) -> None:
    match dice.choices(["apply", "finish", "leave", "again", "resize", "hold"], [40, 30, 9, 3, 3, 3])[0]:
        case "apply":
            key, priority = dice.choice("aaabbcdef"), dice.choice([0, 0, 0, 1, -1])
            parallel = 2 if key == "c" else dice.choice([None, None, None, 1, 3])
            ticket = gate.apply(key, parallel=parallel, priority=priority)
            model.apply(Waiter(number, key, priority, parallel, ticket))
        case "finish" if model.running:
            done = model.running.pop(dice.randrange(len(model.running)))
            done.real.release()
        case "leave" if model.waiting:
            gone = model.waiting.pop(dice.randrange(len(model.waiting)))
            gone.real.release()
            gone.real.release()
        case "resize":
            model.slots = dice.randint(1, 5)
            gate.resize(model.slots)
        case "hold":
            toggle(gate, model)


def toggle(gate: Gate, model: Model) -> None:
    model.open = not model.open
    if model.open:
        model.unserved_since = dict.fromkeys(model.unserved_since, model.clock.now_s)
        gate.resume()
    else:
        gate.hold()


def check(gate: Gate, model: Model) -> None:
    assert gate.active == len(model.running)
    assert gate.queued == len(model.waiting)
    assert all(waiter.real._runs and admitted(waiter.real) for waiter in model.running)
    assert all(waiter.real.waiting is not None and not waiter.real.waiting.done() for waiter in model.waiting)
    assert sorted(waiter.real.position() for waiter in model.waiting) == list(range(1, len(model.waiting) + 1))


@pytest.mark.parametrize("seed", range(25))
def test_random_operations_agree_with_the_model(seed: int) -> None:
    async def run() -> None:
        dice, clock = random.Random(seed), Clock()
        model = Model(dice.randint(1, 4), clock)
        gate = Gate(model.slots, 0, clock)
        for number in range(1, 400):
            clock.now_s += dice.choice([0.0, 0.5, 20.0])
            before = len(model.running)
            random_operation(dice, gate, model, number)
            model.settle()
            check(gate, model)
            assert len(model.running) <= max(model.slots, before)
        if not model.open:
            toggle(gate, model)
        while model.running or model.waiting:
            model.settle()
            check(gate, model)
            model.running.pop().real.release()
        assert (gate.active, gate.queued) == (0, 0)
        assert not any((gate._running, gate._lanes, gate._turns, gate._class_since_s))

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_500_tasks_that_leave_at_random_moments_leave_nothing_behind(seed: int) -> None:
    async def client(gate: Gate, dice: random.Random, most: list[int]) -> None:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        try:
            ticket = gate.apply(dice.choice("abcdefgh"), parallel=dice.choice([None, 1]), priority=dice.choice([0, 1]))
        except GatewayError:
            return
        try:
            if ticket.waiting is not None:
                await ticket.waiting
            most[0] = max(most[0], gate.active)
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
        except GatewayError:
            return
        finally:
            ticket.release()

    async def run() -> None:
        dice, most = random.Random(seed), [0]
        gate = Gate(3, 200, Clock())
        tasks = [asyncio.ensure_future(client(gate, dice, most)) for _ in range(500)]
        while not all(task.done() for task in tasks):
            dice.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.active, gate.queued) == (0, 0)
        assert 1 <= most[0] <= 3

    asyncio.run(run())
