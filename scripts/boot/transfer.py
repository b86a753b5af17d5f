"""How long a download is tried again, how slow it may be, and what is logged of its progress. It does no I/O."""

import logging
from collections.abc import Callable
from typing import NamedTuple

PROGRESS_INTERVAL_S = 10.0
RATE_WINDOW_S = 30.0  # over which the lowest rate is measured
MAX_PAUSE_S = 30.0

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The transfer stopped for a reason that may not recur. The server asks for a pause of `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooSlow(Interrupted):
    """Less than the lowest rate has arrived. What has arrived counts as no progress, or a trickle would never end."""


class FetchLimits(NamedTuple):
    """How long to try again without progress, the lowest rate in bytes per second (0: none), and the hub's token."""

    timeout_s: float
    min_rate: int
    hub_token: str | None = None


class RetrySchedule:
    """The pauses between attempts: 1, 2, 4 … 30 s, until there has been no progress for `timeout_s`."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Note progress."""
        self._next_s = 1.0
        self._deadline_s = self._clock() + self._timeout_s

    def pause_s(self, retry_after_s: float) -> float | None:
        """Return the next pause; None if the time is up, or will be before the server wants to be asked again."""
        left_s = self._deadline_s - self._clock()
        if left_s <= 0 or retry_after_s > left_s:
            return None
        pause_s = max(min(self._next_s, left_s), retry_after_s)
        self._next_s = min(2 * self._next_s, MAX_PAUSE_S)
        return pause_s


class Transfer:
    """Logs the progress of a body every PROGRESS_INTERVAL_S, and ends one that is slower than `min_rate`."""

    def __init__(self, have_bytes: int, total_bytes: int | None, min_rate: int, clock: Callable[[], float]) -> None:
        self.have_bytes = have_bytes
        self._total_bytes = total_bytes
        self._min_rate = min_rate
        self._clock = clock
        self._reported = self._checked = (clock(), have_bytes)

    def add(self, count: int) -> None:
        """Count bytes that have arrived. Raises TooSlow."""
        self.have_bytes += count
        now_s = self._clock()
        since_s, since_bytes = self._reported
        if now_s - since_s >= PROGRESS_INTERVAL_S:
            rate = (self.have_bytes - since_bytes) / (now_s - since_s)
            log.info("%s", progress(self.have_bytes, self._total_bytes, rate))
            self._reported = (now_s, self.have_bytes)
        since_s, since_bytes = self._checked
        if now_s - since_s >= RATE_WINDOW_S:
            rate = (self.have_bytes - since_bytes) / (now_s - since_s)
            if rate < self._min_rate:
                limit = f"{format_size(self._min_rate)}/s (MODEL_FETCH_MIN_RATE)"
                raise TooSlow(f"only {format_size(rate)}/s arrive, less than {limit}")
            self._checked = (now_s, self.have_bytes)


def format_size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3f} GB" if size_bytes < 100 else f"{size_bytes:.0f} GB"


def progress(have_bytes: int, total_bytes: int | None, bytes_per_s: float) -> str:
    """Return the line that reports a download's progress."""
    speed = f"{format_size(bytes_per_s)}/s"
    if total_bytes is None:
        return f"downloaded {format_size(have_bytes)}, {speed}"
    percent = 100 * have_bytes // max(total_bytes, 1)
    remaining = f", {(total_bytes - have_bytes) / bytes_per_s:.0f} s left" if bytes_per_s else ""
    return f"downloaded {format_size(have_bytes)} of {format_size(total_bytes)} ({percent} %), {speed}{remaining}"
