"""left_stream.py: whether the slots show more tokens of streams than their events do."""

import pytest

from backend.left_stream import LeftStream, has_silent_tokens, most_decoded
from backend.slot_listing import Slot


def slot(decoded: int, *, busy: bool = True, streamed: bool = True) -> Slot:
    return {"is_processing": busy, "params": {"stream": streamed}, "next_token": [{"n_decoded": decoded}]}


@pytest.mark.parametrize(
    ("slots", "most", "events", "hidden"),
    [
        ([slot(40)], 1, [40], False),
        ([slot(50)], 1, [40], False),  # they are on their way
        ([slot(1100)], 1, [1000], False),
        ([slot(70)], 1, [40], True),
        ([slot(1200)], 1, [1000], True),
        ([slot(40), slot(0)], 2, [38, 0], False),
        ([slot(40), slot(500)], 2, [500, 40], False),
        ([slot(40), slot(500)], 2, [40, 3], True),
        ([slot(40), slot(900, streamed=False)], 2, [40], False),  # an answer that is whole has no events
        ([slot(40), slot(900, busy=False)], 1, [40], False),
        ([slot(40), slot(900, busy=False)], 2, [40, 900], None),  # one has ended
        ([slot(1000), slot(0)], 3, [5000, 3], None),  # one has ended, and another one has begun
        ([slot(41), slot(0)], 3, [43], False),  # events without a token
        ([slot(40), slot(0)], 1, [40], None),  # another program is at work
        ([slot(40)], 3, [40], False),  # others have not begun
        ([], 1, [40], None),
    ],
)
def test_the_sums_say_whether_tokens_made_no_events(
    slots: list[Slot], most: int, events: list[int], hidden: bool | None
) -> None:
    assert has_silent_tokens(slots, most, events) is hidden


@pytest.mark.parametrize(
    ("looks", "shows_all"),
    [
        ([], False),
        ([None], False),
        ([False], True),
        ([False, None], False),
        ([False, None, False], True),
        ([None, False], True),
        ([True, False], False),
        ([False, True], False),
    ],
)
def test_a_stream_shows_all_if_no_look_has_shown_more(looks: list[bool | None], shows_all: bool) -> None:
    ended: list[bool] = []
    stream = LeftStream(lambda: 7, ended.append)
    assert stream.events == 7
    for number, hidden in enumerate(looks):
        stream.look(hidden, 3.0 * number)
    stream.note_end()
    stream.end()
    assert ended == [shows_all]


def test_what_is_not_known_after_its_end_says_nothing_against_it() -> None:
    ended: list[bool] = []
    stream = LeftStream(lambda: 7, ended.append)
    stream.look(False, 1.0)
    stream.look(None, 2.9)  # for a moment it says nothing either
    stream.note_end()
    stream.look(None, 9.0)
    stream.end()
    assert ended == [True]


def test_it_ends_once_it_has_come_and_its_slot_is_released_in_any_order() -> None:
    ended: list[bool] = []
    first, second = LeftStream(lambda: 0, ended.append), LeftStream(lambda: 0, ended.append)
    first.end()
    second.note_end()
    assert ended == []
    first.note_end()
    second.end()
    assert ended == [False, False]


def test_the_first_look_is_due_at_once() -> None:
    stream = LeftStream(lambda: 0, lambda shows_all: None)
    assert stream.pause_s == 0.0
    for _ in range(3):
        stream.look(None, 1.0)
        assert stream.pause_s == 0.05
    stream.look(None, 1.0)
    assert stream.pause_s > 60
    stream = LeftStream(lambda: 0, lambda shows_all: None)
    stream.look(False, 1.0)
    assert stream.pause_s > 60


def test_what_a_request_has_had_is_no_more_than_what_any_slot_shows() -> None:
    assert most_decoded([slot(4), slot(0), slot(900, busy=False)]) == 4
    assert most_decoded([slot(900, busy=False)]) == 0
