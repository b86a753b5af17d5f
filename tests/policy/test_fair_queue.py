"""fair_queue.py: each rule by itself, then random operations against a slow and obvious model."""

import asyncio
import gc
import heapq
import logging
import random
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from core.errors import QUEUE_FULL, GatewayError
from policy.fair_queue import AGEING_S, LONGEST_KEPT_S, MAX_RETRY_AFTER_S, FairQueue, Ticket
from support.clock import Clock


class Key(str):
    """A key id that can be weakly referenced."""


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


def serve(queue: FairQueue, running: Ticket, waiters: dict[str, Ticket]) -> list[str]:
    """Release the running requests, one after the other, and return the names of the waiters as they are served."""
    order: list[str] = []
    while True:
        running.release()
        fresh = [name for name, ticket in waiters.items() if name not in order and admitted(ticket)]
        if not fresh:
            return order
        assert len(fresh) == 1
        order += fresh
        running = waiters[fresh[0]]


# --- Admission ---


@in_loop
async def test_all_requests_that_have_had_slots_are_counted() -> None:
    queue = FairQueue(3, 0, Clock())
    assert queue.try_acquire("a", None, 0)
    pair = queue.acquire("b", slots=2)
    assert queue.admitted == 2
    assert not queue.try_acquire("c", None, 0)
    waiter = queue.acquire("c")
    assert queue.admitted == 2
    pair.release()
    assert (queue.admitted, admitted(waiter)) == (3, True)


@in_loop
async def test_a_slot_that_is_taken_without_a_ticket_is_like_one_with_a_ticket() -> None:
    """Random requests of three keys, in one queue with tickets for all, in the other for those that have to wait."""
    rng = random.Random(5)
    clock = Clock()
    usual, other = FairQueue(3, 0, clock), FairQueue(3, 0, clock)
    held: list[tuple[Ticket, Callable[[], None]]] = []
    taken = 0
    for _ in range(3000):
        clock.advance(rng.random())
        if rng.random() < 0.4:
            key_id, parallel, slots = rng.choice("abc"), rng.choice((None, 1, 2)), rng.choice((1, 1, 1, 2))
            if slots == 1 and other.try_acquire(key_id, parallel, 0):
                taken += 1
                held.append((usual.acquire(key_id, parallel), partial(other.release_one, key_id)))
            else:
                waits = other.acquire(key_id, parallel, slots=slots).release
                held.append((usual.acquire(key_id, parallel, slots=slots), waits))
        elif held:
            ticket, release = held.pop(rng.randrange(len(held)))
            ticket.release()
            release()
        for queue in (usual, other):
            queue.on_tick(clock())
        states = [
            (queue.active, queue.running, queue.order(), queue.retry_after_s(), queue.idle_s())
            for queue in (usual, other)
        ]
        assert states[0] == states[1]
    assert taken > 300


def test_a_queue_is_idle_from_its_last_release() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    clock.advance(5)
    assert queue.idle_s() == 5
    ticket = queue.acquire("alice")
    clock.advance(5)
    assert queue.idle_s() == 0
    ticket.release()
    clock.advance(2)
    assert queue.idle_s() == 2


def test_a_free_slot_is_taken_without_a_future_or_a_loop() -> None:
    queue = FairQueue(2, 0, Clock())
    first, second = queue.acquire("a"), queue.acquire("b")
    assert (first.waiting, second.waiting) == (None, None)
    assert (queue.active, queue.queued, first.position()) == (2, 0, 0)
    first.release()
    first.release()
    assert queue.active == 1
    second.release()
    assert queue.active == 0


@in_loop
async def test_a_waiter_gets_the_slot_that_is_released() -> None:
    queue = FairQueue(1, 0, Clock())
    running, waiter = queue.acquire("a"), queue.acquire("a")
    assert waiter.waiting is not None
    assert not waiter.waiting.done()
    assert (queue.active, queue.queued, waiter.position()) == (1, 1, 1)
    running.release()
    await waiter.waiting
    assert (queue.active, queue.queued, waiter.position()) == (1, 0, 0)
    waiter.release()
    waiter.release()
    assert (queue.active, queue.queued) == (0, 0)


@in_loop
async def test_a_waiter_that_leaves_is_removed_at_once() -> None:
    queue = FairQueue(1, 0, Clock())
    running, leaver, stayer = queue.acquire("a"), queue.acquire("a"), queue.acquire("a")
    leaver.release()
    assert leaver.waiting is not None
    assert leaver.waiting.cancelled()
    assert (queue.queued, stayer.position()) == (1, 1)
    leaver.release()
    running.release()
    assert admitted(stayer)
    assert queue.active == 1


@in_loop
async def test_a_waiter_cancelled_but_not_yet_released_takes_no_slot() -> None:
    queue = FairQueue(1, 0, Clock())
    running, leaver, stayer = queue.acquire("a"), queue.acquire("a"), queue.acquire("a")
    assert leaver.waiting is not None
    leaver.waiting.cancel()
    running.release()
    assert admitted(stayer)
    leaver.release()
    assert (queue.active, queue.queued) == (1, 0)


@in_loop
async def test_a_task_cancelled_between_admission_and_wake_up_releases_the_slot() -> None:
    queue = FairQueue(1, 0, Clock())
    running, waiter = queue.acquire("a"), queue.acquire("a")

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
    assert (queue.active, queue.queued) == (0, 0)


# --- The limit of the queue ---


@in_loop
async def test_a_queue_that_one_request_fills_says_so() -> None:
    queue = FairQueue(1, 1, Clock())
    for _ in range(2):
        queue.acquire("a")
    with pytest.raises(GatewayError, match=r"^The queue is full: 1 request waits \(MAX_QUEUE_SIZE\)\.$"):
        queue.acquire("a")


@in_loop
async def test_a_full_queue_refuses_and_names_the_setting() -> None:
    queue = FairQueue(1, 2, Clock())
    tickets = [queue.acquire("a") for _ in range(3)]
    with pytest.raises(GatewayError, match=r"2 requests wait \(MAX_QUEUE_SIZE\)") as caught:
        queue.acquire("a")
    assert caught.value.kind is QUEUE_FULL
    assert caught.value.retry_after_s == QUEUE_FULL.retry_after_s
    tickets[2].release()
    assert not admitted(queue.acquire("a"))


@in_loop
async def test_max_waiting_0_is_no_limit() -> None:
    queue = FairQueue(1, 0, Clock())
    tickets = [queue.acquire("a") for _ in range(1001)]
    assert queue.queued == 1000
    assert tickets[-1].position() == 1000


@in_loop
async def test_one_key_cannot_keep_the_others_out_of_a_full_queue() -> None:
    queue = FairQueue(1, 3, Clock())
    running = queue.acquire("a")
    waiters = {f"a{n}": queue.acquire("a") for n in range(3)}
    waiters["b"] = queue.acquire("b")
    error = refusal(waiters.pop("a2"))
    assert error.kind is QUEUE_FULL
    assert queue.queued == 3
    with pytest.raises(GatewayError):
        queue.acquire("b")
    assert serve(queue, running, waiters) == ["b", "a0", "a1"]


@in_loop
async def test_the_newest_waiter_of_the_lowest_class_is_refused() -> None:
    queue = FairQueue(1, 3, Clock())
    queue.acquire("a")
    high, low, newer = queue.acquire("a", priority=1), queue.acquire("a", priority=-1), queue.acquire("a", priority=1)
    queue.acquire("b", priority=-5)
    assert refusal(low).kind is QUEUE_FULL
    assert not any(ticket.waiting is None or ticket.waiting.done() for ticket in (high, newer))


@in_loop
async def test_a_cancelled_waiter_may_be_the_one_that_is_removed() -> None:
    queue = FairQueue(1, 2, Clock())
    queue.acquire("a")
    queue.acquire("a")
    cancelled = queue.acquire("a")
    assert cancelled.waiting is not None
    cancelled.waiting.cancel()
    queue.acquire("b")
    cancelled.release()
    assert queue.queued == 2


# --- Retry-After ---


def released(queue: FairQueue, clock: Clock, intervals_s: list[float]) -> None:
    for interval_s in intervals_s:
        ticket = queue.acquire("a")
        clock.now_s += interval_s
        ticket.release()


def test_without_a_measured_rate_there_is_no_suggestion() -> None:
    queue = FairQueue(2, 0, Clock())
    queue.acquire("a").release()
    assert queue.retry_after_s() is None


@in_loop
async def test_retry_after_is_the_time_in_which_the_queue_should_be_served() -> None:
    clock = Clock()
    queue = FairQueue(1, 5, clock)
    released(queue, clock, [3.0] * 4)
    assert queue.retry_after_s() == 3
    for _ in range(6):
        queue.acquire("a")
    with pytest.raises(GatewayError) as caught:
        queue.acquire("a")
    assert caught.value.retry_after_s == 15


@pytest.mark.parametrize(("interval_s", "expected_s"), [(0.0, 1), (0.01, 1), (1.5, 2), (59.5, 60), (900.0, 60)])
def test_retry_after_is_clamped_to_whole_seconds_of_a_minute(interval_s: float, expected_s: int) -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    released(queue, clock, [interval_s])
    assert queue.retry_after_s() == expected_s <= MAX_RETRY_AFTER_S


def test_the_recent_rate_counts_most() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    released(queue, clock, [50.0] + [2.0] * 30)
    assert queue.retry_after_s() == 3


def test_a_backend_that_releases_nothing_counts_as_slower_than_its_average() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    released(queue, clock, [1.0] * 5)
    queue.acquire("a")
    clock.now_s += 20.0
    assert queue.retry_after_s() == 20


@in_loop
async def test_only_time_with_all_slots_taken_is_measured() -> None:
    clock = Clock()
    queue = FairQueue(2, 0, clock)
    first, second = queue.acquire("a"), queue.acquire("a")
    clock.now_s += 4.0
    first.release()
    clock.now_s += 100.0
    second.release()
    assert queue.retry_after_s() == 4


# --- Fairness between keys ---


@in_loop
async def test_one_request_of_another_key_is_served_before_a_backlog() -> None:
    for slots in (1, 4):
        queue = FairQueue(slots, 0, Clock())
        backlog = [queue.acquire("a") for _ in range(50)]
        lone = queue.acquire("b")
        assert lone.position() == 1
        backlog[0].release()
        assert admitted(lone)


@in_loop
async def test_keys_take_turns_and_each_is_first_come_first_served() -> None:
    queue = FairQueue(1, 0, Clock())
    running = queue.acquire("x")
    waiters = {name: queue.acquire(name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    expected = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert sorted(waiters, key=lambda name: waiters[name].position()) == expected
    assert serve(queue, running, waiters) == expected


@in_loop
async def test_a_key_that_leaves_the_queue_and_comes_back_does_not_overtake() -> None:
    queue = FairQueue(1, 0, Clock())
    running = queue.acquire("a")
    waiters = {"a1": queue.acquire("a"), "a2": queue.acquire("a"), "b1": queue.acquire("b")}
    running.release()
    assert admitted(waiters["b1"])
    waiters["b2"] = queue.acquire("b")
    assert serve(queue, waiters.pop("b1"), waiters) == ["a1", "b2", "a2"]


@in_loop
async def test_a_key_that_was_served_past_one_at_its_limit_is_no_newcomer() -> None:
    """While a waits at its own limit, b is served at once: c, which was served before b, is then next."""
    queue = FairQueue(3, 0, Clock())
    held = queue.acquire("a", parallel=1)
    waiters = {"a2": queue.acquire("a", parallel=1)}
    for key in ("c", "b"):
        queue.acquire(key).release()
    running = [queue.acquire("x"), queue.acquire("y")]
    waiters["c"] = queue.acquire("c")
    waiters["b"] = queue.acquire("b")
    waiters["c2"] = queue.acquire("c")
    running.pop().release()
    assert admitted(waiters["c"])
    running.pop().release()
    assert admitted(waiters["b"])
    assert not admitted(waiters["a2"])
    held.release()
    assert admitted(waiters["a2"])


@in_loop
async def test_nothing_about_a_key_is_kept_once_the_queue_is_empty() -> None:
    queue = FairQueue(1, 0, Clock())

    def run() -> list[weakref.ref[Key]]:
        keys = [Key(text) for text in "abcd"]
        running, *others = [queue.acquire(key, priority=at) for at, key in enumerate(keys)]
        serve(queue, running, {ticket.key_id: ticket for ticket in others})
        return [weakref.ref(key) for key in keys]

    kept = run()
    gc.collect()
    assert (queue.active, queue.queued) == (0, 0)
    assert [key() for key in kept] == [None] * 4


@in_loop
async def test_a_class_that_comes_back_does_not_count_the_time_without_waiters() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    running = queue.acquire("x")
    queue.acquire("low", priority=-1).release()
    clock.advance(2 * AGEING_S)
    low, normal = queue.acquire("low", priority=-1), queue.acquire("normal")
    running.release()
    assert [admitted(normal), admitted(low)] == [True, False]


def overload(weights: list[float], seconds: float = 60.0) -> Counter[str]:
    """Offer 10 times what 4 slots serve, split between keys by weight, and return how many of each were served."""
    clock, dice = Clock(), random.Random(4)
    queue = FairQueue(4, 100, clock)
    service_s, end_s = 0.1, clock.now_s + seconds
    arrivals_s = service_s / 4 / 10
    keys = [f"key{n}" for n in range(len(weights))]
    served: Counter[str] = Counter()
    waiting: set[Ticket] = set()
    events: list[tuple[float, int, Ticket | None]] = [(clock.now_s, 0, None)]
    number = 0
    while events[0][0] < end_s:
        clock.now_s, _, ticket = heapq.heappop(events)
        admitted_now: list[Ticket] = []
        released = ticket is not None  # only this admits one that waits
        if ticket is None:
            number += 1
            heapq.heappush(events, (clock.now_s + dice.expovariate(1 / arrivals_s), -number, None))
            try:
                ticket = queue.acquire(dice.choices(keys, weights)[0])
            except GatewayError:
                continue
            (waiting.add if ticket.waiting else admitted_now.append)(ticket)
        else:
            served[ticket.key_id] += 1
            ticket.release()
        assert queue.active <= 4
        assert queue.queued <= 100
        done = {other for other in waiting if other.waiting is not None and other.waiting.done()} if released else set()
        waiting -= done
        for other in [*admitted_now, *(other for other in done if admitted(other))]:
            number += 1
            heapq.heappush(events, (clock.now_s + dice.uniform(0.5, 1.5) * service_s, number, other))
    return served


@pytest.mark.parametrize("weights", [[1.0] * 20, [60.0] + [3.0] * 19], ids=["equal", "one offers 20 times as much"])
def test_20_keys_under_10x_overload_get_their_fair_shares(weights: list[float]) -> None:
    async def run() -> Counter[str]:
        return overload(weights)

    served = asyncio.run(run())
    shares = [served[f"key{n}"] for n in range(20)]
    fair = sum(shares) / 20
    assert sum(shares) > 2000
    assert min(shares) >= 0.8 * fair
    assert sum(shares) ** 2 / (20 * sum(share * share for share in shares)) >= 0.95


# --- Requests that take several slots ---


@in_loop
async def test_a_request_takes_all_its_slots_or_waits() -> None:
    queue = FairQueue(4, 0, Clock())
    large = queue.acquire("a", slots=3)
    assert (queue.active, queue.running, large.slots) == (3, 1, 3)
    other = queue.acquire("b", slots=2)
    assert not admitted(other)
    large.release()
    large.release()
    assert (queue.active, queue.running, admitted(other)) == (2, 1, True)
    other.release()
    assert (queue.active, queue.running) == (0, 0)


@in_loop
async def test_a_request_for_more_slots_than_there_are_takes_all() -> None:
    queue = FairQueue(2, 0, Clock())
    ticket = queue.acquire("a", slots=9)
    assert (queue.active, ticket.slots) == (2, 2)
    waiter = queue.acquire("a", slots=9)
    assert (waiter.slots, queue.queued_slots) == (0, 2)
    queue.resize(3)
    assert queue.queued_slots == 3
    ticket.release()
    assert (queue.active, waiter.slots) == (3, 3)


@in_loop
async def test_free_slots_are_kept_for_the_request_that_is_next() -> None:
    queue = FairQueue(4, 0, Clock())
    running = [queue.acquire("a") for _ in range(4)]
    large = queue.acquire("b", slots=4)
    small = queue.acquire("a")
    assert (large.position(), small.position()) == (1, 5)
    for ticket in running[:3]:
        ticket.release()
        assert not queue.try_acquire("a", None, 0)
        assert not admitted(small)
    running[3].release()
    assert admitted(large)
    large.release()
    assert admitted(small)


@in_loop
async def test_kept_slots_are_for_a_key_that_precedes_and_for_others_once_the_waiter_leaves() -> None:
    queue = FairQueue(2, 0, Clock())
    first, second = queue.acquire("a"), queue.acquire("x")
    large = queue.acquire("a", slots=2)
    first.release()
    assert not admitted(large)
    newcomer = queue.acquire("b")  # a runs, and b was not served yet
    assert admitted(newcomer)
    later = queue.acquire("b")
    newcomer.release()
    assert not admitted(later)
    large.release()
    assert admitted(later)
    second.release()
    later.release()
    assert queue.active == 0


@in_loop
async def test_no_slots_are_kept_for_a_request_that_waits_for_others_of_its_own_key() -> None:
    """Else a key could keep all slots from the others with one endless stream and one request that never fits."""
    for as_one in (False, True):
        queue = FairQueue(4, 0, Clock())
        endless = queue.acquire("a", slots=2, as_one=as_one)
        others = [queue.acquire("b") for _ in range(2)]
        large = queue.acquire("a", slots=3, as_one=as_one)
        waiters = [queue.acquire("b") for _ in range(4)]
        for ticket in (*others, *waiters[:2]):
            ticket.release()
        assert all(map(admitted, waiters))
        assert not admitted(large)
        endless.release()
        waiters[2].release()
        assert admitted(large)
        for ticket in (large, waiters[3]):
            ticket.release()
        assert queue.active == 0


@in_loop
async def test_an_endless_request_keeps_no_slots_idle_before_a_large_one() -> None:
    clock = Clock()
    queue = FairQueue(4, 0, clock)
    endless = queue.acquire("endless")
    large = queue.acquire("large", slots=4)
    small = [queue.acquire(f"small{n}") for n in range(4)]
    assert not any(map(admitted, small))
    clock.advance(AGEING_S - 1)
    queue.on_tick(clock.now_s)
    assert queue.acquire("newcomer").waiting is not None
    clock.advance(1)
    queue.on_tick(clock.now_s)
    assert [admitted(ticket) for ticket in small] == [True, True, True, False]
    clock.advance(AGEING_S - 1)
    small[0].release()
    assert admitted(small[3])
    clock.advance(1)
    small[1].release()  # slots are kept again, for twice the time
    newcomer = queue.acquire("newcomer2")
    clock.advance(2 * AGEING_S - 1)
    queue.on_tick(clock.now_s)
    assert not admitted(newcomer)
    small[2].release()
    small[3].release()
    endless.release()
    assert admitted(large)
    assert not admitted(newcomer)


@in_loop
async def test_a_later_request_of_the_same_key_does_not_pass_its_large_one() -> None:
    clock = Clock()
    queue = FairQueue(2, 0, clock)
    queue.acquire("endless")
    queue.acquire("large", slots=2)
    behind = queue.acquire("large")
    clock.advance(AGEING_S)
    queue.on_tick(clock.now_s)
    assert not admitted(behind)
    assert queue.acquire("other").waiting is None


@dataclass
class Traffic:
    """What one run measured, in seconds: the longest waits, and how much of the slots' time was used."""

    large_waits_s: list[float] = field(default_factory=list)
    small_waits_s: list[float] = field(default_factory=list)
    used: float = 0.0


def mix(seed: int, slots: int, longest_s: float, *, endless: bool) -> Traffic:
    """Let four keys with small requests always wait, one with large ones too, and one with a stream that never ends."""
    dice, clock, seen = random.Random(seed), Clock(), Traffic()
    queue = FairQueue(slots, 0, clock)
    running: list[tuple[float, int, Ticket]] = []
    waiting: dict[Ticket, tuple[str, float]] = {}
    begun_s, numbers, span_s = clock.now_s, iter(range(1 << 20)), 60 * LONGEST_KEPT_S
    if endless:
        queue.acquire("endless")

    def ask(key: str) -> None:
        ticket = queue.acquire(key, slots=dice.randint(2, slots) if key == "large" else 1)
        waiting[ticket] = (key, clock.now_s)

    def settle() -> None:
        for ticket in [each for each in waiting if admitted(each)]:
            key, since_s = waiting.pop(ticket)
            (seen.large_waits_s if key == "large" else seen.small_waits_s).append(clock.now_s - since_s)
            heapq.heappush(running, (clock.now_s + dice.uniform(1.0, longest_s), next(numbers), ticket))
            ask(key)

    for key in ("large", "a", "b", "c", "d"):
        ask(key)
    tick_s = clock.now_s
    while clock.now_s < begun_s + span_s:
        settle()
        if running and running[0][0] <= tick_s + 0.25:
            before_s, clock.now_s = clock.now_s, max(clock.now_s, running[0][0])
            seen.used += queue.active * (clock.now_s - before_s)
            heapq.heappop(running)[2].release()
        else:
            seen.used += queue.active * (tick_s + 0.25 - clock.now_s)
            clock.now_s = tick_s = tick_s + 0.25
            queue.on_tick(clock.now_s)
    settle()
    for ticket, (key, since_s) in waiting.items():
        (seen.large_waits_s if key == "large" else seen.small_waits_s).append(clock.now_s - since_s)
        ticket.release()
    seen.used /= slots * span_s
    return seen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("longest_s", [AGEING_S / 4, LONGEST_KEPT_S])
def test_neither_large_nor_small_requests_starve(seed: int, longest_s: float) -> None:
    async def run() -> None:
        seen = mix(seed, 4, longest_s, endless=False)
        assert max(seen.large_waits_s) <= 6 * LONGEST_KEPT_S
        assert max(seen.small_waits_s) <= 3 * LONGEST_KEPT_S
        assert len(seen.large_waits_s) >= 6

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_that_never_ends_idles_less_than_half_of_the_other_slots(seed: int) -> None:
    """A large request waits for ever: the small ones run for half of the time, besides the endless one."""

    async def run() -> None:
        seen = mix(seed, 4, AGEING_S / 4, endless=True)
        assert seen.used >= 0.5
        assert max(seen.small_waits_s) <= 2 * LONGEST_KEPT_S

    asyncio.run(run())


@in_loop
async def test_a_key_that_took_several_slots_lets_as_many_turns_pass() -> None:
    queue = FairQueue(3, 0, Clock())
    running = queue.acquire("x", slots=3)
    waiters = {name: queue.acquire(name[0], slots=3) for name in ("a1", "a2")}
    small = [queue.acquire("b") for _ in range(9)]
    running.release()
    order = []
    for _ in range(5):
        fresh = [ticket for ticket in (*waiters.values(), *small) if ticket.slots]
        order.append("".join(ticket.key_id for ticket in fresh))
        for ticket in fresh:
            ticket.release()
    assert order == ["a", "bbb", "a", "bbb", "bbb"]


@in_loop
async def test_parallel_bounds_the_slots_of_a_key_and_a_batch_counts_as_one() -> None:
    queue = FairQueue(8, 0, Clock())
    first = queue.acquire("a", parallel=4, slots=3)
    second = queue.acquire("a", parallel=4, slots=2)
    assert not admitted(second)
    assert admitted(queue.acquire("b", slots=2))
    first.release()
    assert admitted(second)
    batch = queue.acquire("c", parallel=1, slots=4, as_one=True)
    assert (admitted(batch), queue.active) == (True, 8)
    assert not admitted(queue.acquire("c", parallel=1))
    batch.release()
    assert queue.active == 5


@in_loop
async def test_batches_of_one_key_leave_one_after_the_other() -> None:
    """What they hold besides what counts against `parallel` is known until the last has left."""
    queue = FairQueue(6, 0, Clock())
    first, second = [queue.acquire("a", slots=2, as_one=True) for _ in range(2)]
    first.release()
    large = queue.acquire("a", slots=6)  # it waits for the second, so nothing is kept for it
    others = [queue.acquire("b") for _ in range(4)]
    assert all(map(admitted, others))
    second.release()
    for ticket in others:
        ticket.release()
    assert admitted(large)


@in_loop
async def test_the_rate_of_release_is_that_of_slots() -> None:
    clock = Clock()
    queue = FairQueue(4, 0, clock)
    ticket = queue.acquire("a", slots=4)
    clock.now_s += 8.0
    ticket.release()
    assert queue.retry_after_s() == 2
    queue.acquire("a", slots=4)
    waiter = queue.acquire("b", slots=3)
    assert queue.retry_after_s() == 6
    waiter.release()


class Load:
    """Keys of several classes that always have requests waiting, each of a size of its own, on a fake clock."""

    def __init__(self, seed: int, slots: int, sizes: dict[str, int], priorities: dict[str, int]) -> None:
        self.dice, self.clock = random.Random(seed), Clock()
        self.queue = FairQueue(slots, 0, self.clock)
        self.sizes, self.priorities = sizes, priorities
        self.given: Counter[str] = Counter()
        self.passed_by: Counter[tuple[str, str]] = Counter()  # slots to one key while another waits
        self.most_passed_by: Counter[tuple[str, str]] = Counter()
        self.waiting: dict[str, deque[Ticket]] = {key: deque() for key in sizes}
        self.running: list[tuple[float, int, Ticket]] = []
        self.number = 0

    def ask(self, key: str) -> None:
        self.waiting[key].append(self.queue.acquire(key, None, self.priorities[key], self.sizes[key]))

    def admit(self) -> None:
        while (key := next((key for key, tickets in self.waiting.items() if admitted(tickets[0])), None)) is not None:
            ticket = self.waiting[key].popleft()
            self.number += 1
            heapq.heappush(self.running, (self.clock.now_s + self.dice.uniform(0.5, 1.5), self.number, ticket))
            self.note(key, ticket.slots)
            self.ask(key)
        assert self.queue.active == sum(ticket.slots for _, _, ticket in self.running) <= self.queue.slots

    def note(self, served: str, slots: int) -> None:
        self.given[served] += slots
        for other in self.waiting:
            if other != served:
                pair = (other, served)
                self.passed_by[pair] += slots
                self.most_passed_by[pair] = max(self.most_passed_by[pair], self.passed_by[pair])
        for other in self.sizes:
            self.passed_by.pop((served, other), None)

    def run(self, releases: int) -> None:
        for key in list(self.sizes) * (self.queue.slots + 1):
            self.ask(key)
        self.admit()
        for _ in range(releases):
            self.clock.now_s, _, ticket = heapq.heappop(self.running)
            ticket.release()
            self.admit()


@pytest.mark.parametrize("seed", range(8))
def test_large_and_small_requests_get_equal_shares_of_the_slots(seed: int) -> None:
    dice = random.Random(seed)
    slots = dice.choice((2, 4, 7, 8))
    sizes = {f"key{number}": dice.randint(1, slots) for number in range(5)} | {"small": 1, "large": slots}

    async def play() -> Load:
        load = Load(seed, slots, sizes, dict.fromkeys(sizes, 0))
        load.run(1500)
        return load

    load = asyncio.run(play())
    fair = sum(load.given.values()) / len(sizes)
    for key in sizes:
        assert 0.85 * fair <= load.given[key] <= 1.15 * fair, load.given
    # While one waits, another gets what the one has had in advance, and one turn: not more.
    for (waiter, other), most in load.most_passed_by.items():
        assert most <= sizes[waiter] + 2 * sizes[other] + 1, (waiter, other, most)


@pytest.mark.parametrize("seed", range(4))
def test_a_lower_class_is_served_however_large_its_requests_are(seed: int) -> None:
    sizes = {"low large": 4, "low small": 1, "high small": 1, "high large": 4, "high": 2}
    priorities = {key: int(key.startswith("high")) for key in sizes}

    async def play() -> Load:
        load = Load(seed, 4, sizes, priorities)
        load.run(3000)
        return load

    load = asyncio.run(play())
    assert min(load.given[key] for key in sizes) >= 4
    high = [load.given[key] for key in sizes if key.startswith("high")]
    low = [load.given[key] for key in sizes if key.startswith("low")]
    assert max(low) < min(high) / 4
    assert max(high) < 1.3 * min(high)


# --- Priority ---


@in_loop
async def test_a_higher_class_is_served_first() -> None:
    queue = FairQueue(1, 0, Clock())
    running = queue.acquire("x")
    waiters = {
        "batch": queue.acquire("batch", priority=-1),
        "normal": queue.acquire("normal"),
        "same key": queue.acquire("normal", priority=2),
        "high": queue.acquire("high", priority=2),
    }
    expected = ["same key", "high", "normal", "batch"]
    assert sorted(waiters, key=lambda name: waiters[name].position()) == expected
    assert serve(queue, running, waiters) == expected


@in_loop
async def test_a_lower_class_counts_one_higher_for_every_period_without_service() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    running = queue.acquire("x")
    batch = [queue.acquire("batch", priority=-1) for _ in range(3)]
    served_at_s = []
    start_s = clock.now_s
    while len(served_at_s) < 2:
        normal = queue.acquire("normal")
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
async def test_no_key_starves_below_a_class_that_always_waits() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock, ageing_s=5.0)
    running = queue.acquire("x")
    low = [queue.acquire(f"low{n}", priority=-3) for n in range(10)]
    for _ in range(400):
        high = queue.acquire("high", priority=3)
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
    queue = FairQueue(1, 0, clock)
    running = queue.acquire("a")
    for _ in range(10):
        queue.acquire("a")
    clock.now_s += 100 * AGEING_S
    lone = queue.acquire("b")
    running.release()
    assert admitted(lone)


# --- A key's own limit ---


@in_loop
async def test_parallel_makes_a_key_wait_and_delays_no_other() -> None:
    queue = FairQueue(4, 0, Clock())
    first, second = queue.acquire("a", parallel=2), queue.acquire("a", parallel=2)
    third, fourth = queue.acquire("a", parallel=2), queue.acquire("a", parallel=2)
    assert (queue.active, queue.queued) == (2, 2)
    assert queue.acquire("b").waiting is None
    first.release()
    assert [admitted(third), admitted(fourth)] == [True, False]
    second.release()
    assert admitted(fourth)
    assert queue.active == 3


@in_loop
async def test_a_key_at_its_limit_is_skipped_when_a_slot_becomes_free() -> None:
    queue = FairQueue(2, 0, Clock())
    queue.acquire("a", parallel=1)
    running = queue.acquire("b")
    limited, other = queue.acquire("a", parallel=1), queue.acquire("b")
    running.release()
    assert [admitted(other), admitted(limited)] == [True, False]


@in_loop
async def test_a_newcomer_does_not_overtake_its_own_key() -> None:
    queue = FairQueue(3, 0, Clock())
    queue.acquire("a", parallel=1)
    limited = queue.acquire("a", parallel=1)
    unlimited = queue.acquire("a")
    assert unlimited.waiting is not None
    limited.release()
    assert admitted(unlimited)
    assert queue.active == 2


# --- Resize and pause ---


@in_loop
async def test_resize_up_admits_at_once_and_down_interrupts_nobody() -> None:
    queue = FairQueue(1, 0, Clock())
    tickets = [queue.acquire("a") for _ in range(6)]
    queue.resize(4)
    assert [admitted(ticket) for ticket in tickets] == [True] * 4 + [False] * 2
    queue.resize(1)
    assert queue.active == 4
    for ticket in tickets[:3]:
        ticket.release()
    assert (queue.active, queue.queued) == (1, 2)
    tickets[3].release()
    assert (queue.active, queue.queued) == (1, 1)


def test_a_queue_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        FairQueue(1, 0, Clock()).resize(0)


@in_loop
async def test_a_paused_queue_admits_none_and_resumes_in_fair_order() -> None:
    clock = Clock()
    queue = FairQueue(2, 5, clock)
    running = queue.acquire("x")
    queue.pause()
    waiters = {name: queue.acquire(name[0]) for name in ("a1", "a2", "a3", "b1")}
    running.release()
    assert not queue.open
    assert (queue.active, queue.queued) == (0, 4)
    low = queue.acquire("c", priority=-1)
    with pytest.raises(GatewayError):
        queue.acquire("a")
    clock.now_s += 10 * AGEING_S
    queue.resume()
    assert [name for name, ticket in waiters.items() if admitted(ticket)] == ["a1", "b1"]
    assert not admitted(low)


@in_loop
async def test_resuming_an_open_queue_changes_nothing() -> None:
    clock = Clock()
    queue = FairQueue(1, 0, clock)
    running, normal, low = queue.acquire("x"), queue.acquire("a"), queue.acquire("b", priority=-1)
    clock.now_s += AGEING_S
    running.release()
    clock.now_s += 1.0
    queue.acquire("a")
    queue.resume()
    normal.release()
    assert admitted(low)


def test_a_refusal_that_is_not_retrieved_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        gc.collect()
        caplog.clear()
        queue = FairQueue(1, 2, Clock())
        _, _, waiter, _ = [queue.acquire(key) for key in "aaab"]
        assert waiter.waiting is not None
        assert waiter.waiting.done()
        waiter.release()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
        gc.collect()
    assert not caplog.records


# --- Random operations against a slow and obvious model ---


@dataclass
class Waiter:
    name: int
    key: str
    priority: int
    parallel: int | None
    real: Ticket


@dataclass
class Model:
    """The rules of the module's docstring, written to be read."""

    slots: int
    clock: Clock
    open: bool = True
    waiting: list[Waiter] = field(default_factory=list)
    running: list[Waiter] = field(default_factory=list)
    last_served: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    joined: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    unserved_since: dict[int, float] = field(default_factory=dict)

    def acquire(self, waiter: Waiter) -> None:
        own = [other for other in self.waiting if (other.priority, other.key) == (waiter.priority, waiter.key)]
        if not own and self.open and len(self.running) < self.slots and self.may_run(waiter):
            self.running.append(waiter)
            if self.waiting:
                self.last_served += 1
                self.turns[waiter.key] = self.last_served
            return
        if not own:
            runs = any(other.key == waiter.key for other in self.running)
            turn = self.turns.get(waiter.key, self.last_served if runs else -1)
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
        """Admit waiters by the rules until none may be admitted."""
        self.tidy()
        while self.open and len(self.running) < self.slots:
            able = [waiter for waiter in self.heads() if self.may_run(waiter)]
            if not able:
                return
            chosen = min(able, key=self.rank)
            self.waiting.remove(chosen)
            self.running.append(chosen)
            self.last_served += 1
            self.turns[chosen.key] = self.last_served
            self.joined[chosen.priority, chosen.key] = (self.last_served, 0)
            self.unserved_since[chosen.priority] = self.clock.now_s
            self.tidy()

    def tidy(self) -> None:
        classes = {waiter.priority for waiter in self.waiting}
        self.unserved_since = {level: at for level, at in self.unserved_since.items() if level in classes}
        if not self.waiting:
            self.turns.clear()


def random_operation(dice: random.Random, queue: FairQueue, model: Model, number: int, keys: list[Key]) -> None:
    match dice.choices(["acquire", "finish", "leave", "none", "resize", "pause"], [40, 30, 9, 3, 3, 3])[0]:
        case "acquire":
            key, priority = dice.choice(keys), dice.choice([0, 0, 0, 1, -1])
            parallel = 2 if key == "c" else dice.choice([None, None, None, 1, 3])
            ticket = queue.acquire(key, parallel=parallel, priority=priority)
            model.acquire(Waiter(number, key, priority, parallel, ticket))
        case "finish" if model.running:
            done = model.running.pop(dice.randrange(len(model.running)))
            done.real.release()
        case "leave" if model.waiting:
            gone = model.waiting.pop(dice.randrange(len(model.waiting)))
            gone.real.release()
            gone.real.release()
        case "resize":
            model.slots = dice.randint(1, 5)
            queue.resize(model.slots)
        case "pause":
            toggle(queue, model)


def toggle(queue: FairQueue, model: Model) -> None:
    model.open = not model.open
    if model.open:
        model.unserved_since = dict.fromkeys(model.unserved_since, model.clock.now_s)
        queue.resume()
    else:
        queue.pause()


def check(queue: FairQueue, model: Model) -> None:
    assert queue.active == len(model.running)
    assert queue.queued == len(model.waiting)
    assert all(waiter.real.running and admitted(waiter.real) for waiter in model.running)
    assert all(waiter.real.waiting is not None and not waiter.real.waiting.done() for waiter in model.waiting)


def check_positions(model: Model) -> None:
    """Takes quadratic time."""
    assert sorted(waiter.real.position() for waiter in model.waiting) == list(range(1, len(model.waiting) + 1))


def run_random_operations(dice: random.Random, queue: FairQueue, clock: Clock) -> list[weakref.ref[Key]]:
    """Run until all requests have ended; return the keys that were used."""
    model = Model(queue.slots, clock)
    a, b, *others = [Key(text) for text in "abcdef"]
    keys = [a, a, a, b, b, *others]
    for number in range(1, 400):
        clock.advance(dice.choice([0.0, 0.5, 20.0]))
        before = len(model.running)
        random_operation(dice, queue, model, number, keys)
        model.settle()
        check(queue, model)
        check_positions(model)
        assert len(model.running) <= max(model.slots, before)
    if not model.open:
        toggle(queue, model)
    while model.running or model.waiting:
        model.settle()
        check(queue, model)
        if len(model.waiting) < 12:
            check_positions(model)
        model.running.pop().real.release()
    return [weakref.ref(key) for key in keys]


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_agree_with_the_model(seed: int) -> None:
    async def run() -> None:
        dice, clock = random.Random(seed), Clock()
        queue = FairQueue(dice.randint(1, 4), 0, clock)
        kept = run_random_operations(dice, queue, clock)
        gc.collect()
        assert (queue.active, queue.queued) == (0, 0)
        assert not any(key() for key in kept)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_500_tasks_cancelled_at_random_release_all_slots(seed: int) -> None:
    async def client(queue: FairQueue, dice: random.Random, most: list[int]) -> None:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        try:
            ticket = queue.acquire(
                dice.choice("abcdefgh"), parallel=dice.choice([None, 1]), priority=dice.choice([0, 1])
            )
        except GatewayError:
            return
        try:
            if ticket.waiting is not None:
                await ticket.waiting
            most[0] = max(most[0], queue.active)
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
        except GatewayError:
            return
        finally:
            ticket.release()

    async def run() -> None:
        dice, most = random.Random(seed), [0]
        queue = FairQueue(3, 200, Clock())
        tasks = [asyncio.ensure_future(client(queue, dice, most)) for _ in range(500)]
        while not all(task.done() for task in tasks):
            dice.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (queue.active, queue.queued) == (0, 0)
        assert 1 <= most[0] <= 3

    asyncio.run(run())


# --- The order, as it is reported ---


@in_loop
async def test_the_order_is_that_of_the_positions() -> None:
    queue = FairQueue(2, 0, Clock())
    queue.acquire("alice")
    queue.acquire("bob")
    asks = [("alice", 0, 1), ("alice", 0, 1), ("bob", 0, 2), ("carol", 0, 1), ("alice", 0, 1)]
    asks += [("dora", 5, 1), ("bob", 0, 1)]
    tickets = [queue.acquire(key_id, None, priority, slots) for key_id, priority, slots in asks]
    order = queue.order()
    assert order == [("dora", 1), ("carol", 1), ("alice", 1), ("bob", 2), ("alice", 1), ("bob", 1), ("alice", 1)]
    positions = sorted((ticket.position(), ticket.key_id) for ticket in tickets)
    assert [key_id for _, key_id in positions] == [key_id for key_id, _ in order]
    for ticket in tickets:
        ticket.release()


def test_an_empty_queue_has_no_order() -> None:
    assert FairQueue(2, 0, Clock()).order() == []
