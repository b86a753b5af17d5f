"""write_batching.py: when bytes are sent, and a selector that does what the standard library's does."""

import asyncio
import os
import select
import selectors
import socket
from collections.abc import Callable, Coroutine, Iterator
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any

import pytest

from support.memory_transport import MemoryTransport
from transport import write_batching
from transport.write_batching import BatchingSelector, WriteBatcher

BOTH = EVENT_READ | EVENT_WRITE
Play = Callable[[WriteBatcher], Coroutine[Any, Any, object]]
Runner = Callable[[Play], None]
Pair = tuple[socket.socket, socket.socket]


# --- The batcher ---


def on_our_loop(play: Play) -> None:
    batcher = WriteBatcher()
    write_batching.run(play(batcher), write_batching.new_loop(batcher))


def on_any_loop(play: Play) -> None:
    write_batching.run(play(WriteBatcher()), asyncio.new_event_loop())


each_loop = pytest.mark.parametrize("run", [on_our_loop, on_any_loop])


class Shared(MemoryTransport):
    """Transports that write to one list, which shows the order between them."""

    def __init__(self, written: list[bytes]) -> None:
        super().__init__()
        self.written = written


@each_loop
def test_what_one_iteration_writes_is_sent_at_its_end_in_order(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        written: list[bytes] = []
        one, other = Shared(written), Shared(written)
        for _ in range(3):
            batcher.write((one, b"1"))
            batcher.write((other, b"2"))
            batcher.write((one, b"3"))
            assert written == []
            await asyncio.sleep(0)
            assert written == [b"1", b"2", b"3"]
            written.clear()

    run(play)


@each_loop
def test_a_flush_sends_at_once_and_only_once(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        written: list[bytes] = []
        for data in (b"1", b"2", b"3"):
            batcher.write((Shared(written), data))
        batcher.flush()
        assert written == [b"1", b"2", b"3"]
        await asyncio.sleep(0)
        assert written == [b"1", b"2", b"3"]

    run(play)


class Failing(MemoryTransport):
    def write(self, data: bytes) -> None:
        raise RuntimeError("broken")


@each_loop
def test_a_write_that_fails_is_logged_and_the_others_are_sent(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def play(batcher: WriteBatcher) -> None:
        healthy = MemoryTransport()
        for transport in (Failing(), healthy):
            batcher.write((transport, b"x"))
        await asyncio.sleep(0)
        assert healthy.written == [b"x"]

    run(play)
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["broken"]


@each_loop
def test_what_is_written_during_a_flush_is_sent_as_well(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        class Answering(MemoryTransport):
            def write(self, data: bytes) -> None:
                super().write(data)
                if data == b"1":
                    batcher.write((self, b"2"))

        transport = Answering()
        batcher.write((transport, b"1"))
        await asyncio.sleep(0)
        assert transport.written == [b"1", b"2"]

    run(play)


@each_loop
@pytest.mark.parametrize("schedule", ["call_soon", "call_later"])
def test_the_loop_does_not_sleep_past_what_a_write_schedules(run: Runner, schedule: str) -> None:
    """At the flush it has already decided to sleep until the next timer."""

    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        scheduled: asyncio.Future[str] = loop.create_future()

        class Scheduling(MemoryTransport):
            def write(self, data: bytes) -> None:
                if schedule == "call_soon":
                    loop.call_soon(scheduled.set_result, "run")
                else:
                    loop.call_later(0.001, scheduled.set_result, "run")

        slept: list[bool] = []
        loop.call_later(10, slept.append, True)
        batcher.write((Scheduling(), b"x"))
        assert await scheduled == "run"
        assert slept == []

    run(play)


@each_loop
def test_a_connection_that_breaks_as_it_is_written_to_is_reported(run: Runner) -> None:
    """Otherwise the loop would sleep on, with nothing else to wake it."""

    class Lost(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(None)

    async def play(batcher: WriteBatcher) -> None:
        ours, theirs = socket.socketpair()
        transport, protocol = await asyncio.get_running_loop().create_connection(Lost, sock=ours)
        transport.pause_reading()  # so that only the write can find out
        theirs.close()
        batcher.write((transport, b"to nothing"))
        await protocol.lost

    run(play)


# --- The loop ---


def test_a_platform_without_epoll_has_its_usual_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    loop = write_batching.new_loop(WriteBatcher())
    loop.close()
    assert not isinstance(loop, write_batching.BatchingLoop)


def test_a_loop_that_ends_leaves_no_task_behind() -> None:
    ended: list[str] = []

    async def sleeper() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("task")

    async def play(batcher: WriteBatcher) -> str:
        task = asyncio.ensure_future(sleeper())
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, ended.append, "thread")
        return "result" if not task.done() else ""

    batcher = WriteBatcher()
    assert write_batching.run(play(batcher), write_batching.new_loop(batcher)) == "result"
    assert ended == ["thread", "task"]


# --- The selector, compared with the standard library's ---


@pytest.fixture(params=[lambda: BatchingSelector(WriteBatcher()), selectors.DefaultSelector], ids=["ours", "stdlib"])
def selector(request: pytest.FixtureRequest) -> Iterator[selectors.BaseSelector]:
    with request.param() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def ready(selector: selectors.BaseSelector, timeout: float | None = 0) -> list[tuple[object, int]]:
    return [(key.data, events) for key, events in selector.select(timeout)]


def test_it_reports_what_can_be_read_and_written(selector: selectors.BaseSelector, pair: Pair) -> None:
    one, other = pair
    key = selector.register(one, BOTH, "one")
    assert (key.fileobj, key.fd, key.events, key.data) == (one, one.fileno(), BOTH, "one")
    selector.register(other.fileno(), EVENT_READ, "other")
    assert ready(selector) == [("one", EVENT_WRITE)]
    one.send(b"x")
    assert sorted(ready(selector, None)) == [("one", EVENT_WRITE), ("other", EVENT_READ)]
    assert ready(selector, -1) == ready(selector, 5)  # it does not wait if something is ready
    other.send(b"x")
    assert ("one", BOTH) in ready(selector)


def test_modifying_changes_events_and_data(selector: selectors.BaseSelector, pair: Pair) -> None:
    one, other = pair
    selector.register(one, EVENT_READ, "before")
    other.send(b"x")
    assert selector.modify(one, EVENT_READ, "after").data == "after"
    assert ready(selector) == [("after", EVENT_READ)]
    assert selector.modify(one, EVENT_WRITE, "now").events == EVENT_WRITE
    assert ready(selector) == [("now", EVENT_WRITE)]
    assert selector.get_key(one).data == "now"


@pytest.mark.parametrize("events", [EVENT_READ, EVENT_WRITE, BOTH])
def test_the_peers_end_is_reported_for_every_event(selector: selectors.BaseSelector, pair: Pair, events: int) -> None:
    one, other = pair
    selector.register(one, events, "one")
    other.close()
    assert ready(selector) == [("one", events)]


def test_an_error_is_reported_for_every_event(selector: selectors.BaseSelector) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        selector.register(writer, EVENT_WRITE, "writer")
        assert ready(selector) == [("writer", EVENT_WRITE)]
    finally:
        os.close(writer)


def test_what_is_unregistered_is_not_reported(selector: selectors.BaseSelector, pair: Pair) -> None:
    one, other = pair
    selector.register(one, EVENT_READ, "one")
    other.send(b"x")
    assert selector.unregister(one).data == "one"
    assert ready(selector) == []
    selector.register(one, EVENT_READ, "again")
    assert ready(selector) == [("again", EVENT_READ)]


def test_a_closed_descriptor_can_be_unregistered_by_its_number(selector: selectors.BaseSelector, pair: Pair) -> None:
    number = pair[0].fileno()
    selector.register(number, EVENT_READ)
    pair[0].close()
    assert selector.unregister(number).fd == number
    assert len(selector.get_map()) == 0


def test_a_descriptor_that_lives_on_as_a_copy_is_not_reported(selector: selectors.BaseSelector, pair: Pair) -> None:
    """Epoll goes on watching what a number stood for, as long as any copy of it is open."""
    one, other = pair
    number = one.fileno()
    selector.register(number, EVENT_READ)
    with one.dup():
        one.close()
        selector.unregister(number)
        other.send(b"x")
        assert ready(selector) == []


def test_mistakes_are_errors(selector: selectors.BaseSelector, pair: Pair) -> None:
    one, _ = pair
    for mistake in (selector.unregister, selector.get_key, lambda fd: selector.modify(fd, EVENT_READ)):
        with pytest.raises(KeyError):
            mistake(one.fileno())
    for events in (0, 4, BOTH | 4):
        with pytest.raises(ValueError, match=r"\w"):
            selector.register(one, events)
    selector.register(one, EVENT_READ)
    with pytest.raises(KeyError):
        selector.register(one.fileno(), EVENT_READ)
    assert selector.get_map().get(one.fileno()) == selector.get_key(one)
    assert selector.get_map().get(12345) is None
