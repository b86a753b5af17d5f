"""The state file as the supervisor keeps it: written in order, off the event loop, and again until it is there."""

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from core.off_loop import finishes_within, run_off_loop
from core.state_file import StateEntry, StateWriter

TICK_S = 1.0
WAIT_S = 0.3  # for a write, at the start and at the end: a volume that hangs delays both by no more
REMOVE_S = 0.8
# Errors that pass. With any other one the path is wrong.
PASSING = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN))

log = logging.getLogger(__name__)


class StatePublisher:
    """Publishes states. `on_written` gets each one once, when it is in the file or could not be written.

    Create it inside the running loop. `run` must run as a task. `tick_s` is the time between two attempts.
    """

    def __init__(self, writer: StateWriter, on_written: Callable[[StateEntry], None], tick_s: float = TICK_S) -> None:
        self._writer = writer
        self._on_written = on_written
        self._tick_s = tick_s
        self._due: deque[StateEntry] = deque()
        self._last: StateEntry | None = None
        self._published = asyncio.Event()
        self._settled = asyncio.Event()
        self._failing = False

    def publish(self, entry: StateEntry) -> None:
        """Have a state written, unless it is the last one. It never blocks."""
        if entry != self._last:
            self._last = entry
            self._due.append(entry)
            self._settled.clear()
            self._published.set()

    async def check(self, entry: StateEntry) -> None:
        """Write the first state. Raises OSError if the path is wrong; what may pass is left to `run`."""
        work = run_off_loop(lambda: self._writer.write(entry))
        if await finishes_within(work, WAIT_S):
            error = work.exception()
            if error is not None and not (isinstance(error, OSError) and error.errno in PASSING):
                raise error
        self.publish(entry)

    async def run(self) -> None:
        """Write what is published, and look at each tick whether it is there. Ends only if cancelled."""
        while True:
            self._published.clear()
            while self._due:
                entry = self._due.popleft()
                await self._write(entry)
                self._on_written(entry)
            self._settled.set()
            # Not wait_for: before Python 3.12 it may swallow a cancellation.
            news = asyncio.ensure_future(self._published.wait())
            try:
                await asyncio.wait([news], timeout=self._tick_s)
            finally:
                news.cancel()
            if self._last is not None and not self._due:
                await self._write(self._last)

    async def _write(self, entry: StateEntry) -> None:
        try:
            await run_off_loop(lambda: self._writer.write(entry))
        except OSError as error:
            if not self._failing:
                log.error("the state file %s cannot be written, which is tried again: %s", self._writer.path, error)
            self._failing = True
        else:
            if self._failing:
                log.info("the state file %s is written again", self._writer.path)
            self._failing = False

    async def settle(self) -> None:
        """Wait until all that was published is written, but no longer than WAIT_S."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._settled.wait(), WAIT_S)

    async def remove(self) -> None:
        """Remove the file for good, within REMOVE_S."""
        await finishes_within(run_off_loop(self._writer.remove), REMOVE_S)
