"""Whether the backend can serve: from the supervisor's state file where there is one, else from one background probe.

Never a backend call a request. Whoever has to wait for the model waits on `when_ready`.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from errors import GatewayError

LOADING, READY, DRAINING, DEAD = "loading", "ready", "draining", "dead"
STATES = frozenset((LOADING, READY, DRAINING, DEAD))

_LOOK_S = 0.25
_PROBE_UNTIL_READY_S = 1.0
_PROBE_WHEN_READY_S = 5.0

log = logging.getLogger("gateway")


class Source(Protocol):
    """Where the state comes from: what it is now, and how long until it is worth another look."""

    async def look(self) -> str: ...

    def pause_s(self, state: str) -> float: ...


class StateFile:
    """The supervisor's word: one JSON object, replaced atomically. An unreadable file changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._state = LOADING

    async def look(self) -> str:
        try:
            stat = self._path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if stamp != self._stamp:
                state = json.loads(self._path.read_text())["state"]
                self._stamp = stamp
                self._state = state if state in STATES else self._state
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._state

    def pause_s(self, state: str) -> float:
        return _LOOK_S


class Probe:
    """The backend's own /health, asked once a second until it is ready and every 5 s after.

    `ask` returns a status, or raises GatewayError where there was no answer. No answer is "loading" until `patience_s`
    have passed since the last good one: a process that downloads its model has not bound its port yet.
    """

    def __init__(self, ask: Callable[[], Awaitable[int]], patience_s: float, clock: Callable[[], float]) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._clock = clock
        self._good_s = clock()

    async def look(self) -> str:
        try:
            status = await self._ask()
        except GatewayError:
            return LOADING if self._clock() - self._good_s <= self._patience_s else DEAD
        self._good_s = self._clock()
        return READY if status == 200 else LOADING

    def pause_s(self, state: str) -> float:
        return _PROBE_WHEN_READY_S if state == READY else _PROBE_UNTIL_READY_S


class Readiness:
    """The state as last seen, those who wait for it to be ready, and the loop that keeps looking.

    `prepare` runs each time before the backend is called ready; `on_change` is told of every new state.
    """

    def __init__(
        self, source: Source, prepare: Callable[[], Awaitable[None]], on_change: Callable[[str], None]
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._on_change = on_change
        self._waiters: set[asyncio.Future[None]] = set()
        self._doubted = asyncio.Event()
        self.state = LOADING
        self.since_at = time.time()

    @property
    def ready(self) -> bool:
        return self.state == READY

    def when_ready(self) -> "asyncio.Future[None]":
        """A future of the caller's own that is done once the backend is ready."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.ready:
            future.set_result(None)
        else:
            self._waiters.add(future)
            future.add_done_callback(self._waiters.discard)
        return future

    def doubt(self) -> None:
        """A connection was refused: nobody is sent there until a fresh look has said that it is ready."""
        if self.ready:
            self._set(LOADING)
        self._doubted.set()

    async def watch(self) -> None:
        """Look for ever."""
        while True:
            self._doubted.clear()
            state = await self._source.look()
            if state == READY and not self.ready:
                await self._prepare()
            self._set(state)
            await self._pause(self._source.pause_s(state))

    async def _pause(self, seconds: float) -> None:
        """Wait for the time of the next look; a doubt brings it forward, though not into a busy loop."""
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
