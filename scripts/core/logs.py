"""The application log: one line per event on stdout, as text or JSON, with control characters escaped.

Nothing here reads a setting, and a failure to write the log never reaches the code that logs.
"""

import functools
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TextIO

CAPACITY_LINES = 10_000
CLOSE_TIMEOUT_S = 0.5
# C0, DEL and C1 controls, and the two characters beyond Latin-1 that some readers take for a line end.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
CONTROLS |= {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# The attributes of every record; all others came by `extra`.
RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def escape(text: str) -> str:
    """Make control characters visible. Backslashes stay as they are, so escaping twice changes nothing."""
    return text if text.isprintable() else text.translate(CONTROLS)


def timestamp(epoch_s: float) -> str:
    """Format seconds since the epoch as UTC with milliseconds: 2026-01-02T03:04:05.678Z."""
    return timestamps([epoch_s])[0].decode()


def timestamps(epochs_s: Iterable[float]) -> list[bytes]:
    """Format many times at once."""
    return list(map(_format_ms, [round(epoch_s * 1000) for epoch_s in epochs_s]))


@functools.lru_cache(maxsize=64)
def _format_ms(epoch_ms: int) -> bytes:
    """Format whole milliseconds since the epoch. Under load many requests end in the same one."""
    seconds, milliseconds = divmod(epoch_ms, 1000)
    return b"%b.%03dZ" % (_format_seconds(seconds), milliseconds)


@functools.lru_cache(maxsize=4)
def _format_seconds(epoch_s: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s)).encode()


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in RECORD_FIELDS}


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO gateway: message name=value`; a traceback follows on the same line, escaped."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage() + "".join(f" {name}={value}" for name, value in _extra(record).items())
        if record.exc_info:
            text += " | " + self.formatException(record.exc_info)
        return escape(f"{timestamp(record.created)} {record.levelname} {self._process}: {text}")


class JsonFormatter(logging.Formatter):
    """One ASCII object per line: ts, level, process, msg, the fields given by `extra`, and the traceback, if any."""

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


def await_writable(fd: int) -> None:
    """Wait until a descriptor can be written to, for a second at most."""
    select.select((), (fd,), (), 1.0)


class LineWriter:
    """Writes lines to a file descriptor from a separate thread: a reader that stalls blocks that thread alone.

    At most `capacity` lines are queued. Lines that arrive while the queue is full are dropped and counted; the count is
    reported once there is room again. Errors of the descriptor are ignored: they cannot be reported on it.
    """

    def __init__(
        self,
        fd: int,
        drop_notice: Callable[[int], bytes],
        capacity: int = CAPACITY_LINES,
        await_room: Callable[[int], None] = await_writable,
    ) -> None:
        """`drop_notice` returns the line that reports how many lines were dropped.

        `await_room` waits until a non-blocking descriptor has room; it is a parameter for tests.
        """
        self._fd = fd
        self._await_room = await_room
        self._drop_notice = drop_notice
        self._queue: queue.Queue[bytes] = queue.Queue(capacity)
        self._dropped = 0  # changed by `write` alone
        self._reported = 0  # changed by the thread alone
        self._closing = False
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Queue a line with its end. Never blocks, never raises."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, within a time limit: a stalled reader must not keep a process alive."""
        self._closing = True
        if self._thread is not None:
            with suppress(queue.Full):
                self._queue.put_nowait(b"")  # wakes the thread
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing or not self._queue.empty():
            self._write(self._queue.get())
            if self._reported < self._dropped and self._queue.empty():
                dropped, self._reported = self._dropped - self._reported, self._dropped
                self._write(self._drop_notice(dropped))

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # noqa: PERF203 - another process has made the descriptor non-blocking
                self._await_room(self._fd)
            except OSError:
                return


class LineHandler(logging.Handler):
    """Writes lines to a stream of any encoding, without waiting for its reader if the stream has a descriptor."""

    def __init__(
        self, process: str, fmt: str, stream: TextIO | None = None, shared_with: "LineHandler | None" = None
    ) -> None:
        """`shared_with` is a handler whose stream this one writes to as well, in one order."""
        super().__init__()
        self._stream = stream or sys.stdout
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self.setFormatter(JsonFormatter(process) if fmt == "json" else TextFormatter(process))
        self._writer: LineWriter | None = self._make_writer() if shared_with is None else shared_with._writer

    def _make_writer(self) -> LineWriter | None:
        """Return a writer on the stream's descriptor; None for a stream in memory, which does not block."""
        try:
            return LineWriter(self._stream.fileno(), self._drop_notice)
        except (AttributeError, OSError, ValueError):
            return None

    def _drop_notice(self, count: int) -> bytes:
        message = f"{count} log lines were dropped: the reader of the log was too slow"
        return self._encode(self.format(logging.LogRecord("logs", logging.WARNING, "", 0, message, (), None)))

    def _encode(self, line: str) -> bytes:
        return f"{line}\n".encode(self._encoding, "backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._encode(self.format(record))
            if self._writer is not None:
                self._writer.write(line)
            else:
                self._stream.write(line.decode(self._encoding))
                self._stream.flush()
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Write what is queued; `logging` calls it when the process ends."""
        if self._writer is not None:
            self._writer.close()
        super().close()


def setup(process: str, level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Configure the root logger to write one line per event to stdout (or `stream`), Python's warnings included."""
    root = logging.getLogger()
    root.handlers[:] = [LineHandler(process, fmt, stream)]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def setup_child(name: str, fmt: str) -> None:
    """Let the logger of that name write a child process's lines under its name, in order with the process's own."""
    root_handlers = (handler for handler in logging.getLogger().handlers if isinstance(handler, LineHandler))
    logger = logging.getLogger(name)
    logger.handlers[:] = [LineHandler(name, fmt, shared_with=next(root_handlers, None))]
    logger.propagate = False
