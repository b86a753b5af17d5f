"""board_viewers.py: who gets which events, when a stream ends, and what a viewer costs others."""

import json
from dataclasses import replace
from typing import Any

import pytest

from auth import Caller, Keyring, unauthorized
from core.errors import TOO_MANY_VIEWERS, GatewayError
from policy.prepared_request import PreparedRequest
from proxy.board_view import KEY_COLUMNS, key_row
from proxy.board_viewers import (
    IDLE_S,
    KEPT_FOR_OPERATORS,
    MOST_KEYS,
    MOST_OF_KEY,
    MOST_VIEWERS,
    STALLED_BEATS,
    BoardViewers,
)
from proxy.key_limits import KeyLimits
from proxy.response import Response
from support.board import BoardParts
from support.clock import Clock
from support.gateway import get
from support.memory_gateway import ALICE, EPOCH, OLGA, prepare
from support.memory_transport import ABORTED, Link, end_of, memory_test
from support.records import record
from transport.client_protocol import ClientProtocol

BOB = replace(ALICE, key_id="bob")


class Limits:
    """Reports the limits of keys, and counts how often it is asked."""

    def __init__(self) -> None:
        self.lists = 0

    def of(self, caller: Caller) -> dict[str, object]:
        limits = {name: {"used": 1, "limit": None} for name in KEY_COLUMNS[1:-1]}
        return {"key_id": caller.key_id, **limits, "parallel": caller.parallel}

    def listed(self, first: Any, most: int) -> tuple[list[dict[str, object]], int]:
        self.lists += 1
        assert most == MOST_KEYS
        return [self.of(ALICE), self.of(BOB)], 2


class Streamed:
    """One client of the event stream, and what its handler ended with."""

    def __init__(self, board: "Board", caller: Caller) -> None:
        self._board = board
        self.caller = caller
        self.client = board.link.client()
        prepared = prepare(get(b"/ui/events"), ui=True)
        response = Response(self.client, prepared, b"r-1", EPOCH, True)
        self.keeps_alive = lambda: response.keep_alive
        self.ends: list[object] = []
        board.callers[self.client] = caller
        self.client.run_handler(self._serve(response, prepared), self.ends.append)

    async def _serve(self, response: Response, prepared: PreparedRequest) -> object:
        try:
            await self._board.viewers.serve(self.client, response, prepared, self.caller)
        except Exception as error:
            return error
        return None

    def events(self) -> list[dict[str, Any]]:
        """Return what it was sent since the last call."""
        sent = self._board.link.sent(self.client)
        return [json.loads(part.partition(b"\n")[0]) for part in sent.split(b"data: ")[1:]]


class Board:
    def __init__(self, clock: Clock) -> None:
        self.parts = BoardParts(clock)
        self.link = Link(clock)
        self.limits = Limits()
        self.callers: dict[ClientProtocol, Caller | None] = {}
        limits: Any = self.limits
        self.viewers = BoardViewers(self.parts.reader, limits, self._find_caller, clock)
        self.link.ticker.add_listener(self.viewers.on_tick)

    def _find_caller(self, client: ClientProtocol, prepared: PreparedRequest) -> Caller | None:
        caller = self.callers[client]
        if caller is None:
            raise unauthorized()
        return caller

    def view(self, caller: Caller = OLGA) -> Streamed:
        return Streamed(self, caller)

    def beat(self, seconds: float = 1.0) -> None:
        self.link.advance(seconds)

    def end(self) -> None:
        for client in self.callers:
            client.hang_up()
        assert len(self.viewers) == 0


board_test = memory_test(Board, Board.end)


@board_test
async def test_a_viewer_first_gets_everything_and_then_what_changes(board: Board) -> None:
    board.parts.end(record())
    viewer = board.view()
    assert viewer.events() == []
    board.beat(0.0)
    (first,) = viewer.events()
    assert set(first) == {"t", "gateway", "now", "slots", "queue", "series", "newest", "failures", "keys", "requests"}
    assert [row[1] for row in first["requests"]] == ["req-1"]
    board.beat(0.5)
    assert viewer.events() == []
    board.beat()
    (second,) = viewer.events()
    assert set(second) == {"t"}
    board.parts.end(record(name="req-2"))
    board.beat()
    (third,) = viewer.events()
    assert set(third) == {"t", "more", "now"}
    assert [row[1] for row in third["more"]] == ["req-2"]


@board_test
async def test_the_stream_is_an_event_stream_in_chunks_whose_handler_goes_on(board: Board) -> None:
    viewer = board.view()
    head = board.link.sent(viewer.client)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Type: text/event-stream\r\n" in head
    assert b"\r\nTransfer-Encoding: chunked\r\n" in head
    assert viewer.ends == []


@board_test
async def test_the_series_is_sent_once_a_step(board: Board) -> None:
    viewer = board.view()
    sent = []
    for _ in range(11):
        board.beat()
        sent += [("series" in event) for event in viewer.events()]
    assert sent.count(True) == 3


@board_test
async def test_a_key_gets_its_own_and_an_operator_everything(board: Board) -> None:
    board.parts.end(record(name="a-1"), record(name="b-1", key_id="bob"))
    operator, alice = board.view(), board.view(ALICE)
    board.beat()
    (of_all,), (own,) = operator.events(), alice.events()
    assert [row[1] for row in of_all["requests"]] == ["b-1", "a-1"]
    assert [row[0] for row in of_all["keys"]["rows"]] == ["alice", "bob"]
    assert [row[1] for row in own["requests"]] == ["a-1"]
    assert own["keys"] == {"rows": [["alice", [1, None], [1, None], [1, None], [1, None], None]], "of": 1}
    assert "bob" not in json.dumps(own)
    assert "olga" not in json.dumps(own)


@board_test
async def test_those_who_see_the_same_share_one_view(board: Board) -> None:
    viewers = [board.view() for _ in range(20)]
    board.beat()
    events = [viewer.events() for viewer in viewers]
    assert all(each == events[0] for each in events)
    assert board.parts.flushes == 1


@board_test
async def test_the_limits_of_keys_are_read_every_few_seconds(board: Board) -> None:
    board.view()
    for _ in range(10):
        board.beat()
    assert board.limits.lists == 2


@board_test
async def test_nothing_is_read_without_viewers(board: Board) -> None:
    viewer = board.view()
    board.beat()
    viewer.client.hang_up()
    flushes = board.parts.flushes
    for _ in range(5):
        board.beat()
    assert board.parts.flushes == flushes


@board_test
async def test_a_late_viewer_gets_what_the_others_have(board: Board) -> None:
    early = board.view()
    board.beat()
    board.beat()
    late, first_of_its_key = board.view(), board.view(ALICE)
    early.events()
    board.beat(0.0)
    for viewer in (late, first_of_its_key):
        (event,) = viewer.events()
        assert {"gateway", "keys", "series", "requests"} <= set(event)
    assert early.events() == []


@board_test
async def test_a_late_viewer_gets_each_request_once(board: Board) -> None:
    early = board.view()
    board.parts.end(record(name="r-1"))
    board.beat()
    board.parts.end(record(name="r-2"))
    late = board.view()
    board.beat(0.0)
    board.beat()
    for viewer, parts in ((early, 2), (late, 2)):
        events = viewer.events()
        assert len(events) == parts
        rows = [row for event in events for row in event.get("requests", []) + event.get("more", [])]
        assert sorted(row[1] for row in rows) == ["r-1", "r-2"]


# --- The end of a stream ---


@board_test
async def test_a_drain_ends_every_stream_at_once_and_in_order(board: Board) -> None:
    viewer = board.view()
    board.beat()
    viewer.events()
    board.viewers.end()
    sent = board.link.sent(viewer.client)
    assert b'event: end\ndata: {"reason":"draining"}\n\n' in sent
    assert sent.endswith(b"\r\n0\r\n\r\n")
    assert viewer.ends == [None]
    assert not viewer.keeps_alive()
    assert len(board.viewers) == 0


SLOWER = replace(ALICE, rate_limit=7)


@board_test
async def test_a_drain_waits_for_no_viewer_that_reads_nothing(board: Board) -> None:
    slow = board.view()
    board.beat()
    end_of(slow.client).stall()
    board.parts.end(record())
    board.beat()
    board.link.batcher.flush()
    board.viewers.end()
    assert len(slow.ends) == 1
    assert end_of(slow.client).state == ABORTED


@pytest.mark.parametrize(("caller", "reason"), [(None, "key"), (SLOWER, "changed"), (OLGA, "changed")])
@board_test
async def test_a_key_that_is_revoked_or_changed_ends_its_stream(
    board: Board, caller: Caller | None, reason: str
) -> None:
    viewer, other = board.view(ALICE), board.view(BOB)
    board.beat()
    viewer.events()
    board.callers[viewer.client] = caller
    board.beat()
    assert viewer.events() == [{"reason": reason}]
    assert viewer.ends == [None]
    assert other.ends == []


@board_test
async def test_an_idle_gateway_ends_streams_that_have_been_open_as_long(board: Board) -> None:
    early = board.view()
    board.beat(IDLE_S - 5)
    late = board.view()
    early.events()
    board.beat(6)
    assert early.events() == [{"reason": "idle"}]
    assert late.ends == []
    board.parts.queue.acquire("alice")
    board.beat(IDLE_S)
    assert late.ends == []


@board_test
async def test_a_client_that_leaves_is_forgotten(board: Board) -> None:
    viewer = board.view()
    board.beat()
    end_of(viewer.client).receive_eof()
    assert len(board.viewers) == 0
    assert len(viewer.ends) == 1


# --- A viewer that does not read ---


@board_test
async def test_a_viewer_that_reads_nothing_is_skipped_and_then_gets_everything(board: Board) -> None:
    slow, other = board.view(), board.view()
    board.beat()
    slow.events()
    end_of(slow.client).stall()
    board.beat()
    board.link.batcher.flush()
    written = len(end_of(slow.client).written)
    for _ in range(STALLED_BEATS - 1):
        board.beat()
        assert other.events()
    board.link.batcher.flush()
    assert len(end_of(slow.client).written) == written
    end_of(slow.client).take_unsent()
    slow.events()
    board.beat()
    (event,) = slow.events()
    assert "requests" in event
    assert slow.ends == []


@board_test
async def test_a_viewer_that_reads_nothing_for_long_is_dropped(board: Board) -> None:
    slow = board.view()
    board.beat()
    end_of(slow.client).stall()
    board.parts.end(record())
    board.beat()
    board.link.batcher.flush()
    for _ in range(STALLED_BEATS + 1):
        board.beat()
    assert len(slow.ends) == 1
    assert len(board.viewers) == 0


# --- The bound ---


@board_test
async def test_viewers_are_bounded_and_places_are_kept_for_operators(board: Board) -> None:
    for number in range(MOST_VIEWERS - KEPT_FOR_OPERATORS):
        board.view(replace(ALICE, key_id=f"k{number}"))
    assert refused(board.view(ALICE)).kind is TOO_MANY_VIEWERS
    for _ in range(KEPT_FOR_OPERATORS):
        assert board.view(OLGA).ends == []
    assert refused(board.view(OLGA)).message == TOO_MANY_VIEWERS.message
    assert len(board.viewers) == MOST_VIEWERS


@board_test
async def test_one_key_has_few_places(board: Board) -> None:
    for _ in range(MOST_OF_KEY):
        board.view(ALICE)
    assert "This API key" in refused(board.view(ALICE)).message
    assert board.view(BOB).ends == []
    for _ in range(MOST_OF_KEY + 1):
        assert board.view(OLGA).ends == []


def refused(viewer: Streamed) -> GatewayError:
    (error,) = viewer.ends
    assert isinstance(error, GatewayError)
    return error


# --- Rows of keys ---


def test_a_row_of_a_key_has_what_is_used_and_the_limits() -> None:
    report = Limits().of(ALICE) | {"tokens_per_day": {"used": 12, "limit": 100}, "parallel": 3}
    assert key_row(report) == ["alice", [1, None], [1, None], [12, 100], [1, None], 3]


def test_the_keys_served_last_are_listed_first() -> None:
    class Keys:
        keyring = Keyring({name.encode(): replace(ALICE, key_id=name) for name in "abcd"})

    class Standing(KeyLimits):
        def of(self, caller: Caller) -> dict[str, object]:
            return {"key_id": caller.key_id}

    parts: Any = Keys()
    rows, of = Standing(parts, parts, parts).listed(["c", "gone", "a"], 3)
    assert ([row["key_id"] for row in rows], of) == (["c", "a", "b"], 4)
