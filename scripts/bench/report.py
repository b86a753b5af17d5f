"""A result as text for a terminal, as JSON and as CSV. Pure functions from a Result to a text."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from bench.stats import Overhead, Percentiles, Result, Summary

COLUMNS = (
    *("milliseconds, then rates", "first token p50", "p90", "p99", "gap p50", "p90", "p99", "answer p50", "p90", "p99"),
    *("tok/s per stream", "tok/s total", "req/s", "errors"),
)
PERCENTILE_FIELDS = ("first_ms", "gap_ms", "total_ms", "stream_tokens_per_second", "prompt_tokens_per_second")


def to_text(result: Result) -> str:
    blocks = [" · ".join(f"{name} {value}" for name, value in result.facts.items())]
    cells = dict.fromkeys((summary.kind, summary.concurrency) for summary in result.summaries)
    for kind, concurrency in cells:
        rows: list[Sequence[str]] = [COLUMNS]
        rows += [summary_row(each) for each in result.summaries if (each.kind, each.concurrency) == (kind, concurrency)]
        blocks.append(f"{kind}, concurrency {concurrency}\n{align(rows)}")
    if result.overheads:
        table: list[Sequence[str]] = [("added by the gateway", "concurrency", "median", "lowest", "highest")]
        table += [overhead_row(overhead) for overhead in result.overheads]
        blocks.append(align(table))
    return "\n\n".join([*blocks, *(f"note: {note}" for note in result.notes)]) + "\n"


def summary_row(summary: Summary) -> tuple[str, ...]:
    times = (summary.first_ms, summary.gap_ms, summary.total_ms)
    percentiles = [cell for each in times for cell in percentile_cells(each)]
    stream = summary.stream_tokens_per_second
    rates = (format_number(stream.p50 if stream else None), format_number(summary.tokens_per_second))
    return (summary.target, *percentiles, *rates, format_number(summary.requests_per_second), format_errors(summary))


def overhead_row(overhead: Overhead) -> tuple[str, ...]:
    numbers = (overhead.median, overhead.lowest, overhead.highest)
    shown = (f"{value:+.2f} {overhead.unit}" for value in numbers)
    return (f"{overhead.kind}: {overhead.measure}", str(overhead.concurrency), *shown)


def percentile_cells(values: Percentiles | None) -> tuple[str, str, str]:
    p50, p90, p99 = (values.p50, values.p90, values.p99) if values else (None, None, None)
    return format_number(p50), format_number(p90), format_number(p99)


def format_number(value: float | None) -> str:
    """Format with about three significant digits. None is a dash."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def format_errors(summary: Summary) -> str:
    return ", ".join(f"{count} × {error}" for error, count in summary.errors.items()) or "0"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Pad each column to its widest cell. The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def to_json(result: Result) -> str:
    """Everything except the gaps of each sample, which are too many."""
    runs = [
        {
            **{name: value for name, value in vars(run).items() if name != "samples"},
            "samples": [{key: value for key, value in vars(each).items() if key != "gaps_s"} for each in run.samples],
        }
        for run in result.runs
    ]
    summaries, overheads = map(asdict, result.summaries), map(asdict, result.overheads)
    whole = {"facts": result.facts, "notes": result.notes, "summaries": [*summaries], "overheads": [*overheads]}
    return json.dumps({**whole, "runs": runs}, indent=1) + "\n"


def to_csv(result: Result) -> str:
    """One line per kind, concurrency and target. A cell is empty if nothing was measured."""
    out = io.StringIO()
    names = [f"{name}_{part}" for name in PERCENTILE_FIELDS for part in ("p50", "p90", "p99")]
    plain = ("tokens", "tokens_per_second", "requests_per_second")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "concurrency", "target", "requests", "errors", *names, *plain])
    for summary in result.summaries:
        groups = [getattr(summary, name) for name in PERCENTILE_FIELDS]
        cells = [getattr(each, part, "") for each in groups for part in ("p50", "p90", "p99")]
        about = [summary.kind, summary.concurrency, summary.target, summary.requests, sum(summary.errors.values())]
        writer.writerow([*about, *cells, *(getattr(summary, name) for name in plain)])
    return out.getvalue()
