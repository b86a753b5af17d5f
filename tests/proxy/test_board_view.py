"""board_view.py: what an operator and what another key sees of one moment."""

import json
from dataclasses import replace

from accounting.request_history import STEPS, EndedRequest, KeyHistory
from accounting.request_record import Outcome
from auth import Caller
from core.errors import QUEUE_FULL
from proxy.board_view import (
    MOST_WAITING,
    REQUEST_COLUMNS,
    BoardState,
    CurrentRequest,
    key_view,
    operator_view,
    request_row,
)

ALICE = Caller("alice", "infer", 100)
CHAT = "/v1/chat/completions"
EPOCH_S = 1_000_000.0
STATE = BoardState(
    now_s=120.0,
    epoch_s=EPOCH_S,
    state="ready",
    since_at=999_000.0,
    detail="",
    models=(("tiny", "ready"),),
    version="1.2.3",
    started_at=998_000.0,
    slots=4,
    active=4,
    connections=9,
    viewers=2,
    order=[("bob", 1), ("alice", 2), ("bob", 1), ("carol", 1)],
    running=[
        CurrentRequest("alice", CHAT, 110.0, 115.0, 40, 1),
        CurrentRequest("bob", "/completion", 112.0, 0.0, 0, 2),
    ],
    waiting=[
        CurrentRequest("bob", CHAT, 118.0),
        CurrentRequest("carol", CHAT, 119.0),
        CurrentRequest("bob", "/completion", 117.0),
        CurrentRequest("alice", CHAT, 116.0),
    ],
    speeds={"": 31.26, "alice": 8.0},
)


def ended(name: bytes = b"r-1", key_id: str = "alice", first_byte_s: float = 101.0, **changes: object) -> EndedRequest:
    row = EndedRequest(name, key_id, CHAT, 200, Outcome.DONE, None, 100.0, 100.25, 100.5, first_byte_s, 104.0, 10, 20)
    return row._replace(**changes)


def of(*rows: EndedRequest) -> KeyHistory:
    history = KeyHistory()
    history.add(list(zip(*rows, strict=True)), 104.0, plain=False)
    return history


def test_an_operator_sees_state_models_and_numbers() -> None:
    assert operator_view(STATE, KeyHistory())["gateway"] == {
        "role": "operator",
        "state": "ready",
        "since": 999_000,
        "detail": "",
        "models": [{"name": "tiny", "state": "ready"}],
        "version": "1.2.3",
        "started": 998_000,
        "slots": 4,
        "active": 4,
        "connections": 9,
        "viewers": 2,
    }


def test_an_operator_sees_who_has_the_slots_and_since_when() -> None:
    assert operator_view(STATE, KeyHistory())["slots"] == {
        "rows": [["alice", CHAT, 1_000_110.0, 1_000_115.0, 40, 1], ["bob", "/completion", 1_000_112.0, 0, 0, 2]],
        "freeing": 1,
    }


def test_an_operator_sees_the_whole_queue_in_its_order() -> None:
    assert operator_view(STATE, KeyHistory())["queue"] == {
        "rows": [
            [1, "bob", "/completion", 1_000_117.0, 1],
            [2, "alice", CHAT, 1_000_116.0, 2],
            [3, "bob", CHAT, 1_000_118.0, 1],
            [4, "carol", CHAT, 1_000_119.0, 1],
        ],
        "queued": 4,
    }


def test_a_long_queue_is_cut() -> None:
    view = operator_view(replace(STATE, order=[("bob", 1)] * 80, waiting=[]), KeyHistory())["queue"]
    assert (len(view["rows"]), view["queued"]) == (MOST_WAITING, 80)
    assert view["rows"][0] == [1, "bob", "", 0, 1]  # it has just come


def test_pace_and_time_to_the_first_token() -> None:
    rows = [ended(first_byte_s=100.0 + tenth / 10) for tenth in range(1, 21)]
    refused = ended(first_byte_s=0.0, status=503, refusal=QUEUE_FULL, outcome=Outcome.REFUSED, completion=0)
    view = operator_view(STATE, of(*rows, refused))
    assert view["now"] == {"tokens_per_s": 31.3, "first_token_s": [1.1, 2.0]}
    assert view["failures"] == {"queue_full": 1}
    assert operator_view(STATE, of(refused))["now"]["first_token_s"] == [None, None]


def test_the_series_has_what_has_ended_and_what_is_generated() -> None:
    view = operator_view(STATE, of(ended()))
    assert (view["series"]["step_s"], view["series"]["end"]) == (5, 1_000_125)
    tokens = [*view["series"]["tokens"], view["newest"]]
    assert len(tokens) == STEPS
    assert tokens[-5:] == [20, 0, 0, 40, 0]


def test_another_key_sees_its_own_and_how_many_wait_before_it() -> None:
    view = key_view(STATE, of(ended()), ALICE)
    assert view["gateway"] == {
        "role": "infer",
        "key": "alice",
        "state": "ready",
        "since": 999_000,
        "detail": "",
        "models": [{"name": "tiny", "state": "ready"}],
        "version": "1.2.3",
        "started": 998_000,
    }
    assert view["now"]["tokens_per_s"] == 8.0
    assert view["slots"] == {"rows": [["alice", CHAT, 1_000_110.0, 1_000_115.0, 40, 1]], "freeing": 0}
    assert view["queue"] == {"rows": [[2, "alice", CHAT, 1_000_116.0, 2]], "queued": 1, "before": 1}


def test_a_key_sees_the_models_that_it_may_use() -> None:
    two = replace(STATE, models=(("chat-a", "loaded"), ("embed", "unloaded")))
    view = key_view(two, KeyHistory(), replace(ALICE, models=("chat-*",)))
    assert view["gateway"]["models"] == [{"name": "chat-a", "state": "loaded"}]


def test_a_key_of_which_nothing_waits_sees_how_many_would_be_before_it() -> None:
    assert key_view(STATE, KeyHistory(), replace(ALICE, key_id="dora"))["queue"] == {
        "rows": [],
        "queued": 0,
        "before": 4,
    }


def test_nothing_of_another_key_is_in_a_keys_view() -> None:
    view = key_view(STATE, of(ended()), ALICE)
    text = json.dumps(view)
    assert "bob" not in text
    assert "carol" not in text
    # Nor does anything else in it change with what others have and do, except the number of those before it.
    calm = replace(STATE, order=[("alice", 2)], running=STATE.running[:1], waiting=STATE.waiting[3:], active=1)
    calm = replace(calm, connections=1, viewers=1, speeds={"": 8.0, "alice": 8.0})
    other = key_view(calm, of(ended()), ALICE)
    assert other["queue"]["before"] == 0
    assert {**other, "queue": None} == {**view, "queue": None}


def test_a_request_that_has_ended_has_its_row() -> None:
    row = dict(zip(REQUEST_COLUMNS, request_row(ended(), EPOCH_S), strict=True))
    assert row == {
        "ended": 1_000_104.0,
        "id": "r-1",
        "key": "alice",
        "route": CHAT,
        "status": 200,
        "result": "done",
        "queued_s": 0.25,
        "first_byte_s": 1.0,
        "total_s": 4.0,
        "prompt": 10,
        "completion": 20,
    }
    refused = request_row(ended(first_byte_s=0.0, left_queue_s=0.0, refusal=QUEUE_FULL), EPOCH_S)
    assert refused[5:8] == ["queue_full", 0, 0]
