"""The run directory: private, in memory first, gone at the end, and swept where a killed supervisor left one."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest

from run_dir import PREFIX, RunDir, StateFile


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_key_are_the_owners_alone(tmp_path: Path) -> None:
    run_dir = RunDir([tmp_path])
    key = run_dir.write_key(None)
    assert re.fullmatch(r"gateway-[A-Za-z0-9_-]{43}", key)
    assert run_dir.key_file.read_text() == key + "\n"
    assert (mode(run_dir.path), mode(run_dir.key_file)) == (0o700, 0o600)
    run_dir.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_later_does_not_end_what_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    state = StateFile(folder / "state.json", lambda: datetime(2026, 1, 1, tzinfo=timezone.utc))
    with pytest.raises(FileNotFoundError):
        state.tell("loading", "starting")
    folder.mkdir()
    assert state.tell("loading", "starting")
    (folder / "state.json").unlink()
    folder.rmdir()
    assert not state.tell("ready", "serving")
    assert "the state file cannot be written" in caplog.text
    folder.mkdir()
    assert state.tell("ready", "serving")


def test_each_boot_has_a_key_of_its_own_unless_one_is_given(tmp_path: Path) -> None:
    keys = [RunDir([tmp_path]).write_key(given) for given in (None, None, "gateway-given")]
    assert keys[2] == "gateway-given"
    assert len(set(keys)) == 3


def test_the_first_place_that_can_be_written_is_taken(tmp_path: Path) -> None:
    assert RunDir([tmp_path / "none", tmp_path]).path.parent == tmp_path
    with pytest.raises(OSError, match=r"none of .*/none can be written"):
        RunDir([tmp_path / "none"])


def test_what_a_killed_supervisor_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    (left / "lock").touch()
    (left / "backend.key").touch()
    somebody_elses = tmp_path / f"{PREFIX}new"
    somebody_elses.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
    in_use = RunDir([tmp_path])
    mine = RunDir([tmp_path])
    assert not left.exists()
    assert in_use.path.exists()
    assert mine.path.exists()
    assert somebody_elses.exists()


def test_boots_at_one_time_leave_each_others_folders_alone(tmp_path: Path) -> None:
    def boot(number: int) -> bool:
        run_dir = RunDir([tmp_path])
        run_dir.write_key(None)
        there = run_dir.key_file.exists()
        run_dir.remove()
        return there

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(boot, range(200)))


def test_the_state_is_written_whole_and_only_when_it_changes(tmp_path: Path) -> None:
    at = iter(datetime(2026, 1, 2, 3, 4, second, 5000, timezone.utc) for second in range(60))
    path = tmp_path / "state.json"
    state = StateFile(path, lambda: next(at))
    assert state.tell("loading", "starting")
    expected = {"state": "loading", "since": "2026-01-02T03:04:00.005Z", "detail": "starting", "backend_pid": None}
    assert json.loads(path.read_text()) == expected
    with path.open() as old:
        assert not state.tell("loading", "starting")
        assert os.path.samestat(os.fstat(old.fileno()), path.stat())
        assert not state.tell("loading", "starting", 7)
        assert not os.path.samestat(os.fstat(old.fileno()), path.stat())
        assert json.load(old) == expected
    assert json.loads(path.read_text()) == {**expected, "backend_pid": 7}
    assert state.tell("ready", "serving", 7)
    assert json.loads(path.read_text())["since"] == "2026-01-02T03:04:01.005Z"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    state.remove()
    state.remove()
    assert list(tmp_path.iterdir()) == []
