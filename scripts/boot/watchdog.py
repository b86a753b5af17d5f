"""The supervisor's decisions, from numbers and clocks alone: restart or give up, wedged or busy, idle or not."""

from collections import deque
from collections.abc import Callable

from boot.probes import Activity

WINDOW_S = 600.0
MAX_PAUSE_S = 30.0
BLAMED_PAUSE_S = 0.1
MAX_SLOTS_TIMEOUT_S = 30.0
MAX_STUCK_PROBE_S = 4.0
BATCH_TOKENS = 2048  # llama-server's default
SLOWEST_GPU_TOKENS_PER_S = 150.0  # of a prefill
Clock = Callable[[], float]


class RestartPolicy:
    """How long to wait before a restart, and when to give up.

    That is after more than `limit` crashes within WINDOW_S, or after more than `limit` lives in a row of one service
    that never became ready: however long each load takes, one that always fails must end. `exceeded` says which.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._crashes: deque[tuple[float, str]] = deque()
        self._failed_starts: dict[str, int] = {}
        self.exceeded = ""

    def pause_s(self, service: str, *, was_ready: bool = False, blamed: bool = False) -> float | None:
        """Count a crash; return the seconds to wait before the next start, or None to give up: see `exceeded`.

        If a request is `blamed` for it, it does not count.
        """
        if blamed:
            return BLAMED_PAUSE_S
        now_s = self._clock()
        while self._crashes and now_s - self._crashes[0][0] >= WINDOW_S:
            self._crashes.popleft()
        self._crashes.append((now_s, service))
        self._failed_starts[service] = 0 if was_ready else self._failed_starts.get(service, 0) + 1
        if len(self._crashes) > self._limit:
            self.exceeded = "within 10 minutes"
        elif self._failed_starts[service] > self._limit:
            self.exceeded = "in a row that never became ready"
        if self.exceeded:
            return None
        own = sum(name == service for _, name in self._crashes)
        return float(min(MAX_PAUSE_S, 1 << min(own - 1, 10)))


class SilenceTimer:
    """Measures how long llama-server's /health has not responded. It starts when llama-server is ready."""

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._responded_s = clock()

    def reset(self) -> None:
        """Note a response."""
        self._responded_s = self._clock()

    @property
    def expired(self) -> bool:
        return self._clock() - self._responded_s > self._timeout_s


class StallDetector:
    """Detects requests that have had no byte from the backend for `timeout_s`.

    Each look at the gateway's activity adds a line to its access log. So the caller looks only when `due`: a stall
    cannot have lasted too long before that.
    """

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._due_s = clock() + timeout_s

    @property
    def due(self) -> bool:
        return self._clock() >= self._due_s

    def suspects(self, activity: Activity | None) -> bool:
        """Return whether llama-server may be wedged. None (the gateway did not report) means no, and due again."""
        if activity is None:
            return False
        silent_s = activity.backend_silent_s if activity.active else 0.0
        self._due_s = self._clock() + max(0.0, self._timeout_s - silent_s)
        return silent_s > self._timeout_s


def slots_timeout_s(wedge_timeout_s: float, health_timeout_s: float) -> float:
    """Return how long /slots may take. During a long prefill it responds only between batches, which may be seconds."""
    return max(health_timeout_s, min(MAX_SLOTS_TIMEOUT_S, wedge_timeout_s / 4))


def stuck_timeout_s(wedge_timeout_s: float, unanswered_bytes: int) -> float:
    """Return after how long one thread that works alone is stuck, if /slots does not answer.

    On a processor a prefill keeps all threads busy, so a single one may wait for a GPU that works on one batch. Its
    size is at most a token for each byte that waits for an answer.
    """
    batch_s = min(BATCH_TOKENS, unanswered_bytes) / SLOWEST_GPU_TOKENS_PER_S
    return min(wedge_timeout_s, stuck_probe_s(wedge_timeout_s) + batch_s)


def stuck_probe_s(wedge_timeout_s: float) -> float:
    """Return how long one look at /slots takes that finds out whether the loop is stuck."""
    return min(MAX_STUCK_PROBE_S, wedge_timeout_s / 2)


class IdleTimer:
    """Expires when there has been no work for `limit_s`, counted from the start and from the last expiry. 0: never.

    As with StallDetector, the caller looks at the gateway's activity only when `due`.
    """

    def __init__(self, limit_s: float, clock: Clock) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since_s = clock()

    @property
    def due(self) -> bool:
        return bool(self._limit_s) and self._clock() - self._since_s >= self._limit_s

    def expires(self, activity: Activity | None) -> bool:
        """Return whether the limit is reached. None (the gateway did not report) means no: it may be working."""
        now_s = self._clock()
        if not self._limit_s or activity is None:
            return False
        if activity.working:
            self._since_s = now_s
        self._since_s = max(self._since_s, now_s - activity.idle_s)
        if now_s - self._since_s < self._limit_s:
            return False
        self._since_s = now_s
        return True
