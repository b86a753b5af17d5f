"""From samples to figures: percentiles of each turn set, and what the gateway adds, round by round.

Pure. Times are seconds here and milliseconds in a report. A figure that nothing was measured for is None, never 0.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench_client import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Turn:
    """One target's share of a round: `concurrency` clients at once, each sending its next request after the last.

    A turn that was `cut` lacks the requests that had not come to their end when the time was up.
    """

    kind: str
    concurrency: int
    round: int
    target: str
    wall_s: float
    samples: tuple[Sample, ...]
    cut: bool = False

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.error]


@dataclass(frozen=True)
class Spread:
    """The percentiles of one measure, in the unit of what was measured."""

    count: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """All rounds of one target at one concurrency. Rates are per second; `tokens` are the backend's own count."""

    kind: str
    concurrency: int
    target: str
    requests: int
    errors: dict[str, int]
    first_ms: Spread | None
    gap_ms: Spread | None
    total_ms: Spread | None
    stream_tokens_per_second: Spread | None
    prompt_tokens_per_second: Spread | None
    tokens: int | None
    tokens_per_second: float | None
    requests_per_second: float


@dataclass(frozen=True)
class Overhead:
    """What the gateway adds: the gateway's figure less the direct one of the same round; the median round and the
    extremes. Throughput is the gateway's share of the direct one, less 1."""

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
    """Everything a report is made of. `facts` say what was measured, how and when; `notes` what to beware of."""

    facts: dict[str, object]
    turns: tuple[Turn, ...]
    summaries: tuple[Summary, ...]
    overheads: tuple[Overhead, ...]
    notes: tuple[str, ...]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate between the two neighbours of the rank. Raises ValueError where there is no value."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(values: Iterable[float | None], scale: float = 1.0) -> Spread | None:
    known = [value * scale for value in values if value is not None]
    return Spread(len(known), *(percentile(known, percent) for percent in PERCENTILES)) if known else None


def first_ms(samples: Iterable[Sample]) -> Spread | None:
    return spread((sample.first_s for sample in samples), 1000)


def gap_ms(samples: Iterable[Sample]) -> Spread | None:
    return spread((gap for sample in samples for gap in sample.gaps_s), 1000)


def total_ms(samples: Iterable[Sample]) -> Spread | None:
    return spread((sample.total_s for sample in samples), 1000)


def count_tokens(samples: Iterable[Sample]) -> int | None:
    known = [sample.tokens for sample in samples if sample.tokens is not None]
    return sum(known) if known else None


def summarize(turns: Sequence[Turn]) -> list[Summary]:
    """Sum up each kind, concurrency and target, in the order in which they were first run."""
    cells = dict.fromkeys((turn.kind, turn.concurrency, turn.target) for turn in turns)
    return [
        summary_of(*cell, [turn for turn in turns if (turn.kind, turn.concurrency, turn.target) == cell])
        for cell in cells
    ]


def summary_of(kind: str, concurrency: int, target: str, turns: Sequence[Turn]) -> Summary:
    good = [sample for turn in turns for sample in turn.good]
    wall_s = sum(turn.wall_s for turn in turns)
    tokens = count_tokens(good)
    return Summary(
        kind=kind,
        concurrency=concurrency,
        target=target,
        requests=sum(len(turn.samples) for turn in turns),
        errors=dict(Counter(sample.error for turn in turns for sample in turn.samples if sample.error)),
        first_ms=first_ms(good),
        gap_ms=gap_ms(good),
        total_ms=total_ms(good),
        stream_tokens_per_second=spread(sample.predicted_per_second for sample in good),
        prompt_tokens_per_second=spread(sample.prompt_per_second for sample in good),
        tokens=tokens,
        tokens_per_second=tokens / wall_s if tokens is not None and wall_s else None,
        requests_per_second=len(good) / wall_s if wall_s else 0.0,
    )


# What the gateway adds


def p50_of(measure: Callable[[Iterable[Sample]], Spread | None]) -> Callable[[Turn], float | None]:
    def p50(turn: Turn) -> float | None:
        found = measure(turn.good)
        return found.p50 if found else None

    return p50


def throughput(turn: Turn) -> float | None:
    return len(turn.good) / turn.wall_s if turn.good and turn.wall_s else None


MEASURES: tuple[tuple[str, str, Callable[[Turn], float | None]], ...] = (
    ("first token", "ms", p50_of(first_ms)),
    ("gap between tokens", "ms", p50_of(gap_ms)),
    ("whole answer", "ms", p50_of(total_ms)),
    ("throughput", "%", throughput),
)


def overheads(turns: Sequence[Turn]) -> list[Overhead]:
    """Compare the two targets inside each round, where the machine was in the same mood.

    A round with a failed request is left out: whoever fails half of its requests answers the others sooner. So is one
    that was cut, as what it lacks are its slowest.
    """
    cells = dict.fromkeys((turn.kind, turn.concurrency) for turn in turns)
    found = [overhead_of(cell, measure, turns) for cell in cells for measure in MEASURES]
    return [overhead for overhead in found if overhead]


def overhead_of(
    cell: tuple[str, int], measure: tuple[str, str, Callable[[Turn], float | None]], turns: Sequence[Turn]
) -> Overhead | None:
    name, unit, figure = measure
    both: dict[int, dict[str, float | None]] = {}
    for turn in turns:
        if (turn.kind, turn.concurrency) == cell and len(turn.good) == len(turn.samples) and not turn.cut:
            both.setdefault(turn.round, {})[turn.target] = figure(turn)
    pairs = [(pair.get("direct"), pair.get("gateway")) for pair in both.values()]
    rounds = [
        difference(direct, through, unit) for direct, through in pairs if direct is not None and through is not None
    ]
    if not rounds:
        return None
    return Overhead(*cell, name, unit, percentile(rounds, 50), min(rounds), max(rounds), tuple(rounds))


def difference(direct: float, through: float, unit: str) -> float:
    return (through / direct - 1) * 100 if unit == "%" else through - direct
