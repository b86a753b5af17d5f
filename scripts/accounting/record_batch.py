"""Requests that have ended, read column by column.

The interpreter sums, sorts and formats a column in a fraction of the time that single requests would take.
"""

from collections.abc import Sequence
from operator import sub

from accounting.request_record import RequestRecord
from accounting.token_estimates import TokenEstimator
from accounting.usage_reports import NO_TOKENS, token_columns


class RecordBatch:
    """The columns that several readers want; others are read from `records`.

    `tokens` are the tokens of each request, None for one that used none. `reported` are the columns of those that used
    some, `used` those of all, with 0 for the others. `epoch_s` is the time, in seconds since the epoch, at which the
    records' clock was 0.
    """

    def __init__(self, records: Sequence[RequestRecord], estimator: TokenEstimator, epoch_s: float = 0.0) -> None:
        self.records = records
        self.epoch_s = epoch_s
        self.ids = [record.id for record in records]
        self.labels = [record.prepared.route.label for record in records]
        self.statuses = [record.status for record in records]
        self.key_ids = [record.key_id for record in records]
        self.refusals = [record.refusal for record in records]
        self.outcomes = [record.outcome for record in records]
        self.started_s = [record.started_s for record in records]
        self.queued_s = [record.queued_s for record in records]
        self.left_queue_s = [record.left_queue_s for record in records]
        self.first_byte_s = [record.first_byte_s for record in records]
        self.ended_s = [record.ended_s for record in records]
        self.tokens = list(map(estimator.tokens_of, records))
        reported = [tokens for tokens in self.tokens if tokens is not None]
        self.reported = token_columns(reported)
        all_have_tokens = len(reported) == len(records)
        self.used = self.reported if all_have_tokens else token_columns([each or NO_TOKENS for each in self.tokens])


def spans_s(begins: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Return the seconds between two times, for the requests that reached the second."""
    if all(ends):
        return list(map(sub, ends, begins))
    return [end_s - begin_s for begin_s, end_s in zip(begins, ends, strict=True) if end_s]


def spans_ms(begins: Sequence[float], ends: Sequence[float]) -> list[int]:
    """Return whole milliseconds between two times, 0 for a request that did not reach the second."""
    if begins == ends:  # no request had to wait
        return [0] * len(ends)
    if all(ends):
        return [round(span_s * 1000) for span_s in map(sub, ends, begins)]
    return [round((end_s - begin_s) * 1000) if end_s else 0 for begin_s, end_s in zip(begins, ends, strict=True)]
