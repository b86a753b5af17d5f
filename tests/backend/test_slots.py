"""slots.py: the number of slots, and when the slot of a cancelled request is released."""

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any

import pytest

from backend.fetch import PageTooLong
from backend.generation_watch import AtWork, Generated, GenerationWatch, GivenUp
from backend.left_stream import LeftStream, Shown, Span
from backend.slots import SlotReclaimer, UnfitBackend, fetch_slots, total_slots
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError, Kind
from policy.fair_queue import FairQueue, Ticket
from support.clock import Clock
from support.gateway import until
from support.memory_transport import run

Reply = int | Kind | GatewayError | tuple[int, bytes]
UNREADABLE: list[Reply] = [
    (501, b"[]"),
    (200, b"{}"),
    (200, b"[1]"),
    (200, b"["),
    (200, b"[" * 100_000),
    BACKEND_MALFORMED,
]


class Backend:
    """Responds as scripted: with this many busy slots, with an error, or with a status and a body.

    The last reply is repeated.
    """

    def __init__(self, *replies: Reply) -> None:
        self._replies = list(replies)
        self.polls = 0

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        self.polls += 1
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, Kind):
            raise GatewayError(reply)
        if isinstance(reply, GatewayError):
            raise reply
        if isinstance(reply, tuple):
            return reply
        assert target == b"/slots"
        return 200, json.dumps([{"is_processing": True}] * reply + [{"is_processing": False}]).encode()


# --- The number of slots ---


@pytest.mark.parametrize(
    ("reply", "slots"),
    [
        ((200, b'{"total_slots": 4}'), 4),
        ((200, b'{"total_slots": 0}'), 1),
        ((200, b'{"total_slots": 4097}'), 1),
        ((200, b'{"total_slots": true}'), 1),
        ((200, b'{"total_slots": "4"}'), 1),
        ((200, b"{}"), 1),
        ((200, b"[4]"), 1),
        ((200, b"no JSON"), 1),
        ((404, b'{"total_slots": 4}'), 1),
        (BACKEND_UNAVAILABLE, 1),
        (BACKEND_MALFORMED, 1),
    ],
)
def test_total_slots_is_read_from_props(reply: Reply, slots: int) -> None:
    assert asyncio.run(total_slots(Backend(reply).fetch)) == slots


def test_a_backend_that_refuses_the_gateways_key_is_unfit() -> None:
    unauthorized = (401, b'{"error":{"message":"Invalid API Key"}}')
    with pytest.raises(UnfitBackend, match="BACKEND_API_KEY is not its --api-key"):
        asyncio.run(total_slots(Backend(unauthorized).fetch))
    with pytest.raises(ValueError, match=r"^$"):
        asyncio.run(fetch_slots(Backend(unauthorized).fetch))


def test_all_slots_are_listed() -> None:
    assert len(asyncio.run(fetch_slots(Backend(3).fetch))) == 4


@pytest.mark.parametrize("reply", UNREADABLE)
def test_a_backend_that_does_not_report_its_slots_is_a_value_error(reply: Reply) -> None:
    with pytest.raises(ValueError, match=r"^(not a list of slots|no such page|nested too deeply|Expecting value.*)$"):
        asyncio.run(fetch_slots(Backend(reply).fetch))


def test_a_backend_that_does_not_respond_is_a_gateway_error() -> None:
    with pytest.raises(GatewayError):
        asyncio.run(fetch_slots(Backend(BACKEND_TIMEOUT).fetch))


# --- Cancelled requests ---


class Cancelled:
    """A queue, and cancelled requests whose slots are reclaimed."""

    def __init__(self, backend: Backend, timeout_s: float = 3600.0) -> None:
        self.queue = FairQueue(8, 0, Clock())
        self.backend = backend
        self.at_work: list[AtWork] = []
        self.reclaimer = SlotReclaimer(backend.fetch, lambda: self.at_work, timeout_s)

    def cancel(self, *, streamed: bool = True) -> Ticket:
        ticket = self.queue.acquire("alice")
        self.reclaimer.release(ticket, streamed=streamed)
        return ticket

    async def released(self, left: int = 0) -> None:
        """Wait until all slots but so many are released. Give up after many polls: each test needs a few."""
        most = self.backend.polls + 40
        await until(lambda: self.queue.active == left or self.backend.polls > most)
        assert self.queue.active == left, "a slot is held that the backend does not work on any more"


def test_slots_are_released_as_the_backend_stops_working_on_them() -> None:
    async def play() -> None:
        backend = Backend(3, 3, 2, 1)
        cancelled = Cancelled(backend)
        cancelled.at_work = [AtWork(0.0, 1, is_awaited=False)]
        cancelled.cancel()
        cancelled.cancel(streamed=False)
        await until(lambda: backend.polls == 3)
        await cancelled.released(1)
        assert len(cancelled.reclaimer) == 1
        await cancelled.released()
        assert (backend.polls, len(cancelled.reclaimer)) == (4, 0)

    run(play())


def listed(*decoded: int | None) -> Reply:
    """Return a page of slots: busy ones of streams with so many tokens, and idle ones (None)."""
    slots = [
        {"is_processing": each is not None, "params": {"stream": True}, "next_token": [{"n_decoded": each or 0}]}
        for each in decoded
    ]
    return 200, json.dumps(slots).encode()


@pytest.mark.parametrize(
    ("own", "has_all"),
    [(40, True), (400, False)],
)
def test_a_stream_is_compared_with_what_all_slots_show_at_once(own: int, has_all: bool) -> None:
    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 40, ended.append)
        backend = Backend(listed(own, 300, 0), listed(None, 300, 0))
        cancelled = Cancelled(backend)
        cancelled.at_work = [AtWork(0.0, 1, is_awaited=False, events=300), AtWork(0.0, 1)]
        cancelled.reclaimer.release(cancelled.queue.acquire("alice"), streamed=True, stream=stream)
        await until(lambda: backend.polls == 1)
        stream.note_end()
        await cancelled.released()
        assert ended[0].has_all_in_events is has_all

    run(play())


@pytest.mark.parametrize("events", [0, 3])
@pytest.mark.parametrize(("is_at_work", "prompt"), [(True, Span(35, 9000)), (False, None)])
def test_a_stream_that_has_just_begun_has_no_slot_of_one_that_has_not(
    events: int, is_at_work: bool, prompt: Span | None
) -> None:
    """Its own slot may be idle by then."""

    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: events, ended.append)
        own, other = busy(5, 0, stream=True), busy(6, 0, stream=True)
        own |= {"is_processing": is_at_work, "n_prompt_tokens_processed": 35}
        slots = [own, {**other, "n_prompt_tokens_processed": 9000}]
        await leave(stream, [(200, json.dumps(slots).encode()), 0], [AtWork(0.0, 1)])
        assert ended[0].prompt == prompt

    run(play())


@pytest.mark.parametrize(
    ("keys", "prompts"),
    [
        (("alice", "alice"), {Span(35, 35), Span(9000, 9000)}),
        (("alice", "bob"), {Span(35, 9000)}),
        (("alice",), {Span(35, 9000)}),
    ],
)
def test_streams_of_one_key_that_may_have_the_same_slots_have_one_each(
    keys: tuple[str, ...], prompts: set[Span]
) -> None:
    async def play() -> None:
        ended: list[Shown] = []
        slots = [
            {**busy(task, 0, stream=True), "n_prompt_tokens_processed": read} for task, read in ((5, 35), (6, 9000))
        ]
        backend = Backend((200, json.dumps(slots).encode()), 0)
        cancelled = Cancelled(backend)
        cancelled.at_work = [AtWork(0.0, 1)] * (2 - len(keys))
        streams = [LeftStream(lambda: 0, ended.append) for _ in keys]
        for key, stream in zip(keys, streams, strict=True):
            cancelled.reclaimer.release(cancelled.queue.acquire(key), streamed=True, stream=stream)
        await until(lambda: backend.polls == 1)
        for stream in streams:
            stream.note_end()
        await cancelled.released()
        assert {shown.prompt for shown in ended} == prompts

    run(play())


def test_a_stream_whose_connection_has_ended_is_not_looked_for_in_the_slots() -> None:
    """Its slot may be idle, while it is not certain yet whose that is."""

    async def play() -> None:
        ended: list[Shown] = []
        before, stream = LeftStream(lambda: 300, lambda shown: None), LeftStream(lambda: 40, ended.append)
        await leave(stream, [listed(None, 40), listed(None, None)], [], before=before)
        assert ended[0].has_all_in_events

    run(play())


@pytest.mark.parametrize("has_come", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_the_tokens_that_another_key_hides_are_not_those_of_a_stream_that_began_later(
    has_come: bool, is_shared: bool
) -> None:
    """Unless another program uses the backend: its tasks may have come between."""

    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
        slots = [busy(5452, 5074, stream=True), busy(10466, 61, stream=True), busy(10472, 14, stream=True)]
        foreign = [busy(7, 0)] * is_shared
        pages = [(200, json.dumps([*slots, *foreign]).encode()), (200, json.dumps(slots[:2]).encode())]
        hiding = AtWork(9.0, 1, is_awaited=False, events=1268, begun_s=10.0)
        at_work = [AtWork(12.4, 1, is_awaited=False, events=60, begun_s=12.5), hiding]
        await leave(stream, pages, at_work, has_come=has_come)
        assert ended[0].has_all_in_events is not is_shared
        assert ended[0].generated == (None if is_shared else Span(14, inf))

    run(play())


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_stream_that_is_not_read_may_be_at_work_no_more(has_ended: bool) -> None:
    """Else its key would hide tokens of other streams beside it."""

    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 12, ended.append, 12.9, 13.0)
        slots = [{**busy(5452, 900, stream=True), "is_processing": not has_ended}, busy(10472, 300, stream=True)]
        pages = [(200, json.dumps(slots).encode()), (200, json.dumps(slots[:1]).encode())]
        await leave(stream, pages, [AtWork(9.0, 1, is_awaited=False, events=800, begun_s=10.0, is_unread=True)])
        assert ended[0].generated == Span(300, inf)

    run(play())


@pytest.mark.parametrize(("has_come", "most_total"), [(True, 30), (False, None)])
def test_a_slot_that_has_ended_before_the_first_look_is_found_by_its_task(
    has_come: bool, most_total: int | None
) -> None:
    """A step under a slow grammar takes longer than to notice that the client has left."""

    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 28, ended.append, 12.9, 13.0)
        own = {**busy(13907, 0, stream=True), "is_processing": False, "n_prompt_tokens": 29}
        pages = [(200, json.dumps([busy(10575, 3358, stream=True), own]).encode())]
        at_work = [AtWork(9.0, 1, is_awaited=False, events=839, begun_s=10.0)]
        await leave(stream, pages, at_work, has_come=has_come)
        assert ended[0].most_total == most_total

    run(play())


def test_the_last_events_of_several_answers_do_not_hide_the_tokens_that_a_page_was_too_old_to_show() -> None:
    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 313, ended.append, 12.9, 13.0)
        slots = [busy(task, 90, stream=True) for task in (5, 6, 7, 8)]
        backend = Backend((200, json.dumps(slots).encode()), (200, b"[]"))
        cancelled = Cancelled(backend)
        stream.note_end()
        ticket = cancelled.queue.acquire("alice", slots=4)
        cancelled.reclaimer.release(ticket, streamed=True, stream=stream)
        await cancelled.released()
        assert not ended[0].has_all_in_events

    run(play())


def test_the_slot_of_a_stream_that_has_ended_is_not_looked_for_among_those_of_the_others() -> None:
    async def play() -> None:
        shown: dict[str, Shown] = {}
        before = LeftStream(lambda: 40, lambda each: shown.update(before=each), 10.9, 11.0)
        stream = LeftStream(lambda: 12, lambda each: shown.update(stream=each), 12.9, 13.0)
        slots = [busy(5, 5000, stream=True), busy(9, 14, stream=True)]
        pages = [(200, json.dumps(slots).encode()), (200, json.dumps(slots[:1]).encode())]
        await leave(stream, pages, [AtWork(9.0, 1, is_awaited=False, events=1268, begun_s=10.0)], before=before)
        assert (shown["before"].generated, shown["stream"].generated) == (None, Span(14, inf))

    run(play())


def test_a_look_that_is_too_long_ago_says_nothing_if_the_backend_does_not_list_its_slots_any_more() -> None:
    async def play() -> None:
        ended: list[Shown] = []
        stream = LeftStream(lambda: 40, ended.append)
        backend = Backend(listed(40), *[BACKEND_UNAVAILABLE] * 60, listed(None))
        cancelled = Cancelled(backend)
        connection = Line()
        cancelled.reclaimer.release(
            cancelled.queue.acquire("alice"), streamed=True, stream=stream, connection=connection
        )
        await until(lambda: backend.polls == 40)
        stream.note_end()
        connection.ended = True
        await until(lambda: cancelled.queue.active == 0)
        assert not ended[0].has_all_in_events

    run(play())


def test_the_slots_are_looked_at_as_soon_as_a_stream_is_left() -> None:
    """Its slot may have the next request a moment later. This clock moves on only if all wait."""

    async def play() -> None:
        backend = Backend(listed(40, 0))
        cancelled, loop = Cancelled(backend), asyncio.get_running_loop()
        for number in (1, 2):
            begun_s, polls = loop.time(), backend.polls
            stream = LeftStream(lambda: 40, lambda shown: None)
            ticket = cancelled.queue.acquire("alice")
            cancelled.reclaimer.release(ticket, streamed=True, stream=stream, connection=Line())
            await until(lambda polls=polls: backend.polls > polls)  # type: ignore[misc]
            assert loop.time() - begun_s < 0.05, number
            await asyncio.sleep(5)  # another poll is awaited now
        await cancelled.reclaimer.close()

    run(play())


def test_what_was_not_found_has_had_no_more_than_any_slot_shows() -> None:
    async def play() -> None:
        ended: list[Generated] = []
        backend = Backend(listed(0, 7), listed(0, 7), listed(None, 9))
        cancelled = Cancelled(backend)
        cancelled.at_work = [AtWork(0.0, 1, is_awaited=False, events=7)]
        connection = Line()
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
        ticket = cancelled.queue.acquire("alice")
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch, connection=connection)
        await until(lambda: backend.polls == 2)
        connection.ended = True
        await cancelled.released()
        assert ended == [Generated(None, None, False, 1, 7)]

    run(play())


KEEPS = [{"id_task": 3, "is_processing": False, "n_prompt_tokens": tokens} for tokens in (40, 90, 60)]


@pytest.mark.parametrize(
    ("looks", "most"),
    [
        ([KEEPS[:1], KEEPS[1:2], KEEPS[2:]], 90),
        ([KEEPS[:1], [{"id_task": 3}], KEEPS[2:]], None),  # an older version
        ([KEEPS[:1], KEEPS[1:2], None], None),  # it may have gone on since the last look
    ],
)
def test_a_prompt_that_was_not_found_has_no_more_tokens_than_any_slot_keeps(
    looks: list[list[dict[str, Any]] | None], most: int | None
) -> None:
    async def play() -> None:
        generated, shown = list[Generated](), list[Shown]()
        replies = [(200, json.dumps(slots).encode()) if slots else BACKEND_UNAVAILABLE for slots in looks]
        backend, connection = Backend(*replies), Line()
        cancelled = Cancelled(backend, 2.0)
        cancelled.at_work = [AtWork(0.0, 1), AtWork(0.0, 1)]
        watch, stream = GenerationWatch(FIRST, generated.append), LeftStream(lambda: 0, shown.append)
        for each in ({"watch": watch}, {"stream": stream}):
            ticket = cancelled.queue.acquire("alice")
            cancelled.reclaimer.release(ticket, streamed=False, connection=connection, **each)  # type: ignore[arg-type]
        await until(lambda: backend.polls == 2)
        connection.ended = True
        stream.note_end()
        await cancelled.released()
        assert (generated[0].prompt, generated[0].most_prompt) == (None, most)
        assert (shown[0].prompt, shown[0].most_prompt) == (None, most)

    run(play())


@pytest.mark.parametrize("kind", [BACKEND_TIMEOUT, BACKEND_UNAVAILABLE])
def test_a_backend_that_is_too_busy_to_respond_is_polled_again(kind: Kind) -> None:
    """While it processes a long prompt, /slots takes long. It may still be working on cancelled requests."""

    async def play() -> None:
        backend = Backend(kind, kind, 1, 0)
        cancelled = Cancelled(backend)
        cancelled.cancel()
        await until(lambda: backend.polls == 3)
        assert cancelled.queue.active == 1
        await cancelled.released()
        cancelled.cancel()
        await cancelled.released()
        assert backend.polls == 5

    run(play())


@pytest.mark.parametrize("reply", UNREADABLE)
def test_a_backend_that_does_not_report_its_slots_is_polled_once(reply: Reply) -> None:
    async def play() -> None:
        backend = Backend(reply)
        cancelled = Cancelled(backend)
        cancelled.cancel()
        await cancelled.released()
        cancelled.cancel()
        assert cancelled.queue.active == 0
        assert backend.polls == 1
        cancelled.reclaimer.reset()
        cancelled.cancel()
        await cancelled.released()
        assert backend.polls == 2

    run(play())


def test_each_slot_is_released_after_the_timeout() -> None:
    async def play() -> None:
        backend = Backend(8)
        cancelled = Cancelled(backend, timeout_s=0.5)
        clock = asyncio.get_running_loop().time
        first = cancelled.cancel()
        await until(lambda: backend.polls == 1)
        second_s, second = clock(), cancelled.cancel()
        await until(lambda: not first.running)
        assert second.running
        await until(lambda: not second.running)
        assert clock() - second_s >= 0.5

    run(play())


def test_close_releases_all_slots() -> None:
    async def play() -> None:
        cancelled = Cancelled(Backend(8))
        await cancelled.reclaimer.close()
        cancelled.cancel()
        await cancelled.reclaimer.close()
        assert cancelled.queue.active == 0

    run(play())


def test_how_much_a_slot_can_hold_is_known_once_the_slots_were_listed() -> None:
    async def play() -> None:
        slots = [{"n_ctx": size, "is_processing": False} for size in (4096, 8192)]
        cancelled = Cancelled(Backend((200, json.dumps(slots).encode()), BACKEND_UNAVAILABLE))
        assert cancelled.reclaimer.context is None
        cancelled.cancel()
        await cancelled.released()
        assert cancelled.reclaimer.context == 8192
        cancelled.reclaimer.reset()
        assert cancelled.reclaimer.context is None

    run(play())


def at_work(task: int, tokens: int, *others: int) -> Reply:
    """The reply that lists a task with so many tokens, and others that are at work."""
    slots = [
        {"id": each, "id_task": each, "is_processing": True, "next_token": [{"n_decoded": tokens}]}
        for each in (task, *others)
    ]
    return 200, json.dumps(slots).encode()


def test_a_slot_that_is_seen_at_work_is_held_beyond_the_timeout() -> None:
    """The results of other requests keep llama-server from noticing that the client has left."""

    async def play() -> None:
        backend = Backend(*[at_work(5, tokens) for tokens in range(5)], 0)
        cancelled = Cancelled(backend, timeout_s=2.0)
        clock = asyncio.get_running_loop().time
        began_s, ticket = clock(), cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: not ticket.running)
        assert (backend.polls, clock() - began_s > 2) == (6, True)

    run(play())


def test_slots_that_show_no_tokens_say_nothing_of_a_request_that_was_given_up() -> None:
    ended: list[Generated] = []

    async def play() -> None:
        backend, connection = Backend(1, 1, 0), Line()
        cancelled = Cancelled(backend)
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch, connection=connection)
        await until(lambda: backend.polls == 2)
        connection.ended = True
        await cancelled.released()

    run(play())
    assert ended == [Generated(None, None, False, 1)]


def look_twice(slots: list[dict[str, Any]], at_work: list[AtWork], *given_up: GivenUp) -> list[Generated]:
    """Give these requests up, with these slots listed at the first looks and none later; return what is reported.

    Each slot has 20 tokens more at the second look, and so 105 more are expected of it until it stops.
    """
    ended: dict[float, Generated] = {}

    async def play() -> None:
        later = [{**slot, "next_token": [{"n_decoded": slot["next_token"][0]["n_decoded"] + 20}]} for slot in slots]
        backend = Backend(*[(200, json.dumps(each).encode()) for each in (slots, later)], 0)
        cancelled = Cancelled(backend)
        cancelled.at_work = list(at_work)
        for request in given_up:
            ticket = cancelled.queue.acquire("bob", slots=request.at_once)
            watch = GenerationWatch(request, partial(ended.__setitem__, request.sent_s))
            cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: len(ended) == len(given_up))

    run(play())
    return [ended[request.sent_s] for request in given_up]


def busy(task: int, tokens: int, *, stream: bool = False) -> dict[str, Any]:
    params = {"stream": stream}
    return {"id": task, "id_task": task, "is_processing": True, "params": params, "next_token": [{"n_decoded": tokens}]}


async def leave(
    stream: LeftStream,
    pages: Sequence[Reply],
    at_work: Sequence[AtWork],
    *,
    has_come: bool = False,
    before: LeftStream | None = None,
) -> None:
    """Let a stream be left beside others that are at work; `has_come`: all of it has come before the first look.

    `before` is a stream that was left before, and has come.
    """
    backend, connection = Backend(*pages), Line()
    cancelled = Cancelled(backend)
    cancelled.at_work = list(at_work)
    if has_come:
        stream.note_end()
    if before is not None:
        before.note_end()
    for each in filter(None, (before, stream)):
        ticket = cancelled.queue.acquire("alice")
        cancelled.reclaimer.release(ticket, streamed=True, stream=each, connection=connection)
    await until(lambda: backend.polls == 1)
    stream.note_end()
    connection.ended = True
    await cancelled.released()


FIRST, SECOND = GivenUp(1, 1.0, 1.0), GivenUp(1, 2.0, 1.0)


def test_tasks_are_assigned_in_the_order_in_which_their_requests_were_sent() -> None:
    slots = [busy(9, 4000), busy(5, 1000), busy(7, 2000)]
    first, last = look_twice(slots, [AtWork(2.0, 1)], FIRST, GivenUp(1, 3.0, 1.0))
    assert (first.tokens, last.tokens) == (1125, 4125)
    (two,) = look_twice(slots, [AtWork(2.0, 1)], GivenUp(2, 3.0, 1.0, at_once=2))
    assert two.tokens == 2125 + 4125


def test_streams_that_have_begun_are_nobody_that_is_waited_for() -> None:
    slots = [busy(4, 7, stream=True), busy(5, 1000), busy(6, 0, stream=True)]
    others = [AtWork(0.0, 1, is_awaited=False), AtWork(2.0, 1)]
    (ended,) = look_twice(slots, others, FIRST)
    assert ended.tokens == 1125


@pytest.mark.parametrize("at_work", [[AtWork(0.5, 1)], [AtWork(0.5, 2)]], ids=["one has not begun", "two have not"])
def test_nothing_is_assigned_while_a_request_may_not_have_begun(at_work: list[AtWork]) -> None:
    """The one task may be the other request's: its client would be charged somebody else's tokens."""
    assert look_twice([busy(5, 100)], at_work, FIRST) == [Generated(None, None, False)]


def test_what_is_at_work_for_the_only_one_is_its_own_though_a_part_has_ended() -> None:
    (ended,) = look_twice([busy(5, 1000)], [], GivenUp(2, 1.0, 1.0, at_once=2))
    assert ended.tokens == 1125 + 1000


def test_a_task_that_is_known_is_assigned_to_no_other_request() -> None:
    """And the only other one is certainly the next one's."""
    read = {"n_prompt_tokens_processed": 10, "n_prompt_tokens": 1009}
    idle = [{**busy(task, 0), **read, "is_processing": False} for task in (5, 6)]
    looks = [[{**busy(5, 50), **read}]] * 2 + [[{**busy(task, 60), **read} for task in (5, 6)]] * 2 + [idle]

    async def play() -> None:
        backend, ended = Backend(*[(200, json.dumps(each).encode()) for each in looks]), list[Generated]()
        cancelled = Cancelled(backend)
        for polls, request in ((2, FIRST), (4, SECOND)):
            watch = GenerationWatch(request, ended.append)
            cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch)
            await until(lambda polls=polls: backend.polls >= polls)  # type: ignore[misc]
        await cancelled.released()
        assert ended == [Generated(1000, 10, True)] * 2

    run(play())


def test_nothing_is_assigned_while_another_program_uses_the_backend() -> None:
    assert look_twice([busy(5, 100), busy(6, 100)], [], FIRST) == [Generated(None, None, False)]
    first, second = look_twice([busy(5, 1000), busy(6, 2000)], [], FIRST, SECOND)
    assert (first.tokens, second.tokens) == (1125, 2125)


def test_the_one_cancelled_first_is_released_first_while_it_is_not_known_whose_slot_is_busy() -> None:
    """The one that is cancelled last may be the one at work: its slot would be given to another request."""

    async def play() -> None:
        cancelled = Cancelled(Backend(2))
        first, second = cancelled.cancel(streamed=False), cancelled.cancel()
        watch = GenerationWatch(FIRST, lambda _: None)  # for which the backend is polled at once, and soon again
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch)
        await until(lambda: not (first.running and second.running))
        assert second.running

    run(play())


def test_a_stream_with_several_tasks_is_held_for_as_long_as_one_of_them_may_not_have_begun() -> None:
    async def play() -> None:
        cancelled = Cancelled(Backend(0))
        clock = asyncio.get_running_loop().time
        began_s, ticket = clock(), cancelled.queue.acquire("alice", slots=2)
        cancelled.reclaimer.release(ticket, streamed=True)
        await until(lambda: not ticket.running)
        assert clock() - began_s >= 1.2

    run(play())


def test_what_was_only_assigned_is_held_while_a_slot_is_busy_that_may_be_its_own() -> None:
    """Of two requests of the same kind the other one's task may have been taken for its own."""

    async def play() -> None:
        idle = {**busy(5, 0), "is_processing": False}
        looks = [[busy(5, 9), busy(6, 9)], [busy(5, 10), busy(6, 10)], [idle, busy(6, 20)], [idle, busy(6, 30)], []]
        backend = Backend(*[(200, json.dumps(each).encode()) for each in looks])
        cancelled = Cancelled(backend, timeout_s=3600.0)
        cancelled.at_work = [AtWork(2.0, 1)]
        ticket = cancelled.queue.acquire("bob")
        cancelled.reclaimer.release(ticket, streamed=False, watch=GenerationWatch(FIRST, lambda _: None))
        await until(lambda: backend.polls == 2)
        cancelled.at_work = []  # the other one has been answered
        await until(lambda: backend.polls == 4)
        assert ticket.running
        await cancelled.released()

    run(play())


def test_a_request_that_is_known_to_have_ended_stands_for_no_other_ones_slot() -> None:
    async def play() -> None:
        idle = {**busy(5, 0), "is_processing": False}
        stream = busy(8, 5, stream=True)
        looks = [[busy(5, 9), stream], [idle, stream], [idle, stream], [idle, stream], []]
        backend = Backend(*[(200, json.dumps(each).encode()) for each in looks])
        cancelled = Cancelled(backend)
        other = cancelled.cancel()
        ticket = cancelled.queue.acquire("bob")
        cancelled.reclaimer.release(ticket, streamed=False, watch=GenerationWatch(FIRST, lambda _: None))
        await until(lambda: not ticket.running)
        await until(lambda: backend.polls == 4)
        assert other.running
        await cancelled.released()

    run(play())


def test_what_is_not_seen_any_more_is_held_no_longer() -> None:
    async def play() -> None:
        backend = Backend(at_work(5, 1), at_work(5, 2), BACKEND_TIMEOUT)
        cancelled = Cancelled(backend, timeout_s=2.0)
        ticket = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: not ticket.running or backend.polls > 20)
        assert not ticket.running

    run(play())


def test_a_task_of_the_backends_next_process_holds_no_slot() -> None:
    async def play() -> None:
        backend = Backend(at_work(5, 1))
        cancelled = Cancelled(backend, timeout_s=2.0)
        ticket = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: backend.polls > 3)
        assert ticket.running
        cancelled.reclaimer.reset()
        await until(lambda: not ticket.running or backend.polls > 20)
        assert not ticket.running

    run(play())


def test_a_slot_stays_held_though_the_backend_may_be_another_process() -> None:
    async def play() -> None:
        backend = Backend(at_work(5, 1), at_work(5, 2), at_work(5, 3), at_work(5, 4), at_work(5, 5), 0)
        cancelled = Cancelled(backend)
        ticket = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: backend.polls == 2)
        cancelled.reclaimer.reset()
        await until(lambda: backend.polls == 5)
        assert ticket.running
        await cancelled.released()

    run(play())


def test_the_slots_of_one_request_are_all_counted() -> None:
    async def play() -> None:
        cancelled = Cancelled(Backend(2))
        cancelled.at_work = [AtWork(0.0, 2, is_awaited=False)]
        cancelled.cancel()
        await cancelled.released()

    run(play())


def test_the_slot_that_is_at_work_is_held_not_the_oldest() -> None:
    async def play() -> None:
        both, one = at_work(5, 10, 6), at_work(6, 10)
        backend = Backend(both, both, both, both, one, one, 0)
        cancelled, ended = Cancelled(backend), list[str]()
        for key, sent_s in (("alice", 1.0), ("bob", 2.0)):
            ticket = cancelled.queue.acquire(key)
            watch = GenerationWatch(GivenUp(1, sent_s, 1.0), lambda _, key=key: ended.append(key))  # type: ignore[misc]
            cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await until(lambda: bool(ended))
        assert ended == ["alice"]
        await cancelled.released()
        assert ended == ["alice", "bob"]

    run(play())


def test_what_is_generated_for_a_cancelled_request_is_reported_before_its_slot_is_released() -> None:
    async def play() -> None:
        backend, ended = Backend(1, at_work(5, 10), at_work(5, 20), 0), list[tuple[Generated, int]]()
        cancelled = Cancelled(backend)
        cancelled.cancel()
        await until(lambda: backend.polls == 1)
        ticket = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda generated: ended.append((generated, ticket.slots)))
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch)
        await cancelled.released()
        ((generated, held),) = ended
        assert generated.tokens is not None
        assert (generated.tokens > 20, held) == (True, 1)

    run(play())


@pytest.mark.parametrize("polls", [0, 1])
def test_a_backend_that_does_not_report_its_slots_shows_no_tokens(polls: int) -> None:
    async def play() -> None:
        backend, ended = Backend((501, b"{}")), list[Generated]()
        cancelled = Cancelled(backend)
        for _ in range(polls):
            cancelled.cancel()
            await until(lambda: cancelled.queue.active == 0)
        ticket = cancelled.queue.acquire("bob")
        cancelled.reclaimer.release(ticket, streamed=False, watch=GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append))
        await until(lambda: cancelled.queue.active == 0)
        assert (ended, backend.polls) == ([Generated(None, None, False)], 1)

    run(play())


def test_a_backend_that_is_down_is_not_polled_without_a_pause() -> None:
    async def play() -> None:
        cancelled = Cancelled(Backend(BACKEND_UNAVAILABLE), 2.0)
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch)
        await cancelled.released()
        assert 1 < cancelled.backend.polls <= 2.0 / 0.2 + 2

    run(play())


# --- The connections of cancelled requests ---


class Line:
    """A connection that the backend ends when the test says so."""

    def __init__(self) -> None:
        self.ended = False


def test_after_a_second_a_stream_that_goes_on_is_looked_for_so_seldom_that_llama_server_notices() -> None:
    """It looks for a disconnect in a second without a result only, and its responses to GET /slots are results."""

    async def play() -> None:
        backend = Backend(1)
        cancelled, line = Cancelled(backend), Line()
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=True, connection=line)
        await asyncio.sleep(1.1)
        assert 4 <= backend.polls <= 6
        await asyncio.sleep(12.0)
        assert backend.polls <= 6 + 12 / 1.1
        line.ended = True
        cancelled.backend = Backend(0)
        await cancelled.reclaimer.close()

    run(play())


@pytest.mark.parametrize("reply", [0, (501, b"[]"), (500, b"[]"), PageTooLong()], ids=str)
def test_no_slot_is_released_while_its_request_may_still_begin(reply: Reply) -> None:
    """llama-server may take seconds to read a request, and only the end of the connection says that it will not."""

    async def play() -> None:
        cancelled = Cancelled(Backend(reply), timeout_s=2.0)
        clock, line = asyncio.get_running_loop().time, Line()
        first, began_s = cancelled.queue.acquire("alice"), clock()
        cancelled.reclaimer.release(first, streamed=False, connection=line)
        await asyncio.sleep(60)
        assert first.running
        second = cancelled.queue.acquire("bob")
        cancelled.reclaimer.release(second, streamed=False, connection=Line())
        line.ended = True
        await until(lambda: not first.running)
        assert (clock() - began_s < 70, second.running) == (True, True)
        await cancelled.reclaimer.close()
        assert cancelled.queue.active == 0

    run(play())


def test_what_begins_late_is_watched_and_its_slot_held_until_its_end() -> None:
    async def play() -> None:
        replies: list[Reply] = [0] * 8 + [at_work(5, 7), at_work(5, 40)]
        idle = {**busy(5, 40), "is_processing": False, "n_prompt_tokens": 60}
        backend = Backend(*replies, (200, json.dumps([idle]).encode()))
        cancelled, line, generated = Cancelled(backend), Line(), list[Generated]()
        ticket = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), generated.append)
        cancelled.reclaimer.release(ticket, streamed=False, watch=watch, connection=line)
        await until(lambda: backend.polls == 10)
        assert ticket.running
        line.ended = True
        await cancelled.released()
        (seen,) = generated
        assert (seen.tokens or 0) >= 40

    run(play())


def test_a_request_that_does_not_begin_is_looked_for_seldom() -> None:
    """Each look keeps llama-server from noticing for a second that the client of a whole answer has left."""

    async def play() -> None:
        cancelled = Cancelled(Backend(0))
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch, connection=Line())
        await asyncio.sleep(60)
        assert cancelled.backend.polls <= 6 + 60 / 1.2
        await cancelled.reclaimer.close()

    run(play())


@pytest.mark.parametrize("reply", [(500, b"[]"), (503, b"[]"), PageTooLong()], ids=str)
def test_one_page_that_cannot_be_read_is_not_the_last_one(reply: Reply) -> None:
    """What a request has in it may make the page too long, for as long as llama-server shows that request."""

    async def play() -> None:
        backend = Backend(reply, 1, 1, 0)
        cancelled = Cancelled(backend)
        cancelled.cancel()
        await until(lambda: backend.polls == 3)
        assert cancelled.queue.active == 1
        await cancelled.released()
        assert backend.polls == 4

    run(play())


def test_no_task_is_assigned_while_another_request_may_have_it() -> None:
    """A batch of embeddings has tasks, but generates nothing that could be watched."""

    async def play() -> None:
        backend = Backend(at_work(5, 7), at_work(5, 8))
        cancelled, line = Cancelled(backend), Line()
        cancelled.reclaimer.release(cancelled.queue.acquire("alice"), streamed=False, connection=line)
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(cancelled.queue.acquire("bob"), streamed=False, watch=watch, connection=Line())
        await until(lambda: backend.polls == 4)
        assert not watch.tasks
        line.ended = True
        await until(lambda: backend.polls == 8)
        assert watch.tasks == {5}
        await cancelled.reclaimer.close()

    run(play())


def test_a_small_request_overtakes_a_large_one() -> None:
    """llama-server numbers a task once it has read the body: an image takes longer than a word."""
    slots = [busy(5, 1000), busy(6, 2000)]
    large = FIRST._replace(body_bytes=40 << 20)
    first, second = look_twice(slots, [], large, SECOND)
    assert (first.tokens, second.tokens) == (2125, 1125)
    (second,) = look_twice(slots, [AtWork(FIRST.sent_s, 1, body_bytes=40 << 20)], SECOND)
    assert second.tokens == 1125
    later = SECOND._replace(sent_s=FIRST.sent_s + 5)
    first, second = look_twice(slots, [], large, later)
    assert (first.tokens, second.tokens) == (1125, 2125)


def test_of_two_keys_neither_gets_the_others_task_by_the_size_of_its_body() -> None:
    """How fast llama-server reads a body depends on what is in it: the larger one may be first all the same."""
    slots = [busy(5, 1000), busy(6, 2000), busy(9, 3000)]
    large = FIRST._replace(body_bytes=40 << 20, key_id="alice")
    last = GivenUp(1, 9.0, 1.0, key_id="carol")
    first, second, third = look_twice(slots, [], large, SECOND, last)
    assert (first.tokens, second.tokens, third.tokens) == (None, None, 3125)
    awaited = AtWork(FIRST.sent_s, 1, body_bytes=40 << 20, key_id="alice")
    assert look_twice(slots[:2], [awaited], SECOND) == [Generated(None, None, False)]
    later = SECOND._replace(sent_s=FIRST.sent_s + 5)
    first, second = look_twice(slots[:2], [], large, later)
    assert (first.tokens, second.tokens) == (1125, 2125)


def test_of_two_keys_the_one_with_the_small_body_has_not_read_the_large_prompt() -> None:
    slots = [{**busy(5, 0), "n_prompt_tokens_processed": 9000}, {**busy(6, 2000), "n_prompt_tokens_processed": 35}]
    large = AtWork(FIRST.sent_s, 1, body_bytes=40 << 20, key_id="alice")
    (second,) = look_twice(slots, [large], SECOND._replace(body_bytes=100))
    assert second == Generated(2125, 35, False)
    (second,) = look_twice(slots, [large], SECOND._replace(body_bytes=9000))  # it may have read either of them
    assert second.tokens is None


def test_a_task_that_only_one_of_two_keys_can_have_is_its_own_in_whatever_order_they_were_read() -> None:
    slots = [busy(5, 1000), {**busy(6, 2000), "params": {"n_predict": 5000}}]
    large = AtWork(FIRST.sent_s, 1, body_bytes=40 << 20, key_id="alice")
    (second,) = look_twice(slots, [large], SECOND._replace(limit=5000))
    assert second.tokens == 2125


def test_a_look_for_one_request_releases_no_other_one_early() -> None:
    """A slot that is idle so soon says nothing: another task of the stream may not have begun."""

    async def play() -> None:
        backend = Backend(0)
        cancelled = Cancelled(backend)
        cancelled.cancel()
        other = cancelled.queue.acquire("bob")
        watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
        cancelled.reclaimer.release(other, streamed=False, watch=watch)
        await until(lambda: backend.polls == 1)
        assert cancelled.queue.active == 2
        await cancelled.released()

    run(play())
