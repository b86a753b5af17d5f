"""TCP connections: opening one, its state as Linux knows it, and whether its peer is still there."""

import asyncio
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import termios
from typing import NamedTuple

CLOSED = 7  # TCP_CLOSE of Linux's states: after a reset, or after both sides have closed

# Of struct tcp_info (tcp(7)): state, retransmissions, milliseconds since data was last sent.
_TCP_INFO = struct.Struct("=BxB41xI")
_OUTSTANDING = struct.Struct("i")

# A silent peer is probed; one that does not answer is gone after a minute. Less than what NATs and mobile networks
# remember a silent connection for (60 s and more), so a client that waits is not forgotten there.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
# Retransmissions in a row without an acknowledgement; the time between two doubles from 0.2 s on, so these take 51 s.
_MAX_RETRANSMISSIONS = 8


class TcpState(NamedTuple):
    """`retransmissions` are those in a row; `unacknowledged` are bytes that were written."""

    state: int
    retransmissions: int
    sent_ms: int  # since data was last sent
    unacknowledged: int

    @property
    def peer_is_unreachable(self) -> bool:
        """Whether the peer has acknowledged nothing for so long that it is gone. A peer that only reads slowly is not.

        The kernel sends no keepalive probes while data is outstanding, and retransmits for a quarter of an hour.
        """
        return self.retransmissions >= _MAX_RETRANSMISSIONS


_UNKNOWN = TcpState(0, 0, 1 << 31, 0)


async def open_connection(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Do what asyncio.open_connection does, in a third of the time if the peer is an address of this machine.

    There a connection is established or refused as soon as it has been asked for, so no loop has to wait for it.
    """
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return await asyncio.open_connection(host, port)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY if it is told TCP
    try:
        sock.setblocking(False)
        await _connect(sock, (host, port))
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def _connect(sock: socket.socket, address: tuple[str, int]) -> None:
    error = sock.connect_ex(address)
    if error == errno.EINPROGRESS:
        error = sock.connect_ex(address)
    if error == errno.EALREADY:
        await asyncio.get_running_loop().sock_connect(sock, address)
    elif error not in (0, errno.EISCONN):
        raise OSError(error, os.strerror(error))


def tcp_state(transport: asyncio.BaseTransport) -> TcpState:
    """Return the state of a transport that is not closed yet. Only Linux reports it, and only of TCP."""
    connection = transport.get_extra_info("socket")
    if connection is None:  # of a TLS transport that has lost its connection, in Python 3.10
        return _UNKNOWN
    if not hasattr(socket, "TCP_INFO") or connection.family == socket.AF_UNIX:
        return _UNKNOWN
    state, retransmissions, sent_ms = _TCP_INFO.unpack(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    )
    (unacknowledged,) = _OUTSTANDING.unpack(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return TcpState(state, retransmissions, sent_ms, unacknowledged)


def keep_alive(listener: socket.socket) -> None:
    """Let the kernel notice clients that are gone without a FIN: accepted connections inherit what a listener has."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
