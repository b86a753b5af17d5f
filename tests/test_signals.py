"""Signals that come when nobody minds them any more."""

import asyncio
import os
import signal

import signals


def test_signals_that_come_while_the_loop_closes_are_not_told(capfd) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    loop = asyncio.new_event_loop()
    try:
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        signals.ignore(signal.SIGUSR1)
        loop._csock.close()  # as the loop does before it gives its handlers up
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        loop.close()
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr() == ("", "")
