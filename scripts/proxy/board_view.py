"""What the board shows of one moment: from a BoardState to named sections of plain values, without I/O.

An operator's view has everything. Any other key's view has what is its own, the state, and how many requests wait
before it: no id of another key, and no number that follows from what one other key does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accounting.request_history import STEP_S, EndedRequest, KeyHistory, TokenSeries
from auth import Caller
from policy.model_names import may_use

MOST_WAITING = 50  # rows of the queue
# The columns of the lists that a view has. Times are seconds since the epoch, spans are seconds; 0: not reached.
SLOT_COLUMNS = ("key", "route", "since", "first_byte", "tokens", "slots")
QUEUE_COLUMNS = ("place", "key", "route", "since", "slots")
REQUEST_COLUMNS = ("ended", "id", "key", "route", "status", "result", "queued_s", "first_byte_s", "total_s", "prompt", "completion")  # fmt: skip  # noqa: E501
KEY_COLUMNS = ("key", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month", "parallel")

Sections = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CurrentRequest:
    """A request that occupies slots, or waits for them. `since_s` is when that began, `tokens` are generated so far."""

    key_id: str
    label: str
    since_s: float
    first_byte_s: float = 0.0
    tokens: int = 0
    slots: int = 1


@dataclass(frozen=True, slots=True)
class BoardState:
    """One moment. Times are seconds of the records' clock; `epoch_s` is when that was 0, in seconds since the epoch.

    `order` is the key and the slots of each waiting request, the next one first; `waiting` are the same requests with
    all that is known of them. `active` are all occupied slots, those of cancelled requests included. `speeds` are the
    tokens per second of the last seconds by key, with "" for all. `keys` are the limits of keys, None: not read now.
    """

    now_s: float
    epoch_s: float
    state: str
    since_at: float
    detail: str
    models: tuple[tuple[str, str], ...]
    version: str
    started_at: float
    slots: int
    active: int
    connections: int
    viewers: int
    order: Sequence[tuple[str, int]]
    running: Sequence[CurrentRequest]
    waiting: Sequence[CurrentRequest]
    speeds: Mapping[str, float]


def operator_view(state: BoardState, history: KeyHistory) -> Sections:
    """Return all sections, except the limits of keys."""
    gateway = {"role": "operator", **_gateway(state), "slots": state.slots, "active": state.active}
    gateway |= {"connections": state.connections, "viewers": state.viewers}
    running = state.running
    freeing = max(0, state.active - sum(request.slots for request in running))
    return {
        "gateway": gateway,
        "now": _now(state.speeds.get("", 0.0), history),
        "slots": {"rows": [_slot_row(state, request) for request in running], "freeing": freeing},
        "queue": {"rows": _queue_rows(state, ""), "queued": len(state.order)},
        **_series(state, history, running),
        "failures": dict(history.failures),
    }


def key_view(state: BoardState, history: KeyHistory, caller: Caller) -> Sections:
    """Return what one key may see: its own, and the models that it may use."""
    key_id = caller.key_id
    state = replace(state, models=tuple(each for each in state.models if may_use(caller.models, each[0])))
    running = [request for request in state.running if request.key_id == key_id]
    places = [place for place, (each, _) in enumerate(state.order) if each == key_id]
    return {
        "gateway": {"role": "infer", "key": key_id, **_gateway(state)},
        "now": _now(state.speeds.get(key_id, 0.0), history),
        "slots": {"rows": [_slot_row(state, request) for request in running], "freeing": 0},
        "queue": {
            "rows": _queue_rows(state, key_id),
            "queued": len(places),
            "before": places[0] if places else len(state.order),
        },
        **_series(state, history, running),
        "failures": dict(history.failures),
    }


def _gateway(state: BoardState) -> Sections:
    return {
        "state": state.state,
        "since": round(state.since_at),
        "detail": state.detail,
        "models": [{"name": name, "state": model_state} for name, model_state in state.models],
        "version": state.version,
        "started": round(state.started_at),
    }


def _now(tokens_per_s: float, history: KeyHistory) -> Sections:
    """Return the pace of the last seconds, and the time to the first token of the last requests."""
    waits = sorted(row.first_byte_s - row.started_s for row in history.rows if row.first_byte_s and row.completion)
    return {"tokens_per_s": round(tokens_per_s, 1), "first_token_s": [_share(waits, 0.5), _share(waits, 0.95)]}


def _share(ordered: Sequence[float], share: float) -> float | None:
    """Return the value below which this share of the values is; None of no values."""
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3) if ordered else None


def _slot_row(state: BoardState, request: CurrentRequest) -> list[object]:
    return [
        request.key_id,
        request.label,
        _at(state, request.since_s),
        _at(state, request.first_byte_s),
        request.tokens,
        request.slots,
    ]


def _queue_rows(state: BoardState, only: str) -> list[list[object]]:
    """Return the requests that wait, the next one first; with `only`, those of this key."""
    own: dict[str, list[CurrentRequest]] = {}
    for request in sorted(state.waiting, key=lambda request: request.since_s, reverse=True):
        own.setdefault(request.key_id, []).append(request)
    rows: list[list[object]] = []
    for place, (key_id, slots) in enumerate(state.order, 1):
        if only not in ("", key_id):
            continue
        request = own[key_id].pop() if own.get(key_id) else CurrentRequest(key_id, "", 0.0)
        rows.append([place, key_id, request.label, _at(state, request.since_s), slots])
        if len(rows) == MOST_WAITING:
            break
    return rows


def _series(state: BoardState, history: KeyHistory, running: Iterable[CurrentRequest]) -> Sections:
    """Return the tokens of the last 15 minutes, and apart from them those of the newest step.

    The tokens of a response that has not ended are spread over its time.
    """
    series = live_series(history.series, running, state.now_s)
    end_at = (int(state.now_s // STEP_S) + 1) * STEP_S + state.epoch_s
    *before, newest = [round(each) for each in series.values(state.now_s)]
    return {"series": {"step_s": STEP_S, "end": round(end_at), "tokens": before}, "newest": newest}


def live_series(ended: TokenSeries, running: Iterable[CurrentRequest], now_s: float) -> TokenSeries:
    series = ended.copy()
    for request in running:
        if request.tokens and request.first_byte_s:
            series.spread(request.tokens, request.first_byte_s, now_s)
    return series


def request_row(row: EndedRequest, epoch_s: float) -> list[object]:
    """Return a request that has ended, in REQUEST_COLUMNS."""
    return [
        round(row.ended_s + epoch_s, 1),
        row.id.decode(),
        row.key_id,
        row.label,
        row.status,
        row.failure or row.outcome,
        _span(row.queued_s, row.left_queue_s),
        _span(row.started_s, row.first_byte_s),
        _span(row.started_s, row.ended_s),
        row.prompt,
        row.completion,
    ]


def key_row(report: Mapping[str, Any]) -> list[object]:
    """Return a report of KeyLimits in KEY_COLUMNS; each limit as what is used of it, and the limit or None."""
    limits = [[report[name]["used"], report[name]["limit"]] for name in KEY_COLUMNS[1:-1]]
    return [report["key_id"], *limits, report["parallel"]]


def _at(state: BoardState, time_s: float) -> float:
    return round(time_s + state.epoch_s, 1) if time_s else 0


def _span(begin_s: float, end_s: float) -> float:
    return round(end_s - begin_s, 3) if end_s else 0
