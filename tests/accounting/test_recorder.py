"""recorder.py: each request is counted, charged and logged once, and each series says what happened."""

import logging
from collections.abc import Iterable

import pytest

from accounting.ledger import Charge, charge
from accounting.recorder import InvalidKeyLog, Recorder
from accounting.request_history import RequestHistory
from accounting.request_metrics import KeyCounts, RequestMetrics
from accounting.request_record import Outcome, RequestRecord, Stage
from accounting.token_estimates import TokenEstimator
from accounting.usage_reports import Tokens
from auth import NO_KEY
from core.errors import INVALID_API_KEY, QUEUE_FULL, RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED, Kind
from metrics import Registry, render
from policy.token_limiter import TokenLimiter
from support.clock import Clock
from support.records import ANSWER, ENDED_AT, ENDED_S, EVENTS, PING, counted, left_record, prepare, record


class Recording:
    """A ledger and an access log that keep what they get."""

    def __init__(self) -> None:
        self.charges: dict[str, Charge] = {}
        self.lines: list[str] = []

        self.by_model: dict[tuple[str, str], Charge] = {}

    def record(self, charges: dict[str, Charge], by_model: dict[tuple[str, str], Charge] | None = None) -> None:
        self.charges |= charges
        self.by_model |= by_model or {}

    def write_lines(self, lines: Iterable[bytes]) -> None:
        self.lines += [line.decode() for line in lines]


class Accounts:
    """A recorder with everything around it."""

    def __init__(self, *, as_json: bool = False, has_log: bool = True, by_model: bool = False) -> None:
        self.registry = Registry()
        self.for_operators = Registry(self.registry)
        self.kept = Recording()
        self.clock = Clock()
        self.recorder = Recorder(
            RequestMetrics(self.registry, "private", by_model=by_model),
            KeyCounts(self.for_operators),
            self.kept,  # type: ignore[arg-type]
            self.kept if has_log else None,  # type: ignore[arg-type]
            TokenEstimator(),
            as_json=as_json,
            clock=self.clock,
            wall_clock=lambda: ENDED_AT - ENDED_S + self.clock(),
        )

    def observe(self, *records: RequestRecord) -> dict[str, float]:
        for each in records:
            self.recorder.record(each)
        self.recorder.flush()
        return self.page(self.registry)

    @staticmethod
    def page(registry: Registry) -> dict[str, float]:
        lines = render(registry, "text").decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


# --- Series ---


def test_a_request_is_counted_by_route_and_status() -> None:
    page = Accounts().observe(record(), record(status=503), record(PING, key_id="-"))
    assert page['gateway_requests_total{route="/v1/chat/completions",code="200"}'] == 1
    assert page['gateway_requests_total{route="/v1/chat/completions",code="503"}'] == 1
    assert page['gateway_requests_total{route="/ping",code="200"}'] == 1


def test_with_several_models_each_has_its_numbers() -> None:
    accounts = Accounts(by_model=True)
    refused = record(status=404, first_byte_s=0.0, usage_source=None)
    page = accounts.observe(record(model="chat"), record(model="chat"), record(model="code"), refused)
    requests = {
        model: page[f'gateway_requests_total{{route="/v1/chat/completions",code="{code}",model="{model}"}}']
        for model, code in (("chat", 200), ("code", 200), ("other", 404))
    }
    assert requests == {"chat": 2, "code": 1, "other": 1}
    assert page['gateway_tokens_total{type="completion",model="chat"}'] == 40
    assert page['gateway_tokens_total{type="prompt",model="code"}'] == 10
    assert page['gateway_time_to_first_byte_seconds_count{model="chat"}'] == 2
    assert 'gateway_time_to_first_byte_seconds_count{model="other"}' not in page
    assert accounts.kept.charges["alice"].requests == 4
    assert {key: charge.completion for key, charge in accounts.kept.by_model.items()} == {
        ("alice", "chat"): 40,
        ("alice", "code"): 20,
        ("alice", "other"): 0,
    }


def test_a_request_without_a_key_is_charged_to_no_model() -> None:
    accounts = Accounts(by_model=True)
    accounts.observe(record(key_id="-", model="chat"), record(PING, model="chat"))
    assert accounts.kept.by_model == {}


@pytest.mark.parametrize(
    ("name", "seconds"), [("request_duration", 2.0), ("queue_wait", 0.5), ("time_to_first_byte", 1.0)]
)
def test_spans_are_observed(name: str, seconds: float) -> None:
    page = Accounts().observe(record())
    assert page[f"gateway_{name}_seconds_sum"] == seconds
    assert page[f"gateway_{name}_seconds_count"] == 1


def test_what_was_not_reached_is_not_observed() -> None:
    page = Accounts().observe(record(left_queue_s=0.0, first_byte_s=0.0, usage_source=None))
    assert page["gateway_queue_wait_seconds_count"] == 0
    assert page["gateway_time_to_first_byte_seconds_count"] == 0
    assert page["gateway_inter_event_gap_seconds_count"] == 0


def test_tokens_and_their_speed() -> None:
    page = Accounts().observe(record())
    tokens = {kind: page[f'gateway_tokens_total{{type="{kind}"}}'] for kind in ("prompt", "cached", "completion")}
    assert tokens == {"prompt": 10, "cached": 3, "completion": 20}
    assert page["gateway_prompt_tokens_per_second_sum"] == 20  # the 7 that were not cached, in 0.35 s
    assert page["gateway_generation_tokens_per_second_sum"] == 40
    assert page['gateway_cached_prompt_tokens_sum{mode="private"}'] == 3
    assert page['gateway_cached_prompt_tokens_count{mode="private"}'] == 1


def test_estimates_alone_are_no_sign_that_the_backend_serves() -> None:
    """It may hang: a client that leaves it, or waits in vain, is charged all the same."""
    accounts = Accounts()
    page = accounts.observe(left_record(), left_record(outcome=Outcome.TIMED_OUT))
    assert page['gateway_tokens_total{type="completion"}'] > 0
    assert accounts.recorder.served_s is None
    assert page['gateway_cached_prompt_tokens_count{mode="private"}'] == 0
    accounts.clock.advance(5)
    page = accounts.observe(left_record(), record())
    assert accounts.recorder.served_s == accounts.clock()
    assert page['gateway_cached_prompt_tokens_count{mode="private"}'] == 1
    assert page['gateway_cached_prompt_tokens_sum{mode="private"}'] == 3


def test_a_stream_that_was_counted_on_after_its_client_had_left_has_no_gap() -> None:
    """Its events go on, but its time ended as the client left."""
    source = counted(*EVENTS * 400)
    page = Accounts().observe(left_record(usage_source=source))
    assert page["gateway_inter_event_gap_seconds_count"] == 0


def test_an_answer_without_times_has_no_speed() -> None:
    usage = b'{"usage":{"prompt_tokens":4,"completion_tokens":0}}'
    page = Accounts().observe(record(usage_source=counted(usage)), record(usage_source=None))
    assert page['gateway_tokens_total{type="prompt"}'] == 4
    assert page["gateway_prompt_tokens_per_second_count"] == page["gateway_generation_tokens_per_second_count"] == 0


def test_the_gap_between_events_is_the_mean_of_a_stream() -> None:
    page = Accounts().observe(record(usage_source=counted(*EVENTS, *EVENTS, EVENTS[0])))
    assert page["gateway_inter_event_gap_seconds_sum"] == 0.25  # five events in the second from first byte to end


def test_bytes_are_those_sent() -> None:
    assert Accounts().observe(record(), record(bytes_out=8))["gateway_bytes_sent_total"] == 230


def test_a_client_that_left_is_counted_by_stage() -> None:
    left = record(outcome=Outcome.CANCELLED, stage=Stage.QUEUED, status=499)
    page = Accounts().observe(left, record())
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
def test_refusals_are_counted_by_their_kind(kind: Kind, name: str) -> None:
    page = Accounts().observe(record(refusal=kind, outcome=Outcome.REFUSED, usage_source=None))
    counts = {other: page[f"gateway_{other}_total"] for other in ("unauthorized", "rate_limited", "queue_rejections")}
    assert counts == {other: float(other == name) for other in counts}


def test_keys_are_shown_to_operators_only_and_do_not_grow_the_public_page() -> None:
    accounts = Accounts()
    before = len(accounts.page(accounts.registry))
    page = accounts.observe(*(record(key_id=f"key-{number}") for number in range(1000)))
    assert len(page) <= before + 8
    assert not [name for name in page if "key-" in name]
    mine = accounts.page(accounts.for_operators)
    assert mine['gateway_key_requests_total{key="key-999"}'] == 1
    assert mine['gateway_key_tokens_total{key="key-999",type="completion"}'] == 20


# --- The ledger ---


def test_requests_of_a_key_on_metered_routes_are_charged() -> None:
    accounts = Accounts()
    accounts.observe(
        record(), record(key_id="-"), record(PING), record(outcome=Outcome.CANCELLED), record(key_id="bob")
    )
    tokens = Tokens(10, 3, 20, 350.0, 500.0)
    assert accounts.kept.charges == {
        "alice": charge([(tokens, "done"), (tokens, "cancelled")]),
        "bob": charge([(tokens, "done")]),
    }


def test_a_full_batch_is_counted_before_anything_reads_the_numbers() -> None:
    accounts = Accounts()
    for _ in range(600):
        accounts.recorder.record(record(usage_source=None))
    assert len(accounts.kept.lines) >= 500


# --- The access line ---


@pytest.mark.parametrize(("as_json", "start"), [(False, "2026-01-02T03:04:05.678Z | alice"), (True, '{"ts": "2026-01')])
def test_each_request_has_one_line_in_the_form_that_is_set(as_json: bool, start: str) -> None:
    accounts = Accounts(as_json=as_json)
    accounts.observe(record(), record(name="req-2"))
    assert [line.startswith(start) for line in accounts.kept.lines] == [True, True]
    accounts.recorder.flush()
    assert len(accounts.kept.lines) == 2


def test_there_may_be_no_access_log() -> None:
    assert Accounts(has_log=False).observe(record())["gateway_bytes_sent_total"] == 222


def test_a_whole_answer_and_one_counted_in_pieces_are_recorded_alike() -> None:
    whole, passed = Accounts(), Accounts()
    assert whole.observe(record(usage_source=ANSWER)) == passed.observe(record(usage_source=counted(ANSWER)))
    assert whole.kept.lines == passed.kept.lines


# --- Requests without a valid key ---


def without_key(name: str = "req-1") -> RequestRecord:
    made = record(name=name)
    made.key_id = NO_KEY
    return made


def test_a_flood_without_keys_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    invalid_keys = InvalidKeyLog(clock)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            invalid_keys.add(without_key(name=f"req-{number}"))
        assert len(caplog.messages) == InvalidKeyLog.LINES
        assert caplog.messages[0] == "no valid key: 192.0.2.7 for /v1/chat/completions (request req-0)"
        invalid_keys.sum_up()
        assert len(caplog.messages) == InvalidKeyLog.LINES
        clock.advance(InvalidKeyLog.WINDOW_S)
        invalid_keys.sum_up()
        assert caplog.messages[-1] == "no valid key: 990 more requests in the last minute"
        invalid_keys.add(without_key())
        assert len(caplog.messages) == InvalidKeyLog.LINES + 2


def test_a_key_that_does_not_work_from_its_address_is_named(caplog: pytest.LogCaptureFixture) -> None:
    refused = record(name="req-1")
    refused.key_id = "alice"
    with caplog.at_level(logging.WARNING):
        InvalidKeyLog(Clock()).add(refused)
    assert caplog.messages == [
        "key alice from elsewhere than its from=: 192.0.2.7 for /v1/chat/completions (request req-1)"
    ]


def test_a_minute_with_few_of_them_is_not_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    invalid_keys = InvalidKeyLog(clock)
    with caplog.at_level(logging.WARNING):
        invalid_keys.add(record())
        clock.advance(InvalidKeyLog.WINDOW_S)
        invalid_keys.sum_up()
    assert len(caplog.messages) == 1


# --- What was reserved ---


def test_what_was_reserved_counts_with_what_was_used() -> None:
    accounts = Accounts()
    limiter = TokenLimiter(accounts.clock)
    for source in (counted(ANSWER), None):
        reservation = limiter.reserve("alice", 1000, 400)
        accounts.observe(record(), record(usage_source=source, reservation=reservation))
    assert limiter.used("alice")[0] == 30


# --- The board ---


def test_what_has_ended_is_handed_to_the_board_if_there_is_one() -> None:
    accounts = Accounts()
    accounts.observe(record())
    accounts.recorder.history = history = RequestHistory()
    accounts.observe(record(name="req-2"))
    assert [row.id for row in history.all.rows] == [b"req-2"]


def test_how_long_someone_looks_at_the_board_is_no_duration_of_requests() -> None:
    board = record(prepare("GET", "/ui/events"), ended_s=9999.0)
    page = Accounts().observe(board, record())
    assert page["gateway_request_duration_seconds_count"] == 1
    assert page["gateway_request_duration_seconds_sum"] == 2.0
    assert page['gateway_requests_total{route="/ui/events",code="200"}'] == 1
