"""The last good responses of the routes that list models, kept in memory for as long as the model loads again.

Clients ask for the list before they show anything, and some wait only seconds. It is the same for every key.
"""

from collections.abc import Callable
from dataclasses import dataclass

from policy.prepared_request import PreparedRequest
from proxy.response_info import ResponseInfo

MAX_BYTES = 1 << 20  # of one response; a router's list of a thousand models is smaller


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response of the backend with status 200. `age_s` is the time since it came, in seconds."""

    content_type: bytes
    payload: bytes
    age_s: float


class PayloadCollector:
    """Collects a payload that comes in pieces; `payload` is None once it is too long to be kept."""

    __slots__ = ("payload",)

    def __init__(self) -> None:
        self.payload: bytes | None = b""

    def feed(self, payload: bytes) -> None:
        if self.payload is not None:
            whole = self.payload + payload
            self.payload = whole if len(whole) <= MAX_BYTES else None


class LastResponses:
    """One response at most for each route that has `kept`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._kept: dict[str, tuple[bytes, bytes, float]] = {}

    def keep(self, prepared: PreparedRequest, info: ResponseInfo, payload: bytes | None) -> None:
        """Keep a response that was read to its end, if it is a plain success for the route as such, without a query."""
        usual = prepared.method == b"GET" and b"?" not in prepared.target
        if usual and info.has_usage and payload is not None and len(payload) <= MAX_BYTES:
            content_type = info.head.known.get(b"content-type", (b"",))[0]
            self._kept[prepared.route.label] = content_type, payload, self._clock()

    def find(self, prepared: PreparedRequest) -> KeptResponse | None:
        """Return the last response for the request's route, if there is one."""
        found = self._kept.get(prepared.route.label)
        if found is None:
            return None
        content_type, payload, kept_s = found
        return KeptResponse(content_type, payload, self._clock() - kept_s)
