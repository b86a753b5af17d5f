"""What llama-server generates for a request that was given up before its answer, as GET /slots shows it.

llama-server notices that the client of an answer that is not a stream has left after a second in which no slot produced
a result, and reports nothing to anyone. /slots lists the tokens of each busy slot, but not whose request it works on:
of those that may be the request's, the ones count that are as old as it is, at the pace at which they generate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_PACE_S = 0.2  # between the first two looks
_LINGER_S = 1.05  # from the last look until llama-server has noticed, and a little more
_LATER_S = 3600.0
_UNNOTICED_S = 3.0  # after so long other slots' results keep llama-server from noticing, and it goes on to the end


class _Progress(NamedTuple):
    """One task: the tokens that it has, when that was seen, its pace in tokens per second, and its limit."""

    tokens: int
    seen_s: float
    pace: float
    limit: int

    def later(self, tokens: int, now_s: float) -> "_Progress":
        pace = (tokens - self.tokens) / (now_s - self.seen_s) if now_s > self.seen_s else self.pace
        return _Progress(tokens, now_s, max(pace, 0.0), self.limit)

    def final(self, *, goes_on: bool) -> int:
        """Return what it will have had in the end, which is its limit if it goes on."""
        if goes_on and self.limit >= 0:
            return self.limit
        tokens = round(self.tokens + self.pace * _LINGER_S)
        return min(tokens, self.limit) if self.limit >= 0 else tokens


class GenerationWatch:
    """Follows the tokens of one request, which has `tasks` tasks and was sent `age_s` seconds ago.

    `slot` is the slot in which it runs, and `limit` the most tokens of a task, None if they are not known. `on_end`
    gets the tokens, None if nothing was seen of it; that is called once.
    """

    def __init__(
        self, tasks: int, age_s: float, limit: int | None, slot: int | None, on_end: Callable[[int | None], None]
    ) -> None:
        self._tasks = tasks
        self._age_s = age_s
        self._limit = limit
        self._slot = slot
        self._on_end = on_end
        self._began_s = 0.0
        self._candidates: dict[int, _Progress] | None = None
        self._own: dict[int, _Progress] | None = None
        self._goes_on = False

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look at most."""
        if self._own is not None:
            return _LATER_S
        return 0.0 if self._candidates is None else _PACE_S

    def look(self, busy: Sequence[Mapping[str, Any]], now_s: float, taken: set[int]) -> set[int]:
        """Look at the busy slots; return the tasks that are the request's. Those that are `taken` are not."""
        if self._own is not None:
            self._follow(self._own, busy, now_s)
            return set(self._own)
        found = {slot["id_task"]: slot for slot in busy if self._may_be_own(slot) and slot["id_task"] not in taken}
        if self._candidates is None:
            self._began_s = now_s
            self._candidates = {
                task: _Progress(_decoded(slot), now_s, 0.0, _limit(slot)) for task, slot in found.items()
            }
            self._own = None if found else {}
        else:
            self._own = self._choose(self._candidates, found, now_s)
        return set(self._own or ())

    def _choose(
        self, before: Mapping[int, _Progress], found: Mapping[int, Mapping[str, Any]], now_s: float
    ) -> dict[int, _Progress]:
        """Return the tasks that have as many tokens as the request's must have by now, at their pace."""
        seen = {task: before[task].later(_decoded(slot), now_s) for task, slot in found.items() if task in before}
        age_s = self._age_s + now_s - self._began_s
        nearest = sorted(seen, key=lambda task: abs(seen[task].tokens - seen[task].pace * age_s))
        return {task: seen[task] for task in nearest[: self._tasks]}

    def _follow(self, own: dict[int, _Progress], busy: Sequence[Mapping[str, Any]], now_s: float) -> None:
        still = {slot["id_task"]: slot for slot in busy if slot.get("id_task") in own}
        own.update({task: own[task].later(_decoded(slot), now_s) for task, slot in still.items()})
        self._goes_on = bool(still) and now_s > self._began_s + _UNNOTICED_S

    def _may_be_own(self, slot: Mapping[str, Any]) -> bool:
        if type(slot.get("id_task")) is not int or (self._slot is not None and slot.get("id") != self._slot):
            return False
        if _params(slot).get("stream") is True:
            return False
        return self._limit is None or _limit(slot) == self._limit

    def end(self) -> None:
        """llama-server works on it no more, or it is not waited for any longer."""
        own = self._own or {}
        self._on_end(sum(each.final(goes_on=self._goes_on) for each in own.values()) if own else None)


def _params(slot: Mapping[str, Any]) -> Mapping[str, Any]:
    params = slot.get("params")
    return params if isinstance(params, dict) else {}


def _limit(slot: Mapping[str, Any]) -> int:
    """Return the most tokens that a slot will generate, -1 if there is no limit."""
    limit = _params(slot).get("n_predict")
    return limit if type(limit) is int else -1


def _decoded(slot: Mapping[str, Any]) -> int:
    """Return how many tokens a slot has generated."""
    listed = slot.get("next_token")
    first = listed[0] if isinstance(listed, list) and listed else listed
    tokens = first.get("n_decoded") if isinstance(first, dict) else 0
    return tokens if type(tokens) is int and tokens > 0 else 0
