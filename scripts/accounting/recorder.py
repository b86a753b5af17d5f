"""The one place that counts requests, charges keys and writes access lines, so that the three always agree."""

import logging
from collections import Counter as Tally
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import sub
from typing import TypeVar

from accounting.access_file import AccessLog
from accounting.access_lines import json_lines, text_lines
from accounting.ledger import Charge, Ledger, add_up, charge
from accounting.record_batch import RecordBatch, spans_s
from accounting.request_history import RequestHistory
from accounting.request_metrics import TOKEN_TYPES, KeyCounts, RequestMetrics
from accounting.request_record import NO_MODEL, Outcome, RequestRecord
from accounting.token_counter import TokenCounter
from accounting.token_estimates import TokenEstimator
from accounting.usage_reports import TokenColumns, Tokens
from auth import NO_KEY
from core.errors import (
    INVALID_API_KEY,
    QUEUE_FULL,
    RATE_LIMIT_EXCEEDED,
    TOKEN_QUOTA_EXCEEDED,
    TOKEN_RATE_EXCEEDED,
)

log = logging.getLogger("gateway")

L = TypeVar("L", bound=Hashable)

_BATCH = 256
OTHER_MODEL = "other"  # of requests that were for no model that there is
_BOARD = "/ui/events"  # open for as long as someone looks
_LIMITED = (RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED, TOKEN_RATE_EXCEEDED)


class InvalidKeyLog:
    """Logs requests without a valid key, and with one that does not work from their address.

    It writes so few lines that a flood cannot fill the log.
    """

    LINES = 10
    WINDOW_S = 60.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._count = 0

    def add(self, record: RequestRecord) -> None:
        self._count += 1
        if self._count <= self.LINES:
            label = record.prepared.route.label
            reason = "no valid key" if record.key_id == NO_KEY else f"key {record.key_id} from elsewhere than its from="
            log.warning("%s: %s for %s (request %s)", reason, record.peer, label, record.id.decode())

    def sum_up(self) -> None:
        """Once per window, log how many requests got no line."""
        now_s = self._clock()
        if now_s - self._began_s >= self.WINDOW_S:
            if self._count > self.LINES:
                log.warning("no valid key: %d more requests in the last minute", self._count - self.LINES)
            self._began_s, self._count = now_s, 0


class Recorder:
    """Counts every request once, charges its key once and writes its access line once.

    Requests are taken in batches, a few times a second and before anything reads the numbers: no client waits for it.
    """

    def __init__(
        self,
        metrics: RequestMetrics,
        keys: KeyCounts,
        ledger: Ledger,
        access_log: AccessLog | None,
        estimator: TokenEstimator,
        *,
        as_json: bool,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """`clock` is the records' monotonic one, `wall_clock` gives seconds since the epoch."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._metrics = metrics
        self._keys = keys
        self._invalid_keys = InvalidKeyLog(clock)
        self._ledger = ledger
        self._access_log = access_log
        self._estimator = estimator
        self._lines = json_lines if as_json else text_lines
        self._ended: list[RequestRecord] = []
        self.served_s: float | None = None  # when the last response with tokens was counted, by `clock`
        self._has_reservations = False  # one of them has
        self.history: RequestHistory | None = None  # that the board shows; None without a board

    def record(self, record: RequestRecord) -> None:
        self._ended.append(record)
        if record.reservation is not None:
            self._has_reservations = True
        if len(self._ended) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Count all requests that have ended by now."""
        self._invalid_keys.sum_up()
        ended, self._ended = self._ended, []
        if not ended:
            return
        batch = RecordBatch(ended, self._estimator, self._wall_clock() - self._clock())
        self._count(batch)
        self._count_ends(batch)
        self._count_tokens(batch.reported)
        self._charge(batch)
        if self._has_reservations:
            self._has_reservations = False
            _settle(batch)
        self._estimator.learn(ended, batch.tokens)
        if self.history is not None:
            self.history.add(batch)
        if self._access_log is not None:
            self._access_log.write_lines(self._lines(batch))

    def _count(self, batch: RecordBatch) -> None:
        metrics = self._metrics
        if metrics.by_model:
            self._count_by_model(batch)
        else:
            for (label, status), number in _tally(batch.labels, batch.statuses).items():
                metrics.requests.inc((label, str(status)), number)
            metrics.first_byte.observe_all(spans_s(batch.started_s, batch.first_byte_s))
        metrics.bytes_sent.inc((), sum([record.bytes_out for record in batch.records]))
        metrics.duration.observe_all(_durations_s(batch))
        metrics.queue_wait.observe_all(spans_s(batch.queued_s, batch.left_queue_s))

    def _count_by_model(self, batch: RecordBatch) -> None:
        """Count requests, time to the first byte and tokens of each model. A request without one has `other`."""
        metrics = self._metrics
        models = list(map(_model_of, batch.records))
        for (label, status, model), number in Tally(zip(batch.labels, batch.statuses, models, strict=True)).items():
            metrics.requests.inc((label, str(status), model), number)
        for record, model in zip(batch.records, models, strict=True):
            if record.first_byte_s:
                metrics.first_byte.observe(record.first_byte_s - record.started_s, (model,))
        for tokens, model in zip(batch.tokens, models, strict=True):
            if tokens is not None:
                for kind, count in zip(TOKEN_TYPES, tokens[:3], strict=True):
                    metrics.tokens.inc((kind, model), count)

    def _count_ends(self, batch: RecordBatch) -> None:
        """Count refusals and cancellations, and the pace of streams."""
        if any(batch.refusals) or Outcome.CANCELLED in batch.outcomes:
            for record in batch.records:
                self._count_end(record)
        streams = [
            (record.ended_s - record.first_byte_s, record.usage_source.events - 1)
            for record in batch.records
            if type(record.usage_source) is TokenCounter and not record.is_unfinished  # else it was counted on
        ]
        self._metrics.gap.observe_all([span_s / gaps for span_s, gaps in streams if gaps > 0])

    def _count_end(self, record: RequestRecord) -> None:
        metrics = self._metrics
        if record.outcome is Outcome.CANCELLED:
            metrics.cancelled.inc((record.stage,))
        if record.refusal is INVALID_API_KEY:
            metrics.unauthorized.inc()
            self._invalid_keys.add(record)
        elif record.refusal in _LIMITED:
            metrics.rate_limited.inc()
        elif record.refusal is QUEUE_FULL:
            metrics.queue_rejections.inc()

    def _count_tokens(self, reported: TokenColumns) -> None:
        metrics = self._metrics
        prompts, cacheds, completions, prompt_ms, predicted_ms, _ = reported
        if not prompts:
            return
        if not metrics.by_model:
            for kind, numbers in zip(TOKEN_TYPES, (prompts, cacheds, completions), strict=True):
                metrics.tokens.inc((kind,), sum(numbers))
        of_reports = reported.cacheds_of_reports() if any(reported.estimateds) else cacheds
        if of_reports:  # an estimate alone is no sign that the backend serves
            self.served_s = self._clock()
            metrics.cached.observe_all(of_reports, metrics.cache_mode)
        metrics.prompt_speed.observe_all(_speeds(map(sub, prompts, cacheds), prompt_ms))
        metrics.generation_speed.observe_all(_speeds(completions, predicted_ms))

    def _charge(self, batch: RecordBatch) -> None:
        """Charge each key with its requests on metered routes."""
        charges = _charges(batch, batch.key_ids)
        charges.pop(NO_KEY, None)
        self._keys.add(batch.key_ids, charges)
        if self._metrics.by_model:
            by_model = _charges(batch, [(record.key_id, _model_of(record)) for record in batch.records])
            self._ledger.record(charges, {labels: each for labels, each in by_model.items() if labels[0] != NO_KEY})
        else:
            self._ledger.record(charges)


def _charges(batch: RecordBatch, labels: Sequence[L]) -> dict[L, Charge]:
    """Add up the requests on metered routes that have the same label; there is one for each request of the batch."""
    metered = [record.prepared.route.kind.metered for record in batch.records]
    if all(metered) and labels.count(labels[0]) == len(labels):  # the batch's columns are the only label's
        return {labels[0]: add_up(batch.reported, batch.outcomes)}
    uses: dict[L, list[tuple[Tokens | None, str]]] = {}
    for label, tokens, outcome, is_metered in zip(labels, batch.tokens, batch.outcomes, metered, strict=True):
        if is_metered:
            uses.setdefault(label, []).append((tokens, outcome))
    return {label: charge(own) for label, own in uses.items()}


def _tally(labels: Sequence[str], statuses: Sequence[int]) -> Mapping[tuple[str, int], int]:
    """Count the requests of each route and status. Most batches have one of each, which is soon seen."""
    label, status, number = labels[0], statuses[0], len(labels)
    if labels.count(label) == number and statuses.count(status) == number:
        return {(label, status): number}
    return Tally(zip(labels, statuses, strict=True))


def _model_of(record: RequestRecord) -> str:
    return OTHER_MODEL if record.model == NO_MODEL else record.model


def _durations_s(batch: RecordBatch) -> list[float]:
    """Return how long each request took, without the streams of the board."""
    durations_s = spans_s(batch.started_s, batch.ended_s)
    if _BOARD not in batch.labels:
        return durations_s
    return [span_s for label, span_s in zip(batch.labels, durations_s, strict=True) if label != _BOARD]


def _settle(batch: RecordBatch) -> None:
    """Let what was reserved for the requests count with what they have used."""
    for record, tokens in zip(batch.records, batch.tokens, strict=True):
        if record.reservation is not None:
            record.reservation.settle(0 if tokens is None else tokens.prompt + tokens.completion)


def _speeds(tokens: Iterable[int], spans_ms: Sequence[float]) -> list[float]:
    """Return tokens per second, for the spans that were reported."""
    return [number * 1000 / ms for number, ms in zip(tokens, spans_ms, strict=True) if ms > 0]
