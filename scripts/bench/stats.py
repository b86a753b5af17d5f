"""From samples to figures: percentiles per kind, concurrency and target, and what the gateway adds in each round.

Pure functions. Samples are in seconds, figures in milliseconds. A figure without a measurement is None, never 0.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.client import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Run:
    """One run: in one round, `concurrency` clients send requests to one target, each client one after the other.

    An `incomplete` run lacks the requests that were not finished at the time limit.
    """

    kind: str
    concurrency: int
    round: int
    target: str
    wall_s: float
    samples: tuple[Sample, ...]
    incomplete: bool = False

    @property
    def successful(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.error]


@dataclass(frozen=True)
class Percentiles:
    """The percentiles of one measure, in its unit. `count` is the number of values."""

    count: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """All rounds of one target at one concurrency. Token counts are those of the backend."""

    kind: str
    concurrency: int
    target: str
    requests: int
    errors: dict[str, int]
    first_ms: Percentiles | None
    gap_ms: Percentiles | None
    total_ms: Percentiles | None
    stream_tokens_per_second: Percentiles | None
    prompt_tokens_per_second: Percentiles | None
    tokens: int | None
    tokens_per_second: float | None
    requests_per_second: float


@dataclass(frozen=True)
class Overhead:
    """What the gateway adds: the difference between its figure and the direct one of the same round.

    `median`, `lowest` and `highest` are over the rounds. The difference in throughput is relative, in percent.
    """

    kind: str
    concurrency: int
    measure: str
    unit: str
    median: float
    lowest: float
    highest: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """The contents of a report. `facts`: what was measured, how and when. `notes`: limits of the figures."""

    facts: dict[str, object]
    runs: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    overheads: tuple[Overhead, ...]
    notes: tuple[str, ...]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated between the two nearest ranks. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def percentiles(values: Iterable[float | None], scale: float = 1.0) -> Percentiles | None:
    """Return the percentiles of the values that are not None, or None if there are none."""
    known = [value * scale for value in values if value is not None]
    return Percentiles(len(known), *(percentile(known, percent) for percent in PERCENTILES)) if known else None


def first_ms(samples: Iterable[Sample]) -> Percentiles | None:
    return percentiles((sample.first_s for sample in samples), 1000)


def gap_ms(samples: Iterable[Sample]) -> Percentiles | None:
    return percentiles((gap for sample in samples for gap in sample.gaps_s), 1000)


def total_ms(samples: Iterable[Sample]) -> Percentiles | None:
    return percentiles((sample.total_s for sample in samples), 1000)


def count_tokens(samples: Iterable[Sample]) -> int | None:
    known = [sample.tokens for sample in samples if sample.tokens is not None]
    return sum(known) if known else None


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Summarize each combination of kind, concurrency and target, in the order of their first runs."""
    cells = dict.fromkeys((run.kind, run.concurrency, run.target) for run in runs)
    return [
        summarize_cell(*cell, [run for run in runs if (run.kind, run.concurrency, run.target) == cell])
        for cell in cells
    ]


def summarize_cell(kind: str, concurrency: int, target: str, runs: Sequence[Run]) -> Summary:
    successful = [sample for run in runs for sample in run.successful]
    wall_s = sum(run.wall_s for run in runs)
    tokens = count_tokens(successful)
    return Summary(
        kind=kind,
        concurrency=concurrency,
        target=target,
        requests=sum(len(run.samples) for run in runs),
        errors=dict(Counter(sample.error for run in runs for sample in run.samples if sample.error)),
        first_ms=first_ms(successful),
        gap_ms=gap_ms(successful),
        total_ms=total_ms(successful),
        stream_tokens_per_second=percentiles(sample.predicted_per_second for sample in successful),
        prompt_tokens_per_second=percentiles(sample.prompt_per_second for sample in successful),
        tokens=tokens,
        tokens_per_second=tokens / wall_s if tokens is not None and wall_s else None,
        requests_per_second=len(successful) / wall_s if wall_s else 0.0,
    )


# What the gateway adds


def p50_of(measure: Callable[[Iterable[Sample]], Percentiles | None]) -> Callable[[Run], float | None]:
    def p50(run: Run) -> float | None:
        values = measure(run.successful)
        return values.p50 if values else None

    return p50


def throughput(run: Run) -> float | None:
    return len(run.successful) / run.wall_s if run.successful and run.wall_s else None


MEASURES: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("first token", "ms", p50_of(first_ms)),
    ("gap between tokens", "ms", p50_of(gap_ms)),
    ("whole answer", "ms", p50_of(total_ms)),
    ("throughput", "%", throughput),
)


def overheads(runs: Sequence[Run]) -> list[Overhead]:
    """Compare the two targets within each round, because the speed of the machine may change between rounds.

    A round with a failed request is left out: a target that fails half of its requests answers the others faster. An
    incomplete run is left out too: the requests that it lacks are the slowest.
    """
    cells = dict.fromkeys((run.kind, run.concurrency) for run in runs)
    found = [overhead_of_cell(cell, measure, runs) for cell in cells for measure in MEASURES]
    return [overhead for overhead in found if overhead]


def overhead_of_cell(
    cell: tuple[str, int], measure: tuple[str, str, Callable[[Run], float | None]], runs: Sequence[Run]
) -> Overhead | None:
    name, unit, figure = measure
    both: dict[int, dict[str, float | None]] = {}
    for run in runs:
        if (run.kind, run.concurrency) == cell and len(run.successful) == len(run.samples) and not run.incomplete:
            both.setdefault(run.round, {})[run.target] = figure(run)
    pairs = [(pair.get("direct"), pair.get("gateway")) for pair in both.values()]
    rounds = [
        difference(direct, gateway, unit) for direct, gateway in pairs if direct is not None and gateway is not None
    ]
    if not rounds:
        return None
    return Overhead(*cell, name, unit, percentile(rounds, 50), min(rounds), max(rounds), tuple(rounds))


def difference(direct: float, gateway: float, unit: str) -> float:
    return (gateway / direct - 1) * 100 if unit == "%" else gateway - direct
