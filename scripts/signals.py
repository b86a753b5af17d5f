"""The end of signals: what a process does with those that come while its event loop closes."""

import signal


def ignore(*numbers: signal.Signals) -> None:
    """Take no notice of these any more; for a loop that is about to close.

    It lets the pipe go that signals wake it by before it gives their handlers up: one that came in between would be
    told on stderr, with a traceback.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
