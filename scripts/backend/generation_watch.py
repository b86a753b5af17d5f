"""What llama-server generates for a request that was given up before its answer, as GET /slots shows it.

llama-server notices that the client of an answer that is not a stream has left after a second in which no slot produced
a result, and reports nothing to anyone. /slots lists the tokens of each busy slot, but not whose request it works on:
of those that may be the request's, the ones count that are as old as it is, at the pace at which they generate. A slot
keeps the tokens of its task, prompt included, until it gets the next one: their number is exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

_PACE_S = 0.2  # between the first two looks
_LINGER_S = 1.05  # from the last look until llama-server has noticed, and a little more
_LATER_S = 3600.0
_UNNOTICED_S = 3.0  # after so long other slots' results keep llama-server from noticing, and it goes on to the end

Slot = Mapping[str, Any]


class Generated(NamedTuple):
    """The tokens that were generated, and those of the prompts (None: not known). `is_exact`: both are certain."""

    tokens: int
    prompt: int | None
    is_exact: bool


@dataclass(frozen=True)
class _Task:
    """One task: its tokens when it was last seen at work, its pace in tokens per second, and its limit (-1: none).

    `prompt` is 0 until it is known. `ended_with` is how many tokens it had in the end, None if its slot does not say.
    """

    tokens: int
    prompt: int
    limit: int
    seen_s: float
    pace: float = 0.0
    ended_with: int | None = None

    def seen(self, slot: Slot, now_s: float) -> "_Task":
        """Return it as it is now, after a look at the slot that has its tokens."""
        if not _is_busy(slot):
            return replace(self, ended_with=self._in_the_end(slot))
        tokens, prompt = _decoded(slot), _prompt(slot)
        pace = (tokens - self.tokens) / (now_s - self.seen_s) if now_s > self.seen_s else self.pace
        return _Task(tokens, prompt, self.limit, now_s, max(pace, 0.0))

    def _in_the_end(self, slot: Slot) -> int | None:
        """Return how many tokens it has generated: the last one is not in the slot. A task may also empty its slot."""
        generated = _number(slot, "n_prompt_tokens") + 1 - self.prompt
        return generated if self.prompt and generated >= max(self.tokens, 1) else None

    def likely_end(self, *, goes_on: bool) -> int:
        """Return how many tokens it will have had in the end, which is its limit if it goes on."""
        if goes_on and self.limit >= 0:
            return self.limit
        return self._limited(round(self.tokens + self.pace * _LINGER_S))

    def end_with(self, other: "_Task") -> int:
        """Return how many tokens it has had if it ended with another task of its request."""
        assert other.ended_with is not None
        return self._limited(self.tokens + other.ended_with - other.tokens)

    def _limited(self, tokens: int) -> int:
        return min(tokens, self.limit) if self.limit >= 0 else tokens


def _first_seen(slot: Slot, now_s: float) -> _Task:
    return _Task(_decoded(slot), _prompt(slot), _limit(slot), now_s)


class GenerationWatch:
    """Follows the tokens of one request, which has `tasks` tasks and was sent `age_s` seconds ago.

    `prompts` is how many different prompts its tasks have. `slot` is the slot in which it runs, and `limit` the most
    tokens of a task, None if they are not known. `on_end` gets what was generated, None if nothing was seen of it; that
    is called once.
    """

    def __init__(
        self,
        tasks: int,
        age_s: float,
        limit: int | None,
        slot: int | None,
        on_end: Callable[[Generated | None], None],
        prompts: int = 1,
    ) -> None:
        self._tasks = tasks
        self._prompts = prompts
        self._age_s = age_s
        self._limit = limit
        self._slot = slot
        self._on_end = on_end
        self._began_s = 0.0
        self._candidates: dict[int, _Task] | None = None
        self._own: dict[int, _Task] | None = None
        self._at_work_s = -inf
        self._goes_on = False
        self._is_over = False

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look at most."""
        if self._own is not None or self._is_over:
            return _LATER_S
        return 0.0 if self._candidates is None else _PACE_S

    @property
    def at_work_s(self) -> float:
        """When the backend was last seen at work on it; -inf if it was not, at the last look."""
        return self._at_work_s

    def look(self, slots: Sequence[Slot], now_s: float, taken: set[int]) -> set[int]:
        """Look at all slots; return the tasks that are the request's. Those that are `taken` are not."""
        if self._is_over:
            return set()
        found = {slot["id_task"]: slot for slot in slots if type(slot.get("id_task")) is int}
        if self._own is not None:
            self._follow(self._own, found, now_s)
        elif self._candidates is None:
            self._began_s = now_s
            own = {task: slot for task, slot in found.items() if task not in taken and self._may_be_own(slot)}
            self._candidates = {task: _first_seen(slot, now_s) for task, slot in own.items()}
            self._own = None if own else {}
        else:
            self._own = self._choose(self._candidates, found, now_s, taken)
        own_tasks = set(self._own or ())
        is_at_work = any(_is_busy(found[task]) for task in own_tasks & found.keys())
        self._at_work_s = now_s if is_at_work else -inf
        return own_tasks

    def _choose(
        self, before: Mapping[int, _Task], found: Mapping[int, Slot], now_s: float, taken: set[int]
    ) -> dict[int, _Task]:
        """Return the tasks that have as many tokens as the request's must have by now, at their pace.

        Tasks that have ended come last: the request's seldom ends by itself so soon.
        """
        seen = {task: before[task].seen(found[task], now_s) for task in (before.keys() & found.keys()) - taken}
        age_s = self._age_s + now_s - self._began_s

        def distance(task: int) -> tuple[bool, float]:
            return not _is_busy(found[task]), abs(seen[task].tokens - seen[task].pace * age_s)

        return {task: seen[task] for task in sorted(seen, key=distance)[: self._tasks]}

    def _follow(self, own: dict[int, _Task], found: Mapping[int, Slot], now_s: float) -> None:
        listed = own.keys() & found.keys()
        own.update({task: own[task].seen(found[task], now_s) for task in listed})
        self._goes_on = now_s > self._began_s + _UNNOTICED_S and any(_is_busy(found[task]) for task in listed)

    def _may_be_own(self, slot: Slot) -> bool:
        if not _is_busy(slot) or (self._slot is not None and slot.get("id") != self._slot):
            return False
        if _params(slot).get("stream") is True:
            return False
        return self._limit is None or _limit(slot) == self._limit

    def forget_tasks(self) -> None:
        """Look no more: llama-server may be another process, whose tasks have the same numbers."""
        self._is_over = True
        self._at_work_s = -inf

    def end(self) -> None:
        """llama-server works on it no more, or it is not waited for any longer."""
        self._on_end(self._generated(list(self._own.values())) if self._own else None)

    def _generated(self, own: Sequence[_Task]) -> Generated:
        ended = [task for task in own if task.ended_with is not None]
        tokens = sum(task.ended_with or 0 for task in ended)
        for task in own:
            if task.ended_with is None:
                tokens += task.end_with(ended[0]) if ended else task.likely_end(goes_on=self._goes_on)
        is_known = len(own) == self._tasks and all(task.prompt for task in own)
        prompt = sum(task.prompt for task in own) * self._prompts // self._tasks if is_known else None
        is_alone = self._candidates is not None and len(self._candidates) == self._tasks
        return Generated(tokens, prompt, is_known and is_alone and len(ended) == self._tasks)


def _is_busy(slot: Slot) -> bool:
    return slot.get("is_processing") is True


def _params(slot: Slot) -> Mapping[str, Any]:
    params = slot.get("params")
    return params if isinstance(params, dict) else {}


def _limit(slot: Slot) -> int:
    """Return the most tokens that a slot will generate, -1 if there is no limit."""
    limit = _params(slot).get("n_predict")
    return limit if type(limit) is int else -1


def _decoded(slot: Slot) -> int:
    """Return how many tokens a slot has generated."""
    listed = slot.get("next_token")
    first = listed[0] if isinstance(listed, list) and listed else listed
    return _number(first, "n_decoded") if isinstance(first, dict) else 0


def _prompt(slot: Slot) -> int:
    """Return how many tokens the prompt of a slot's task has, 0 as long as they have not all been read."""
    return _number(slot, "n_prompt_tokens_processed") + _number(slot, "n_prompt_tokens_cache") if _decoded(slot) else 0


def _number(values: Mapping[str, Any], name: str) -> int:
    """Return a count, 0 if it is none."""
    value = values.get(name)
    return value if type(value) is int and value > 0 else 0
