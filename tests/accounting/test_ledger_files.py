"""ledger_files.py: one file for each instance, read together, on volumes that lack something as well."""

import errno
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from accounting.ledger import Ledger, charge, query
from accounting.ledger_files import InstanceFile, LedgerUnreadable, OtherInstances, instance_file, read_all, read_file
from accounting.usage_reports import Tokens
from support.boot import PATIENCE_S
from support.clock import Clock
from support.faults import Fault, make_faults, seen_by_program
from support.paths import SCRIPTS
from support.together import ENVIRON, aside

NOON_S, TODAY = 1772452800.0, "2026-03-02"
ROW = [1, 10, 4, 5, 0, 0, 0, 0.0, 0, 0.0, 0, 0.0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


def write(path: Path, instance_id: str, day: str = TODAY, key_id: str = "alice") -> None:
    """Add a request of 15 tokens to an instance's file."""
    file = InstanceFile(sqlite3, instance_file(path, instance_id))
    assert file.add({(day, key_id): ROW}) is None
    file.close()


def requests(path: Path) -> int:
    return sum(row.requests for row in query(path))


# --- Several files ---


def test_the_files_of_all_instances_are_summed(path: Path) -> None:
    for instance_id in ("a", "b", "a", ""):
        write(path, instance_id)
    (path.with_name("usage.db.d") / "notes.txt").write_text("not a ledger")
    assert sorted(os.listdir(path.with_name("usage.db.d")))[::2] == ["a.db", "b.db", "gateway.db", "notes.txt"]
    assert requests(path) == 4
    assert requests(instance_file(path, "a")) == 2


@pytest.mark.parametrize("name", [".db", "._gateway.db"])
def test_a_hidden_file_is_no_instances(path: Path, name: str) -> None:
    """A file server of another system keeps its own next to each file."""
    write(path, "")
    instance_file(path, "").with_name(name).write_bytes(b"no SQLite here")
    assert requests(path) == 1


@pytest.mark.parametrize("in_use", [True, False])
def test_the_single_file_of_earlier_versions_is_read_and_never_written(path: Path, in_use: bool) -> None:
    write(path, "new")
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        with closing(sqlite3.connect(instance_file(path, "new"))) as new:
            (schema,) = new.execute("SELECT sql FROM sqlite_master").fetchone()
        with db:
            db.execute(schema)
            db.execute(f"INSERT INTO usage VALUES ('{TODAY}', 'alice', {', '.join(map(str, ROW))})")
        if in_use:
            assert requests(path) == 2
    before = path.read_bytes()
    assert requests(path) == 2
    assert OtherInstances(path, instance_file(path, "new")).spent(TODAY) == {TODAY: {"alice": 15}}
    ledger = Ledger(path, Clock(NOON_S), instance_id="new", flush_s=3600.0)
    ledger.record({"alice": charge([(Tokens(10, 4, 5), "done")])})
    assert ledger.spent_today("alice") == 45
    ledger.close()
    assert requests(path) == 3
    assert path.read_bytes() == before


def test_one_unreadable_file_is_an_error_of_the_report_and_a_warning_of_the_gateways(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, "good")
    instance_file(path, "bad").write_bytes(b"no SQLite here, " * 512)
    with pytest.raises(LedgerUnreadable, match=r"usage\.db\.d/bad\.db: file is not a database"):
        query(path)
    ledger = Ledger(path, Clock(NOON_S), instance_id="new", flush_s=3600.0)
    assert ledger.spent_today("alice") == 15
    assert [row.requests for row in ledger.query()] == [1]
    ledger.close()
    (message,) = caplog.messages
    assert message.startswith(f"usage is reported without {instance_file(path, 'bad')}: ")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    unreadable: list[str] = []
    assert read_all(tmp_path / ("x" * 300), "", unreadable) == {}
    assert unreadable == [f"{tmp_path / ('x' * 300)}: File name too long"]


# --- Quotas ---


def test_the_start_and_each_day_see_what_other_instances_have_spent(path: Path) -> None:
    write(path, "other")
    write(path, "other", "2026-03-01")
    write(path, "own")
    others = OtherInstances(path, instance_file(path, "own"))
    for _ in range(2):  # the second time nothing has changed
        assert others.spent(TODAY) == {TODAY: {"alice": 15}}
    assert others.spent("2026-03-01") == {TODAY: {"alice": 15}, "2026-03-01": {"alice": 15}}
    assert others.spent("2026-03-03") == {}
    write(path, "other")
    assert others.spent(TODAY) == {TODAY: {"alice": 30}}
    instance_file(path, "other").write_bytes(b"no SQLite here, " * 512)
    assert others.spent(TODAY) == {TODAY: {"alice": 30}}
    instance_file(path, "other").unlink()
    assert others.spent(TODAY) == {}


def test_a_running_gateway_sees_what_other_instances_spend(path: Path) -> None:
    clock = Clock(NOON_S)
    ledger = Ledger(path, clock, instance_id="own", flush_s=0.0)
    assert ledger.spent_today("alice") == 0
    write(path, "other")
    deadline_s = time.monotonic() + PATIENCE_S
    while ledger.spent_today("alice") < 15:
        assert time.monotonic() < deadline_s
        clock.now_s += 30
        ledger.record({"bob": charge([(None, "refused")])})
        time.sleep(0.001)
    ledger.close()
    clock.now_s += 86400
    assert ledger.spent_today("alice") == 0


SLOW_FILES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accounting.ledger import Ledger, charge, query
path, clock_s = Path(sys.argv[2]), [1772452800.0]
ledger = Ledger(path, lambda: clock_s[0], instance_id="own", flush_s=0.0)
assert ledger.spent_today("alice") == 0
for _ in range(3):
    clock_s[0] += 60
    ledger.record({"bob": charge([(None, "done")])})
ledger.close()
"""


@aside
def test_files_of_others_that_hang_delay_no_write(tmp_path: Path) -> None:
    path, faults = tmp_path / "usage.db", make_faults(tmp_path)
    write(path, "other")
    faults.set(Fault("open", "*/other.db", wait_s=math.inf))
    command = [sys.executable, "-c", SLOW_FILES, str(SCRIPTS), str(path)]
    assert subprocess.run(command, env={**ENVIRON, **faults.env}, check=False, timeout=PATIENCE_S).returncode == 0
    assert sum(row.requests for row in query(instance_file(path, "own"))) == 3


# --- Killed within a commit ---

KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accounting.ledger_files import open_file
db, _ = open_file(sqlite3, Path(sys.argv[2]))
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE usage SET requests = 7")
row = ", 0" * 12
for number in range(20000):
    db.execute(f"INSERT INTO usage VALUES ('{number}', 'a key whose rows do not fit into the cache'{row})")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_whose_writer_was_killed_within_a_commit_is_read_as_it_was_and_written_again(path: Path) -> None:
    for key_id in ("alice", "bob"):
        write(path, "one", key_id=key_id)
    own = instance_file(path, "one")
    before_bytes = own.stat().st_size
    command = [sys.executable, "-c", KILLED, str(SCRIPTS), str(own)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert own.stat().st_size > before_bytes
    left = {file.name: file.read_bytes() for file in own.parent.iterdir()}
    assert requests(path) == 2
    assert {file.name: file.read_bytes() for file in own.parent.iterdir()} == left
    write(path, "one")
    assert requests(path) == 3


LOCKED = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_file_that_its_writer_has_locked_is_read_as_it_was(path: Path) -> None:
    write(path, "one")
    command = [sys.executable, "-c", LOCKED, str(instance_file(path, "one"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "locked\n"
        assert requests(path) == 1
        writer.communicate("")


# --- Volumes that lack something ---

ON_A_VOLUME = """
import logging, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from accounting.ledger import Ledger, charge, query
from accounting.usage_reports import Tokens
for name in sys.stdin:
    path = Path(sys.argv[2], name.strip())
    ledgers = [Ledger(path, lambda: 1772452800.0, instance_id=name, flush_s=3600.0) for name in "ab"]
    for _ in range(3):
        for ledger in ledgers:
            ledger.record({"alice": charge([(Tokens(10, 4, 5), "done")])})
            ledger.flush()
    print(sum(row.requests for row in query(path)), *[row.requests for row in ledgers[0].query()])
    for ledger in ledgers:
        ledger.close()
    print("end", flush=True)
"""
UNLOCKED, UNSYNCED = "has no file locks: give every gateway its own INSTANCE_ID", "cannot sync files: a power failure"
LACKS: dict[str, tuple[list[Fault], list[str]]] = {
    "fcntl-enolck": ([Fault("fcntl", "*.db*", errno=errno.ENOLCK)], [UNLOCKED]),
    "fcntl-enosys": ([Fault("fcntl", "*.db*", errno=errno.ENOSYS)], [UNLOCKED]),
    "fcntl-eopnotsupp": ([Fault("fcntl", "*.db*", errno=errno.EOPNOTSUPP)], [UNLOCKED]),
    "fsync-einval": ([Fault("fsync", errno=errno.EINVAL)], [UNSYNCED]),
    "fsync-enosys": ([Fault("fsync", errno=errno.ENOSYS)], [UNSYNCED]),
    "unlink-truncate": ([Fault(call, "*.db*", errno=errno.ENOSYS) for call in ("unlink", "truncate")], []),
    "inodes": ([Fault("stat", "*.db*", wrong=True), Fault("fstat", "*.db*", wrong=True)], [UNLOCKED]),
    "all": (
        [
            *(Fault(call, "*.db*", errno=errno.ENOSYS) for call in ("fcntl", "fsync", "rename", "unlink", "truncate")),
            *(Fault(call, "*.db*", wrong=True) for call in ("stat", "fstat")),
        ],
        [UNLOCKED, UNSYNCED],
    ),
}  # fmt: skip


def test_nothing_is_lost_on_a_volume_that_lacks_something(tmp_path: Path) -> None:
    cases = {name: lacking for name, (lacking, _) in LACKS.items()}
    command = (sys.executable, "-c", ON_A_VOLUME, str(SCRIPTS), str(tmp_path))
    seen = seen_by_program(make_faults(tmp_path), cases, *command)
    for name, (_, sentences) in LACKS.items():
        (counts,) = [line for line in seen[name] if line[0].isdigit()]
        assert counts == "6 6", (name, seen[name])
        warnings = [line for line in seen[name] if line != counts]
        assert len(warnings) == 2 * len(sentences), (name, warnings)  # once for each of the two ledgers
        assert all(any(sentence in line for line in warnings) for sentence in sentences), (name, warnings)


def test_a_file_that_cannot_be_opened_is_an_error_until_it_can(path: Path, tmp_path: Path) -> None:
    (tmp_path / "usage.db.d").write_text("not a folder")
    file = InstanceFile(sqlite3, instance_file(path, "one"))
    assert isinstance(file.add({(TODAY, "alice"): ROW}), OSError)
    (tmp_path / "usage.db.d").unlink()
    assert file.add({(TODAY, "alice"): ROW}) is None
    file.close()
    assert read_file(file.path, "") == {(TODAY, "alice"): ROW}
