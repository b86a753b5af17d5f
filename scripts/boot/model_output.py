"""What a router's output says of its models: which process began for which, what it printed last, and how it ended.

The router prefixes each line of a child with the child's port, and logs beginnings and ends itself (b11434).
"""

import re
import signal
from collections import deque
from collections.abc import Callable

from boot import exit_status

TAIL_LINES = 60
MAX_PROCESSES = 64
_CHILD = re.compile(r"\[ *([0-9]+)\] (.*)")
_BEGUN = re.compile(r"spawning server instance with name=(.+) on port ([0-9]+)$")
_STOPPED = re.compile(
    r"(?:stopping model instance|evicting idle LRU|removing LRU) name=(.+?)(?: for a queued request)?$"
)
_ENDED = re.compile(r"instance name=(.+) exited with status ([0-9]+)$")


class ModelOutput:
    """Collects the lines of the models' processes. `on_failure` gets a model's name and the reason for its end.

    Only an end that nobody asked for is a failure: a load that fails, or a process that dies.
    """

    def __init__(self, on_failure: Callable[[str, str], None]) -> None:
        self._on_failure = on_failure
        self._tails: dict[str, deque[str]] = {}  # by port, the oldest first
        self._ports: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._expected: dict[str, str] = {}
        self._ended: set[str] = set()
        self._oom_kills = exit_status.oom_kills()

    def read_line(self, line: str) -> None:
        """Note a line of the router's output."""
        if child := _CHILD.match(line):
            if (tail := self._tails.get(child[1])) is not None:
                tail.append(child[2])
        elif begun := _BEGUN.search(line):
            self._begin(begun[1], begun[2])
        elif stopped := _STOPPED.search(line):
            self._stopped.add(stopped[1])
        elif ended := _ENDED.search(line):
            self._end(ended[1], int(ended[2]))

    def has_read_end(self, name: str) -> bool:
        """Return whether the end of a model's last process has been read, whatever it was."""
        return name in self._ended

    def expect_end(self, name: str, reason: str) -> None:
        """Note why a model's process is about to be ended: its end is then a failure for this reason."""
        self._expected[name] = reason

    def _begin(self, name: str, port: str) -> None:
        self._stopped.discard(name)
        self._ended.discard(name)
        self._ports[name] = port
        self._tails.pop(port, None)
        self._tails[port] = deque(maxlen=TAIL_LINES)
        while len(self._tails) > MAX_PROCESSES:
            del self._tails[next(iter(self._tails))]

    def _end(self, name: str, status: int) -> None:
        asked, expected = name in self._stopped, self._expected.pop(name, "")
        self._stopped.discard(name)
        self._ended.add(name)
        if expected or (status and not asked):
            self._on_failure(name, expected or self._explain(name, status))

    def _explain(self, name: str, status: int) -> str:
        """Explain the end of a model's process, as a sentence without its subject."""
        before, self._oom_kills = self._oom_kills, exit_status.oom_kills()
        killed = self._oom_kills > before  # the router reports 1 for a process that a signal has ended
        tail = self._tails.get(self._ports.get(name, ""), ())
        return exit_status.explain(-signal.SIGKILL if killed else status, tail, killed)
