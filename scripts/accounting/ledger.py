"""The usage ledger: what each key used on each day (UTC), stored in SQLite, and reports on it.

Counting is an addition in memory under a short lock. One thread writes to this instance's file, in batches; another one
reads what other instances have spent, since their files may be many, and must not delay a write. If the file cannot be
opened or written, the counts stay in memory until it can. That is logged once and never affects a request.

The GPU's time is divided as follows: all seconds of a day in which the gateway ran are divided among the keys that were
served on that day, in proportion to the milliseconds that the backend spent on their prompts and completions. Tokens of
responses without reported times (embeddings, Anthropic's API, streams that were cut) count as the average token. The
shares add up to the time for which the machine was rented, except for days without any request.
"""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from itertools import compress
from operator import sub
from pathlib import Path
from typing import NamedTuple

from accounting.ledger_files import (
    COLUMNS,
    DAY_S,
    Batch,
    DayAndKey,
    InstanceFile,
    LedgerMissing,
    LedgerUnreadable,
    OtherInstances,
    add_file,
    add_row,
    day_of,
    find_files,
    instance_file,
    load_sqlite,
    read_all,
    read_file,
    spent_by_day,
)
from accounting.spending import Spending
from accounting.usage_reports import TokenColumns, Tokens, token_columns

log = logging.getLogger(__name__)

FLUSH_S = 0.5  # kill -9 loses what was counted within this time and that of one write
RETRY_S = 30.0  # between attempts after a failure
UPTIME_S = 60.0  # how often the file is written without requests
CLOSE_S = 5.0  # how long close waits for a disk that hangs
START_S = 2.0  # how long the start waits for what was spent before it
OTHERS_S = 30.0  # how often the files of other instances are looked at, if a key has a quota
MEMORY_DAYS = 400  # how long counts are kept if there is no file
# A longer time between two readings means that the clock was set.
MAX_GAP_S = 31.0 * DAY_S

GROUPINGS = ("key", "day", "key-day", "model")
_BY_MODEL = "model"
_LABELS, _MODEL_LABELS = 2, 3  # day and key; and the model

_ESTIMATED = COLUMNS.index("estimated")
_UP_ONLY = (0,) * (len(COLUMNS) - 1)


@dataclass(frozen=True, slots=True)
class Usage:
    """One row of a report. `day` (ISO 8601), `key_id` or `model` is empty if the report sums over it.

    `prompt` includes `cached`. `errors` counts requests that neither succeeded nor were cancelled by their client.
    `gpu_s` is the row's share of the GPU's time, in seconds. `estimated` is how many tokens are an estimate.
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
    estimated: int = 0
    model: str = ""

    def record(self) -> dict[str, object]:
        """Return the row as an object, with the model only if it has one."""
        record = asdict(self)
        return record if self.model else {name: value for name, value in record.items() if name != "model"}


# --- Reports ---


def cost(gpu_s: float, gpu_cost_per_hour: float) -> float:
    """Return the cost of GPU seconds, in the currency of the price."""
    return gpu_s / 3600 * gpu_cost_per_hour


def first_day(since: str, now_s: float) -> str:
    """Return the first day of a report. `since` is an ISO 8601 date, or such as `7d`: today and the six days before.

    `now_s` is in seconds since the epoch. Raises ValueError, whose text is meant for the user who gave `since`.
    """
    if days := re.fullmatch(r"([0-9]{1,5})d", since):
        return str(date.fromisoformat(day_of(now_s)) - timedelta(days=max(int(days[1]), 1) - 1))
    try:
        # fromisoformat also accepts other forms, which do not sort like the ledger's days.
        return str(date.fromisoformat(since if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", since) else ""))
    except ValueError:
        raise ValueError("since: expected a number of days such as 7d, or a date such as 2026-01-31") from None


def query(path: Path, since: str = "", by: str = "key", only: str = "") -> list[Usage]:
    """Report from the files of all instances, from the day `since` (ISO 8601) on. They may be in use.

    With `only`, the report is of that key alone.

    `path` is USAGE_FILE. Raises LedgerMissing if there is none; LedgerUnreadable if one of them cannot be read, since
    the sums would be too small; and ValueError if `by` is not one of GROUPINGS.
    """
    unreadable: list[str] = []
    counts = read_all(path, since, unreadable, by_model=by == _BY_MODEL)
    if unreadable:
        raise LedgerUnreadable("; ".join(unreadable))
    if not counts and not find_files(path):
        raise LedgerMissing(f"{path}: no gateway has recorded use there yet")
    return _report(counts, by, only)


def _report(counts: Batch, by: str, only: str = "") -> list[Usage]:
    """Group and sort counts by day and key; with `only`, those of this key."""
    if by not in GROUPINGS:
        raise ValueError(f"by: expected one of {', '.join(GROUPINGS)}")
    shares = _shares(counts)
    grouped: Batch = {}
    for labels, row in counts.items():
        day, key_id = labels[:2]
        if key_id and only in ("", key_id):
            group = (day if "day" in by else "", key_id if "key" in by else "", *labels[2:])
            add_row(grouped, group, (*row[:6], shares[labels], row[_ESTIMATED]))
    return [
        Usage(
            day=labels[0],
            key_id=labels[1],
            gpu_s=row[6],
            estimated=int(row[7]),
            model=labels[2] if by == _BY_MODEL else "",
            **dict(zip(COLUMNS, map(int, row[:6]), strict=False)),
        )
        for labels, row in sorted(grouped.items())
    ]


def _shares(counts: Batch) -> dict[DayAndKey, float]:
    """Divide the seconds of each day among its keys."""
    totals = dict(zip(COLUMNS, map(sum, zip(*counts.values(), strict=True)), strict=True)) if counts else {}
    work = {day_and_key: _work(dict(zip(COLUMNS, row, strict=True)), totals) for day_and_key, row in counts.items()}
    days: dict[str, float] = {}
    for (day, *_), done in work.items():
        days[day] = days.get(day, 0.0) + done
    shares = {}
    for labels, done in work.items():
        day = labels[0]
        up = counts.get((day,) + ("",) * (len(labels) - 1))
        shares[labels] = up[-1] * done / days[day] if up and days[day] else 0.0
    return shares


def _work(row: Mapping[str, float], totals: Mapping[str, float]) -> float:
    """Return the milliseconds spent on a row, with an estimate for tokens without a reported time."""
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


# --- Counting ---


class Charge(NamedTuple):
    """What finished requests add to the ledger, in the order of its columns."""

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
    estimated: int = 0


def charge(uses: Sequence[tuple[Tokens | None, str]]) -> Charge:
    """Add up finished requests: the tokens of each, and its outcome as in the access log."""
    reported = token_columns([tokens for tokens, _ in uses if tokens is not None])
    return add_up(reported, [outcome for _, outcome in uses])


def add_up(reported: TokenColumns, outcomes: Sequence[str]) -> Charge:
    """Add up finished requests: the tokens of those that used some, and the outcomes of all."""
    prompts, cacheds, completions, prompt_ms, completion_ms, estimated = reported
    cancelled = outcomes.count("cancelled")
    return Charge(
        requests=len(outcomes),
        prompt=sum(prompts),
        cached=sum(cacheds),
        completion=sum(completions),
        errors=len(outcomes) - outcomes.count("done") - cancelled,
        cancelled=cancelled,
        timed_prompt=sum(compress(map(sub, prompts, cacheds), prompt_ms)),
        prompt_ms=sum(prompt_ms),
        timed_completion=sum(compress(completions, completion_ms)),
        completion_ms=sum(completion_ms),
        estimated=sum(estimated),
    )


class Ledger:
    """Counts the usage of keys. `path` is USAGE_FILE, or None to count in memory. `clock`: seconds since the epoch.

    Call `record`, `spent_today` and `spent_this_month` from one thread, the event loop's. `query` may wait for the
    disk: call it from another thread. All outcomes except `done` and `cancelled` count as errors.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float],
        *,
        instance_id: str,
        flush_s: float = FLUSH_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._path = path
        self._clock = clock
        self._flush_s = flush_s
        self._retry_s = retry_s
        self._counting = threading.Lock()  # held to add, and to take what was added
        self._pending: Batch = {}
        self._disk = threading.Lock()  # held while the file is read or written
        self._file: InstanceFile | None = None
        self._failing = False
        self._lost: tuple[str, ...] = ()
        self._uptime_counted_s = clock()
        self._day_number = 0
        self._today = ""
        self._spending = Spending()
        self._elsewhere_read_s = 0.0
        self._has_quotas = False
        self._started = threading.Event()
        self._work = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._reader: threading.Thread | None = None
        sqlite = load_sqlite() if path else None
        if path and sqlite:
            self._file = InstanceFile(sqlite, instance_file(path, instance_id))
            self._others = OtherInstances(path, self._file.path)
            self._thread = threading.Thread(target=self._run, args=[self._file], name="usage ledger", daemon=True)
            self._thread.start()
            self._started.wait(START_S)
        elif path:
            log.warning("usage is counted in memory only: this Python was built without sqlite3")

    # --- On the event loop ---

    def record(self, charges: Mapping[str, Charge], by_model: Mapping[tuple[str, str], Charge] | None = None) -> None:
        """Count finished requests, by key; and the same ones by key and model, if there are several models."""
        if not charges:
            return
        day = self._update_day()
        with self._counting:
            for key_id, row in charges.items():
                add_row(self._pending, (day, key_id or "-"), (*row, 0))
            for (key_id, model), row in (by_model or {}).items():
                add_row(self._pending, (day, key_id or "-", model), (*row, 0))
        self._spending.add(day, {key_id: row.prompt + row.completion for key_id, row in charges.items()})
        if not self._work.is_set():
            self._work.set()

    def spent_today(self, key_id: str) -> int:
        """Return the tokens of prompts and completions that count towards the key's `tokens_per_day`.

        What other instances spend is known after OTHERS_S at most.
        """
        self._has_quotas = True
        return self._spending.of_day(self._update_day(), key_id)

    def spent_this_month(self, key_id: str) -> int:
        """Return the same since the first of the month, in UTC."""
        self._has_quotas = True
        return self._spending.of_month(self._update_day(), key_id)

    def resets_in_s(self) -> float:
        """Return the seconds until midnight UTC."""
        return DAY_S - self._clock() % DAY_S

    def month_resets_in_s(self) -> float:
        """Return the seconds until the first of the next month, in UTC."""
        now_s = self._clock()
        return (_next_month(now_s) - date.fromisoformat(day_of(now_s))).days * DAY_S - now_s % DAY_S

    def next_day(self) -> str:
        """Return the date on which today's tokens count no more."""
        return day_of(self._clock() + DAY_S)

    def next_month(self) -> str:
        """Return the date on which this month's tokens count no more."""
        return str(_next_month(self._clock()))

    def _update_day(self) -> str:
        number = int(self._clock() // DAY_S)
        if number != self._day_number:
            self._day_number, self._today = number, day_of(number * DAY_S)
            oldest = day_of((number - MEMORY_DAYS) * DAY_S)
            with self._counting:
                self._pending = {labels: row for labels, row in self._pending.items() if labels[0] >= oldest}
        return self._today

    # --- On other threads ---

    def query(self, since: str = "", by: str = "key", only: str = "") -> list[Usage]:
        """Report like the function, including counts that are not in a file yet. Logs and ignores unreadable files."""
        unreadable: list[str] = []
        counts: Batch = {}
        if self._file and self._path:  # without the lock: the files of the others may be many
            counts = read_all(self._path, since, unreadable, without=self._file.path, by_model=by == _BY_MODEL)
        with self._disk:
            self._count_uptime()
            if self._file and self._file.exists():
                add_file(counts, self._file.path, since, unreadable, by_model=by == _BY_MODEL)
            with self._counting:
                pending = list(self._pending.items())
        for text in [] if self._failing else unreadable:
            log.warning("usage is reported without %s", text)
        for labels, row in pending:
            is_for_all = by == _BY_MODEL and labels[1] == ""  # the day's uptime
            wanted = (*labels, "") if is_for_all else labels
            if labels[0] >= since and len(wanted) == (_MODEL_LABELS if by == _BY_MODEL else _LABELS):
                add_row(counts, wanted, row)
        return _report(counts, by, only)

    def flush(self) -> bool:
        """Write now, on the caller's thread. Returns whether everything is in the file."""
        if self._file is None:
            return False
        with self._disk:
            self._count_uptime()
            with self._counting:
                batch, self._pending = self._pending, {}
            error = self._file.add(batch)
            if error is not None:
                with self._counting:
                    for day_and_key, row in batch.items():
                        add_row(self._pending, day_and_key, row)
            self._log_change(self._file, error)
        return error is None

    def close(self) -> None:
        """Write the rest and close the file. If the disk hangs, give up after CLOSE_S."""
        self._closing.set()
        self._work.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self, file: InstanceFile) -> None:
        # Errors of the file are reported when it is written.
        with suppress(LedgerUnreadable):
            self._spending.before = spent_by_day(read_file(file.path, _first_needed_day(self._clock())))
        self._look_elsewhere()
        stopping = False
        while not stopping:
            self._work.wait(UPTIME_S)
            self._work.clear()
            stopping = self._closing.wait(self._flush_s)
            if not self.flush():
                self._closing.wait(self._retry_s)
            if self._has_quotas and abs(self._clock() - self._elsewhere_read_s) >= OTHERS_S:
                self._look_elsewhere()
        with self._disk:
            file.close()

    def _look_elsewhere(self) -> None:
        """Read what other instances have spent, in a thread, unless the last one still reads."""
        if self._reader is None or not self._reader.is_alive():
            self._elsewhere_read_s = self._clock()
            self._reader = threading.Thread(target=self._read_elsewhere, name="usage elsewhere", daemon=True)
            self._reader.start()

    def _read_elsewhere(self) -> None:
        self._spending.elsewhere = self._others.spent(_first_needed_day(self._clock()))
        self._started.set()

    def _count_uptime(self) -> None:
        """Add the time since the last call to the days in which it lies."""
        now_s, last_s = self._clock(), self._uptime_counted_s
        self._uptime_counted_s = now_s
        if now_s - last_s > MAX_GAP_S:
            return
        with self._counting:
            while last_s < now_s:
                end_s = min(now_s, (last_s // DAY_S + 1) * DAY_S)
                add_row(self._pending, (day_of(last_s), ""), (*_UP_ONLY, end_s - last_s))
                last_s = end_s

    def _log_change(self, file: InstanceFile, error: Exception | None) -> None:
        """Log the first failure, the first success after failures, and what the file's volume lacks."""
        if error is not None and not self._failing:
            log.warning("usage is counted in memory until %s can be written: %s", file.path, error)
        elif error is None and self._failing:
            log.info("usage is written to %s again", file.path)
        self._failing = error is not None
        if file.lost != self._lost:
            self._lost = file.lost
            for sentence in file.lost:
                log.warning("usage: the volume of %s %s", file.path, sentence)


def _next_month(now_s: float) -> date:
    """Return the first day of the next month."""
    return (date.fromisoformat(day_of(now_s)).replace(day=1) + timedelta(days=31)).replace(day=1)


def _first_needed_day(now_s: float) -> str:
    """Return the first day that quotas need: of this month, or of the last one if the clock may be set back into it."""
    return str(date.fromisoformat(day_of(now_s - DAY_S)).replace(day=1))
