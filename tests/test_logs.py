"""logs.py: one line an event on any stream, and an access file that neither blocks nor fails its caller."""

import io
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import logs
from logs import AccessLog

WHEN_S = 1767323045.678
WHEN = "2026-01-02T03:04:05.678Z"


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "args": args, "levelno": 20, "levelname": "INFO", **fields})
    made.created = WHEN_S
    return made


def error() -> tuple[type[BaseException], BaseException, None]:
    return ValueError, ValueError("two\nlines"), None


class Warned(logging.Handler):
    """Collects messages; `wait(n)` returns when n have come."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._came = threading.Condition()
        logging.getLogger().addHandler(self)
        logging.getLogger().setLevel("INFO")

    def emit(self, record: logging.LogRecord) -> None:
        with self._came:
            self.messages.append(record.getMessage())
            self._came.notify_all()

    def wait(self, number: int) -> list[str]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.messages) >= number, timeout=10)
            return self.messages[:]


# Lines


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain é 🙂 \\n", "plain é 🙂 \\n"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x00\x1b[31m\x7f\x9b", "\\x00\\x1b[31m\\x7f\\x9b"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\udcff", "\udcff"),
    ],
)
def test_escape_is_done_once(text: str, escaped: str):
    assert logs.escape(text) == escaped
    assert logs.escape(escaped) == escaped


@pytest.mark.parametrize(
    ("epoch_s", "text"),
    [
        (WHEN_S, WHEN),
        (0, "1970-01-01T00:00:00.000Z"),
        (0.9996, "1970-01-01T00:00:01.000Z"),
        (1.001, "1970-01-01T00:00:01.001Z"),
    ],
)
def test_timestamp_is_utc_with_milliseconds(epoch_s: float, text: str):
    assert logs.timestamp(epoch_s) == text


def test_text_line():
    assert logs.TextLines("gateway").format(record("hello %s", "é")) == f"{WHEN} INFO gateway: hello é"


def test_text_line_has_extra_fields_as_words():
    line = logs.TextLines("gateway").format(record("hello\nthere", port=80, who="a\x1b"))
    assert line == f"{WHEN} INFO gateway: hello\\nthere port=80 who=a\\x1b"


def test_text_line_keeps_a_traceback_on_it():
    line = logs.TextLines("gateway").format(record("failed", exc_info=error()))
    assert line == f"{WHEN} INFO gateway: failed | ValueError: two\\nlines"


def test_json_line():
    line = logs.JsonLines("health").format(record("a\n%s", "é🙂", port=80, path=Path("/x"), ts="mine"))
    assert line.isascii()
    assert json.loads(line) == {
        "ts": WHEN, "level": "INFO", "process": "health", "msg": "a\né🙂", "port": 80, "path": "/x",
    }  # fmt: skip
    assert "\\n" in line
    assert "\\\\n" not in line


def test_json_line_has_the_traceback_as_one_field():
    line = logs.JsonLines("health").format(record("failed", exc_info=error()))
    assert json.loads(line)["traceback"] == "ValueError: two\nlines"
    assert "\n" not in line


# setup


def test_setup_replaces_what_was_there_and_sets_the_level():
    out = io.StringIO()
    logs.setup("gateway", "error", "text", io.StringIO())
    logs.setup("gateway", "warning", "text", out)
    logging.getLogger("asyncio").warning("from a library")
    logging.getLogger("anything").info("too fine")
    assert re.fullmatch(r"\S+Z WARNING gateway: from a library\n", out.getvalue())


def test_setup_writes_to_stdout_unless_told(capsys: pytest.CaptureFixture[str]):
    logs.setup("gateway", "info", "json")
    logging.info("hello")
    assert json.loads(capsys.readouterr().out)["msg"] == "hello"


def test_a_warning_of_python_is_one_line_too():
    out = io.StringIO()
    logs.setup("gateway", "info", "text", out)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert out.getvalue().count("\n") == 1
    assert "DeprecationWarning: old" in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("fmt", ["text", "json"])
def test_pitfall_45_emoji_break_no_stream_and_no_line(encoding: str, fmt: str):
    raw = io.BytesIO()
    logs.setup("gateway", "info", fmt, io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    logging.info("🙂 \udcff\n%s", "é")
    text = raw.getvalue().decode(encoding)
    assert text.count("\n") == 1
    if fmt == "json":
        assert json.loads(text)["msg"] == "🙂 \udcff\né"
    else:
        assert "\\udcff\\n" in text


def test_a_stream_that_is_gone_is_no_error(capsys: pytest.CaptureFixture[str]):
    with open("/dev/full", "w", encoding="utf-8") as full:
        logs.setup("gateway", "info", "text", full)
        logging.info("nobody hears this")
        logging.getLogger().handlers.clear()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert capsys.readouterr().err == ""


def test_a_bug_in_a_log_call_is_shown(capsys: pytest.CaptureFixture[str]):
    logs.setup("gateway", "info", "text", io.StringIO())
    logging.info("%d", "x")
    assert "TypeError" in capsys.readouterr().err


# AccessLog


def test_lines_are_appended_whole_and_in_order(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "access.log"
    for first in (0, 500):
        log = AccessLog(path)
        for number in range(first, first + 500):
            log.write_lines([f"line {number} é".encode()])
        log.close()
        assert log.dropped == 0
    expected = "".join(f"line {number} é\n" for number in range(1000))
    assert path.read_text(encoding="utf-8") == expected
    assert path.stat().st_mode & 0o137 == 0


def test_lines_are_written_without_being_asked(tmp_path: Path):
    reader, writer = os.pipe()
    log = AccessLog(Path(f"/dev/fd/{writer}"))
    log.write_lines([b"hello"])
    assert os.read(reader, 100) == b"hello\n"
    log.close()
    os.close(reader)
    os.close(writer)


def test_pitfall_40_the_file_is_opened_once_and_reopened_when_told(tmp_path: Path):
    path, rotated = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(path)
    log.write_lines([b"1"])
    path.rename(rotated)
    log.write_lines([b"2"])
    log.reopen()
    log.write_lines([b"3"])
    log.reopen()
    log.close()
    assert rotated.read_text() == "1\n2\n"
    assert path.read_text() == "3\n"


def test_pitfall_40_lines_go_on_to_the_open_file_until_then(tmp_path: Path):
    path, rotated = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(path)
    path.rename(rotated)
    log.write_lines([b"1"])
    log.close()
    assert rotated.read_text() == "1\n"
    assert not path.exists()


def test_a_full_queue_drops_and_counts_and_tells_once(tmp_path: Path):
    warned = Warned()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(fifo, capacity=3)
    line = b"x" * 100_000  # more than a pipe holds, so that nothing is written whole until somebody reads
    for _ in range(20):
        log.write_lines([line])
    assert log.dropped == 17
    assert warned.wait(1) == [f"the access log {fifo} is too slow: 17 lines were dropped so far"]
    log.close()
    assert log.dropped == 20
    assert warned.messages[1:] == [f"the access log {fifo} is closed and 3 of its lines are lost"]
    os.close(reader)


def test_after_close_lines_are_dropped_and_nothing_fails(tmp_path: Path):
    log = AccessLog(tmp_path / "access.log")
    log.close()
    log.write_lines([b"late"])
    log.reopen()
    log.close()
    assert log.dropped == 1
    assert (tmp_path / "access.log").read_text() == ""


def test_a_full_disk_is_told_once_and_reopening_is_a_remedy(tmp_path: Path):
    warned = Warned()
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(path)
    log.write_lines([b"1"])
    warned.wait(1)
    log.write_lines([b"2"])
    path.unlink()
    log.reopen()
    warned.wait(2)
    log.write_lines([b"3"])
    log.close()
    assert path.read_text() == "1\n2\n3\n"
    assert warned.messages == [
        f"the access log {path} cannot be written: No space left on device",
        f"the access log {path} works again; 0 lines were dropped so far",
    ]


def test_what_a_full_disk_never_took_is_lost_and_counted_at_the_end(tmp_path: Path):
    warned = Warned()
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(path)
    log.write_lines([b"1"])
    log.write_lines([b"2"])
    log.reopen()
    log.write_lines([b"3"])
    log.close()
    assert log.dropped == 3
    assert [message.rpartition(f"{path} ")[2] for message in warned.messages] == [
        "cannot be written: No space left on device",
        "is closed and 3 of its lines are lost",
    ]


def test_a_file_that_was_never_opened_is_no_error_at_the_end(tmp_path: Path):
    (tmp_path / "logs").write_text("in the way")
    log = AccessLog(tmp_path / "logs" / "access.log")
    log.write_lines([b"1"])
    log.close()
    assert log.dropped == 1


def test_a_folder_that_cannot_be_made_is_no_error_and_is_tried_again(tmp_path: Path):
    warned = Warned()
    (tmp_path / "logs").write_text("in the way")
    log = AccessLog(tmp_path / "logs" / "access.log")
    assert warned.wait(1) == [f"the access log {tmp_path}/logs/access.log cannot be written: File exists"]
    log.reopen()
    (tmp_path / "logs").unlink()
    log.write_lines([b"1"])
    log.close()
    assert (tmp_path / "logs" / "access.log").read_text() == "1\n"


def torn(fifo: Path) -> tuple[AccessLog, int]:
    """Let a pipe take one line and a part of the next; return the log and the pipe's reading end."""
    warned = Warned()
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(fifo, capacity=2)
    for text in (b"a" * 10, b"b" * 100_000, b"dropped, and told when the pipe is full"):
        log.write_lines([text])
    warned.wait(1)
    return log, reader


def test_a_line_torn_by_a_full_file_goes_whole_to_the_new_one(tmp_path: Path):
    path = tmp_path / "access.log"
    log, reader = torn(path)
    path.unlink()
    log.reopen()
    log.close()
    assert os.read(reader, 1 << 20).startswith(b"a" * 10 + b"\nbbb")
    assert path.read_text() == "b" * 100_000 + "\n"
    os.close(reader)


def test_reopening_the_same_file_continues_a_torn_line(tmp_path: Path):
    log, reader = torn(tmp_path / "access.log")
    log.reopen()
    os.set_blocking(reader, True)
    got = b""
    while not got.endswith(b"b\n"):
        got += os.read(reader, 1 << 20)
    log.close()
    assert got == b"a" * 10 + b"\n" + b"b" * 100_000 + b"\n"
    os.close(reader)


def test_new_drops_are_told_again_after_a_reopening_only(tmp_path: Path):
    warned = Warned()
    log = AccessLog(tmp_path / "access.log", capacity=0)
    log.write_lines([b"1"])
    warned.wait(1)
    log.write_lines([b"2"])
    log.reopen()
    log.close()
    assert [message.rpartition(": ")[2] for message in warned.messages] == ["1 lines were dropped so far"]
    assert log.dropped == 2
