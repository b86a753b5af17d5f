"""Counters, gauges and histograms, and their exposition as a pure function: Prometheus text, OpenMetrics or JSON.

Metrics are created and registered once and updated by the event loop's thread only. They know nothing of HTTP. Labels
are tuples of values in the order of the metric's label names. A metric has at most MAX_SERIES series, and one more for
all further labels.
"""

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

Labels = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
Readings = float | Mapping[Labels, float]

TEXT, OPENMETRICS, JSON = "text", "openmetrics", "json"
CONTENT_TYPES = {
    TEXT: b"text/plain; version=0.0.4; charset=utf-8",
    OPENMETRICS: b"application/openmetrics-text; version=1.0.0; charset=utf-8",
    JSON: b"application/json",
}
# The versions of each media type that fit a format. A request without a version accepts any.
MEDIA_TYPES = {
    TEXT: ("text/plain", ("", "0.0.4")),
    JSON: ("application/json", ("",)),
    OPENMETRICS: ("application/openmetrics-text", ("", "1.0.0")),
}
MAX_SERIES = 2000
OVERFLOW = "other"
NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
UNITS = ("seconds", "bytes", "ratio")
INFINITY = math.inf
# The part of the Prometheus text format that ScrapedFamilies parses.
HEAD_LINE = re.compile("# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)")
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"'
SAMPLE_LINE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*=\"(?:[^\"\\]|\\.)*\",?)*)\})?"
    r" +([+-]?(?:[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|Inf|NaN))(?: +-?[0-9]+)?"
)


class Distribution(NamedTuple):
    """A histogram's values. `counts` are per bucket, not cumulative; the last one counts values above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Family(NamedTuple):
    """One metric with its current values. A counter's name ends in _total."""

    name: str
    kind: str
    help: str
    unit: str
    series: Sequence[tuple[Pairs, float | Distribution]]
    labels: Labels = ()


class Metric(Protocol):
    """What a registry can contain."""

    @property
    def names(self) -> frozenset[str]:
        """All names that the metric uses in an exposition."""
        ...

    def families(self) -> Iterable[Family]: ...


M = TypeVar("M", bound=Metric)


def check_names(kind: str, name: str, help: str, labels: Labels) -> None:
    """Raise ValueError if Prometheus or its linter would refuse the names: a programming error."""
    if not NAME.fullmatch(name) or (kind == "counter") != name.endswith("_total"):
        raise ValueError(f"{name} is not a valid name for a {kind}")
    if name.endswith(("_bucket", "_count", "_sum", "_info", "_created")):
        raise ValueError(f"{name} ends in a reserved suffix")
    if not help:
        raise ValueError(f"{name} has no help text")
    for label in labels:
        if not NAME.fullmatch(label) or label.startswith("__") or label in ("le", "quantile"):
            raise ValueError(f"{name} cannot have the label {label}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"{name} has a label twice")


class Scalar:
    """Base of counters and gauges: one number per series, stored here or returned by `read` on each exposition."""

    kind = ""

    def __init__(
        self, name: str, help: str, labels: Labels = (), *, read: Callable[[], Readings] | None = None
    ) -> None:
        """`read` returns the number, or numbers by label values. Do not change a metric that has `read`."""
        check_names(self.kind, name, help, labels)
        self.name = name
        self._help = help
        self._labels = labels
        self._read = read
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    @property
    def names(self) -> frozenset[str]:
        return frozenset((self.name, self.name.removesuffix("_total")))

    def value(self, labels: Labels = ()) -> float:
        """The current number; 0 for a series that does not exist yet."""
        return self._readings().get(labels, 0)

    def families(self) -> Iterable[Family]:
        series = [(name_labels(self._labels, labels), value) for labels, value in self._readings().items()]
        yield Family(self.name, self.kind, self._help, unit_of(self.name), series, self._labels)

    def _readings(self) -> Mapping[Labels, float]:
        if self._read is None:
            return self._values
        readings = self._read()
        return readings if isinstance(readings, Mapping) else {(): readings}


class Counter(Scalar):
    """Counts up, from 0."""

    kind = "counter"

    def inc(self, labels: Labels = (), amount: float = 1) -> None:
        if amount < 0:
            raise ValueError(f"{self.name} cannot go down")
        try:
            self._values[labels] += amount
        except KeyError:
            key = bound_cardinality(self._values, labels, self._labels)
            self._values[key] = self._values.get(key, 0) + amount


class Gauge(Scalar):
    """Goes up and down."""

    kind = "gauge"

    def set(self, value: float, labels: Labels = ()) -> None:
        self._values[bound_cardinality(self._values, labels, self._labels)] = value


class Histogram:
    """Counts values by bucket. Buckets are given by ascending upper bounds, which are inclusive."""

    kind = "histogram"

    def __init__(self, name: str, help: str, buckets: Sequence[float], labels: Labels = ()) -> None:
        check_names(self.kind, name, help, labels)
        self._bounds = tuple(float(bound) for bound in buckets)
        if not self._bounds or sorted({*self._bounds} - {INFINITY}) != [*self._bounds]:
            raise ValueError(f"{name}: buckets must be finite and ascending")
        self.name = name
        self._help = help
        self._labels = labels
        # A cell has the count of each bucket, the count of the values above them, and the sum of all values.
        self._cells: dict[Labels, list[float]] = {}
        if not labels:
            self._cells[()] = self._empty()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.name + suffix for suffix in ("", "_bucket", "_count", "_sum"))

    def _empty(self) -> list[float]:
        return [0] * (len(self._bounds) + 2)

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count a value. Ignores values that are not finite: they would make the sum useless for ever."""
        if not -INFINITY < value < INFINITY:
            return
        cell = self._cells.get(labels) or self._new_cell(labels)
        cell[bisect_left(self._bounds, value)] += 1
        cell[-1] += value

    def _new_cell(self, labels: Labels) -> list[float]:
        return self._cells.setdefault(bound_cardinality(self._cells, labels, self._labels), self._empty())

    def observe_all(self, values: Sequence[float], labels: Labels = ()) -> None:
        """Count many values with the same labels, in a third of the time of single calls."""
        total = sum(values)
        if not -INFINITY < total < INFINITY:
            for value in values:
                self.observe(value, labels)
            return
        cell = self._cells.get(labels) or self._new_cell(labels)
        cell[-1] += total
        ordered = sorted(values)
        counted = 0
        at = bisect_left(self._bounds, ordered[0]) if ordered else 0
        while counted < len(ordered):
            upto = bisect_right(ordered, self._bounds[at], counted) if at < len(self._bounds) else len(ordered)
            cell[at] += upto - counted
            counted = upto
            at += 1

    def families(self) -> Iterable[Family]:
        series = []
        for labels, (*counts, total) in self._cells.items():
            distribution = Distribution(self._bounds, tuple(int(count) for count in counts), total)
            series.append((name_labels(self._labels, labels), distribution))
        yield Family(self.name, self.kind, self._help, unit_of(self.name), series, self._labels)


def bound_cardinality(known: Mapping[Labels, object], labels: Labels, names: Labels) -> Labels:
    """Return the labels to count under: the given ones, or `other` for each once there are MAX_SERIES series.

    Raises ValueError if the number of labels is wrong.
    """
    if len(labels) != len(names):
        raise ValueError(f"{labels} do not match the labels {names}")
    return labels if labels in known or len(known) < MAX_SERIES else (OVERFLOW,) * len(names)


class ScrapedFamilies:
    """Counters and gauges from another exporter's page, with a prefix, as of the last `replace`.

    Ignored are lines that cannot be parsed, all other types, and what exceeds MAX_SERIES. A `:` in a name becomes `_`,
    because `:` is reserved for recording rules.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: tuple[Family, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset((self._prefix,))

    def replace(self, page: str) -> None:
        """Replace all families by those of a page in Prometheus text format. An empty page removes them."""
        heads: dict[str, dict[str, str]] = {"HELP": {}, "TYPE": {}}
        samples: dict[str, dict[Pairs, float]] = {}
        for line in page.split("\n")[: 3 * MAX_SERIES]:
            if match := HEAD_LINE.fullmatch(line):
                heads[match[1]][match[2]] = match[3]
            elif match := SAMPLE_LINE.fullmatch(line):
                pairs = tuple((name, _unescape(text)) for name, text in re.findall(LABEL, match[2] or ""))
                samples.setdefault(match[1], {}).setdefault(pairs, float(match[3]))
        families = (self._family(name, heads, series) for name, series in samples.items())
        self._families = tuple({family.name: family for family in families if family is not None}.values())

    def _family(
        self, name: str, heads: Mapping[str, Mapping[str, str]], series: Mapping[Pairs, float]
    ) -> Family | None:
        kind = heads["TYPE"].get(name)
        if kind not in ("counter", "gauge"):
            return None
        full_name = name.replace(":", "_")
        full_name = full_name if full_name.startswith(self._prefix) else self._prefix + full_name
        if kind == "counter" and not full_name.endswith("_total"):
            kind = "untyped"  # OpenMetrics requires a counter's name to end in _total
        return Family(full_name, kind, _unescape(heads["HELP"].get(name, "")) or name, "", list(series.items()))

    def families(self) -> Iterable[Family]:
        return self._families


def name_labels(names: Labels, labels: Labels) -> Pairs:
    return tuple(zip(names, labels, strict=True))


def unit_of(name: str) -> str:
    """The base unit that a name ends in, as in OpenMetrics; empty if there is none."""
    unit = name.removesuffix("_total").rpartition("_")[2]
    return unit if unit in UNITS else ""


class Registry:
    """Metrics in the order of their registration; those of `base` come first."""

    def __init__(self, base: "Registry | None" = None) -> None:
        self._base = base
        self._metrics: list[Metric] = []
        self._names: set[str] = set()

    def register(self, metric: M) -> M:
        """Add a metric and return it. Raises ValueError if another metric already uses one of its names."""
        if any(self._has(name) for name in metric.names):
            raise ValueError(f"{min(metric.names)} is registered already")
        self._names |= metric.names
        self._metrics.append(metric)
        return metric

    def _has(self, name: str) -> bool:
        return name in self._names or (self._base is not None and self._base._has(name))

    def families(self) -> Iterable[Family]:
        if self._base is not None:
            yield from self._base.families()
        for metric in self._metrics:
            yield from metric.families()


# --- Exposition ---


def render(registry: Registry, fmt: str) -> bytes:
    """Return the page in one of the formats of CONTENT_TYPES."""
    families = registry.families()
    if fmt == JSON:
        return json.dumps({family.name: _json_family(family) for family in families}).encode() + b"\n"
    lines: list[str] = []
    for family in families:
        lines += _openmetrics_head(family) if fmt == OPENMETRICS else _text_head(family)
        lines += _samples(family)
    if fmt == OPENMETRICS:
        lines.append("# EOF")
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


def _text_head(family: Family) -> list[str]:
    text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
    return [f"# HELP {family.name} {text}", f"# TYPE {family.name} {family.kind}"]


def _openmetrics_head(family: Family) -> list[str]:
    """In OpenMetrics a counter's family has no _total in its name, and `untyped` is called `unknown`."""
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    lines = [f"# HELP {name} {_escape(family.help)}", f"# TYPE {name} {family.kind.replace('untyped', 'unknown')}"]
    return [*lines, f"# UNIT {name} {family.unit}"] if family.unit else lines


def _samples(family: Family) -> Iterable[str]:
    for pairs, value in family.series:
        labels = ",".join([f'{name}="{_escape(text)}"' for name, text in pairs])
        if isinstance(value, Distribution):
            yield from _buckets(family.name, labels, value)
        else:
            yield f"{family.name}{{{labels}}} {_number(value)}" if labels else f"{family.name} {_number(value)}"


def _buckets(name: str, labels: str, value: Distribution) -> Iterable[str]:
    before = labels and labels + ","
    count = 0
    for bound, more in zip((*value.bounds, INFINITY), value.counts, strict=True):
        count += more
        yield f'{name}_bucket{{{before}le="{_number(bound)}"}} {count}'
    braced = labels and f"{{{labels}}}"
    yield f"{name}_count{braced} {count}"
    yield f"{name}_sum{braced} {_number(value.sum)}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def _number(value: float) -> str:
    if -INFINITY < value < INFINITY:
        return repr(+value)  # the sign converts a bool to a number
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _json_family(family: Family) -> dict[str, object]:
    series = [{"labels": dict(pairs), **_json_value(value)} for pairs, value in family.series]
    return {"type": family.kind, "help": family.help, "series": series}


def _json_value(value: float | Distribution) -> dict[str, object]:
    """JSON has finite numbers only: others become null."""
    if not isinstance(value, Distribution):
        return {"value": value if -INFINITY < value < INFINITY else None}
    buckets = {_number(bound): sum(value.counts[: at + 1]) for at, bound in enumerate((*value.bounds, INFINITY))}
    return {"count": sum(value.counts), "sum": value.sum, "buckets": buckets}


# --- Content negotiation ---


class MediaRange(NamedTuple):
    """One media range of an Accept field (RFC 9110 section 12.5.1)."""

    type: str
    version: str
    quality: float


def negotiate(accept: bytes | None) -> str:
    """Choose a format from an Accept field: by q, then by how specific the media range is, then by order.

    Prometheus text if there is no Accept field or no range fits: like other exporters, this never refuses a scraper.
    """
    parts = (accept or b"").decode("latin-1").lower().split(",")
    ranges = [media_range for part in parts if (media_range := _parse_range(part)) is not None]
    ranks = {fmt: _rank(*MEDIA_TYPES[fmt], ranges) for fmt in MEDIA_TYPES}
    return max(ranks, key=lambda fmt: ranks[fmt])


def _rank(media: str, versions: Sequence[str], ranges: Sequence[MediaRange]) -> tuple[float, int, int]:
    """Rank a format by q, specificity and order. The most specific range that matches determines q."""
    matches = [(_specificity(media, versions, each), each.quality, -at) for at, each in enumerate(ranges)]
    specificity, quality, place = max(matches, default=(0, 0.0, 0))
    return (quality, specificity, place) if specificity and quality else (0.0, 0, 0)


def _specificity(media: str, versions: Sequence[str], asked: MediaRange) -> int:
    if asked.type == media and asked.version in versions:
        return 3
    return 2 if asked.type == media.partition("/")[0] + "/*" else int(asked.type == "*/*")


def _parse_range(text: str) -> MediaRange | None:
    """Return None if the text is not a media range, or its q is malformed."""
    kind, *parameters = (part.strip(" \t") for part in text.split(";"))
    values = dict(parameter.split("=", 1) for parameter in parameters if "=" in parameter)
    quality = values.get("q", "1")
    if not re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", quality) or "/" not in kind:
        return None
    return MediaRange(kind, values.get("version", "").strip('"'), float(quality))
