"""What is counted and logged of an exchange: each series and each field of the access line says what happened."""

import json
import logging
from collections.abc import Iterable

import pytest

from cors import Cors
from errors import INVALID_API_KEY, QUEUE_FULL, RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED
from exchange import Exchange, KeyCounts, Metrics, Observer, Outcome, Stage, Strangers, request_ids
from http1 import Limits
from metrics import Registry, render
from plan import Plan, Planner
from routes import Routes
from support.clock import Clock
from usage import Charge, Meter, Tokens, charge

PLANNER = Planner(Limits(), Routes(), Cors(()), b"")
ANSWER = b'{"choices":[],"timings":{"cache_n":3,"prompt_n":7,"prompt_ms":350.0,"predicted_n":20,"predicted_ms":500.0}}'
EVENTS = (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n')


class Recording:
    """A ledger and an access log that keep what they are told."""

    def __init__(self) -> None:
        self.charges: dict[str, Charge] = {}
        self.lines: list[str] = []

    def record(self, charges: dict[str, Charge]) -> None:
        self.charges |= charges

    def write_lines(self, lines: Iterable[bytes]) -> None:
        self.lines += [line.decode() for line in lines]


ENDED_S = 102.0


class Place:
    """An observer with everything around it."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.registry = Registry()
        self.for_operators = Registry(self.registry)
        self.kept = Recording()
        self.clock = Clock()
        self.observer = Observer(
            Metrics(self.registry),
            KeyCounts(self.for_operators),
            self.kept,
            self.kept,
            as_json=as_json,
            clock=self.clock,
            wall_clock=lambda: 1767323045.678 - ENDED_S + self.clock(),
        )

    def observe(self, *exchanges: Exchange) -> dict[str, float]:
        for exchange in exchanges:
            self.observer.observe(exchange)
        self.observer.flush()
        return self.page(self.registry)

    @staticmethod
    def page(registry: Registry) -> dict[str, float]:
        lines = render(registry, "text").decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def plan(method: str, target: str) -> Plan:
    return PLANNER.find(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())[0]


CHAT = plan("POST", "/v1/chat/completions?secret=1")
PING = plan("GET", "/ping")


def metered(*payloads: bytes) -> Meter:
    meter = Meter(CHAT.route.label)
    for payload in payloads:
        meter.feed(payload)
    return meter


def exchange(of: Plan = CHAT, name: str = "req-1", **changes: object) -> Exchange:
    """A chat that went well: 2 s in all, 0.5 s queued, answered after 1 s."""
    whole = Exchange(name.encode(), "192.0.2.7", of, 100.0, Stage.DONE)
    fields = {
        "key_id": "alice",
        "status": 200,
        "backend_status": 200,
        "bytes_in": 11,
        "bytes_out": 222,
        "queued_s": 100.25,
        "left_queue_s": 100.75,
        "first_byte_s": 101.0,
        "ended_s": ENDED_S,
        "told": metered(ANSWER) if of is CHAT else None,
    }
    for field, value in {**fields, **changes}.items():
        setattr(whole, field, value)
    return whole


# --- Series ---


def test_a_request_is_counted_by_route_and_status():
    page = Place().observe(exchange(), exchange(status=503), exchange(PING, key_id="-"))
    assert page['gateway_requests_total{route="/v1/chat/completions",code="200"}'] == 1
    assert page['gateway_requests_total{route="/v1/chat/completions",code="503"}'] == 1
    assert page['gateway_requests_total{route="/ping",code="200"}'] == 1


@pytest.mark.parametrize(
    ("name", "seconds"), [("request_duration", 2.0), ("queue_wait", 0.5), ("time_to_first_byte", 1.0)]
)
def test_spans_are_observed(name, seconds):
    page = Place().observe(exchange())
    assert page[f"gateway_{name}_seconds_sum"] == seconds
    assert page[f"gateway_{name}_seconds_count"] == 1


def test_what_was_not_reached_is_not_observed():
    page = Place().observe(exchange(left_queue_s=0.0, first_byte_s=0.0, told=None))
    assert page["gateway_queue_wait_seconds_count"] == 0
    assert page["gateway_time_to_first_byte_seconds_count"] == 0
    assert page["gateway_inter_event_gap_seconds_count"] == 0


def test_tokens_and_their_speed():
    page = Place().observe(exchange())
    tokens = {kind: page[f'gateway_tokens_total{{type="{kind}"}}'] for kind in ("prompt", "cached", "completion")}
    assert tokens == {"prompt": 10, "cached": 3, "completion": 20}
    assert page["gateway_prompt_tokens_per_second_sum"] == 20  # the 7 that were not cached, in 0.35 s
    assert page["gateway_generation_tokens_per_second_sum"] == 40
    assert page["gateway_cached_prompt_tokens_sum"] == 3
    assert page["gateway_cached_prompt_tokens_count"] == 1


def test_an_answer_without_times_has_no_speed():
    usage = b'{"usage":{"prompt_tokens":4,"completion_tokens":0}}'
    page = Place().observe(exchange(told=metered(usage)), exchange(told=metered(b"{}")))
    assert page['gateway_tokens_total{type="prompt"}'] == 4
    assert page["gateway_prompt_tokens_per_second_count"] == page["gateway_generation_tokens_per_second_count"] == 0


def test_the_gap_between_events_is_the_mean_of_a_stream():
    page = Place().observe(exchange(told=metered(*EVENTS, *EVENTS, EVENTS[0])))
    assert page["gateway_inter_event_gap_seconds_sum"] == 0.25  # five events in the second from first byte to end


def test_bytes_are_those_sent():
    assert Place().observe(exchange(), exchange(bytes_out=8))["gateway_bytes_sent_total"] == 230


def test_a_client_that_left_is_counted_by_stage():
    left = exchange(outcome=Outcome.CANCELLED, stage=Stage.QUEUED, status=499)
    page = Place().observe(left, exchange())
    assert page['gateway_cancelled_total{phase="queued"}'] == 1
    assert sum(value for name, value in page.items() if name.startswith("gateway_cancelled_total")) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (INVALID_API_KEY, "unauthorized"),
        (RATE_LIMIT_EXCEEDED, "rate_limited"),
        (TOKEN_QUOTA_EXCEEDED, "rate_limited"),
        (QUEUE_FULL, "queue_rejections"),
    ],
)
def test_refusals_are_counted_by_their_kind(kind, name):
    page = Place().observe(exchange(refusal=kind, outcome=Outcome.REFUSED, told=None))
    counts = {other: page[f"gateway_{other}_total"] for other in ("unauthorized", "rate_limited", "queue_rejections")}
    assert counts == {other: float(other == name) for other in counts}


def test_keys_are_shown_to_operators_only_and_do_not_grow_the_public_page():
    place = Place()
    before = len(place.page(place.registry))
    page = place.observe(*(exchange(key_id=f"key-{number}") for number in range(1000)))
    assert len(page) <= before + 8
    assert not [name for name in page if "key-" in name]
    mine = place.page(place.for_operators)
    assert mine['gateway_key_requests_total{key="key-999"}'] == 1
    assert mine['gateway_key_tokens_total{key="key-999",type="completion"}'] == 20


# --- The ledger ---


def test_the_ledger_is_told_of_metered_requests_with_a_key():
    place = Place()
    place.observe(
        exchange(), exchange(key_id="-"), exchange(PING), exchange(outcome=Outcome.CANCELLED), exchange(key_id="bob")
    )
    tokens = Tokens(10, 3, 20, 350.0, 500.0)
    assert place.kept.charges == {
        "alice": charge([(tokens, "done"), (tokens, "cancelled")]),
        "bob": charge([(tokens, "done")]),
    }


def test_many_are_counted_before_anybody_looks():
    place = Place()
    for _ in range(600):
        place.observer.observe(exchange(told=None))
    assert len(place.kept.lines) >= 500


# --- The access line ---


def test_text_line_has_every_field_and_no_query():
    place = Place()
    place.observe(exchange(outcome=Outcome.TRUNCATED))
    assert place.kept.lines == [
        "2026-01-02T03:04:05.678Z | alice | POST /v1/chat/completions | 200 | id=req-1 peer=192.0.2.7"
        " route=/v1/chat/completions backend_status=200 outcome=truncated stage=done bytes_in=11 bytes_out=222"
        " queue_ms=500 first_byte_ms=1000 total_ms=2000 prompt_tokens=10 cached_tokens=3 completion_tokens=20"
    ]


def test_a_peer_with_a_zone_has_its_line():
    place = Place()
    place.observe(exchange(peer="fe80::1%eth0"))
    assert " id=req-1 peer=fe80::1%eth0 route=" in place.kept.lines[0]


def test_json_line_has_every_field_and_no_path():
    place = Place(as_json=True)
    place.observe(exchange())
    assert json.loads(place.kept.lines[0]) == {
        "ts": "2026-01-02T03:04:05.678Z",
        "id": "req-1",
        "key": "alice",
        "peer": "192.0.2.7",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "backend_status": 200,
        "outcome": "done",
        "stage": "done",
        "bytes_in": 11,
        "bytes_out": 222,
        "queue_ms": 500,
        "first_byte_ms": 1000,
        "total_ms": 2000,
        "prompt_tokens": 10,
        "cached_tokens": 3,
        "completion_tokens": 20,
    }


def test_a_request_without_a_head_has_a_line_too():
    nothing = {"key_id": "-", "status": 400, "outcome": Outcome.REFUSED, "queued_s": 0.0, "left_queue_s": 0.0}
    place, as_json = Place(), Place(as_json=True)
    for each in (place, as_json):
        each.observe(exchange(PLANNER.none, "req-2", **nothing, first_byte_s=0.0))
    assert " | - | - - | 400 | id=req-2 " in place.kept.lines[0]
    assert place.kept.lines[0].endswith(
        " queue_ms=0 first_byte_ms=0 total_ms=2000 prompt_tokens=0 cached_tokens=0 completion_tokens=0"
    )
    assert json.loads(as_json.kept.lines[0])["method"] == "-"


def test_a_whole_answer_and_one_metered_in_passing_tell_the_same():
    whole, passed = Place(), Place()
    assert whole.observe(exchange(told=ANSWER)) == passed.observe(exchange(told=metered(ANSWER)))
    assert whole.kept.lines == passed.kept.lines


# --- Strangers and ids ---


def test_a_flood_without_keys_cannot_fill_the_log(caplog):
    clock = Clock()
    strangers = Strangers(clock)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            strangers.note(exchange(name=f"req-{number}"))
        assert len(caplog.messages) == Strangers.LINES
        assert caplog.messages[0] == "no valid key: 192.0.2.7 for /v1/chat/completions (request req-0)"
        strangers.sum_up()
        assert len(caplog.messages) == Strangers.LINES
        clock.advance(Strangers.WINDOW_S)
        strangers.sum_up()
        assert caplog.messages[-1] == "no valid key: 990 more requests in the last minute"
        strangers.note(exchange())
        assert len(caplog.messages) == Strangers.LINES + 2


def test_ids_are_unique_across_processes():
    one, other = request_ids(), request_ids()
    made = [next(ids) for ids in (one, one, other, other)]
    assert len(set(made)) == 4
    assert all(name.startswith(b"req-") for name in made)
