"""left_stream.py: whether the slots show more tokens of streams than their events do."""

from math import inf

import pytest

from backend.left_stream import (
    LeftStream,
    Peers,
    Shown,
    Span,
    StreamEvents,
    has_silent_tokens,
    most_decoded,
    most_total_of,
    peers_of,
)
from backend.slot_listing import ListedSlot

SEVEN = StreamEvents(7)
SHOWS_NONE: ListedSlot = {"id": 0, "is_processing": True}


def slot(
    decoded: int, *, busy: bool = True, streamed: bool = True, task: int = 0, prompt: int = 0, kept: int = 0
) -> ListedSlot:
    """Return a slot of which a quarter of the prompt was in the cache. `kept` is what an idle one keeps."""
    return {
        "id_task": task,
        "is_processing": busy,
        "params": {"stream": streamed},
        "next_token": [{"n_decoded": decoded}],
        "n_prompt_tokens": kept,
        "n_prompt_tokens_processed": prompt - prompt // 4,
        "n_prompt_tokens_cache": prompt // 4,
    }


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
        ([slot(40), slot(300)], 2, [40], None),  # one whose connection has ended is still at work for a moment
        ([], 1, [40], None),
    ],
)
def test_the_sums_say_whether_tokens_made_no_events(
    slots: list[ListedSlot], most: int, events: list[int], hidden: bool | None
) -> None:
    assert has_silent_tokens(slots, most, map(StreamEvents, events)) is hidden


@pytest.mark.parametrize(
    ("slots", "events", "hidden"),
    [
        ([slot(25), slot(25)], [StreamEvents(50, 2)], False),
        ([slot(25), slot(24), slot(300)], [StreamEvents(300), StreamEvents(50, 2)], False),
        ([slot(25), slot(125)], [StreamEvents(50, 2)], True),
        ([slot(25)], [StreamEvents(50, 2)], None),  # one answer has ended
    ],
)
def test_the_events_of_a_stream_with_several_answers_are_those_of_several_slots(
    slots: list[ListedSlot], events: list[StreamEvents], hidden: bool | None
) -> None:
    assert has_silent_tokens(slots, 3, events) is hidden


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
    ended: list[Shown] = []
    stream = LeftStream(lambda: 7, ended.append)
    assert stream.events == 7
    for number, hidden in enumerate(looks):
        stream.look([], SEVEN, hidden, 3.0 * number)
    stream.note_end()
    stream.end()
    assert ended == [Shown(shows_all)]


def test_what_is_not_known_after_its_end_says_nothing_against_it() -> None:
    ended: list[Shown] = []
    stream = LeftStream(lambda: 7, ended.append)
    stream.look([], SEVEN, False, 1.0)
    stream.look([], SEVEN, None, 2.9)  # for a moment it says nothing either
    stream.note_end()
    stream.look([], SEVEN, None, 9.0)
    stream.end()
    assert ended == [Shown(True)]


def test_what_a_look_has_shown_is_good_for_a_moment_if_the_slots_cannot_be_seen_any_more() -> None:
    for later_s, has_all in ((1.9, True), (2.1, False)):
        ended: list[Shown] = []
        stream = LeftStream(lambda: 7, ended.append)
        stream.look([], SEVEN, False, 1.0)
        stream.look_in_vain(1.0 + later_s)
        stream.note_end()
        stream.look_in_vain(9.0)
        stream.end()
        assert ended == [Shown(has_all)]


def shown(*looks: tuple[list[ListedSlot], bool | None], events: StreamEvents = SEVEN) -> Shown:
    """Return what a stream that was left reports after these looks at the slots, except the most of any slot."""
    return whole(*looks, events=events)._replace(most=None)


def whole(*looks: tuple[list[ListedSlot], bool | None], events: StreamEvents = SEVEN) -> Shown:
    ended: list[Shown] = []
    stream = LeftStream(lambda: events.events, ended.append)
    for slots, hidden in looks:
        stream.look(slots, events, hidden, 1.0)
    stream.note_end()
    stream.end()
    return ended[0]


def idle(task: int, kept: int) -> ListedSlot:
    return slot(0, busy=False, task=task, kept=kept)


OTHER = slot(900, task=2, prompt=50)
OWN = slot(7, task=4, prompt=400)


def test_a_slot_with_about_as_many_tokens_as_events_shows_the_prompt() -> None:
    for mine in (4, 7, 23):
        own = slot(mine, task=4, prompt=400)
        assert shown(([OTHER, own], False)) == Shown(True, Span(400, 400), Span(mine, inf))
    for far in (slot(3, task=4), slot(24, task=4), slot(7, task=4, streamed=False), slot(7, task=4, busy=False)):
        assert shown(([OTHER, far], False)) == Shown(True)


def test_a_slot_that_has_ended_shows_all_that_was_generated() -> None:
    both = ([OTHER, OWN], False)
    assert shown(both, ([OTHER, slot(9, task=4, prompt=400)], None)).generated == Span(9, inf)
    assert shown(both, ([OTHER, idle(4, 411)], None)).generated == Span(12, 12)
    assert shown(both, ([OTHER, idle(4, 0)], None)).generated == Span(7, inf)  # it was emptied
    assert shown(both, ([OTHER, idle(5, 411)], None)).generated == Span(7, inf)  # another task's


def test_a_prompt_that_is_still_being_read_is_known_in_the_end() -> None:
    begun = slot(0, task=4, prompt=40)
    assert shown(([begun], False), events=StreamEvents(1)) == Shown(True, Span(40, 40), Span(0, inf))
    ended = shown(([begun], False), ([idle(4, 4000)], None), events=StreamEvents(1))
    assert ended == Shown(True, Span(4000, 4000), Span(1, 1))


def test_what_a_slot_keeps_of_another_task_is_none_of_a_prompt_that_has_not_been_begun() -> None:
    begun = slot(0, task=4, kept=900)
    for kept, prompt in ((900, 0), (30, 30), (0, 0)):
        ended = shown(([begun], False), ([idle(4, kept)], None), events=StreamEvents(1))
        assert ended.prompt == Span(prompt, prompt)


def test_if_several_slots_may_be_its_own_the_tokens_lie_between_theirs() -> None:
    like = slot(9, task=6, prompt=80)
    assert shown(([OTHER, like, OWN], False)) == Shown(True, Span(80, 400), Span(7, inf))
    ended = shown(([OTHER, like, OWN], False), ([OTHER, idle(6, 90), idle(4, 420)], None))
    assert ended.generated == Span(11, 21)


def test_what_a_stream_has_had_is_no_more_than_any_slot_has_shown_meanwhile() -> None:
    """An idle slot keeps the tokens of its last task, with the prompt."""
    assert whole(([OTHER, OWN], None)).most == 900
    assert whole(([slot(40), {"id": 1, "is_processing": False}], None)).most == 40  # it has had no task
    assert whole(([slot(40), idle(3, 0)], None)).most == inf
    assert whole(([slot(40), idle(3, 99)], None), ([slot(50)], None)).most == 100
    assert whole(([slot(40)], None), ([slot(120)], None)).most == 120
    assert whole().most is None
    assert whole(([], None)).most is None


def test_a_stream_may_be_that_which_hides_tokens() -> None:
    assert shown(([OTHER, OWN], True)) == Shown(False, Span(50, 400), Span(7, inf))


def test_the_first_look_that_says_something_shows_which_slots_may_be_its_own() -> None:
    assert shown(([OTHER, OWN], None)) == Shown(False)
    assert shown(([OTHER], None), ([OTHER, OWN], False)).prompt == Span(400, 400)
    assert shown(([OTHER, OWN], False), ([slot(7, task=8, prompt=3), OWN], False)).prompt == Span(400, 400)


def test_each_slot_of_a_stream_with_several_answers_has_its_share_of_the_events() -> None:
    own = [slot(7, task=4, prompt=400), slot(8, task=5, prompt=400)]
    seen = shown(([OTHER, *own], False), events=StreamEvents(15, 2))
    assert seen == Shown(True, Span(400, 400), Span(7, inf))


def test_it_ends_once_it_has_come_and_its_slot_is_released_in_any_order() -> None:
    ended: list[Shown] = []
    first, second = LeftStream(lambda: 0, ended.append), LeftStream(lambda: 0, ended.append)
    first.end()
    second.note_end()
    assert ended == []
    first.note_end()
    second.end()
    assert ended == [Shown(False), Shown(False)]


def test_the_first_look_is_due_at_once() -> None:
    stream = LeftStream(lambda: 0, lambda shown: None)
    assert stream.pause_s == 0.0
    for _ in range(3):
        stream.look([], SEVEN, None, 1.0)
        assert stream.pause_s == 0.05
    stream.look([], SEVEN, None, 1.0)
    assert stream.pause_s > 60
    stream = LeftStream(lambda: 0, lambda shown: None)
    stream.look([], SEVEN, False, 1.0)
    assert stream.pause_s > 60


def test_what_a_request_has_had_is_no_more_than_what_any_slot_shows() -> None:
    assert most_decoded([slot(4), slot(0), slot(900, busy=False)]) == 4
    assert most_decoded([slot(900, busy=False)]) == 0
    assert most_decoded([SHOWS_NONE, SHOWS_NONE]) is most_decoded([]) is None


def test_a_slot_of_a_version_that_shows_no_tokens_bounds_nothing() -> None:
    assert whole(([slot(40), SHOWS_NONE], None)).most == inf


# --- What other keys hide ---

HIDING = StreamEvents(
    1268, sent_s=9.0, begun_s=10.0
)  # half characters: a stream that has generated four tokens for each event
SLOW = StreamEvents(60, sent_s=12.4, begun_s=12.5)
VICTIM = StreamEvents(12, sent_s=12.9, begun_s=13.0)
THREE = [slot(14, task=10472, prompt=2), slot(61, task=10466, prompt=2), slot(5074, task=5452, prompt=2)]


def test_the_slot_of_a_stream_follows_from_its_place_in_the_order_in_which_streams_began() -> None:
    streams = [VICTIM, HIDING, SLOW]
    idle_ones = [idle(5000, 900), slot(0, task=7, streamed=False), {"id": 4, "is_processing": True}]
    found = [peers_of(each, [*THREE, *idle_ones], streams) for each in streams]
    assert found == [Peers([THREE[0]], False), Peers([THREE[2]], True), Peers([THREE[1]], False)]


def test_several_slots_of_one_stream_follow_each_other() -> None:
    pair, own = StreamEvents(50, 2, 9.9, 10.0), StreamEvents(300, 1, 10.9, 11.0)
    slots = [slot(300, task=9), slot(25, task=8), slot(25, task=7)]
    assert peers_of(own, slots, [pair, own]) == Peers([slots[0]], False)
    assert peers_of(pair, slots, [own, pair]) == Peers([slots[2], slots[1]], False)


def test_of_streams_that_began_at_once_it_is_not_known_which_slot_is_whose() -> None:
    twin = VICTIM._replace(sent_s=12.99, begun_s=13.04)
    found = peers_of(VICTIM, [slot(13, task=10480), *THREE], [VICTIM, HIDING, SLOW, twin])
    assert found == Peers([THREE[0], slot(13, task=10480)], False)


def test_answers_may_begin_in_another_order_than_that_of_the_tasks() -> None:
    """llama-server reads three long prompts: the stream that got its task first begins last."""
    slots = [slot(3, task=3538, prompt=2), *(slot(3, task=task, prompt=2503) for task in (3539, 3540, 3541))]
    own = StreamEvents(3, sent_s=0.02, begun_s=0.49)
    others = [StreamEvents(3, sent_s=0.0, begun_s=begun_s) for begun_s in (0.374, 0.412, 0.449)]
    assert peers_of(own, slots, [own, *others]) == Peers(slots, False)
    assert most_total_of(own, [idle(3538, 9), *slots[1:]], others) == 10


def test_streams_that_overlap_with_one_that_does_are_peers_too() -> None:
    own, between = StreamEvents(3, sent_s=2.0, begun_s=2.1), StreamEvents(30, sent_s=0.5, begun_s=2.05)
    early, first = StreamEvents(60, sent_s=0.9, begun_s=1.0), StreamEvents(90, sent_s=0.1, begun_s=0.2)
    slots = [slot(90, task=1), slot(30, task=2), slot(60, task=3), slot(3, task=4)]
    assert peers_of(own, slots, [own, between, early, first]) == Peers(slots[1:], False)


def test_the_order_says_nothing_if_a_stream_is_not_at_work_or_does_not_fit() -> None:
    assert peers_of(VICTIM, THREE[:2], [VICTIM, HIDING, SLOW]) is None
    assert peers_of(VICTIM, THREE, [VICTIM, HIDING]) is None
    has_more = VICTIM._replace(events=40)
    assert peers_of(has_more, THREE, [has_more, HIDING, SLOW]) is None


def test_what_another_stream_hides_is_not_taken_for_its_own() -> None:
    """Of all streams together, one has hidden tokens. Its own slot has 14 tokens, and shows that they are all."""
    ended: list[Shown] = []
    stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
    peers = peers_of(VICTIM, THREE, [VICTIM, HIDING, SLOW])
    stream.look(THREE, VICTIM, True, 1.0)  # the order said nothing yet
    stream.look(THREE, VICTIM, True, 2.0, peers=peers)
    stream.look(THREE, VICTIM, True, 3.0)
    stream.look([*THREE[1:], idle(10472, 17)], VICTIM, True, 3.5)
    stream.note_end()
    stream.end()
    assert ended == [Shown(True, Span(2, 2), Span(16, 16), 5074)]


def test_what_it_hides_itself_is_found_although_the_sums_do_not_show_it() -> None:
    """Others have thousands of tokens, of which an eighth may be on its way."""
    ended: list[Shown] = []
    stream = LeftStream(lambda: 3, ended.append, 12.9, 13.0)
    peers = Peers([slot(200, task=9, prompt=2)], True)
    stream.look([slot(9000, task=5), *peers.slots], StreamEvents(3), False, 1.0, peers=peers)
    stream.note_end()
    stream.end()
    assert ended == [Shown(False, Span(2, 2), Span(200, inf), 9000)]


def test_slots_that_are_at_work_after_its_connection_has_ended_still_show_its_tokens() -> None:
    """A step of llama-server's may take so long that the first look comes after that end."""
    ended: list[Shown] = []
    stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
    stream.note_end()
    peers = Peers([THREE[0]], False)
    stream.look(THREE, VICTIM, True, 1.0, peers=peers)
    stream.look(THREE, VICTIM, True, 1.1, peers=Peers([THREE[1]], True))  # another task has followed
    stream.end()
    assert ended == [Shown(True, Span(2, 2), Span(14, inf), 5074)]


@pytest.mark.parametrize(
    ("ended", "whole"),
    [
        ([idle(10472, 29)], 30),
        ([idle(10472, 29), idle(10480, 90)], 91),  # a younger one may have ended, too
        ([idle(10472, 29), idle(4000, 9000), slot(0, busy=False, streamed=False, task=10473, kept=9000)], 30),
        ([idle(10472, 29), {"id": 3, "is_processing": False}], 30),
        ([idle(10472, 29), idle(10480, 0)], None),  # it was emptied
        ([idle(4000, 29)], None),  # its slot has another task
        ([slot(14, task=10472)], None),  # it is still at work, or another one is
    ],
)
def test_a_slot_that_has_ended_before_the_first_look_bounds_the_tokens(
    ended: list[ListedSlot], whole: int | None
) -> None:
    assert most_total_of(VICTIM, [*ended, *THREE[1:]], [SLOW, HIDING]) == whole


def test_the_slot_of_a_stream_that_has_ended_had_its_task_between_those_of_its_neighbours() -> None:
    younger = StreamEvents(3, sent_s=13.9, begun_s=14.0)
    slots = [idle(10472, 29), idle(10500, 9000), slot(3, task=10490), THREE[2]]
    assert most_total_of(VICTIM, slots, [younger, HIDING]) == 30
    assert (
        most_total_of(VICTIM, slots, [younger._replace(sent_s=12.99, begun_s=13.01), HIDING]) == 9001
    )  # it may be older
    assert most_total_of(StreamEvents(12, 2, 12.9, 13.0), slots, [younger, HIDING]) is None


def test_only_the_first_look_can_show_a_slot_that_has_ended() -> None:
    for wholes, whole in (((30, 9000), 30), ((None, 30), None)):
        ended: list[Shown] = []
        stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
        stream.note_end()
        for each in wholes:
            stream.look(THREE[1:], VICTIM, None, 1.0, most_total=each)
        stream.end()
        assert ended == [Shown(False, most=5074, most_total=whole)]


def test_what_it_was_seen_to_have_had_counts_more_than_what_slots_that_have_ended_keep() -> None:
    ended: list[Shown] = []
    stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
    stream.note_end()
    stream.look(THREE, VICTIM, None, 1.0, most_total=9)
    stream.look(THREE, VICTIM, None, 1.1, peers=Peers([THREE[0]], False))
    stream.end()
    assert ended[0].most_total is None


def test_whether_its_slot_may_be_reused_is_asked_at_the_first_look() -> None:
    ended: list[Shown] = []
    answers = iter([True])
    stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0, may_be_reused=lambda: next(answers))
    stream.look(THREE, VICTIM, None, 1.0)
    stream.look(THREE, VICTIM, None, 1.1)
    stream.note_end()
    stream.end()
    assert ended[0].may_be_reused
