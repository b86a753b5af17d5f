"""logs.py: one line per event, on any stream."""

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from core import logs

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


# --- Escaping and timestamps ---


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
def test_escaping_twice_changes_nothing(text: str, escaped: str) -> None:
    assert logs.escape(text) == escaped
    assert logs.escape(escaped) == escaped


TIMES = [
    (WHEN_S, WHEN),
    (0.0, "1970-01-01T00:00:00.000Z"),
    (0.9996, "1970-01-01T00:00:01.000Z"),
    (1.001, "1970-01-01T00:00:01.001Z"),
]


@pytest.mark.parametrize(("epoch_s", "text"), TIMES)
def test_timestamp_is_utc_with_milliseconds(epoch_s: float, text: str) -> None:
    assert logs.timestamp(epoch_s) == text


def test_timestamps_format_each_time() -> None:
    assert list(logs.timestamps([epoch_s for epoch_s, _ in TIMES])) == [text.encode() for _, text in TIMES]


# --- Lines ---


def test_text_line() -> None:
    assert logs.TextFormatter("gateway").format(record("hello %s", "é")) == f"{WHEN} INFO gateway: hello é"


def test_text_line_ends_with_extra_fields() -> None:
    line = logs.TextFormatter("gateway").format(record("hello\nthere", port=80, who="a\x1b"))
    assert line == f"{WHEN} INFO gateway: hello\\nthere port=80 who=a\\x1b"


def test_text_line_contains_the_traceback() -> None:
    line = logs.TextFormatter("gateway").format(record("failed", exc_info=error()))
    assert line == f"{WHEN} INFO gateway: failed | ValueError: two\\nlines"


def test_json_line() -> None:
    line = logs.JsonFormatter("health").format(record("a\n%s", "é🙂", port=80, path=Path("/x"), ts="mine"))
    assert line.isascii()
    assert json.loads(line) == {
        "ts": WHEN, "level": "INFO", "process": "health", "msg": "a\né🙂", "port": 80, "path": "/x",
    }  # fmt: skip
    assert "\\n" in line
    assert "\\\\n" not in line


def test_json_line_contains_the_traceback_as_one_field() -> None:
    line = logs.JsonFormatter("health").format(record("failed", exc_info=error()))
    assert json.loads(line)["traceback"] == "ValueError: two\nlines"
    assert "\n" not in line


# --- setup ---


def test_setup_replaces_earlier_handlers_and_sets_the_level() -> None:
    out = io.StringIO()
    logs.setup("gateway", "error", "text", io.StringIO())
    logs.setup("gateway", "warning", "text", out)
    logging.getLogger("asyncio").warning("from a library")
    logging.getLogger("anything").info("too fine")
    assert re.fullmatch(r"\S+Z WARNING gateway: from a library\n", out.getvalue())


def test_setup_writes_to_stdout_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("gateway", "info", "json")
    logging.info("hello")
    assert json.loads(capsys.readouterr().out)["msg"] == "hello"


def test_a_python_warning_is_one_line() -> None:
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
def test_any_character_can_be_logged_in_any_encoding(encoding: str, fmt: str) -> None:
    raw = io.BytesIO()
    logs.setup("gateway", "info", fmt, io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    logging.info("🙂 \udcff\n%s", "é")
    text = raw.getvalue().decode(encoding)
    assert text.count("\n") == 1
    if fmt == "json":
        assert json.loads(text)["msg"] == "🙂 \udcff\né"
    else:
        assert "\\udcff\\n" in text


def test_an_error_of_the_stream_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        logs.setup("gateway", "info", "text", full)
        logging.info("this line is lost")
        logging.getLogger().handlers[0].close()
        logging.getLogger().handlers.clear()
    assert capsys.readouterr().err == ""


# --- A reader that stalls ---

LINE = b"x" * 99 + b"\n"


def notice(count: int) -> bytes:
    return b"%d dropped\n" % count


def test_a_stalled_reader_blocks_nothing_and_what_it_missed_is_counted() -> None:
    reading, writing = os.pipe()
    writer = logs.LineWriter(writing, notice, capacity=10)
    for _ in range(5000):  # more than the pipe and the queue hold
        writer.write(LINE)
    received = b""
    while received.count(LINE) + sum(map(int, re.findall(rb"(\d+) dropped\n", received))) < 5000:
        received += os.read(reading, 1 << 16)
    assert b" dropped" in received
    writer.close()
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_the_number_of_dropped_lines_is_a_line_of_the_log(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        logs.setup("gateway", "info", "text", stream)
        for _ in range(30_000):
            logging.info("%s", "x" * 100)
        received = b""
        while b"log lines were dropped" not in received:
            received += os.read(reading, 1 << 20)
        logging.getLogger().handlers[0].close()
    os.close(reading)
    assert re.search(rb"Z WARNING gateway: \d+ log lines were dropped", received)


def test_a_log_without_a_line_is_closed_at_once() -> None:
    reading, writing = os.pipe()
    logs.LineWriter(writing, notice).close()
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_log_in_memory_has_nothing_to_write_when_it_is_closed() -> None:
    stream = io.StringIO()
    handler = logs.LineHandler("gateway", "text", stream)
    handler.emit(record("a line"))
    handler.close()
    assert stream.getvalue().endswith("a line\n")


def test_close_writes_what_is_queued() -> None:
    reading, writing = os.pipe()
    writer = logs.LineWriter(writing, notice)
    for _ in range(100):
        writer.write(LINE)
    writer.close()
    assert os.read(reading, 1 << 16) == LINE * 100
    os.close(reading)
    os.close(writing)


def test_close_does_not_wait_for_a_stalled_reader_for_ever() -> None:
    reading, writing = os.pipe()
    writer = logs.LineWriter(writing, notice, capacity=1)
    for _ in range(5000):
        writer.write(LINE)
    writer.close(timeout_s=0.01)
    os.set_blocking(reading, False)
    assert os.read(reading, 1)
    os.close(reading)  # the thread's write fails, and it ends


def test_a_non_blocking_descriptor_is_written_to_as_it_has_room() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = b""
    with suppress(BlockingIOError):
        while True:
            filled += b"x" * os.write(writing, b"x" * 4096)
    received: list[bytes] = []

    def make_room(fd: int) -> None:
        received.append(os.read(reading, len(filled)))
        logs.await_writable(fd)

    writer = logs.LineWriter(writing, notice, await_room=make_room)
    writer.write(LINE)
    writer.close(60.0)
    assert (received, os.read(reading, 1 << 16)) == ([filled], LINE)
    os.close(reading)
    os.close(writing)


def test_a_childs_lines_have_its_name_and_come_in_order(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        logs.setup("supervisor", "info", "text", stream)
        logs.setup_child("llama-server", "text")
        for number in range(100):
            logging.getLogger("llama-server" if number % 2 else "other").info("%d", number)
        logging.getLogger().handlers[0].close()
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == [f"{'llama-server' if number % 2 else 'supervisor'}: {number}" for number in range(100)]
    logging.getLogger("llama-server").handlers.clear()


def test_a_bug_in_a_log_call_is_reported_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("gateway", "info", "text", io.StringIO())
    logging.info("%d", "x")
    assert "TypeError" in capsys.readouterr().err
