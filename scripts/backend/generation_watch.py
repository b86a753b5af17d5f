"""What llama-server generates for a request that was given up before its answer, as GET /slots shows it.

llama-server notices that the client of an answer that is not a stream has left after a second in which no slot produced
a result, and reports nothing to anyone. /slots lists the tokens of each busy slot, but not whose request it works on.
It gives its tasks numbers as they arrive. So once as many slots are busy as are awaited, a request's tasks follow from
its place in the order in which the requests were sent. A slot keeps the tokens of its task, prompt included, until it
gets the next one: their number is exact.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from backend.slot_listing import (
    ListedSlot,
    decoded_of,
    is_busy,
    is_streamed,
    kept_in,
    most_tokens_of,
    read_of,
    shows_read,
    task_of,
)

_PACE_S = 0.2  # between the first looks
_LOOKS = 6  # after which a request whose tasks have not been found is looked for seldom, or not any more
_READ_BYTES_PER_S = 20 << 20  # how fast llama-server reads a large body; an image may be one, text hardly
_LINGER_S = 1.05  # from the last look until llama-server has noticed, and a little more
_LATER_S = 3600.0
TEMPLATE_TOKENS = 512  # that a chat template adds to a prompt at most
_MARGIN = 1.12  # above the most likely number of tokens that were not seen: it should not be below the true one


class AtWork(NamedTuple):
    """A request on which the backend works: since when, in how many slots, and whether its answer has not begun.

    `events` is how many of its stream have come, None if it is no stream, which began at `begun_s`. `is_unread`: its
    client takes nothing now, so that the backend may have generated all of it.
    """

    sent_s: float
    slots: int
    is_awaited: bool = True
    body_bytes: int = 0
    events: int | None = None
    key_id: str = ""
    begun_s: float = 0.0
    is_unread: bool = False

    @property
    def read_s(self) -> float:
        """About when the backend has read its body: its tasks get their numbers then."""
        return self.sent_s + self.body_bytes / _READ_BYTES_PER_S

    def may_be_out_of_turn(self, other: "AtWork") -> bool:
        """Whether it is not known which of two requests got its tasks first, and they are of two keys.

        A key could pad a body, so that another key's request seems to have overtaken it.
        """
        turns = (self.sent_s - other.sent_s) * (self.read_s - other.read_s)
        return turns < 0 and self.key_id != other.key_id


class Generated(NamedTuple):
    """The tokens that were generated and those of the prompts, None if not known. `is_exact`: both are certain.

    `at_once` is in how many slots they were generated. If they are not known, each of these has had at most `most`,
    None if that is not known either. Nor has one of the prompts had more than `most_prompt`.
    """

    tokens: int | None
    prompt: int | None
    is_exact: bool
    at_once: int = 1
    most: int | None = None
    most_prompt: int | None = None


class GivenUp(NamedTuple):
    """A request that was given up: `tasks` tasks for `prompts` different prompts, at most `at_once` of them at once.

    `sent_s` and `age_s` are when it was sent, and for how long the backend has had it. `slot` is the slot in which it
    runs, and `limit` the most tokens of a task, None if they are not known. `may_stream`: its answer may be a stream
    that had not begun.
    """

    tasks: int
    sent_s: float
    age_s: float
    prompts: int = 1
    at_once: int = 1
    limit: int | None = None
    slot: int | None = None
    body_bytes: int = 0
    key_id: str = ""
    may_stream: bool = False

    @property
    def at_work(self) -> AtWork:
        return AtWork(self.sent_s, self.at_once, body_bytes=self.body_bytes, key_id=self.key_id)


@dataclass(frozen=True)
class _Task:
    """One task: its tokens when it was last seen at work, its pace in tokens per second, and its limit (-1: none).

    `read` is how many tokens of its prompt have been read, None if its slot does not say: all of them once it has
    tokens. `kept` is what its slot keeps. `ended_with` is how many tokens it had in the end, None if its slot does not
    say.
    """

    tokens: int
    read: int | None
    kept: int
    limit: int
    seen_s: float
    pace: float = 0.0
    ended_with: int | None = None

    def seen(self, slot: ListedSlot, now_s: float) -> "_Task":
        """Return it as it is now, after a look at the slot that has its tokens."""
        if not is_busy(slot):
            return self._in_the_end(kept_in(slot))
        now = _first_seen(slot, now_s)
        pace = (now.tokens - self.tokens) / (now_s - self.seen_s) if now_s > self.seen_s else self.pace
        return replace(now, limit=self.limit, pace=max(pace, 0.0))

    def _in_the_end(self, kept: int) -> "_Task":
        """Return it with what its slot has kept: all tokens but the last one. A task may also empty its slot."""
        read = self.read or 0
        if not self.tokens:  # it has ended in its prompt, or soon after; or it has not begun
            has_begun = read or kept != self.kept
            return replace(self, read=max(read, kept)) if has_begun else self
        generated = kept + 1 - read
        return replace(self, ended_with=generated if read and generated >= self.tokens else None)

    def ended(self) -> "_Task":
        """Return it as one that another task has followed in its slot: it has had all its tokens, if it has a limit."""
        return self if self.ended_with is not None or self.limit < 0 else replace(self, ended_with=self.limit)

    def likely_end(self) -> int:
        """Return how many tokens it will have had in the end."""
        return self._limited(round(self.tokens + self.pace * _LINGER_S))

    def end_with(self, other: "_Task") -> int:
        """Return how many tokens it has had if it ended with another task of its request."""
        assert other.ended_with is not None
        return self._limited(self.tokens + other.ended_with - other.tokens)

    def _limited(self, tokens: int) -> int:
        return min(tokens, self.limit) if self.limit >= 0 else tokens


class GenerationWatch:
    """Follows the tokens of one request. `on_end` gets what was generated; that is called once.

    A request with more tasks than run at once begins one as another ends; their numbers follow each other.
    """

    def __init__(self, request: GivenUp, on_end: Callable[[Generated], None]) -> None:
        self.request = request
        self._on_end = on_end
        self._looks = self._follows = 0  # until its tasks were found, and since then
        self._began_s = 0.0
        self._first: dict[int, _Task] = {}  # as they were when they were found
        self._own: dict[int, _Task] = {}
        self._listed: Set[int] = frozenset()  # at the last look: what is not has ended whole
        self._found_s = self._newest_s = 0.0  # when they were found, and when the newest one was seen first
        self._is_certain = False
        self._is_over = False
        self._at_work_s = -inf
        self._most: int | None = None  # tokens of one of its tasks

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look at most."""
        if self._is_over:
            return _LATER_S
        if not self._looks:
            return 0.0
        return _LATER_S if self._follows or self._looks >= _LOOKS else _PACE_S

    @property
    def tasks(self) -> Set[int]:
        """The tasks that are known to be its own."""
        return self._own.keys()

    @property
    def at_work_s(self) -> float:
        """When the backend was last seen at work on it; -inf if it was not, at the last look."""
        return self._at_work_s

    @property
    def is_over(self) -> bool:
        """Whether it looks no more."""
        return self._is_over

    @property
    def is_certain(self) -> bool:
        """Whether its tasks cannot be another request's."""
        return self._is_certain

    def note_most(self, most: int) -> None:
        """No request at work has had more tokens than this; the backend may be at work on it."""
        self._most = max(self._most or 0, most)

    def look(
        self,
        slots: Sequence[ListedSlot],
        now_s: float,
        assigned: Sequence[int],
        others: Set[int] = frozenset(),
        *,
        may_begin: bool = False,
    ) -> None:
        """Look at all slots.

        `assigned` are the tasks that are its own by their order, empty if that says nothing; if they are more than it
        has, it is not known which of them. `others` are certainly another request's. `may_begin`: the backend may not
        have begun its tasks yet.
        """
        if self._is_over:
            return
        if self._own:
            self._follows += 1
            self._follow(slots, now_s)
            return
        self._looks += 1
        if self._looks == 1:
            self._began_s = now_s
        tasks = {task: slot for slot in slots if (task := task_of(slot)) is not None and task not in others}
        self._find_tasks({task: slot for task, slot in tasks.items() if self._may_be_own(slot)}, now_s, assigned)
        self._is_over = not (self._own or may_begin) and self._looks >= _LOOKS

    def _find_tasks(self, possible: Mapping[int, ListedSlot], now_s: float, assigned: Sequence[int]) -> None:
        """Find its tasks: those that are assigned to it, or all that it can have."""
        is_pinned = self.request.slot is not None and bool(possible)
        if (assigned or is_pinned) and len(possible) == self.request.at_once:
            self._is_certain = True
        else:
            possible = self._choose(possible, assigned)
        if not possible:
            return
        self._own = self._first = {task: _first_seen(slot, now_s) for task, slot in possible.items()}
        self._found_s = self._newest_s = self._at_work_s = now_s

    def _choose(self, possible: Mapping[int, ListedSlot], assigned: Sequence[int]) -> Mapping[int, ListedSlot]:
        """Return the tasks that are assigned to it; of more than it has those that its body can have caused."""
        chosen = {task: possible[task] for task in assigned if task in possible}
        if len(assigned) <= self.request.at_once:
            return chosen if len(chosen) == len(assigned) else {}
        chosen = {task: slot for task, slot in chosen.items() if read_of(slot) <= self._most_plausible}
        return chosen if len(chosen) == self.request.at_once else {}

    def _follow(self, slots: Sequence[ListedSlot], now_s: float) -> None:
        listed = {task: slot for slot in slots if (task := task_of(slot)) is not None and self._is_own(task)}
        is_at_work = any(map(is_busy, listed.values()))
        self._at_work_s = now_s if is_at_work else -inf
        if listed.keys() - self._own.keys():
            self._newest_s = now_s
        seen = {task: self._seen(task, slot, now_s) for task, slot in listed.items()}
        gone = {task: each.ended() for task, each in self._own.items() if self._has_further and task not in listed}
        self._own = {**self._own, **gone, **seen}
        self._listed = listed.keys()

    def _seen(self, task: int, slot: ListedSlot, now_s: float) -> _Task:
        before = self._own.get(task)
        if before is not None:
            return before.seen(slot, now_s)
        return _first_seen(slot, now_s) if is_busy(slot) else _never_seen(slot, now_s)

    @property
    def _has_further(self) -> bool:
        """Whether it has more tasks than run at once."""
        return self.request.tasks > self.request.at_once

    def _is_own(self, task: int) -> bool:
        oldest = min(self._first)
        return task in self._own or (self._has_further and oldest < task < oldest + self.request.tasks)

    def _may_be_own(self, slot: ListedSlot) -> bool:
        request = self.request
        if not is_busy(slot) or (request.slot is not None and slot.get("id") != request.slot):
            return False
        if is_streamed(slot) and (decoded_of(slot) or not request.may_stream):
            return False
        return request.limit is None or most_tokens_of(slot) == request.limit

    def forget_tasks(self) -> None:
        """Look no more: llama-server may be another process, whose tasks have the same numbers."""
        self._is_over = True
        self._at_work_s = -inf

    def end(self, most_kept: int | None = None) -> None:
        """llama-server works on it no more, or it is not waited for any longer.

        `most_kept` is how many tokens any slot has kept meanwhile, None if that is not known.
        """
        request = self.request
        if not self._own:
            self._on_end(Generated(None, None, False, request.at_once, self._most, most_kept))
        elif self._has_further:
            self._on_end(Generated(self._limited(self._of_many()), None, False, request.at_once))
        else:
            self._on_end(self._of_few(list(self._own.values())))

    def _of_few(self, own: Sequence[_Task]) -> Generated:
        """Return what was generated for a request all of whose tasks ran at once."""
        ended = [task for task in own if task.ended_with is not None]
        tokens = sum([_end_of(task, ended) for task in own])
        # Choices that had ended before: none of them had more tokens.
        tokens += (self.request.at_once - len(own)) * max(task.tokens for task in self._first.values())
        is_exact = self._is_certain and len(ended) == len(own)
        return Generated(self._limited(tokens), self._read_by(own), is_exact, self.request.at_once)

    def _read_by(self, own: Sequence[_Task]) -> int | None:
        """Return how many tokens of its prompts have been read; None if the slots do not say so of all prompts."""
        prompts = self.request.prompts
        read = sorted([task.read for task in own if task.read is not None], reverse=True)
        if len(read) < len(own):
            return None
        if not all(read):  # further choices wait until the prompt that they share has been read
            read = read[:prompts]
        prompt = sum(read) * prompts // len(read)
        return prompt if self._is_certain else min(prompt, self._most_plausible)

    @property
    def _most_plausible(self) -> int:
        """How many tokens its body may have: a text has no more of them than bytes."""
        return self.request.body_bytes + TEMPLATE_TOKENS * self.request.prompts

    def _of_many(self) -> int:
        """Estimate what was generated for a request whose tasks follow each other: some ran unseen, some before."""
        ends = {task: _end_of(each, []) for task, each in self._own.items()}
        whole = [end for task, end in ends.items() if task not in self._listed] or list(ends.values())
        average = sum(whole) / len(whole)
        since = sum(end - self._first[task].tokens if task in self._first else end for task, end in ends.items())
        newest, newest_first = max(self._own), max(self._first)
        begun = newest - newest_first
        unseen = begun - sum(task > newest_first for task in self._own)
        at_pace = sum(self._own[task].pace for task in self._first)
        in_turn = average * begun / max(self._newest_s - self._found_s, _PACE_S)
        before = max(at_pace, in_turn) * (self.request.age_s + self._found_s - self._began_s)
        at_first = sum(task.tokens for task in self._first.values())
        return round(max(before * _MARGIN, at_first) + since + unseen * average * _MARGIN)

    def _limited(self, tokens: int) -> int:
        """Return no more tokens than the request may have had."""
        limit = self.request.limit
        return tokens if limit is None else min(tokens, limit * self.request.tasks)


def _end_of(task: _Task, ended: Sequence[_Task]) -> int:
    """Return how many tokens a task has had, or is likely to have had beside others of its request that have ended."""
    if task.ended_with is not None:
        return task.ended_with
    return task.end_with(ended[0]) if ended else task.likely_end()


def _first_seen(slot: ListedSlot, now_s: float) -> _Task:
    tokens, read = decoded_of(slot), read_of(slot)
    is_known = read or (shows_read(slot) and not tokens)
    return _Task(tokens, read if is_known else None, kept_in(slot), most_tokens_of(slot), now_s)


def _never_seen(slot: ListedSlot, now_s: float) -> _Task:
    """Return a task that has begun and ended between two looks. Its prompt is not known, and counts as generated."""
    tokens, limit = kept_in(slot), most_tokens_of(slot)
    return _Task(0, None, tokens, limit, now_s, ended_with=min(tokens, limit) if limit >= 0 else tokens)
