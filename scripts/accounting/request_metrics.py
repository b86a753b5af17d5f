"""The series that count requests."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from operator import add

from accounting.ledger import Charge
from auth import NO_KEY
from metrics import Counter, Histogram, Registry

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
TOKENS_PER_SECOND = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 5120.0, 10240.0)
CACHED_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)

LOAD_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)

TOKEN_TYPES = ("prompt", "cached", "completion")


class RequestMetrics:
    """Every series that counts requests, registered once. `cache_mode` is the setting PROMPT_CACHE.

    With `by_model` three of them have the label `model`, and there are series of the models' loads.
    """

    def __init__(self, registry: Registry, cache_mode: str, *, by_model: bool = False) -> None:
        self.cache_mode = (cache_mode,)
        self.by_model = by_model
        model = ("model",) if by_model else ()

        def counter(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
            return registry.register(Counter(f"gateway_{name}", help_text, labels))

        def histogram(name: str, help_text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return registry.register(Histogram(f"gateway_{name}", help_text, buckets, labels))

        help_text = "Requests, by route and by the status sent."
        self.requests = counter("requests_total", help_text, ("route", "code", *model))
        self.duration = histogram("request_duration_seconds", "From the head's last byte to the end.", SECONDS)
        self.queue_wait = histogram("queue_wait_seconds", "Waiting for a slot of the backend.", SECONDS)
        help_text = "From the head's last byte to the answer."
        self.first_byte = histogram("time_to_first_byte_seconds", help_text, SECONDS, model)
        self.gap = histogram(
            "inter_event_gap_seconds", "Mean time between two events, one value per stream.", GAP_SECONDS
        )
        self.tokens = counter("tokens_total", "Tokens; cached ones are part of the prompt's.", ("type", *model))
        self.prompt_speed = histogram("prompt_tokens_per_second", "Prompt processing.", TOKENS_PER_SECOND)
        self.generation_speed = histogram("generation_tokens_per_second", "Generation.", TOKENS_PER_SECOND)
        help_text = "Prompt tokens found in the cache, per request."
        self.cached = registry.register(Histogram("gateway_cached_prompt_tokens", help_text, CACHED_TOKENS, ("mode",)))
        self.cached.observe_all((), self.cache_mode)  # there from the start, like the others
        self.queue_rejections = counter("queue_rejections_total", "Requests that found the queue full.")
        self.cancelled = counter("cancelled_total", "Requests whose client left, by stage.", ("phase",))
        self.bytes_sent = counter("bytes_sent_total", "Bytes written to clients in answers.")
        self.unauthorized = counter("unauthorized_total", "Requests refused for their credential.")
        self.rate_limited = counter("rate_limited_total", "Requests refused for their key's rate or quota.")
        if by_model:
            self.model_loads = counter("model_loads_total", "Loads of models, by result.", ("model", "result"))
            help_text = "From the order to load a model until it is loaded, or has failed."
            self.model_load = histogram("model_load_seconds", help_text, LOAD_SECONDS)

    def count_load(self, model: str, result: str, seconds: float) -> None:
        """Count a load of a model that has ended: "ok" or "failed"."""
        self.model_loads.inc((model, result))
        self.model_load.observe(seconds)


class KeyCounts:
    """What each key has used since the gateway started. For operators only: key ids are not public."""

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
        """Count requests that have ended, one for each id, and their charges."""
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
