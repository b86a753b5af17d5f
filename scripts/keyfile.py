"""The keys file: its grammar, and the locked, atomic way to change it.

    key_id:api_key[:rate_limit[:expiration]] [name=value ...]

One key a line; `#` begins a comment line. This module is the only place that knows the colons: the gateway reads
through `read` and `parse`, the command line changes through `rewrite`. It decides nothing about who may do what, and no
message of its own holds any part of a line: a mistyped line may have the secret anywhere.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

ROLES = ("infer", "operator")
# 16 characters keep a guessable word from being a key; 128 keep a field line of the request short.
SECRET = "[A-Za-z0-9_-]{16,128}"
# 10,000 lines are about 1.5 MB; anything beyond this is not a keys file.
FILE_BYTES = 16 << 20
# A change takes milliseconds; whoever holds the lock for longer has stopped.
LOCK_WAIT_S = 30.0
# What keeps a file from being replaced, though it may be written: it is a mount point of its own, its folder is
# read-only or somebody else's, or its owner could not be given to the new file.
_NO_REPLACE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)

_HASHED = re.compile(r"sha256\$([0-9A-Fa-f]{64})")
_PLAIN = re.compile(SECRET)
_KEY_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")
_NUMBER = re.compile(r"[0-9]{1,15}|-[1-9][0-9]{0,14}")
_BLANKS = re.compile(r"[ \t]+")
# RFC 3339 with the offset, the seconds and the time of day left out at will. Spelled out, because what
# datetime.fromisoformat accepts differs between Python 3.10 and 3.11.
_EXPIRATION = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))?)?"
)


class Invalid(ValueError):
    """A field that breaks the grammar. The text says which rule, never what stood there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key: the SHA-256 digest of its secret and what its holder may do.

    rate_limit counts requests a minute: None is the gateway's default, 0 suspends the key. expires_at is aware UTC.
    """

    key_id: str
    digest: bytes
    rate_limit: int | None = None
    expires_at: datetime | None = None
    role: str = "infer"
    parallel: int | None = None
    priority: int = 0
    tokens_per_day: int | None = None


@dataclass(frozen=True)
class Parsed:
    """What a keys file says. `distrust` is the reason why the file as a whole must not take effect, or empty."""

    entries: tuple[Entry, ...]
    complaints: tuple[str, ...]
    distrust: str = ""


# Fields and lines


def parse_key_id(text: str) -> str:
    if not _KEY_ID.fullmatch(text):
        raise Invalid("a key id is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter, a digit or _")
    return text


def parse_secret(text: str) -> bytes:
    """Return the digest of a secret as it stands in the file: plain, or `sha256$` and 64 hex digits."""
    hashed = _HASHED.fullmatch(text)
    if hashed:
        return bytes.fromhex(hashed[1])
    if not _PLAIN.fullmatch(text):
        raise Invalid("a key is 16 to 128 of A-Z a-z 0-9 - _, or sha256$ and 64 hex digits")
    return hashlib.sha256(text.encode()).digest()


def parse_expiration(text: str) -> datetime:
    """ISO 8601 to aware UTC; a time without an offset is UTC, a date alone is its first moment."""
    match = _EXPIRATION.fullmatch(text)
    if not match:
        raise Invalid("an expiration is like 2026-12-31, 2026-12-31T23:59:59Z or 2026-12-31T23:59:59+02:00")
    *wall, fraction, sign, hours, minutes = match.groups(default="0")
    try:
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        year, month, day, hour, minute, second = map(int, wall)
        at = datetime(year, month, day, hour, minute, second, int(fraction.ljust(6, "0")), timezone.utc)
        return at + offset if sign == "-" else at - offset
    except (ValueError, OverflowError):
        raise Invalid("the expiration is no date of the calendar") from None


def parse_role(text: str) -> str:
    if text not in ROLES:
        raise Invalid("the role is infer or operator")
    return text


def _whole(what: str, low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        # int() alone reads +5, 5_0 and the digits of every script.
        value = int(text) if _NUMBER.fullmatch(text) else low - 1
        if not low <= value <= high:
            raise Invalid(f"{what} is a whole number from {low} to {high}")
        return value

    return convert


parse_rate_limit = _whole("the rate limit", 0, 10**9)
parse_parallel = _whole("parallel", 1, 10**6)
parse_priority = _whole("priority", -1000, 1000)
parse_tokens_per_day = _whole("tokens_per_day", 1, 10**15 - 1)

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "role": parse_role,
    "parallel": parse_parallel,
    "priority": parse_priority,
    "tokens_per_day": parse_tokens_per_day,
}


def parse_line(line: str) -> Entry | None:
    """Parse one line without its newline; None is a comment or a blank line. Raises Invalid."""
    line = line.strip(" \t\r")
    if not line or line.startswith("#"):
        return None
    head, *words = _BLANKS.split(line)
    if ":" not in head:
        raise Invalid("a line is key_id:api_key[:rate_limit[:expiration]], then name=value words")
    key_id, secret, limit, expiration = (*head.split(":", 3), "", "")[:4]
    return Entry(
        parse_key_id(key_id),
        parse_secret(secret),
        parse_rate_limit(limit) if limit else None,
        parse_expiration(expiration) if expiration else None,
        **_parse_options(words),
    )


def _parse_options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        convert = _OPTIONS.get(name)
        if convert is None:
            raise Invalid(f"the options are {', '.join(_OPTIONS)}, each as name=value")
        if name in options:
            raise Invalid(f"{name} is given twice")
        options[name] = convert(value)
    return options


# The whole file


@dataclass(frozen=True)
class Line:
    """One line as it stands, without its newline, and what it means; None is a comment or a blank line."""

    text: str
    found: Entry | Invalid | None

    @property
    def secret(self) -> str:
        """A key line's key as it stands there, plain or hashed."""
        return _BLANKS.split(self.text.strip(" \t\r"))[0].split(":")[1]


def parse(data: bytes) -> Parsed:
    """Parse a whole file. Nothing that is kept holds a secret in plain text."""
    try:
        return _judge(_scan(data))
    except Invalid as error:
        return Parsed((), (), str(error))


def _scan(data: bytes) -> list[Line]:
    """Parse every line, the part behind the last newline included, which is empty in a whole file."""
    lines: list[Line] = []
    first: dict[bytes, int] = {}
    for number, text in enumerate(_decode(data).split("\n"), 1):
        found = _found(text)
        if isinstance(found, Entry) and first.setdefault(found.digest, number) != number:
            found = Invalid(f"the same key stands in line {first[found.digest]}")
        lines.append(Line(text, found))
    return lines


def _found(text: str) -> Entry | Invalid | None:
    try:
        return parse_line(text)
    except Invalid as error:
        return error


def _decode(data: bytes) -> str:
    try:
        # Some editors begin a file with a byte order mark; it is no part of the first key's id.
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        raise Invalid("the file is not UTF-8 text") from None
    if "\0" in text:
        raise Invalid("the file is not text: it holds NUL")
    return text


def _judge(lines: list[Line]) -> Parsed:
    entries = tuple(line.found for line in lines if isinstance(line.found, Entry))
    complaints = tuple(f"line {n}: {line.found}" for n, line in enumerate(lines, 1) if isinstance(line.found, Invalid))
    if isinstance(lines[-1].found, Invalid):
        return Parsed(entries, complaints, "the last line is torn: it lacks its newline and does not parse")
    return Parsed(entries, complaints, "not one key line is valid" if complaints and not entries else "")


# Reading

Stamp = tuple[int, ...]


def stamp_of(status: os.stat_result) -> Stamp:
    """What changes when a file changes: another inode, another size, another time."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read(path: Path) -> tuple[bytes, Stamp]:
    """Read the file whole, with the stamp it had before. Raises OSError, also for what is no regular file."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        return _read_regular(descriptor, status), stamp_of(status)
    finally:
        os.close(descriptor)


def _read_regular(descriptor: int, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    data = bytearray()
    while chunk := os.pread(descriptor, 1 << 20, len(data)):
        data += chunk
        if len(data) > FILE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {FILE_BYTES} octets")
    return bytes(data)


# Editing


class Document:
    """A keys file to be changed: every line in its order, and those that nobody touches as they stand."""

    def __init__(self, data: bytes) -> None:
        """Raises Invalid where the file as a whole cannot be trusted: a change could bury what is wrong with it."""
        self.lines = _scan(data)
        parsed = _judge(self.lines)
        if parsed.distrust:
            raise Invalid(parsed.distrust)
        self.complaints = parsed.complaints
        # What follows the last newline is a line only where it holds something.
        if not self.lines[-1].text:
            self.lines.pop()

    def serialize(self) -> bytes:
        return "".join(line.text + "\n" for line in self.lines).encode()

    def find(self, key_id: str) -> list[tuple[int, Entry]]:
        """Where the lines of a key are, and what they say, in the order of the file."""
        found = ((index, line.found) for index, line in enumerate(self.lines))
        return [(index, entry) for index, entry in found if isinstance(entry, Entry) and entry.key_id == key_id]


def serialize_entry(entry: Entry, secret: str = "") -> Line:
    """Write a key line; secret is the key as it shall stand there, hashed unless it is given."""
    limit = "" if entry.rate_limit is None else str(entry.rate_limit)
    expiration = "" if entry.expires_at is None else serialize_time(entry.expires_at)
    head = ":".join([entry.key_id, secret or "sha256$" + entry.digest.hex(), limit, expiration]).rstrip(":")
    bare = Entry(entry.key_id, entry.digest)
    words = [f"{name}={getattr(entry, name)}" for name in _OPTIONS if getattr(entry, name) != getattr(bare, name)]
    text = " ".join([head, *words])
    return Line(text, parse_line(text))


def serialize_time(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


# Rewriting


def rewrite(
    path: Path,
    change: Callable[[Document], None],
    *,
    create: bool = False,
    replace: Callable[[str, str], None] = os.replace,
    wait_s: float = LOCK_WAIT_S,
) -> Document:
    """Let `change` edit the file, alone, and return what it then is; what `change` raises leaves it as it was.

    Whoever is killed meanwhile leaves the old file or the new one. Owner and mode stay, a symlink too. create begins an
    empty file where there is none. Raises OSError, and Invalid where the file cannot be trusted.
    """
    target = os.path.realpath(path)
    if create and not os.path.exists(target):
        _create(target)
    with _locked(target, wait_s) as descriptor:
        status = os.fstat(descriptor)
        before = _read_regular(descriptor, status)
        document = Document(before)
        change(document)
        after = document.serialize()
        if after == before:
            return document
        try:
            _replace(target, status, after, replace)
        except OSError as error:
            if error.errno not in _NO_REPLACE:
                raise
            _write_in_place(descriptor, len(before), after)
    return document


def _create(target: str) -> None:
    with suppress(FileExistsError):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb"):
            # What root makes is for whom the folder belongs to: the gateway that must read it is seldom root.
            owner = os.stat(os.path.dirname(target))
            with suppress(PermissionError):
                os.fchown(descriptor, owner.st_uid, owner.st_gid)


@contextmanager
def _locked(target: str, wait_s: float) -> Iterator[int]:
    """Hold the lock of the file that has this name, and lend its descriptor.

    The lock is on the file itself, so that it holds across mounts. Who has waited for one that was then replaced holds
    a file that has lost its name, and begins again.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        descriptor = os.open(target, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if _is_mine(descriptor, target):
                yield descriptor
                return
        finally:
            os.close(descriptor)
        if time.monotonic() >= deadline_s:
            raise OSError(errno.EAGAIN, "locked by another program")
        time.sleep(0.01)


def _is_mine(descriptor: int, target: str) -> bool:
    """Try to lock the file; it also has to be the one that bears the name by then."""
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(target))
    return False


def _replace(target: str, status: os.stat_result, data: bytes, replace: Callable[[str, str], None]) -> None:
    folder, name = os.path.split(target)
    _sweep(folder, name)
    temporary = os.path.join(folder, f".{name}.{os.urandom(8).hex()}.tmp")
    try:
        _write_new(temporary, status, data)
        # The lock keeps out only those who ask for it; an editor does not.
        if stamp_of(os.stat(target)) != stamp_of(status):
            raise OSError(errno.ESTALE, "changed by another program meanwhile")
        replace(temporary, target)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    _sync_folder(folder)


def _sweep(folder: str, name: str) -> None:
    """Remove what a writer who was killed left behind. The lock says that none is at work."""
    litter = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for other in filter(litter.fullmatch, os.listdir(folder)):
        with suppress(OSError):
            os.unlink(os.path.join(folder, other))


def _write_new(path: str, like: os.stat_result, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_at(descriptor, data, 0)
        os.fchown(descriptor, like.st_uid, like.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    # The new file is in force by now. Some network file systems cannot sync a folder.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_in_place(descriptor: int, old_bytes: int, data: bytes) -> None:
    """Overwrite the file in steps between which it is whole: grow by blank lines, overwrite at one go, cut the rest.

    A full disk is noticed at the first step, which can be taken back.
    """
    padding = len(data) - old_bytes
    if padding > 0:
        try:
            _write_at(descriptor, b"\n" * padding, old_bytes)
        except OSError:
            os.ftruncate(descriptor, old_bytes)
            raise
    _write_at(descriptor, data + b"\n" * -padding, 0)
    os.ftruncate(descriptor, len(data))
    os.fsync(descriptor)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
