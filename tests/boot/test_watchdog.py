"""Restart or give up, wedged or busy, idle or not: decided from numbers and a clock that the test advances."""

import pytest

from boot.probes import Activity
from boot.watchdog import (
    BLAMED_PAUSE_S,
    IdleTimer,
    RestartPolicy,
    SilenceTimer,
    StallDetector,
    slots_timeout_s,
    stuck_probe_s,
    stuck_timeout_s,
)
from support.clock import Clock


def activity(active: int = 0, queued: int = 0, silent_s: float = 0, idle_s: float = 0) -> Activity:
    return Activity(active, queued, silent_s, idle_s)


# Restarts


def test_a_stuck_loop_is_found_in_seconds_and_a_large_prompt_gets_the_time_of_a_batch() -> None:
    assert [stuck_timeout_s(120, size) for size in (0, 300, 1 << 20)] == [4, 6, 4 + 2048 / 150]
    assert stuck_timeout_s(3, 1 << 20) == 3
    assert [stuck_probe_s(wedge_s) for wedge_s in (1, 120)] == [0.5, 4]


def test_pauses_double_up_to_half_a_minute() -> None:
    restarts = RestartPolicy(8, Clock())
    assert [restarts.pause_s("llama-server") for _ in range(9)] == [1, 2, 4, 8, 16, 30, 30, 30, None]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_the_limit_counts_all_services_together(limit: int) -> None:
    restarts = RestartPolicy(limit, Clock())
    names = ["gateway", "health server", "llama-server"] * 2
    assert [restarts.pause_s(name) is None for name in names[: limit + 1]] == [False] * limit + [True]


def test_each_service_has_its_own_pauses() -> None:
    restarts = RestartPolicy(9, Clock())
    assert [restarts.pause_s(name) for name in ("a", "a", "b", "a", "b")] == [1, 2, 1, 4, 2]


def test_crashes_count_for_ten_minutes() -> None:
    clock = Clock()
    restarts = RestartPolicy(1, clock)
    assert restarts.pause_s("a", was_ready=True) == 1
    clock.advance(599.9)
    assert restarts.pause_s("a", was_ready=True) is None
    assert restarts.exceeded == "within 10 minutes"
    restarts = RestartPolicy(1, clock)
    assert restarts.pause_s("a", was_ready=True) == 1
    clock.advance(600)
    assert restarts.pause_s("a", was_ready=True) == 1


@pytest.mark.parametrize("load_s", [1, 30, 100, 130, 300, 3600])
def test_loads_that_always_fail_are_given_up_however_long_each_takes(load_s: float) -> None:
    clock = Clock()
    restarts = RestartPolicy(5, clock)
    loads = 0
    pause_s: float | None = 0.0
    while pause_s is not None:
        clock.advance(load_s + pause_s)
        loads += 1
        pause_s = restarts.pause_s("llama-server")
    assert loads == 6
    assert restarts.exceeded == ("within 10 minutes" if load_s <= 100 else "in a row that never became ready")


def test_a_life_that_became_ready_ends_the_row_of_those_that_did_not() -> None:
    clock = Clock()
    restarts = RestartPolicy(2, clock)
    for was_ready in (False, False, True) * 10:
        clock.advance(601)
        assert restarts.pause_s("a", was_ready=was_ready) == 1
        assert restarts.pause_s("b", was_ready=True) == 1


def test_a_crash_that_a_request_is_blamed_for_does_not_count() -> None:
    restarts = RestartPolicy(1, Clock())
    assert [restarts.pause_s("a", blamed=True) for _ in range(9)] == [BLAMED_PAUSE_S] * 9
    assert [restarts.pause_s("a"), restarts.pause_s("a", blamed=True)] == [1, BLAMED_PAUSE_S]
    assert restarts.pause_s("a") is None


# Wedged


def test_silence_is_measured_from_the_last_response() -> None:
    clock = Clock()
    silence = SilenceTimer(120, clock)
    clock.advance(120)
    assert not silence.expired
    silence.reset()
    clock.advance(120)
    assert not silence.expired
    clock.advance(0.1)
    assert silence.expired


@pytest.mark.parametrize(
    ("reported", "suspicious"),
    [
        (None, False),
        (activity(), False),
        (activity(active=0, silent_s=500), False),
        (activity(active=2, silent_s=120), False),
        (activity(active=2, silent_s=120.1), True),
    ],
)
def test_only_silence_under_load_is_suspicious(reported: Activity | None, suspicious: bool) -> None:
    assert StallDetector(120, Clock()).suspects(reported) is suspicious


@pytest.mark.parametrize(
    ("reported", "pause_s"),
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
def test_a_look_at_the_activity_is_due_only_when_a_stall_may_have_lasted_too_long(
    reported: Activity | None, pause_s: float
) -> None:
    clock = Clock()
    stall = StallDetector(120, clock)
    assert not stall.due
    clock.advance(120)
    assert stall.due
    stall.suspects(reported)
    assert stall.due is (pause_s == 0)
    clock.advance(pause_s)
    assert stall.due


def test_slots_may_take_as_long_as_a_batch() -> None:
    assert slots_timeout_s(120, 2) == 30
    assert slots_timeout_s(20, 2) == 5
    assert slots_timeout_s(1, 0.5) == 0.5


# Idle


def test_the_idle_time_counts_from_the_start_and_from_each_expiry() -> None:
    clock = Clock()
    idle = IdleTimer(60, clock)
    assert not idle.expires(activity(idle_s=10_000))
    clock.advance(59.9)
    assert not idle.expires(activity(idle_s=10_000))
    clock.advance(0.1)
    assert idle.expires(activity(idle_s=10_000))
    assert not idle.expires(activity(idle_s=10_000))
    clock.advance(60)
    assert idle.expires(activity(idle_s=10_000))


@pytest.mark.parametrize("reported", [activity(active=1, idle_s=500), activity(queued=1, idle_s=500), None])
def test_work_in_flight_or_unknown_is_not_idle(reported: Activity | None) -> None:
    clock = Clock()
    idle = IdleTimer(60, clock)
    clock.advance(1000)
    assert not idle.expires(reported)


def test_the_idle_time_counts_from_the_end_of_the_last_work() -> None:
    clock = Clock()
    idle = IdleTimer(60, clock)
    clock.advance(100)
    assert not idle.expires(activity(idle_s=59))
    assert not idle.expires(activity(active=1))
    clock.advance(59)
    assert not idle.expires(activity(idle_s=58))
    clock.advance(2)
    assert idle.expires(activity(idle_s=60))


def test_a_look_at_the_activity_is_due_only_when_the_idle_time_may_be_reached() -> None:
    clock = Clock()
    idle = IdleTimer(60, clock)
    assert not idle.due
    clock.advance(60)
    assert idle.due
    assert not idle.expires(None)
    assert idle.due
    assert not idle.expires(activity(active=1))
    clock.advance(59.9)
    assert not idle.due
    clock.advance(0.1)
    assert idle.due
    assert not idle.expires(activity(idle_s=20))
    clock.advance(39.9)
    assert not idle.due
    clock.advance(0.1)
    assert idle.due
    assert idle.expires(activity(idle_s=60))
    assert not idle.due


def test_a_limit_of_0_never_expires() -> None:
    clock = Clock()
    idle = IdleTimer(0, clock)
    clock.advance(1e9)
    assert not idle.due
    assert not idle.expires(activity(idle_s=1e9))
