"""What a conversation waits for, and how long: promises that resume it at once, and one coarse clock for all.

Neither knows bytes. A promise stands where asyncio would have a future and a turn of its loop; the clock stands where
it would have a timer a wait.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from errors import PeerGone

T = TypeVar("T")


class Timed(Protocol):
    """Something with a moment at which it wants to act, in monotonic seconds; inf = none.

    One that is `watched` wants to look after something at each tick.
    """

    deadline_s: float
    watched: bool

    def watch(self, now_s: float) -> None: ...

    def expire(self, now_s: float) -> None: ...


class Deadlines:
    """One coarse clock for all wires: a timer a wait would cost more than the bytes that it guards.

    Deadlines are met to within one tick. `now_s` is monotonic, as of the last tick.
    """

    TICK_S = 0.25

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, each_tick: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._each_tick = each_tick
        self._wires: set[Timed] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.now_s = clock()

    def add(self, wire: Timed) -> None:
        self._wires.add(wire)

    def discard(self, wire: Timed) -> None:
        self._wires.discard(wire)

    def __iter__(self) -> Iterator[Timed]:
        return iter(tuple(self._wires))

    def tick(self) -> None:
        """Let every wire that is due act."""
        now_s = self.now_s = self._clock()
        for wire in self:
            if wire.watched:
                wire.watch(now_s)
            if wire.deadline_s <= now_s:
                wire.expire(now_s)
        if self._each_tick is not None:
            self._each_tick()

    def start(self) -> None:
        """Tick from now on, until `stop`."""
        self._timer = asyncio.get_running_loop().call_later(self.TICK_S, self.start)  # whatever becomes of this one
        self.tick()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Promise(Generic[T]):
    """One result that one conversation waits for. Keeping or breaking it calls `wake`, and so resumes the conversation
    there and then.

    Whatever comes after the first result is ignored: the one who promised may not know that nobody waits any more.
    """

    __slots__ = ("_error", "_value", "done", "wake")

    def __init__(self) -> None:
        self.done = False
        self.wake: Callable[[], None] | None = None
        self._error: BaseException | None = None

    def keep(self, value: T) -> None:
        if not self.done:
            self.done = True
            self._value = value
            if self.wake is not None:
                self.wake()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self.done = True
            self._error = error
            if self.wake is not None:
                self.wake()

    def result(self) -> T:
        """What has become of it; to be asked once."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: kept here or in the promise, it would be a cycle
        return self._value

    async def in_task(self) -> T:
        """Wait for the promise in a task of asyncio's, which no client's conversation is."""
        if not self.done:
            turn = asyncio.Event()
            self.wake = turn.set
            await turn.wait()
        return self.result()

    def settle(self, future: "asyncio.Future[T]") -> None:
        """Take over what has become of a future of asyncio's (a callback for `add_done_callback`)."""
        if future.cancelled():
            self.fail(PeerGone())
            return
        error = future.exception()
        if error is not None:
            self.fail(error)
        else:
            self.keep(future.result())


async def end_tasks(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Cancel tasks until they have ended.

    Before Python 3.12 `wait_for` may lose a cancellation that comes together with what it waits for.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)
