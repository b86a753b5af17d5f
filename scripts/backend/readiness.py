"""Whether the backend can serve: from the supervisor's state file if there is one, else from one background probe.

A request never causes a call to the backend here. A request that needs the model waits on `when_ready`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from backend.slots import UnfitBackend
from core.errors import GatewayError
from core.off_loop import THREAD_NAME, run_off_loop
from core.state_file import DEAD, DRAINING, LOADING, READY, StateReader

__all__ = ["DEAD", "DRAINING", "LOADING", "READY", "Probe", "Readiness", "Source", "StateFile"]

_LOOK_S = 0.25
_STAT_S = 0.1
_PROBE_UNTIL_READY_S = 1.0
_PROBE_WHEN_READY_S = 5.0

log = logging.getLogger("gateway")


class Source(Protocol):
    """Where the state comes from: `look` returns it, `pause_s` returns the seconds until the next look.

    `has_changed` returns at once whether the state may be another one than at the last look.
    """

    async def look(self) -> str: ...

    def has_changed(self) -> bool: ...

    def pause_s(self, state: str) -> float: ...


class StateFile:
    """The state that the supervisor writes. An unreadable or missing file changes nothing."""

    def __init__(self, path: Path) -> None:
        self._reader = StateReader(path)
        self._stat: threading.Thread | None = None
        self._changed = False

    def listener(self) -> int | None:
        """Return the identity of llama-server's listener as of the last look; None: do not connect."""
        return self._reader.listener

    def model_failures(self) -> Mapping[str, str]:
        """Return why models of a router are not there, as of the last look."""
        return self._reader.model_failures

    async def look(self) -> str:
        return await run_off_loop(self._reader.read)

    def has_changed(self) -> bool:
        """Return whether the file differs from the one last read. If its volume hangs, no, after _STAT_S at most."""
        if self._stat is not None and self._stat.is_alive():
            return False
        self._changed = False
        self._stat = threading.Thread(target=self._compare, name=THREAD_NAME, daemon=True)
        self._stat.start()
        self._stat.join(_STAT_S)
        return self._changed

    def _compare(self) -> None:
        self._changed = self._reader.has_changed()

    def pause_s(self, state: str) -> float:
        return _LOOK_S


class Probe:
    """The backend's own /health, requested once a second until it is ready and every 5 s after that.

    `ask` returns a status, or raises GatewayError if there was no response. Without a response the state is LOADING,
    since a process that downloads its model has not bound its port, and DEAD once `dead_after_s` have passed since the
    last response.
    """

    def __init__(self, ask: Callable[[], Awaitable[int]], dead_after_s: float, clock: Callable[[], float]) -> None:
        self._ask = ask
        self._dead_after_s = dead_after_s
        self._clock = clock
        self._responded_s = clock()

    async def look(self) -> str:
        try:
            status = await self._ask()
        except GatewayError:
            return LOADING if self._clock() - self._responded_s <= self._dead_after_s else DEAD
        self._responded_s = self._clock()
        return READY if status == 200 else LOADING

    def has_changed(self) -> bool:
        return False  # only the backend knows

    def pause_s(self, state: str) -> float:
        return _PROBE_WHEN_READY_S if state == READY else _PROBE_UNTIL_READY_S


class Readiness:
    """The backend's state as last seen, the futures that wait for READY, and the loop that looks.

    `prepare` runs each time before the state becomes READY; if it raises UnfitBackend, the state is DEAD and `detail`
    says why. `on_change` is called with each new state. `since_at` is when the state last changed, in seconds since the
    epoch.
    """

    def __init__(
        self, source: Source, prepare: Callable[[], Awaitable[None]], on_change: Callable[[str], None]
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._on_change = on_change
        self._waiters: set[asyncio.Future[None]] = set()
        self._doubted = asyncio.Event()
        self._looking = asyncio.Lock()
        self.state = LOADING
        self.detail = ""
        self.since_at = time.time()

    @property
    def waiting(self) -> int:
        """How many wait for the backend to be ready."""
        return len(self._waiters)

    @property
    def ready(self) -> bool:
        return self.state == READY

    def when_ready(self) -> "asyncio.Future[None]":
        """Return a new future that is done once the backend is ready. The caller may cancel it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.ready:
            future.set_result(None)
        else:
            self._waiters.add(future)
            future.add_done_callback(self._waiters.discard)
        return future

    def doubt(self) -> None:
        """Note a refused connection: READY becomes LOADING until the next look, which this brings forward."""
        if self.ready:
            self._set(LOADING)
        self._doubted.set()

    def has_news(self) -> bool:
        """Whether the backend may be ready by now: others may know it already, and `catch_up` finds out."""
        return self._looking.locked() or self._source.has_changed()  # a look that has not ended may have read it

    async def catch_up(self) -> None:
        """Look at the source if it has changed since the last look."""
        async with self._looking:
            if self._source.has_changed():
                await self._look()

    async def watch(self) -> None:
        """Look at the source until cancelled."""
        while True:
            self._doubted.clear()
            async with self._looking:
                await self._look()
            await self._pause(self._source.pause_s(self.state))

    async def _look(self) -> None:
        state, detail = await self._source.look(), ""
        if state == READY and not self.ready:
            try:
                await self._prepare()
            except UnfitBackend as error:
                state, detail = DEAD, str(error)
                if detail != self.detail:
                    log.error("nothing is served: %s", detail)
            except GatewayError:
                state = LOADING  # it does not respond now
        self.detail = detail
        self._set(state)

    async def _pause(self, seconds: float) -> None:
        """Wait for the next look. A doubt brings it forward, but by no more than one look per _LOOK_S."""
        try:
            await asyncio.wait_for(self._doubted.wait(), seconds)
        except asyncio.TimeoutError:
            return
        await asyncio.sleep(_LOOK_S)

    def _set(self, state: str) -> None:
        if state == self.state:
            return
        log.info("the backend is %s (was %s)", state, self.state)
        self.state = state
        self.since_at = time.time()
        self._on_change(state)
        if state == READY:
            for future in tuple(self._waiters):
                if not future.done():
                    future.set_result(None)
