"""metrics.py: counting, whole pages in each format, and content negotiation."""

import json
import math
from collections.abc import Callable, Iterator

import pytest

import metrics
from metrics import JSON, OPENMETRICS, TEXT, Counter, Gauge, Histogram, Registry, ScrapedFamilies, negotiate, render


def sample() -> Registry:
    """One metric of each kind."""
    registry = Registry()
    requests = registry.register(Counter("gateway_requests_total", "Requests, by route.", ("route", "code")))
    requests.inc(("/v1/chat/completions", "200"))
    requests.inc(("/v1/chat/completions", "200"), 2)
    requests.inc(("/health", "503"))
    registry.register(Counter("gateway_bytes_total", 'Bytes:\n"sent" \\ all.')).inc((), 1.5)
    registry.register(Counter("gateway_rejections_total", "Refusals."))
    registry.register(Counter("gateway_cancelled_total", "Clients that left.", ("phase",)))
    registry.register(Gauge("gateway_uptime_seconds", "Since the start.", read=lambda: 12.5))
    registry.register(Gauge("gateway_backend_up", "1 while it is.", read=lambda: True))
    wait = registry.register(Histogram("gateway_wait_seconds", "Waiting.", (0.1, 1, 2.5)))
    for value in (0.05, 0.1, 0.5, 3):
        wait.observe(value)
    size = registry.register(Histogram("gateway_size", "Sizes.", (10,), ("kind",)))
    size.observe(10, ("a",))
    return registry


SAMPLE_TEXT = r"""# HELP gateway_requests_total Requests, by route.
# TYPE gateway_requests_total counter
gateway_requests_total{route="/v1/chat/completions",code="200"} 3
gateway_requests_total{route="/health",code="503"} 1
# HELP gateway_bytes_total Bytes:\n"sent" \\ all.
# TYPE gateway_bytes_total counter
gateway_bytes_total 1.5
# HELP gateway_rejections_total Refusals.
# TYPE gateway_rejections_total counter
gateway_rejections_total 0
# HELP gateway_cancelled_total Clients that left.
# TYPE gateway_cancelled_total counter
# HELP gateway_uptime_seconds Since the start.
# TYPE gateway_uptime_seconds gauge
gateway_uptime_seconds 12.5
# HELP gateway_backend_up 1 while it is.
# TYPE gateway_backend_up gauge
gateway_backend_up 1
# HELP gateway_wait_seconds Waiting.
# TYPE gateway_wait_seconds histogram
gateway_wait_seconds_bucket{le="0.1"} 2
gateway_wait_seconds_bucket{le="1.0"} 3
gateway_wait_seconds_bucket{le="2.5"} 3
gateway_wait_seconds_bucket{le="+Inf"} 4
gateway_wait_seconds_count 4
gateway_wait_seconds_sum 3.65
# HELP gateway_size Sizes.
# TYPE gateway_size histogram
gateway_size_bucket{kind="a",le="10.0"} 1
gateway_size_bucket{kind="a",le="+Inf"} 1
gateway_size_count{kind="a"} 1
gateway_size_sum{kind="a"} 10
"""

SAMPLE_OPENMETRICS = r"""# HELP gateway_requests Requests, by route.
# TYPE gateway_requests counter
gateway_requests_total{route="/v1/chat/completions",code="200"} 3
gateway_requests_total{route="/health",code="503"} 1
# HELP gateway_bytes Bytes:\n\"sent\" \\ all.
# TYPE gateway_bytes counter
# UNIT gateway_bytes bytes
gateway_bytes_total 1.5
# HELP gateway_rejections Refusals.
# TYPE gateway_rejections counter
gateway_rejections_total 0
# HELP gateway_cancelled Clients that left.
# TYPE gateway_cancelled counter
# HELP gateway_uptime_seconds Since the start.
# TYPE gateway_uptime_seconds gauge
# UNIT gateway_uptime_seconds seconds
gateway_uptime_seconds 12.5
# HELP gateway_backend_up 1 while it is.
# TYPE gateway_backend_up gauge
gateway_backend_up 1
# HELP gateway_wait_seconds Waiting.
# TYPE gateway_wait_seconds histogram
# UNIT gateway_wait_seconds seconds
gateway_wait_seconds_bucket{le="0.1"} 2
gateway_wait_seconds_bucket{le="1.0"} 3
gateway_wait_seconds_bucket{le="2.5"} 3
gateway_wait_seconds_bucket{le="+Inf"} 4
gateway_wait_seconds_count 4
gateway_wait_seconds_sum 3.65
# HELP gateway_size Sizes.
# TYPE gateway_size histogram
gateway_size_bucket{kind="a",le="10.0"} 1
gateway_size_bucket{kind="a",le="+Inf"} 1
gateway_size_count{kind="a"} 1
gateway_size_sum{kind="a"} 10
# EOF
"""

SAMPLE_JSON = {
    "gateway_requests_total": {
        "type": "counter",
        "help": "Requests, by route.",
        "series": [
            {"labels": {"route": "/v1/chat/completions", "code": "200"}, "value": 3},
            {"labels": {"route": "/health", "code": "503"}, "value": 1},
        ],
    },
    "gateway_bytes_total": {
        "type": "counter", "help": 'Bytes:\n"sent" \\ all.', "series": [{"labels": {}, "value": 1.5}],
    },
    "gateway_rejections_total": {"type": "counter", "help": "Refusals.", "series": [{"labels": {}, "value": 0}]},
    "gateway_cancelled_total": {"type": "counter", "help": "Clients that left.", "series": []},
    "gateway_uptime_seconds": {"type": "gauge", "help": "Since the start.", "series": [{"labels": {}, "value": 12.5}]},
    "gateway_backend_up": {"type": "gauge", "help": "1 while it is.", "series": [{"labels": {}, "value": True}]},
    "gateway_wait_seconds": {
        "type": "histogram",
        "help": "Waiting.",
        "series": [{"labels": {}, "count": 4, "sum": 3.65, "buckets": {"0.1": 2, "1.0": 3, "2.5": 3, "+Inf": 4}}],
    },
    "gateway_size": {
        "type": "histogram",
        "help": "Sizes.",
        "series": [{"labels": {"kind": "a"}, "count": 1, "sum": 10, "buckets": {"10.0": 1, "+Inf": 1}}],
    },
}  # fmt: skip


# --- Whole pages ---


def test_the_text_page() -> None:
    assert render(sample(), TEXT).decode() == SAMPLE_TEXT


def test_the_openmetrics_page() -> None:
    assert render(sample(), OPENMETRICS).decode() == SAMPLE_OPENMETRICS


def test_the_json_page() -> None:
    page = render(sample(), JSON)
    assert page.endswith(b"}\n")
    assert json.loads(page) == SAMPLE_JSON


def test_rendering_changes_nothing() -> None:
    registry = sample()
    for fmt in metrics.CONTENT_TYPES:
        assert render(registry, fmt) == render(registry, fmt) == render(sample(), fmt)


def test_an_empty_registry_is_an_empty_page() -> None:
    assert render(Registry(), TEXT) == b""
    assert render(Registry(), OPENMETRICS) == b"# EOF\n"
    assert render(Registry(), JSON) == b"{}\n"


def test_label_values_are_escaped() -> None:
    registry = Registry()
    registry.register(Counter("x_total", "X.", ("l",))).inc(('a"b\\c\nd é \udcff',))
    for fmt in (TEXT, OPENMETRICS):
        assert 'x_total{l="a\\"b\\\\c\\nd é ?"} 1\n' in render(registry, fmt).decode()


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (1e-7, "1e-07")]
)
def test_numbers_are_formatted_for_prometheus(value: float, text: str) -> None:
    registry = Registry()
    registry.register(Gauge("x", "X.", read=lambda: value))
    assert render(registry, TEXT).endswith(f"x {text}\n".encode())
    shown = json.loads(render(registry, JSON))["x"]["series"][0]["value"]
    assert shown == (value if math.isfinite(value) else None)


# --- Counting ---


def test_a_counter_only_goes_up() -> None:
    counter = Counter("x_total", "X.")
    counter.inc()
    counter.inc((), 0)
    with pytest.raises(ValueError, match="x_total cannot go down"):
        counter.inc((), -1)
    assert counter.value() == 1


def test_a_gauge_is_set_or_read() -> None:
    gauge = Gauge("x", "X.", ("l",))
    gauge.set(5, ("a",))
    gauge.set(3, ("a",))
    assert gauge.value(("a",)) == 3
    assert gauge.value(("b",)) == 0
    now = [1.0]
    assert Gauge("x", "X.", read=lambda: now[0]).value() == 1
    now[0] = 2.0
    assert Gauge("x", "X.", read=lambda: now[0]).value() == 2


def test_series_may_be_read_at_exposition() -> None:
    spent = {("alice",): 5.0}
    registry = Registry()
    registry.register(Counter("key_tokens_total", "Tokens, by key.", ("key",), read=lambda: spent))
    spent["bob",] = 6
    assert b'{key="alice"} 5.0\nkey_tokens_total{key="bob"} 6\n' in render(registry, TEXT)


@pytest.mark.parametrize(
    ("value", "counts"), [(-1, [1, 1, 1]), (1, [1, 1, 1]), (1.001, [0, 1, 1]), (2, [0, 1, 1]), (2.001, [0, 0, 1])]
)
def test_a_bound_is_inclusive(value: float, counts: list[int]) -> None:
    registry = Registry()
    registry.register(Histogram("x", "X.", (1, 2))).observe(value)
    series = json.loads(render(registry, JSON))["x"]["series"][0]
    assert list(series["buckets"].values()) == counts
    assert (series["count"], series["sum"]) == (1, value)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.5],
        [9.0],
        [1.0, 2.0, 1.0, 3.0, 2.5, -1.0, 7.0, 7.5],
        [4.0] * 5,
        [1.0, math.inf, 2.0],
        [math.nan, 1.0, 7.0],
        [math.inf, -math.inf, 3.0],
    ],
)
def test_observe_all_counts_like_observe(values: list[float]) -> None:
    one_by_one, at_once = Histogram("x", "X.", (1, 2, 4, 7)), Histogram("x", "X.", (1, 2, 4, 7))
    for value in values:
        one_by_one.observe(value)
    at_once.observe_all(values)
    assert list(at_once.families()) == list(one_by_one.families())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_ignored(value: float) -> None:
    registry = Registry()
    histogram = registry.register(Histogram("x", "X.", (1,)))
    histogram.observe(value)
    histogram.observe(1)
    assert b"x_count 1\nx_sum 1\n" in render(registry, TEXT)


def test_the_number_of_series_is_limited() -> None:
    counter, gauge, histogram = (
        Counter("c_total", "C.", ("a", "b")),
        Gauge("g", "G.", ("a",)),
        Histogram("h", "H.", (1,), ("a",)),
    )
    for number in range(metrics.MAX_SERIES + 10):
        counter.inc((str(number), "b"))
        gauge.set(number, (str(number),))
        histogram.observe(1, (str(number),))
    counter.inc(("0", "b"))
    assert counter.value(("0", "b")) == 2
    assert counter.value(("other", "other")) == 10
    assert gauge.value(("other",)) == metrics.MAX_SERIES + 9
    for metric in (counter, gauge, histogram):
        (family,) = metric.families()
        assert len(family.series) == metrics.MAX_SERIES + 1
    *_, (pairs, value) = family.series
    assert pairs == (("a", "other"),)
    assert value == metrics.Distribution((1.0,), (10, 0), 10)


@pytest.mark.parametrize(
    "count",
    [
        lambda: Counter("x_total", "X.", ("a",)).inc(),
        lambda: Counter("x_total", "X.").inc(("a",)),
        lambda: Gauge("x", "X.", ("a",)).set(1, ("a", "b")),
        lambda: Histogram("x", "X.", (1,)).observe(1, ("a",)),
    ],
)
def test_a_wrong_number_of_labels_is_an_error(count: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="do not match the labels"):
        count()


# --- Names ---


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Counter("x", "X."), "is not a valid name for a counter"),
        (lambda: Gauge("x_total", "X."), "is not a valid name for a gauge"),
        (lambda: Gauge("1x", "X."), "is not a valid name"),
        (lambda: Gauge("a:b", "X."), "is not a valid name"),
        (lambda: Gauge("x_count", "X."), "reserved suffix"),
        (lambda: Histogram("x_bucket", "X.", (1,)), "reserved suffix"),
        (lambda: Gauge("x", ""), "no help text"),
        (lambda: Gauge("x", "X.", ("a-b",)), "cannot have the label"),
        (lambda: Gauge("x", "X.", ("__a",)), "cannot have the label"),
        (lambda: Histogram("x", "X.", (1,), ("le",)), "cannot have the label"),
        (lambda: Gauge("x", "X.", ("a", "a")), "label twice"),
        (lambda: Histogram("x", "X.", ()), "finite and ascending"),
        (lambda: Histogram("x", "X.", (1, 1)), "finite and ascending"),
        (lambda: Histogram("x", "X.", (2, 1)), "finite and ascending"),
        (lambda: Histogram("x", "X.", (1, math.inf)), "finite and ascending"),
    ],
)
def test_a_metric_that_prometheus_would_refuse_is_an_error(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Gauge("x", "X."), Gauge("x", "X.")),
        (Counter("x_total", "X."), Gauge("x", "X.")),
        (Histogram("x", "X.", (1,)), Counter("x_total", "X.")),
    ],
)
def test_a_name_is_registered_once(first: Gauge, second: Gauge) -> None:
    registry = Registry()
    registry.register(first)
    for other in (registry, Registry(registry)):
        with pytest.raises(ValueError, match="is registered already"):
            other.register(second)


def test_a_registry_with_a_base_shows_both_and_does_not_change_the_base() -> None:
    base = Registry()
    base.register(Gauge("a", "A."))
    more = Registry(base)
    more.register(Gauge("b", "B."))
    assert b"a 0\n" in render(more, TEXT)
    assert render(more, TEXT).endswith(b"b 0\n")
    assert b"b 0\n" not in render(base, TEXT)


# --- A page of another exporter ---

LLAMA_PAGE = r"""# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1.5e+06
# HELP llamacpp:n_tokens_max Largest \\ context.
# TYPE llamacpp:n_tokens_max counter
llamacpp:n_tokens_max 7
# TYPE llamacpp:prompt_tokens_seconds gauge
llamacpp:prompt_tokens_seconds 12.25 1700000000000
# TYPE own gauge
own{a="x,\"\n",b="y"} -3
own{a="x,\"\n",b="y"} 4
own{a="z",} +Inf
# TYPE llamacpp:h histogram
llamacpp:h_bucket{le="1"} 2
"""

SCRAPED_PAGE = r"""# HELP llamacpp_prompt_tokens Number of prompt tokens processed.
# TYPE llamacpp_prompt_tokens counter
llamacpp_prompt_tokens_total 1500000.0
# HELP llamacpp_n_tokens_max Largest \\ context.
# TYPE llamacpp_n_tokens_max unknown
llamacpp_n_tokens_max 7.0
# HELP llamacpp_prompt_tokens_seconds llamacpp:prompt_tokens_seconds
# TYPE llamacpp_prompt_tokens_seconds gauge
llamacpp_prompt_tokens_seconds 12.25
# HELP llamacpp_own own
# TYPE llamacpp_own gauge
llamacpp_own{a="x,\"\n",b="y"} -3.0
llamacpp_own{a="z"} +Inf
# EOF
"""


def scraped(page: str) -> Registry:
    registry = Registry()
    registry.register(ScrapedFamilies("llamacpp_")).replace(page)
    return registry


def test_a_scraped_page_is_shown_with_the_prefix() -> None:
    assert render(scraped(LLAMA_PAGE), OPENMETRICS).decode() == SCRAPED_PAGE


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "x y",
        "x 1.2.3",
        "x 1 2 3",
        'x{a="b} 1',
        "x{a=b} 1",
        'x{a="b"}{c="d"} 1',
        "x{} {} 1",
        "é 1",
        "#",
        "# TYPE x",
        "x 0x1",
        "x 1_0",
        "x 1\r",
        "y 1",
    ],
)
def test_a_line_that_cannot_be_parsed_is_ignored(line: str) -> None:
    page = f"# TYPE x gauge\n{line}\n# TYPE good gauge\ngood 1"
    shown = "# HELP llamacpp_good good\n# TYPE llamacpp_good gauge\nllamacpp_good 1.0\n"
    assert render(scraped(page), TEXT).decode() == shown


def test_names_that_become_the_same_are_shown_once() -> None:
    page = render(
        scraped("".join(f"# TYPE {name} gauge\n{name} 1\n" for name in ("llamacpp:a", "llamacpp_a", "a"))), TEXT
    )
    assert page.count(b"# TYPE") == 1


def test_an_empty_page_removes_all() -> None:
    registry = Registry()
    page = registry.register(ScrapedFamilies("llamacpp_"))
    page.replace(LLAMA_PAGE)
    page.replace("")
    assert render(registry, TEXT) == b""


# --- Negotiation ---

PROMETHEUS_2 = (
    b"application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,"
    b"text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    b"q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROTOBUF = (
    b"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.8,"
    b"application/openmetrics-text;version=1.0.0;q=0.7,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
BROWSER = b"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "fmt"),
    [
        (None, TEXT),
        (b"", TEXT),
        (b"*/*", TEXT),
        (BROWSER, TEXT),
        (b"image/png", TEXT),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, OPENMETRICS),
        (PROTOBUF, OPENMETRICS),
        (b"text/plain;version=0.0.4;q=1,*/*;q=0.1", TEXT),
        (b"text/plain", TEXT),
        (b"text/*", TEXT),
        (b"application/json", JSON),
        (b"Application/JSON; charset=utf-8", JSON),
        (b"application/json, text/plain, */*", JSON),
        (b"text/plain, application/json", TEXT),
        (b"*/*, application/json", JSON),
        (b"application/*", JSON),
        (b"application/json;q=0.5, */*;q=0.8", TEXT),
        (b"application/json;q=0.5, text/plain;q=0.4", JSON),
        (b"application/json;q=0, */*", TEXT),
        (b"text/plain;q=0, */*;q=0.1", JSON),
        (b"text/*;q=0, application/json;q=0, */*", OPENMETRICS),
        (b"*/*;q=0", TEXT),
        (b"application/openmetrics-text", OPENMETRICS),
        (b'application/openmetrics-text; version="1.0.0"', OPENMETRICS),
        (b"application/openmetrics-text;version=0.0.1", TEXT),
        (b"application/openmetrics-text;version=2.0.0,application/json;q=0.1", JSON),
        (b"application/json;q=2", TEXT),
        (b"application/json;q=", TEXT),
        (b"application/json;q=0.1234", TEXT),
        (b"application/json;q=1.000", JSON),
        (b"json", TEXT),
        (b",;,=;/,\xff\xfe;q", TEXT),
    ],
)
def test_the_accept_field_chooses_the_format(accept: bytes | None, fmt: str) -> None:
    assert negotiate(accept) == fmt


# --- How prometheus_client parses the pages ---


def samples(families: Iterator[object]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("make", [sample, Registry, lambda: scraped(LLAMA_PAGE)])
def test_prometheus_client_reads_every_page(make: Callable[[], Registry]) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
    from prometheus_client.parser import text_string_to_metric_families as parse_text

    text = samples(parse_text(render(make(), TEXT).decode()))
    assert text == samples(parse_openmetrics(render(make(), OPENMETRICS).decode()))
    if make is sample:
        assert text["gateway_requests_total", (("code", "200"), ("route", "/v1/chat/completions"))] == 3
        assert text["gateway_wait_seconds_bucket", (("le", "+Inf"),)] == 4
