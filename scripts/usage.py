"""The ledger: what each key used on each day (UTC), kept in SQLite, and read for reports.

Counting is an addition in memory under a short lock. One thread writes, a batch at a time; where the file cannot be
opened or written the counts stay in memory until it can, after one warning, and no client ever hears of it.

The GPU's time is shared out like this: all seconds of a day in which the gateway ran belong to the keys that were
served on that day, in proportion to the milliseconds that the backend spent on their prompts and on their answers.
Tokens of answers that told no times (embeddings, Anthropic's dialect, streams that were cut) count what such a token
took on average. The shares add up to what the machine was rented for, less the days on which nobody asked for anything.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import compress
from operator import add, sub
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from meter import Meter, Tokens, keep_whole, read_tokens

if TYPE_CHECKING:
    import sqlite3

__all__ = [
    "GROUPINGS",
    "Charge",
    "Ledger",
    "LedgerUnreadable",
    "Meter",
    "Tokens",
    "Usage",
    "charge",
    "cost",
    "first_day",
    "keep_whole",
    "query",
    "read_tokens",
]

LOG = logging.getLogger(__name__)

FLUSH_S = 0.5  # kill -9 loses what was counted in this time, and in that of one write
RETRY_S = 30.0  # between attempts at a file that failed
UPTIME_S = 60.0  # how often the file is written where no request makes it
CLOSE_S = 5.0  # the end waits no longer for a disk that hangs
BUSY_S = 5.0  # how long another program may hold the file
DAY_S = 86400
MEMORY_DAYS = 400  # how far back is kept where there is no file
# Who finds a longer time since the last look at the clock has met somebody who set it.
MAX_GAP_S = 31.0 * DAY_S

GROUPINGS = ("key", "day", "key-day")

Address = tuple[str, str]  # day, key
Batch = dict[Address, list[float]]

_COLUMNS = (
    "requests",
    "prompt",
    "cached",
    "completion",
    "errors",
    "cancelled",
    "timed_prompt",  # tokens whose reading was timed: not cached ones
    "prompt_ms",
    "timed_completion",
    "completion_ms",
    "up_s",  # how long the gateway ran: in the row of the day whose key is empty
)
_UP_ONLY = (0,) * (len(_COLUMNS) - 1)
_CREATE = (
    "CREATE TABLE IF NOT EXISTS usage (day TEXT NOT NULL, key TEXT NOT NULL, "
    + ", ".join(f"{name} {'REAL' if name.endswith(('_ms', '_s')) else 'INTEGER'} NOT NULL" for name in _COLUMNS)
    + ", PRIMARY KEY (day, key)) WITHOUT ROWID"
)
_ADD = (
    f"INSERT INTO usage (day, key, {', '.join(_COLUMNS)}) VALUES (?, ?{', ?' * len(_COLUMNS)}) "
    f"ON CONFLICT (day, key) DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _COLUMNS)}"
)
_READ = f"SELECT day, key, {', '.join(_COLUMNS)} FROM usage WHERE day >= ?"


class LedgerUnreadable(Exception):
    """The file is not there, or is not a ledger, or cannot be read now; the text says which."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One row of a report. `day` (ISO 8601) or `key_id` is empty where the report sums over it.

    `prompt` includes `cached`. `errors` counts what neither ended well nor was cancelled by its client. `gpu_s` is the
    share of the time for which the GPU was there.
    """

    day: str
    key_id: str
    requests: int
    prompt: int
    cached: int
    completion: int
    errors: int
    cancelled: int
    gpu_s: float


# Reports


def cost(gpu_s: float, gpu_cost_per_hour: float) -> float:
    """Return what so many seconds of the GPU cost, in the currency of the price."""
    return gpu_s / 3600 * gpu_cost_per_hour


def first_day(since: str, now_s: float) -> str:
    """Return the day on which a report begins: `7d` is today and the six days before it; else an ISO 8601 date.

    now_s counts from the epoch. Raises ValueError with words for whoever gave `since`.
    """
    if days := re.fullmatch(r"([0-9]{1,5})d", since):
        return str(date.fromisoformat(_day(now_s)) - timedelta(days=max(int(days[1]), 1) - 1))
    try:
        # fromisoformat takes other forms too, which sort otherwise than the ledger's days.
        return str(date.fromisoformat(since if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", since) else ""))
    except ValueError:
        raise ValueError("since: expected a number of days such as 7d, or a date such as 2026-01-31") from None


def query(path: Path, since: str = "", by: str = "key") -> list[Usage]:
    """Report from a ledger's file, which is only read, and may be in use, from the day `since` (ISO 8601) on.

    `by` is one of GROUPINGS, else ValueError. Raises LedgerUnreadable.
    """
    return _report(_read(path, since), by)


def _report(counts: Batch, by: str) -> list[Usage]:
    """Group and sort what was counted by day and key."""
    if by not in GROUPINGS:
        raise ValueError(f"reports are by one of {', '.join(GROUPINGS)}")
    shares = _shares(counts)
    grouped: Batch = {}
    for (day, key_id), row in counts.items():
        if key_id:
            address = (day if "day" in by else "", key_id if "key" in by else "")
            _add(grouped, address, (*row[:6], shares[day, key_id]))
    return [
        Usage(day=day, key_id=key_id, gpu_s=row[6], **dict(zip(_COLUMNS, map(int, row[:6]), strict=False)))
        for (day, key_id), row in sorted(grouped.items())
    ]


def _shares(counts: Batch) -> dict[Address, float]:
    """Share the seconds of each day out to its keys."""
    totals = dict(zip(_COLUMNS, map(sum, zip(*counts.values(), strict=True)), strict=True)) if counts else {}
    work = {address: _work(dict(zip(_COLUMNS, row, strict=True)), totals) for address, row in counts.items()}
    days: dict[str, float] = {}
    for (day, _), done in work.items():
        days[day] = days.get(day, 0.0) + done
    shares = {}
    for (day, key_id), done in work.items():
        up = counts.get((day, ""))
        shares[day, key_id] = up[-1] * done / days[day] if up and days[day] else 0.0
    return shares


def _work(row: Mapping[str, float], totals: Mapping[str, float]) -> float:
    """Return the milliseconds that were spent for a row, with an estimate for tokens whose time was not told."""
    untimed_prompt = row["prompt"] - row["cached"] - row["timed_prompt"]
    untimed_completion = row["completion"] - row["timed_completion"]
    return (
        row["prompt_ms"]
        + row["completion_ms"]
        + untimed_prompt * _average(totals["prompt_ms"], totals["timed_prompt"])
        + untimed_completion * _average(totals["completion_ms"], totals["timed_completion"])
    )


def _average(ms: float, tokens: float) -> float:
    return ms / tokens if tokens else 1.0


# The file


def _day(now_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now_s))


def _add(batch: Batch, address: Address, row: Sequence[float]) -> None:
    held = batch.get(address)
    if held is None:
        batch[address] = list(row)
    else:
        batch[address] = list(map(add, held, row))


def _sqlite() -> ModuleType | None:
    """Return the module where Python was built with it. It is slow to import, and most programs do without."""
    try:
        import sqlite3  # noqa: PLC0415
    except ImportError:
        return None
    return sqlite3


def _read(path: Path, since: str) -> Batch:
    sqlite = _sqlite()
    if sqlite is None:
        raise LedgerUnreadable("this Python was built without sqlite3")
    try:
        if not path.is_file():
            raise LedgerUnreadable("there is no such file")
        # Where nobody has the file open SQLite would make two beside it, even to read, and leave them to their owner:
        # after a report that root asked for the gateway could not write any more.
        alone = "" if Path(f"{path}-wal").exists() else "&immutable=1"
        uri = f"{path.absolute().as_uri()}?mode=ro{alone}"
        with closing(sqlite.connect(uri, uri=True, timeout=BUSY_S)) as db:
            return {(day, key_id): row for day, key_id, *row in db.execute(_READ, (since,))}
    except (OSError, sqlite.Error) as error:
        raise LedgerUnreadable(str(error)) from error


def _open(sqlite: ModuleType, path: Path) -> "sqlite3.Connection":
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # SQLite would let everybody read it; what it puts beside the file gets the file's mode.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640))
    db: sqlite3.Connection = sqlite.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # In WAL mode a commit outlives the process without a sync, and the power without corruption.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(_CREATE)
    except sqlite.Error:
        db.close()
        raise
    return db


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Charge(NamedTuple):
    """What requests add to the ledger, in the order of its columns."""

    requests: int
    prompt: int
    cached: int
    completion: int
    errors: int
    cancelled: int
    timed_prompt: int
    prompt_ms: float
    timed_completion: int
    completion_ms: float


def charge(uses: Sequence[tuple[Tokens | None, str]]) -> Charge:
    """Sum up requests that have ended: what each took, and its outcome, which is the access log's word."""
    outcomes = [outcome for _, outcome in uses]
    told = [tokens for tokens, _ in uses if tokens is not None]
    cancelled = outcomes.count("cancelled")
    prompts, cacheds, completions, prompt_ms, completion_ms = zip(*told, strict=True) if told else [()] * 5
    return Charge(
        requests=len(uses),
        prompt=sum(prompts),
        cached=sum(cacheds),
        completion=sum(completions),
        errors=len(uses) - outcomes.count("done") - cancelled,
        cancelled=cancelled,
        timed_prompt=sum(compress(map(sub, prompts, cacheds), prompt_ms)),
        prompt_ms=sum(prompt_ms),
        timed_completion=sum(compress(completions, completion_ms)),
        completion_ms=sum(completion_ms),
    )


class Ledger:
    """Counts what keys use. `path` None keeps the counts in memory; `clock` tells seconds since the epoch.

    `record` and `spent_today` belong to one thread, the event loop's; `query` may wait for the disk and belongs to
    another. All outcomes but `done` and `cancelled` count as errors.
    """

    def __init__(
        self, path: Path | None, clock: Callable[[], float], *, flush_s: float = FLUSH_S, retry_s: float = RETRY_S
    ) -> None:
        self._path = path
        self._clock = clock
        self._flush_s = flush_s
        self._retry_s = retry_s
        self._counting = threading.Lock()  # held for an addition, or to take all that was added
        self._pending: Batch = {}
        self._disk = threading.Lock()  # held while the file is read or written
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._failing = False
        self._ticked_s = clock()
        self._day_number = 0
        self._today = ""
        self._spent: dict[str, int] = {}
        self._work = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._sqlite = _sqlite() if path else None
        if path and self._sqlite:
            self._load(path)
            self._thread = threading.Thread(target=self._write_on, name="usage ledger", daemon=True)
            self._thread.start()
        elif path:
            LOG.warning("usage is counted in memory only: this Python was built without sqlite3")

    # On the event loop

    def record(self, charges: Mapping[str, Charge]) -> None:
        """Count requests that have ended, by key."""
        if not charges:
            return
        day, spent = self._this_day(), self._spent
        with self._counting:
            for key_id, row in charges.items():
                _add(self._pending, (day, key_id or "-"), (*row, 0))
        for key_id, row in charges.items():
            spent[key_id] = spent.get(key_id, 0) + row.prompt + row.completion
        if not self._work.is_set():
            self._work.set()

    def spent_today(self, key_id: str) -> int:
        """Return the tokens, prompts and completions, that count towards the key's `tokens_per_day`."""
        self._this_day()
        return self._spent.get(key_id, 0)

    def resets_in_s(self) -> float:
        """Return the seconds until midnight UTC."""
        return DAY_S - self._clock() % DAY_S

    def _this_day(self) -> str:
        number = int(self._clock() // DAY_S)
        if number != self._day_number:
            self._day_number, self._today, self._spent = number, _day(number * DAY_S), {}
            oldest = _day((number - MEMORY_DAYS) * DAY_S)
            with self._counting:
                self._pending = {address: row for address, row in self._pending.items() if address[0] >= oldest}
        return self._today

    def _load(self, path: Path) -> None:
        """Take up what was spent today before the gateway started. A file in trouble is reported when it is written."""
        today = self._this_day()
        try:
            counts = _read(path, today)
        except LedgerUnreadable:
            return
        self._spent = {key_id: int(row[1] + row[3]) for (day, key_id), row in counts.items() if day == today}

    # Elsewhere

    def query(self, since: str = "", by: str = "key") -> list[Usage]:
        """Report as the function does, of the file and of what is not in it yet; an unreadable file counts as empty."""
        with self._disk:
            self._tick()
            counts: Batch = {}
            if self._sqlite is not None and self._path is not None:
                with suppress(LedgerUnreadable):
                    counts = _read(self._path, since)
            with self._counting:
                pending = list(self._pending.items())
        for address, row in pending:
            if address[0] >= since:
                _add(counts, address, row)
        return _report(counts, by)

    def flush(self) -> bool:
        """Write now, on the caller's thread. Returns whether all is in the file."""
        if self._sqlite is None or self._path is None:
            return False
        with self._disk:
            self._tick()
            with self._counting:
                batch, self._pending = self._pending, {}
            error = self._store(self._sqlite, self._path, batch)
            if error is not None:
                with self._counting:
                    for address, row in batch.items():
                        _add(self._pending, address, row)
            self._tell(error)
        return error is None

    def close(self) -> None:
        """Write what is left and let the file go; a disk that hangs is left alone after a while."""
        self._closing.set()
        self._work.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _write_on(self) -> None:
        closing = False
        while not closing:
            self._work.wait(UPTIME_S)
            self._work.clear()
            closing = self._closing.wait(self._flush_s)
            if not self.flush():
                self._closing.wait(self._retry_s)
        with self._disk:
            self._shut()

    def _tick(self) -> None:
        """Add the time since the last tick to the days it lies in."""
        now_s, last_s = self._clock(), self._ticked_s
        self._ticked_s = now_s
        if now_s - last_s > MAX_GAP_S:
            return
        with self._counting:
            while last_s < now_s:
                end_s = min(now_s, (last_s // DAY_S + 1) * DAY_S)
                _add(self._pending, (_day(last_s), ""), (*_UP_ONLY, end_s - last_s))
                last_s = end_s

    def _store(self, sqlite: ModuleType, path: Path, batch: Batch) -> Exception | None:
        """Add a batch to the file in one transaction; return what went wrong."""
        try:
            db = self._connection(sqlite, path)
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany(_ADD, [(*address, *row) for address, row in batch.items()])
        except (OSError, sqlite.Error) as error:
            self._shut()
            return error
        return None

    def _connection(self, sqlite: ModuleType, path: Path) -> "sqlite3.Connection":
        """Return the connection, a new one where somebody has moved the file away."""
        if self._db is None or self._inode != _inode(path):
            self._shut()
            self._db = _open(sqlite, path)
            self._inode = _inode(path)
        return self._db

    def _shut(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _tell(self, error: Exception | None) -> None:
        """Log the first failure, and the end of failures."""
        if error is not None and not self._failing:
            LOG.warning("usage is counted in memory until %s can be written: %s", self._path, error)
        elif error is None and self._failing:
            LOG.info("usage is written to %s again", self._path)
        self._failing = error is not None
