"""What is sent when: a turn's bytes at its end, in order. The selector does all that the standard library's does."""

import asyncio
import os
import select
import selectors
import socket
from collections.abc import Callable, Iterator
from selectors import EVENT_READ, EVENT_WRITE

import pytest

import turns
from turns import Outbox, TurnLoop, TurnSelector

BOTH = EVENT_READ | EVENT_WRITE
Runner = Callable[..., object]


class Recording(asyncio.Transport):
    """A transport that keeps what it is given."""

    def __init__(self, written: list[bytes]) -> None:
        super().__init__()
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)


# --- The outbox ---


def on_ours(play: Callable[[Outbox], object]) -> None:
    outbox = Outbox()
    turns.run(play(outbox), turns.new_loop(outbox))


def on_any(play: Callable[[Outbox], object]) -> None:
    turns.run(play(Outbox()), asyncio.new_event_loop())


each_loop = pytest.mark.parametrize("run", [on_ours, on_any])


@each_loop
def test_what_a_turn_writes_goes_out_at_its_end_and_in_order(run: Runner) -> None:
    async def play(outbox: Outbox) -> None:
        written: list[bytes] = []
        one, other = Recording(written), Recording(written)
        for _ in range(3):
            outbox.put((one, b"1"))
            outbox.put((other, b"2"))
            outbox.put((one, b"3"))
            assert written == []
            await asyncio.sleep(0)
            assert written == [b"1", b"2", b"3"]
            written.clear()

    run(play)


@each_loop
def test_who_closes_sends_what_is_waiting_first(run: Runner) -> None:
    async def play(outbox: Outbox) -> None:
        written: list[bytes] = []
        for data in (b"1", b"2", b"3"):
            outbox.put((Recording(written), data))
        outbox.flush()
        assert written == [b"1", b"2", b"3"]
        await asyncio.sleep(0)
        assert written == [b"1", b"2", b"3"]

    run(play)


class Raising(Recording):
    def __init__(self, error: Exception) -> None:
        super().__init__([])
        self._error = error

    def write(self, data: bytes) -> None:
        raise self._error


@each_loop
def test_a_write_that_raises_is_told_and_holds_nobody_up(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def play(outbox: Outbox) -> None:
        written: list[bytes] = []
        for transport in (Raising(RuntimeError("odd")), Recording(written)):
            outbox.put((transport, b"x"))
        await asyncio.sleep(0)
        assert written == [b"x"]

    run(play)
    assert [record.exc_text and record.exc_text.splitlines()[-1] for record in caplog.records] == ["RuntimeError: odd"]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this platform has no epoll")
@pytest.mark.parametrize("schedule", ["call_soon", "call_later"])
def test_what_a_write_schedules_is_not_slept_over(schedule: str) -> None:
    outbox = Outbox()
    loop = TurnLoop(TurnSelector(outbox))
    waits: list[float | None] = []

    class Asked:
        """In epoll's place: it tells how long it was asked to wait."""

        def poll(self, timeout: float | None) -> list[tuple[int, int]]:
            waits.append(timeout)
            return []

    class Scheduling(Recording):
        def write(self, data: bytes) -> None:
            if schedule == "call_soon":
                loop.call_soon(print)
            else:
                loop.call_later(0.1, print)

    epoll, loop._turns._epoll = loop._turns._epoll, Asked()  # type: ignore[assignment]
    outbox.put((Scheduling([]), b"x"))
    for timeout in (3600, 3600, None):
        assert loop._turns.select(timeout) == []
    loop._turns._epoll = epoll
    loop.close()
    assert waits == [0, 3600, None]


@each_loop
def test_what_is_put_while_others_are_sent_goes_out_as_well(run: Runner) -> None:
    class Answering(Recording):
        def write(self, data: bytes) -> None:
            super().write(data)
            if data == b"1":
                self.outbox.put((self, b"2"))

    async def play(outbox: Outbox) -> None:
        written: list[bytes] = []
        transport = Answering(written)
        transport.outbox = outbox
        outbox.put((transport, b"1"))
        await asyncio.sleep(0)
        assert written == [b"1", b"2"]

    run(play)


@each_loop
def test_a_connection_that_breaks_as_it_is_written_to_is_told_at_once(run: Runner) -> None:
    """Else the loop would sleep over it, with nothing else to wake it."""

    class Lost(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(None)

    async def play(outbox: Outbox) -> None:
        ours, theirs = socket.socketpair()
        transport, lost = await asyncio.get_running_loop().create_connection(Lost, sock=ours)
        transport.pause_reading()  # so that only the write can find out
        theirs.close()
        outbox.put((transport, b"to nobody"))
        await lost.lost

    run(play)


def test_a_loop_that_ends_leaves_no_task_behind() -> None:
    ended: list[str] = []

    async def sleeper() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("task")

    async def play(outbox: Outbox) -> str:
        task = asyncio.ensure_future(sleeper())
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, ended.append, "thread")
        return "result" if not task.done() else ""

    outbox = Outbox()
    assert turns.run(play(outbox), turns.new_loop(outbox)) == "result"
    assert ended == ["thread", "task"]


# --- The selector, beside the standard library's ---


@pytest.fixture(params=[lambda: TurnSelector(Outbox()), selectors.DefaultSelector], ids=["ours", "stdlib"])
def selector(request: pytest.FixtureRequest) -> Iterator[selectors.BaseSelector]:
    with request.param() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def ready(selector: selectors.BaseSelector, timeout: float | None = 0) -> list[tuple[object, int]]:
    return [(key.data, events) for key, events in selector.select(timeout)]


def test_it_tells_who_can_be_read_and_who_can_be_written(selector: selectors.BaseSelector, pair) -> None:
    one, other = pair
    key = selector.register(one, BOTH, "one")
    assert (key.fileobj, key.fd, key.events, key.data) == (one, one.fileno(), BOTH, "one")
    selector.register(other.fileno(), EVENT_READ, "other")
    assert ready(selector) == [("one", EVENT_WRITE)]
    one.send(b"x")
    assert sorted(ready(selector, None)) == [("one", EVENT_WRITE), ("other", EVENT_READ)]
    assert ready(selector, -1) == ready(selector, 5)  # there is no waiting where something is ready
    other.send(b"x")
    assert ("one", BOTH) in ready(selector)


def test_modifying_changes_events_and_data(selector: selectors.BaseSelector, pair) -> None:
    one, other = pair
    selector.register(one, EVENT_READ, "before")
    other.send(b"x")
    assert selector.modify(one, EVENT_READ, "after").data == "after"
    assert ready(selector) == [("after", EVENT_READ)]
    assert selector.modify(one, EVENT_WRITE, "now").events == EVENT_WRITE
    assert ready(selector) == [("now", EVENT_WRITE)]
    assert selector.get_key(one).data == "now"


@pytest.mark.parametrize("events", [EVENT_READ, EVENT_WRITE, BOTH])
def test_the_peers_end_is_for_all_who_wait(selector: selectors.BaseSelector, pair, events: int) -> None:
    one, other = pair
    selector.register(one, events, "one")
    other.close()
    assert ready(selector) == [("one", events)]


def test_an_error_is_for_all_who_wait(selector: selectors.BaseSelector) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        selector.register(writer, EVENT_WRITE, "writer")
        assert ready(selector) == [("writer", EVENT_WRITE)]
    finally:
        os.close(writer)


def test_who_is_taken_out_is_not_told(selector: selectors.BaseSelector, pair) -> None:
    one, other = pair
    selector.register(one, EVENT_READ, "one")
    other.send(b"x")
    assert selector.unregister(one).data == "one"
    assert ready(selector) == []
    selector.register(one, EVENT_READ, "again")
    assert ready(selector) == [("again", EVENT_READ)]


def test_a_descriptor_that_was_closed_can_be_taken_out_by_its_number(selector: selectors.BaseSelector, pair) -> None:
    number = pair[0].fileno()
    selector.register(number, EVENT_READ)
    pair[0].close()
    assert selector.unregister(number).fd == number
    assert len(selector.get_map()) == 0


def test_nobody_is_told_of_a_descriptor_that_lives_on_as_a_copy(selector: selectors.BaseSelector, pair) -> None:
    """epoll goes on watching what a number stood for, as long as any copy of it is open."""
    one, other = pair
    number = one.fileno()
    selector.register(number, EVENT_READ)
    with one.dup():
        one.close()
        selector.unregister(number)
        other.send(b"x")
        assert ready(selector) == []


def test_mistakes_are_told(selector: selectors.BaseSelector, pair) -> None:
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
