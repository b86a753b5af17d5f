"""Finds out whether the loop of a llama-server process is stuck: one thread works alone, and /slots does not answer.

/slots is answered by the loop, between two batches and two tokens.
"""

from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from boot.llama_server import may_use_gpu, works_in_one_thread
from boot.probes import Activity
from boot.thread_times import one_runs, thread_ticks
from boot.watchdog import stuck_probe_s, stuck_timeout_s
from config.settings import Config

GetActivity = Callable[[], Awaitable[Activity | None]]
AskSlots = Callable[[float], Awaitable[bool]]


class StuckLoop:
    """Looks at one process again and again. `slots_respond` gets the longest time that /slots may take.

    `alive` is asked between two questions; `activity` returns the gateway's load.
    """

    def __init__(
        self, config: Config, pid: int, alive: Callable[[], bool], slots_respond: AskSlots, activity: GetActivity
    ) -> None:
        self._config = config
        self._pid = pid
        self._alive = alive
        self._slots_respond = slots_respond
        self._activity = activity
        self._wedge_s = config.supervision.wedge_timeout_s
        self._ticks = self._thread_ticks()

    def is_suspect(self) -> bool:
        """Return whether one thread has worked alone since the last look."""
        before, self._ticks = self._ticks, self._thread_ticks()
        return one_runs(before, self._ticks)

    async def find(self) -> str:
        """Return why the loop is stuck, as a clause; "" if it is not."""
        since_s, probe_s = monotonic(), stuck_probe_s(self._wedge_s)
        while self._alive():
            before = self._thread_ticks()
            if await self._slots_respond(probe_s):
                return ""
            if not one_runs(before, self._thread_ticks()):
                return ""
            activity = await self._activity()
            if activity is None or not activity.active:
                return ""
            stuck_s = monotonic() - since_s
            waiting_bytes = activity.unanswered_bytes if may_use_gpu(self._config.model) else 0
            if stuck_s >= stuck_timeout_s(self._wedge_s, waiting_bytes):
                return f"one thread has worked alone for {stuck_s:.0f} s and /slots does not answer"
        return ""

    def _thread_ticks(self) -> Mapping[int, int]:
        """Return nothing if a single thread does all work anyway, so that it says nothing."""
        return {} if works_in_one_thread(self._config.model) else thread_ticks(self._pid)
