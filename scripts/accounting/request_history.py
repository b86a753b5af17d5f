"""What the requests of the last minutes were, in bounded memory: of all keys together, and of each key by itself.

The recorder adds each batch of requests that have ended. Nothing of a key's own part depends on what others do.
"""

from collections import Counter as Tally
from collections import deque
from collections.abc import Sequence
from itertools import chain
from operator import sub
from typing import Any, NamedTuple

from accounting.record_batch import RecordBatch
from accounting.request_record import Outcome
from core.errors import INVALID_API_KEY, ROUTE_NOT_FOUND, Kind
from policy.routes import TABLE, UNROUTED

MOST_ROWS = 100  # of requests that are remembered, of all keys and of each key
MOST_KEYS = 128  # with a part of their own; the one that was served longest ago is forgotten
STEP_S = 5  # of a series
STEPS = 180  # of a series: 15 minutes
_DONE = Outcome.DONE
_LOCAL = frozenset(path for _, path, kind in TABLE if kind.local)
# Requests, each field of an EndedRequest as one sequence: hundreds are counted for each one that is read.
Rows = Sequence[Sequence[Any]]
# Such requests are counted, but any stranger could fill the list with them.
_UNLISTED = (INVALID_API_KEY, ROUTE_NOT_FOUND)


class EndedRequest(NamedTuple):
    """One request that has ended. Times are seconds of the recorder's clock, 0 for what was not reached."""

    id: bytes
    key_id: str
    label: str
    status: int
    outcome: str
    refusal: Kind | None
    started_s: float
    queued_s: float
    left_queue_s: float
    first_byte_s: float
    ended_s: float
    prompt: int
    completion: int

    @property
    def failure(self) -> str:
        """Why it did not go well: an error's code, an outcome, or the backend's status; empty if it did."""
        if self.refusal is not None:
            return self.refusal.code
        if self.outcome != _DONE:
            return self.outcome
        return f"backend_{self.status}" if self.status >= 400 else ""


_KEY_ID, _LABEL, _COMPLETION = map(EndedRequest._fields.index, ("key_id", "label", "completion"))


class TokenSeries:
    """Generated tokens in steps of STEP_S seconds, the last STEPS of them. Times are seconds of one clock."""

    __slots__ = ("_newest", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[float] = [0.0] * STEPS
        self._newest = 0  # the number of the newest step; a step's place is its number modulo STEPS

    def add(self, tokens: float, end_s: float) -> None:
        """Count tokens in the step of their end."""
        step = int(end_s // STEP_S)
        self._advance(step)
        if step > self._newest - STEPS:
            self._tokens[step % STEPS] += tokens

    def spread(self, tokens: float, begin_s: float, end_s: float) -> None:
        """Count the tokens of a response evenly between its first byte and its end."""
        span_s = end_s - begin_s
        first, last = int(begin_s // STEP_S), int(end_s // STEP_S)
        if span_s <= 0 or first == last:
            self.add(tokens, end_s)
            return
        for step in range(max(first, last - STEPS + 1), last + 1):
            within_s = min((step + 1) * STEP_S, end_s) - max(step * STEP_S, begin_s)
            self.add(tokens * within_s / span_s, step * STEP_S)

    def _advance(self, step: int) -> None:
        """Begin the steps up to this one."""
        for each in range(max(self._newest, step - STEPS) + 1, step + 1):
            self._tokens[each % STEPS] = 0.0
        self._newest = max(self._newest, step)

    def copy(self) -> "TokenSeries":
        series = TokenSeries()
        series._tokens, series._newest = self._tokens[:], self._newest
        return series

    def values(self, now_s: float) -> list[float]:
        """Return the tokens of the last STEPS steps, that of now at the end."""
        self._advance(int(now_s // STEP_S))
        at = self._newest % STEPS + 1
        return self._tokens[at:] + self._tokens[:at]


class KeyHistory:
    """What the requests of one key were, or those of all keys.

    `added` is how many rows there have ever been. `failures` counts by what EndedRequest.failure says, `completion` is
    the sum of all generated tokens.
    """

    __slots__ = ("_batches", "_kept", "added", "completion", "failures", "series")

    def __init__(self) -> None:
        self._batches: deque[Rows] = deque()  # of the last MOST_ROWS requests, and of some before
        self._kept = 0
        self.added = 0
        self.failures: Tally[str] = Tally()
        self.series = TokenSeries()
        self.completion = 0

    def add(self, rows: Rows, end_s: float, *, plain: bool) -> None:
        """Count requests that have ended, the newest at the end, at `end_s`.

        `plain`: all went well, and no response took longer than a step of the series.
        """
        if not plain:
            self._add_each(list(map(EndedRequest._make, zip(*rows, strict=True))))
            return
        self._keep(rows)
        tokens = sum(rows[_COMPLETION])
        if tokens:
            self.completion += tokens
            self.series.add(tokens, end_s)

    def _add_each(self, rows: list[EndedRequest]) -> None:
        self.failures.update(row.failure for row in rows if row.failure)
        listed = [row for row in rows if row.refusal not in _UNLISTED and row.label != UNROUTED.label]
        if listed:
            self._keep(tuple(zip(*listed, strict=True)))
        for row in rows:
            if row.completion:
                self.completion += row.completion
                self.series.spread(row.completion, row.first_byte_s or row.ended_s, row.ended_s)

    def _keep(self, rows: Rows) -> None:
        """List requests, and forget those that more than MOST_ROWS follow."""
        batches = self._batches
        batches.append(rows)
        self.added += len(rows[0])
        self._kept += len(rows[0])
        while self._kept - len(batches[0][0]) >= MOST_ROWS:
            self._kept -= len(batches.popleft()[0])

    @property
    def rows(self) -> list[EndedRequest]:
        """The last requests that have ended, the newest at the end."""
        rows = chain.from_iterable(zip(*batch, strict=True) for batch in self._batches)
        return [EndedRequest._make(row) for row in rows][-MOST_ROWS:]

    def newest(self, count: int) -> list[EndedRequest]:
        """Return the last rows, at most so many, the newest first."""
        return self.rows[: -count - 1 : -1]


class RequestHistory:
    """What the requests were: `all` of all keys, `of` a key its own."""

    def __init__(self) -> None:
        self.all = KeyHistory()
        self._keys: dict[str, KeyHistory] = {}  # the one served longest ago first

    def add(self, batch: RecordBatch) -> None:
        """Count requests that have ended, without those for the gateway's own endpoints.

        Every request is counted here. What goes well is not looked at one by one.
        """
        rows, end_s = self._rows(batch), batch.ended_s[-1]
        if not _LOCAL.isdisjoint(batch.labels):
            rows = tuple(zip(*[row for row in zip(*rows, strict=True) if row[_LABEL] not in _LOCAL], strict=True))
            if not rows:
                return
        all_done = batch.outcomes.count(_DONE) == len(batch.outcomes) and max(batch.statuses) < 400
        plain = all_done and max(map(sub, batch.ended_s, batch.first_byte_s)) <= STEP_S
        self.all.add(rows, end_s, plain=plain)
        key_id = rows[_KEY_ID][0]
        if batch.key_ids.count(key_id) == len(batch.key_ids):
            self._own(key_id).add(rows, end_s, plain=plain)
            return
        by_key: dict[str, list[tuple[Any, ...]]] = {}
        for row in zip(*rows, strict=True):
            by_key.setdefault(row[_KEY_ID], []).append(row)
        for key_id, own in by_key.items():
            self._own(key_id).add(tuple(zip(*own, strict=True)), end_s, plain=plain)

    @staticmethod
    def _rows(batch: RecordBatch) -> Rows:
        """Return the fields of an EndedRequest of each request."""
        return (
            batch.ids,
            batch.key_ids,
            batch.labels,
            batch.statuses,
            batch.outcomes,
            batch.refusals,
            batch.started_s,
            batch.queued_s,
            batch.left_queue_s,
            batch.first_byte_s,
            batch.ended_s,
            batch.used.prompts,
            batch.used.completions,
        )

    def _own(self, key_id: str) -> KeyHistory:
        """Return a key's part, and make it the newest."""
        own = self._keys.pop(key_id, None)
        if own is None:
            own = KeyHistory()
            if len(self._keys) >= MOST_KEYS:
                del self._keys[next(iter(self._keys))]
        self._keys[key_id] = own
        return own

    def of(self, key_id: str) -> KeyHistory:
        """Return a key's part; an empty one if nothing is known of it."""
        return self._keys.get(key_id) or KeyHistory()

    @property
    def key_ids(self) -> list[str]:
        """The keys that have a part, the one served last first."""
        return list(reversed(self._keys))
