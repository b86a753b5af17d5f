"""ticker.py: listeners are called at each tick, whatever one of them does."""

import asyncio
from typing import Any

import pytest

from support.clock import Clock
from support.memory_transport import ClockLoop, Link, run
from transport.ticker import Ticker


def test_now_is_the_time_of_the_last_tick() -> None:
    clock = Clock(100.0)
    ticker = Ticker(clock)
    clock.advance(0.2)
    assert ticker.now_s == 100.0
    ticker.tick()
    assert ticker.now_s == 100.2


def test_listeners_get_the_time_in_the_order_in_which_they_were_added() -> None:
    ticker = Ticker(Clock(100.0))
    calls: list[tuple[str, float]] = []
    ticker.add_listener(lambda now_s: calls.append(("first", now_s)))
    ticker.add_listener(lambda now_s: calls.append(("second", now_s)))
    ticker.tick()
    assert calls == [("first", 100.0), ("second", 100.0)]


def test_it_ticks_at_once_and_then_four_times_a_second_until_it_is_stopped() -> None:
    clock = Clock(100.0)
    ticks: list[float] = []

    async def play() -> None:
        ticker = Ticker(clock)
        ticker.add_listener(ticks.append)
        ticker.start()
        await asyncio.sleep(1.1)
        ticker.stop()
        await asyncio.sleep(10)

    run(play(), clock)
    assert ticks == [100.0, 100.25, 100.5, 100.75, 101.0]


def test_a_clock_that_never_ran_can_be_stopped() -> None:
    Ticker(Clock()).stop()


def test_a_listener_that_raises_stops_neither_the_clock_nor_the_other_listeners(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock(100.0)
    ticks: list[float] = []
    problems: list[dict[str, Any]] = []

    def broken(now_s: float) -> None:
        raise ValueError("broken")

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        ticker = Ticker(clock)
        ticker.add_listener(broken)
        ticker.add_listener(ticks.append)
        ticker.start()
        await asyncio.sleep(0.3)
        ticker.stop()

    run(play(), clock)
    assert ticks == [100.0, 100.25]
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["broken", "broken"]
    assert problems == []


@pytest.mark.parametrize("begins_s", [0.0, 0.1, 0.24])
def test_a_deadline_is_met_within_one_tick(begins_s: float) -> None:
    clock = Clock(100.0)

    async def play() -> float:
        link = Link(clock)
        link.ticker.start()
        await asyncio.sleep(begins_s)
        client = link.client()
        client.deadline_s = clock() + 1.0
        due_s = client.deadline_s
        while not client.ended:
            await asyncio.sleep(0.01)
        link.ticker.stop()
        return clock() - due_s

    assert 0 <= run(play(), clock) <= Ticker.TICK_S + 0.01


def test_the_loop_of_these_tests_runs_the_next_timer_at_once() -> None:
    clock = Clock(100.0)
    loop = ClockLoop(clock)
    loop.run_until_complete(asyncio.sleep(3600))
    loop.close()
    assert clock() == 3700.0
