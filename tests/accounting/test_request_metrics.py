"""request_metrics.py: the series that count requests, and what each key has used."""

from accounting.ledger import charge
from accounting.request_metrics import KeyCounts, RequestMetrics
from accounting.usage_reports import Tokens
from metrics import Registry, render

TOKENS = Tokens(10, 3, 20, 350.0, 500.0)


def page(registry: Registry) -> dict[str, float]:
    lines = render(registry, "text").decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_every_series_is_on_the_page_from_the_start() -> None:
    registry = Registry()
    RequestMetrics(registry, "shared")
    names = {family.name for family in registry.families()}
    assert {name for name in names if not name.startswith("gateway_")} == set()
    for name in ("requests", "bytes_sent", "cancelled", "unauthorized", "rate_limited", "queue_rejections", "tokens"):
        assert f"gateway_{name}_total" in names
    for name in ("request_duration", "queue_wait", "time_to_first_byte", "inter_event_gap"):
        assert f"gateway_{name}_seconds" in names


def test_counters_and_histograms_are_those_of_the_page() -> None:
    registry = Registry()
    metrics = RequestMetrics(registry, "shared")
    metrics.requests.inc(("/ping", "200"))
    metrics.duration.observe_all([0.25, 0.5])
    shown = page(registry)
    assert shown['gateway_requests_total{route="/ping",code="200"}'] == 1
    assert shown["gateway_request_duration_seconds_sum"] == 0.75


def test_loads_of_models_are_counted() -> None:
    registry = Registry()
    metrics = RequestMetrics(registry, "shared", by_model=True)
    metrics.count_load("chat", "ok", 3.0)
    metrics.count_load("chat", "failed", 1.0)
    shown = page(registry)
    assert shown['gateway_model_loads_total{model="chat",result="failed"}'] == 1
    assert shown["gateway_model_load_seconds_sum"] == 4


# --- Keys ---


def test_what_keys_have_used_adds_up() -> None:
    registry = Registry()
    counts = KeyCounts(registry)
    counts.add(["alice", "bob", "alice"], {"alice": charge([(TOKENS, "done")])})
    counts.add(["alice"], {"alice": charge([(TOKENS, "done")])})
    assert page(registry) == {
        'gateway_key_requests_total{key="alice"}': 3,
        'gateway_key_requests_total{key="bob"}': 1,
        'gateway_key_tokens_total{key="alice",type="prompt"}': 20,
        'gateway_key_tokens_total{key="alice",type="cached"}': 6,
        'gateway_key_tokens_total{key="alice",type="completion"}': 40,
    }


def test_requests_without_a_key_are_no_keys() -> None:
    registry = Registry()
    KeyCounts(registry).add(["-", "-"], {})
    assert page(registry) == {}
