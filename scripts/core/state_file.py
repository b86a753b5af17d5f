"""The state file: the supervisor writes whether llama-server can serve; the gateway and the health server read it.

The file is one JSON object with the members `state`, `since`, `detail`, `backend_pid` and `backend_listener` (see
core.listener; null while llama-server is not ready). If models of a router have failed, `model_failures` has the reason
for each. It is replaced atomically.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from core.listener import UNREPORTED

LOADING, READY, DRAINING, DEAD = "loading", "ready", "draining", "dead"
STATES = frozenset((LOADING, READY, DRAINING, DEAD))

log = logging.getLogger(__name__)


class StateReader:
    """Reads the state from the file, and reads the file again only if it has changed.

    The state is LOADING until a file has been read. A file that cannot be read or understood changes nothing.
    `when_removed` is the state once a file that has been read is missing; None keeps the last state. Without a path the
    state stays LOADING. `listener` is the identity of llama-server's listener as last read; None: do not connect.
    `model_failures` has why each model that a router could not load, or that has died, is not there.
    """

    def __init__(self, path: Path | None, *, when_removed: str | None = None) -> None:
        self._path = path
        self._when_removed = when_removed
        self._stamp: tuple[int, int, int] | None = None
        self.state = LOADING  # as last read
        self.listener: int | None = None
        self.model_failures: Mapping[str, str] = {}

    def read(self) -> str:
        """Return the current state, one of STATES."""
        if self._path is None:
            return LOADING
        try:
            self._read_if_changed(self._path)
        except FileNotFoundError:
            if self._stamp is not None and self._when_removed is not None:
                # No file has this stamp, so a file that comes back is read.
                self.state, self._stamp = self._when_removed, (0, 0, 0)
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.debug("the state file cannot be read: %r", error)
        return self.state

    def has_changed(self) -> bool:
        """Whether `read` would read the file again. A missing file has not changed."""
        if self._path is None:
            return False
        try:
            return _stamp(self._path) != self._stamp
        except OSError:
            return False

    def _read_if_changed(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp != self._stamp:
            fields = json.loads(path.read_bytes())
            state, listener = fields["state"], fields.get("backend_listener", UNREPORTED)
            self.state = state if state in STATES else self.state
            self.listener = listener if type(listener) is int else None
            failures = fields.get("model_failures", {})
            self.model_failures = failures if isinstance(failures, dict) else {}
            self._stamp = stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what differs between two versions of a file. Raises OSError."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


class StateEntry(NamedTuple):
    """A state (one of STATES), the reason for it, llama-server's pid if it runs, and its listener if it is ready.

    `model_failures` are pairs of a router's model and the reason why it is not there.
    """

    state: str
    detail: str
    backend_pid: int | None = None
    backend_listener: int | None = None
    model_failures: tuple[tuple[str, str], ...] = ()


class StateWriter:
    """Writes the state file if something has changed, or if the file is missing. `now` returns the time as aware UTC.

    It may block as long as the volume does: the supervisor runs it off its loop.
    """

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self.path = path
        self._now = now
        self._written: StateEntry | None = None
        self._since = ""
        self._state = ""  # since that time
        self._lock = threading.Lock()
        self._removed = False

    def write(self, entry: StateEntry) -> None:
        """Write the state. Raises OSError; the next call tries again. Does nothing once the file has been removed."""
        with self._lock:
            if not self._removed:
                self._write(entry)

    def _write(self, entry: StateEntry) -> None:
        if entry == self._written and self.path.exists():
            return
        if self._state != entry.state:
            self._state = entry.state
            self._since = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {**entry._asdict(), "since": self._since}
        order = ("state", "since", "detail", "backend_pid", "backend_listener")
        failures = {"model_failures": dict(entry.model_failures)} if entry.model_failures else {}
        self._replace(json.dumps({**{name: fields[name] for name in order}, **failures}) + "\n")
        self._written = entry

    def _replace(self, text: str) -> None:
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(self.path)

    def remove(self) -> None:
        """Remove the file if it is there, for good."""
        with self._lock:
            self._removed = True
            self._unlink()

    def _unlink(self) -> None:
        for path in (self.path, self.path.with_name(f".{self.path.name}.{os.getpid()}")):
            with suppress(OSError):
                path.unlink()
