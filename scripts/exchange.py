"""The record of one request, and the one place that observes it.

An Exchange is filled as the request moves; `Observer.observe` runs once at its end and is the only code that counts
requests or writes an access line, so that the two always agree and refusals are in both.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from errors import INVALID_API_KEY, QUEUE_FULL, RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED, Kind
from http1 import RequestHead
from logs import AccessLog, timestamp
from metrics import Counter, Histogram, Registry
from routes import UNROUTED, Route
from usage import Ledger, Meter, Tokens

log = logging.getLogger("gateway")

_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._~+/=:@-]{0,127}")
# Answered to nobody: what logs and counters say of a client that left before it was answered, as nginx has it.
CLIENT_CLOSED_REQUEST = 499

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
TOKENS_PER_SECOND = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 5120.0, 10240.0)
CACHED_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)

NO_KEY = "-"
TOKEN_TYPES = ("prompt", "cached", "completion")
_BATCH = 64
NO_TOKENS = Tokens(0, 0, 0, 0.0, 0.0)


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


class RequestIds:
    """Ids for requests that bring none worth keeping: unique across processes, cheap to make."""

    def __init__(self) -> None:
        self._prefix = "req-" + os.urandom(6).hex() + "-"
        self._count = count(1)

    def make(self) -> str:
        return self._prefix + str(next(self._count))

    def of(self, head: RequestHead) -> str:
        """The id that the client gave, if it is a sane one, else a new one."""
        given = head.known.get(b"x-request-id", ())
        if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
            return given[0].decode("ascii")
        return self.make()


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are monotonic seconds, 0 = not reached; `ended_at` is epoch time."""

    id: str
    peer: str
    started_s: float
    head: RequestHead | None = None
    route: Route = UNROUTED
    key_id: str = NO_KEY
    stage: str = Stage.READING_HEAD
    outcome: str = Outcome.DONE
    status: int = 0
    backend_status: int = 0
    refusal: Kind | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    queued_s: float = 0.0
    admitted_s: float = 0.0
    first_byte_s: float = 0.0
    ended_s: float = 0.0
    ended_at: float = 0.0
    meter: Meter | None = None
    tokens: Tokens | None = None


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
        self._counts: dict[str, list[int]] = {}
        registry.register(Counter("gateway_key_requests_total", "Requests, by key.", ("key",), read=self._requests))
        registry.register(Counter("gateway_key_tokens_total", "Tokens, by key.", ("key", "type"), read=self._tokens))

    def add(self, key_id: str, tokens: Tokens | None) -> None:
        counts = self._counts.get(key_id)
        if counts is None:
            counts = self._counts[key_id] = [0, 0, 0, 0]
        counts[0] += 1
        if tokens is not None:
            counts[1] += tokens.prompt
            counts[2] += tokens.cached
            counts[3] += tokens.completion

    def _requests(self) -> dict[tuple[str, ...], float]:
        return {(key_id,): counts[0] for key_id, counts in self._counts.items()}

    def _tokens(self) -> dict[tuple[str, ...], float]:
        return {
            (key_id, kind): count
            for key_id, counts in self._counts.items()
            for kind, count in zip(TOKEN_TYPES, counts[1:], strict=True)
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
            log.warning("no valid key: %s for %s (request %s)", exchange.peer, exchange.route.label, exchange.id)

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
    accounts, and a batch costs half of what the same requests cost one by one.
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
    ) -> None:
        self._metrics = metrics
        self._keys = keys
        self._strangers = Strangers(clock)
        self._ledger = ledger
        self._access_log = access_log
        self._line = json_line if as_json else text_line
        self._ended: list[Exchange] = []

    def observe(self, exchange: Exchange) -> None:
        self._ended.append(exchange)
        if len(self._ended) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Count all that have ended by now."""
        self._strangers.sum_up()
        ended, self._ended = self._ended, []
        for exchange in ended:
            self._count(exchange)
            if exchange.meter is not None:
                self._count_tokens(exchange, exchange.meter)
            if exchange.key_id != NO_KEY:
                self._keys.add(exchange.key_id, exchange.tokens)
                if exchange.route.kind.metered:
                    self._ledger.record(exchange.key_id, exchange.tokens, exchange.outcome)
            if self._access_log is not None:
                self._access_log.write(self._line(exchange))

    def _count(self, exchange: Exchange) -> None:
        metrics = self._metrics
        metrics.requests.inc((exchange.route.label, str(exchange.status)))
        metrics.duration.observe(exchange.ended_s - exchange.started_s)
        metrics.bytes_sent.inc((), exchange.bytes_out)
        if exchange.first_byte_s:
            metrics.first_byte.observe(exchange.first_byte_s - exchange.started_s)
        if exchange.admitted_s:
            metrics.queue_wait.observe(exchange.admitted_s - exchange.queued_s)
        if exchange.outcome is Outcome.CANCELLED:
            metrics.cancelled.inc((exchange.stage,))
        if exchange.refusal is not None:
            self._count_refusal(exchange, exchange.refusal)

    def _count_refusal(self, exchange: Exchange, kind: Kind) -> None:
        if kind is INVALID_API_KEY:
            self._metrics.unauthorized.inc()
            self._strangers.note(exchange)
        elif kind in (RATE_LIMIT_EXCEEDED, TOKEN_QUOTA_EXCEEDED):
            self._metrics.rate_limited.inc()
        elif kind is QUEUE_FULL:
            self._metrics.queue_rejections.inc()

    def _count_tokens(self, exchange: Exchange, meter: Meter) -> None:
        metrics = self._metrics
        if meter.events > 1:
            metrics.gap.observe((exchange.ended_s - exchange.first_byte_s) / (meter.events - 1))
        tokens = exchange.tokens = meter.finish()
        if tokens is None:
            return
        metrics.tokens.inc(("prompt",), tokens.prompt)
        metrics.tokens.inc(("cached",), tokens.cached)
        metrics.tokens.inc(("completion",), tokens.completion)
        metrics.cached.observe(tokens.cached)
        if tokens.prompt_ms > 0:
            metrics.prompt_speed.observe((tokens.prompt - tokens.cached) * 1000 / tokens.prompt_ms)
        if tokens.predicted_ms > 0:
            metrics.generation_speed.observe(tokens.completion * 1000 / tokens.predicted_ms)


# --- The access line: no prompt, no query string, no key ---


def text_line(x: Exchange) -> str:
    """`ts | key | METHOD /path | status`, then name=value words. No part can hold a blank or a control byte."""
    tokens = x.tokens or NO_TOKENS
    method, path = (x.head.method, x.head.target.partition(b"?")[0]) if x.head else (b"-", b"-")
    queue_s, first_byte_s, total_s = spans(x)
    return (
        f"{timestamp(x.ended_at)} | {x.key_id} | {method.decode('ascii')} {path.decode('ascii')} | {x.status}"
        f" | id={x.id} peer={x.peer} route={x.route.label} backend_status={x.backend_status} outcome={x.outcome}"
        f" stage={x.stage} bytes_in={x.bytes_in} bytes_out={x.bytes_out} queue_ms={queue_s * 1000:.0f}"
        f" first_byte_ms={first_byte_s * 1000:.0f} total_ms={total_s * 1000:.0f} prompt_tokens={tokens.prompt}"
        f" cached_tokens={tokens.cached} completion_tokens={tokens.completion}"
    )


def json_line(x: Exchange) -> str:
    tokens = x.tokens or NO_TOKENS
    queue_s, first_byte_s, total_s = spans(x)
    return json.dumps(
        {
            "ts": timestamp(x.ended_at),
            "id": x.id,
            "key": x.key_id,
            "peer": x.peer,
            "method": x.head.method.decode("ascii") if x.head else "-",
            "route": x.route.label,
            "status": x.status,
            "backend_status": x.backend_status,
            "outcome": x.outcome,
            "stage": x.stage,
            "bytes_in": x.bytes_in,
            "bytes_out": x.bytes_out,
            "queue_ms": round(queue_s * 1000),
            "first_byte_ms": round(first_byte_s * 1000),
            "total_ms": round(total_s * 1000),
            "prompt_tokens": tokens.prompt,
            "cached_tokens": tokens.cached,
            "completion_tokens": tokens.completion,
        }
    )


def spans(x: Exchange) -> tuple[float, float, float]:
    """Seconds in the queue, to the backend's answer, and in all; 0 for what was not reached."""
    queue_s = x.admitted_s - x.queued_s if x.admitted_s else 0.0
    first_byte_s = x.first_byte_s - x.started_s if x.first_byte_s else 0.0
    return queue_s, first_byte_s, x.ended_s - x.started_s
