"""The turns of the event loop: what a turn has to send is sent at its end, in one go.

A peer on this machine that sleeps is woken by what it is sent. Writes that came one by one would wake it for each,
which costs more than a write does; at the end of a turn they find it awake after the first. That end is the moment in
which the loop asks its selector what is next, so the selector is ours: a callback would need a turn of its own.
"""

import asyncio
import logging
import select
import selectors
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any, TypeVar

from waiting import end_tasks

log = logging.getLogger("gateway")

T = TypeVar("T")


class Outbox:
    """What the present turn of the loop has to send; `put` takes a transport and the bytes for it."""

    __slots__ = ("_waiting", "put")
    put: Callable[[tuple[asyncio.Transport, bytes]], None]

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []
        self.put = self._put

    def _put(self, letter: tuple[asyncio.Transport, bytes]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append(letter)

    def leave_to_loop(self) -> None:
        """From now on the loop calls `flush` at the end of each turn by itself."""
        self.put = self._waiting.append

    def flush(self) -> None:
        """Send it. Never raises: whatever is wrong with one connection, the loop and the others go on."""
        while self._waiting:
            letters = self._waiting[:]
            self._waiting.clear()  # it stays the same list, since `put` may be its own
            for transport, data in letters:
                try:
                    transport.write(data)
                except Exception:  # noqa: PERF203
                    log.exception("a write failed")


class TurnSelector(selectors.BaseSelector):
    """epoll for asyncio's loop, emptying an outbox at the end of each turn.

    It does what selectors.EpollSelector does with half of the steps, which at one event a turn is what an event costs
    the loop.
    """

    def __init__(self, outbox: Outbox) -> None:
        outbox.leave_to_loop()
        self.has_scheduled = False  # the loop something, while it sent
        self._flush = outbox.flush
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        key = SelectorKey(fileobj, _descriptor(fileobj), events, data)
        if key.fd in self._keys:
            raise KeyError(f"descriptor {key.fd} is registered already")
        self._epoll.register(key.fd, _mask(events))
        self._keys[key.fd] = key
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        key = self._keys.pop(_descriptor(fileobj))
        with suppress(OSError):  # it may have been closed already
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        key = self._keys[_descriptor(fileobj)]
        if events != key.events:
            self._epoll.modify(key.fd, _mask(events))
        key = self._keys[key.fd] = SelectorKey(key.fileobj, key.fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        self.has_scheduled = False
        self._flush()
        if self.has_scheduled or (timeout is not None and timeout < 0):
            timeout = 0
        ready: list[tuple[SelectorKey, int]] = []
        keys = self._keys
        for fd, mask in self._epoll.poll(timeout):
            key = keys.get(fd)
            if key is None:
                continue
            if mask == select.EPOLLIN:
                ready.append((key, EVENT_READ))
            else:  # an error, or the peer's end, is for whoever reads and for whoever writes
                events = (mask & ~select.EPOLLIN and EVENT_WRITE) | (mask & ~select.EPOLLOUT and EVENT_READ)
                ready.append((key, events & key.events))
        return ready

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()

    def get_key(self, fileobj: Any) -> SelectorKey:
        return self._keys[_descriptor(fileobj)]

    def get_map(self) -> Mapping[Any, SelectorKey]:
        """The keys by descriptor."""
        return self._keys


def _descriptor(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    if not events or events & ~(EVENT_READ | EVENT_WRITE):
        raise ValueError(f"no such events: {events!r}")
    return (events & EVENT_READ and select.EPOLLIN) | (events & EVENT_WRITE and select.EPOLLOUT)


class TurnLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on that selector.

    When it sends, it has made up its mind how long to sleep: what is scheduled meanwhile, as by a connection that
    breaks, must not be slept over.
    """

    def __init__(self, selector: TurnSelector) -> None:
        self._turns = selector
        super().__init__(selector)

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        self._turns.has_scheduled = True
        return super().call_soon(callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        self._turns.has_scheduled = True
        return super().call_at(when, callback, *args, context=context)


def new_loop(outbox: Outbox) -> asyncio.AbstractEventLoop:
    """A loop that empties `outbox` at the end of each of its turns, where the platform has epoll; else a usual one."""
    return TurnLoop(TurnSelector(outbox)) if hasattr(select, "epoll") else asyncio.new_event_loop()


def run(main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """As asyncio.run, on this loop, which is closed in the end."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(end_tasks(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
