"""llama-server's log file: a new one for each boot, of bounded size and number; and a splitter of bytes into lines.

All of it happens in a thread: a volume that hangs must not stop the supervisor.
"""

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic

KEPT_FILES = 10
MAX_FILE_BYTES = 32 << 20  # after which the file goes on as a new one
MAX_QUEUED_BYTES = 4 << 20
RETRY_S = 10.0
WAIT_S = 0.5  # for a volume that hangs, at the start and at the end
LINE_BYTES = 65536
LINK = "latest"

log = logging.getLogger(__name__)


class BootLog:
    """This boot's log file, written from a thread. Nothing here raises: the server does not need the file.

    At most MAX_QUEUED_BYTES wait to be written; what comes then is dropped. A line in the file and one in our own log
    say how much is missing. A file that has `max_bytes` gets the suffix `.1`, and a new one begins.
    """

    def __init__(
        self, folder: Path, instance_id: str, started_at: datetime, *, max_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """`started_at` is aware UTC. The folder and the file are created, within WAIT_S unless the volume hangs."""
        self.path = folder / f"{started_at:%Y%m%dT%H%M%SZ}_server_{instance_id}.log"
        # Only our own files: those of other instances may be in use.
        self._own_name = re.compile(rf"[0-9]{{8}}T[0-9]{{6}}Z_server_{re.escape(instance_id)}\.log(\.1)?")
        self._max_bytes = max_bytes
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0  # changed by `write` alone
        self._taken_bytes = 0  # changed by the thread alone
        self._dropped_bytes = 0  # changed by `write` alone
        self._lost_bytes = 0  # changed by the thread alone, as the next ones
        self._reported_bytes = 0
        self._fd: int | None = None
        self._failed_s: float | None = None
        self._reopen = False
        self._closing = False
        self._wake = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="boot-log", daemon=True)
        self._thread.start()
        self._opened.wait(WAIT_S)

    def write(self, data: bytes) -> None:
        """Queue bytes. Never blocks, never raises."""
        if self._closing or self._queued_bytes - self._taken_bytes + len(data) > MAX_QUEUED_BYTES:
            self._dropped_bytes += len(data)
            return
        self._queued_bytes += len(data)
        self._queue.append(data)
        self._wake.set()

    def reopen(self) -> None:
        """Open the path again, after log rotation for example."""
        self._reopen = True
        self._wake.set()

    def close(self) -> None:
        """Write what is queued, and stop the thread; give up after WAIT_S if the volume hangs."""
        self._closing = True
        self._wake.set()
        self._thread.join(WAIT_S)

    # --- In the thread ---

    def _run(self) -> None:
        self._attempt(self._open)
        self._opened.set()
        while not self._closing or self._queue:
            self._wake.wait()
            self._wake.clear()
            if self._reopen:
                self._reopen = False
                self._close_file()
            while self._queue:
                data = self._queue.popleft()
                if not self._attempt(partial(self._append, data)):
                    self._lost_bytes += len(data)
                self._taken_bytes += len(data)
            self._report_missing()
        self._close_file()

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do something on the volume. After a failure, which is logged once, wait before the next attempt."""
        if self._failed_s is not None and monotonic() - self._failed_s < RETRY_S:
            return False
        try:
            action()
        except OSError as error:
            if self._failed_s is None:
                log.warning(
                    "the log of llama-server cannot be kept in %s (LOG_DIR, DATA_DIR): %s",
                    self.path.parent,
                    error.strerror,
                )
            self._failed_s = monotonic()
            self._close_file()
            return False
        self._failed_s = None
        return True

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._prune()
        with suppress(OSError):  # a volume without symbolic links can still serve
            _link(self.path)

    def _append(self, data: bytes) -> None:
        if self._fd is None:
            self._open()
        assert self._fd is not None
        if os.fstat(self._fd).st_size + len(data) > self._max_bytes:
            self._roll()
        while data:
            data = data[os.write(self._fd, data) :]

    def _roll(self) -> None:
        """Begin a new file. On a volume that cannot rename, the old one is emptied."""
        self._close_file()
        try:
            self.path.replace(f"{self.path}.1")
        except OSError:
            os.truncate(self.path, 0)
        self._open()

    def _prune(self) -> None:
        """Remove all but the newest KEPT_FILES of our own files. Their names sort by time; other names stay."""
        with suppress(OSError):
            files = sorted(path for path in self.path.parent.iterdir() if self._own_name.fullmatch(path.name))
            others = [path for path in files if not path.name.startswith(self.path.name)]
            for path in others[: max(0, len(files) - KEPT_FILES)]:
                path.unlink(missing_ok=True)

    def _report_missing(self) -> None:
        missing = self._dropped_bytes + self._lost_bytes - self._reported_bytes
        if missing and self._attempt(partial(self._append, b"[%d bytes are missing here]\n" % missing)):
            self._reported_bytes += missing
            log.warning("%d bytes of llama-server's output are missing in %s", missing, self.path)

    def _close_file(self) -> None:
        if self._fd is not None:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _link(path: Path) -> None:
    """Point `latest` at a file in the same folder, atomically: the link always has a target."""
    new = path.with_name(f".{LINK}.{os.getpid()}")
    with suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(path.name)
    new.replace(path.with_name(LINK))


class LineSplitter:
    """Splits a byte stream into lines and passes each to `on_line`, decoded and without its end.

    Empty lines are left out. A line longer than LINE_BYTES is passed on in pieces.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        *lines, buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._emit(line)
        while len(buffer) > LINE_BYTES:
            self._emit(buffer[:LINE_BYTES])
            buffer = buffer[LINE_BYTES:]
        self._buffer = buffer

    def close(self) -> None:
        """Pass on what follows the last line end."""
        if self._buffer:
            self._emit(self._buffer)
        self._buffer = b""

    def _emit(self, line: bytes) -> None:
        text = line.removesuffix(b"\r").decode(errors="replace")
        if text:
            self._on_line(text)
