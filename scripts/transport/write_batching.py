"""Write batching: what one iteration of the event loop writes is sent at its end, in one go.

Writing wakes a peer on this machine that sleeps. Single writes would wake it again and again, which costs more than the
writes do; at the end of an iteration the first one wakes it and the others find it awake. That end is the moment in
which the loop calls its selector, so the selector is ours: a callback would need an iteration of its own.

Nothing outside depends on it: with asyncio's own loop everything works as well, and costs more.
"""

import asyncio
import logging
import select
import selectors
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context
from math import inf
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any, Protocol, TypeVar

from core.tasks import end_tasks

log = logging.getLogger("gateway")

T = TypeVar("T")

_EPOLLIN = getattr(select, "EPOLLIN", 0)  # a constant of Linux


class Writer(Protocol):
    """A transport, or what stands for one."""

    def write(self, data: Any, /) -> None: ...


class WriteBatcher:
    """What the current iteration of the loop has to send. `write` takes a pair: a transport and the bytes for it."""

    __slots__ = ("_items", "write")
    write: Callable[[tuple[Writer, Any]], None]

    def __init__(self) -> None:
        self._items: list[tuple[Writer, Any]] = []
        self.write = self._write_and_flush

    def _write_and_flush(self, item: tuple[Writer, Any]) -> None:
        if not self._items:
            asyncio.get_running_loop().call_soon(self.flush)
        self._items.append(item)

    def flushed_by_loop(self) -> None:
        """From now on the loop itself calls `flush` at the end of each iteration."""
        self.write = self._items.append

    def withdraw(self, *writers: Writer) -> bool:
        """Drop what is not sent yet for these; return whether there was anything."""
        kept = [item for item in self._items if item[0] not in writers]
        withdrawn = len(kept) < len(self._items)
        self._items[:] = kept  # it stays the same list, since `write` may be its `append`
        return withdrawn

    def flush(self) -> None:
        """Send it. Never raises: a fault of one connection must not stop the loop and the others."""
        while self._items:
            items = self._items[:]
            self._items.clear()  # it stays the same list, since `write` may be its `append`
            for transport, data in items:
                try:
                    transport.write(data)
                except Exception:  # noqa: PERF203
                    log.exception("a write failed")


class BatchingSelector(selectors.BaseSelector):
    """epoll for asyncio's loop, which flushes a batcher at the end of each iteration.

    It lets transports read by itself, without an iteration of the loop around each read: so a request takes a twentieth
    fewer instructions, and an event of a stream that comes alone a third. All that it must know of asyncio is where a
    handle has its callback. What it does not recognise as a transport's it leaves to the loop.
    """

    def __init__(self, batcher: WriteBatcher) -> None:
        batcher.flushed_by_loop()
        self.has_scheduled = False  # whether the loop has scheduled something since `select` was called
        self._flush = batcher.flush
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}
        self._readers: dict[int, Callable[[], None]] = {}  # of transports, by descriptor

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        key = SelectorKey(fileobj, _descriptor(fileobj), events, data)
        if key.fd in self._keys:
            raise KeyError(f"descriptor {key.fd} is registered already")
        self._epoll.register(key.fd, _mask(events))
        self._keep(key)
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        key = self._keys.pop(_descriptor(fileobj))
        self._readers.pop(key.fd, None)
        with suppress(OSError):  # it may have been closed already
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        key = self._keys[_descriptor(fileobj)]
        if events != key.events:
            self._epoll.modify(key.fd, _mask(events))
        key = SelectorKey(key.fileobj, key.fd, events, data)
        self._keep(key)
        return key

    def _keep(self, key: SelectorKey) -> None:
        self._keys[key.fd] = key
        self._readers.pop(key.fd, None)
        read = _reader_of(key.data)
        if read is not None:
            self._readers[key.fd] = read

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Wait until the loop has something to do; return the files that it must look at.

        While it has nothing to do, transports read what they receive, and what is written then is sent. It gets its
        turn when something is scheduled, when its time is up, and when any other file is ready.
        """
        self.has_scheduled = False
        ends_s = inf if timeout is None else time.monotonic() + timeout
        while True:
            self._flush()
            if self.has_scheduled or (timeout is not None and timeout <= 0):
                # What is scheduled comes before what is read now.
                return [_event(self._keys[fd], mask) for fd, mask in self._epoll.poll(0) if fd in self._keys]
            events = self._epoll.poll(timeout)
            ready = self._read(events)
            if ready or self.has_scheduled:
                self._flush()  # what a read has written comes before what it has scheduled
                return ready
            if not events:
                return ready
            if timeout is not None:
                timeout = ends_s - time.monotonic()

    def _read(self, events: list[tuple[int, int]]) -> list[tuple[SelectorKey, int]]:
        """Let transports read what they have received; return what is ready from the first other file on, in order."""
        ready: list[tuple[SelectorKey, int]] = []
        readers, keys = self._readers, self._keys
        for fd, mask in events:
            if mask == _EPOLLIN and fd in readers and not ready:
                try:
                    readers[fd]()
                except Exception:
                    log.exception("a read failed")
            elif fd in keys:
                ready.append(_event(keys[fd], mask))
        return ready

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()
        self._readers.clear()

    def get_key(self, fileobj: Any) -> SelectorKey:
        return self._keys[_descriptor(fileobj)]

    def get_map(self) -> Mapping[Any, SelectorKey]:
        """The keys by descriptor."""
        return self._keys


def _event(key: SelectorKey, mask: int) -> tuple[SelectorKey, int]:
    # An error, or the peer's end, concerns the reader and the writer.
    events = (mask & ~select.EPOLLIN and EVENT_WRITE) | (mask & ~select.EPOLLOUT and EVENT_READ)
    return key, events & key.events


def _reader_of(data: Any) -> Callable[[], None] | None:
    """Return what reads for a transport, if that is what asyncio registers a file for; else None.

    It needs no context of its own: nothing here uses context variables.
    """
    handle = data[0] if isinstance(data, tuple) else None
    callback = getattr(handle, "_callback", None)
    is_transports = isinstance(getattr(callback, "__self__", None), asyncio.Transport)
    return callback if is_transports and not getattr(handle, "_args", True) else None


def _descriptor(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    if not events or events & ~(EVENT_READ | EVENT_WRITE):
        raise ValueError(f"unknown events: {events!r}")
    return (events & EVENT_READ and select.EPOLLIN) | (events & EVENT_WRITE and select.EPOLLOUT)


class BatchingLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on that selector.

    At the flush the loop has already decided how long to sleep. What is scheduled from then on, for example when a
    connection breaks, must not wait for that time.
    """

    def __init__(self, selector: BatchingSelector) -> None:
        self.batching_selector = selector
        super().__init__(selector)

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        self.batching_selector.has_scheduled = True
        return super().call_soon(callback, *args, context=context)

    def stop(self) -> None:
        self.batching_selector.has_scheduled = True
        super().stop()

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        self.batching_selector.has_scheduled = True
        return super().call_at(when, callback, *args, context=context)


def new_loop(batcher: WriteBatcher) -> asyncio.AbstractEventLoop:
    """Return a loop that flushes `batcher` at the end of each iteration; a usual loop if there is no epoll."""
    return BatchingLoop(BatchingSelector(batcher)) if hasattr(select, "epoll") else asyncio.new_event_loop()


def run(main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run as asyncio.run does, on this loop, and close it."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(end_tasks(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
