"""The supervisor's judgements, over numbers and clocks alone: restart or give up, wedged or busy, idle or not."""

from collections import deque
from collections.abc import Callable

from probes import Activity

WINDOW_S = 600.0
LONGEST_PAUSE_S = 30.0
SLOTS_PATIENCE_S = 30.0
Clock = Callable[[], float]


class Restarts:
    """How many crashes of the last ten minutes are too many, and how long to wait after one that is not."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._crashes: deque[tuple[float, str]] = deque()

    def pause_s(self, service: str) -> float | None:
        """Count a crash; return the seconds to wait before the next start, or None to give up."""
        now_s = self._clock()
        while self._crashes and now_s - self._crashes[0][0] >= WINDOW_S:
            self._crashes.popleft()
        self._crashes.append((now_s, service))
        if len(self._crashes) > self._limit:
            return None
        mine = sum(name == service for _, name in self._crashes)
        return float(min(LONGEST_PAUSE_S, 1 << min(mine - 1, 10)))


class Silence:
    """How long llama-server's /health has not answered, from the moment that it was first ready."""

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._heard_s = clock()

    def heard(self) -> None:
        self._heard_s = self._clock()

    def wedged(self) -> bool:
        return self._clock() - self._heard_s > self._timeout_s


class Stall:
    """When requests at the backend have had no byte for so long that /slots is worth asking.

    Asking the gateway costs it a line of its access log, so nobody has to before `possible`: a silence under load can
    have lasted too long only once that time has passed since the last answer.
    """

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._earliest_s = clock() + timeout_s

    def possible(self) -> bool:
        return self._clock() >= self._earliest_s

    def suspected(self, activity: Activity | None) -> bool:
        """Judge the gateway's answer; one that does not tell is asked again."""
        if activity is None:
            return False
        silent_s = activity.backend_silent_s if activity.active else 0.0
        self._earliest_s = self._clock() + max(0.0, self._timeout_s - silent_s)
        return silent_s > self._timeout_s


def slots_patience_s(wedge_timeout_s: float, health_timeout_s: float) -> float:
    """How long /slots may take: during a long prefill it answers between two batches only, which may be seconds."""
    return max(health_timeout_s, min(SLOTS_PATIENCE_S, wedge_timeout_s / 4))


class Idle:
    """When there has been no work for `limit_s` since ready, or since the last time that it was due."""

    def __init__(self, limit_s: float, clock: Clock) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since_s = clock()

    def possible(self) -> bool:
        """Whether it may be due; before that the gateway need not be asked, which it would log."""
        return bool(self._limit_s) and self._clock() - self._since_s >= self._limit_s

    def due(self, activity: Activity | None) -> bool:
        """A gateway that does not tell is not idle: it may be at work."""
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
