"""signals.py: signals that arrive while the event loop closes."""

import asyncio
import os
import signal
import socket

import pytest

from core import signals
from core.signals import STRAY


def test_an_ignored_signal_is_not_reported_while_the_loop_closes(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    wakeup, other = socket.socketpair()
    with other:
        wakeup.setblocking(False)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        previous = signal.set_wakeup_fd(wakeup.fileno())
        try:
            signals.ignore(signal.SIGUSR1)
            wakeup.close()  # as the loop does before it removes its handlers
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            signal.set_wakeup_fd(previous)
            signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr() == ("", "")


def test_strays_are_the_signals_that_others_send() -> None:
    assert set(STRAY) == {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def test_each_hangup_calls_back_until_it_is_ignored(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGHUP)

    async def play() -> int:
        loop, calls = asyncio.get_running_loop(), []
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        signals.on_hangup(loop, lambda: calls.append(1))
        for _ in range(20_000):  # more than the loop's pipe holds
            os.kill(os.getpid(), signal.SIGHUP)
        while not calls:
            await asyncio.sleep(0)
        signals.ignore(signal.SIGHUP)
        return len(calls)

    try:
        assert asyncio.run(play()) > 0
        os.kill(os.getpid(), signal.SIGHUP)  # the loop has ended, and did not restore the default action
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr() == ("", "")
