"""Signals that a process must survive: strays at any time, and others while it shuts down its event loop."""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio  # programs import this module first of all, so it must be quick

# Sent by log rotation, by a reload, by a mistake. None of them may end a process that has not installed its handlers.
STRAY = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOP = (signal.SIGTERM, signal.SIGINT)


def ignore(*numbers: signal.Signals) -> None:
    """Ignore these signals from now on; for a program that begins, or a loop that is about to close.

    A closing loop closes its wake-up pipe before it removes its signal handlers. A signal in between would be reported
    on stderr with a traceback.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def hold_stops() -> None:
    """Keep stop signals back until `release_stops`, which an event loop calls once it handles them.

    An exit while the loop is made would be reported with a traceback. Call it before there is any thread: another one
    would get the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def release_stops() -> None:
    """Let them through, also those that came meanwhile. Call it before any thread or child starts: both inherit."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


def on_hangup(loop: "asyncio.AbstractEventLoop", callback: Callable[[], object]) -> None:
    """Have the loop call back at each SIGHUP, until the signal is ignored.

    Not by loop.add_signal_handler: a loop that closes restores the default action, which ends the process. The loop
    must have another signal handler already, since that makes signals wake it.
    """
    quieten_wakeups()
    signal.signal(signal.SIGHUP, lambda number, frame: loop.call_soon_threadsafe(callback))


def quieten_wakeups() -> None:
    """Have no warning written to stderr, which may block, if signals come faster than the loop takes note of them.

    Call it once the loop has its first signal handler.
    """
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
