"""Restart or give up, wedged or busy, idle or not: judged over numbers and a clock that the test turns."""

from dataclasses import dataclass

import pytest

from probes import Activity
from watchdog import Idle, Restarts, Silence, Stall, slots_patience_s


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def activity(active: int = 0, queued: int = 0, silent_s: float = 0, idle_s: float = 0) -> Activity:
    return Activity(active, queued, silent_s, idle_s)


def test_pauses_double_up_to_half_a_minute() -> None:
    restarts = Restarts(8, Clock())
    assert [restarts.pause_s("llama-server") for _ in range(9)] == [1, 2, 4, 8, 16, 30, 30, 30, None]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_the_limit_counts_all_services_together(limit: int) -> None:
    restarts = Restarts(limit, Clock())
    names = ["gateway", "health server", "llama-server"] * 2
    assert [restarts.pause_s(name) is None for name in names[: limit + 1]] == [False] * limit + [True]


def test_each_service_has_pauses_of_its_own() -> None:
    restarts = Restarts(9, Clock())
    assert [restarts.pause_s(name) for name in ("a", "a", "b", "a", "b")] == [1, 2, 1, 4, 2]


def test_crashes_are_forgotten_after_ten_minutes() -> None:
    clock = Clock()
    restarts = Restarts(1, clock)
    assert restarts.pause_s("a") == 1
    clock.now_s += 599.9
    assert restarts.pause_s("a") is None
    clock.now_s += 0.1
    assert Restarts(1, clock).pause_s("a") == 1
    clock.now_s += 600
    assert restarts.pause_s("a") == 1


def test_silence_is_measured_from_the_last_answer() -> None:
    clock = Clock()
    silence = Silence(120, clock)
    clock.now_s += 120
    assert not silence.wedged()
    silence.heard()
    clock.now_s += 120
    assert not silence.wedged()
    clock.now_s += 0.1
    assert silence.wedged()


@pytest.mark.parametrize(
    ("seen", "worth_asking"),
    [
        (None, False),
        (activity(), False),
        (activity(active=0, silent_s=500), False),
        (activity(active=2, silent_s=120), False),
        (activity(active=2, silent_s=120.1), True),
    ],
)
def test_only_silence_under_load_is_suspicious(seen: Activity | None, worth_asking: bool) -> None:
    assert Stall(120, Clock()).suspected(seen) is worth_asking


@pytest.mark.parametrize(
    ("seen", "pause_s"),
    [
        (activity(), 120),
        (activity(active=0, silent_s=500), 120),
        (activity(active=1), 120),
        (activity(active=1, silent_s=50), 70),
        (activity(active=1, silent_s=120), 0),
        (activity(active=1, silent_s=500), 0),
        (None, 0),
    ],
)
def test_the_gateway_is_asked_again_when_a_silence_can_have_lasted_too_long(
    seen: Activity | None, pause_s: float
) -> None:
    clock = Clock()
    stall = Stall(120, clock)
    assert not stall.possible()
    clock.now_s += 120
    assert stall.possible()
    stall.suspected(seen)
    assert stall.possible() is (pause_s == 0)
    clock.now_s += pause_s
    assert stall.possible()


def test_slots_may_take_as_long_as_a_batch() -> None:
    assert slots_patience_s(120, 2) == 30
    assert slots_patience_s(20, 2) == 5
    assert slots_patience_s(1, 0.5) == 0.5


def test_idle_begins_with_ready_and_comes_again() -> None:
    clock = Clock()
    idle = Idle(60, clock)
    assert not idle.due(activity(idle_s=10_000))
    clock.now_s += 59.9
    assert not idle.due(activity(idle_s=10_000))
    clock.now_s += 0.1
    assert idle.due(activity(idle_s=10_000))
    assert not idle.due(activity(idle_s=10_000))
    clock.now_s += 60
    assert idle.due(activity(idle_s=10_000))


@pytest.mark.parametrize("busy", [activity(active=1, idle_s=500), activity(queued=1, idle_s=500), None])
def test_work_in_flight_or_unknown_is_never_idle(busy: Activity | None) -> None:
    clock = Clock()
    idle = Idle(60, clock)
    clock.now_s += 1000
    assert not idle.due(busy)


def test_idle_counts_from_the_end_of_the_last_work() -> None:
    clock = Clock()
    idle = Idle(60, clock)
    clock.now_s += 100
    assert not idle.due(activity(idle_s=59))
    assert not idle.due(activity(active=1))
    clock.now_s += 59
    assert not idle.due(activity(idle_s=58))
    clock.now_s += 2
    assert idle.due(activity(idle_s=60))


def test_the_gateway_is_asked_whether_it_is_idle_when_it_can_have_been_for_long_enough() -> None:
    clock = Clock()
    idle = Idle(60, clock)
    assert not idle.possible()
    clock.now_s += 60
    assert idle.possible()
    assert not idle.due(None)
    assert idle.possible()
    assert not idle.due(activity(active=1))
    clock.now_s += 59.9
    assert not idle.possible()
    clock.now_s += 0.1
    assert idle.possible()
    assert not idle.due(activity(idle_s=20))
    clock.now_s += 39.9
    assert not idle.possible()
    clock.now_s += 0.1
    assert idle.due(activity(idle_s=60))
    assert not idle.possible()


def test_idle_stop_that_is_off_is_never_due() -> None:
    clock = Clock()
    idle = Idle(0, clock)
    clock.now_s += 1e9
    assert not idle.possible()
    assert not Idle(0, Clock()).due(activity(idle_s=1e9))
