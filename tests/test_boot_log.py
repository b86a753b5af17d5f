"""The boot's log file, its link and its age; and lines, however the bytes come."""

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from boot_log import LINE_BYTES, BootLog, Lines

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


def test_the_newest_ten_are_kept_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for day in range(10, 25):
        (tmp_path / f"202601{day}T000000Z_server_a.log").touch()
    (tmp_path / "notes.log").touch()
    BootLog(tmp_path, "b", datetime(2026, 2, 1, tzinfo=timezone.utc))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *(f"202601{day}T000000Z_server_a.log" for day in range(16, 25)),
        "20260201T000000Z_server_b.log",
        "latest",
        "notes.log",
    ]


def test_a_boot_with_a_wrong_clock_keeps_its_own_file(tmp_path: Path) -> None:
    for day in range(10, 25):
        (tmp_path / f"202601{day}T000000Z_server_a.log").touch()
    log = BootLog(tmp_path, "b", datetime(1970, 1, 1, tzinfo=timezone.utc))
    assert log.path.exists()
    assert len(list(tmp_path.iterdir())) == 11


def test_a_stale_link_and_a_volume_that_takes_none_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".latest.{os.getpid()}").touch()
    BootLog(tmp_path, "a", AT)
    assert (tmp_path / "latest").is_symlink()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert BootLog(tmp_path, "b", AT).path.exists()


def test_a_full_disk_silences_the_file_only() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = BootLog.__new__(BootLog)
    log._fd = os.open("/dev/full", os.O_WRONLY)
    log.write(b"lost")
    log.close()
    log.write(b"too late")
    log.close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        BootLog(tmp_path / "file" / "logs", "a", AT)


def read(*chunks: bytes) -> list[str]:
    taken: list[str] = []
    lines = Lines(taken.append)
    for chunk in chunks:
        lines.feed(chunk)
    lines.end()
    lines.end()
    return taken


def test_lines_do_not_depend_on_how_the_bytes_come() -> None:
    data = "one\r\ntwö\n\nlast".encode()
    expected = ["one", "twö", "last"]
    assert read(data) == expected
    assert read(*[data[i : i + 1] for i in range(len(data))]) == expected


def test_what_has_no_end_is_passed_on_in_pieces() -> None:
    assert [len(line) for line in read(b"x" * (2 * LINE_BYTES + 5))] == [LINE_BYTES, LINE_BYTES, 5]


def test_what_is_not_text_is_made_text() -> None:
    assert read(b"\xff\xfe\n") == ["��"]
