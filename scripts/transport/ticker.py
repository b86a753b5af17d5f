"""One coarse timer for all connections: one timer per wait would cost more than the bytes that it guards."""

import asyncio
import logging
import time
from collections.abc import Callable

log = logging.getLogger("gateway")


class Ticker:
    """Calls its listeners every TICK_S seconds. Deadlines are met to within one tick.

    `now_s` is the clock's time at the last tick, in monotonic seconds.
    """

    TICK_S = 0.25

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listeners: list[Callable[[float], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.now_s = clock()

    def add_listener(self, on_tick: Callable[[float], None]) -> None:
        """Call `on_tick` with the time at each tick, after the listeners that were added before."""
        self._listeners.append(on_tick)

    def tick(self) -> None:
        """Call the listeners. Never raises: a fault of one must not stop the clock and the others."""
        now_s = self.now_s = self._clock()
        for on_tick in self._listeners:
            try:
                on_tick(now_s)
            except Exception:  # noqa: PERF203
                log.exception("a tick failed")

    def start(self) -> None:
        """Tick from now on, until `stop`."""
        self._timer = asyncio.get_running_loop().call_later(self.TICK_S, self.start)
        self.tick()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
