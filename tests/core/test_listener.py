"""Whose listener a port or a path has, and whether a connection leads to it: with real sockets and processes."""

import builtins
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.listener import UNREPORTED, find_listener, is_listener, is_socket_path

linux_only = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux reports who listens")
# A Python of root's own may be out of the other user's reach.
SYSTEM_PYTHON = "/usr/bin/python3"
NOBODY = 65534
as_root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists(),
    reason="only root can start a process of another user, and that user needs a Python",
)
pytestmark = linux_only

OWN = os.getpid()
# Listens at the path or port of its first argument, says so, and ends with its input. With more, a child does that.
LISTEN = """
import os, socket, subprocess, sys
place, *rest = sys.argv[1:]
if rest:
    sys.exit(subprocess.run([sys.executable, "-c", rest[0], place]).returncode)
unix = place.startswith("/")
sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
sock.bind(place if unix else ("127.0.0.1", int(place)))
sock.listen()
if unix:
    os.chmod(place, 0o777)
print(os.getpid(), sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@contextmanager
def listening(place: str, *more: str, user: int | None = None) -> Iterator[tuple[int, int, int]]:
    """A process that listens: the pid of the one that was started, of the one that listens, and the port."""
    argv = [SYSTEM_PYTHON if user else sys.executable, "-c", LISTEN, place, *more]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=user) as process:
        assert process.stdin
        assert process.stdout
        pid, port = process.stdout.readline().split()
        yield process.pid, int(pid), int(port) if port.isdigit() else 0
        process.stdin.close()


@contextmanager
def tcp(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        yield listener, listener.getsockname()[1]


def test_a_path_that_ends_in_sock_is_a_unix_socket() -> None:
    assert is_socket_path("/run/x.sock")
    assert not any(map(is_socket_path, ("127.0.0.1", "::1", "localhost", "/run/x.socket")))


# --- Ports ---


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_the_listener_of_this_process_is_its_sockets_inode(host: str) -> None:
    with tcp(host) as (listener, port):
        assert find_listener(host, port, OWN) == inode(listener)
    assert find_listener(host, port, OWN) is None


def test_a_port_without_a_listener_has_none() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert find_listener("127.0.0.1", bound.getsockname()[1], OWN) is None


def test_a_connected_socket_is_no_listener() -> None:
    with tcp() as (_, port), socket.create_connection(("127.0.0.1", port)) as client:
        assert find_listener("127.0.0.1", client.getsockname()[1], OWN) is None


def test_a_listener_of_a_child_or_its_child_counts_and_that_of_another_process_does_not() -> None:
    with listening("0") as (child, _, port), listening("0", LISTEN) as (parent, grandchild, other_port):
        assert parent != grandchild
        for pid in (child, OWN):
            assert find_listener("127.0.0.1", port, pid)
        for pid in (parent, grandchild, OWN):
            assert find_listener("127.0.0.1", other_port, pid)
        assert find_listener("127.0.0.1", port, parent) is None
        assert find_listener("127.0.0.1", other_port, child) is None


def test_a_process_that_has_ended_has_no_listener() -> None:
    with listening("0") as (child, _, port):
        pass
    assert find_listener("127.0.0.1", port, child) is None
    with tcp() as (_, other_port):
        assert find_listener("127.0.0.1", other_port, child) is None


@pytest.mark.parametrize(
    ("listens", "connects_to"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("::1", "::1"), ("::", "::1")],
)
def test_a_connection_leads_to_the_listener_that_accepts_it(listens: str, connects_to: str) -> None:
    with tcp(listens) as (listener, port), socket.create_connection((connects_to, port)) as client:
        assert is_listener(client, inode(listener))
        assert not is_listener(client, inode(listener) + 1)
        assert not is_listener(client, inode(client))
        assert is_listener(client, UNREPORTED)
        assert not is_listener(client, None)


def test_a_connection_to_the_port_on_another_address_does_not_lead_there() -> None:
    """Both can listen at once, and a host name may stand for both."""
    with ExitStack() as stack:
        ours, port = stack.enter_context(tcp())
        theirs = stack.enter_context(closing(socket.create_server(("127.0.0.2", port))))
        others = [theirs]
        if socket.has_ipv6:
            others.append(stack.enter_context(closing(socket.create_server(("::1", port), family=socket.AF_INET6))))
        for other in others:
            client = stack.enter_context(socket.create_connection(other.getsockname()[:2]))
            assert is_listener(client, inode(other))
            assert not is_listener(client, inode(ours))


def test_a_connection_does_not_lead_to_a_listener_that_was_closed_or_came_later() -> None:
    """The port changes hands between connecting and looking: what was known before is gone, what is there is new."""
    with tcp() as (listener, port):
        before = inode(listener)
        client = socket.create_connection(("127.0.0.1", port))
    with closing(client), socket.socket() as next_one:
        assert not is_listener(client, before)
        next_one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        next_one.bind(("127.0.0.1", port))
        next_one.listen()
        assert not is_listener(client, before)


def test_a_connection_that_the_peer_has_reset_leads_nowhere() -> None:
    with tcp() as (listener, port), socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted.close()
        assert not is_listener(client, inode(listener))


@as_root_only
def test_a_port_of_another_user_is_not_ours() -> None:
    with listening("0", user=NOBODY) as (_, _, port), listening("0") as (child, _, _):
        assert find_listener("127.0.0.1", port, child) is None
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert not is_listener(client, 1)


# --- Systems that report less ---


@contextmanager
def without_files(monkeypatch: pytest.MonkeyPatch, *missing: str) -> Iterator[None]:
    """As on a system that does not have these files."""
    real = builtins.open

    def fake(path: Any, *rest: Any, **named: Any) -> Any:
        if path in missing:
            raise FileNotFoundError(path)
        return real(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fake)
        yield


def test_without_a_list_of_sockets_the_listener_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with tcp() as (listener, port), socket.create_connection(("127.0.0.1", port)) as client:
        with without_files(monkeypatch, "/proc/net/tcp"):
            assert find_listener("127.0.0.1", port, OWN) == UNREPORTED
            assert is_listener(client, UNREPORTED)
            assert not is_listener(client, inode(listener))
        with without_files(monkeypatch, "/proc/net/tcp6"):  # IPv6 is off
            assert find_listener("127.0.0.1", port, OWN) == inode(listener)


def refuse(path: str) -> list[str]:
    raise PermissionError(path)


def test_the_user_decides_if_a_process_hides_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that has capabilities of its own does."""
    with tcp() as (listener, port), monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        assert find_listener("127.0.0.1", port, OWN) == inode(listener)
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert find_listener("127.0.0.1", port, OWN) is None


def test_a_process_that_is_not_reaped_has_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is reaped, its files are hidden from its user too; and another process may have taken the port."""
    with subprocess.Popen(["true"]) as ended, tcp() as (_, port), monkeypatch.context() as patch:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert find_listener("127.0.0.1", port, ended.pid) is None
        patch.setattr(os, "listdir", refuse)
        assert find_listener("127.0.0.1", port, ended.pid) is None
        ended.wait()
        assert find_listener("127.0.0.1", port, ended.pid) is None


def test_without_credentials_the_folder_of_a_path_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = paths(tmp_path, 1)
    monkeypatch.delattr(socket, "SO_PEERCRED")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        assert find_listener(path, 0, OWN) == UNREPORTED
        assert is_listener(client, UNREPORTED)


# --- Paths ---


def paths(folder: Path, count: int) -> Sequence[str]:
    return [str(folder / f"{number}.sock") for number in range(count)]


def test_the_listener_at_a_path_is_the_process_that_listens(tmp_path: Path) -> None:
    one, two, three = paths(tmp_path, 3)
    with listening(one) as (child, _, _), listening(two, LISTEN) as (parent, grandchild, _):
        assert find_listener(one, 0, child) == find_listener(one, 0, OWN) == child
        assert find_listener(two, 0, parent) == grandchild
        assert find_listener(one, 0, parent) is None
        assert find_listener(three, 0, OWN) is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(one)
            assert is_listener(client, child)
            assert is_listener(client, UNREPORTED)
            assert not is_listener(client, grandchild)
            assert not is_listener(client, None)
    assert find_listener(one, 0, child) is None  # the socket is still there, but no process listens


@as_root_only
def test_a_path_of_another_user_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (path,) = paths(tmp_path, 1)
    with listening(path, user=NOBODY) as (child, _, _):
        assert find_listener(path, 0, child) is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert not is_listener(client, child)
            assert not is_listener(client, UNREPORTED)
