"""The keys file: its grammar, and the locked, atomic way to change it.

    key_id:api_key[:rate_limit[:expiration]] [name=value ...]

One key a line; `#` begins a comment line. This module is the only place that knows the colons: the gateway reads
through `read` and `parse`, the command line changes through `rewrite`. It decides nothing about who may do what, and no
message of its own holds any part of a line: a mistyped line may have the secret anywhere.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

UTC = timezone.utc
ROLES = ("infer", "operator")
# 16 characters keep a guessable word from being a key; 128 keep a field line of the request short.
SECRET = "[A-Za-z0-9_-]{16,128}"
# 10,000 lines are about 1.5 MB; anything beyond this is not a keys file.
FILE_BYTES = 16 << 20

_HASHED = re.compile(r"sha256\$([0-9A-Fa-f]{64})")
_PLAIN = re.compile(SECRET)
_KEY_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")
_NUMBER = re.compile(r"-?[0-9]{1,15}")
_BLANKS = re.compile(r"[ \t]+")
# RFC 3339 with the offset, the seconds and the time of day left out at will. Spelled out, because what
# datetime.fromisoformat accepts differs between Python 3.10 and 3.11.
_EXPIRATION = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?(?:([Zz])|([+-])([0-9]{2}):?([0-9]{2}))?)?"
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


# Fields


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
    return digest_of(text)


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def parse_rate_limit(text: str) -> int | None:
    """Requests a minute; empty is None, the gateway's default."""
    return _whole("the rate limit", 0, 10**9)(text) if text else None


def parse_expiration(text: str) -> datetime:
    """ISO 8601 to aware UTC; a time without an offset is UTC, a date alone is its first moment."""
    match = _EXPIRATION.fullmatch(text)
    if not match:
        raise Invalid("an expiration is like 2026-12-31, 2026-12-31T23:59:59Z or 2026-12-31T23:59:59+02:00")
    *wall, fraction, _, sign, hours, minutes = match.groups(default="0")
    try:
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        year, month, day, hour, minute, second = map(int, wall)
        at = datetime(year, month, day, hour, minute, second, int(fraction.ljust(6, "0")), UTC)
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


parse_parallel = _whole("parallel", 1, 10**6)
parse_priority = _whole("priority", -1000, 1000)
parse_tokens_per_day = _whole("tokens_per_day", 1, 10**15 - 1)

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "role": parse_role,
    "parallel": parse_parallel,
    "priority": parse_priority,
    "tokens_per_day": parse_tokens_per_day,
}


# Lines


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
        parse_rate_limit(limit),
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


def parse(data: bytes) -> Parsed:
    """Parse a whole file. Nothing that is kept holds a secret in plain text."""
    try:
        text = _decode(data)
    except Invalid as error:
        return Parsed((), (), str(error))
    entries: list[Entry] = []
    complaints: list[str] = []
    torn = False
    for number, _, found in _scan(text):
        if isinstance(found, Invalid):
            complaints.append(f"line {number}: {found}")
        torn = isinstance(found, Invalid)
        if isinstance(found, Entry):
            entries.append(found)
    return Parsed(tuple(entries), tuple(complaints), _distrust(torn, bool(entries), bool(complaints)))


def _distrust(last_is_bad: bool, any_good: bool, any_bad: bool) -> str:
    # The scan ends with what follows the last newline: nothing at all in a whole file.
    if last_is_bad:
        return "the last line is torn: it lacks its newline and does not parse"
    if any_bad and not any_good:
        return "not one key line is valid"
    return ""


def _decode(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Invalid("the file is not UTF-8 text") from None
    if "\0" in text:
        raise Invalid("the file is not text: it holds NUL")
    return text


def _scan(text: str) -> Iterator[tuple[int, str, Entry | Invalid | None]]:
    """Give every line's number, text and meaning, the part behind the last newline included."""
    first: dict[bytes, int] = {}
    # Some editors begin a file with a byte order mark; it is no part of the first key's id.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        found: Entry | Invalid | None
        try:
            found = parse_line(line)
        except Invalid as error:
            found = error
        if isinstance(found, Entry) and first.setdefault(found.digest, number) != number:
            found = Invalid(f"the same key stands in line {first[found.digest]}")
        yield number, line, found


# Reading

Stamp = tuple[int, ...]


def stamp_of(status: os.stat_result) -> Stamp:
    """What changes when a file changes: another inode, another size, another time."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read(path: Path) -> tuple[bytes, Stamp]:
    """Read the file whole, with the stamp it had before. Raises OSError, also for what is no regular file."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        return _read_regular(file.read, status), stamp_of(status)


def _read_regular(read_bytes: Callable[[int], bytes], status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    data = read_bytes(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {FILE_BYTES} octets")
    return data
