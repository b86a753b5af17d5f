"""Log lines about events that may be very frequent: one line at once, then one per minute with their number."""

import logging
from math import inf

_INTERVAL_S = 60.0

log = logging.getLogger("gateway")


class SummedLog:
    """Counts events and logs how many there were: at once if possible, and at most once per minute."""

    def __init__(self, message: str) -> None:
        """`message` has one %d for the number of events."""
        self._message = message
        self._count = 0
        self._logged_s = -inf

    def add(self) -> None:
        self._count += 1

    def on_tick(self, now_s: float) -> None:
        """Log what has happened, if a line is due. `now_s` are monotonic seconds."""
        if self._count and now_s - self._logged_s >= _INTERVAL_S:
            self._logged_s = now_s
            self.flush()

    def flush(self) -> None:
        """Log what has happened since the last line."""
        count, self._count = self._count, 0
        if count:
            log.warning(self._message, count)
