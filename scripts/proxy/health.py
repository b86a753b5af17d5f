"""The gateway's state in numbers, from memory only: no call to the backend, no key, no number of keys."""

import time
from collections.abc import Callable, Mapping

from backend.readiness import DRAINING, READY, Readiness
from policy.fair_queue import FairQueue
from policy.model_names import Patterns
from policy.model_scheduler import QueueTotals
from proxy.lifecycle import Lifecycle
from transport.backend_protocol import LastActivity


class Health:
    """What GET /health reports. Times are seconds of the monotonic clock."""

    def __init__(
        self,
        *,
        readiness: Readiness,
        queue: FairQueue | QueueTotals,
        lifecycle: Lifecycle,
        last_activity: LastActivity,
        connections: Callable[[], int],
        work: Callable[[Patterns], Mapping[str, object]],
        version: str,
        clock: Callable[[], float],
    ) -> None:
        self._readiness = readiness
        self._queue = queue
        self._lifecycle = lifecycle
        self._last_activity = last_activity
        self._connections = connections
        self._work = work
        self._version = version
        self._clock = clock
        self._started_s = clock()
        self._last_byte_s = clock()

    def report(self, *, times: bool = True, patterns: Patterns = None) -> dict[str, object]:
        """Return the state and how busy it is.

        Without `times` nothing in it reports when a request came or ended, nor which models there are.
        `patterns` are those of the models that the caller's key may use.
        """
        state = self._readiness.state
        recent = {"backend_silent_s": round(self.backend_silent_s(), 1), "idle_s": round(self._queue.idle_s(), 1)}
        return {
            "state": DRAINING if self._lifecycle.draining else state,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._readiness.since_at)),
            "backend": state,
            **({"detail": self._readiness.detail} if self._readiness.detail else {}),
            "slots": self._queue.slots,
            "active": self._queue.active,
            "queued": self._queue.queued,
            "queued_slots": self._queue.queued_slots,
            "connections": self._connections(),
            **({**recent, **self._work(patterns)} if times else {}),
            "uptime_s": round(self.uptime_s(), 1),
            "version": self._version,
        }

    def uptime_s(self) -> float:
        return self._clock() - self._started_s

    def backend_silent_s(self) -> float:
        """Return the seconds since the backend last sent a byte, exact to the time between two calls."""
        if self._last_activity.seen:
            self._last_activity.seen = False
            self._last_byte_s = self._clock()
        return self._clock() - self._last_byte_s

    @property
    def is_ready(self) -> bool:
        return self._readiness.state == READY
