"""client_protocol.py: the request handler and what it may await, heads and bodies, and the ways to end."""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from config.settings import Limits
from core.errors import (
    BAD_REQUEST,
    MEMORY_FULL,
    PAYLOAD_TOO_LARGE,
    QUEUE_TIMEOUT,
    REQUEST_TIMEOUT,
    URI_TOO_LONG,
    GatewayError,
    PeerGone,
)
from http1.bodies import RequestBody, encode_chunk
from support.feeds import FEEDS, Feed
from support.memory_transport import (
    ABORTED,
    CLOSING,
    LOST,
    OPEN,
    Link,
    MemoryTransport,
    bare_yield,
    end_of,
    outcome,
    run,
    turns_until,
)
from transport.client_protocol import ForeignAwait, peer_has_closed
from transport.waiter import Waiter

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
PIPELINED_BYTES = 65536
each_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


class Connected:
    """A client, and what its request handlers returned."""

    def __init__(self, transport: MemoryTransport | None = None, limits: Limits | None = None) -> None:
        self.link = Link()
        self.transport = transport or MemoryTransport()
        self.unread_bytes = 0  # of heads and pipelined requests, as counted
        self.most_unread = 1 << 30
        self.client = self.link.client(self.transport, limits, self._count_unread)
        self.returned: list[object] = []

    def _count_unread(self, change: int) -> None:
        self.unread_bytes += change
        if change > 0 and self.unread_bytes > self.most_unread:
            raise GatewayError(MEMORY_FULL)

    def run(self, handler: Coroutine[Any, Any, object]) -> None:
        self.client.run_handler(handler, self.returned.append)

    def head(self, idle_s: float = 75.0, whole_s: float = 10.0) -> Waiter[bytes]:
        waiter: Waiter[bytes] = Waiter()
        self.client.expect_head(waiter, idle_s, whole_s)
        return waiter

    def waiting(self, seconds: float = 0, kind: Any = None, *, renewing: bool = False) -> Waiter[str]:
        """Start a handler that waits and returns what it got."""
        waiter: Waiter[str] = Waiter()

        async def handler() -> object:
            try:
                wait = self.client.wait_while_active if renewing else self.client.wait
                return await wait(waiter, seconds, kind)
            except GatewayError as error:
                return error.kind, error.message
            except Exception as error:
                return type(error)

        self.run(handler())
        return waiter


# --- The peer ---


@pytest.mark.parametrize(
    ("peername", "peer"),
    [
        (("::ffff:192.0.2.7", 4711, 0, 0), "192.0.2.7"),
        (("192.0.2.7", 50000), "192.0.2.7"),
        (("fe80::1%eth0", 50000, 0, 2), "fe80::1%eth0"),
        ("", "local"),
        (None, "local"),
    ],
)
def test_the_peer_is_named_by_its_address(peername: object, peer: str) -> None:
    assert Connected(MemoryTransport(peername)).client.peer == peer


def test_written_bytes_are_counted_and_sent_together() -> None:
    connected = Connected()
    connected.client.write(b"HTTP/1.1 ")
    connected.client.write(b"200 OK")
    assert connected.transport.written == []
    assert connected.link.sent(connected.client) == b"HTTP/1.1 200 OK"
    assert connected.client.sent_bytes == 15


# --- The request handler ---


def test_a_handler_that_waits_for_nothing_returns_at_once() -> None:
    async def handler() -> str:
        return "done"

    connected = Connected()
    connected.run(handler())
    assert connected.returned == ["done"]


def test_a_handler_is_resumed_by_the_call_that_sets_its_result() -> None:
    connected = Connected()
    waiter = connected.waiting()
    assert connected.returned == []
    waiter.set_result("result")
    assert connected.returned == ["result"]


def test_a_handler_waits_as_often_as_it_likes() -> None:
    connected = Connected()
    waiters: list[Waiter[int]] = [Waiter() for _ in range(3)]

    async def handler() -> list[int]:
        return [await connected.client.wait(waiter, 0, None) for waiter in waiters]

    connected.run(handler())
    for number in (1, 0, 2):  # the second is there before it is waited for
        assert connected.returned == []
        waiters[number].set_result(number)
    assert connected.returned == [[0, 1, 2]]


def test_the_next_handler_may_start_when_the_last_one_returns() -> None:
    async def handler() -> str:
        return "done"

    connected = Connected()
    client, returned = connected.client, connected.returned

    def start_another(value: str) -> None:
        returned.append(value)
        client.run_handler(handler(), returned.append)

    client.run_handler(handler(), start_another)
    assert returned == ["done", "done"]


def test_a_handler_that_has_ended_is_not_resumed() -> None:
    connected = Connected()
    waiter = connected.waiting()
    resume = waiter.on_done
    assert resume is not None
    waiter.set_result("result")
    resume()
    assert connected.returned == ["result"]


class Handler:
    """A request handler that awaits foreign things: so often, and in spite of ForeignAwait and of its own end."""

    def __init__(self, foreign: Callable[[], Any]) -> None:
        self._foreign = foreign
        self.refusals = 0

    async def once(self) -> str:
        try:
            await self._foreign()
        except ForeignAwait:
            self.refusals += 1
        return "refused"

    async def stubbornly(self) -> str:
        for _ in range(20):
            with suppress(ForeignAwait):
                await self._foreign()
        return "late"

    async def past_its_end(self) -> str:
        with suppress(GeneratorExit):
            await self.stubbornly()
        await self._foreign()
        return "late"

    async def without_care(self) -> str:
        await self._foreign()
        return "never"


each_foreign_await = pytest.mark.parametrize(
    "foreign",
    [
        lambda: asyncio.sleep(0.01),
        lambda: asyncio.sleep(0),
        bare_yield,
        lambda: asyncio.get_running_loop().create_future(),
    ],
    ids=["a sleep", "a sleep of no time", "a bare yield", "a future"],
)


@each_foreign_await
def test_a_foreign_await_is_refused(foreign: Callable[[], Any]) -> None:
    async def play() -> None:
        connected, handler = Connected(), Handler(foreign)
        connected.run(handler.once())
        assert (connected.returned, handler.refusals) == (["refused"], 1)
        assert connected.transport.state == OPEN

    run(play())


@each_foreign_await
def test_a_foreign_await_after_a_wait_is_refused(foreign: Callable[[], Any]) -> None:
    async def play() -> None:
        connected, handler = Connected(), Handler(foreign)
        waiter: Waiter[None] = Waiter()

        async def late() -> str:
            await connected.client.wait(waiter, 10, None)
            return await handler.once()

        connected.run(late())
        waiter.set_result(None)
        assert connected.returned == ["refused"]

    run(play())


def test_a_handler_may_wait_properly_after_a_foreign_await() -> None:
    connected, handler = Connected(), Handler(bare_yield)
    waiter: Waiter[str] = Waiter()

    async def reformed() -> str:
        await handler.once()
        return await connected.client.wait(waiter, 0, None)

    connected.run(reformed())
    assert connected.returned == []
    waiter.set_result("result")
    assert connected.returned == ["result"]


@each_foreign_await
@pytest.mark.parametrize("habit", [Handler.stubbornly, Handler.past_its_end, Handler.without_care])
def test_a_handler_that_does_not_stop_is_closed_and_its_connection_is_hung_up(
    foreign: Callable[[], Any], habit: Callable[[Handler], Coroutine[Any, Any, str]], caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> Connected:
        connected = Connected()
        connected.run(habit(Handler(foreign)))
        return connected

    connected = run(play())
    assert (connected.returned, connected.transport.state, connected.client.ended) == ([False], ABORTED, True)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "a request handler awaits what ClientProtocol does not offer, and is ended")
    ]


@pytest.mark.parametrize("habit", [Handler.stubbornly, Handler.without_care])
def test_the_log_shows_what_the_handler_awaits(
    habit: Callable[[Handler], Coroutine[Any, Any, str]], caplog: pytest.LogCaptureFixture
) -> None:
    Connected().run(habit(Handler(bare_yield)))
    assert "await self._foreign()" in str(caplog.records[0].exc_text)


def test_what_a_refused_handler_raises_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    async def handler() -> str:
        try:
            await bare_yield()
        finally:
            raise ValueError("broken")

    connected = Connected()
    connected.run(handler())
    assert (connected.returned, connected.transport.state) == ([False], ABORTED)
    assert [record.exc_text and record.exc_text.splitlines()[-1] for record in caplog.records] == ["ValueError: broken"]


# --- Waiting ---


def test_a_wait_ends_when_the_client_leaves() -> None:
    connected = Connected()
    connected.waiting()
    connected.transport.receive_eof()
    assert connected.returned == [PeerGone]


def test_a_wait_does_not_begin_once_the_client_has_left() -> None:
    connected = Connected()
    connected.transport.receive_eof()
    connected.waiting().set_result("late")
    assert connected.returned == [PeerGone]


def test_a_wait_ends_when_the_time_is_up() -> None:
    connected = Connected()
    connected.waiting(10, QUEUE_TIMEOUT)
    connected.link.advance(9.75)
    assert connected.returned == []
    connected.link.advance(0.25)
    assert connected.returned == [(QUEUE_TIMEOUT, QUEUE_TIMEOUT.message)]


def test_without_a_kind_the_end_of_the_time_is_the_clients() -> None:
    connected = Connected()
    connected.waiting(10)
    connected.link.advance(10)
    assert connected.returned == [PeerGone]


def test_zero_seconds_are_no_time_out() -> None:
    connected = Connected()
    connected.waiting(0, QUEUE_TIMEOUT)
    connected.link.advance(1e6)
    assert connected.returned == []


def test_a_wait_that_has_ended_leaves_no_deadline() -> None:
    connected = Connected()
    connected.waiting(10, QUEUE_TIMEOUT).set_result("result")
    connected.link.advance(1e6)
    assert connected.transport.state == OPEN


def test_a_wait_gets_the_error_that_its_waiter_gets() -> None:
    connected = Connected()
    connected.waiting().set_exception(ValueError())
    assert connected.returned == [ValueError]


def test_a_wait_can_be_cancelled_with_an_error() -> None:
    connected = Connected()
    connected.waiting()
    connected.client.cancel_wait(GatewayError(MEMORY_FULL))
    assert connected.returned == [(MEMORY_FULL, MEMORY_FULL.message)]


def test_cancelling_does_nothing_if_there_is_no_wait() -> None:
    connected = Connected()
    connected.client.cancel_wait(PeerGone())
    assert connected.transport.state == OPEN


def test_hanging_up_ends_the_wait_and_the_connection() -> None:
    connected = Connected()
    connected.waiting()
    connected.client.hang_up()
    assert (connected.returned, connected.transport.state) == ([PeerGone], ABORTED)


def test_a_handler_that_waits_again_after_the_end_is_not_left_hanging() -> None:
    connected = Connected()

    async def handler() -> str:
        for _ in range(2):
            with suppress(PeerGone):
                await connected.client.wait(Waiter(), 0, None)
        return "ended"

    connected.run(handler())
    connected.transport.receive_eof()
    assert connected.returned == ["ended"]


# Activity of either side


def test_activity_renews_the_deadline_of_a_renewing_wait() -> None:
    connected = Connected()
    waiter = connected.waiting(10, QUEUE_TIMEOUT, renewing=True)
    for _ in range(5):
        connected.link.advance(8)
        connected.client.saw_activity = True
        connected.link.advance(1)
    assert connected.returned == []
    waiter.set_result("result")
    assert (connected.returned, connected.client.wants_tick) == (["result"], False)


def test_a_renewing_wait_without_activity_ends() -> None:
    connected = Connected()
    connected.waiting(10, QUEUE_TIMEOUT, renewing=True)
    connected.client.saw_activity = True
    connected.link.advance(5)
    connected.link.advance(9.75)
    assert connected.returned == []
    connected.link.advance(0.25)
    assert connected.returned == [(QUEUE_TIMEOUT, QUEUE_TIMEOUT.message)]


def test_activity_before_the_wait_does_not_count() -> None:
    connected = Connected()
    connected.client.saw_activity = True
    connected.waiting(10, QUEUE_TIMEOUT, renewing=True)
    connected.link.advance(5)
    connected.link.advance(5)
    assert connected.returned == [(QUEUE_TIMEOUT, QUEUE_TIMEOUT.message)]


def test_a_client_that_takes_bytes_again_is_active() -> None:
    connected = Connected()
    connected.waiting(10, QUEUE_TIMEOUT, renewing=True)
    connected.client.pause_writing()
    connected.client.resume_writing()
    connected.link.advance(5)
    connected.link.advance(9)
    assert connected.returned == []


def test_other_waits_are_not_renewed() -> None:
    connected = Connected()
    connected.waiting(10, QUEUE_TIMEOUT)
    connected.client.saw_activity = True
    connected.link.advance(5)
    connected.link.advance(5)
    assert connected.returned == [(QUEUE_TIMEOUT, QUEUE_TIMEOUT.message)]


# A limit for all waits

TOO_LONG = "The request took longer than MAX_REQUEST_DURATION allows."


@pytest.mark.parametrize("seconds", [0, 1000])
def test_no_wait_ends_later_than_the_limit(seconds: float) -> None:
    connected = Connected()
    connected.client.limit_waits(20)
    connected.waiting(seconds, QUEUE_TIMEOUT)
    connected.link.advance(19.75)
    assert connected.returned == []
    connected.link.advance(0.25)
    assert connected.returned == [(QUEUE_TIMEOUT, TOO_LONG)]


def test_activity_does_not_put_the_limit_off() -> None:
    connected = Connected()
    connected.client.limit_waits(20)
    connected.waiting(15, QUEUE_TIMEOUT, renewing=True)
    for _ in range(20):
        connected.client.saw_activity = True
        connected.link.advance(1)
    assert connected.returned == [(QUEUE_TIMEOUT, TOO_LONG)]


@pytest.mark.parametrize(("limit_s", "final"), [(5, True), (50, False)])
def test_a_request_that_reached_the_limit_would_reach_it_again(limit_s: float, final: bool) -> None:
    connected = Connected()
    connected.client.limit_waits(limit_s)
    waiter: Waiter[None] = Waiter()
    connected.client.arm(waiter, 10, QUEUE_TIMEOUT)
    connected.link.advance(10)
    with pytest.raises(GatewayError) as error:
        waiter.result()
    assert error.value.final is final


def test_a_shorter_wait_ends_before_the_limit() -> None:
    connected = Connected()
    connected.client.limit_waits(20)
    connected.waiting(10, QUEUE_TIMEOUT)
    connected.link.advance(10)
    assert connected.returned == [(QUEUE_TIMEOUT, QUEUE_TIMEOUT.message)]


def test_the_limit_can_be_taken_back() -> None:
    connected = Connected()
    connected.client.limit_waits(20)
    connected.client.limit_waits(0)
    connected.waiting(0, QUEUE_TIMEOUT)
    connected.link.advance(1e6)
    assert connected.returned == []


# Futures and tasks of asyncio


def test_a_handler_waits_for_a_future() -> None:
    async def play() -> None:
        connected = Connected()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        connected.run(connected.client.wait_for(future, 10, QUEUE_TIMEOUT))
        future.set_result("result")
        await turns_until(lambda: connected.returned == ["result"])

    run(play())


async def work(result: object, ends: list[str]) -> object:
    try:
        await asyncio.sleep(0)
        if isinstance(result, Exception):
            raise result
        return result
    finally:
        ends.append("ended")


def test_a_handler_runs_a_coroutine_in_a_task() -> None:
    async def play() -> None:
        connected = Connected()
        ends: list[str] = []
        connected.run(connected.client.run(work("result", ends), 10, QUEUE_TIMEOUT))
        await turns_until(lambda: connected.returned == ["result"])
        assert ends == ["ended"]

    run(play())


def test_an_error_of_the_task_is_the_handlers() -> None:
    async def play() -> None:
        connected = Connected()

        async def handler() -> str:
            try:
                await connected.client.run(work(ValueError("broken"), []), 10, QUEUE_TIMEOUT)
            except ValueError as error:
                return str(error)
            return "none"

        connected.run(handler())
        await turns_until(lambda: connected.returned == ["broken"])

    run(play())


@pytest.mark.parametrize("end", [lambda each: each.transport.receive_eof(), lambda each: each.link.advance(10)])
def test_a_task_is_cancelled_when_its_wait_ends(end: Callable[[Connected], None]) -> None:
    async def play() -> None:
        connected = Connected()
        ends: list[str] = []

        async def long() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ends.append("cancelled")

        async def handler() -> str:
            try:
                await connected.client.run(long(), 10, QUEUE_TIMEOUT)
            except (GatewayError, PeerGone):
                return "ended"
            return "never"

        connected.run(handler())
        await asyncio.sleep(0)
        end(connected)
        assert connected.returned == ["ended"]
        await turns_until(lambda: ends == ["cancelled"])

    run(play())


# --- Heads ---


@each_feed
def test_a_head_may_arrive_in_pieces(feed: Feed) -> None:
    connected = Connected()
    head = connected.head()
    for piece in feed(GET):
        assert outcome(head) == "waiting"
        connected.transport.receive(piece)
    assert head.result() == GET
    assert not connected.client.has_unread


def test_the_part_of_a_head_that_has_come_can_be_read() -> None:
    connected = Connected()
    connected.head()
    connected.transport.receive(GET[:9])
    assert (connected.client.partial_head, connected.client.has_unread) == (GET[:9], True)


def test_what_follows_a_head_is_kept() -> None:
    connected = Connected()
    head = connected.head()
    connected.transport.receive(GET + b"rest")
    connected.transport.receive(b" and more")
    assert head.result() == GET
    assert (connected.client.buffered_bytes, connected.client.has_unread) == (13, True)


def test_a_pipelined_head_comes_in_the_loops_next_iteration() -> None:
    """So that other clients are served in between."""

    async def play() -> None:
        connected = Connected()
        connected.head()
        connected.transport.receive(GET * 2)
        head = connected.head()
        assert outcome(head) == "waiting"
        await turns_until(lambda: head.done)
        assert head.result() == GET
        assert not connected.client.has_unread

    run(play())


def test_half_of_a_pipelined_head_waits_for_the_rest() -> None:
    async def play() -> None:
        connected = Connected()
        connected.head()
        connected.transport.receive(GET + GET[:10])
        head = connected.head()
        await turns_until(lambda: not connected.client.buffered_bytes)
        assert (outcome(head), connected.client.has_unread) == ("waiting", True)
        connected.transport.receive(GET[10:])
        assert head.result() == GET

    run(play())


def test_a_pipelined_head_is_not_read_for_a_wait_that_has_ended() -> None:
    async def play() -> None:
        connected = Connected()
        connected.head()
        connected.transport.receive(GET * 2)
        head = connected.head()
        connected.client.cancel_wait(PeerGone())
        await asyncio.sleep(0)
        assert outcome(head) is PeerGone
        assert connected.client.buffered_bytes == len(GET)

    run(play())


def test_a_wrong_head_is_an_error() -> None:
    connected = Connected(limits=Limits(request_line_bytes=20))
    head = connected.head()
    connected.transport.receive(b"GET /" + b"x" * 20)
    assert outcome(head) is URI_TOO_LONG
    connected.transport.receive(b"more")  # it is no head's any more
    assert connected.client.buffered_bytes == 4


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r"])
def test_a_client_that_begins_no_head_is_not_told(before: bytes) -> None:
    connected = Connected()
    head = connected.head(idle_s=75, whole_s=10)
    if before:
        connected.transport.receive(before)
    connected.link.advance(74.75)
    assert outcome(head) == "waiting"
    connected.link.advance(0.25)
    assert outcome(head) is PeerGone


def test_a_head_that_has_begun_must_be_whole_in_its_own_time() -> None:
    connected = Connected()
    head = connected.head(idle_s=75, whole_s=10)
    connected.link.advance(74)
    connected.transport.receive(GET[:5])
    for _ in range(9):
        connected.link.advance(1)
        connected.transport.receive(b"x")  # more bytes give it no more time
    assert outcome(head) == "waiting"
    connected.link.advance(1)
    assert outcome(head) is REQUEST_TIMEOUT


def test_a_client_that_leaves_ends_the_wait_for_its_head() -> None:
    connected = Connected()
    head = connected.head()
    connected.transport.receive_eof()
    assert outcome(head) is PeerGone


# What is counted as held

UNCOUNTED_BYTES = 4096


def test_a_head_counts_while_it_is_not_whole() -> None:
    connected = Connected()
    head = connected.head()
    connected.transport.receive(b"GET / HTTP/1.1\r\nA: " + b"x" * 4000)
    assert connected.unread_bytes == 0
    for number in range(1, 4):
        connected.transport.receive(b"\r\nA: " + b"x" * 4995)
        assert connected.unread_bytes == 19 + 4000 + number * 5000 - UNCOUNTED_BYTES
    connected.transport.receive(b"\r\n\r\n" + b"y" * 5000)
    assert head.done
    assert connected.unread_bytes == 5000 - UNCOUNTED_BYTES  # of what follows it
    assert connected.client.take_body_if_received(5000) is not None
    connected.head()
    connected.transport.receive(GET)
    assert connected.unread_bytes == 0


@pytest.mark.parametrize("end", [MemoryTransport.receive_eof, MemoryTransport.lose])
def test_what_a_client_leaves_behind_counts_no_more(end: Callable[[MemoryTransport], None]) -> None:
    for raw in (b"GET / HTTP/1.1\r\nA: " + b"x" * 8000, GET + GET * 1000):
        connected = Connected()
        connected.head()
        connected.transport.receive(raw)
        assert connected.unread_bytes > 0
        end(connected.transport)
        connected.transport.lose()
        assert connected.unread_bytes == 0


def test_a_head_that_there_is_no_memory_for_is_an_error() -> None:
    connected = Connected()
    connected.most_unread = 3000
    head = connected.head()
    connected.transport.receive(b"GET / HTTP/1.1\r\nA: " + b"x" * 7000)
    assert outcome(head) == "waiting"
    connected.transport.receive(b"x" * 1000)
    assert outcome(head) is MEMORY_FULL
    connected.client.close(unread=True, flush_s=0)
    assert connected.unread_bytes == 0


def test_requests_that_there_is_no_memory_for_end_the_connection() -> None:
    connected = Connected()
    connected.most_unread = 3000
    connected.waiting()
    connected.transport.receive(b"x" * 7000)
    assert connected.transport.state == OPEN
    connected.transport.receive(b"x" * 1000)
    assert (connected.returned, connected.transport.state) == ([PeerGone], ABORTED)


# What is sent while a request is served


def test_too_much_of_a_pipelining_client_stays_in_the_kernel() -> None:
    connected = Connected()
    connected.transport.receive(b"x" * PIPELINED_BYTES)
    assert (connected.transport.reading, connected.client.reading_paused) == (True, False)
    connected.transport.receive(b"x")
    assert (connected.transport.reading, connected.client.reading_paused) == (False, True)


def test_reading_goes_on_once_the_buffer_has_room() -> None:
    connected = Connected()
    connected.transport.receive(b"x" * (PIPELINED_BYTES + 10))
    assert connected.client.take_body_if_received(9) == b"x" * 9
    assert not connected.transport.reading
    assert connected.client.take_body_if_received(1) == b"x"
    assert (connected.transport.reading, connected.client.reading_paused) == (True, False)
    assert not connected.client.wants_tick


def test_the_next_head_makes_room() -> None:
    async def play() -> None:
        connected = Connected()
        connected.head()
        connected.transport.receive(GET + b"POST /" + b"x" * (PIPELINED_BYTES + 10))
        assert not connected.transport.reading
        head = connected.head()
        await turns_until(lambda: head.done)
        assert outcome(head) is URI_TOO_LONG
        assert connected.transport.reading

    run(play())


def test_a_head_that_is_waited_for_is_read() -> None:
    """A body took the whole buffer, exactly: nothing has resumed the reading."""
    connected = Connected()
    connected.transport.receive(b"x" * (PIPELINED_BYTES + 1))
    assert connected.client.take_body_if_received(PIPELINED_BYTES + 1) is not None
    assert not connected.transport.reading
    connected.head()
    assert connected.transport.reading


@pytest.mark.parametrize(("leaves", "ended"), [(socket.socket.close, True), (lambda each: None, False)])
def test_a_client_that_leaves_while_its_bytes_are_not_read_is_noticed(
    leaves: Callable[[socket.socket], None], ended: bool
) -> None:
    ours, theirs = socket.socketpair()  # only the kernel knows
    with ours, theirs:
        connected = Connected(MemoryTransport(sock=ours))
        connected.waiting()
        connected.transport.receive(b"x" * (PIPELINED_BYTES + 1))
        leaves(theirs)
        connected.link.advance(0.25)
        assert connected.returned == ([PeerGone] if ended else [])
        assert connected.transport.state == (ABORTED if ended else OPEN)


def test_the_kernel_knows_that_a_peer_has_half_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = MemoryTransport(sock=ours)
        theirs.send(b"unread")
        assert not peer_has_closed(transport)
        theirs.shutdown(socket.SHUT_WR)
        assert peer_has_closed(transport)


# What is held of clients without a request is counted


def refuse_more(count: int) -> None:
    """The memory for it is used up."""
    if count > 0:
        raise GatewayError(MEMORY_FULL)


USUAL_BYTES = 4096  # that need not be counted
LONG = GET.replace(b"Host: a", b"Host: a\r\nA: " + b"b" * USUAL_BYTES)


def test_a_long_head_is_counted_until_it_is_whole() -> None:
    counts: list[int] = []
    client = Link().client(count_unread=counts.append)
    head: Waiter[bytes] = Waiter()
    client.expect_head(head, 75, 10)
    end_of(client).receive(LONG[:USUAL_BYTES])
    assert counts == []
    end_of(client).receive(LONG[USUAL_BYTES : USUAL_BYTES + 9])
    assert counts == [9]
    end_of(client).receive(LONG[USUAL_BYTES + 9 :])
    assert (head.result(), sum(counts)) == (LONG, 0)


def test_a_head_beyond_the_memory_budget_is_an_error() -> None:
    client = Link().client(count_unread=refuse_more)
    head: Waiter[bytes] = Waiter()
    client.expect_head(head, 75, 10)
    end_of(client).receive(LONG[: USUAL_BYTES + 1])
    assert outcome(head) is MEMORY_FULL


def test_a_client_that_pipelines_what_there_is_no_memory_for_is_hung_up() -> None:
    """No error can be sent: a response may be on its way."""
    client = Link().client(count_unread=refuse_more)
    end_of(client).receive(LONG)
    assert end_of(client).state == ABORTED


# --- Bodies ---


@pytest.mark.parametrize(
    ("length", "taken", "left"), [(0, b"", b"hello"), (4, b"hell", b"o"), (5, b"hello", b""), (6, None, b"hello")]
)
def test_a_body_is_taken_if_all_of_it_is_there(length: int, taken: bytes | None, left: bytes) -> None:
    connected = Connected()
    connected.transport.receive(b"hello")
    assert connected.client.take_body_if_received(length) == taken
    assert connected.client.buffered_bytes == len(left)


class Body:
    """A body, the handler that reads it, and how it ended."""

    def __init__(
        self, connected: Connected, length: int | None, limits: Limits | None = None, least_rate: int = 0
    ) -> None:
        self.body = RequestBody(length, limits or Limits())
        self._least_rate = least_rate
        self.counts: list[int] = []
        self.most = 1 << 30
        self._client = connected.client
        connected.run(self._read())

    async def _read(self) -> object:
        try:
            await self._client.read_body(self.body, 10, self._least_rate, self._count)
        except GatewayError as error:
            return error.kind
        except PeerGone:
            return PeerGone
        return b"".join(self.body.pieces)

    def _count(self, count: int) -> None:
        self.counts.append(count)
        if sum(self.counts) > self.most:
            raise GatewayError(MEMORY_FULL)


@pytest.mark.parametrize(("length", "raw"), [(5, b"hello"), (None, b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")])
@each_feed
def test_a_body_may_arrive_in_pieces(feed: Feed, length: int | None, raw: bytes) -> None:
    connected = Connected()
    body = Body(connected, length)
    for piece in feed(raw):
        assert connected.returned == []
        connected.transport.receive(piece)
    assert connected.returned == [b"hello"]
    assert sum(body.counts) == 5


def test_what_was_received_with_the_head_belongs_to_the_body() -> None:
    connected = Connected()
    connected.transport.receive(b"he")
    Body(connected, 5)
    assert (connected.returned, connected.client.buffered_bytes) == ([], 0)
    connected.transport.receive(b"llo")
    assert connected.returned == [b"hello"]


def test_what_follows_the_body_is_kept() -> None:
    connected = Connected()
    Body(connected, 5)
    connected.transport.receive(b"hello" + GET)
    assert connected.returned == [b"hello"]
    assert connected.client.take_body_if_received(len(GET)) == GET


def test_reading_a_body_resumes_a_paused_transport() -> None:
    connected = Connected()
    connected.transport.receive(b"x" * (PIPELINED_BYTES + 1))
    Body(connected, PIPELINED_BYTES + 2)
    assert connected.transport.reading
    assert connected.client.wants_tick  # the wait renews
    connected.transport.receive(b"x")
    assert connected.returned == [b"x" * (PIPELINED_BYTES + 2)]


def test_a_wait_that_renews_goes_on_noticing_a_client_that_is_not_read() -> None:
    connected = Connected()
    waiter = connected.waiting(10, QUEUE_TIMEOUT, renewing=True)
    connected.transport.receive(b"x" * (PIPELINED_BYTES + 1))
    waiter.set_result("result")
    assert connected.client.wants_tick


def test_a_malformed_body_is_an_error_and_what_follows_is_not_read() -> None:
    connected = Connected()
    Body(connected, None)
    connected.transport.receive(b"x\r\n")
    assert connected.returned == [BAD_REQUEST]


def test_a_body_beyond_the_limit_is_an_error() -> None:
    connected = Connected()
    Body(connected, None, Limits(body_bytes=4))
    connected.transport.receive(b"5\r\n")
    assert connected.returned == [PAYLOAD_TOO_LARGE]


def test_a_body_that_there_is_no_memory_for_is_an_error() -> None:
    connected = Connected()
    body = Body(connected, 5)
    body.most = 3
    connected.transport.receive(b"hel")
    assert connected.returned == []
    connected.transport.receive(b"l")
    assert connected.returned == [MEMORY_FULL]


def test_each_piece_gives_a_body_more_time() -> None:
    connected = Connected()
    Body(connected, 5)
    for piece in (b"h", b"e", b"l", b"l"):
        connected.transport.receive(piece)
        connected.link.advance(9.5)  # the tick renews what the piece has earned
    connected.link.advance(9.75)
    assert connected.returned == []
    connected.link.advance(0.25)
    assert connected.returned == [REQUEST_TIMEOUT]


def test_a_body_below_the_least_rate_gets_so_much_time_and_no_more() -> None:
    connected = Connected()
    Body(connected, 5, least_rate=1)
    for piece in (b"h", b"e"):
        connected.transport.receive(piece)
        connected.link.advance(5)
    connected.transport.receive(b"l")
    connected.link.advance(2.75)  # 10 s, and one for each byte
    assert connected.returned == []
    connected.link.advance(0.25)
    assert connected.returned == [REQUEST_TIMEOUT]


def test_a_body_above_the_least_rate_gets_more_time() -> None:
    connected = Connected()
    Body(connected, 30, least_rate=1)
    for _ in range(10):
        connected.transport.receive(b"123")
        assert connected.returned in ([], [b"123" * 10])
        connected.link.advance(2.75)
    assert connected.returned == [b"123" * 10]


def test_a_large_chunked_body_is_not_read_on_before_it_is_taken() -> None:
    async def play() -> None:
        connected = Connected()
        Body(connected, None)
        connected.transport.receive(encode_chunk(b"x") * 20_000 + b"0\r\n\r\n")
        assert (connected.transport.reading, connected.returned) == (False, [])
        await turns_until(lambda: connected.returned)
        assert connected.returned == [b"x" * 20_000]
        assert connected.transport.reading

    run(play())


def test_the_rate_of_a_body_does_not_outlast_it() -> None:
    connected = Connected()
    Body(connected, 2, least_rate=1)
    connected.transport.receive(b"xx")
    waiter = connected.waiting(100, QUEUE_TIMEOUT, renewing=True)
    for _ in range(10):
        connected.link.advance(50)
        connected.client.saw_activity = True
    waiter.set_result("result")
    assert connected.returned == [b"xx", "result"]


def test_a_client_that_leaves_ends_its_body() -> None:
    connected = Connected()
    Body(connected, 5)
    connected.transport.receive(b"hel")
    connected.transport.receive_eof()
    assert connected.returned == [PeerGone]


# --- The end ---


def test_a_lost_connection_is_reported_once() -> None:
    connected = Connected()
    losses: list[str] = []
    connected.client.on_lost = lambda: losses.append("lost")
    connected.transport.receive_eof()
    connected.client.connection_lost(None)
    assert losses == ["lost"]


# A client that has taken what it was sent


def test_a_drain_is_over_when_the_client_reads_again() -> None:
    connected = Connected()
    waiter: Waiter[None] = Waiter()
    connected.client.pause_writing()
    connected.client.expect_drain(waiter, 300)
    assert outcome(waiter) == "waiting"
    connected.client.resume_writing()
    assert outcome(waiter) is None
    connected.link.advance(1e6)
    assert connected.transport.state == OPEN


def test_a_drain_has_a_time_out() -> None:
    connected = Connected()
    waiter: Waiter[None] = Waiter()
    connected.client.expect_drain(waiter, 300)
    connected.link.advance(300)
    assert outcome(waiter) is PeerGone
    connected.client.resume_writing()  # it is too late


def test_another_wait_does_not_end_when_the_client_reads_again() -> None:
    connected = Connected()
    connected.waiting()
    connected.client.resume_writing()
    assert connected.returned == []


def draining(connected: Connected, seconds: float = 30) -> None:
    """Start a handler that writes and waits until its client takes it."""

    async def handler() -> object:
        try:
            connected.client.write(b"x" * 70_000)
            await connected.client.drain(seconds)
        except Exception as error:
            return type(error)
        return "drained"

    connected.run(handler())


def test_a_handler_need_not_wait_for_a_client_that_reads() -> None:
    connected = Connected()
    draining(connected)
    assert connected.returned == ["drained"]
    assert len(connected.transport.take()) == 70_000


def test_a_handler_waits_until_its_client_reads_again() -> None:
    async def play() -> None:
        connected = Connected()
        connected.transport.stall()
        draining(connected)
        assert connected.returned == []
        connected.transport.take_unsent()
        assert connected.returned == [], "it could close the transport within a call of the transport's"
        await turns_until(lambda: connected.returned)
        assert connected.returned == ["drained"]
        connected.waiting()
        connected.client.resume_writing()
        await asyncio.sleep(0.1)
        assert connected.returned == ["drained"]

    run(play())


@pytest.mark.parametrize(
    "end", [lambda c: c.link.advance(30), lambda c: c.transport.lose(), lambda c: c.client.hang_up()]
)
def test_a_handler_does_not_wait_for_ever(end: Callable[[Connected], None]) -> None:
    connected = Connected()
    connected.transport.stall()
    draining(connected)
    end(connected)
    assert connected.returned == [PeerGone]


def test_a_handler_does_not_write_on_after_the_end() -> None:
    connected = Connected()
    connected.client.hang_up()
    draining(connected)
    assert connected.returned == [PeerGone]


# A response that is not whole

RESET_AT_CLOSE = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_response_can_be_cut_by_a_reset() -> None:
    connected = Connected()
    connected.client.write(b"half")
    connected.client.truncate(reset=True, flush_s=300)
    assert (connected.transport.written, connected.transport.state) == ([b"half"], ABORTED)
    assert connected.transport.sock.options == [RESET_AT_CLOSE]  # type: ignore[attr-defined]


def test_a_response_can_be_cut_by_a_close() -> None:
    connected = Connected()
    connected.transport.receive(b"not read")
    connected.client.write(b"half")
    connected.client.truncate(reset=False, flush_s=300)
    assert (connected.transport.written, connected.transport.state) == ([b"half"], CLOSING)
    assert connected.transport.sock.options == []  # type: ignore[attr-defined]


# A response that is whole


def test_a_close_sends_what_is_waiting_first() -> None:
    connected = Connected()
    connected.client.write(b"whole")
    connected.client.close(unread=False, flush_s=300)
    assert (connected.transport.written, connected.transport.state) == ([b"whole"], CLOSING)
    assert connected.client.ended


@pytest.mark.parametrize(
    ("flush_s", "seconds", "state"), [(300, 299, CLOSING), (300, 300, ABORTED), (0, 0.25, ABORTED)]
)
def test_the_last_bytes_may_take_so_long(flush_s: float, seconds: float, state: str) -> None:
    connected = Connected()
    connected.client.close(unread=False, flush_s=flush_s)
    connected.link.advance(seconds)
    assert connected.transport.state == state


# A client that is still sending what will not be read


def lingering(transport: MemoryTransport | None = None, *, stalled: bool = False, flush_s: float = 300) -> Connected:
    connected = Connected(transport)
    if stalled:
        connected.transport.stall()
    connected.client.write(b"413")
    connected.client.close(unread=True, flush_s=flush_s)
    return connected


def test_a_client_that_is_still_sending_reads_its_response_first() -> None:
    connected = lingering()
    assert (connected.transport.written, connected.transport.state) == ([b"413"], OPEN)
    assert (connected.transport.wrote_eof, connected.client.ended) == (True, True)
    connected.transport.receive(b"discarded")
    connected.transport.receive_eof()
    assert (connected.transport.state, connected.client.buffered_bytes) == (LOST, 0)


def test_received_bytes_that_were_not_read_have_the_same_effect() -> None:
    connected = Connected()
    connected.transport.receive(b"not read")
    connected.client.close(unread=False, flush_s=300)
    assert (connected.transport.wrote_eof, connected.transport.state) == (True, OPEN)


@pytest.mark.parametrize(
    ("stalled", "flush_s", "seconds", "state"),
    [
        (False, 300, 4.75, OPEN),
        (False, 300, 5.0, ABORTED),
        (False, 0, 5.0, ABORTED),
        (True, 300, 299.0, OPEN),
        (True, 300, 300.0, ABORTED),
        (True, 0, 0.25, ABORTED),
    ],
)
def test_a_silent_client_lingers_for_a_moment_or_as_long_as_the_response_may_take(
    stalled: bool, flush_s: float, seconds: float, state: str
) -> None:
    connected = lingering(stalled=stalled, flush_s=flush_s)
    connected.link.advance(seconds)
    assert connected.transport.state == state


def test_it_discards_any_amount_for_so_long_and_no_longer() -> None:
    connected = lingering()
    for seconds in (4.75,) * 6 + (1.25,):
        connected.transport.receive(b"x" * (1 << 20))
        connected.link.advance(seconds)
        assert (connected.transport.state, connected.client.lingers) == (OPEN, True)
    connected.transport.receive(b"x")
    connected.link.advance(0.25)
    assert connected.transport.state == ABORTED


def test_a_linger_can_be_shortened_and_not_lengthened() -> None:
    connected = lingering()
    connected.client.shorten_linger(2)
    connected.client.shorten_linger(20)
    connected.transport.receive(b"x")
    connected.link.advance(1.75)
    assert connected.transport.state == OPEN
    connected.transport.receive(b"x")
    connected.link.advance(0.25)
    assert connected.transport.state == ABORTED


def test_a_paused_transport_is_read_to_its_end() -> None:
    connected = Connected()
    connected.transport.receive(b"x" * (PIPELINED_BYTES + 1))
    connected.client.close(unread=True, flush_s=300)
    assert (connected.transport.reading, connected.client.reading_paused) == (True, False)


def test_tls_cannot_half_close() -> None:
    connected = lingering(MemoryTransport(half_closes=False))
    assert (connected.transport.wrote_eof, connected.transport.state) == (False, OPEN)


def test_a_connection_that_is_closing_already_is_left_alone() -> None:
    transport = MemoryTransport()
    transport.close()
    connected = lingering(transport)
    assert (transport.wrote_eof, connected.transport.state) == (False, CLOSING)


def test_a_client_that_has_reset_its_connection_does_not_matter() -> None:
    class Reset(MemoryTransport):
        def write_eof(self) -> None:
            raise OSError("Transport endpoint is not connected")

    connected = lingering(Reset())
    assert connected.transport.state == ABORTED
