"""peer_protocol.py: a connection's end, its back-pressure and its deadline."""

import pytest

from support.memory_transport import ABORTED, CLOSING, LOST, OPEN, Link, MemoryTransport, MemoryWriter
from transport.peer_protocol import PeerProtocol


class Peer(PeerProtocol):
    """Keeps the ticks."""

    def __init__(self, link: Link, transport: MemoryTransport) -> None:
        super().__init__(MemoryWriter(transport), transport, link.ticker, link.batcher)  # type: ignore[arg-type]
        self.ticks: list[float] = []
        self.ends: list[bool] = []
        self.on_end = self.ends.append

    def on_tick(self, now_s: float) -> None:
        self.ticks.append(now_s)


def connected() -> tuple[Link, MemoryTransport, Peer]:
    link, transport = Link(), MemoryTransport()
    return link, transport, Peer(link, transport)


def test_it_takes_the_place_of_the_streams_protocol() -> None:
    _, transport, peer = connected()
    assert transport.get_protocol() is peer
    assert (peer.ended, peer.ends, transport.state) == (False, [], OPEN)


# --- The end ---


def test_a_peer_that_half_closes_has_left() -> None:
    _, transport, peer = connected()
    assert peer.eof_received() is False
    assert (peer.ended, peer.closed_cleanly, peer.ends) == (True, True, [True])
    assert transport.state == OPEN  # asyncio closes it now


@pytest.mark.parametrize(("error", "cleanly"), [(None, True), (ConnectionResetError(), False)])
def test_a_lost_connection_ended_cleanly_unless_there_is_an_error(error: Exception | None, cleanly: bool) -> None:
    _, transport, peer = connected()
    transport.lose(error)
    assert (peer.ended, peer.closed_cleanly, peer.ends) == (True, cleanly, [cleanly])


def test_the_end_is_reported_once() -> None:
    _, transport, peer = connected()
    transport.receive_eof()
    assert (transport.state, peer.ends, peer.closed_cleanly) == (LOST, [True], True)


def test_a_lost_connection_releases_its_writer() -> None:
    _, transport, _ = connected()
    assert transport.previous.lost == 0
    transport.lose()
    assert transport.previous.lost == 1


def test_a_lost_connection_closes_its_transport() -> None:
    """Before Python 3.11 a TLS transport that its peer has ended does not count as closed."""
    _, transport, peer = connected()
    peer.connection_lost(None)
    assert transport.state == CLOSING


def test_an_abort_sends_what_is_waiting_first() -> None:
    link, transport, peer = connected()
    link.batcher.write((transport, b"last"))
    peer.abort()
    assert (transport.written, transport.state) == ([b"last"], ABORTED)


def test_an_abort_is_no_end_of_the_peers() -> None:
    _, transport, peer = connected()
    peer.abort()
    transport.lose()
    assert (peer.ended, peer.closed_cleanly, peer.ends) == (True, False, [])


# --- Back-pressure ---


def test_the_upstream_is_read_no_faster_than_the_peer_reads() -> None:
    link, _, peer = connected()
    upstream = MemoryTransport()
    peer.upstream = Peer(link, upstream)
    peer.pause_writing()
    assert (peer.write_paused, upstream.reading) == (True, False)
    peer.resume_writing()
    assert (peer.write_paused, upstream.reading) == (False, True)


def test_without_an_upstream_only_the_state_changes() -> None:
    _, transport, peer = connected()
    peer.pause_writing()
    assert (peer.write_paused, transport.reading) == (True, True)
    peer.resume_writing()
    assert not peer.write_paused


def test_the_upstream_of_a_lost_connection_is_read_again() -> None:
    link, transport, peer = connected()
    upstream = MemoryTransport()
    peer.upstream = Peer(link, upstream)
    peer.pause_writing()
    transport.lose()
    assert upstream.reading


# --- Time ---


def test_a_connection_without_a_deadline_stays() -> None:
    link, transport, peer = connected()
    peer.check_time(link.clock() + 1e9)
    assert transport.state == OPEN


@pytest.mark.parametrize(("left_s", "state"), [(0.001, OPEN), (0.0, ABORTED), (-5.0, ABORTED)])
def test_a_connection_is_aborted_at_its_deadline(left_s: float, state: str) -> None:
    link, transport, peer = connected()
    peer.deadline_s = link.clock() + left_s
    peer.check_time(link.clock())
    assert transport.state == state


def test_ticks_are_for_those_that_want_them() -> None:
    link, _, peer = connected()
    peer.check_time(link.clock())
    assert peer.ticks == []
    peer.wants_tick = True
    peer.check_time(link.clock())
    assert peer.ticks == [link.clock()]


def test_a_tick_may_put_off_the_deadline() -> None:
    class Renewing(Peer):
        def on_tick(self, now_s: float) -> None:
            self.deadline_s = now_s + 1

    link, transport = Link(), MemoryTransport()
    peer = Renewing(link, transport)
    peer.wants_tick = True
    peer.deadline_s = link.clock()
    peer.check_time(link.clock())
    assert transport.state == OPEN


def test_a_protocol_need_not_use_its_ticks() -> None:
    link, transport = Link(), MemoryTransport()
    peer = PeerProtocol(MemoryWriter(transport), transport, link.ticker, link.batcher)  # type: ignore[arg-type]
    peer.wants_tick = True
    peer.check_time(link.clock())
    assert transport.state == OPEN
