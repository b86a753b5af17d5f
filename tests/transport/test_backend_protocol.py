"""backend_protocol.py: response heads, bytes that nothing asked for, and connections that were closed meanwhile."""

import asyncio
import gc
import select
import socket
import struct
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import BACKEND_MALFORMED, BACKEND_UNAVAILABLE, GatewayError
from support.feeds import FEEDS, Feed, halves
from support.gateway import until
from support.memory_transport import ABORTED, ESTABLISHED, OPEN, Link, MemoryTransport, end_of, outcome
from transport.backend_protocol import BackendProtocol, Missed
from transport.tcp import CLOSED as TCP_CLOSED
from transport.waiter import Waiter

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
each_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


class Asked:
    """A connection on which a request has been sent."""

    def __init__(self, max_head_bytes: int = 65536) -> None:
        self.link = Link()
        self.transport = MemoryTransport()
        self.backend = self.link.backend(self.transport, max_head_bytes)
        self.head = self.backend.send_request(REQUEST)

    def next_head(self) -> Waiter[bytes]:
        return self.backend.expect_head()


# --- Heads ---


def test_a_request_is_sent_and_its_response_head_comes_back() -> None:
    asked = Asked()
    assert asked.link.sent(asked.backend) == REQUEST
    assert outcome(asked.head) == "waiting"
    asked.transport.receive(HEAD)
    assert asked.head.result() == HEAD
    assert asked.backend.received == b""


@each_feed
def test_a_head_may_arrive_in_pieces(feed: Feed) -> None:
    asked = Asked()
    for piece in feed(HEAD):
        assert outcome(asked.head) == "waiting"
        asked.transport.receive(piece)
    assert asked.head.result() == HEAD


def test_what_follows_the_head_is_kept_wherever_the_pieces_end() -> None:
    for pieces in halves(HEAD + b"hello"):
        asked = Asked()
        for piece in filter(None, pieces):
            asked.transport.receive(piece)
        assert asked.head.result() == HEAD
        assert asked.backend.take_received() == b"hello"
        assert asked.backend.received == b""


def test_the_next_head_may_have_been_received() -> None:
    asked = Asked()
    asked.transport.receive(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"hello")
    assert asked.head.result() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert asked.next_head().result() == HEAD
    assert asked.backend.received == b"hello"


def test_the_next_head_may_come_later() -> None:
    asked = Asked()
    asked.transport.receive(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD[:9])
    head = asked.next_head()
    assert outcome(head) == "waiting"
    asked.transport.receive(HEAD[9:])
    assert head.result() == HEAD


def test_a_head_of_the_greatest_length_is_accepted() -> None:
    asked = Asked(max_head_bytes=len(HEAD) - 4)
    asked.transport.receive(HEAD)
    assert asked.head.result() == HEAD


@each_feed
def test_a_longer_head_is_refused(feed: Feed) -> None:
    asked = Asked(max_head_bytes=len(HEAD) - 5)
    for piece in feed(HEAD):
        asked.transport.receive(piece)
    with pytest.raises(GatewayError, match=r"MAX_RESPONSE_HEADER_SIZE \(33 bytes\)") as error:
        asked.head.result()
    assert error.value.kind is BACKEND_MALFORMED


def test_a_head_without_end_is_refused_as_soon_as_it_is_too_long() -> None:
    asked = Asked(max_head_bytes=20)
    asked.transport.receive(HEAD[:20])
    assert outcome(asked.head) == "waiting"
    asked.transport.receive(HEAD[20:21])
    assert outcome(asked.head) is BACKEND_MALFORMED


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH_9.2\r\n", b"H\r\n\r", b"HTTP/2 200\r\n", b"\r\n"])
def test_what_is_not_http_is_refused_at_once(data: bytes) -> None:
    asked = Asked()
    asked.transport.receive(data)
    assert outcome(asked.head) is BACKEND_MALFORMED


@pytest.mark.parametrize(
    "pieces", [[b"HTTP/1.1 200 OK\nA: b\n"], [b"HTTP/1.1 200 OK", b"\n"], [b"HTTP/1.1 200 OK\r\nA", b": b\n"]]
)
def test_a_line_that_does_not_end_with_crlf_is_refused_at_once(pieces: list[bytes]) -> None:
    asked = Asked()
    for piece in pieces:
        assert outcome(asked.head) == "waiting"
        asked.transport.receive(piece)
    assert outcome(asked.head) is BACKEND_MALFORMED


@pytest.mark.parametrize("data", [b"H", b"HTTP/1.", b"HTTP/1.1 200"])
def test_what_may_become_http_is_waited_for(data: bytes) -> None:
    asked = Asked()
    asked.transport.receive(data)
    assert outcome(asked.head) == "waiting"


# --- The end ---


@pytest.mark.parametrize("before", [b"", HEAD[:20]])
@pytest.mark.parametrize("end", [MemoryTransport.receive_eof, lambda transport: transport.lose(ConnectionResetError())])
def test_a_backend_that_closes_before_its_head_is_unavailable(
    before: bytes, end: Callable[[MemoryTransport], None]
) -> None:
    asked = Asked()
    if before:
        asked.transport.receive(before)
    end(asked.transport)
    with pytest.raises(GatewayError, match=r"^The backend closed before it answered\.$") as error:
        asked.head.result()
    assert error.value.kind is BACKEND_UNAVAILABLE


def test_a_request_on_a_connection_that_has_ended_fails_at_once() -> None:
    link = Link()
    backend = link.backend()
    end_of(backend).receive_eof()
    head = backend.send_request(REQUEST)
    assert outcome(head) is BACKEND_UNAVAILABLE


def test_the_next_head_on_a_connection_that_has_ended_fails_at_once() -> None:
    asked = Asked()
    asked.transport.receive(HEAD)
    asked.transport.receive_eof()
    assert outcome(asked.next_head()) is BACKEND_UNAVAILABLE


def test_a_head_that_came_before_the_end_counts() -> None:
    asked = Asked()
    asked.transport.receive(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD)
    asked.transport.receive_eof()
    assert asked.next_head().result() == HEAD


def test_a_lost_connection_is_reported_to_its_owner_once() -> None:
    asked = Asked()
    lost: list[BackendProtocol] = []
    asked.backend.on_lost = lost.append
    asked.transport.receive_eof()
    assert lost == [asked.backend]
    asked.backend.connection_lost(None)
    assert lost == [asked.backend]


# --- Bodies, and bytes that nothing asked for ---


def test_bytes_before_anything_takes_them_are_kept() -> None:
    asked = Asked()
    asked.transport.receive(HEAD + b"he")
    asked.transport.receive(b"llo")
    assert asked.backend.take_received() == b"hello"


def test_bytes_go_to_the_sink_and_the_end_is_reported() -> None:
    asked = Asked()
    asked.transport.receive(HEAD)
    pieces: list[bytes] = []
    ends: list[bool] = []
    asked.backend.pass_to(pieces.append, ends.append)
    asked.transport.receive(b"he")
    asked.transport.receive(b"llo")
    asked.transport.receive_eof()
    assert (pieces, ends, asked.backend.received) == ([b"he", b"llo"], [True], b"")


def test_a_lost_connection_lets_go_of_its_sink() -> None:
    class Sink:
        def __init__(self, backend: BackendProtocol) -> None:
            self.backend = backend

        def feed(self, data: bytes) -> None:
            raise AssertionError

    asked = Asked()
    sink: Any = Sink(asked.backend)
    asked.backend.pass_to(sink.feed, lambda cleanly: None)
    asked.transport.lose()
    gc.disable()
    try:
        gone = weakref.ref(sink)
        del sink
        assert gone() is None
    finally:
        gc.enable()


# --- Requests that are given up ---


def test_a_request_that_is_given_up_ends_when_the_backend_closes() -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.backend.give_up(600)
    assert (asked.transport.wrote_eof, asked.transport.state, asked.backend.ended) == (True, OPEN, False)
    asked.transport.receive(HEAD)
    asked.transport.receive(b"hello")  # which nobody gets
    assert not asked.backend.ended
    assert asked.backend.late_end == HEAD + b"hello"
    asked.transport.receive(b"x" * 9000 + b"end")
    assert asked.backend.late_end == b"x" * 4093 + b"end"
    asked.transport.receive_eof()
    assert asked.backend.ended
    assert not asked.head.done


def test_a_request_that_is_given_up_is_waited_for_so_long() -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.backend.give_up(600)
    asked.link.advance(599)
    assert not asked.backend.ended
    asked.link.advance(1)
    assert (asked.backend.ended, asked.transport.state) == (True, ABORTED)


def test_a_request_that_has_not_been_sent_is_never_sent() -> None:
    asked = Asked()
    asked.backend.give_up(600)
    asked.link.batcher.flush()
    assert (asked.transport.written, asked.transport.state, asked.backend.ended) == ([], ABORTED, True)


def test_a_request_of_which_a_part_has_not_been_sent_is_cut() -> None:
    asked = Asked()
    asked.transport.stall()
    asked.link.batcher.flush()
    asked.backend.give_up(600)
    assert (asked.transport.wrote_eof, asked.transport.state, asked.backend.ended) == (False, ABORTED, True)


def test_a_response_that_has_begun_is_cut() -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.transport.receive(HEAD)
    asked.backend.give_up(600)
    assert (asked.transport.wrote_eof, asked.transport.state) == (False, ABORTED)


def test_a_response_that_is_left_already_is_not_cut() -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.transport.receive(HEAD)
    asked.backend.leave(lambda data: None, lambda cleanly: None, 5)
    asked.backend.give_up(600)
    assert (asked.transport.wrote_eof, asked.transport.state) == (True, OPEN)


def test_a_connection_that_was_reset_before_that_is_read_is_left_without_an_error() -> None:
    """Reading may be paused, for a client that reads slowly."""

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            peer, _ = listener.accept()
        link, ended = Link(), list[bool]()
        backend = BackendProtocol(writer, link.ticker, link.batcher, 65536, link.activity)
        backend.send_request(REQUEST)
        link.batcher.flush()
        backend.transport.pause_reading()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        poll = select.poll()
        poll.register(writer.get_extra_info("socket").fileno(), 0)
        assert poll.poll(5000), "the reset has not come"
        backend.leave(lambda data: None, ended.append, 600)
        assert ended == []
        await until(lambda: ended)
        assert (backend.ended, len(ended)) == (True, 1)

    asyncio.run(play())


def test_a_large_request_goes_out_as_the_backend_takes_it() -> None:
    link, transport = Link(), MemoryTransport()
    backend = link.backend(transport)
    transport.stall()
    pieces = [bytes([number]) * 50_000 for number in range(4)]
    backend.send_request((REQUEST, *pieces))
    assert link.sent(backend) == REQUEST + pieces[0] + pieces[1]
    transport.take_unsent()
    assert link.sent(backend) == pieces[2] + pieces[3]


def test_a_large_request_on_an_ended_connection_is_not_sent() -> None:
    link, transport = Link(), MemoryTransport()
    backend = link.backend(transport)
    transport.receive_eof()
    head = backend.send_request((REQUEST, b"body"))
    assert isinstance(head.error, GatewayError)
    assert (backend.missed, link.sent(backend)) == (Missed.SURELY, b"")


def test_a_large_request_that_is_given_up_unsent_never_goes_out() -> None:
    asked = Asked()
    asked.link.sent(asked.backend)
    asked.transport.receive(HEAD)
    asked.backend.park(3.5)
    asked.backend.send_request((REQUEST, b"body"))
    asked.backend.give_up(5)
    assert (asked.transport.state, asked.link.sent(asked.backend)) == (ABORTED, b"")


class Piece(bytearray):
    """One that can be seen to be gone."""


def test_a_large_request_is_let_go_with_its_connection() -> None:
    link, transport = Link(), MemoryTransport()
    backend = link.backend(transport)
    transport.stall()
    pieces = [Piece(100_000), Piece(100_000)]
    gone = weakref.ref(pieces[1])
    backend.send_request((REQUEST, *pieces))
    link.sent(backend)
    transport.lose()
    pieces.clear()
    gc.collect()
    assert gone() is None


def test_a_backend_that_sends_without_a_request_is_aborted() -> None:
    backend = Link().backend()
    end_of(backend).receive(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert end_of(backend).state == ABORTED


def test_any_byte_is_activity() -> None:
    asked = Asked()
    assert not asked.link.activity.seen
    asked.transport.receive(b"H")
    assert asked.link.activity.seen


# --- Kept connections ---


def parked() -> Asked:
    """A connection that has carried one request and waits for the next."""
    asked = Asked()
    asked.transport.receive(HEAD)
    asked.backend.pass_to(lambda data: None, lambda cleanly: None)
    asked.backend.park(3.5)
    return asked


def test_bytes_on_a_parked_connection_abort_it() -> None:
    asked = parked()
    asked.transport.receive(b"x")
    assert asked.transport.state == ABORTED


def test_a_parked_connection_keeps_nothing_of_the_last_response() -> None:
    asked = Asked()
    asked.transport.receive(HEAD + b"hello")
    asked.backend.park(3.5)
    assert asked.backend.received == b""


@pytest.mark.parametrize(("seconds", "state"), [(3.25, OPEN), (3.5, ABORTED)])
def test_a_parked_connection_has_a_deadline(seconds: float, state: str) -> None:
    asked = parked()
    asked.link.advance(seconds)
    assert asked.transport.state == state


def test_a_request_ends_the_deadline() -> None:
    asked = parked()
    asked.backend.send_request(REQUEST)
    asked.link.advance(1000)
    assert asked.transport.state == OPEN


def sent_again(asked: Asked) -> Asked:
    asked.head = asked.backend.send_request(REQUEST)
    return asked


def reset(transport: MemoryTransport) -> None:
    transport.lose(ConnectionResetError())


each_end = pytest.mark.parametrize("end", [MemoryTransport.receive_eof, reset])


@pytest.mark.parametrize(
    ("end", "sent_ms", "missed"),
    [
        (MemoryTransport.receive_eof, 20, Missed.IF_ALIVE),
        (MemoryTransport.receive_eof, 21, Missed.NO),
        (reset, 20, Missed.PROBABLY),
        (reset, 21, Missed.NO),
    ],
)
def test_the_end_of_a_kept_connection_may_have_crossed_the_request(
    end: Callable[[MemoryTransport], None], sent_ms: int, missed: Missed
) -> None:
    """A process that dies later has read it: its kernel sends a FIN."""
    asked = sent_again(parked())
    asked.link.batcher.flush()
    asked.transport.sock.tcp = ESTABLISHED._replace(sent_ms=sent_ms)
    end(asked.transport)
    assert asked.backend.missed is missed


@each_end
def test_the_end_of_a_new_connection_crosses_nothing(end: Callable[[MemoryTransport], None]) -> None:
    asked = Asked()
    asked.link.batcher.flush()
    end(asked.transport)
    assert asked.backend.missed is Missed.NO


@each_end
def test_a_request_that_was_not_sent_was_not_read(end: Callable[[MemoryTransport], None]) -> None:
    """Nor is it sent afterwards."""
    asked = Asked()
    end(asked.transport)
    assert asked.backend.missed is Missed.SURELY
    assert asked.link.sent(asked.backend) == b""


def test_a_kept_connection_that_had_ended_before_the_request_is_never_sent_it() -> None:
    asked = parked()
    asked.link.batcher.flush()
    asked.transport.take()
    asked.transport.receive_eof()
    assert sent_again(asked).backend.missed is Missed.SURELY
    assert asked.link.sent(asked.backend) == b""


def test_a_request_that_the_kernel_has_no_room_for_was_not_read() -> None:
    asked = Asked()
    asked.transport.stall()
    asked.link.batcher.flush()
    asked.transport.receive_eof()
    assert asked.backend.missed is Missed.SURELY


@pytest.mark.parametrize("fields", [{"unacknowledged": 1}, {"state": TCP_CLOSED}])
def test_a_request_that_came_after_a_fin_was_not_read(fields: dict[str, int]) -> None:
    """The backend's kernel had not acknowledged it, or has answered it by a reset."""
    asked = Asked()
    asked.link.batcher.flush()
    asked.transport.sock.tcp = ESTABLISHED._replace(sent_ms=1000, **fields)
    asked.transport.receive_eof()
    assert asked.backend.missed is Missed.SURELY


def test_a_reset_connection_is_in_the_same_state_whatever_was_read() -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.transport.sock.tcp = ESTABLISHED._replace(state=TCP_CLOSED)
    reset(asked.transport)
    assert asked.backend.missed is Missed.NO


def test_a_request_of_whose_answer_a_part_has_come_was_read() -> None:
    asked = sent_again(parked())
    asked.link.batcher.flush()
    asked.transport.receive(HEAD[:5])
    asked.transport.receive_eof()
    assert asked.backend.missed is Missed.NO


def test_a_request_that_got_an_interim_response_was_read() -> None:
    asked = sent_again(parked())
    asked.link.batcher.flush()
    asked.transport.receive(b"HTTP/1.1 100 Continue\r\n\r\n")
    final = asked.next_head()
    asked.transport.receive_eof()
    assert outcome(final) is BACKEND_UNAVAILABLE
    assert asked.backend.missed is Missed.NO


@pytest.mark.parametrize(("end", "missed"), [(MemoryTransport.receive_eof, Missed.NO), (reset, Missed.SURELY)])
def test_a_unix_sockets_end_says_whether_the_request_was_read(
    end: Callable[[MemoryTransport], None], missed: Missed
) -> None:
    asked = Asked()
    asked.link.batcher.flush()
    asked.transport.sock.family = socket.AF_UNIX
    end(asked.transport)
    assert asked.backend.missed is missed


def test_a_connection_that_we_aborted_has_missed_nothing() -> None:
    asked = sent_again(parked())
    asked.link.batcher.flush()
    asked.backend.abort()
    reset(asked.transport)
    assert asked.backend.missed is Missed.NO
