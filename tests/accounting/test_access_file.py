"""access_file.py: the access log's file, which neither blocks nor fails its caller."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from accounting.access_file import AccessLog
from support.boot import PATIENCE_S


class WarningCollector(logging.Handler):
    """Collects messages; `wait(n)` returns them once n have arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.messages.append(record.getMessage())
            self._changed.notify_all()

    def wait(self, number: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.messages) >= number, timeout=PATIENCE_S)
            return self.messages[:]


@pytest.fixture
def warned() -> Iterator[WarningCollector]:
    logger = logging.getLogger("accounting.access_file")
    collector = WarningCollector()
    logger.addHandler(collector)
    yield collector
    logger.removeHandler(collector)


# --- Writing ---


def test_lines_are_appended_whole_and_in_order(tmp_path: Path) -> None:
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


def test_lines_are_written_without_a_flush() -> None:
    reader, writer = os.pipe()
    log = AccessLog(Path(f"/dev/fd/{writer}"))
    log.write_lines([b"hello"])
    assert os.read(reader, 100) == b"hello\n"
    log.close()
    os.close(reader)
    os.close(writer)


def test_after_close_lines_are_dropped(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    log.close()
    log.write_lines([b"late"])
    log.reopen()
    log.close()
    assert log.dropped == 1
    assert (tmp_path / "access.log").read_text() == ""


# --- Rotation ---


def test_reopening_starts_a_new_file_for_later_lines(tmp_path: Path) -> None:
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


def test_without_reopening_lines_go_to_the_renamed_file(tmp_path: Path) -> None:
    path, rotated = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(path)
    path.rename(rotated)
    log.write_lines([b"1"])
    log.close()
    assert rotated.read_text() == "1\n"
    assert not path.exists()


# --- A slow reader ---


def test_a_full_queue_drops_lines_and_reports_it_once(tmp_path: Path, warned: WarningCollector) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(fifo, capacity=3)
    line = b"x" * 100_000  # more than a pipe holds, so that nothing is written whole until the pipe is read
    log.write_lines([line] * 20)
    assert log.dropped == 17
    assert warned.wait(1) == [f"the access log {fifo} is too slow: 17 lines were dropped so far"]
    log.close()
    assert log.dropped == 20
    assert warned.messages[1:] == [f"the access log {fifo} is closed and 3 of its lines are lost"]
    os.close(reader)


def test_drops_are_reported_again_only_after_reopening(tmp_path: Path, warned: WarningCollector) -> None:
    log = AccessLog(tmp_path / "access.log", capacity=0)
    log.write_lines([b"1"])
    warned.wait(1)
    log.write_lines([b"2"])
    log.reopen()
    log.close()
    assert [message.rpartition(": ")[2] for message in warned.messages] == ["1 lines were dropped so far"]
    assert log.dropped == 2


def torn(fifo: Path, warned: WarningCollector) -> tuple[AccessLog, int]:
    """Fill a pipe with one line and a part of the next; return the log and the pipe's reading end."""
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(fifo, capacity=2)
    log.write_lines([b"a" * 10, b"b" * 100_000, b"dropped, which is reported when the pipe is full"])
    warned.wait(1)
    return log, reader


def test_a_line_torn_by_a_full_file_is_written_whole_to_the_new_one(tmp_path: Path, warned: WarningCollector) -> None:
    path = tmp_path / "access.log"
    log, reader = torn(path, warned)
    path.unlink()
    log.reopen()
    log.close()
    assert os.read(reader, 1 << 20).startswith(b"a" * 10 + b"\nbbb")
    assert path.read_text() == "b" * 100_000 + "\n"
    os.close(reader)


def test_reopening_the_same_file_continues_a_torn_line(tmp_path: Path, warned: WarningCollector) -> None:
    log, reader = torn(tmp_path / "access.log", warned)
    log.reopen()
    os.set_blocking(reader, True)
    got = b""
    while not got.endswith(b"b\n"):
        got += os.read(reader, 1 << 20)
    log.close()
    assert got == b"a" * 10 + b"\n" + b"b" * 100_000 + b"\n"
    os.close(reader)


# --- A disk that fails ---


def test_a_full_disk_is_reported_once_and_lines_go_to_the_reopened_file(
    tmp_path: Path, warned: WarningCollector
) -> None:
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


def test_lines_that_a_full_disk_never_took_are_counted_at_close(tmp_path: Path, warned: WarningCollector) -> None:
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


def test_a_file_that_was_never_opened_can_be_closed(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    log = AccessLog(tmp_path / "logs" / "access.log")
    log.write_lines([b"1"])
    log.close()
    assert log.dropped == 1


def test_a_folder_that_cannot_be_created_is_tried_again(tmp_path: Path, warned: WarningCollector) -> None:
    (tmp_path / "logs").write_text("in the way")
    log = AccessLog(tmp_path / "logs" / "access.log")
    assert warned.wait(1) == [f"the access log {tmp_path}/logs/access.log cannot be written: File exists"]
    log.reopen()
    (tmp_path / "logs").unlink()
    log.write_lines([b"1"])
    log.close()
    assert (tmp_path / "logs" / "access.log").read_text() == "1\n"
