"""A result as text for a terminal, as JSON and as CSV. Pure: a Result in, a text out."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from bench_stats import Overhead, Result, Spread, Summary

COLUMNS = (
    *("milliseconds, then rates", "first token p50", "p90", "p99", "gap p50", "p90", "p99", "answer p50", "p90", "p99"),
    *("tok/s a stream", "tok/s in all", "req/s", "errors"),
)
SPREADS = ("first_ms", "gap_ms", "total_ms", "stream_tokens_per_second", "prompt_tokens_per_second")


def to_text(result: Result) -> str:
    blocks = [" · ".join(f"{name} {value}" for name, value in result.facts.items())]
    cells = dict.fromkeys((summary.kind, summary.concurrency) for summary in result.summaries)
    for kind, concurrency in cells:
        rows: list[Sequence[str]] = [COLUMNS]
        rows += [row_of(each) for each in result.summaries if (each.kind, each.concurrency) == (kind, concurrency)]
        blocks.append(f"{kind}, {concurrency} at once\n{align(rows)}")
    if result.overheads:
        table: list[Sequence[str]] = [("added by the gateway", "at once", "median round", "lowest", "highest")]
        table += [overhead_row(overhead) for overhead in result.overheads]
        blocks.append(align(table))
    return "\n\n".join([*blocks, *(f"note: {note}" for note in result.notes)]) + "\n"


def row_of(summary: Summary) -> tuple[str, ...]:
    spreads = [*figures(summary.first_ms), *figures(summary.gap_ms), *figures(summary.total_ms)]
    stream = summary.stream_tokens_per_second
    rates = (number(stream.p50 if stream else None), number(summary.tokens_per_second))
    return (summary.target, *spreads, *rates, number(summary.requests_per_second), errors_of(summary))


def overhead_row(overhead: Overhead) -> tuple[str, ...]:
    numbers = (overhead.median, overhead.lowest, overhead.highest)
    shown = (f"{value:+.2f} {overhead.unit}" for value in numbers)
    return (f"{overhead.kind}: {overhead.measure}", str(overhead.concurrency), *shown)


def figures(spread: Spread | None) -> tuple[str, str, str]:
    return (number(spread.p50), number(spread.p90), number(spread.p99)) if spread else ("–", "–", "–")


def number(value: float | None) -> str:
    """Three significant digits or so, and a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def errors_of(summary: Summary) -> str:
    return ", ".join(f"{count} × {error}" for error, count in summary.errors.items()) or "0"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Pad each column to its widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def to_json(result: Result) -> str:
    """Everything but the single samples' gaps, of which there are too many to keep."""
    turns = [
        {
            **{name: value for name, value in vars(turn).items() if name != "samples"},
            "samples": [{key: value for key, value in vars(each).items() if key != "gaps_s"} for each in turn.samples],
        }
        for turn in result.turns
    ]
    summaries, overheads = map(asdict, result.summaries), map(asdict, result.overheads)
    whole = {"facts": result.facts, "notes": result.notes, "summaries": [*summaries], "overheads": [*overheads]}
    return json.dumps({**whole, "turns": turns}, indent=1) + "\n"


def to_csv(result: Result) -> str:
    """One line a kind, concurrency and target; an empty cell is what was not measured."""
    out = io.StringIO()
    names = [f"{name}_{part}" for name in SPREADS for part in ("p50", "p90", "p99")]
    plain = ("tokens", "tokens_per_second", "requests_per_second")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "concurrency", "target", "requests", "errors", *names, *plain])
    for summary in result.summaries:
        spreads = [getattr(summary, name) for name in SPREADS]
        cells = [getattr(each, part, "") for each in spreads for part in ("p50", "p90", "p99")]
        about = [summary.kind, summary.concurrency, summary.target, summary.requests, sum(summary.errors.values())]
        writer.writerow([*about, *cells, *(getattr(summary, name) for name in plain)])
    return out.getvalue()
