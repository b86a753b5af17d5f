"""The boot's log file, its link and the pruning; and lines, however the bytes arrive."""

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from boot.boot_log import LINE_BYTES, MAX_QUEUED_BYTES, BootLog, LineSplitter

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def test_the_file_is_named_by_time_and_machine_and_latest_points_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "llama"
    log = BootLog(folder, "host-1", AT)
    log.write(b"one\n")
    log.write(b"two\n")
    log.close()
    assert log.path.name == "20260102T030405Z_server_host-1.log"
    assert (folder / "latest").read_bytes() == b"one\ntwo\n"
    assert os.readlink(folder / "latest") == log.path.name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_ten_of_its_own_are_kept_and_files_with_other_names_stay(tmp_path: Path) -> None:
    for day in range(10, 25):
        (tmp_path / f"202601{day}T000000Z_server_a.log").touch()
        (tmp_path / f"202601{day}T000000Z_server_a-2.log").touch()
    (tmp_path / "notes.log").touch()
    BootLog(tmp_path, "a", datetime(2026, 2, 1, tzinfo=timezone.utc)).close()
    assert names(tmp_path) == [
        *(f"202601{day}T000000Z_server_a-2.log" for day in range(10, 16)),
        *(f"202601{day}T000000Z_server_{id}.log" for day in range(16, 25) for id in ("a-2", "a")),
        "20260201T000000Z_server_a.log",
        "latest",
        "notes.log",
    ]


def test_a_boot_with_a_wrong_clock_keeps_its_own_file(tmp_path: Path) -> None:
    for day in range(10, 25):
        (tmp_path / f"202601{day}T000000Z_server_b.log").touch()
    log = BootLog(tmp_path, "b", datetime(1970, 1, 1, tzinfo=timezone.utc))
    log.close()
    assert log.path.exists()
    assert len(list(tmp_path.iterdir())) == 11


def test_neither_a_stale_link_nor_a_link_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / f".latest.{os.getpid()}").touch()
    BootLog(tmp_path, "a", AT).close()
    assert (tmp_path / "latest").is_symlink()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    log = BootLog(tmp_path, "b", AT)
    log.write(b"one")
    log.close()
    assert log.path.read_bytes() == b"one"


def test_a_file_that_is_full_goes_on_as_a_new_one(tmp_path: Path) -> None:
    log = BootLog(tmp_path, "a", AT, max_bytes=10)
    for data in (b"one\n", b"two\n", b"three\n", b"four\n", b"much more than fits\n", b"end\n"):
        log.write(data)
    log.close()
    assert names(tmp_path) == [log.path.name, f"{log.path.name}.1", "latest"]
    assert log.path.read_bytes() == b"end\n"
    assert Path(f"{log.path}.1").read_bytes() == b"much more than fits\n"


def test_on_a_volume_that_cannot_rename_a_full_file_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "20260102T030405Z_server_a.log.1").mkdir()  # no file can be renamed to it
    log = BootLog(tmp_path, "a", AT, max_bytes=10)
    log.write(b"one\n")
    log.write(b"and two\n")
    log.close()
    assert log.path.read_bytes() == b"and two\n"


def test_a_file_that_was_moved_is_made_again_on_request(tmp_path: Path) -> None:
    log = BootLog(tmp_path, "a", AT)
    log.path.rename(tmp_path / "moved")
    log.reopen()
    log.write(b"new")
    log.close()
    assert (log.path.read_bytes(), (tmp_path / "moved").read_bytes()) == (b"new", b"")


def test_a_full_disk_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / f"{AT:%Y%m%dT%H%M%SZ}_server_a.log").symlink_to("/dev/full")
    log = BootLog(tmp_path, "a", AT)
    log.write(b"lost")
    log.write(b"lost, too")
    log.close()
    assert caplog.messages == [
        f"the log of llama-server cannot be kept in {tmp_path} (LOG_DIR, DATA_DIR): No space left on device"
    ]


def test_writing_and_closing_after_the_end_do_nothing(tmp_path: Path) -> None:
    log = BootLog(tmp_path, "a", AT)
    log.close()
    log.write(b"too late")
    log.close()
    assert log.path.read_bytes() == b""


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    log = BootLog(tmp_path / "file" / "logs", "a", AT)
    log.write(b"lost")
    log.close()
    assert [message.endswith("(LOG_DIR, DATA_DIR): Not a directory") for message in caplog.messages] == [True]


def test_what_does_not_fit_into_the_queue_of_a_volume_that_hangs_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fifo = tmp_path / f"{AT:%Y%m%dT%H%M%SZ}_server_a.log"
    os.mkfifo(fifo)  # opening it blocks until there is a reader
    log = BootLog(tmp_path, "a", AT)
    log.write(b"x" * MAX_QUEUED_BYTES)
    log.write(b"dropped")
    with fifo.open("rb") as reader:
        received = bytearray()
        while not received.endswith(b"]\n"):
            received += reader.read1()
        log.close()
    assert received == b"x" * MAX_QUEUED_BYTES + b"[7 bytes are missing here]\n"
    assert caplog.messages == [f"7 bytes of llama-server's output are missing in {fifo}"]


def split(*chunks: bytes) -> list[str]:
    taken: list[str] = []
    lines = LineSplitter(taken.append)
    for chunk in chunks:
        lines.feed(chunk)
    lines.close()
    lines.close()
    return taken


def test_lines_do_not_depend_on_how_the_bytes_arrive() -> None:
    data = "one\r\ntwö\n\nlast".encode()
    expected = ["one", "twö", "last"]
    assert split(data) == expected
    assert split(*[data[i : i + 1] for i in range(len(data))]) == expected


def test_a_line_without_an_end_is_passed_on_in_pieces() -> None:
    assert [len(line) for line in split(b"x" * (2 * LINE_BYTES + 5))] == [LINE_BYTES, LINE_BYTES, 5]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert split(b"\xff\xfe\n") == ["��"]
