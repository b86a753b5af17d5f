"""What is sent to systemd, and which sockets are taken from it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.service_manager import VARIABLES, Notifier, take_listener, without_manager
from boot.shutdown import StartupError
from config.loader import load_config
from support.boot import PATIENCE_S
from support.paths import SCRIPTS

CONFIG = load_config({"DATA_DIR": "/d", "PORT": "8000"})


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE_S)
        yield sock


def test_messages_are_those_of_sd_notify(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()}, 7)
    for send in (notifier.ready, lambda: notifier.report("loading: 40 %"), notifier.alive, notifier.stopping):
        send()
    received = [manager.recv(100) for _ in range(4)]
    assert received == [b"READY=1", b"STATUS=loading: 40 %", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_name_that_begins_with_at_has_no_file(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(PATIENCE_S)
        Notifier({"NOTIFY_SOCKET": "@" + name}, 7).ready()
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/notify"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    Notifier(environ, 7).ready()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_watchdog_is_for_the_named_process(environ: dict[str, str], seconds: float) -> None:
    assert Notifier(environ, 7).watchdog_s == seconds


def test_children_get_none_of_the_variables() -> None:
    assert without_manager({**dict.fromkeys(VARIABLES, "1"), "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "environ", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "8"}, {"LISTEN_FDS": "0", "LISTEN_PID": "7"}, {"LISTEN_FDS": "1"}]
)
def test_sockets_for_another_process_are_left_alone(environ: dict[str, str]) -> None:
    assert take_listener(environ, 7, CONFIG) is None


def test_more_than_one_socket_is_an_error() -> None:
    with pytest.raises(StartupError, match="LISTEN_FDS: systemd has opened 2 sockets, but only PORT can be one"):
        take_listener({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, 7, CONFIG)


TAKE = f"""
import os, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from boot.service_manager import take_listener
from boot.shutdown import StartupError
from config.loader import load_config
if sys.argv[1] != "none":
    os.dup2(int(sys.argv[1]), 3)
else:
    os.closerange(3, 20)
environ = {{"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}}
try:
    listener = take_listener(environ, os.getpid(), load_config({{"DATA_DIR": "/d", "PORT": sys.argv[2]}}))
    print(listener.getsockname()[1], os.get_inheritable(3))
except StartupError as error:
    print(error)
"""


def take(sock: socket.socket | None, port: int) -> str:
    """Return what a process prints that gets the socket as its file descriptor 3."""
    fd = "none" if sock is None else str(sock.fileno())
    argv = [sys.executable, "-c", TAKE, fd, str(port)]
    fds = () if sock is None else (sock.fileno(),)
    return subprocess.run(
        argv, pass_fds=fds, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    ).stdout.strip()


def test_the_socket_of_the_port_is_taken_and_not_inherited() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert take(sock, port) == f"{port} False"
        assert take(sock, 0) == f"{port} False"
        assert take(sock, port % 65535 + 1).endswith(f"has the port {port}, but PORT is {port % 65535 + 1}")


def test_what_cannot_be_accepted_from_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert take(sock, 8000).endswith("is not a TCP socket")
    with socket.socket() as sock:
        assert take(sock, 0).endswith("does not listen (Accept= must be no)")
    assert take(None, 8000).startswith("LISTEN_FDS: file descriptor 3: ")
