"""What Linux says about a connection: real sockets, no protocol."""

import asyncio
import ctypes
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.backend import full_backlog
from support.together import aside
from transport.tcp import CLOSED, TcpState, keep_alive, open_connection, tcp_state

PATIENCE_S = 60.0
SO_ATTACH_FILTER = 26
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF: return 0


class Transport:
    """A transport that is nothing but its socket."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self._connection


@contextmanager
def pair(**keep: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and the accepted connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if keep:
            keep_alive(listener)
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                yield client, accepted


def state(connection: socket.socket) -> TcpState:
    transport: Any = Transport(connection)
    return tcp_state(transport)


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def drop_all(connection: socket.socket) -> None:
    """Let a socket get nothing any more, as if its machine were gone."""
    program = ctypes.create_string_buffer(DROP_ALL, len(DROP_ALL))
    filters = struct.pack("HL", 1, ctypes.addressof(program))
    try:
        connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filters)
    except PermissionError:
        pytest.skip("here only root may attach a filter to a socket")


def test_a_fin_is_no_end_of_both_directions() -> None:
    with pair() as (client, accepted):
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        assert (state(accepted).state == CLOSED, state(accepted).unacknowledged) == (False, 0)


def test_nothing_is_known_of_a_transport_without_a_socket() -> None:
    transport: Any = Transport(None)
    assert not tcp_state(transport).peer_is_unreachable


def test_bytes_for_a_closed_socket_are_answered_by_a_reset() -> None:
    with pair() as (client, accepted):
        client.close()
        until(lambda: state(accepted).state != 1)
        accepted.send(b"x")
        until(lambda: state(accepted).state == CLOSED)


def test_bytes_that_the_peer_does_not_take_are_unacknowledged() -> None:
    with pair() as (client, accepted):
        drop_all(client)
        accepted.send(b"12345")
        assert state(accepted).unacknowledged == 5
        assert state(accepted).sent_ms < PATIENCE_S * 1000


@aside
def test_retransmissions_to_a_peer_that_is_gone_are_counted() -> None:
    with pair() as (client, accepted):
        drop_all(client)
        accepted.send(b"x")
        until(lambda: state(accepted).retransmissions >= 2)


@pytest.mark.parametrize(("retransmissions", "gone"), [(0, False), (7, False), (8, True), (15, True)])
def test_a_peer_is_unreachable_after_eight(retransmissions: int, gone: bool) -> None:
    assert TcpState(1, retransmissions, 0, 1).peer_is_unreachable is gone


def test_accepted_connections_have_the_keepalive_of_their_listener() -> None:
    with pair(keep=True) as (_, accepted):
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


# Opening a connection


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "localhost")]
)
def test_a_connection_is_opened_to_an_address_or_a_name(family: socket.AddressFamily, host: str) -> None:
    async def scenario(port: int) -> None:
        reader, writer = await open_connection(host, port)
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert await reader.readexactly(5) == b"hello"
        sock = writer.get_extra_info("socket")
        assert (sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), sock.gettimeout()) == (1, 0)
        writer.close()

    with socket.create_server((host, 0), family=family) as listener:
        asyncio.run(scenario(listener.getsockname()[1]))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_refused_connection_is_an_error(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as closed:
        closed.bind((host, 0))
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(open_connection(host, closed.getsockname()[1]))


def test_a_connection_that_takes_time_is_waited_for_and_can_be_given_up() -> None:
    async def scenario(port: int) -> None:
        connecting = asyncio.ensure_future(open_connection("127.0.0.1", port))
        await asyncio.sleep(0)
        assert not connecting.done()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting

    with full_backlog() as port:
        asyncio.run(scenario(port))
