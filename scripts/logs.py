"""One line an event: the application log on stdout, as text or JSON, and the access log in its file.

Control characters of the application log are escaped once, here; what an access line says is its caller's affair, who
has nothing in it that would need that. Nothing here reads a setting, and nothing that goes wrong with a log reaches its
caller.
"""

import functools
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

FLUSH_INTERVAL_S = 0.25
BUSY_LINES = 256  # so many are written at once: what waits longer has left the processor's caches
CLOSE_TIMEOUT_S = 2.0
# C0, DEL and C1 controls, and the two characters beyond Latin-1 that end a line for some readers.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
CONTROLS |= {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# What every record has; the rest came by `extra`.
RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    StreamHandler = logging.StreamHandler[TextIO]
else:
    StreamHandler = logging.StreamHandler  # not subscriptable before Python 3.11


def escape(text: str) -> str:
    """Make control characters visible. A backslash stays as it is, so escaping twice changes nothing."""
    return text if text.isprintable() else text.translate(CONTROLS)


def timestamp(epoch_s: float) -> str:
    """Write a time as UTC with milliseconds: 2026-01-02T03:04:05.678Z."""
    return _whole_millisecond(round(epoch_s * 1000))


def timestamps(epochs_s: Iterable[float]) -> Iterable[bytes]:
    """The same for many times at once, of which a busy second has many in each millisecond."""
    return map(_encoded_millisecond, map(round, map(mul, epochs_s, repeat(1000.0))))


def _whole_millisecond(epoch_ms: int) -> str:
    seconds, milliseconds = divmod(epoch_ms, 1000)
    return f"{_whole_second(seconds)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=256)
def _encoded_millisecond(epoch_ms: int) -> bytes:
    return _whole_millisecond(epoch_ms).encode()


@functools.lru_cache(maxsize=4)
def _whole_second(epoch_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in RECORD_FIELDS}


class TextLines(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO gateway: message name=value`; a traceback follows on the same line, escaped."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage() + "".join(f" {name}={value}" for name, value in _extra(record).items())
        if record.exc_info:
            text += " | " + self.formatException(record.exc_info)
        return escape(f"{timestamp(record.created)} {record.levelname} {self._process}: {text}")


class JsonLines(logging.Formatter):
    """One ASCII object a line: ts, level, process, msg, what came by `extra`, and the traceback, if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "ts": timestamp(record.created),
            "level": record.levelname,
            "process": self._process,
            "msg": record.getMessage(),
        }
        for name, value in _extra(record).items():
            fields.setdefault(name, value)
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class LineHandler(StreamHandler):
    """Writes to a stream of any encoding, and keeps quiet when the stream itself is gone."""

    def __init__(self, process: str, fmt: str, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        super().__init__(stream)
        self.setFormatter(JsonLines(process) if fmt == "json" else TextLines(process))

    def handleError(self, record: logging.LogRecord) -> None:
        # A closed pipe or a full disk cannot be told to the very same stream; a bug in a log call can, on stderr.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def setup(process: str, level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Let the root logger write one line an event to stdout (or `stream`), warnings of Python included."""
    root = logging.getLogger()
    root.handlers[:] = [LineHandler(process, fmt, stream)]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class AccessLog:
    """Appends whole lines to a file from a thread of its own.

    At most `capacity` lines wait, and as many are on their way; what comes while the disk is slow or full is dropped
    and counted in `dropped`. The file and its folder are made if need be. A failure is logged once, until it is over.
    """

    def __init__(self, path: Path, *, capacity: int = 10000) -> None:
        self.dropped = 0
        self._path = path
        self._capacity = capacity
        # Blocks of whole lines, and how many each has; None stands for "reopen here". Appending and popping are atomic,
        # and each of the two counts is one thread's, so there is no lock to wait for.
        self._waiting: deque[tuple[int, bytes] | None] = deque()
        self._queued = 0
        self._taken = 0
        self._pending = b""
        self._written = 0
        self._file: int | None = None
        self._asked = 0
        self._reopened = 0
        self._failing = False
        self._drops_to_tell = 1
        self._stopping = False
        self._wake = threading.Event()
        self._attempt(self._open)
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write_lines(self, lines: Iterable[bytes]) -> None:
        """Queue lines, given without their ends and with nothing in them to be escaped; never blocks, never raises."""
        given = list(lines)
        kept = given[: max(self._capacity - (self._queued - self._taken), 0)]
        if kept:
            self._queued += len(kept)
            self._waiting.append((len(kept), b"\n".join([*kept, b""])))
            if self._queued - self._taken >= BUSY_LINES:
                self._wake.set()
        self.dropped += len(given) - len(kept)

    def reopen(self) -> None:
        """Open the path anew, as after a rotation; lines written before this call still go to the old file."""
        self._asked += 1
        self._waiting.append(None)

    def close(self) -> None:
        """Write what waits and stop; a disk that hangs is given CLOSE_TIMEOUT_S, one that fails a last attempt."""
        self._capacity = 0
        self._stopping = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        lost = self._pending.count(b"\n", self._written) + sum(block[0] for block in list(self._waiting) if block)
        self._waiting.clear()
        self._pending = b""
        if lost:
            self.dropped += lost
            log.warning("the access log %s is closed and %d of its lines are lost", self._path, lost)

    # In the thread…

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self._wake.wait(FLUSH_INTERVAL_S)
            self._wake.clear()
            stopping = self._stopping
            self._flush()
            self._tell_drops()
        self._close_file()

    def _flush(self) -> None:
        """Write what waits now. Where the disk fails the rest stays, and the queue fills up to its bound."""
        due = len(self._waiting)
        while self._pending or due:
            if not self._pending:
                due -= self._take(due)
            elif not self._attempt(self._write) and not self._write_anew():
                return

    def _take(self, due: int) -> int:
        """Move up to `due` blocks before the next reopening to `_pending`, or do that reopening; tell how many."""
        blocks: list[tuple[int, bytes]] = []
        while len(blocks) < due and (block := self._waiting[0]) is not None:
            self._waiting.popleft()
            blocks.append(block)
        self._pending = b"".join([data for _, data in blocks])
        self._written = 0
        self._taken += sum([lines for lines, _ in blocks])
        if not blocks:
            self._waiting.popleft()
            self._reopen_up_to(min(self._asked, self._reopened + 1))
        return len(blocks) or 1

    # On the disk…

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
        # Non-blocking: a FIFO without a reader is an error then, and not the end of this thread.
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

    def _write_anew(self) -> bool:
        """Write to a new file, if one is asked for: it may be the remedy, so it does not wait for the old one."""
        return self._reopen_up_to(self._asked) and self._attempt(self._write)

    def _reopen_up_to(self, asked: int) -> bool:
        if self._reopened == asked:
            return False
        self._reopened = asked
        self._drops_to_tell = self.dropped + 1
        return self._attempt(self._reopen)

    def _reopen(self) -> None:
        """Open the path, then close the old file. A line of which that one has a part goes whole to another one."""
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

    def _tell_drops(self) -> None:
        if 0 < self._drops_to_tell <= self.dropped:
            self._drops_to_tell = 0
            log.warning("the access log %s is too slow: %d lines were dropped so far", self._path, self.dropped)
