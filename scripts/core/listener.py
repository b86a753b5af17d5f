"""Which process listens at the backend's address: the one that the supervisor has started, or another one.

A port can be taken by any local user while llama-server restarts. So a listener has an identity: of a TCP socket its
inode, of a Unix socket the process that listens. `find_listener` finds the identity of a process' listener, and
`is_listener` says whether a new connection leads to it. Linux reports both; elsewhere the identity is UNREPORTED.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

UNREPORTED = 0  # the system does not report listeners
MAX_PATH_BYTES = 107  # of a Unix socket, on Linux
_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}
_ANY_ADDRESS = {socket.AF_INET: b"0" * 8, socket.AF_INET6: b"0" * 32}
_LISTEN = b"0A"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Connected(Protocol):
    """A connected socket, asyncio's own kind included."""

    @property
    def family(self) -> int: ...

    def getpeername(self) -> Any: ...

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


class TcpListener(NamedTuple):
    """A line of /proc/net/tcp: a listening socket. `address` is in the kernel's hexadecimal form."""

    address: bytes
    port: int
    uid: int
    inode: int


def is_socket_path(host: str) -> bool:
    """Whether a host is the path of a Unix socket, by llama-server's rule."""
    return host.endswith(".sock")


# --- At the supervisor: once llama-server responds ---


def find_listener(host: str, port: int, pid: int) -> int | None:
    """Return the identity of the listener at an address if it is the process', or one of its descendants'.

    None: nothing listens there, or another process does.
    """
    return _find_unix_listener(host, pid) if is_socket_path(host) else _find_tcp_listener(port, pid)


def _find_tcp_listener(port: int, pid: int) -> int | None:
    try:
        listeners = list(_tcp_listeners(socket.AF_INET))
    except OSError:
        return UNREPORTED
    with suppress(FileNotFoundError):  # IPv6 is off
        listeners += _tcp_listeners(socket.AF_INET6)
    at_port = [each for each in listeners if each.port == port]
    inodes: set[int] = set()
    for member in _family(pid) if at_port else ():
        inodes |= _socket_inodes(member, at_port)
    return next((each.inode for each in at_port if each.inode in inodes), None)


def _find_unix_listener(path: str, pid: int) -> int | None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except OSError:
            return None
        credentials = _peer_credentials(sock)
    if credentials is None:
        return UNREPORTED
    listener, uid = credentials
    return listener if uid == os.geteuid() and listener in _family(pid) else None


def _family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _socket_inodes(pid: int, listeners: Sequence[TcpListener]) -> set[int]:
    """Return the inodes of a process' sockets; if they may not be read, those of its user's listeners.

    A program with capabilities of its own hides its files even from its user. So does one that has ended but has not
    been reaped, and that has none: another program of the user may have its port by then.
    """
    inodes: set[int] = set()
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except PermissionError:
        if _has_ended(pid):
            return inodes
        return {each.inode for each in listeners if each.uid == os.geteuid()}
    except OSError:  # it has ended
        return inodes
    for name in names:
        with suppress(OSError):  # it was closed
            kind, _, rest = os.readlink(f"{folder}/{name}").partition("[")
            if kind == "socket:":
                inodes.add(int(rest.rstrip("]")))
    return inodes


def _has_ended(pid: int) -> bool:
    """Whether a process is a zombie, or gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat.rpartition(b")")[2].split()[:1] in ([b"Z"], [b"X"])  # the name before it may contain anything


# --- In the gateway, before anything is sent ---


def is_listener(sock: Connected, listener: int | None) -> bool:
    """Return whether a new connection was accepted for the listener with this identity.

    The identity must have been known before connecting. A TCP listener that had its port then and has it still had it
    in between, and no other user can listen there too.
    """
    if listener is None:
        return False
    if sock.family == socket.AF_UNIX:
        credentials = _peer_credentials(sock)
        return credentials is None or (credentials[1] == os.geteuid() and listener in (UNREPORTED, credentials[0]))
    return listener == UNREPORTED or _is_tcp_listener(sock, listener)


def _is_tcp_listener(sock: Connected, inode: int) -> bool:
    family = socket.AddressFamily(sock.family)
    try:
        address, port = sock.getpeername()[:2]
        addresses = (_kernel_form(family, address.partition("%")[0]), _ANY_ADDRESS[family])
        for each in _tcp_listeners(family):
            if each.inode == inode:
                return each.port == port and each.address in addresses
    except OSError:  # the peer has left
        return False
    return False


def _kernel_form(family: socket.AddressFamily, address: str) -> bytes:
    """Return an address as /proc/net/tcp writes it: each 4 bytes as one number in the machine's byte order."""
    packed = socket.inet_pton(family, address)
    return b"".join(b"%08X" % word for word in struct.unpack(f"={len(packed) // 4}I", packed))


# --- What the system reports ---


def _tcp_listeners(family: socket.AddressFamily) -> Iterator[TcpListener]:
    """Yield the listening sockets. The kernel lists them first. Raises OSError if the system has no such list."""
    with open(_TABLES[family], "rb") as table:
        next(table)  # the names of the columns
        for line in table:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, _, port = fields[1].partition(b":")
                yield TcpListener(address, int(port, 16), int(fields[7]), int(fields[9]))


def _peer_credentials(sock: Connected) -> tuple[int, int] | None:
    """Return the process and the user that listen on a Unix socket; None if the system does not report them."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid
