"""The run directory: the backend's key, the state file and the model's path; in memory if the machine allows that.

A lock, which the kernel releases when the supervisor dies, marks a run directory as in use. The next boot removes the
directories that are not locked.
"""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PREFIX = "llama-gateway-"
KEY_PREFIX = "gateway-"
LOCK = "lock"
KEY_FILE = "backend.key"
SLOTS_FOLDER = "slots"
ROOM_BYTES = 16384  # for the other files
PARENTS = (Path("/dev/shm"), Path("/tmp"))

log = logging.getLogger(__name__)


class RunDir:
    """A new folder that only its owner may enter, in the first of `parents` that can be written and is not full.

    It holds the backend's key: the given one, or a new one. A command line would be public. Raises OSError if none of
    the parents can be used.
    """

    def __init__(self, key: str | None = None, parents: Sequence[Path] = PARENTS) -> None:
        self.key = key or KEY_PREFIX + secrets.token_urlsafe(32)
        for parent in parents:
            _sweep(parent)
        self.path, self._lock = _make_first(parents, self.key)
        self.key_file = self.path / KEY_FILE
        self.state_file = self.path / "state.json"
        self.model_file = self.path / "model.json"
        self.slots_folder = self.path / SLOTS_FOLDER  # llama-server needs one to empty slots; nothing is written there

    def remove(self) -> None:
        """Remove the folder and release its lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make_first(parents: Sequence[Path], key: str) -> tuple[Path, int]:
    failures: list[str] = []
    for parent in parents:
        made = _try_make(parent, key, failures)
        if made is not None:
            for failure in failures:
                log.warning("the run directory is in %s, since another place cannot be used: %s", parent, failure)
            return made
    raise OSError(f"it needs one of these folders: {'; '.join(failures)}")


def _try_make(parent: Path, key: str, failures: list[str]) -> tuple[Path, int] | None:
    """Return the folder and its lock, or add the reason to `failures`."""
    try:
        return _make(parent, key)
    except OSError as error:
        failures.append(f"{parent}: {error.strerror}")
        return None


def _make(parent: Path, key: str) -> tuple[Path, int]:
    """Create and lock the folder under a hidden name, then rename it: other boots sweep only the final names."""
    new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = None
    try:
        lock = os.open(new / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write(new / KEY_FILE, f"{key}\n".encode())
        (new / SLOTS_FOLDER).mkdir(mode=0o700)
        _write(new / "room", bytes(ROOM_BYTES))
        (new / "room").unlink()
        return new.rename(new.with_name(new.name[1:])), lock
    except OSError:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)


def _sweep(parent: Path) -> None:
    """Remove our own run directories that are not in use."""
    for path in parent.glob(PREFIX + "*"):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid() and not path.is_symlink() and _is_unlocked(path / LOCK):
                shutil.rmtree(path, ignore_errors=True)


def _is_unlocked(lock: Path) -> bool:
    """Return whether no process holds the lock. Raises OSError without a lock file: then the folder is not ours."""
    with lock.open("rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
