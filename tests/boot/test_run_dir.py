"""The run directory: private, removed at the end, and swept after a supervisor that was killed."""

import errno
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from boot.run_dir import PREFIX, RunDir
from support.faults import Fault, environment, make_faults
from support.paths import SCRIPTS


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_key_are_for_their_owner_only(tmp_path: Path) -> None:
    run_dir = RunDir(None, [tmp_path])
    assert re.fullmatch(r"gateway-[A-Za-z0-9_-]{43}", run_dir.key)
    assert run_dir.key_file.read_text() == run_dir.key + "\n"
    assert (mode(run_dir.path), mode(run_dir.key_file)) == (0o700, 0o600)
    run_dir.remove()
    assert list(tmp_path.iterdir()) == []


def test_each_boot_has_a_new_key_unless_one_is_given(tmp_path: Path) -> None:
    keys = [RunDir(given, [tmp_path]).key for given in (None, None, "gateway-given")]
    assert keys[2] == "gateway-given"
    assert len(set(keys)) == 3


def test_the_first_parent_that_can_be_written_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert RunDir(None, [tmp_path / "none", tmp_path]).path.parent == tmp_path
    assert caplog.messages == [
        f"the run directory is in {tmp_path}, since another place cannot be used: {tmp_path}/none:"
        " No such file or directory"
    ]
    with pytest.raises(OSError, match=r"it needs one of these folders: .*/none: No such file or directory"):
        RunDir(None, [tmp_path / "none"])


@pytest.mark.parametrize("name", ["*/lock", "*/backend.key", "*/room"])
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_full_parent_is_left_clean_and_the_next_one_used(tmp_path: Path, call: str, name: str) -> None:
    faults = make_faults(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    faults.set(Fault(call, f"{first}/{name}", errno=errno.ENOSPC))
    program = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(SCRIPTS)!r}); from boot.run_dir import RunDir\n"
        f"print(RunDir(None, [Path({str(first)!r}), Path({str(second)!r})]).path.parent.name)"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=environment(faults), capture_output=True, text=True, check=True)
    full = (call, name) != ("write", "*/lock")  # an empty file needs no room
    assert done.stdout == ("second\n" if full else "first\n")
    assert len(list(first.iterdir())) == (not full)


def test_the_folder_of_a_killed_supervisor_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    (left / "lock").touch()
    (left / "backend.key").touch()
    foreign = tmp_path / f"{PREFIX}foreign"  # it has no lock file
    foreign.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
    in_use = RunDir(None, [tmp_path])
    own = RunDir(None, [tmp_path])
    assert not left.exists()
    assert in_use.path.exists()
    assert own.path.exists()
    assert foreign.exists()


def test_simultaneous_boots_do_not_sweep_each_other(tmp_path: Path) -> None:
    def boot(number: int) -> bool:
        run_dir = RunDir(None, [tmp_path])
        exists = run_dir.key_file.exists()
        run_dir.remove()
        return exists

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(boot, range(200)))
