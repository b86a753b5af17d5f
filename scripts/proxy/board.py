"""The board's numbers, read from what the gateway has in memory: no call to the backend, no lock, no file."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from accounting.request_history import RequestHistory
from accounting.request_record import RequestRecord, Stage
from accounting.token_counter import TokenCounter
from backend.readiness import DRAINING, Readiness
from policy.fair_queue import FairQueue
from policy.model_scheduler import QueueTotals
from proxy.board_view import BoardState, CurrentRequest
from proxy.lifecycle import Lifecycle

_PACE_BEATS = 4  # of which the last and the first are compared
_CLOCK_SET_S = 0.5  # a smaller difference between the two clocks is none


@dataclass(frozen=True)
class BoardSources:
    """What is read. `records` returns the records of the requests that are being served, each with its slots.

    These are the slots in which the backend works on it. `models` returns name and state of each model. `clock` is the
    records' clock, `wall_clock` gives seconds since the epoch.
    """

    readiness: Readiness
    lifecycle: Lifecycle
    queue: FairQueue | QueueTotals
    records: Callable[[], Iterable[tuple[RequestRecord, int]]]
    connections: Callable[[], int]
    history: RequestHistory
    flush_accounts: Callable[[], None]
    models: Callable[[], Iterable[tuple[str, str]]]
    version: str
    clock: Callable[[], float]
    wall_clock: Callable[[], float]


class BoardReader:
    """Reads one BoardState after the other, once a second while there are viewers."""

    def __init__(self, sources: BoardSources) -> None:
        self._sources = sources
        self.history = sources.history
        self._started_at = sources.wall_clock()
        self._epoch_s = 0.0
        self._totals: deque[tuple[float, Mapping[str, int]]] = deque(maxlen=_PACE_BEATS)

    def idle_s(self) -> float:
        """Return the seconds since the last inference ended; 0 while one runs or waits."""
        return self._sources.queue.idle_s()

    def read(self, key_ids: Collection[str], viewers: int) -> BoardState:
        """Return this moment's state. `key_ids` are the keys whose pace is wanted, "" for all together."""
        sources, queue, readiness = self._sources, self._sources.queue, self._sources.readiness
        sources.flush_accounts()
        now_s = sources.clock()
        epoch_s = sources.wall_clock() - now_s
        if abs(epoch_s - self._epoch_s) > _CLOCK_SET_S:
            self._epoch_s = epoch_s
        running, waiting = self._current_requests()
        return BoardState(
            now_s=now_s,
            epoch_s=self._epoch_s,
            state=DRAINING if sources.lifecycle.draining else readiness.state,
            since_at=readiness.since_at,
            detail=readiness.detail,
            models=tuple(sources.models()),
            version=sources.version,
            started_at=self._started_at,
            slots=queue.slots,
            active=queue.active,
            connections=sources.connections(),
            viewers=viewers,
            order=queue.order(),
            running=running,
            waiting=waiting,
            speeds=self._speeds(now_s, key_ids, running),
        )

    def _current_requests(self) -> tuple[list[CurrentRequest], list[CurrentRequest]]:
        """Return the requests at work, the oldest first, and those that wait for slots."""
        running, waiting = [], []
        for record, slots in self._sources.records():
            label = record.prepared.route.label
            if slots:
                began_s = record.left_queue_s or record.queued_s
                tokens = record.usage_source.events if isinstance(record.usage_source, TokenCounter) else 0
                running.append(CurrentRequest(record.key_id, label, began_s, record.first_byte_s, tokens, slots))
            elif record.stage is Stage.QUEUED and record.prepared.route.kind.slot:
                waiting.append(CurrentRequest(record.key_id, label, record.queued_s))
        running.sort(key=lambda request: request.since_s)
        return running, waiting

    def _speeds(self, now_s: float, key_ids: Collection[str], running: Iterable[CurrentRequest]) -> dict[str, float]:
        """Return the tokens per second of each key in the last seconds."""
        totals = {}
        for key_id in key_ids:
            history = self.history.of(key_id) if key_id else self.history.all
            live = sum(request.tokens for request in running if key_id in ("", request.key_id))
            totals[key_id] = history.completion + live
        if self._totals and now_s - self._totals[-1][0] > 2 * _PACE_BEATS:  # there have been no viewers
            self._totals.clear()
        self._totals.append((now_s, totals))
        return {key_id: self._speed(now_s, key_id, total) for key_id, total in totals.items()}

    def _speed(self, now_s: float, key_id: str, total: int) -> float:
        """Return the tokens per second since the oldest total of a key that is remembered."""
        since_s, before = next((at_s, totals[key_id]) for at_s, totals in self._totals if key_id in totals)
        return max(0.0, (total - before) / (now_s - since_s)) if now_s > since_s else 0.0
