"""The keys file: its grammar, and locked, atomic changes to it.

    key_id:api_key[:rate_limit[:expiration]] [name=value ...]

One key per line; `#` begins a comment line. Only this module knows the grammar: the gateway reads the file with `read`
and `parse`, and key_mgmt.py changes it with `rewrite`. It makes no authorization decision. No error message contains
any part of a line, because a mistyped line may have the secret anywhere.
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
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("infer", "operator")
# At least 16 characters, so that a guessable word is not a key; at most 128, so that the request's field line is short.
SECRET = "[A-Za-z0-9_-]{16,128}"
# 10,000 lines are about 1.5 MB. A larger file is not a keys file.
FILE_BYTES = 16 << 20
# A change takes milliseconds. A process that holds the lock for longer has hung.
LOCK_WAIT_S = 30.0
# If a new file cannot take the place of the old one for one of these reasons, the old file stays as it is: the disk is
# full or failing, or another program has changed the file. All other reasons (the file is itself a mount point, its
# folder is read-only, the volume cannot rename or has no owners …) do not keep a writable file from being overwritten.
_FINAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOMEM})
# What fsync reports on a file system that has none.
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

Warn = Callable[[str], None]
# Each request with the key is compared with all of them.
MAX_NETWORKS = 64
MAX_PATTERNS = 64

_HASHED = re.compile(r"sha256\$([0-9A-Fa-f]{64})")
_PLAIN = re.compile(SECRET)
_KEY_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")
_NUMBER = re.compile(r"[0-9]{1,15}|-[1-9][0-9]{0,14}")
_BLANKS = re.compile(r"[ \t]+")
_PATTERN = re.compile(r"[!-+\--:<-~]{1,255}")  # visible ASCII without a comma, and without the ; between lines
_NETWORK = re.compile(r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?")
# RFC 3339, with the offset, the seconds and the time of day optional. datetime.fromisoformat is not used, because it
# accepts different forms in Python 3.10 and 3.11.
_EXPIRATION = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))?)?"
)


Network = IPv4Network | IPv6Network


class KeyFileError(ValueError):
    """A field, a line or a whole file is invalid. The message names the rule and never contains the text."""


class Entry(NamedTuple):
    """One key: the SHA-256 digest of its secret, its role and its limits.

    rate_limit is in requests per minute: None is the gateway's default, 0 suspends the key. expires_at is aware UTC.
    sources are the networks from which the key works; none means from everywhere. models are patterns (`*`, `?` and
    `[…]`, as in a shell) of the models that it may use; None means all.
    """

    key_id: str
    digest: bytes
    rate_limit: int | None = None
    expires_at: datetime | None = None
    role: str = "infer"
    parallel: int | None = None
    priority: int = 0
    tokens_per_day: int | None = None
    sources: tuple[Network, ...] = ()
    tokens_per_minute: int | None = None
    tokens_per_month: int | None = None
    max_tokens: int | None = None
    models: tuple[str, ...] | None = None


class ParsedFile(NamedTuple):
    """The contents of a keys file. `error` is why the file as a whole must not take effect, or empty."""

    entries: tuple[Entry, ...]
    complaints: tuple[str, ...]  # one for each invalid line
    error: str = ""


# Fields and lines


def parse_key_id(text: str) -> str:
    if not _KEY_ID.fullmatch(text):
        raise KeyFileError("a key id is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter, a digit or _")
    return text


def parse_secret(text: str) -> bytes:
    """Return the SHA-256 digest of a secret as the file has it: plain, or `sha256$` and 64 hex digits."""
    hashed = _HASHED.fullmatch(text)
    if hashed:
        return bytes.fromhex(hashed[1])
    if not _PLAIN.fullmatch(text):
        raise KeyFileError("a key is 16 to 128 of A-Z a-z 0-9 - _, or sha256$ and 64 hex digits")
    return hashlib.sha256(text.encode()).digest()


def parse_expiration(text: str) -> datetime:
    """Convert ISO 8601 to aware UTC. A time without an offset is UTC; a date alone is its midnight."""
    match = _EXPIRATION.fullmatch(text)
    if not match:
        raise KeyFileError("an expiration is like 2026-12-31, 2026-12-31T23:59:59Z or 2026-12-31T23:59:59+02:00")
    *wall, fraction, sign, hours, minutes = match.groups(default="0")
    try:
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        year, month, day, hour, minute, second = map(int, wall)
        at = datetime(year, month, day, hour, minute, second, int(fraction.ljust(6, "0")), timezone.utc)
        return at + offset if sign == "-" else at - offset
    except (ValueError, OverflowError):
        raise KeyFileError("the expiration is not a valid date") from None


def parse_role(text: str) -> str:
    if text not in ROLES:
        raise KeyFileError("the role is infer or operator")
    return text


def parse_networks(text: str) -> tuple[Network, ...]:
    """Parse addresses and networks, comma-separated. IPv4-mapped IPv6 networks become IPv4 networks."""
    networks = tuple(dict.fromkeys(map(_parse_network, text.split(","))))
    if len(networks) > MAX_NETWORKS:
        raise KeyFileError(f"there are more than {MAX_NETWORKS} networks")
    return networks


def _parse_network(text: str) -> Network:
    try:
        # ip_network alone also accepts netmasks and zones.
        network = ip_network(text if _NETWORK.fullmatch(text) else "")
    except ValueError:
        raise KeyFileError(
            "a network is like 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7, with no bit set after the prefix"
        ) from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    return IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def serialize_networks(networks: tuple[Network, ...]) -> str:
    return ",".join(str(each).removesuffix(f"/{each.max_prefixlen}") for each in networks)


def parse_models(text: str) -> tuple[str, ...]:
    """Parse patterns of model names, comma-separated. Case counts."""
    patterns = tuple(dict.fromkeys(text.split(",")))
    if not all(map(_PATTERN.fullmatch, patterns)):
        raise KeyFileError("models is a list of names and patterns like chat-*,embed, without blanks and ;")
    if len(patterns) > MAX_PATTERNS:
        raise KeyFileError(f"there are more than {MAX_PATTERNS} patterns of models")
    return patterns


def _whole(what: str, low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        # int() alone accepts +5, 5_0 and non-ASCII digits.
        value = int(text) if _NUMBER.fullmatch(text) else low - 1
        if not low <= value <= high:
            raise KeyFileError(f"{what} is a whole number from {low} to {high}")
        return value

    return convert


parse_rate_limit = _whole("the rate limit", 0, 10**9)
parse_parallel = _whole("parallel", 1, 10**6)
parse_priority = _whole("priority", -1000, 1000)
parse_tokens_per_day = _whole("tokens_per_day", 1, 10**15 - 1)
parse_tokens_per_minute = _whole("tokens_per_minute", 1, 10**15 - 1)
parse_tokens_per_month = _whole("tokens_per_month", 1, 10**15 - 1)
# llama-server reads a signed number of 32 bits.
parse_max_tokens = _whole("max_tokens", 1, 2**31 - 1)


class Option(NamedTuple):
    """One option of a line: the field of Entry that it sets, how its value is parsed and serialized, and its help.

    A program that sets it on its command line accepts `unset` as the field's default; empty if no word stands for that.
    """

    field: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    unset: str = ""
    serialize: Callable[[Any], str] = str


# key_mgmt.py takes each of them as --name.
OPTIONS: dict[str, Option] = {
    "role": Option(
        "role",
        parse_role,
        "{infer,operator}",
        "operator may also reload, drain, and read slots, props, usage, metrics",
    ),
    "parallel": Option("parallel", parse_parallel, "N", "concurrent requests, more wait; or none", "none"),
    "priority": Option("priority", parse_priority, "N", "higher is served first (default: 0)"),
    "tokens_per_day": Option(
        "tokens_per_day", parse_tokens_per_day, "N", "prompt and completion tokens per UTC day; or none", "none"
    ),
    "tokens_per_minute": Option(
        "tokens_per_minute", parse_tokens_per_minute, "N", "prompt and completion tokens in any 60 s; or none", "none"
    ),
    "tokens_per_month": Option(
        "tokens_per_month", parse_tokens_per_month, "N", "prompt and completion tokens per UTC month; or none", "none"
    ),
    "max_tokens": Option("max_tokens", parse_max_tokens, "N", "generated tokens of one choice; or none", "none"),
    "models": Option(
        "models", parse_models, "LIST", "the models that it may use, like 'chat-*,embed'; or all", "all", ",".join
    ),
    "from": Option(
        "sources",
        parse_networks,
        "LIST",
        "networks from which alone the key works, like 10.0.0.0/8,2001:db8::/32; or none",
        "none",
        serialize_networks,
    ),
}


def parse_line(line: str) -> Entry | None:
    """Parse one line without its newline. Returns None for a comment or a blank line. Raises KeyFileError."""
    line = line.strip(" \t\r")
    if not line or line.startswith("#"):
        return None
    head, *options = _BLANKS.split(line)
    if ":" not in head:
        raise KeyFileError("a line is key_id:api_key[:rate_limit[:expiration]] followed by name=value options")
    key_id, secret, limit, expiration = (*head.split(":", 3), "", "")[:4]
    return Entry(
        parse_key_id(key_id),
        parse_secret(secret),
        parse_rate_limit(limit) if limit else None,
        parse_expiration(expiration) if expiration else None,
        **_parse_options(options),
    )


def _parse_options(texts: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        option = OPTIONS.get(name)
        if option is None:
            raise KeyFileError(f"the options are {', '.join(OPTIONS)}, each as name=value")
        if option.field in options:
            raise KeyFileError(f"{name} is given twice")
        options[option.field] = option.parse(value)
    return options


# The whole file


class Line(NamedTuple):
    """One line without its newline, and what it was parsed to: None for a comment or a blank line."""

    text: str
    parsed: Entry | KeyFileError | None

    @property
    def secret(self) -> str:
        """The secret of a key line as the line has it, plain or hashed."""
        return _BLANKS.split(self.text.strip(" \t\r"))[0].split(":")[1]


def parse(data: bytes) -> ParsedFile:
    """Parse a whole file. The result contains no secret in plain text. Never raises."""
    try:
        return _summarize(_parse_lines(data))
    except KeyFileError as error:
        return ParsedFile((), (), str(error))


def _parse_lines(data: bytes) -> list[Line]:
    """Parse every line, including the text after the last newline, which is empty in a complete file."""
    lines: list[Line] = []
    line_numbers: dict[bytes, int] = {}
    for number, text in enumerate(_decode(data).split("\n"), 1):
        parsed = _parse_or_error(text)
        if isinstance(parsed, Entry) and line_numbers.setdefault(parsed.digest, number) != number:
            parsed = KeyFileError(f"line {line_numbers[parsed.digest]} has the same key")
        lines.append(Line(text, parsed))
    return lines


def _parse_or_error(text: str) -> Entry | KeyFileError | None:
    try:
        return parse_line(text)
    except KeyFileError as error:
        return error


def _decode(data: bytes) -> str:
    try:
        # Some editors begin a file with a byte order mark. It is not part of the first key id.
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        raise KeyFileError("the file is not UTF-8 text") from None
    if "\0" in text:
        raise KeyFileError("the file is not text: it contains NUL")
    return text


def _summarize(lines: list[Line]) -> ParsedFile:
    entries = tuple(line.parsed for line in lines if isinstance(line.parsed, Entry))
    errors = ((number, line.parsed) for number, line in enumerate(lines, 1) if isinstance(line.parsed, KeyFileError))
    complaints = tuple(f"line {number}: {error}" for number, error in errors)
    if isinstance(lines[-1].parsed, KeyFileError):
        return ParsedFile(entries, complaints, "the last line is incomplete: it has no newline and is invalid")
    return ParsedFile(entries, complaints, "no key line is valid" if complaints and not entries else "")


# Keys that are given in a setting


def parse_list(text: str) -> ParsedFile:
    """Parse key lines that newlines or `;` separate. Never raises."""
    return parse(text.replace(";", "\n").encode(errors="replace") + b"\n")


def merge(entries: tuple[Entry, ...], given: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Add given keys to those of the file; return all, and a complaint about each that is not added.

    The file takes precedence: a name or a key that it has is not added, so a change of the file revokes a given key.
    """
    names, digests = {entry.key_id for entry in entries}, {entry.digest for entry in entries}
    clashing = {entry for entry in given if entry.key_id in names or entry.digest in digests}
    added = tuple(entry for entry in given if entry not in clashing)
    reported = [entry.key_id for entry in given if entry in clashing and entry not in entries]
    return entries + added, tuple(
        f"the entry {key_id} does not count: the keys file has that name or key" for key_id in reported
    )


# Reading

Stamp = tuple[int, ...]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return a value that changes when the file changes: device, inode, size and times."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def stamp(path: Path) -> Stamp:
    """Return the stamp of the file at a path, without the inode on a volume where that changes by itself.

    Raises OSError.
    """
    one, other = path.stat(), path.stat()
    return stamp_of(one) if os.path.samestat(one, other) else stamp_of(one)[2:]


def read(path: Path) -> bytes:
    """Return the file's bytes. Raises OSError, also if it is not a regular file or is larger than FILE_BYTES."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _read_regular(descriptor, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def detached(status: os.stat_result) -> str:
    """Return what is wrong if a file has no name any more: it is mounted alone, and was replaced outside. Else ""."""
    if status.st_nlink:
        return ""
    return "the file was replaced outside of this mount, which still shows the old one: mount its folder, not the file"


def _read_regular(descriptor: int, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    data = bytearray()
    while chunk := os.pread(descriptor, 1 << 20, len(data)):
        data += chunk
        if len(data) > FILE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {FILE_BYTES} bytes")
    return bytes(data)


# Editing


class Document:
    """A keys file that is being edited. Lines that are not edited keep their exact text."""

    def __init__(self, data: bytes) -> None:
        """Raises KeyFileError if the file as a whole is invalid: a change could hide what is wrong with it."""
        self.lines = _parse_lines(data)
        summary = _summarize(self.lines)
        if summary.error:
            raise KeyFileError(summary.error)
        self.complaints = summary.complaints
        # The text after the last newline is a line only if it is not empty.
        if not self.lines[-1].text:
            self.lines.pop()

    def serialize(self) -> bytes:
        return "".join(line.text + "\n" for line in self.lines).encode()

    def complaint_about(self, key_id: str) -> str:
        """Return what is wrong with the first line of the key id that is not valid, if there is one; else ""."""
        for number, line in enumerate(self.lines, 1):
            if isinstance(line.parsed, KeyFileError) and line.text.partition(":")[0].strip() == key_id:
                return f"line {number}: {line.parsed}"
        return ""

    def find(self, key_id: str) -> list[tuple[int, Entry]]:
        """Return (index in `lines`, entry) for each line of the key id, in file order."""
        numbered = ((index, line.parsed) for index, line in enumerate(self.lines))
        return [(index, entry) for index, entry in numbered if isinstance(entry, Entry) and entry.key_id == key_id]


def serialize_entry(entry: Entry, secret: str = "") -> Line:
    """Make the line of an entry. secret is written as given, plain or hashed; without one the digest is written."""
    limit = "" if entry.rate_limit is None else str(entry.rate_limit)
    expiration = "" if entry.expires_at is None else serialize_time(entry.expires_at)
    head = ":".join([entry.key_id, secret or "sha256$" + entry.digest.hex(), limit, expiration]).rstrip(":")
    text = " ".join([head, *_serialize_options(entry)])
    return Line(text, parse_line(text))


def _serialize_options(entry: Entry) -> Iterator[str]:
    """Yield name=value for each option that is not the default."""
    for name, option in OPTIONS.items():
        value = getattr(entry, option.field)
        if value != Entry._field_defaults[option.field]:
            yield f"{name}={option.serialize(value)}"


def serialize_time(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


# Rewriting


def rewrite(
    path: Path,
    change: Callable[[Document], None],
    *,
    create: bool = False,
    warn: Warn = lambda message: None,
    replace: Callable[[str, str], None] = os.replace,
    wait_s: float = LOCK_WAIT_S,
) -> Document:
    """Edit the file with `change` under an exclusive lock, and return the new document.

    If `change` raises, the file stays as it was. If the process is killed, the file is the old one or the new one.
    Owner and mode are kept, and a symlink stays a symlink. With create, a missing file is created first. wait_s is how
    long to wait for the lock. Raises OSError, and KeyFileError if the file as a whole is invalid.

    Volumes may lack locks, rename, fsync or lasting inode numbers. `warn` gets one sentence for each guarantee that is
    lost because of that; a key can be revoked on all of them.
    """
    target = os.path.realpath(path)
    if create and not os.path.exists(target):
        _create(target)
    with _locked(target, wait_s, warn) as descriptor:
        if create and not os.fstat(descriptor).st_size:
            _give_away(descriptor, os.path.dirname(target))
        status = os.fstat(descriptor)
        before = _read_regular(descriptor, status)
        document = Document(before)
        change(document)
        after = document.serialize()
        if after == before:
            return document
        try:
            _replace(target, status, after, replace, warn)
        except OSError as error:
            if error.errno in _FINAL:
                raise
            warn(f"the file cannot be replaced ({error.strerror}) and is changed in place, which is not atomic")
            _write_in_place(descriptor, len(before), after, warn)
    return document


def _create(target: str) -> None:
    with suppress(FileExistsError):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _give_away(descriptor: int, folder: str) -> None:
    """Give a file the owner of its folder: the gateway must read it, and seldom runs as root.

    The caller holds the lock: for any other writer a change of the owner would be one by another program.
    """
    owner = os.stat(folder)
    with suppress(OSError):  # not root, or a volume without owners
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


@contextmanager
def _locked(target: str, wait_s: float, warn: Warn) -> Iterator[int]:
    """Hold the lock of the file at this path, and yield its descriptor.

    The lock is on the file itself, so that it also works across mounts. If the file was replaced while this waited, the
    descriptor is that of the old file: it is closed, and the new file is opened.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        descriptor = os.open(target, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if try_lock(descriptor, target, warn):
                yield descriptor
                return
        finally:
            os.close(descriptor)
        if time.monotonic() >= deadline_s:
            raise OSError(errno.EAGAIN, "locked by another program")
        time.sleep(0.01)


def try_lock(descriptor: int, target: str, warn: Warn = lambda message: None) -> bool:
    """Lock an open file without waiting. Returns False if it is locked, or if target is no longer the same file.

    On a volume without locks, go on without one.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"the volume has no file locks ({error.strerror}): make one change at a time")
    with suppress(FileNotFoundError):
        return _same_file(os.fstat(descriptor), os.stat(target))
    return False


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Compare inodes, or sizes, times and links, for volumes that give one file several inodes."""
    same_times = stamp_of(one)[2:] == stamp_of(other)[2:]
    return os.path.samestat(one, other) or (same_times and one.st_nlink == other.st_nlink)


def _replace(target: str, status: os.stat_result, data: bytes, replace: Callable[[str, str], None], warn: Warn) -> None:
    folder, name = os.path.split(target)
    _remove_leftovers(folder, name)
    temporary = os.path.join(folder, f".{name}.{os.urandom(8).hex()}.tmp")
    try:
        _write_new(temporary, status, data, warn)
        # The lock is advisory: a text editor does not take it.
        now = os.stat(target)
        if not _same_file(now, status) or stamp_of(now)[2:] != stamp_of(status)[2:]:
            raise OSError(errno.ESTALE, "changed by another program in the meantime")
        replace(temporary, target)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    _sync_folder(folder)


def _remove_leftovers(folder: str, name: str) -> None:
    """Remove the temporary files of killed writers. The caller holds the lock, so no other writer is active."""
    leftover = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for other in filter(leftover.fullmatch, os.listdir(folder)):
        with suppress(OSError):
            os.unlink(os.path.join(folder, other))


def _write_new(path: str, like: os.stat_result, data: bytes, warn: Warn) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_at(descriptor, data, 0)
        made = os.fstat(descriptor)
        # Only if they differ: some volumes have one owner and one mode for all files, and refuse both calls.
        if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):  # pragma: no cover - only root gives files away
            os.fchown(descriptor, like.st_uid, like.st_gid)
        if stat.S_IMODE(made.st_mode) != stat.S_IMODE(like.st_mode):
            os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
        _sync(descriptor, warn)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, warn: Warn) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        warn(f"the volume cannot sync a file ({error.strerror}): a power failure may undo the change")


def _sync_folder(folder: str) -> None:
    # The new file is already in place. Some network file systems cannot sync a folder.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_in_place(descriptor: int, old_bytes: int, data: bytes, warn: Warn) -> None:
    """Overwrite the file in three steps: append blank lines, overwrite with one write, truncate.

    Between the steps the file is valid. A full disk is noticed in the first step, which can be undone.
    """
    padding = len(data) - old_bytes
    if padding > 0:
        try:
            _write_at(descriptor, b"\n" * padding, old_bytes)
        except OSError:
            os.ftruncate(descriptor, old_bytes)
            raise
    _write_at(descriptor, data + b"\n" * -padding, 0)
    if padding < 0:
        try:
            os.ftruncate(descriptor, len(data))
        except OSError as error:
            warn(f"the volume cannot shorten a file ({error.strerror}): blank lines remain at its end")
    _sync(descriptor, warn)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
