"""The ledger's SQLite files: one for each instance, so that any number of gateways may share a volume.

    usage.db              the single file of earlier versions: read, never written
    usage.db.d/NAME.db    written by the gateway with INSTANCE_ID=NAME alone

A report is the sum of all of them. No file is in WAL mode: WAL needs memory that its users share, which two machines on
a network file system do not have, and their commits are lost without an error. With a rollback journal a file is safe
with one writer even on a volume without file locks.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from operator import add
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import sqlite3

BUSY_S = 5.0  # how long another program may lock the file
COPY_ATTEMPTS = 3
COPY_PAUSE_S = 0.05
DAY_S = 86400

DayAndKey = tuple[str, ...]  # and, in rows by model, the model
Batch = dict[DayAndKey, list[float]]
SpentByDay = dict[str, dict[str, int]]

COLUMNS = (
    "requests",
    "prompt",
    "cached",
    "completion",
    "errors",
    "cancelled",
    "timed_prompt",  # prompt tokens with a reported time; never cached ones
    "prompt_ms",
    "timed_completion",
    "completion_ms",
    "estimated",  # how many tokens of prompt and completion are an estimate
    "up_s",  # how long the gateway ran: in the day's row without a key
)
_KEYS = ("day", "key")
_MODEL_KEYS = (*_KEYS, "model")
# The rows by model are a table of their own, so that earlier versions can read and write the file. Only MODELS=router
# writes it.
_TABLES = {len(_KEYS): ("usage", _KEYS), len(_MODEL_KEYS): ("model_usage", _MODEL_KEYS)}


def _create(table: str, keys: Sequence[str]) -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(f'{key} TEXT NOT NULL' for key in keys)}, "
        + ", ".join(f"{name} {'REAL' if name.endswith(('_ms', '_s')) else 'INTEGER'} NOT NULL" for name in COLUMNS)
        + f", PRIMARY KEY ({', '.join(keys)})) WITHOUT ROWID"
    )


def _add(table: str, keys: Sequence[str]) -> str:
    return (
        f"INSERT INTO {table} ({', '.join((*keys, *COLUMNS))}) VALUES (?{', ?' * (len(keys) + len(COLUMNS) - 1)}) "
        f"ON CONFLICT ({', '.join(keys)}) "
        f"DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in COLUMNS)}"
    )


_ADDS = {length: _add(*table) for length, table in _TABLES.items()}
_READ = f"SELECT day, key, {', '.join(COLUMNS)} FROM usage WHERE day >= ?"
# The rows by model, and how long the gateway ran.
_READ_MODELS = (
    f"SELECT day, key, model, {', '.join(COLUMNS)} FROM model_usage WHERE day >= :since UNION ALL "
    f"SELECT day, key, '', {', '.join(COLUMNS)} FROM usage WHERE day >= :since AND key = ''"
)
# Files of earlier versions lack this column.
_READ_EARLIER = _READ.replace(" estimated,", " 0,")
_NAMES_OF_COLUMNS = "SELECT name FROM pragma_table_info('usage')"
_HAS_MODELS = "SELECT count(*) FROM pragma_table_info('model_usage')"
_ADD_COLUMN = "ALTER TABLE usage ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0"
# The file's format in SQLite's header: rollback journal or WAL.
_FORMAT, _WAL = slice(18, 20), b"\x02\x02"


class LedgerUnreadable(Exception):
    """A file does not exist, is not a ledger, or cannot be read now; the text says which."""


class LedgerMissing(LedgerUnreadable):
    """There is no file: no gateway has started with this USAGE_FILE."""


def day_of(now_s: float) -> str:
    """Return the day (UTC, ISO 8601) of a time in seconds since the epoch."""
    return time.strftime("%Y-%m-%d", time.gmtime(now_s))


def add_row(batch: Batch, day_and_key: DayAndKey, row: Sequence[float]) -> None:
    """Add a row's columns to those of its day and key."""
    row_before = batch.get(day_and_key)
    batch[day_and_key] = list(row) if row_before is None else list(map(add, row_before, row))


def load_sqlite() -> ModuleType | None:
    """Return the sqlite3 module, or None if Python was built without it. Not imported earlier because it is slow."""
    try:
        import sqlite3  # noqa: PLC0415
    except ImportError:
        return None
    return sqlite3


# --- Which files there are ---


def instance_file(path: Path, instance_id: str) -> Path:
    """Return the file that this instance writes. `path` is USAGE_FILE."""
    return path.with_name(f"{path.name}.d") / f"{instance_id or 'gateway'}.db"


def find_files(path: Path) -> list[Path]:
    """Return the files that exist: the single one of earlier versions, and those of the instances. Raises OSError."""
    single, folder = [path] if path.is_file() else [], instance_file(path, "").parent
    with suppress(FileNotFoundError, NotADirectoryError):
        names = [name for name in os.listdir(folder) if name.endswith(".db") and not name.startswith(".")]
        return single + [folder / name for name in sorted(names)]
    return single


# --- Reading ---


def read_all(
    path: Path, since: str, unreadable: list[str], *, without: Path | None = None, by_model: bool = False
) -> Batch:
    """Add up all files but one, from the day `since` on. Appends a text to `unreadable` for each unreadable one."""
    counts: Batch = {}
    if load_sqlite() is None:
        unreadable.append("this Python was built without sqlite3")
        return counts
    try:
        files = find_files(path)
    except OSError as error:
        unreadable.append(f"{path}: {error.strerror}")
        return counts
    for file in files:
        if file != without:
            add_file(counts, file, since, unreadable, by_model=by_model)
    return counts


def add_file(counts: Batch, file: Path, since: str, unreadable: list[str], *, by_model: bool = False) -> None:
    """Add the rows of one file to `counts`, or the reason why it cannot be read to `unreadable`."""
    try:
        for day_and_key, row in read_file(file, since, by_model=by_model).items():
            add_row(counts, day_and_key, row)
    except LedgerUnreadable as error:
        unreadable.append(f"{file}: {error}")


def read_file(path: Path, since: str, *, by_model: bool = False) -> Batch:
    """Read one file, which may be in use, and neither change it nor create others. Raises LedgerUnreadable.

    With `by_model` return the rows by model, and the days' rows without a key.
    """
    sqlite = load_sqlite()
    assert sqlite
    try:
        if not path.is_file():
            raise LedgerUnreadable("there is no such file")
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro{_reading_options(path)}"
            return _select(sqlite, uri, since, by_model=by_model)
        except sqlite.Error:
            # A gateway was killed within a commit, or is within one on a volume without locks. Only a program that may
            # write can repair that, so a copy is repaired.
            return _read_copy(sqlite, path, since, by_model=by_model)
    except (OSError, sqlite.Error) as error:
        raise LedgerUnreadable(str(error)) from error


def _select(sqlite: ModuleType, uri: str, since: str, *, by_model: bool) -> Batch:
    with closing(sqlite.connect(uri, uri=True, timeout=BUSY_S)) as db:
        if by_model:
            if not db.execute(_HAS_MODELS).fetchone()[0]:
                return {}
            return {
                (day, key_id, model): row for day, key_id, model, *row in db.execute(_READ_MODELS, {"since": since})
            }
        is_current = ("estimated",) in db.execute(_NAMES_OF_COLUMNS).fetchall()
        rows = db.execute(_READ if is_current else _READ_EARLIER, (since,))
        return {(day, key_id): row for day, key_id, *row in rows}


def _reading_options(path: Path) -> str:
    with path.open("rb") as file:
        # For a WAL file that no program has open, SQLite creates two more files next to it, even to read, owned by the
        # user of this process: after a report for root an earlier version's gateway could no longer write.
        if file.read(32)[_FORMAT] == _WAL and not Path(f"{path}-wal").exists():
            return "&immutable=1"
        return _locking_option(file.fileno(), path, fcntl.LOCK_SH)


def _locking_option(descriptor: int, path: Path, kind: int) -> str:
    """Return what makes SQLite do without locks, if the volume has none, or no inode numbers by which it locks."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return "&vfs=unix-none"
    return "" if os.path.samestat(os.fstat(descriptor), path.stat()) else "&vfs=unix-none"


def _read_copy(sqlite: ModuleType, path: Path, since: str, *, by_model: bool) -> Batch:
    """Read a copy. It is made again if the file was written while it was copied."""
    attempts = COPY_ATTEMPTS
    while True:
        with tempfile.TemporaryDirectory(prefix="llama-gateway-usage-") as folder:
            copy = Path(folder, "copy.db")
            for suffix in ("", "-journal", "-wal"):
                with suppress(FileNotFoundError):
                    shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
            try:
                return _select(sqlite, copy.as_uri(), since, by_model=by_model)
            except sqlite.Error:
                attempts -= 1
                if not attempts:
                    raise
        time.sleep(COPY_PAUSE_S)


# --- Writing ---


class OpenFile(NamedTuple):
    """A connection to the file of this instance, and a sentence for each guarantee that its volume does not give."""

    db: "sqlite3.Connection"
    lost: tuple[str, ...]


def open_file(sqlite: ModuleType, path: Path) -> OpenFile:
    """Open or create a file to write to it. Raises OSError or sqlite3.Error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # SQLite would make it readable for all users. Its journal gets the same mode.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        option = _locking_option(descriptor, path, fcntl.LOCK_EX)
        synced = _can_sync(descriptor)
    finally:
        os.close(descriptor)
    lost = ["has no file locks: give every gateway its own INSTANCE_ID"] if option else []
    lost += [] if synced else ["cannot sync files: a power failure may damage them"]
    uri = f"{path.absolute().as_uri()}?mode=rw{option}"
    db: sqlite3.Connection = sqlite.connect(
        uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        # The journal stays, with an empty header: some volumes cannot remove or shorten an open file.
        db.execute("PRAGMA journal_mode = PERSIST")
        db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'OFF'}")
        for table in _TABLES.values():
            db.execute(_create(*table))
        if ("estimated",) not in db.execute(_NAMES_OF_COLUMNS).fetchall():
            db.execute(_ADD_COLUMN)
    except sqlite.Error:
        db.close()
        raise
    return OpenFile(db, tuple(lost))


def _can_sync(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True


class InstanceFile:
    """The file that this instance writes. All errors are returned, and the next call opens the file again."""

    def __init__(self, sqlite: ModuleType, path: Path) -> None:
        self.path = path
        self.lost: tuple[str, ...] = ()
        self._sqlite = sqlite
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    def exists(self) -> bool:
        return _inode(self.path) is not None

    def add(self, batch: Batch) -> Exception | None:
        """Add a batch in one transaction; return the error, if any. A file that was moved away is created again."""
        try:
            if self._db is None or self._inode != _inode(self.path):
                self.close()
                self._db, self.lost = open_file(self._sqlite, self.path)
                self._inode = _inode(self.path)
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for length, statement in _ADDS.items():
                    rows = [(*key, *row) for key, row in batch.items() if len(key) == length]
                    self._db.executemany(statement, rows)
        except (OSError, self._sqlite.Error) as error:
            self.close()
            return error
        return None

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


# --- What other instances have spent ---


class OtherInstances:
    """The tokens that other instances have spent, by day and key. A file is read again only if it has changed."""

    def __init__(self, path: Path, own: Path) -> None:
        self._path = path
        self._own = own
        self._seen: dict[Path, tuple[tuple[str, int, int], SpentByDay]] = {}

    def spent(self, since: str) -> SpentByDay:
        """Return the sums of each day from `since` on. A file that cannot be read counts with what was last read."""
        total: SpentByDay = {}
        with suppress(OSError):
            for file in find_files(self._path):
                if file != self._own:
                    for day, spent in self._of(file, since).items():
                        of_day = total.setdefault(day, {})
                        for key_id, tokens in spent.items():
                            of_day[key_id] = of_day.get(key_id, 0) + tokens
        return total

    def _of(self, file: Path, since: str) -> SpentByDay:
        stamp, spent = self._seen.get(file, (("", 0, 0), {}))
        with suppress(OSError, LedgerUnreadable):
            status = file.stat()
            now = (since, status.st_mtime_ns, status.st_size)
            # The single file may be in WAL mode, where the changes are in another file.
            if now != stamp or file == self._path:
                spent = spent_by_day(read_file(file, since))
                self._seen[file] = (now, spent)
        return spent


def spent_by_day(counts: Batch) -> SpentByDay:
    """Return the tokens of prompts and completions, by day and key."""
    spent: SpentByDay = {}
    for (day, key_id), row in counts.items():
        if key_id:
            spent.setdefault(day, {})[key_id] = int(row[1] + row[3])
    return spent
