"""ledger.py: what is counted, how the GPU's time is divided, and that errors of the file affect no request."""

import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date, datetime, timezone
from pathlib import Path

import pytest

from accounting.ledger import (
    FLUSH_S,
    MEMORY_DAYS,
    Ledger,
    Usage,
    charge,
    cost,
    first_day,
    query,
)
from accounting.ledger_files import LedgerMissing, LedgerUnreadable, instance_file
from accounting.usage_reports import Tokens
from support.boot import PATIENCE_S
from support.clock import Clock
from support.paths import SCRIPTS

DAY_S = 86400
TODAY, NOON_S = "2026-03-02", datetime(2026, 3, 2, 12, tzinfo=timezone.utc).timestamp()

ANSWER = Tokens(prompt=10, cached=4, completion=5, prompt_ms=6.0, predicted_ms=50.0)
UNTIMED = Tokens(prompt=10, cached=4, completion=5)


@contextmanager
def opened(path: Path | None, clock: Callable[[], float], instance_id: str = "one") -> Iterator[Ledger]:
    """A ledger whose thread writes nothing before `close`, so that a test decides when."""
    ledger = Ledger(path, clock, instance_id=instance_id, flush_s=3600.0, retry_s=3600.0)
    try:
        yield ledger
    finally:
        ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "usage.db"


@pytest.fixture
def own(path: Path) -> Path:
    """The file that the ledger of `opened` writes."""
    return instance_file(path, "one")


# --- Counting ---


@pytest.mark.parametrize("in_file", [True, False])
def test_what_was_recorded_is_reported_by_key(path: Path, in_file: bool) -> None:
    with opened(path if in_file else None, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        ledger.record({"alice": charge([(UNTIMED, "cancelled")])})
        ledger.record({"alice": charge([(None, "refused")])})
        ledger.record({"bob": charge([(None, "timed_out")])})
        ledger.record({"": charge([(None, "truncated")])})
        expected = [
            Usage("", "-", 1, 0, 0, 0, 1, 0, 0.0),
            Usage("", "alice", 3, 20, 8, 10, 1, 1, 0.0),
            Usage("", "bob", 1, 0, 0, 0, 1, 0, 0.0),
        ]
        assert ledger.query() == expected
        assert ledger.flush() is in_file
        assert ledger.query() == expected
    if in_file:
        assert query(path) == expected


def test_the_file_sums_over_runs_and_writers(path: Path) -> None:
    with opened(path, Clock(NOON_S)) as first, opened(path, Clock(NOON_S)) as second:
        for ledger in (first, second, first):
            ledger.record({"alice": charge([(ANSWER, "done")])})
            assert ledger.flush()
    with opened(path, Clock(NOON_S)) as third:
        third.record({"alice": charge([(ANSWER, "done")])})
    assert [(row.requests, row.prompt) for row in query(path)] == [(4, 40)]


def test_reports_are_by_key_or_day_or_both_from_a_day_on(path: Path) -> None:
    clock = Clock(NOON_S)
    with opened(path, clock) as ledger:
        for key_id in ("bob", "alice", "bob"):
            ledger.record({key_id: charge([(ANSWER, "done")])})
        clock.now_s += DAY_S
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert ledger.query("2026-03-03") == [Usage("", "alice", 1, 10, 4, 5, 0, 0, DAY_S / 2)]
    days = [(row.day, row.key_id, row.requests) for row in query(path, by="day")]
    assert days == [("2026-03-02", "", 3), ("2026-03-03", "", 1)]
    assert [(row.day, row.key_id, row.requests) for row in query(path)] == [("", "alice", 2), ("", "bob", 2)]
    both = [(row.day, row.key_id, row.requests) for row in query(path, "2026-03-02", "key-day")]
    assert both == [("2026-03-02", "alice", 1), ("2026-03-02", "bob", 2), ("2026-03-03", "alice", 1)]
    assert [row.requests for row in query(path, since="2026-03-03")] == [1]
    assert query(path, since="2026-03-04") == []
    with pytest.raises(ValueError, match=r"^by: expected one of key, day, key-day"):
        query(path, by="month")


@pytest.mark.parametrize("in_file", [True, False])
def test_a_report_by_model(path: Path, in_file: bool) -> None:
    clock = Clock(NOON_S)
    with opened(path if in_file else None, clock) as ledger:
        one, two = charge([(ANSWER, "done")]), charge([(ANSWER, "done"), (ANSWER, "refused")])
        ledger.record(
            {"alice": two, "bob": one}, {("alice", "chat"): one, ("alice", "code"): one, ("bob", "chat"): one}
        )
        clock.advance(60)
        assert not in_file or ledger.flush()
        ledger.record({"": one}, {("", "chat"): one})
        rows = ledger.query(TODAY, "model")
        assert [(row.model, row.key_id, row.day, row.requests) for row in rows] == [
            ("chat", "", "", 3),
            ("code", "", "", 1),
        ]
        assert sum(row.gpu_s for row in rows) == pytest.approx(60)
        assert [row.requests for row in ledger.query(TODAY, "model", "bob")] == [1]
        assert [row.requests for row in ledger.query("2026-03-03", "model")] == []
        assert "model" not in ledger.query(TODAY)[0].record()
        assert rows[0].record()["model"] == "chat"
        assert {row.key_id: row.requests for row in ledger.query(TODAY)} == {"-": 1, "alice": 2, "bob": 1}
    if in_file:
        assert [row.requests for row in query(path, TODAY, "model")] == [3, 1]


def test_a_file_without_models_has_no_report_by_model(path: Path, own: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
    assert query(path, TODAY, "model") == []
    with closing(sqlite3.connect(own)) as db:
        db.execute("DROP TABLE model_usage")
        db.commit()
    assert query(path, TODAY, "model") == []


def test_recording_nothing_adds_no_row() -> None:
    with opened(None, Clock(NOON_S)) as ledger:
        ledger.record({})
        assert ledger.query() == []


# --- Quotas ---


def test_what_was_spent_today_counts_prompt_and_completion_and_ends_at_midnight_utc(path: Path) -> None:
    clock = Clock(NOON_S)
    with opened(path, clock) as ledger:
        assert ledger.spent_today("alice") == 0
        ledger.record({"alice": charge([(ANSWER, "done")])})
        ledger.record({"alice": charge([(ANSWER, "cancelled")])})
        ledger.record({"alice": charge([(None, "done")])})
        assert ledger.spent_today("alice") == 30
        assert ledger.spent_today("bob") == 0
        assert (ledger.resets_in_s(), ledger.next_day()) == (DAY_S / 2, "2026-03-03")
        clock.now_s += DAY_S / 2 - 0.5
        assert ledger.spent_today("alice") == 30
        assert ledger.resets_in_s() == 0.5
        clock.now_s += 0.5
        assert ledger.spent_today("alice") == 0
        assert ledger.resets_in_s() == DAY_S


def test_a_restart_reads_what_was_spent_today_only(path: Path) -> None:
    clock = Clock(NOON_S - DAY_S)
    with opened(path, clock) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        clock.now_s += DAY_S
        ledger.record({"alice": charge([(UNTIMED, "done")])})
        ledger.record({"bob": charge([(ANSWER, "done")])})
    with opened(path, clock) as ledger:
        assert (ledger.spent_today("alice"), ledger.spent_today("bob")) == (15, 15)
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert ledger.spent_today("alice") == 30


def test_what_was_spent_this_month_ends_at_its_first_midnight_utc(path: Path) -> None:
    clock = Clock(NOON_S)
    with opened(path, clock) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        clock.now_s += 20 * DAY_S
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert (ledger.spent_today("alice"), ledger.spent_this_month("alice")) == (15, 30)
        assert (ledger.month_resets_in_s(), ledger.next_month()) == (9.5 * DAY_S, "2026-04-01")
        clock.now_s += 9.5 * DAY_S
        assert ledger.spent_this_month("alice") == 0
        assert ledger.month_resets_in_s() == 30 * DAY_S


@pytest.mark.parametrize("in_file", [True, False])
def test_a_clock_that_is_set_back_past_midnight_forgets_nothing(path: Path, in_file: bool) -> None:
    clock = Clock(datetime(2026, 2, 28, 23, tzinfo=timezone.utc).timestamp())
    with opened(path if in_file else None, clock) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        clock.now_s += 2 * 3600
        ledger.record({"alice": charge([(ANSWER, "done")])})
        ledger.flush()
        clock.now_s -= 2 * 3600
        assert (ledger.spent_today("alice"), ledger.spent_this_month("alice")) == (15, 15)
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert (ledger.spent_today("alice"), ledger.spent_this_month("alice")) == (30, 30)
    if in_file:
        with opened(path, clock) as ledger:
            assert (ledger.spent_today("alice"), ledger.spent_this_month("alice")) == (30, 30)
            clock.now_s -= 40 * DAY_S
            assert ledger.spent_this_month("alice") == 0


# --- Estimates ---


def test_estimated_tokens_are_marked(path: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done"), (Tokens(8, 0, 3, estimated=11), "cancelled")])})
    assert [(row.prompt, row.completion, row.estimated) for row in query(path)] == [(18, 8, 11)]


def test_a_file_of_an_earlier_version_is_read_and_extended(path: Path, own: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
    with closing(sqlite3.connect(own)) as db:
        db.execute("ALTER TABLE usage DROP COLUMN estimated")
        db.commit()
    assert [(row.prompt, row.estimated) for row in query(path)] == [(10, 0)]
    with opened(path, Clock(NOON_S)) as ledger:
        assert ledger.spent_today("alice") == 15
        ledger.record({"alice": charge([(Tokens(8, 0, 3, estimated=11), "done")])})
    assert [(row.prompt, row.estimated) for row in query(path)] == [(18, 11)]


# --- Costs ---


def test_the_cost_of_an_hour() -> None:
    assert cost(3600, 0.44) == 0.44
    assert cost(0, 0.44) == 0


def test_uptime_is_divided_by_the_milliseconds_spent(path: Path) -> None:
    clock = Clock(NOON_S)
    with opened(path, clock) as ledger:
        ledger.record({"alice": charge([(Tokens(100, 0, 10, prompt_ms=100.0, predicted_ms=200.0), "done")])})
        ledger.record({"bob": charge([(Tokens(100, 0, 30, prompt_ms=100.0, predicted_ms=500.0), "done")])})
        ledger.record({"carol": charge([(None, "refused")])})
        clock.now_s += 900.0
        assert [round(row.gpu_s, 6) for row in ledger.query()] == [300.0, 600.0, 0.0]
        clock.now_s += 900.0
    assert [round(row.gpu_s, 6) for row in query(path)] == [600.0, 1200.0, 0.0]


def test_tokens_without_times_count_as_the_average_token() -> None:
    clock = Clock(NOON_S)
    with opened(None, clock) as ledger:
        ledger.record({"alice": charge([(Tokens(110, 10, 10, prompt_ms=100.0, predicted_ms=200.0), "done")])})
        ledger.record({"anthropic": charge([(Tokens(110, 10, 5), "done")])})
        clock.now_s += 500.0
        assert [round(row.gpu_s, 6) for row in ledger.query()] == [300.0, 200.0]


def test_without_any_times_all_tokens_count_equally() -> None:
    clock = Clock(NOON_S)
    with opened(None, clock) as ledger:
        ledger.record({"alice": charge([(Tokens(20, 0, 0), "done")])})
        ledger.record({"bob": charge([(Tokens(5, 0, 5), "done")])})
        clock.now_s += 30.0
        assert [row.gpu_s for row in ledger.query()] == [20.0, 10.0]


def test_each_day_is_divided_among_its_own_keys(path: Path) -> None:
    clock = Clock(NOON_S)
    with opened(path, clock) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        clock.now_s += 2 * DAY_S
        ledger.record({"bob": charge([(ANSWER, "done")])})
    rows = query(path, by="key-day")
    assert [(row.day, row.key_id, row.gpu_s) for row in rows] == [
        ("2026-03-02", "alice", DAY_S / 2),
        ("2026-03-04", "bob", DAY_S / 2),
    ]
    assert [row.gpu_s for row in query(path, by="key")] == [DAY_S / 2, DAY_S / 2]


@pytest.mark.parametrize("jump_s", [-3600.0, 40 * DAY_S])
def test_setting_the_clock_adds_no_uptime(jump_s: float) -> None:
    clock = Clock(NOON_S)
    with opened(None, clock) as ledger:
        clock.now_s += jump_s
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert [row.gpu_s for row in ledger.query()] == [0.0]
        clock.now_s += 10.0
        assert [row.gpu_s for row in ledger.query()] == [10.0]


def test_memory_keeps_the_last_days_only() -> None:
    clock = Clock(NOON_S)
    with opened(None, clock) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        clock.now_s += MEMORY_DAYS * DAY_S
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert [row.requests for row in ledger.query()] == [2]
        clock.now_s += DAY_S
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert [row.requests for row in ledger.query()] == [2]


# --- The first day of a report ---


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("1d", TODAY),
        ("7d", "2026-02-24"),
        ("0d", TODAY),
        ("99999d", str(date(2026, 3, 2).fromordinal(date(2026, 3, 2).toordinal() - 99998))),
        ("2025-12-31", "2025-12-31"),
    ],
)
def test_a_report_begins_so_many_days_ago_or_on_a_date(since: str, expected: str) -> None:
    assert first_day(since, NOON_S) == expected


@pytest.mark.parametrize("since", ["", "d", "7", "-1d", "7D", "1e3d", "\u0667d", "2026-02-30", "20260301", "x"])
def test_what_is_neither_days_nor_a_date_is_refused(since: str) -> None:
    with pytest.raises(
        ValueError, match=r"^since: expected a number of days such as 7d, or a date such as 2026-01-31$"
    ):
        first_day(since, NOON_S)


# --- The file ---


def test_the_file_is_not_readable_by_other_users(path: Path, own: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        ledger.flush()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) & 0o137 for file in own.parent.iterdir()}
        assert modes == {"one.db": 0, "one.db-journal": 0}
    assert not path.exists()


def test_an_existing_file_keeps_its_mode(path: Path, own: Path) -> None:
    own.parent.mkdir(parents=True)
    own.touch()
    own.chmod(0o600)
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        ledger.flush()
    assert stat.S_IMODE(own.stat().st_mode) == 0o600


def test_a_report_can_be_read_while_the_ledger_is_written(path: Path, own: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert ledger.flush()
        with closing(sqlite3.connect(own, isolation_level=None)) as other:
            # WAL needs shared memory, which the machines that share a volume do not have.
            assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            other.execute("BEGIN IMMEDIATE")
            assert [row.requests for row in query(path)] == [1]
            other.execute("ROLLBACK")
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert [row.requests for row in query(path)] == [1]
        assert [row.requests for row in ledger.query()] == [2]


def test_reading_changes_and_creates_no_file(path: Path, own: Path) -> None:
    with pytest.raises(LedgerMissing, match="no gateway has recorded use there yet"):
        query(path)
    assert not path.parent.exists()
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
    before = {file.name: file.read_bytes() for file in own.parent.iterdir()}
    assert [row.requests for row in query(path)] == [1]
    assert {file.name: file.read_bytes() for file in own.parent.iterdir()} == before
    assert os.listdir(path.parent) == [own.parent.name]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accounting.ledger import Ledger, charge
from accounting.usage_reports import Tokens
ledger = Ledger(Path(sys.argv[2]), lambda: 1772452800.0, instance_id="one", flush_s=3600.0)
for _ in range(100):
    ledger.record({"alice": charge([(Tokens(10, 4, 5, 6.0, 50.0), "done")])})
ledger.flush()
ledger.record({"alice": charge([(Tokens(10, 4, 5, 6.0, 50.0), "done")])})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_only_what_was_counted_after_the_last_flush(path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(SCRIPTS), str(path)]
    assert subprocess.run(command, timeout=PATIENCE_S, check=False).returncode == -signal.SIGKILL
    assert [row.requests for row in query(path)] == [100]
    with opened(path, Clock(NOON_S)) as ledger:
        assert ledger.spent_today("alice") == 1500
    assert FLUSH_S < 1


def test_the_thread_writes_by_itself(path: Path) -> None:
    looked = threading.Event()
    caller = threading.get_ident()

    def clock() -> float:
        if threading.get_ident() != caller:
            looked.set()
        return NOON_S

    ledger = Ledger(path, clock, instance_id="one", flush_s=0.0)
    try:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert looked.wait(PATIENCE_S)
        # Waits for the write in progress.
        assert ledger.flush()
        assert [row.requests for row in query(path)] == [1]
    finally:
        ledger.close()


def test_close_writes_the_rest_and_may_be_called_twice(path: Path) -> None:
    ledger = Ledger(path, Clock(NOON_S), instance_id="one", flush_s=3600.0)
    ledger.record({"alice": charge([(ANSWER, "done")])})
    ledger.close()
    ledger.close()
    assert [row.requests for row in query(path)] == [1]
    ledger.record({"alice": charge([(ANSWER, "done")])})
    assert ledger.spent_today("alice") == 30
    Ledger(None, Clock(NOON_S), instance_id="one").close()


def test_a_file_that_was_moved_away_is_created_again(path: Path) -> None:
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert ledger.flush()
        for part in path.parent.iterdir():
            part.rename(part.with_name("old-" + part.name))
        ledger.record({"bob": charge([(ANSWER, "done")])})
        assert ledger.flush()
        assert [row.key_id for row in query(path)] == ["bob"]


# --- Errors of the file ---


def broken_by_folder(path: Path) -> None:
    path.mkdir(parents=True)


def broken_by_parent(path: Path) -> None:
    path.parent.parent.mkdir()
    path.parent.write_text("a file, not a folder")


def broken_by_garbage(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no SQLite here, " * 512)


def broken_by_other_table(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE usage (day TEXT)")


@pytest.mark.parametrize("broken", [broken_by_folder, broken_by_parent, broken_by_garbage, broken_by_other_table])
def test_an_unusable_file_causes_one_warning(
    path: Path, own: Path, broken: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken(own)
    with caplog.at_level(logging.INFO, "accounting.ledger"), opened(path, Clock(NOON_S)) as ledger:
        for _ in range(3):
            ledger.record({"alice": charge([(ANSWER, "done")])})
            assert not ledger.flush()
        assert ledger.spent_today("alice") == 45
        assert [row.requests for row in ledger.query()] == [3]
        assert [(record.levelname, str(own) in record.message) for record in caplog.records] == [("WARNING", True)]
    assert len(caplog.records) == 1
    with pytest.raises(LedgerUnreadable):
        query(path)


def test_counts_in_memory_are_written_once_the_file_can_be(
    path: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken_by_garbage(own)
    with caplog.at_level(logging.INFO, "accounting.ledger"), opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert not ledger.flush()
        ledger.record({"alice": charge([(ANSWER, "done")])})
        own.unlink()
        assert ledger.flush()
        assert [row.requests for row in query(path)] == [2]
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accounting.ledger import Ledger, charge, query
from accounting.usage_reports import Tokens
path = Path(sys.argv[2])
ledger = Ledger(path, lambda: 1772452800.0, instance_id="one", flush_s=3600.0)
ledger.record({"alice": charge([(Tokens(10, 4, 5), "done")])})
assert ledger.flush()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for _ in range(3):
    ledger.record({"alice": charge([(Tokens(10, 4, 5), "done")])})
    assert not ledger.flush()
assert ledger.spent_today("alice") == 60
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert ledger.flush()
ledger.close()
print(query(path)[0].requests)
"""


def test_a_path_that_cannot_be_examined_is_an_unusable_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / ("x" * 300)
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert not ledger.flush()
        assert [row.requests for row in ledger.query()] == [1]
    assert "usage is counted in memory" in caplog.text
    with pytest.raises(LedgerUnreadable):
        query(path)


def test_a_full_disk_loses_no_counts(path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(SCRIPTS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.stdout == "4\n", done.stderr
    assert done.stderr.count("usage is counted in memory") == 1


def test_the_thread_tries_again_after_a_failure(path: Path, own: Path) -> None:
    broken_by_garbage(own)
    ledger = Ledger(path, Clock(NOON_S), instance_id="one", flush_s=0.0, retry_s=0.0)
    ledger.record({"alice": charge([(ANSWER, "done")])})
    ledger.flush()
    own.unlink()
    ledger.record({"alice": charge([(ANSWER, "done")])})
    ledger.close()
    assert [row.requests for row in query(path)] == [2]


def test_a_python_without_sqlite_counts_in_memory(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with opened(path, Clock(NOON_S)) as ledger:
        ledger.record({"alice": charge([(ANSWER, "done")])})
        assert not ledger.flush()
        assert [row.requests for row in ledger.query()] == [1]
    assert [record.message for record in caplog.records] == [
        "usage is counted in memory only: this Python was built without sqlite3"
    ]
    with pytest.raises(LedgerUnreadable, match="without sqlite3"):
        query(path)


def test_sqlite_is_not_imported_without_a_file() -> None:
    code = "import sys; from accounting.ledger import Ledger; Ledger(None, lambda: 0.0, instance_id='')"
    code += "; print('sqlite3' in sys.modules)"
    command = [sys.executable, "-c", code]
    # Coverage imports it.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environ["PYTHONPATH"] = str(SCRIPTS)
    assert subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stdout == "False\n"
