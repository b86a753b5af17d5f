"""llama-server's slots: how many there are, and when the slot of a cancelled request is really free."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import inf
from typing import Any, Protocol

from backend.fetch import PageTooLong
from backend.generation_watch import AtWork, GenerationWatch
from backend.left_stream import LeftStream, StreamEvents, has_silent_tokens, most_decoded, most_total_of, peers_of
from backend.slot_listing import ListedSlot, awaited_task, context_of, is_busy, most_kept
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from core.tasks import end_tasks
from policy.fair_queue import Ticket

# Sends a GET request to the backend and returns status and body. May raise GatewayError.
Fetch = Callable[[bytes], Awaitable[tuple[int, bytes]]]

_TIMEOUT_S = 5.0
# llama-server notices at its next event that the client of a stream has left. Of a response that is not a stream, and
# while it generates what makes no event, it looks only after a second in which it produced no result. A response to
# GET /slots is a result: polled more often than that, it would never look.
_STREAM_POLL_S = 0.2
_POLL_S = 1.2
_SOON_S = 1.0  # within which it notices that for a usual stream
_LEAST_PAUSE_S = 0.001  # a shorter one may not move the clock
_MAX_SLOTS = 4096


class UnfitBackend(Exception):
    """The backend serves no request of the gateway as it should. The message says why."""


class _Unauthorized(ValueError):
    """The backend refuses the gateway's own key."""


async def total_slots(fetch: Fetch) -> int:
    """Return `total_slots` of GET /props, or 1 if it is not reported.

    Raises BACKEND_TIMEOUT: it may be reported later. Raises UnfitBackend if the gateway may not ask.
    """
    try:
        return await reported_slots(fetch)
    except _Unauthorized:
        raise UnfitBackend("llama-server refuses the gateway's key: BACKEND_API_KEY is not its --api-key") from None
    except ValueError:
        return 1
    except GatewayError as error:
        if error.kind is BACKEND_TIMEOUT:
            raise
        return 1


async def reported_slots(fetch: Fetch) -> int:
    """Return `total_slots` of GET /props. Raises as `fetch_slots` does."""
    value = await _fetch_json(fetch, b"/props")
    slots = value.get("total_slots") if isinstance(value, dict) else None
    if type(slots) is not int or not 0 < slots <= _MAX_SLOTS:
        raise ValueError("not a number of slots")
    return slots


async def listed_slots(fetch: Fetch) -> int:
    """Return how many slots GET /slots lists. Raises as `fetch_slots` does."""
    value = await _fetch_json(fetch, b"/slots")
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_SLOTS:
        raise ValueError("not a list of slots")
    return len(value)


async def fetch_slots(fetch: Fetch) -> Sequence[ListedSlot]:
    """Return all slots, as GET /slots lists them.

    Raises GatewayError if the backend does not respond now, or with too long a page, ValueError if it does not report
    its slots.
    """
    value = await _fetch_json(fetch, b"/slots")
    if not isinstance(value, list) or not all(isinstance(slot, dict) for slot in value):
        raise ValueError("not a list of slots")
    return value


async def _fetch_json(fetch: Fetch, target: bytes) -> Any:
    try:
        status, body = await fetch(target)
        if status == 200:
            return json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except GatewayError as error:
        if error.kind is not BACKEND_MALFORMED or isinstance(error, PageTooLong):
            raise
    else:
        if status == HTTPStatus.UNAUTHORIZED:
            raise _Unauthorized
        if status >= 500 and status != HTTPStatus.NOT_IMPLEMENTED:
            raise GatewayError(BACKEND_UNAVAILABLE)
    raise ValueError("no such page")


class Connection(Protocol):
    """The connection of a cancelled request. The backend ends it once it will not begin a task of the request."""

    @property
    def ended(self) -> bool: ...


@dataclass(eq=False, slots=True)
class PendingRelease:
    """The ticket of a cancelled request, its connection, and what watches its tokens: `stream` those of a stream.

    An idle slot says nothing before `earliest_s`: a task of the request may not have begun. `ended_s` is when its
    connection was seen to have ended, `since_s` when it was cancelled. Times are the loop's. `kept` is how many tokens
    any slot has kept since, infinite if that is not known; `is_seen_last`: the last look was after that end.
    """

    ticket: Ticket
    since_s: float
    earliest_s: float
    connection: Connection | None
    watch: GenerationWatch | None
    stream: LeftStream | None = None
    ended_s: float = inf
    kept: float = 0.0
    is_seen_last: bool = False

    def note_kept(self, slots: Sequence[ListedSlot]) -> None:
        kept = most_kept(slots)
        self.kept = inf if kept is None else max(self.kept, kept)
        self.is_seen_last = not self.may_begin

    @property
    def most_kept(self) -> int | None:
        """How many tokens the slots of the request had at most when they were released; None if that is not known."""
        return int(self.kept) if self.is_seen_last and self.kept < inf else None

    @property
    def may_begin(self) -> bool:
        """Whether the backend may still begin a task of the request."""
        return self.connection is not None and not self.connection.ended

    @property
    def is_certain(self) -> bool:
        """Whether it is certain which tasks of the backend are the request's."""
        return self.watch is not None and self.watch.is_certain and not self.watch.is_over

    @property
    def at_work_s(self) -> float:
        """When the backend was last seen at work on it; -inf if it was not, or nothing watches that."""
        return -inf if self.watch is None else self.watch.at_work_s


class SlotReclaimer:
    """Releases the slots of cancelled requests once the backend has stopped working on them.

    `at_work` returns the requests on which the backend should be working: further busy slots are those of cancelled
    ones. No slot is released before the request's connection has ended: llama-server may take its time to begin a task.
    If the backend does not report its slots, that is all. If it does not respond because it is busy, it is polled
    again. Each slot is released at the latest `timeout_s` after that end, or after it was last seen at work by its
    watch.

    `context` is how many tokens a slot can hold, None as long as the slots have not shown it.
    """

    def __init__(self, fetch: Fetch, at_work: Callable[[], Sequence[AtWork]], timeout_s: float = _TIMEOUT_S) -> None:
        self._fetch = fetch
        self._at_work = at_work
        self.context: int | None = None
        self._timeout_s = timeout_s
        self._pending: list[PendingRelease] = []
        self._task: asyncio.Task[None] | None = None
        self._new_watch = asyncio.Event()
        self._reports_slots = True
        self._has_answered = True  # at the last poll
        self._poll_slowly = False  # whether one of the cancelled requests was not a stream

    def __len__(self) -> int:
        """The number of requests whose slots are not released yet."""
        return len(self._pending)

    def reset(self) -> None:
        """The backend may have been restarted: it may report its slots, and has other tasks."""
        self._reports_slots = True
        self.context = None
        for pending in self._pending:
            if pending.watch is not None:
                pending.watch.forget_tasks()

    def release(
        self,
        ticket: Ticket,
        *,
        streamed: bool,
        watch: GenerationWatch | None = None,
        stream: LeftStream | None = None,
        connection: Connection | None = None,
    ) -> None:
        """Release the slot of a cancelled request as soon as the backend has stopped working on it.

        `watch` or `stream` follows what is generated meanwhile, and is ended before the slot is released. Without a
        connection the backend may not begin any more.
        """
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        # A stream with several tasks may have begun while one of them had not.
        has_begun = streamed and ticket.slots == 1
        earliest_s = now_s + (_STREAM_POLL_S if has_begun else _POLL_S)
        pending = PendingRelease(ticket, now_s, earliest_s, connection, watch, stream)
        if not pending.may_begin:
            pending.ended_s = now_s
            if not self._reports_slots:
                _end(pending)
                return
        self._pending.append(pending)
        self._poll_slowly = self._poll_slowly or not streamed
        if watch is not None or stream is not None:
            self._new_watch.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._poll())

    async def _poll(self) -> None:
        clock = asyncio.get_running_loop().time
        self._has_answered = True
        try:
            while self._pending:
                await self._pause()
                busy, now_s = await self._cancelled_slots(), clock()
                if not self._has_answered:
                    self._look_in_vain(now_s)
                self._release_ended(busy, now_s)
        finally:
            self._poll_slowly = False
            self._release_all()

    async def _pause(self) -> None:
        """Wait until the next poll is due: at once for a request that is watched, and soon again, to learn its pace."""
        now_s = asyncio.get_running_loop().time()
        watches = [each for pending in self._pending for each in (pending.watch, pending.stream) if each is not None]
        pauses_s = [each.pause_s for each in watches]
        # A stream may generate what makes no event.
        must_notice = any(each.may_begin and each.since_s + _SOON_S <= now_s for each in self._pending)
        poll_slowly = (self._poll_slowly or must_notice) and self._reports_slots
        pause_s = min([_POLL_S if poll_slowly else _STREAM_POLL_S, *pauses_s])
        if not self._has_answered:  # a connection that is refused takes no time
            pause_s = max(pause_s, _STREAM_POLL_S)
        left_s = [pending.ended_s + self._timeout_s - now_s for pending in self._pending]
        due_s = [max(each, _LEAST_PAUSE_S) for each in left_s if each > 0]
        self._new_watch.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._new_watch.wait(), min([pause_s, *due_s]))

    def _release_ended(self, busy: int, now_s: float) -> None:
        """Release the slots of requests on which the backend has stopped working. `busy` slots are still at work.

        Those that were seen at work are held, and those of which it is certain that they have ended are released. The
        others follow in the order in which they were cancelled: an idle slot may be that of any of them.
        """
        for pending in self._pending:
            if pending.ended_s == inf and not pending.may_begin:
                pending.ended_s = now_s
        at_rest = [each for each in self._pending if each.ended_s <= now_s >= each.at_work_s + self._timeout_s]
        for pending in [each for each in at_rest if each.is_certain]:
            self._release(pending)
        for pending in [each for each in at_rest if not each.is_certain]:
            if not self._may_release(pending, busy, now_s):
                return
            self._release(pending)

    def _release(self, pending: PendingRelease) -> None:
        self._pending.remove(pending)
        _end(pending)

    def _may_release(self, pending: PendingRelease, busy: int, now_s: float) -> bool:
        """Whether all that are still busy may be slots of the other pending requests, or it has taken too long."""
        if pending.ended_s + self._timeout_s <= now_s:
            return True
        others = sum(each.ticket.slots for each in self._pending) - pending.ticket.slots
        return pending.earliest_s <= now_s and others >= busy

    async def _cancelled_slots(self) -> int:
        """Return how many slots still work on cancelled requests; if that is unknown, all pending ones."""
        self._has_answered = False
        if not self._reports_slots:
            return 0
        try:
            slots = await fetch_slots(self._fetch)
        except GatewayError:
            return sum(pending.ticket.slots for pending in self._pending)
        except ValueError:
            self._reports_slots = False
            return 0
        self._has_answered = True
        self.context = max(map(context_of, slots), default=0) or None
        at_work = self._at_work()
        now_s = asyncio.get_running_loop().time()
        self._look(slots, at_work, now_s)
        self._look_at_sums(slots, at_work, now_s)
        return max(0, sum(map(is_busy, slots)) - sum(each.slots for each in at_work))

    def _look_in_vain(self, now_s: float) -> None:
        for pending in self._pending:
            if pending.stream is not None:
                pending.stream.look_in_vain(now_s)

    def _look_at_sums(self, slots: Sequence[ListedSlot], at_work: Sequence[AtWork], now_s: float) -> None:
        """Let the watches know what follows for each request from what all slots show."""
        most_tokens = most_decoded(slots)
        for pending in self._pending:
            pending.note_kept(slots)
            if pending.watch is not None and pending.may_begin and most_tokens is not None:
                pending.watch.note_most(most_tokens)
        left = [
            (each.stream, StreamEvents(each.stream.events, each.ticket.slots, each.stream.sent_s, each.stream.begun_s))
            for each in self._pending
            if each.stream is not None
        ]
        if left:
            self._look_at_streams(slots, at_work, left, now_s)
            self._share_out()

    def _look_at_streams(
        self,
        slots: Sequence[ListedSlot],
        at_work: Sequence[AtWork],
        left: Sequence[tuple[LeftStream, StreamEvents]],
        now_s: float,
    ) -> None:
        """Let the streams that were left look, each at the slots that may be its own."""
        known_slots = sum(each.slots for each in at_work) + sum(each.ticket.slots for each in self._pending)
        busy = sum(map(is_busy, slots))
        others = [
            StreamEvents(each.events, each.slots, each.sent_s, each.begun_s)
            for each in at_work
            if each.events is not None and not (each.is_unread and busy < known_slots)  # its slot is at work no more
        ]
        streams = [*others, *(events for stream, events in left if not stream.has_come)]
        has_silent = has_silent_tokens(slots, known_slots, streams)
        # A slot is at work until its step has ended, although the connection has.
        all_streams = [*others, *(events for _, events in left)]
        for stream, events in left:
            peers = most_total = None
            if busy <= known_slots:  # else another program is at work
                # Its last events may be newer than the page; then only what its one slot keeps shows what it has had.
                if not stream.has_come or events.slots == 1:
                    peers = peers_of(events, slots, all_streams)
                if stream.has_come:
                    most_total = most_total_of(events, slots, streams)
                elif peers is None:
                    peers = peers_of(events, slots, streams)
            all_at_work = busy >= known_slots
            stream.look(slots, events, has_silent, now_s, all_at_work=all_at_work, peers=peers, most_total=most_total)

    def _share_out(self) -> None:
        """Give each of several streams of a key one of the tasks that may be any of theirs, if there are as many.

        Which one does not matter: together they have had what all of these tasks show.
        """
        alike = defaultdict[tuple[str, frozenset[int]], list[LeftStream]](list)
        for each in self._pending:
            if each.stream is not None and each.ticket.slots == 1:
                alike[each.ticket.key_id, each.stream.tasks].append(each.stream)
        for (_, tasks), streams in alike.items():
            if len(tasks) == len(streams):
                for stream, task in zip(streams, sorted(tasks), strict=True):
                    stream.take(task)

    def _look(self, slots: Sequence[ListedSlot], at_work: Sequence[AtWork], now_s: float) -> None:
        """Let the watches look. A request whose tasks are not known gets those that are its own by their order."""
        pairs = [(each.watch, each.may_begin) for each in self._pending if each.watch is not None]
        watches = [watch for watch, _ in pairs]
        known = set[int]().union(*(watch.tasks for watch in watches))
        certain = set[int]().union(*(watch.tasks for watch in watches if watch.is_certain))
        tasks = sorted({task for slot in slots if (task := awaited_task(slot)) is not None} - known)
        awaited = [(each, None) for each in at_work if each.is_awaited]
        searching = [(watch.request.at_work, watch) for watch in watches if not watch.tasks]
        # What nothing watches may have tasks, too.
        is_alone = all(each.watch is not None or not each.may_begin for each in self._pending)
        assigned = _assign(tasks, [*awaited, *searching]) if is_alone else {}
        for watch, may_begin in pairs:
            watch.look(slots, now_s, assigned.get(watch, ()), certain, may_begin=may_begin)

    def _release_all(self) -> None:
        while self._pending:
            _end(self._pending.pop(0))

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        self._release_all()  # a task that was cancelled before its first step has not done so


def _assign(
    tasks: Sequence[int], awaited: Sequence[tuple[AtWork, GenerationWatch | None]]
) -> Mapping[GenerationWatch | None, Sequence[int]]:
    """Assign the tasks at work to the requests that are awaited, both in their order.

    That needs as many tasks as are awaited: if there are fewer, one may not have begun, and if there are more, another
    program uses the backend. If one request alone is awaited, what is there is its own. A small request overtakes a
    large one that was sent just before it; if it is another key's, each may have any of the tasks.
    """
    most = sum(each.slots for each, _ in awaited)
    if len(tasks) != most and (len(awaited) != 1 or len(tasks) > most):
        return {}
    assigned, left = dict[GenerationWatch | None, Sequence[int]](), tasks
    by_sent = sorted(awaited, key=lambda pair: pair[0].sent_s)
    by_read = sorted(by_sent, key=lambda pair: pair[0].read_s)
    others = [] if by_read == by_sent else [each for each, _ in awaited]
    for each, watch in by_read:
        is_disputed = any(map(each.may_be_out_of_turn, others))
        assigned[watch], left = tasks if is_disputed else left[: each.slots], left[each.slots :]
    return assigned


def _end(pending: PendingRelease) -> None:
    """Report what was generated for a cancelled request, then release its slots: the next one's quota counts it."""
    for watch in (pending.watch, pending.stream):
        if watch is not None:
            watch.end(pending.most_kept)
    pending.ticket.release()
