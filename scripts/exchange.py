"""The record of one request, and the one place that observes it.

An Exchange is filled as the request moves; `Observer.observe` takes it once at its end and is the only code that counts
requests or writes an access line, so that the two always agree and refusals are in both.
"""

import json
import logging
import os
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import compress, count, groupby, repeat
from operator import add, itemgetter, mod, mul, sub
from typing import Any, NamedTuple

from auth import NO_KEY
from errors import INVALID_API_KEY, QUEUE_FULL, RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED, Kind
from logs import AccessLog, escape, timestamps
from metrics import Counter, Histogram, Registry
from plan import Plan
from usage import Charge, Ledger, Meter, Tokens, charge, read_tokens

log = logging.getLogger("gateway")

# Answered to nobody: what logs and counters say of a client that left before it was answered, as nginx has it.
CLIENT_CLOSED_REQUEST = 499

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
TOKENS_PER_SECOND = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 5120.0, 10240.0)
CACHED_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)

TOKEN_TYPES = ("prompt", "cached", "completion")
_BATCH = 256
_NO_TOKENS = Tokens(0, 0, 0)


class Stage:
    """How far a request has come; also the `phase` of gateway_cancelled_total."""

    READING_HEAD = "reading_head"
    AUTHENTICATING = "authenticating"
    READING_BODY = "reading_body"
    QUEUED = "queued"
    AWAITING_RESPONSE = "awaiting_response"
    STREAMING = "streaming"
    DONE = "done"


class Outcome:
    DONE = "done"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    TIMED_OUT = "timed_out"


def request_ids() -> Iterator[bytes]:
    """Ids for requests that bring none worth keeping: unique across processes, cheap to make."""
    return map(f"req-{os.urandom(6).hex()}-%d".encode().__mod__, count(1))


class Exchange:
    """One request and what became of it, filled as it moves. Times are monotonic seconds, 0 where it never came so far.

    `bytes_out` and `ended_s` are known at its end; `left_queue_s` is when it was admitted, or gave the waiting up.
    """

    __slots__ = (
        "backend_status",
        "bytes_in",
        "bytes_out",
        "ended_s",
        "first_byte_s",
        "id",
        "key_id",
        "left_queue_s",
        "outcome",
        "peer",
        "plan",
        "queued_s",
        "refusal",
        "stage",
        "started_s",
        "status",
        "told",
    )

    bytes_out: int
    ended_s: float

    def __init__(self, name: bytes, peer: str, plan: Plan, started_s: float, stage: str) -> None:
        self.id = name  # as the fields have it
        self.peer = peer
        self.plan = plan
        self.key_id = NO_KEY
        self.stage = stage
        self.outcome = Outcome.DONE
        self.started_s = started_s
        self.queued_s = self.left_queue_s = self.first_byte_s = 0.0
        self.status = CLIENT_CLOSED_REQUEST
        self.backend_status = self.bytes_in = 0
        self.refusal: Kind | None = None
        self.told: Meter | bytes | None = None  # the answer, for its tokens


class Columns(NamedTuple):
    """The fields of many exchanges, each a column."""

    key_id: tuple[str, ...]
    label: tuple[str, ...]
    metered: tuple[bool, ...]
    words: tuple[bytes, ...]
    id: tuple[bytes, ...]
    peer: tuple[str, ...]
    status: tuple[int, ...]
    backend_status: tuple[int, ...]
    outcome: tuple[str, ...]
    stage: tuple[str, ...]
    refusal: tuple[Kind | None, ...]
    bytes_in: tuple[int, ...]
    bytes_out: tuple[int, ...]
    started_s: tuple[float, ...]
    queued_s: tuple[float, ...]
    left_queue_s: tuple[float, ...]
    first_byte_s: tuple[float, ...]
    ended_s: tuple[float, ...]
    told: tuple[Meter | bytes | None, ...]

    @classmethod
    def of(cls, exchanges: Iterable[Exchange]) -> "Columns":
        rows = [
            (
                x.key_id,
                (plan := x.plan).label,
                plan.metered,
                plan.words,
                x.id,
                x.peer,
                x.status,
                x.backend_status,
                x.outcome,
                x.stage,
                x.refusal,
                x.bytes_in,
                x.bytes_out,
                x.started_s,
                x.queued_s,
                x.left_queue_s,
                x.first_byte_s,
                x.ended_s,
                x.told,
            )
            for x in exchanges
        ]
        return cls(*zip(*rows, strict=True))


class Metrics:
    """Every series that counts requests, registered once."""

    def __init__(self, registry: Registry) -> None:
        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return registry.register(Counter(f"gateway_{name}", words, labels))

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return registry.register(Histogram(f"gateway_{name}", words, buckets))

        self.requests = counter("requests_total", "Requests, by route and by the status sent.", ("route", "code"))
        self.duration = histogram("request_duration_seconds", "From the head's last byte to the end.", SECONDS)
        self.queue_wait = histogram("queue_wait_seconds", "Waiting for a slot of the backend.", SECONDS)
        self.first_byte = histogram("time_to_first_byte_seconds", "From the head's last byte to the answer.", SECONDS)
        self.gap = histogram("inter_event_gap_seconds", "Mean time between two events, once a stream.", GAP_SECONDS)
        self.tokens = counter("tokens_total", "Tokens; cached ones are part of the prompt's.", ("type",))
        self.prompt_speed = histogram("prompt_tokens_per_second", "Prompt processing.", TOKENS_PER_SECOND)
        self.generation_speed = histogram("generation_tokens_per_second", "Generation.", TOKENS_PER_SECOND)
        self.cached = histogram("cached_prompt_tokens", "Prompt tokens found in the cache, a request.", CACHED_TOKENS)
        self.queue_rejections = counter("queue_rejections_total", "Requests that found the queue full.")
        self.cancelled = counter("cancelled_total", "Requests whose client left, by stage.", ("phase",))
        self.bytes_sent = counter("bytes_sent_total", "Octets written to clients in answers.")
        self.unauthorized = counter("unauthorized_total", "Requests refused for their credential.")
        self.rate_limited = counter("rate_limited_total", "Requests refused for their key's rate or quota.")


class KeyCounts:
    """What each key has used since the gateway started: for operators, since ids of keys are nobody else's business."""

    def __init__(self, registry: Registry) -> None:
        self._requests: Tally[str] = Tally()
        self._tokens: dict[str, list[int]] = {}
        registry.register(
            Counter("gateway_key_requests_total", "Requests, by key.", ("key",), read=self._read_requests)
        )
        registry.register(
            Counter("gateway_key_tokens_total", "Tokens, by key.", ("key", "type"), read=self._read_tokens)
        )

    def add(self, key_ids: Iterable[str], charges: Mapping[str, Charge]) -> None:
        """Count requests that have ended, one for each id, and what they are charged with."""
        self._requests.update(key_ids)
        for key_id, more in charges.items():
            tokens = self._tokens.get(key_id, (0, 0, 0))
            self._tokens[key_id] = [*map(add, tokens, (more.prompt, more.cached, more.completion))]

    def _read_requests(self) -> dict[tuple[str, ...], float]:
        return {(key_id,): number for key_id, number in self._requests.items() if key_id != NO_KEY}

    def _read_tokens(self) -> dict[tuple[str, ...], float]:
        return {
            (key_id, kind): number
            for key_id, tokens in self._tokens.items()
            for kind, number in zip(TOKEN_TYPES, tokens, strict=True)
        }


class Strangers:
    """Tells in the log who came without a valid key, in so few lines that a flood cannot fill it."""

    LINES = 10
    WINDOW_S = 60.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._count = 0

    def note(self, exchange: Exchange) -> None:
        self._count += 1
        if self._count <= self.LINES:
            log.warning(
                "no valid key: %s for %s (request %s)", exchange.peer, exchange.plan.label, exchange.id.decode()
            )

    def sum_up(self) -> None:
        """Once a window, say how many lines it did not get."""
        now_s = self._clock()
        if now_s - self._began_s >= self.WINDOW_S:
            if self._count > self.LINES:
                log.warning("no valid key: %d more requests in the last minute", self._count - self.LINES)
            self._began_s, self._count = now_s, 0


class Observer:
    """Counts every exchange once, charges its key once and writes its access line once.

    Exchanges are taken in batches, a few times a second and whenever somebody is about to look: no client waits for the
    accounts. A batch is turned into its columns, which the interpreter sums, sorts and formats in a fraction of the
    time that the same requests would take one by one.
    """

    def __init__(
        self,
        metrics: Metrics,
        keys: KeyCounts,
        ledger: Ledger,
        access_log: AccessLog | None,
        *,
        as_json: bool,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """`clock` is the one that exchanges are timed with, `wall_clock` tells seconds since the epoch."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._metrics = metrics
        self._keys = keys
        self._strangers = Strangers(clock)
        self._ledger = ledger
        self._access_log = access_log
        self._lines = json_lines if as_json else text_lines
        self._ended: list[Exchange] = []

    def observe(self, exchange: Exchange) -> None:
        self._ended.append(exchange)
        if len(self._ended) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Count all that have ended by now."""
        self._strangers.sum_up()
        ended, self._ended = self._ended, []
        if not ended:
            return
        columns = Columns.of(ended)
        tokens = list(map(read_tokens, columns.label, columns.told))
        self._count(columns)
        self._count_ends(ended, columns)
        self._count_tokens([each for each in tokens if each is not None])
        self._charge(columns, tokens)
        if self._access_log is not None:
            epoch_s = self._wall_clock() - self._clock()
            self._access_log.write_lines(self._lines(columns, tokens, epoch_s))

    def _count(self, columns: Columns) -> None:
        metrics, started = self._metrics, columns.started_s
        for (label, status), number in Tally(zip(columns.label, columns.status, strict=True)).items():
            metrics.requests.inc((label, str(status)), number)
        metrics.bytes_sent.inc((), sum(columns.bytes_out))
        metrics.duration.observe_all(_spans(started, columns.ended_s))
        metrics.queue_wait.observe_all(_spans(columns.queued_s, columns.left_queue_s))
        metrics.first_byte.observe_all(_spans(started, columns.first_byte_s))

    def _count_ends(self, ended: Sequence[Exchange], columns: Columns) -> None:
        """Count those that ended otherwise than with a whole answer, and the pace of those that were streams."""
        if any(columns.refusal) or Outcome.CANCELLED in columns.outcome:
            for x in ended:
                self._count_end(x)
        gaps = [
            (x.ended_s - x.first_byte_s) / (x.told.events - 1)
            for x in ended
            if type(x.told) is Meter and x.told.events > 1
        ]
        self._metrics.gap.observe_all(gaps)

    def _count_end(self, x: Exchange) -> None:
        metrics = self._metrics
        if x.outcome is Outcome.CANCELLED:
            metrics.cancelled.inc((x.stage,))
        if x.refusal is INVALID_API_KEY:
            metrics.unauthorized.inc()
            self._strangers.note(x)
        elif x.refusal in (RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED):
            metrics.rate_limited.inc()
        elif x.refusal is QUEUE_FULL:
            metrics.queue_rejections.inc()

    def _count_tokens(self, told: Sequence[Tokens]) -> None:
        metrics = self._metrics
        if not told:
            return
        prompts, cacheds, completions, prompt_ms, predicted_ms = zip(*told, strict=True)
        for kind, numbers in zip(TOKEN_TYPES, (prompts, cacheds, completions), strict=True):
            metrics.tokens.inc((kind,), sum(numbers))
        metrics.cached.observe_all(cacheds)
        metrics.prompt_speed.observe_all(_speeds(map(sub, prompts, cacheds), prompt_ms))
        metrics.generation_speed.observe_all(_speeds(completions, predicted_ms))

    def _charge(self, columns: Columns, tokens: Sequence[Tokens | None]) -> None:
        uses: dict[str, list[tuple[Tokens | None, str]]] = {}
        whose = compress(columns.key_id, columns.metered)
        what = compress(zip(tokens, columns.outcome, strict=True), columns.metered)
        for key_id, of_key in groupby(zip(whose, what, strict=True), itemgetter(0)):
            uses.setdefault(key_id, []).extend(map(itemgetter(1), of_key))
        charges = {key_id: charge(own) for key_id, own in uses.items() if key_id != NO_KEY}
        self._keys.add(columns.key_id, charges)
        self._ledger.record(charges)


# --- The access line: no prompt, no query string, no key ---

_ALIKE = ["key", "status", "peer", "route", "backend_status", "outcome", "stage"]
_OWN = [
    "ts",
    "words",
    "id",
    "bytes_in",
    "bytes_out",
    "queue_ms",
    "first_byte_ms",
    "total_ms",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
]
# No part can hold a blank or a control byte: what clients send has been through the parser.
_TEXT = (
    "%b | {key} | %b | {status} | id=%b peer={peer} route={route} backend_status={backend_status} outcome={outcome}"
    " stage={stage} " + " ".join([f"{name}=%d" for name in _OWN[3:]])
)
_JSON = ["ts", "id", "key", "peer", "method", "route", "status", "backend_status", "outcome", "stage", *_OWN[3:]]


def text_lines(columns: Columns, tokens: Sequence[Tokens | None], epoch_s: float) -> Iterable[bytes]:
    """`ts | key | METHOD /path | status`, then name=value words. `epoch_s` is when the columns' clock was at 0."""
    told = _log_columns(columns, tokens, epoch_s)
    templates = map(_template, *[told[name] for name in _ALIKE])
    return map(mod, templates, zip(*[told[name] for name in _OWN], strict=True))


@lru_cache(maxsize=256)
def _template(*alike: object) -> bytes:
    """The text line of all requests that have these in common."""
    words = [escape(str(word)).replace("%", "%%") for word in alike]
    return _TEXT.format(**dict(zip(_ALIKE, words, strict=True))).encode()


def json_lines(columns: Columns, tokens: Sequence[Tokens | None], epoch_s: float) -> Iterable[bytes]:
    told = _log_columns(columns, tokens, epoch_s)
    told["ts"], told["id"] = map(bytes.decode, told["ts"]), map(bytes.decode, told["id"])
    told["method"] = [words.partition(b" ")[0].decode() for words in columns.words]
    rows = zip(*[told[name] for name in _JSON], strict=True)
    return [json.dumps(dict(zip(_JSON, row, strict=True))).encode() for row in rows]


def _log_columns(columns: Columns, tokens: Sequence[Tokens | None], epoch_s: float) -> dict[str, Iterable[Any]]:
    prompts, cacheds, completions, *_ = zip(*[each or _NO_TOKENS for each in tokens], strict=True)
    return {
        **columns._asdict(),
        "ts": timestamps(map(add, columns.ended_s, repeat(epoch_s))),
        "key": columns.key_id,
        "route": columns.label,
        "queue_ms": _milliseconds(columns.queued_s, columns.left_queue_s),
        "first_byte_ms": _milliseconds(columns.started_s, columns.first_byte_s),
        "total_ms": _milliseconds(columns.started_s, columns.ended_s),
        "prompt_tokens": prompts,
        "cached_tokens": cacheds,
        "completion_tokens": completions,
    }


def _spans(begins: Sequence[float], ends: Sequence[float]) -> list[float]:
    """The spans of those that came to their end, which as a rule are all."""
    if all(ends):
        return list(map(sub, ends, begins))
    return [end - begin for begin, end in zip(begins, ends, strict=True) if end]


def _speeds(tokens: Iterable[int], spans_ms: Sequence[float]) -> list[float]:
    """Tokens a second, of those whose time was told."""
    return [number * 1000 / ms for number, ms in zip(tokens, spans_ms, strict=True) if ms > 0]


def _milliseconds(begins: Sequence[float], ends: Sequence[float]) -> Iterable[int]:
    """The spans in whole milliseconds, 0 for those that did not come to their end."""
    if begins == ends:  # nobody had to wait
        return repeat(0, len(ends))
    if all(ends):
        return map(round, map(mul, map(sub, ends, begins), repeat(1000.0)))
    return [round((end - begin) * 1000) if end else 0 for begin, end in zip(begins, ends, strict=True)]
