"""history.py: what is remembered of the last requests, of all keys and of each by itself."""

import pytest

from accounting.record_batch import RecordBatch
from accounting.request_history import (
    MOST_KEYS,
    MOST_ROWS,
    STEP_S,
    STEPS,
    EndedRequest,
    KeyHistory,
    RequestHistory,
    TokenSeries,
)
from accounting.request_record import Outcome, RequestRecord
from accounting.token_estimates import TokenEstimator
from core.errors import INVALID_API_KEY, QUEUE_FULL, ROUTE_NOT_FOUND, Kind
from support.records import NO_HEAD, PING, record


def after(*records: RequestRecord) -> RequestHistory:
    history = RequestHistory()
    history.add(RecordBatch(records, TokenEstimator()))
    return history


def test_a_request_has_its_row_with_times_and_tokens() -> None:
    history = after(record())
    (row,) = history.all.rows
    assert (row.id, row.key_id, row.label, row.status, row.failure) == (
        b"req-1",
        "alice",
        "/v1/chat/completions",
        200,
        "",
    )
    assert (row.started_s, row.queued_s, row.left_queue_s, row.first_byte_s, row.ended_s) == (
        100.0,
        100.25,
        100.75,
        101.0,
        102.0,
    )
    assert (row.prompt, row.completion) == (10, 20)
    assert history.of("alice").rows == [row]


def test_a_request_without_tokens_is_listed() -> None:
    history = after(record(usage_source=None))
    assert (history.all.added, history.all.completion, sum(history.all.series.values(102.0))) == (1, 0, 0)


def test_each_key_has_its_own_requests_only() -> None:
    history = after(record(name="a1"), record(name="b1", key_id="bob"), record(name="a2"))
    assert [row.id for row in history.of("alice").rows] == [b"a1", b"a2"]
    assert [row.id for row in history.of("bob").rows] == [b"b1"]
    assert [row.id for row in history.all.rows] == [b"a1", b"b1", b"a2"]
    assert history.of("alice").completion == 40
    assert history.all.completion == 60
    assert history.of("carol").added == 0


def test_what_others_do_pushes_no_row_of_a_key_out() -> None:
    history = after(record(name="a1"))
    for _ in range(3):
        history.add(RecordBatch([record(key_id="bob")] * MOST_ROWS, TokenEstimator()))
    assert [row.id for row in history.of("alice").rows] == [b"a1"]
    assert len(history.all.rows) == MOST_ROWS
    assert history.all.added == 3 * MOST_ROWS + 1


def test_the_gateways_own_endpoints_are_left_out() -> None:
    history = after(record(PING), record(PING, refusal=INVALID_API_KEY, outcome=Outcome.REFUSED, status=401))
    assert (history.all.added, history.all.failures) == (0, {})


@pytest.mark.parametrize("kind", [INVALID_API_KEY, ROUTE_NOT_FOUND])
def test_a_stranger_is_counted_and_not_listed(kind: Kind) -> None:
    history = after(record(key_id="-", refusal=kind, outcome=Outcome.REFUSED, status=kind.status, usage_source=None))
    assert history.all.failures == {kind.code: 1}
    assert not history.all.rows


def test_a_head_that_could_not_be_read_is_counted_and_not_listed() -> None:
    history = after(record(NO_HEAD, key_id="-", outcome=Outcome.REFUSED, status=400))
    assert (history.all.failures, len(history.all.rows)) == ({"refused": 1}, 0)


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"refusal": QUEUE_FULL, "outcome": Outcome.REFUSED, "status": 503}, "queue_full"),
        ({"outcome": Outcome.CANCELLED, "status": 499}, "cancelled"),
        ({"outcome": Outcome.TRUNCATED}, "truncated"),
        ({"status": 400}, "backend_400"),
    ],
)
def test_a_failure_is_listed_and_counted_by_its_kind(changes: dict[str, object], failure: str) -> None:
    history = after(record(**changes, usage_source=None), record())
    assert history.of("alice").failures == {failure: 1}
    assert [row.failure for row in history.of("alice").rows] == [failure, ""]


def test_the_key_that_was_served_longest_ago_is_forgotten() -> None:
    history = RequestHistory()
    names = [f"k{number}" for number in range(MOST_KEYS)]
    for name in [*names, "k0", "new"]:
        history.add(RecordBatch([record(key_id=name)], TokenEstimator()))
    assert history.of("k1").added == 0
    assert history.of("k0").added == 2
    assert history.key_ids[:2] == ["new", "k0"]
    assert len(history.key_ids) == MOST_KEYS


def test_the_newest_rows_come_first() -> None:
    history = after(*(record(name=f"r{number}") for number in range(5)))
    assert [row.id for row in history.all.newest(2)] == [b"r4", b"r3"]


# --- Tokens over time ---


def test_tokens_of_a_short_answer_count_at_its_end() -> None:
    values = after(record()).all.series.values(102.0)
    assert (len(values), values[-1], sum(values)) == (STEPS, 20, 20)


def test_tokens_of_a_long_answer_are_spread_over_its_time() -> None:
    values = after(record(first_byte_s=92.5, ended_s=102.5)).all.series.values(102.5)
    assert values[-3:] == [5.0, 10.0, 5.0]


def test_an_answer_of_which_no_first_byte_is_known_counts_at_its_end() -> None:
    row = EndedRequest(b"r", "a", "/x", 200, Outcome.DONE, None, 0.0, 0.0, 0.0, 0.0, 50.0, 1, 8)
    history = KeyHistory()
    history.add([[value] for value in row], 50.0, plain=False)
    assert history.series.values(50.0)[-1] == 8


def test_a_series_forgets_what_is_older() -> None:
    series = TokenSeries()
    series.add(1, 1000.0)
    series.add(2, 1000.0 + STEP_S)
    assert series.values(1000.0 + STEP_S)[-2:] == [1, 2]
    assert series.values(1000.0 + STEP_S * STEPS)[0] == 2
    assert sum(series.values(1000.0 + STEP_S * (STEPS + 1))) == 0
    series.add(4, 1000.0)
    assert sum(series.values(1000.0 + STEP_S * (STEPS + 1))) == 0


def test_a_longer_answer_than_a_series_counts_as_far_as_it_reaches() -> None:
    series = TokenSeries()
    series.spread(STEPS * 4, 0.0, STEP_S * STEPS * 2.0)
    values = series.values(STEP_S * STEPS * 2.0)
    assert values[-2] == 2.0
    assert sum(values) == pytest.approx(STEPS * 2.0 - 2.0)


def test_a_copy_leaves_the_series_as_it_is() -> None:
    series = TokenSeries()
    series.copy().spread(10, 5.0, 5.0)
    assert sum(series.values(5.0)) == 0


def test_the_newest_rows_are_kept_whatever_the_sizes_of_the_batches() -> None:
    history = RequestHistory()
    numbers = iter(range(10_000))
    for size in (1, MOST_ROWS - 1, 1, 7, 2 * MOST_ROWS, 3, MOST_ROWS, 1):
        batch = [record(id=b"%d" % next(numbers)) for _ in range(size)]
        history.add(RecordBatch(batch, TokenEstimator()))
        last = int(batch[-1].id)
        wanted = [b"%d" % number for number in range(max(0, last + 1 - MOST_ROWS), last + 1)]
        assert [row.id for row in history.all.rows] == wanted
        assert [row.id for row in history.of("alice").newest(2)] == wanted[-1:-3:-1]
        assert history.all.added == last + 1
