"""write_batching.py: when bytes are sent, and a selector that does what the standard library's does."""

import asyncio
import os
import select
import selectors
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from operator import methodcaller
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


# --- Transports that read while the loop waits ---


class Echo(asyncio.Protocol):
    """Sends back what comes, and does as it is told at each piece."""

    def __init__(self, batcher: WriteBatcher) -> None:
        self.batcher = batcher
        self.received: list[bytes] = []
        self.on_data: Callable[[], object] = lambda: None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.append(data)
        self.batcher.write((self.transport, data))
        self.on_data()


@asynccontextmanager
async def connected(batcher: WriteBatcher) -> AsyncIterator[tuple[Echo, socket.socket]]:
    """A connection of the loop, and its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    with theirs:
        _, echo = await asyncio.get_running_loop().create_connection(lambda: Echo(batcher), sock=ours)
        yield echo, theirs
        await ended(echo)


@asynccontextmanager
async def traffic(batcher: WriteBatcher) -> AsyncIterator[Echo]:
    """One of two connections of the loop that send a byte back and forth without an end."""
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    _, first = await loop.create_connection(lambda: Echo(batcher), sock=one)
    _, second = await loop.create_connection(lambda: Echo(batcher), sock=other)
    batcher.write((second.transport, b"x"))
    yield first
    await ended(first, second)


async def ended(*echoes: Echo) -> None:
    for echo in echoes:
        echo.transport.abort()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@each_loop
def test_what_a_transport_receives_is_answered_while_the_loop_waits(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        def talk(theirs: socket.socket) -> None:
            for number in range(100):
                theirs.send(b"%d" % number)
                assert theirs.recv(10) == b"%d" % number

        async with connected(batcher) as (echo, theirs):
            await asyncio.get_running_loop().run_in_executor(None, talk, theirs)
            assert len(echo.received) == 100

    run(play)


@each_loop
def test_traffic_delays_neither_timers_nor_other_threads_nor_signals(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        async with traffic(batcher):
            await asyncio.sleep(0.01)
            await loop.run_in_executor(None, os.getpid)
            signalled: asyncio.Future[None] = loop.create_future()
            loop.add_signal_handler(signal.SIGUSR2, signalled.set_result, None)
            os.kill(os.getpid(), signal.SIGUSR2)
            await signalled
            loop.remove_signal_handler(signal.SIGUSR2)

    run(play)


@each_loop
def test_what_a_read_schedules_is_run_amid_traffic(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        task_ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            await asyncio.sleep(0)
            task_ended.set_result("ended")

        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            if not tasks:
                tasks.append(asyncio.ensure_future(work()))

        async with traffic(batcher) as echo:
            echo.on_data = begin
            assert await task_ended == "ended"

    run(play)


@pytest.mark.parametrize("new_loop", [lambda: write_batching.new_loop(WriteBatcher()), asyncio.new_event_loop])
def test_a_read_may_stop_the_loop(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    class Stopping(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            loop.stop()

    loop = new_loop()
    one, other = socket.socketpair()
    with other:
        transport, _ = loop.run_until_complete(loop.create_connection(Stopping, sock=one))
        other.send(b"x")
        loop.run_forever()
        transport.close()
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@each_loop
@pytest.mark.parametrize("end", ["pause_reading", "abort", "close"])
def test_a_read_may_end_another_ones_that_is_due_as_well(run: Runner, end: str) -> None:
    """Both have received bytes when the loop looks. The one that reads first keeps the other from it."""

    async def play(batcher: WriteBatcher) -> None:
        async with connected(batcher) as (one, to_one), connected(batcher) as (other, to_other):
            one.on_data = lambda: methodcaller(end)(other.transport)
            other.on_data = lambda: methodcaller(end)(one.transport)
            to_one.send(b"x")
            to_other.send(b"x")
            while not one.received and not other.received:
                await asyncio.sleep(0.01)  # the loop waits, so the selector reads
            for _ in range(10):
                await asyncio.sleep(0)
            assert sorted([one.received, other.received]) == [[], [b"x"]]

    run(play)


@each_loop
def test_what_is_scheduled_comes_before_what_is_received_later(run: Runner) -> None:
    """A TLS handshake depends on it: it begins in a task, before which nothing may be read."""

    async def play(batcher: WriteBatcher) -> None:
        order: list[str] = []

        async def work() -> None:
            order.append("task")

        async with connected(batcher) as (echo, theirs):
            echo.on_data = lambda: order.append("read")
            theirs.send(b"x")
            await asyncio.ensure_future(work())
            while len(order) < 2:
                await asyncio.sleep(0)
        assert order == ["task", "read"]

    run(play)


@each_loop
def test_files_are_served_in_the_order_in_which_they_became_ready(run: Runner, pair: Pair) -> None:
    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        order: list[str] = []

        def note() -> None:
            order.append("file")
            pair[0].recv(1)

        async with connected(batcher) as (echo, theirs):
            echo.on_data = lambda: order.append("transport")
            loop.add_reader(pair[0].fileno(), note)
            pair[1].send(b"x")
            theirs.send(b"x")
            while len(order) < 2:
                await asyncio.sleep(0.01)
            loop.remove_reader(pair[0].fileno())
        assert order == ["file", "transport"]

    run(play)


@each_loop
def test_reading_goes_on_after_a_pause(run: Runner) -> None:
    async def play(batcher: WriteBatcher) -> None:
        async with connected(batcher) as (echo, theirs):
            echo.transport.pause_reading()
            theirs.send(b"x")
            for _ in range(10):
                await asyncio.sleep(0)
            assert echo.received == []
            echo.transport.resume_reading()
            while not echo.received:
                await asyncio.sleep(0)
            echo.transport.write(b"y" * (1 << 20))  # more than the kernel takes: now it is also watched for writing
            theirs.send(b"z")
            while echo.received != [b"x", b"z"]:
                await asyncio.sleep(0)

    run(play)


@each_loop
def test_a_protocol_that_fails_ends_its_own_connection_only(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def play(batcher: WriteBatcher) -> None:
        def fail() -> None:
            raise RuntimeError("broken")

        async with connected(batcher) as (one, to_one), connected(batcher) as (other, to_other):
            one.on_data = fail
            to_one.send(b"x")
            while not one.transport.is_closing():
                await asyncio.sleep(0)
            to_other.send(b"x")
            while not other.received:
                await asyncio.sleep(0)

    run(play)
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["broken"]


@each_loop
def test_a_datagram_protocol_that_fails_stops_nothing(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    """What protocols of streams raise is caught by asyncio itself, but not what those of datagrams do."""

    class Failing(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, address: object) -> None:
            raise RuntimeError("broken")

    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(Failing, local_addr=("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", transport.get_extra_info("sockname"))
        while not caplog.records:
            await asyncio.sleep(0.001)
        transport.close()

    run(play)
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["broken"]


@each_loop
def test_a_callback_with_arguments_gets_them(run: Runner, pair: Pair) -> None:
    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        pair[1].send(b"x")
        async with connected(batcher) as (echo, theirs):
            loop.add_reader(pair[0].fileno(), echo.transport.write, b"hello")
            assert await loop.run_in_executor(None, theirs.recv, 5) == b"hello"
            loop.remove_reader(pair[0].fileno())

    run(play)


def test_what_a_read_writes_is_sent_before_what_it_schedules_is_run() -> None:
    async def play(batcher: WriteBatcher) -> None:
        order: list[str] = []

        class Noting(MemoryTransport):
            def write(self, data: bytes) -> None:
                order.append("sent")

        async with connected(batcher) as (echo, theirs):

            def note() -> None:
                asyncio.get_running_loop().call_soon(order.append, "run")
                batcher.write((Noting(), b"x"))

            echo.on_data = note
            await asyncio.get_running_loop().run_in_executor(None, theirs.send, b"x")
            while len(order) < 2:
                await asyncio.sleep(0.001)
        assert order == ["sent", "run"]

    on_our_loop(play)


def test_a_transports_bytes_are_read_by_the_selector_and_all_else_is_the_loops(pair: Pair) -> None:
    async def play(batcher: WriteBatcher) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, write_batching.BatchingLoop)
        selector = loop.batching_selector
        async with connected(batcher) as (echo, theirs):
            theirs.send(b"x")
            assert ready(selector, 0.01) == []
            assert (echo.received, theirs.recv(10)) == ([b"x"], b"x")
            loop.add_reader(pair[0].fileno(), print)
            pair[1].send(b"x")
            assert [events for _, events in ready(selector, 20)] == [EVENT_READ]
            loop.remove_reader(pair[0].fileno())
            theirs.send(b"x")
            assert len(ready(selector)) == 1  # the loop does not wait: it has something to do before
            assert echo.received == [b"x"]

    on_our_loop(play)


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
