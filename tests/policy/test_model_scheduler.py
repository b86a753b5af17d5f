"""model_scheduler.py: each rule by itself, then seeded random arrivals and what must hold for all of them."""

import asyncio
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf

import pytest

from core.errors import MODEL_LOAD_FAILED, MODEL_NOT_FOUND, GatewayError
from policy.fair_queue import AGEING_S
from policy.model_scheduler import LoadState, QueueTotals
from support.model_machine import Job, ModelMachine

CHAT, CODE, EMBED = MODELS = ("chat", "code", "embed")


def in_loop(test: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        async def call() -> None:
            test()

        asyncio.run(call())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def loaded(*models: str, **settings: float) -> ModelMachine:
    """Return a machine on which these models are loaded and idle."""
    machine = ModelMachine(MODELS, **settings)  # type: ignore[arg-type]
    for model in models:
        machine.scheduler.loading(machine.scheduler.models[model])
        machine.scheduler.loaded(machine.scheduler.models[model], machine.slots)
    return machine


# --- When a model is loaded ---


@in_loop
def test_a_request_for_a_loaded_model_runs_at_once() -> None:
    machine = loaded(CHAT)
    job = machine.send(CHAT)
    assert job.started_s == job.arrived_s
    assert not machine.loads


@in_loop
def test_a_model_is_loaded_for_the_first_request_if_there_is_room() -> None:
    machine = ModelMachine(MODELS)
    job = machine.send(CHAT)
    machine.run()
    assert (machine.loads, job.started_s) == ([CHAT], job.arrived_s + machine.load_s)


@in_loop
def test_without_a_limit_all_models_are_loaded() -> None:
    machine = ModelMachine(MODELS, max_loaded=0)
    for model in MODELS:
        machine.send(model)
    machine.run()
    assert machine.loads == list(MODELS)


@in_loop
def test_a_running_request_keeps_its_model_though_another_waits_for_longer() -> None:
    machine = loaded(CHAT)
    running = machine.send(CHAT, work_s=500.0)
    waiting = machine.send(CODE)
    machine.run()
    assert waiting.started_s == running.ended_s + machine.unload_s + machine.load_s


@in_loop
def test_a_swap_happens_as_soon_as_the_loaded_model_has_nothing_to_do() -> None:
    machine = loaded(CHAT)
    running = machine.send(CHAT, work_s=5.0)
    waiting = machine.send(CODE)
    machine.run()
    kept_s = 0.1
    assert waiting.started_s == pytest.approx(running.ended_s + kept_s + machine.unload_s + machine.load_s)


@in_loop
def test_a_model_is_kept_a_moment_for_the_next_request_of_its_client() -> None:
    """Two clients that each wait for their answer before they ask again do not swap with every request."""
    machine = ModelMachine(MODELS, load_s=10.0, switch_after_s=60.0)
    begin_s = machine.clock()

    def ask(model: str) -> None:
        if machine.clock() < begin_s + 600.0:
            job = machine.send(model, key=model)
            watch(job)

    def watch(job: Job) -> None:
        if job.ended_s < inf:
            machine.at(machine.clock() + 0.1, lambda: ask(job.model))
        else:
            machine.at(machine.clock() + 0.5, lambda: watch(job))

    ask(CHAT)
    ask(CODE)
    machine.run()
    assert len(machine.loads) <= 600 / 60 + 2
    assert len(machine.jobs) > 200


@in_loop
def test_requests_for_the_loaded_model_go_on_until_the_others_have_waited_long_enough() -> None:
    machine = loaded(CHAT, switch_after_s=30.0)
    for second in range(100):
        machine.at(machine.clock() + second, lambda: machine.send(CHAT, work_s=2.0) and None)
    waiting = machine.send(CODE)
    machine.run()
    before = [job for job in machine.jobs if job.model == CHAT and job.started_s < waiting.started_s]
    assert max(job.started_s for job in before) == pytest.approx(waiting.arrived_s + 30.0, abs=1.0)
    assert waiting.started_s <= waiting.arrived_s + 30.0 + 2.0 + machine.unload_s + machine.load_s
    assert all(job.ended_s < inf for job in machine.jobs)


@in_loop
def test_of_several_idle_models_the_least_recently_used_one_is_unloaded() -> None:
    machine = loaded(CHAT, CODE, max_loaded=2)
    machine.clock.advance(100.0)
    machine.run(machine.clock())
    machine.send(CHAT)
    machine.run()
    machine.clock.advance(100.0)
    machine.send(EMBED)
    machine.run()
    states = {name: model.state for name, model in machine.scheduler.models.items()}
    assert states == {CHAT: LoadState.LOADED, CODE: LoadState.UNLOADED, EMBED: LoadState.LOADED}


@in_loop
def test_with_two_places_another_model_never_disturbs_one_that_is_at_work() -> None:
    machine = loaded(CHAT, EMBED, max_loaded=2)
    for second in range(60):
        machine.at(machine.clock() + second, lambda: machine.send(CHAT, work_s=30.0) and None)
        machine.at(machine.clock() + second, lambda: machine.send(EMBED, work_s=0.01) and None)
    machine.run()
    embeds = [job for job in machine.jobs if job.model == EMBED]
    assert not machine.loads
    assert all(job.started_s == job.arrived_s for job in embeds)


@in_loop
def test_the_model_that_waits_longest_comes_first() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT, work_s=10.0)
    machine.at(machine.clock() + 2.0, lambda: machine.send(CODE) and None)
    machine.at(machine.clock() + 1.0, lambda: machine.send(EMBED) and None)
    machine.run()
    assert machine.loads == [EMBED, CODE]


@in_loop
def test_a_priority_counts_as_a_longer_wait() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT, work_s=10.0)
    machine.send(EMBED)
    machine.at(machine.clock() + 2.0, lambda: machine.send(CODE, priority=1) and None)
    machine.run()
    assert machine.loads == [CODE, EMBED]
    assert AGEING_S > 2.0


@in_loop
def test_a_client_that_leaves_withdraws_its_wish_for_a_load() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT, work_s=10.0)
    waiting = machine.send(CODE)
    machine.run(machine.clock() + 1.0)
    machine.end(waiting)
    machine.run()
    assert not machine.loads


@in_loop
def test_a_model_that_was_to_make_room_goes_on_if_the_other_is_not_wanted_any_more() -> None:
    machine = loaded(CHAT, switch_after_s=5.0)
    running = machine.send(CHAT, work_s=60.0)
    waiting = machine.send(CODE)
    machine.run(machine.clock() + 6.0)
    held_back = machine.send(CHAT)
    assert held_back.started_s == inf
    machine.end(waiting)
    machine.settle()
    assert held_back.started_s == machine.clock() < running.arrived_s + 60.0
    assert machine.scheduler.models[CHAT].state is LoadState.LOADED


@in_loop
def test_a_request_that_its_key_does_not_let_run_is_no_reason_for_a_swap() -> None:
    machine = loaded(CHAT, switch_after_s=5.0)
    running = machine.send(CHAT, work_s=60.0, parallel=1)
    waiting = machine.send(CODE, parallel=1)
    machine.run(machine.clock() + 30.0)
    other = machine.send(CHAT, key="bob")
    assert other.started_s == other.arrived_s
    machine.run()
    assert waiting.started_s > running.ended_s


# --- Idle models ---


@in_loop
def test_an_idle_model_is_unloaded_after_a_while() -> None:
    machine = loaded(CHAT, EMBED, max_loaded=2, idle_unload_s=60.0)
    machine.send(CHAT, work_s=90.0)
    machine.run(machine.clock() + 61.0)
    assert machine.scheduler.models[EMBED].state is LoadState.UNLOADED
    assert machine.scheduler.models[CHAT].state is LoadState.LOADED
    machine.run()
    assert machine.scheduler.models[CHAT].state is LoadState.UNLOADED


# --- Requests without a slot ---


@in_loop
def test_a_visit_waits_for_its_model_and_keeps_it() -> None:
    machine = ModelMachine(MODELS)
    chat = machine.scheduler.models[CHAT]
    visit = chat.visit()
    machine.run()
    assert visit.waiting is not None
    assert visit.waiting.done()
    assert (chat.visits, machine.loads) == (1, [CHAT])
    waiting = machine.send(CODE)
    machine.run(machine.clock() + 100.0)
    assert waiting.started_s == inf
    visit.release()
    visit.release()
    machine.run()
    assert waiting.ended_s < inf


@in_loop
def test_a_visit_to_a_loaded_model_does_not_wait() -> None:
    machine = loaded(CHAT)
    visit = machine.scheduler.models[CHAT].visit()
    assert visit.waiting is None
    visit.release()
    assert not machine.scheduler.models[CHAT].is_at_work


@in_loop
def test_a_visit_that_is_given_up_is_no_reason_for_a_load() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT)
    visit = machine.scheduler.models[CODE].visit()
    assert machine.scheduler.models[CODE].queued == 1
    visit.release()
    machine.run()
    assert not machine.loads


@in_loop
def test_a_visit_whose_wait_was_cancelled_does_not_disturb_the_load() -> None:
    machine = ModelMachine(MODELS)
    visit = machine.scheduler.models[CHAT].visit()
    assert visit.waiting is not None
    machine.settle()
    visit.waiting.cancel()
    machine.run()
    assert machine.scheduler.models[CHAT].visits == 1
    visit.release()
    assert machine.scheduler.models[CHAT].visits == 0


# --- Failures ---


@in_loop
def test_a_load_that_fails_is_told_to_those_that_wait_for_it_alone() -> None:
    machine = ModelMachine(MODELS, max_loaded=2, failing={CODE})
    wrong, right = [machine.send(CODE) for _ in range(3)], machine.send(CHAT)
    visit = machine.scheduler.models[CODE].visit()
    machine.run()
    assert [job.error.kind for job in wrong if job.error] == [MODEL_LOAD_FAILED] * 3
    assert visit.waiting is not None
    assert isinstance(visit.waiting.exception(), GatewayError)
    assert wrong[0].error is not None
    assert wrong[0].error.message == "exit status 1"
    assert right.ended_s < inf
    assert machine.loads == [CODE, CHAT]


@in_loop
def test_after_a_failure_there_is_a_pause_that_doubles() -> None:
    machine = ModelMachine(MODELS, failing={CHAT}, load_s=1.0)
    pauses = []
    for _ in range(7):
        machine.send(CHAT)
        machine.run()
        early = machine.send(CHAT)
        assert early.error is not None
        assert early.error.retry_after_s is not None
        pauses.append(early.error.retry_after_s)
        with pytest.raises(GatewayError):
            machine.scheduler.models[CHAT].visit()
        machine.clock.advance(early.error.retry_after_s)
    assert pauses == [2, 4, 8, 16, 32, 60, 60]
    assert len(machine.loads) == 7


@in_loop
def test_a_load_that_takes_too_long_is_given_up() -> None:
    machine = ModelMachine(MODELS, hanging={CHAT}, max_load_s=20.0)
    stuck, other = machine.send(CHAT), machine.send(CODE)
    machine.run()
    assert stuck.error is not None
    assert "COLD_START_WAIT" in stuck.error.message
    assert other.ended_s < inf


@in_loop
def test_a_model_that_dies_is_loaded_again_for_those_that_wait() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT, work_s=5.0)
    machine.send(CHAT, work_s=5.0)
    waiting = machine.send(CHAT)
    machine.run(machine.clock() + 1.0)
    machine.scheduler.ended(machine.scheduler.models[CHAT], "exit status 137")
    machine.run()
    assert waiting.error is None
    assert waiting.ended_s < inf
    assert machine.loads == [CHAT]


@in_loop
def test_a_model_that_was_stable_has_no_failures_of_before() -> None:
    machine = loaded(CHAT)
    chat = machine.scheduler.models[CHAT]
    for _ in range(3):
        machine.scheduler.loaded(chat, 1)
        machine.clock.advance(1.0)
        machine.scheduler.ended(chat, "exit status 137")
    assert chat.failures == 3
    machine.scheduler.loaded(chat, 1)
    machine.clock.advance(1000.0)
    machine.scheduler.ended(chat, "exit status 137")
    assert chat.failures == 1
    chat.check()


@in_loop
def test_a_model_that_was_stable_until_it_was_unloaded_has_no_failures_of_before() -> None:
    machine = ModelMachine(MODELS, failing={CHAT}, load_s=1.0, idle_unload_s=100.0)
    chat = machine.scheduler.models[CHAT]
    for _ in range(4):
        machine.send(CHAT)
        machine.run()
        machine.clock.advance(1000.0)
    assert chat.failures == 4
    machine.failing.clear()
    machine.send(CHAT)
    machine.run()
    machine.clock.advance(1000.0)
    machine.run()
    assert chat.state is LoadState.UNLOADED
    machine.failing.add(CHAT)
    machine.send(CHAT)
    machine.run()
    assert machine.send(CHAT).error.retry_after_s == 2  # type: ignore[union-attr]


@in_loop
def test_what_waits_for_a_model_that_is_removed_is_refused() -> None:
    machine = loaded(CHAT)
    machine.send(CHAT, work_s=5.0)
    waiting = machine.send(CODE)
    machine.scheduler.remove(CODE)
    machine.settle()
    assert waiting.error is not None
    assert waiting.error.kind is MODEL_NOT_FOUND
    assert CODE not in machine.scheduler.models


@in_loop
def test_a_model_that_others_load_is_known() -> None:
    machine = ModelMachine(MODELS)
    code = machine.scheduler.models[CODE]
    machine.scheduler.loading(code)
    machine.scheduler.loading(code)
    waiting = machine.send(CODE)
    machine.scheduler.loaded(code, 3)
    machine.run()
    assert waiting.ended_s < inf
    assert (machine.loads, code.queue.slots) == ([], 3)


# --- Any arrivals ---

SEEDS = range(12)
each_seed = pytest.mark.parametrize("seed", SEEDS)


def least_loads(rounds: Sequence[frozenset[str]]) -> int:
    """Return the least number of loads with one place, if each round must be over before the next one begins."""
    costs: dict[str, int] = {"": 0}
    for models in rounds:
        after: dict[str, int] = {}
        for last, cost in costs.items():
            for end in models:
                stays = last in models and (end != last or len(models) == 1)
                after[end] = min(after.get(end, 1 << 30), cost + len(models) - stays)
        costs = after
    return min(costs.values())


def bursts(seed: int, least_models: int) -> tuple[int, int]:
    """Let four keys send bursts for models at random; the next burst comes when all of the last one are answered.

    Returns the number of loads, and the least possible one, which knows the future.
    """
    rng = random.Random(seed)
    machine = ModelMachine(MODELS, slots=rng.randint(1, 4), load_s=rng.uniform(0.5, 20.0), switch_after_s=300.0)
    rounds = []
    for _ in range(12):
        models = rng.sample(MODELS, rng.randint(least_models, 3))
        sent = [machine.send(rng.choice(models), rng.choice("abcd"), rng.uniform(0.1, 2.0)) for _ in range(17)]
        rounds.append(frozenset(job.model for job in sent))
        last, before = machine.loads[-1:], len(machine.loads)
        machine.run()
        # It cannot be known which model the next burst will ask for, but this burst gets no more loads than it needs.
        assert len(machine.loads) - before <= len(rounds[-1].difference(last))
    assert all(job.ended_s < inf for job in machine.jobs)
    return len(machine.loads), least_loads(rounds)


@in_loop
def test_bursts_need_hardly_more_loads_than_the_least_possible() -> None:
    for seed in SEEDS:
        loads, least = bursts(seed, len(MODELS))
        assert loads <= 1.2 * least


@in_loop
def test_bursts_for_some_of_the_models_need_hardly_more_loads_either() -> None:
    loads, least = map(sum, zip(*[bursts(seed, 1) for seed in SEEDS], strict=True))
    assert loads <= 1.2 * least


@each_seed
def test_nothing_starves_and_no_model_at_work_is_unloaded(seed: int) -> None:
    """Requests come for longer than all of them can be served at once; some clients leave.

    That no model at work is unloaded, and that no more are loaded than fit, is asserted by the machine.
    """
    rng = random.Random(seed)

    async def run() -> None:
        machine = ModelMachine(
            MODELS,
            max_loaded=rng.randint(1, 2),
            slots=64,
            load_s=rng.uniform(0.5, 10.0),
            switch_after_s=rng.choice((0.0, 5.0, 30.0)),
        )
        work_s, begin_s = 6.0, machine.clock()
        for _ in range(300):
            model, key, at_s = rng.choice(MODELS), rng.choice("abcd"), begin_s + rng.uniform(0.0, 400.0)
            leaves_s = rng.choice((inf, inf, inf, rng.uniform(0.0, 20.0)))

            def arrive(model: str = model, key: str = key, leaves_s: float = leaves_s) -> None:
                job = machine.send(model, key, rng.uniform(0.1, work_s))
                if leaves_s < inf:
                    machine.at(machine.clock() + leaves_s, lambda: leave(job))

            def leave(job: Job) -> None:
                if job.started_s == inf:
                    machine.end(job)

            machine.at(at_s, arrive)
        machine.run()
        left = [job for job in machine.jobs if job.ticket is not None and job.started_s == inf]
        assert all(job.ticket is not None and not job.ticket.running for job in left)
        others = len(MODELS) - 1
        swap_s = work_s + machine.unload_s + machine.load_s
        for job in machine.jobs:
            if job.ended_s < inf:
                # The others have their turns before, and then those of its own model that came before it.
                assert job.started_s - job.arrived_s <= 2 * machine.switch_after_s + (others + 1) * swap_s + work_s

    asyncio.run(run())


@each_seed
def test_with_two_models_no_request_waits_longer_than_the_switch_and_one_swap(seed: int) -> None:
    rng = random.Random(seed)

    async def run() -> None:
        machine = ModelMachine(
            MODELS[:2], slots=64, load_s=rng.uniform(0.5, 10.0), switch_after_s=rng.uniform(0.0, 30.0)
        )
        work_s, begin_s = 5.0, machine.clock()
        for _ in range(300):
            model = rng.choice(MODELS[:2])
            machine.at(
                begin_s + rng.uniform(0.0, 300.0),
                lambda model=model: machine.send(model, "a", rng.uniform(0.1, work_s)) and None,  # type: ignore[misc]
            )
        machine.run()
        longest_s = max(job.started_s - job.arrived_s for job in machine.jobs)
        # A request may come while its model is being unloaded, and then waits for the other one's turn.
        assert longest_s <= machine.switch_after_s + 2 * (machine.unload_s + machine.load_s) + 2 * work_s

    asyncio.run(run())


@each_seed
def test_turns_are_not_shorter_than_the_switch_while_all_models_are_wanted(seed: int) -> None:
    """With more work than can be done a model keeps its turn: it is not swapped for every request."""
    rng = random.Random(seed)

    async def run() -> None:
        machine = ModelMachine(MODELS, slots=2, load_s=3.0, switch_after_s=30.0)
        for _ in range(400):
            machine.send(rng.choice(MODELS), rng.choice("abcd"), rng.uniform(0.5, 1.5))
        machine.run()
        assert all(job.ended_s < inf for job in machine.jobs)
        starts = sorted((job.started_s, job.model) for job in machine.jobs)
        turns = [time_s for (_, before), (time_s, model) in pairwise(starts) if before != model]
        assert all(after_s - before_s >= 15.0 for before_s, after_s in pairwise(turns[:-2]))

    asyncio.run(run())


@each_seed
def test_the_keys_have_fair_shares_of_each_turn(seed: int) -> None:
    """One key sends ten times as much as the others: of what is served while all wait, each has its share."""
    rng = random.Random(seed)

    async def run() -> None:
        machine = ModelMachine(MODELS, slots=2, load_s=3.0, switch_after_s=30.0)
        orders = [(model, key) for model in MODELS for key in "a" * 100 + "b" * 10 + "c" * 10 + "d" * 10]
        rng.shuffle(orders)
        for model, key in orders:
            machine.send(model, key, 1.0)
        machine.run()
        for model in MODELS:
            first = sorted((job for job in machine.jobs if job.model == model), key=lambda job: job.started_s)[:36]
            served = [sum(job.key == key for job in first) for key in "abcd"]
            assert max(served) - min(served) <= machine.slots + 1

    asyncio.run(run())


# --- Numbers ---


@in_loop
def test_the_totals_are_those_of_all_models() -> None:
    machine = ModelMachine(MODELS, max_loaded=2, load_s=5.0)
    totals = QueueTotals(machine.scheduler, machine.clock)
    machine.clock.advance(10)
    assert (totals.slots, totals.active, totals.running, totals.queued, totals.queued_slots) == (0, 0, 0, 0, 0)
    assert totals.idle_s() == 10
    for model in (CHAT, CHAT, CHAT, CODE, EMBED):
        machine.send(model, work_s=20.0)
    visit = machine.scheduler.models[EMBED].visit()
    assert (totals.queued, totals.queued_slots, totals.idle_s()) == (6, 6, 0)
    assert totals.order() == [("alice", 1)] * 5
    machine.run(machine.clock() + 6)
    assert (totals.slots, totals.active, totals.running, totals.queued) == (4, 3, 3, 3)
    machine.run()
    assert totals.idle_s() == 0
    visit.release()
    machine.clock.advance(7)
    assert totals.idle_s() == 7


@in_loop
def test_a_load_that_is_put_off_is_ordered_again() -> None:
    machine = ModelMachine(MODELS, hanging={CHAT})
    waiting = machine.send(CHAT)
    machine.hanging.clear()
    machine.scheduler.postpone(machine.scheduler.models[CHAT], 3.0)
    machine.run()
    assert machine.loads == [CHAT, CHAT]
    assert waiting.started_s == waiting.arrived_s + 3.0 + machine.load_s


@in_loop
def test_a_visit_that_has_given_up_is_not_refused_too() -> None:
    machine = ModelMachine(MODELS, failing={CHAT})
    visit = machine.scheduler.models[CHAT].visit()
    assert visit.waiting is not None
    visit.waiting.cancel()
    machine.run()
    assert visit.waiting.cancelled()
    visit.release()
