"""A result as one self-contained HTML page: inline style, inline SVG, no script, light and dark.

Pure functions from a Result to a page. All text from outside is escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from bench.report import COLUMNS, format_number, summary_row
from bench.stats import Overhead, Percentiles, Result, Run, Summary

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
TARGETS = ("direct", "gateway")
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #1d2126; --soft: #656d78; --line: #e3e4e0;
  --direct: #2f6fd0; --gateway: #c4560b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #181c22; --ink: #e9ebee; --soft: #9aa4b0;
  --line: #2b313a; --direct: #76a9ff; --gateway: #ff9f5a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.02em; }
h2 { margin: 2.6rem 0 0.9rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 0.95rem; }
p { margin: 0.3rem 0 0; max-width: 75ch; }
.soft, figcaption, dt { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 0.2rem 1.6rem; margin: 0.7rem 0 0; font-size: 0.88rem; }
dl div { display: flex; gap: 0.4rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.tiles, .charts { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); }
.tile, figure, .table { margin: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
figcaption { font-size: 0.82rem; margin-bottom: 0.5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 11px system-ui, sans-serif;
  fill: var(--soft); }
.bad b { color: var(--bad); }
.grid { stroke: var(--line); }
.zero { stroke: var(--soft); }
.direct { --tone: var(--direct); }
.gateway { --tone: var(--gateway); }
.curve { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; }
.whisker { stroke: var(--tone); stroke-width: 2; opacity: 0.4; }
.dot { fill: var(--tone); stroke: var(--card); stroke-width: 1.5; }
.faint { opacity: 0.4; }
.legend { display: flex; gap: 1.2rem; margin: 0.9rem 0 0; font-size: 0.88rem; }
.legend span::before { content: ""; display: inline-block; width: 0.75rem; height: 0.75rem; border-radius: 50%;
  margin-right: 0.45rem; background: var(--tone); }
.table { overflow-x: auto; margin-top: 1rem; padding: 0.4rem 0.6rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; }
td:last-child { min-width: 9rem; white-space: normal; }
th:nth-child(-n + 2), td:nth-child(-n + 2) { text-align: left; }
ul { padding-left: 1.1rem; max-width: 80ch; }
"""


# Axes


@dataclass(frozen=True)
class Axes:
    """The coordinates of a chart. y ranges from low to high; x has `steps` equal steps or ranges over `span`."""

    low: float
    high: float
    steps: int = 1
    span: tuple[float, float] = (0.0, 1.0)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def step(self, index: int) -> float:
        """Return the x coordinate of the middle of a step."""
        return LEFT + (index + 0.5) / self.steps * (WIDTH - LEFT - RIGHT)

    def x(self, value: float) -> float:
        first, last = self.span
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return ticks at multiples of 1, 2, 2.5 or 5 times a power of ten that cover low to high. low is at most 0."""
    rough = max(high - low, 1e-9) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.floor(low / size)
    return [step * size for step in range(first, max(math.ceil(high / size - 1e-9), first + 1) + 1)]


def axes_for(low: float, high: float, steps: int) -> tuple[Axes, list[float]]:
    marks = ticks(min(0.0, low), max(high, low + 0.01, 0.01))
    return Axes(marks[0], marks[-1], steps), marks


def grid(axes: Axes, marks: Iterable[float]) -> str:
    lines = []
    for mark in marks:
        y = axes.y(mark)
        kind = "zero" if abs(mark) < 1e-12 else "grid"
        lines.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:.4g}</text>')
    return "".join(lines)


def labels(positions: Iterable[tuple[float, str]], title: str) -> str:
    below = HEIGHT - BOTTOM + 17
    names = "".join(
        f'<text x="{x:.1f}" y="{below}" text-anchor="middle">{escape(text)}</text>' for x, text in positions
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return names + f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>'


def figure(title: str, caption: str, drawing: str) -> str:
    head = f"<figure><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>"
    view = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(caption)}">'
    return f"{head}{view}{drawing}</svg></figure>"


def dot(target: str, x: float, y: float, tooltip: str, *, more_classes: str = "", radius: float = 4.5) -> str:
    title = f"<title>{escape(tooltip)}</title>"
    return f'<circle class="dot {target}{more_classes}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'


# Charts


def signed(value: float, unit: str) -> str:
    return f"{value:+.2f} {unit}".replace("-", "\N{MINUS SIGN}")


def by_concurrency(
    title: str, unit: str, cells: Sequence[Summary], pick: Callable[[Summary], Percentiles | None]
) -> str:
    """Draw the median at each concurrency, with a line to the 90th percentile."""
    values = [(cell, percentiles) for cell in cells if (percentiles := pick(cell))]
    if not values:
        return ""
    names = list(dict.fromkeys(cell.concurrency for cell, _ in values))
    axes, marks = axes_for(0.0, max(percentiles.p90 for _, percentiles in values), len(names))
    drawing = grid(axes, marks) + labels(
        ((axes.step(i), str(name)) for i, name in enumerate(names)), "concurrent requests"
    )
    for target in TARGETS:
        points = []
        for cell, percentiles in values:
            if cell.target == target:
                x = axes.step(names.index(cell.concurrency)) + (5 if target == "gateway" else -5)
                p50, p90 = format_number(percentiles.p50), format_number(percentiles.p90)
                points.append(
                    (x, percentiles, f"{target}, concurrency {cell.concurrency}: p50 {p50}, p90 {p90} {unit}")
                )
        drawing += curve_of(axes, target, points)
    differ = any(percentiles.p50 != percentiles.p90 for _, percentiles in values)
    return figure(title, f"{unit}; dot: median, line: to the 90th percentile" if differ else unit, drawing)


def curve_of(axes: Axes, target: str, points: Sequence[tuple[float, Percentiles, str]]) -> str:
    path = " ".join(f"{x:.1f},{axes.y(percentiles.p50):.1f}" for x, percentiles, _ in points)
    drawing = f'<polyline class="curve {target}" points="{path}"/>'
    for x, percentiles, tooltip in points:
        low, high = axes.y(percentiles.p50), axes.y(percentiles.p90)
        drawing += f'<line class="whisker {target}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        drawing += dot(target, x, low, tooltip)
    return drawing


def rate_as_percentiles(rate: float | None) -> Percentiles | None:
    return None if rate is None else Percentiles(1, rate, rate, rate)


def added(title: str, overheads: Sequence[Overhead]) -> str:
    """Draw the difference in each round, and the median of the rounds."""
    if not overheads:
        return ""
    unit = overheads[0].unit
    values = [value for overhead in overheads for value in overhead.rounds]
    axes, marks = axes_for(min(values), max(values), len(overheads))
    places = [(axes.step(index), str(overhead.concurrency)) for index, overhead in enumerate(overheads)]
    drawing = grid(axes, marks) + labels(places, "concurrent requests")
    for (x, name), overhead in zip(places, overheads, strict=True):
        for value in overhead.rounds:
            drawing += dot(
                "gateway", x, axes.y(value), f"one round: {signed(value, unit)}", more_classes=" faint", radius=4
            )
        tooltip = f"concurrency {name}, median of the rounds: {signed(overhead.median, unit)}"
        y = axes.y(overhead.median)
        drawing += f'<line class="curve gateway" x1="{x - 14:.1f}" x2="{x + 14:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        label = f"{signed(overhead.median, '')}<title>{escape(tooltip)}</title>"
        drawing += f'<text x="{x + 18:.1f}" y="{y + 4:.1f}">{label}</text>'
    return figure(title, f"{unit}, gateway minus direct; dot: one round, bar: median", drawing)


def distribution(title: str, runs: Sequence[Run], pick: Callable[[Run], list[float]]) -> str:
    """Draw the cumulative distribution at the highest concurrency."""
    most = max(run.concurrency for run in runs)
    values = {
        target: sorted(value for run in runs if (run.target, run.concurrency) == (target, most) for value in pick(run))
        for target in TARGETS
    }
    known = [value for each in values.values() for value in each]
    if not known:
        return ""
    marks = ticks(0.0, max(known))
    axes = Axes(0.0, 100.0, span=(marks[0], marks[-1]))
    drawing = grid(axes, (0, 25, 50, 75, 100)) + labels(((axes.x(mark), f"{mark:.4g}") for mark in marks), "ms")
    for target, each in values.items():
        points = [f"{axes.x(0):.1f},{axes.y(0):.1f}"]
        for index, value in enumerate(each):
            x = f"{axes.x(value):.1f}"
            shares = (100 * (index + after) / len(each) for after in (0, 1))
            points += [f"{x},{axes.y(share):.1f}" for share in shares]
        drawing += f'<polyline class="curve {target}" points="{" ".join(points)}"/>' if each else ""
    return figure(title, f"% of requests that took no longer, concurrency {most}", drawing)


# The page


def to_html(result: Result) -> str:
    kinds = dict.fromkeys(summary.kind for summary in result.summaries)
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in result.facts.items())
    shown = [target for target in TARGETS if any(summary.target == target for summary in result.summaries)]
    legend = "".join(f'<span class="{target}">{target}</span>' for target in shown)
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*result.notes, *CAVEATS))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Gateway benchmark</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Gateway benchmark</h1><dl>{facts}</dl>"
        f'{headline(result)}<div class="legend">{legend}</div>'
        f"{''.join(section(kind, result) for kind in kinds)}"
        f'<h2>How to read this report</h2><ul class="soft">{notes}</ul></main></body></html>\n'
    )


CAVEATS = (
    "Both targets are measured in every round, in alternating order. What the gateway adds is the difference within a"
    " round.",
    "Token counts are those of the backend (timings, else usage). Tokens per second of a stream are the backend's own"
    " figure.",
    "Times are measured by the client of this benchmark, on connections that were open before the clock started.",
    "If there are more concurrent requests than slots, requests wait in the gateway's queue or in the backend's own.",
)


def section(kind: str, result: Result) -> str:
    cells = [summary for summary in result.summaries if summary.kind == kind]
    runs = [run for run in result.runs if run.kind == kind]
    more: dict[str, list[Overhead]] = {}
    for overhead in result.overheads:
        if overhead.kind == kind:
            more.setdefault(overhead.measure, []).append(overhead)
    streams = any(each.first_ms for each in cells)
    tokens = any(each.tokens_per_second for each in cells)
    rate = (
        (lambda each: rate_as_percentiles(each.tokens_per_second))
        if tokens
        else (lambda each: rate_as_percentiles(each.requests_per_second))
    )
    head = "Time to first token" if streams else "Time to the whole answer"
    measure = "first token" if streams else "whole answer"
    charts = [
        by_concurrency(head, "ms", cells, lambda each: each.first_ms if streams else each.total_ms),
        added(f"Added to the {measure}", more.get(measure, [])),
        distribution(f"Distribution: {head[0].lower()}{head[1:]}", runs, first_times if streams else total_times),
        by_concurrency("Gap between tokens", "ms", cells, lambda each: each.gap_ms),
        added("Added to the gap between tokens", more.get("gap between tokens", [])),
        by_concurrency("Throughput", "tokens per second, total" if tokens else "requests per second", cells, rate),
    ]
    return f'<h2>{escape(kind)}</h2><div class="charts">{"".join(charts)}</div>{table(cells)}'


def first_times(run: Run) -> list[float]:
    return [sample.first_s * 1000 for sample in run.successful if sample.first_s is not None]


def total_times(run: Run) -> list[float]:
    return [sample.total_s * 1000 for sample in run.successful]


def table(cells: Sequence[Summary]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("concurrency", "target", *COLUMNS[1:]))
    rows = "".join(
        f"<tr><td>{each.concurrency}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in summary_row(each))}</tr>"
        for each in cells
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def headline(result: Result) -> str:
    """Show the most important figures: what the gateway adds, else the medians of the only target."""
    failed = sum(sum(summary.errors.values()) for summary in result.summaries)
    requests = sum(summary.requests for summary in result.summaries)
    last = tile(str(failed), f"of {requests} requests failed", " bad" if failed else "")
    if result.overheads:
        first = result.overheads[0]
        title = f"What the gateway adds: {first.kind}, concurrency {first.concurrency}"
        cell = [each for each in result.overheads if (each.kind, each.concurrency) == (first.kind, first.concurrency)]
        shown = [tile(signed(each.median, each.unit), each.measure) for each in cell]
    elif result.summaries:
        only = result.summaries[0]
        title = f"Medians of {only.target}: {only.kind}, concurrency {only.concurrency}"
        medians = (("first token", only.first_ms), ("gap between tokens", only.gap_ms), ("whole answer", only.total_ms))
        shown = [tile(f"{format_number(each.p50)} ms", name) for name, each in medians if each]
    else:
        title, shown = "Nothing was measured", []
    return f'<h2>{escape(title)}</h2><div class="tiles">{"".join([*shown, last])}</div>'


def tile(value: str, label: str, more_classes: str = "") -> str:
    return f'<div class="tile{more_classes}"><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>'
