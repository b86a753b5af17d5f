"""The run directory: the backend's key and the state file, in memory where the machine allows, gone at the end.

A lock that dies with the supervisor marks a run directory as in use, so that the next boot on the machine can remove
what a killed one left behind.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

PREFIX = "llama-gateway-"
KEY_PREFIX = "gateway-"
LOCK = "lock"
log = logging.getLogger(__name__)
PLACES = (Path("/dev/shm"), Path("/tmp"))


class RunDir:
    """A fresh folder that only its owner may enter. Raises OSError where none of the places can be written."""

    def __init__(self, places: Sequence[Path] = PLACES) -> None:
        for place in places:
            _sweep(place)
        self.path, self._lock = _make(places)
        self.key_file = self.path / "backend.key"
        self.state_file = self.path / "state.json"
        self.model_file = self.path / "model.json"

    def write_key(self, given: str | None) -> str:
        """Keep the backend's key (the operator's, else a new one) in a file, since a command line is public."""
        key = given or KEY_PREFIX + secrets.token_urlsafe(32)
        fd = os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(key + "\n")
        return key

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make(places: Sequence[Path]) -> tuple[Path, int]:
    """Make the folder and lock it before it gets the name that other boots sweep."""
    for place in places:
        with suppress(OSError):
            new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=place))
            lock = os.open(new / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return new.rename(new.with_name(new.name[1:])), lock
    raise OSError(f"none of {', '.join(map(str, places))} can be written")


def _sweep(place: Path) -> None:
    """Remove run directories that nobody holds any more."""
    for path in place.glob(PREFIX + "*"):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid() and not path.is_symlink() and _abandoned(path / LOCK):
                shutil.rmtree(path, ignore_errors=True)


def _abandoned(lock: Path) -> bool:
    """A lock that can be had has nobody to hold it; a folder without one is not of our making."""
    with lock.open("rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class StateFile:
    """What the gateway and the health server are told; rewritten whole, only when something changed."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self._path = path
        self._now = now
        self._told: tuple[str, str, int | None] | None = None
        self._since = ""

    def tell(self, state: str, detail: str, backend_pid: int | None = None) -> bool:
        """Write a state (loading, ready, draining, dead); tells whether its words are news. Raises OSError at first.

        Later a disk that is full for a while must not end what serves: the state is written when it changes again.
        """
        told, before = (state, detail, backend_pid), self._told
        if told == before:
            return False
        if before is None or before[0] != state:
            self._since = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {"state": state, "since": self._since, "detail": detail, "backend_pid": backend_pid}
        try:
            self._write(json.dumps(fields) + "\n")
        except OSError:
            if before is None:
                raise
            log.exception("the state file cannot be written")
            return False
        self._told = told
        return before is None or before[:2] != told[:2]

    def _write(self, text: str) -> None:
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(self._path)

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink()
