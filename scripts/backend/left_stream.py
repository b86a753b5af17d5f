"""What a stream whose client has left had of tokens, as GET /slots shows it.

A stream that was left reports nothing. Most streams have an event for each token; but what makes no event, half a
character say, shows in a slot only, as the prompt does. GET /slots does not say whose slot that is. But llama-server
numbers its tasks, a stream's after the request was sent and before its answer began. If all streams are at work, the
slots of those of which it is not known which was numbered first follow from their place in the order. What they had
besides their events is in the difference of the sums, and the slot of a stream is one of those that have generated
about as many tokens as it has events. So what another key hides in an earlier or a later stream is not taken for this
one's.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import NamedTuple

from backend.slot_listing import ListedSlot, decoded_of, is_busy, is_streamed, kept_in, read_of, shows_decoded, task_of

# How many tokens may be on their way as events: of each stream, and as a part of all that have come.
_IN_FLIGHT = 16
_PART = 8
_EMPTY_EVENTS = 3  # of a stream: those with which it begins and ends have no token
# Between the first looks: a slot may have ended whose request is not known to have, or the other way round.
_PACE_S = 0.05
_LOOKS = 4
_GOOD_FOR_S = 2.0  # how long after a look a request may have gone on, and what was seen still says what it has had


class StreamEvents(NamedTuple):
    """How many events of a stream have come, in how many slots it is generated, and between when it got its tasks."""

    events: int
    slots: int = 1
    sent_s: float = 0.0
    begun_s: float = 0.0

    @property
    def share(self) -> int:
        """About how many of them are of one slot."""
        return self.events // self.slots


class Span(NamedTuple):
    """Between how many tokens a count lies."""

    least: int
    most: float

    def nearest(self, tokens: int) -> int:
        return max(self.least, int(min(tokens, self.most)))


class Shown(NamedTuple):
    """What the slots have shown of a stream: whether it surely had no token without an event, and its tokens.

    `prompt` and `generated` are those of one slot; None if no slot is known to be its own, or one of a few. No slot has
    shown more than `most` tokens, which may be infinite; None if none was seen. None has kept more than `most_prompt`
    with the prompt; None if that is not known. It has had `most_total` tokens at most, with its prompt, if its slot was
    at work no more when it was looked at first; None if that is not known. `may_be_reused`: if its slot was at work no
    more then, it may have had another task before, and nothing that the slots show is certain to be this stream's.
    """

    has_all_in_events: bool
    prompt: Span | None = None
    generated: Span | None = None
    most: float | None = None
    most_prompt: int | None = None
    most_total: int | None = None
    may_be_reused: bool = False


def has_silent_tokens(slots: Sequence[ListedSlot], known_slots: int, streams: Iterable[StreamEvents]) -> bool | None:
    """Return whether streams have had tokens that made no events; None if that does not follow from the slots.

    `known_slots` is how many slots all known requests have.
    """
    busy = [slot for slot in slots if is_busy(slot)]
    decoded = sorted([decoded_of(slot) for slot in busy if is_streamed(slot)], reverse=True)
    come = sorted([each.share for each in streams for _ in range(each.slots)], reverse=True)
    begun = sum(had > 0 for had in decoded)
    if len(busy) > known_slots or not begun <= len(come) <= len(decoded):
        return None
    if any(had + _EMPTY_EVENTS < shown for had, shown in zip(decoded, come, strict=False)):
        return None  # the slot of one of the streams is not at work any more
    return sum(decoded) - sum(come) > _IN_FLIGHT * len(come) + sum(come) // _PART


class Peers(NamedTuple):
    """The slots of the streams that may have got their tasks before or after one, its own included, and what they hide.

    For `has_silent` see `has_silent_tokens`; it is of these streams together.
    """

    slots: Sequence[ListedSlot]
    has_silent: bool | None


def peers_of(own: StreamEvents, slots: Sequence[ListedSlot], streams: Sequence[StreamEvents]) -> Peers | None:
    """Return the peers of one of the streams, None if they do not follow from the order of the tasks.

    `slots` are all slots, and `streams` all streams that are at work, as far as is known.
    """
    tasks = _at_work(slots)
    if len(tasks) != _slots_of(streams):
        return None
    in_order = [tasks[task] for task in sorted(tasks)]
    since_s, peers = _overlapping(own, streams)
    older = _slots_of([each for each in streams if each.begun_s < since_s])
    theirs = in_order[older : older + _slots_of(peers)]
    has_silent = has_silent_tokens(theirs, len(theirs), peers)
    return None if has_silent is None else Peers(theirs, has_silent)


def most_total_of(own: StreamEvents, slots: Sequence[ListedSlot], others: Sequence[StreamEvents]) -> int | None:
    """Return how many tokens a stream has had at most, with its prompt, if its slot is at work no more.

    That slot still has its task, which came after those of older streams, and before those of younger ones. `others`
    are all other streams at work. Returns None if the slot does not follow from the order.
    """
    tasks = _at_work(slots)
    if own.slots > 1 or len(tasks) != _slots_of(others):
        return None
    older = _slots_of([each for each in others if each.begun_s < own.sent_s])
    younger = _slots_of([each for each in others if each.sent_s > own.begun_s])
    in_order = [-inf, *sorted(tasks), inf]
    first, last = in_order[older], in_order[-1 - younger]
    ended = [slot for slot in slots if not is_busy(slot) and is_streamed(slot)]
    kept = [kept_in(slot) for slot in ended if (task := task_of(slot)) is not None and first < task < last]
    return max(kept) + 1 if kept and all(kept) else None  # a task may also empty its slot


def _overlapping(own: StreamEvents, streams: Sequence[StreamEvents]) -> tuple[float, list[StreamEvents]]:
    """Return since when one stream overlaps with others, and these: also those that overlap with one that does.

    Each other stream got its tasks before all of these, or after all of them.
    """
    since_s, until_s, found = own.sent_s, own.begun_s, 0
    while True:
        near = [each for each in streams if each.sent_s <= until_s and each.begun_s >= since_s]
        if len(near) == found:
            return since_s, near
        since_s, until_s = min([each.sent_s for each in near]), max([each.begun_s for each in near])
        found = len(near)


def _at_work(slots: Sequence[ListedSlot]) -> dict[int, ListedSlot]:
    """Return the slots that are at work on streams, by task."""
    busy = [slot for slot in slots if is_busy(slot) and is_streamed(slot)]
    return {task: slot for slot in busy if (task := task_of(slot)) is not None}


def _slots_of(streams: Iterable[StreamEvents]) -> int:
    return sum(each.slots for each in streams)


def most_decoded(slots: Sequence[ListedSlot]) -> int | None:
    """Return how many tokens a request at work has had at most; None if no slot shows any."""
    if not any(map(shows_decoded, slots)):
        return None
    return max([decoded_of(slot) for slot in slots if is_busy(slot)], default=0)


class _PossibleTask:
    """One task that may be the stream's: the tokens of its prompt, and those that it has generated."""

    __slots__ = ("_kept", "generated", "has_ended", "prompt")

    def __init__(self) -> None:
        self.prompt = self.generated = self._kept = 0
        self.has_ended = False  # and its slot has shown with how many tokens

    def look(self, slot: ListedSlot) -> None:
        kept = kept_in(slot)
        if is_busy(slot):
            self.prompt, self.generated, self._kept = read_of(slot), decoded_of(slot), kept
        elif kept >= self.prompt + self.generated - 1:  # a task may also empty its slot
            if not self.generated:  # it has ended with its prompt, or soon after; or it has not begun
                if not self.prompt and kept == self._kept:
                    return
                self.prompt = kept
            self.generated = kept + 1 - self.prompt  # the last one is not in the slot
            self.has_ended = True


class LeftStream:
    """One stream whose client has left. Its request was sent at `sent_s`, and its answer began at `begun_s`.

    `count_events` returns how many of it have come. `on_end` gets what the slots have shown of it, once all of the
    stream has come and its slots are released.
    """

    def __init__(
        self,
        count_events: Callable[[], int],
        on_end: Callable[[Shown], None],
        sent_s: float = 0.0,
        begun_s: float = 0.0,
        may_be_reused: Callable[[], bool] = lambda: False,
    ) -> None:
        """`may_be_reused` returns whether other requests have had slots since its answer began."""
        self.sent_s, self.begun_s = sent_s, begun_s
        self._may_be_reused = may_be_reused
        self._was_reused = False
        self._count_events = count_events
        self._on_end = on_end
        self._tasks: dict[int, _PossibleTask] = {}  # one of them is its own
        self._most: float | None = None  # tokens that any slot has shown
        self._most_kept: int | None = None
        self._most_total: int | None = None
        self._has_silent: bool | None = None  # tokens, as far as has been seen
        self._has_had_peers = False  # what all streams together have had says nothing of it any more
        self._looks = 0
        self._seen_s = 0.0  # when the slots said something last
        self._has_come = self._is_released = False

    @property
    def events(self) -> int:
        return self._count_events()

    @property
    def has_come(self) -> bool:
        """Whether its connection has ended: its slot is at work no more, or will not be in a moment."""
        return self._has_come

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look at most."""
        if not self._looks:
            return 0.0
        return _PACE_S if self._has_silent is None and self._looks < _LOOKS else inf

    @property
    def tasks(self) -> frozenset[int]:
        """The tasks that may be its own."""
        return frozenset(self._tasks)

    def take(self, task: int) -> None:
        """No other one of its tasks is its own."""
        self._tasks = {task: self._tasks[task]}

    def look_in_vain(self, now_s: float) -> None:
        """The slots cannot be seen."""
        if not self._has_come:
            self._note_silent(None, now_s)

    def look(
        self,
        slots: Sequence[ListedSlot],
        events: StreamEvents,
        has_silent: bool | None,
        now_s: float,
        *,
        all_at_work: bool = True,
        peers: Peers | None = None,
        most_total: int | None = None,
    ) -> None:
        """Look at all slots. `events` are its own; for `has_silent`, of all streams together, see `has_silent_tokens`.

        `all_at_work`: no request has a slot that is idle. Else what looks like a stream that has just begun may be one
        that has not. `peers` are known if its slot is one of theirs; then they are compared instead of all streams.
        For `most_total` see `most_total_of`: its slot is at work no more. Only the first look can say that: later the
        slot may have had another task.
        """
        self._looks += 1
        if self._looks == 1:
            self._most_total, self._was_reused = most_total, self._may_be_reused()
        if slots:
            self._most = max([self._most or 0, *map(_shown_by, slots)])
        if peers is not None and not self._has_had_peers:
            # What all streams together have shown does not matter any more: another key's hidden tokens may be in it.
            self._has_had_peers, self._has_silent, self._tasks = True, None, {}
            self._look_at(peers, events.share, now_s, all_at_work=all_at_work)
        elif not self._has_come:
            of_all = Peers(slots, None if self._has_had_peers else has_silent)
            self._look_at(peers or of_all, events.share, now_s, all_at_work=all_at_work)
        for slot in slots:
            if (task := task_of(slot)) in self._tasks and task is not None:
                self._tasks[task].look(slot)

    def _look_at(self, peers: Peers, share: int, now_s: float, *, all_at_work: bool) -> None:
        """Look at slots one of which is its own."""
        self._note_silent(peers.has_silent, now_s)
        is_distinct = all_at_work or share > _EMPTY_EVENTS
        if peers.has_silent is not None and is_distinct and not self._tasks:
            self._find_tasks(peers.slots, share, peers.has_silent)

    def _note_silent(self, has_silent: bool | None, now_s: float) -> None:
        if has_silent is not None:
            self._has_silent = has_silent or self._has_silent is True
            self._seen_s = now_s
        elif self._has_silent is False and now_s - self._seen_s > _GOOD_FOR_S:
            self._has_silent = None

    def _find_tasks(self, slots: Sequence[ListedSlot], share: int, has_silent: bool) -> None:
        """Find the tasks that may be its own, among these slots: all of these streams are at work now."""
        most = inf if has_silent else share + _IN_FLIGHT + share // _PART
        streamed = [slot for slot in slots if is_busy(slot) and is_streamed(slot)]
        own = [task_of(slot) for slot in streamed if share - _EMPTY_EVENTS <= decoded_of(slot) <= most]
        self._tasks = {task: _PossibleTask() for task in own if task is not None}

    def note_end(self) -> None:
        """Its connection has ended."""
        self._has_come = True
        self._end_if_over()

    def end(self, most_kept: int | None = None) -> None:
        """llama-server works on it no more, or it is not waited for any longer.

        `most_kept` is how many tokens any slot has kept meanwhile, None if that is not known.
        """
        self._is_released = True
        self._most_kept = most_kept
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._has_come and self._is_released:
            most_total = None if self._has_had_peers else self._most_total
            has_all, (prompt, generated) = self._has_silent is False, self._spans()
            most, most_kept = self._most, self._most_kept
            self._on_end(Shown(has_all, prompt, generated, most, most_kept, most_total, self._was_reused))

    def _spans(self) -> tuple[Span | None, Span | None]:
        """Return between what the tokens of its prompt lie, and those that were generated in each of its slots."""
        tasks = self._tasks.values()
        if not tasks:
            return None, None
        prompts, generated = [task.prompt for task in tasks], [task.generated for task in tasks]
        most = max(generated) if all(task.has_ended for task in tasks) else inf
        return Span(min(prompts), max(prompts)), Span(min(generated), most)


def _shown_by(slot: ListedSlot) -> float:
    """Return how many tokens the task of a slot may have generated: an idle slot does not say what was its prompt.

    One that has had a task and keeps nothing was emptied, or its version does not say what it keeps.
    """
    if is_busy(slot):
        return decoded_of(slot) if shows_decoded(slot) else inf
    return kept_in(slot) + 1 if kept_in(slot) or "params" not in slot else inf
