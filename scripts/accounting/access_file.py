"""The access log's file: whole lines, appended by a separate thread, so that a slow disk delays no request."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

FLUSH_INTERVAL_S = 0.25
# A batch of this many lines is written at once. Lines that wait longer have left the processor's caches.
FULL_BATCH_LINES = 256
CLOSE_TIMEOUT_S = 2.0
OPEN_WAIT_S = 0.5  # for a volume that hangs

log = logging.getLogger(__name__)


class AccessLog:
    """Appends whole lines to a file from a separate thread.

    At most `capacity` lines are queued, and as many are being written. Lines that arrive while the queue is full are
    dropped and counted in `dropped`. The file and its folder are created if they do not exist. A failure is logged
    once, until writing succeeds again.
    """

    def __init__(self, path: Path, *, capacity: int = 10000) -> None:
        self.dropped = 0
        self._path = path
        self._capacity = capacity
        # Blocks of whole lines, each with its number of lines; None stands for "reopen the file here". deque.append and
        # deque.popleft are atomic, and each of the two counters is changed by one thread only: no lock is needed.
        self._queue: deque[tuple[int, bytes] | None] = deque()
        self._queued_lines = 0
        self._taken_lines = 0
        self._pending = b""
        self._written = 0  # bytes of _pending
        self._file: int | None = None
        self._reopens_requested = 0
        self._reopens_done = 0
        self._failing = False
        self._report_drops_from: int | None = 1
        self._stopping = False
        self._wake = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()
        self._opened.wait(OPEN_WAIT_S)

    def write_lines(self, lines: Iterable[bytes]) -> None:
        """Queue lines, given without line ends. Control characters must be escaped. Never blocks, never raises."""
        given = list(lines)
        accepted = given[: max(self._capacity - (self._queued_lines - self._taken_lines), 0)]
        if accepted:
            self._queued_lines += len(accepted)
            self._queue.append((len(accepted), b"\n".join([*accepted, b""])))
            if self._queued_lines - self._taken_lines >= FULL_BATCH_LINES:
                self._wake.set()
        self.dropped += len(given) - len(accepted)

    def reopen(self) -> None:
        """Open the path again, for example after log rotation. Lines queued earlier still go to the old file."""
        self._reopens_requested += 1
        self._queue.append(None)

    def close(self) -> None:
        """Write what is queued and stop the thread.

        If the disk hangs, this returns after CLOSE_TIMEOUT_S; if it fails, one last attempt is made. Lines that could
        not be written are counted as dropped.
        """
        self._capacity = 0
        self._stopping = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        lost = self._pending.count(b"\n", self._written) + sum(block[0] for block in list(self._queue) if block)
        self._queue.clear()
        self._pending = b""
        if lost:
            self.dropped += lost
            log.warning("the access log %s is closed and %d of its lines are lost", self._path, lost)

    # --- In the thread ---

    def _run(self) -> None:
        stopping = False
        self._attempt(self._open)
        self._opened.set()
        while not stopping:
            self._wake.wait(FLUSH_INTERVAL_S)
            self._wake.clear()
            stopping = self._stopping
            self._flush()
            self._report_drops()
        self._close_file()

    def _flush(self) -> None:
        """Write what is queued now. If the disk fails, the rest stays and the queue fills up to its capacity."""
        due = len(self._queue)
        while self._pending or due:
            if not self._pending:
                due -= self._take(due)
            elif not self._attempt(self._write) and not self._write_to_new_file():
                return

    def _take(self, due: int) -> int:
        """Move up to `due` blocks to `_pending`, or reopen the file if that is next; return the entries consumed."""
        blocks: list[tuple[int, bytes]] = []
        while len(blocks) < due and (block := self._queue[0]) is not None:
            self._queue.popleft()
            blocks.append(block)
        self._pending = b"".join([data for _, data in blocks])
        self._written = 0
        self._taken_lines += sum([lines for lines, _ in blocks])
        if not blocks:
            self._queue.popleft()
            self._reopen_up_to(min(self._reopens_requested, self._reopens_done + 1))
        return len(blocks) or 1

    # --- On the disk ---

    def _attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except BlockingIOError:
            return False  # a pipe whose reader is slow
        except OSError as error:
            if not self._failing:
                log.warning("the access log %s cannot be written: %s", self._path, error.strerror)
            self._failing = True
            return False
        return True

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Non-blocking, so that opening a FIFO without a reader is an error and does not block this thread.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(self._path, flags, 0o640)
        return self._file

    def _write(self) -> None:
        file = self._open() if self._file is None else self._file
        while self._written < len(self._pending):
            self._written += os.write(file, memoryview(self._pending)[self._written :])
        self._pending = b""
        if self._failing:
            log.warning("the access log %s works again; %d lines were dropped so far", self._path, self.dropped)
            self._failing = False

    def _write_to_new_file(self) -> bool:
        """Reopen the file now if that was requested: the new file may work where the old one failed."""
        return self._reopen_up_to(self._reopens_requested) and self._attempt(self._write)

    def _reopen_up_to(self, requests: int) -> bool:
        if self._reopens_done == requests:
            return False
        self._reopens_done = requests
        self._report_drops_from = self.dropped + 1
        return self._attempt(self._reopen)

    def _reopen(self) -> None:
        """Open the path, then close the old file. A line that was partly written to the old file is written again."""
        old = self._file
        new = self._open()
        if old is not None:
            if not os.path.samestat(os.fstat(old), os.fstat(new)):
                self._written = self._pending.rfind(b"\n", 0, self._written) + 1
            os.close(old)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _report_drops(self) -> None:
        if self._report_drops_from is not None and self._report_drops_from <= self.dropped:
            self._report_drops_from = None
            log.warning("the access log %s is too slow: %d lines were dropped so far", self._path, self.dropped)
