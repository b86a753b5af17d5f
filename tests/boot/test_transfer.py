"""The pauses between attempts, the lowest rate, and the progress in the log."""

import logging

import pytest

from boot.transfer import RetrySchedule, TooSlow, Transfer, format_size, progress
from support.clock import Clock


def test_pauses_double_until_there_was_no_progress_for_the_limit() -> None:
    clock = Clock()
    schedule = RetrySchedule(100.0, clock)
    pauses = []
    while pause_s := schedule.pause_s(0.0):
        pauses.append(pause_s)
        clock.advance(pause_s + 1.0)  # the attempt itself takes a second
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 2.0]
    schedule.restart()
    assert schedule.pause_s(0.0) == 1.0


def test_a_server_may_ask_for_a_longer_pause_within_the_limit() -> None:
    schedule = RetrySchedule(100.0, Clock())
    assert [schedule.pause_s(after_s) for after_s in (20.0, 0.5, 100.0, 100.5)] == [20.0, 2.0, 100.0, None]


def test_a_limit_of_0_is_one_attempt() -> None:
    assert RetrySchedule(0.0, Clock()).pause_s(0.0) is None


def test_progress_is_logged_every_ten_seconds_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    transfer = Transfer(1_000_000, 3_000_000, 0, clock)
    for _ in range(25):
        clock.advance(1.0)
        transfer.add(10_000 if clock.now_s <= 1010 else 20_000)
    assert caplog.messages == [
        "downloaded 1.1 MB of 3 MB (36 %), 10 KB/s, 190 s left",
        "downloaded 1.3 MB of 3 MB (43 %), 20 KB/s, 85 s left",
    ]


@pytest.mark.parametrize(("rate", "slow"), [(99, True), (100, False)])
def test_less_than_the_lowest_rate_over_half_a_minute_ends_a_transfer(rate: int, slow: bool) -> None:
    clock = Clock()
    transfer = Transfer(0, None, 100, clock)
    transfer.add(1_000_000)  # a fast beginning does not help
    for second in range(60):
        clock.advance(1.0)
        if slow and second == 59:
            with pytest.raises(TooSlow, match=r"^only 99 B/s arrive, less than 100 B/s \(MODEL_FETCH_MIN_RATE\)$"):
                transfer.add(rate)
        else:
            transfer.add(rate)


def test_progress_contains_what_is_known() -> None:
    assert progress(5_000_000_000, None, 250) == "downloaded 5.000 GB, 250 B/s"
    assert progress(0, 150_000_000_000, 0) == "downloaded 0 B of 150 GB (0 %), 0 B/s"
    assert format_size(999) == "999 B"
