"""board.py: one moment as it is read from the parts of the gateway."""

from typing import Any

from accounting.request_record import RequestRecord, Stage
from backend.readiness import DRAINING
from proxy.board_view import CurrentRequest
from support.board import BoardParts
from support.records import CHAT, EVENTS, counted, record


def current(stage: str, key_id: str = "alice", events: int = 0, **changes: Any) -> RequestRecord:
    """Return the record of a request that is being served."""
    source = counted(*EVENTS[:1] * events) if events else None
    made = record(CHAT, key_id=key_id, usage_source=source, first_byte_s=101.0 if events else 0.0, **changes)
    made.stage = stage
    return made


def test_the_state_is_read_once_all_that_has_ended_is_counted() -> None:
    around = BoardParts()
    around.readiness.detail = "why"
    around.queue.acquire("alice")
    state = around.reader.read([], 3)
    assert around.flushes == 1
    assert (state.state, state.detail, state.models, state.version) == ("ready", "why", (("tiny", "ready"),), "1.2.3")
    assert (state.slots, state.active, state.connections, state.viewers) == (4, 1, 7, 3)
    assert state.epoch_s == 1_000_000.0
    assert state.started_at == 1_000_000.0 + around.clock()


def test_a_drain_is_the_gateways_state_and_not_the_models() -> None:
    around = BoardParts()
    around.lifecycle.drain()
    state = around.reader.read([], 1)
    assert (state.state, state.models) == (DRAINING, (("tiny", "ready"),))


def test_a_clock_that_is_set_moves_all_times_and_a_trembling_one_none() -> None:
    around = BoardParts()
    around.reader.read([], 1)
    around.wall_s += 0.2
    assert around.reader.read([], 1).epoch_s == 1_000_000.0
    around.wall_s += 3600
    assert around.reader.read([], 1).epoch_s == 1_003_600.2


def test_requests_at_work_and_waiting_are_told_apart() -> None:
    around = BoardParts()
    around.records = [
        (current(Stage.STREAMING, events=3, left_queue_s=100.9), 1),
        (current(Stage.AWAITING_RESPONSE, "bob", left_queue_s=0.0), 2),
        (current(Stage.QUEUED, "carol"), 0),
        (current(Stage.READING_BODY, "dora"), 0),
    ]
    state = around.reader.read([], 1)
    label = CHAT.route.label
    assert state.running == [
        CurrentRequest("bob", label, 100.25, 0.0, 0, 2),
        CurrentRequest("alice", label, 100.9, 101.0, 3, 1),
    ]
    assert state.waiting == [CurrentRequest("carol", label, 100.25)]


def test_the_pace_counts_tokens_that_are_generated_and_that_have_ended() -> None:
    around = BoardParts()
    assert around.reader.read(["", "alice"], 1).speeds == {"": 0.0, "alice": 0.0}
    around.clock.advance(2)
    around.records = [(current(Stage.STREAMING, events=8), 1), (current(Stage.STREAMING, "bob", events=4), 1)]
    assert around.reader.read(["", "alice"], 1).speeds == {"": 6.0, "alice": 4.0}
    around.records = []
    around.end(record())  # 20 tokens
    around.clock.advance(2)
    assert around.reader.read(["", "alice", "bob"], 1).speeds == {"": 5.0, "alice": 5.0, "bob": 0.0}


def test_the_pace_is_never_negative_and_begins_anew_after_a_pause() -> None:
    around = BoardParts()
    around.records = [(current(Stage.STREAMING, events=40), 1)]
    around.reader.read([""], 1)
    around.records = []
    around.clock.advance(1)
    assert around.reader.read([""], 1).speeds == {"": 0.0}
    around.end(record())
    around.clock.advance(60)
    assert around.reader.read([""], 1).speeds == {"": 0.0}


def test_an_idle_gateway_says_for_how_long() -> None:
    around = BoardParts()
    around.clock.advance(5)
    assert around.reader.idle_s() == 5.0
