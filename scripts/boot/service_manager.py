"""What systemd and a service agree on: reports of the state, a watchdog, and sockets that are open before the start.

Protocols: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Elsewhere nothing is sent and no socket is found.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from boot.shutdown import EXIT_SETTINGS, StartupError
from config.settings import Config

# They concern the main process alone, so no child gets them.
VARIABLES = frozenset(
    ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
)
_FIRST_FD = 3


class Notifier:
    """Sends messages to the service manager. A message that cannot be sent is dropped: the service itself is fine."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ means a name without a file (unix(7), abstract).
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = _watchdog_s(environ, pid)

    def ready(self) -> None:
        """Report that the service accepts connections."""
        self._send("READY=1")

    def report(self, status: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """Report that the end has begun."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Reset the watchdog's timer."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # a full queue of the manager's must not stop the event loop
            sock.sendto(message.encode(), self._address)


def _watchdog_s(environ: Mapping[str, str], pid: int) -> float:
    """Return within how many seconds a sign of life is needed, 0 if none is."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    return int(text) / 1_000_000


def without_manager(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}


def take_listener(environ: Mapping[str, str], pid: int, config: Config) -> socket.socket | None:
    """Return the listening socket that systemd has opened for the gateway; None if it has opened none.

    Raises StartupError if a socket is not a listening TCP socket at PORT, because no process would ever accept from it.
    """
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(pid) or not count.isdecimal() or count == "0":
        return None
    if count != "1":
        raise StartupError(EXIT_SETTINGS, f"LISTEN_FDS: systemd has opened {count} sockets, but only PORT can be one")
    try:
        listener = socket.socket(fileno=_FIRST_FD)
    except OSError as error:
        raise StartupError(EXIT_SETTINGS, f"LISTEN_FDS: file descriptor {_FIRST_FD}: {error.strerror}") from None
    os.set_inheritable(_FIRST_FD, False)
    if reason := _why_not_ours(listener, config.listen.port):
        listener.close()
        raise StartupError(EXIT_SETTINGS, f"LISTEN_FDS: the socket that systemd has opened {reason}")
    return listener


def _why_not_ours(listener: socket.socket, port: int) -> str:
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        return "is not a TCP socket"
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen (Accept= must be no)"
    opened = listener.getsockname()[1]
    return "" if port in (0, opened) else f"has the port {opened}, but PORT is {port}"
