"""The figures: percentiles, summaries, and what the gateway adds."""

from dataclasses import replace

import pytest

from bench.client import Sample
from bench.stats import Percentiles, Run, overheads, percentile, summarize
from support.benchmarks import make_run


def test_percentiles_are_interpolated() -> None:
    assert [percentile([4, 1, 3, 2], percent) for percent in (0, 50, 90, 100)] == [1, 2.5, pytest.approx(3.7), 4]
    assert percentile([5], 99) == 5
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_summary_contains_successful_requests_and_counts_the_errors() -> None:
    runs = [make_run("direct", 1, 0.1), make_run("direct", 2, 0.3), make_run("direct", 3, 9.0, error="timed out")]
    summary = summarize(runs)[0]
    assert (summary.requests, summary.errors) == (6, {"timed out": 2})
    assert summary.first_ms == Percentiles(4, 200.0, 300.0, 300.0)
    assert summary.gap_ms == Percentiles(8, pytest.approx(20.0), 30.0, 30.0)
    assert (summary.tokens, summary.tokens_per_second, summary.requests_per_second) == (40, 40 / 6, 4 / 6)
    assert summary.stream_tokens_per_second == Percentiles(4, 40.0, 40.0, 40.0)


def test_summaries_are_in_the_order_of_the_runs() -> None:
    runs = [make_run("gateway", 1, 0.1), make_run("direct", 1, 0.1), make_run("gateway", 2, 0.1, concurrency=4)]
    summaries = summarize(runs)
    assert [(each.target, each.concurrency) for each in summaries] == [("gateway", 1), ("direct", 1), ("gateway", 4)]


def test_a_figure_without_a_measurement_is_none() -> None:
    summary = summarize([Run("embeddings", 1, 1, "direct", 0.0, (Sample(total_s=0.1),))])[0]
    assert summary.first_ms is summary.gap_ms is summary.tokens is summary.tokens_per_second is None
    assert summary.requests_per_second == 0.0


def test_the_gateway_is_compared_with_the_direct_target_in_the_same_round() -> None:
    runs = []
    # The machine becomes slower in each round. What the gateway adds does not depend on it.
    for number, (direct_s, added_s) in enumerate([(0.1, 0.002), (0.5, 0.001), (0.9, 0.003)]):
        runs += [make_run("direct", number, direct_s), make_run("gateway", number, direct_s + added_s)]
    first = overheads(runs)[0]
    assert (first.measure, first.unit) == ("first token", "ms")
    assert (first.median, first.lowest, first.highest) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))
    assert [each.measure for each in overheads(runs)][1:] == ["gap between tokens", "whole answer", "throughput"]
    assert overheads(runs)[-1].median == pytest.approx(0.0)


def test_nothing_is_compared_without_both_targets_or_with_failures() -> None:
    direct = make_run("direct", 1, 0.1)
    assert overheads([direct, make_run("direct", 2, 0.1)]) == []
    assert overheads([direct, make_run("gateway", 1, 0.1, error="502 x")]) == []
    assert overheads([direct, replace(make_run("gateway", 1, 0.1), incomplete=True)]) == []
