"""Events in a flood: one line at once, then one a minute with their number."""

import pytest

from core.summed_log import SummedLog


def test_the_first_is_logged_at_once_and_the_others_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    log = SummedLog("%d came")
    log.on_tick(0.0)
    log.add()
    log.on_tick(1.0)
    for _ in range(5):
        log.add()
    log.on_tick(60.9)
    assert caplog.messages == ["1 came"]
    log.on_tick(61.0)
    log.on_tick(200.0)
    assert caplog.messages == ["1 came", "5 came"]


def test_what_is_left_is_logged_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    log = SummedLog("%d came")
    log.flush()
    log.add()
    log.flush()
    assert caplog.messages == ["1 came"]
