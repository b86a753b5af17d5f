"""record_batch.py: the columns of requests that have ended, and the spans between two of them."""

import pytest

from accounting.record_batch import RecordBatch, spans_ms, spans_s
from accounting.request_record import Outcome
from accounting.token_estimates import TokenEstimator
from accounting.usage_reports import Tokens
from support.records import ANSWER, CHAT, NO_HEAD, PING, counted, record


def test_a_batch_has_a_column_for_each_thing_that_is_read() -> None:
    batch = RecordBatch(
        [record(), record(PING, key_id="-", status=503, outcome=Outcome.REFUSED)], TokenEstimator(), 1000.0
    )
    assert batch.labels == [CHAT.route.label, "/ping"]
    assert (batch.statuses, batch.key_ids, batch.outcomes) == ([200, 503], ["alice", "-"], ["done", "refused"])
    assert (batch.started_s, batch.first_byte_s, batch.ended_s) == ([100.0] * 2, [101.0] * 2, [102.0] * 2)
    assert (batch.queued_s, batch.left_queue_s) == ([100.25] * 2, [100.75] * 2)
    assert batch.epoch_s == 1000.0


@pytest.mark.parametrize("source", [ANSWER, counted(ANSWER)], ids=["a response that was kept", "one that was counted"])
def test_tokens_are_read_from_what_is_there(source: object) -> None:
    batch = RecordBatch([record(usage_source=source), record(usage_source=None), record(NO_HEAD)], TokenEstimator())
    assert batch.tokens == [Tokens(10, 3, 20, 350.0, 500.0), None, None]
    assert batch.used[:3] == ((10, 0, 0), (3, 0, 0), (20, 0, 0))
    assert batch.reported[:3] == ((10,), (3,), (20,))


def test_spans_are_those_of_requests_that_reached_the_end() -> None:
    assert spans_s([1.0, 2.0], [1.5, 4.0]) == [0.5, 2.0]
    assert spans_s([1.0, 2.0], [0.0, 4.0]) == [2.0]


def test_spans_in_milliseconds_have_a_zero_for_the_others() -> None:
    assert spans_ms([1.0, 2.0], [1.0006, 4.0]) == [1, 2000]
    assert spans_ms([1.0, 2.0], [0.0, 4.0]) == [0, 2000]


def test_no_request_that_did_not_wait_has_waited() -> None:
    assert spans_ms([0.0, 5.0], [0.0, 5.0]) == [0, 0]
