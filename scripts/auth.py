"""Who is calling, and whether they are within their rate.

A request's credential is looked up in an immutable keyring that holds SHA-256 digests only: one dict access, which
costs the same for one key and for 10,000, and whose timing tells nothing about any key. A reload builds a new keyring
and swaps one reference; the rates live beside it, by key id, and so outlast it. Nothing here logs, counts or does
network I/O.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import keyfile
from errors import INVALID_API_KEY, KEY_SUSPENDED, RATE_LIMIT_EXCEEDED, Fields, GatewayError

WINDOW_S = 60.0
# Requests that come within this time are counted as one group and leave the window together, with the last of them.
GROUP_S = 1.0

NO_KEY = "-"  # no key's id can be this
CHALLENGE: Fields = ((b"WWW-Authenticate", b"Bearer"),)

# RFC 9110 §11.4 puts one or more spaces behind the scheme. A key alone is what some tools send; no key is as short as a
# scheme's name, and none holds a space, so that the two cannot be confused.
_AUTHORIZATION = re.compile(rb"(?:[Bb][Ee][Aa][Rr][Ee][Rr] +)?(" + keyfile.SECRET.encode() + rb")").fullmatch
_BARE = re.compile(rb"(" + keyfile.SECRET.encode() + rb")").fullmatch
_FIELDS = ((b"authorization", _AUTHORIZATION), (b"x-api-key", _BARE), (b"api-key", _BARE))


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of the key that a request carried. rate_limit counts requests a minute."""

    key_id: str
    role: str
    rate_limit: int
    parallel: int | None = None
    priority: int = 0
    tokens_per_day: int | None = None
    expires_s: float | None = None  # since the epoch

    @property
    def is_operator(self) -> bool:
        return self.role == "operator"


# With AUTH_ENABLED=false nobody is told apart, so that a rate for one would be a rate for all: there is none.
ANONYMOUS = Caller(NO_KEY, "infer", 10**9)
ANONYMOUS_OPERATOR = Caller(NO_KEY, "operator", 10**9)


# The credential


def unauthorized(detail: str = "") -> GatewayError:
    """The one 401: the same for a key that is missing, malformed, unknown or expired."""
    return GatewayError(INVALID_API_KEY, detail, fields=CHALLENGE)


def credential(known: Mapping[bytes, Sequence[bytes]]) -> bytes | None:
    """Return the one secret that a request offers, None where it offers nothing.

    known maps lower-case field names to their values in wire order. The same secret in several fields is one secret; a
    field that comes twice, another scheme, a list and two different secrets raise GatewayError(INVALID_API_KEY).
    """
    values = known.get(b"authorization")
    if values is None or b"x-api-key" in known or b"api-key" in known:
        return _credential_of_several(known)
    match = _AUTHORIZATION(values[0])
    if match is None or len(values) > 1:
        raise unauthorized()
    return match[1]


def _credential_of_several(known: Mapping[bytes, Sequence[bytes]]) -> bytes | None:
    secrets = set()
    for name, grammar in _FIELDS:
        values = known.get(name, ())
        match = grammar(values[0]) if values else None
        if len(values) > 1 or (values and match is None):
            raise unauthorized()
        if match is not None:
            secrets.add(match[1])
    if len(secrets) > 1:
        raise unauthorized("The request carries two different API keys.")
    return secrets.pop() if secrets else None


# The keyring


class Keyring:
    """The keys in force, by digest. Immutable."""

    __slots__ = ("_callers",)

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = callers

    @classmethod
    def of(cls, entries: Iterable[keyfile.Entry], default_rate: int = 100) -> "Keyring":
        """Build a keyring; default_rate, in requests a minute, is for the entries that name none."""
        return cls({entry.digest: _caller(entry, default_rate) for entry in entries})

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, digest: bytes, clock: Callable[[], float]) -> Caller:
        """Return whose secret has this digest; the clock tells seconds since the epoch.

        Raises GatewayError(INVALID_API_KEY or KEY_SUSPENDED).
        """
        caller = self._callers.get(digest)
        if caller is None or (caller.expires_s is not None and caller.expires_s <= clock()):
            raise unauthorized()
        if caller.rate_limit == 0:
            raise GatewayError(KEY_SUSPENDED)
        return caller


def _caller(entry: keyfile.Entry, default_rate: int) -> Caller:
    rate_limit = default_rate if entry.rate_limit is None else entry.rate_limit
    expires_s = None if entry.expires_at is None else entry.expires_at.timestamp()
    return Caller(entry.key_id, entry.role, rate_limit, entry.parallel, entry.priority, entry.tokens_per_day, expires_s)


@dataclass(frozen=True)
class Reload:
    """What became of a reload. keys counts those in force now; a complaint is for a line, reason for the whole file."""

    ok: bool
    keys: int
    complaints: tuple[str, ...] = ()
    reason: str = ""


class KeyStore:
    """The keys file's current keyring; empty, which lets nobody in, until a reload succeeds."""

    def __init__(self, path: Path, default_rate: int) -> None:
        self.keyring = Keyring({})
        self._path = path
        self._default_rate = default_rate
        self._loaded: keyfile.Stamp | None = None
        self._seen: keyfile.Stamp | None = None

    def reload(self) -> Reload:
        """Read the file and put its keys in force, or keep the last good ones and say why. Never raises."""
        self._seen = self._loaded = self._stamp()
        try:
            data, self._loaded = keyfile.read(self._path)
        except (OSError, ValueError) as error:
            return self._kept(f"the keys file {self._path} (AUTH_KEYS_FILE) cannot be read: {_reason(error)}")
        parsed = keyfile.parse(data)
        if parsed.distrust:
            return self._kept(parsed.distrust, parsed.complaints)
        self.keyring = Keyring.of(parsed.entries, self._default_rate)
        return Reload(True, len(self.keyring), parsed.complaints)

    def _kept(self, reason: str, complaints: tuple[str, ...] = ()) -> Reload:
        return Reload(False, len(self.keyring), complaints, reason)

    def changed(self) -> bool:
        """Whether the file differs from what was last loaded and has been the same for two calls in a row.

        Call it twice an interval: somebody may be in the middle of writing when the first sees the change.
        """
        before, self._seen = self._seen, self._stamp()
        return self._seen != self._loaded and self._seen == before

    def _stamp(self) -> keyfile.Stamp | None:
        try:
            return keyfile.stamp_of(self._path.stat())
        except (OSError, ValueError):
            return None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


# The rates


def serialize_duration(duration_s: float) -> bytes:
    """Write a duration as OpenAI does: 350ms, 1s, 6m0s. Rounded up, so that it is never too early."""
    if duration_s < 1:
        return b"%dms" % math.ceil(max(duration_s, 0) * 1000)
    minutes, seconds = divmod(math.ceil(duration_s), 60)
    return b"%dm%ds" % (minutes, seconds) if minutes else b"%ds" % seconds


def allowance(limit: int, remaining: int, reset_s: float) -> Fields:
    """Tell a client where its key stands; reset_s is the time until nothing that it did counts any more."""
    return (
        (b"x-ratelimit-limit-requests", b"%d" % limit),
        (b"x-ratelimit-remaining-requests", b"%d" % remaining),
        (b"x-ratelimit-reset-requests", serialize_duration(reset_s)),
    )


def allowance_lines(limit: int, remaining: int) -> bytes:
    """The same as field lines, behind a request that was accepted just now."""
    return _ALLOWANCE % (limit, remaining)


_ALLOWANCE = b"".join(
    b"%b: %b\r\n" % (name, value if b"reset" in name else b"%d") for name, value in allowance(0, 0, WINDOW_S)
)


class _Group:
    """Requests of one key that came within GROUP_S."""

    __slots__ = ("count", "last_s")

    def __init__(self) -> None:
        self.last_s = 0.0
        self.count = 0


class _Window:
    """The groups of one key. `last` is the one that began at `began_s`; before `due_s` none is a whole window old."""

    __slots__ = ("began_s", "due_s", "groups", "last", "total")

    last: _Group

    def __init__(self) -> None:
        self.groups: deque[_Group] = deque()
        self.total = 0
        self.began_s = -math.inf
        self.due_s = math.inf

    def begin_group(self, now_s: float) -> None:
        self.last = _Group()
        self.began_s = now_s
        self.groups.append(self.last)
        self.due_s = min(self.due_s, now_s + WINDOW_S)

    def take_away(self) -> None:
        """Uncount the newest request."""
        if self.groups:
            self.total -= 1
            self.groups[-1].count -= 1
            if self.groups[-1].count == 0:
                self.groups.pop()
                self.began_s = -math.inf

    def age(self, now_s: float) -> None:
        """Drop what is a whole window old."""
        groups = self.groups
        while groups and groups[0].last_s + WINDOW_S <= now_s:
            self.total -= groups.popleft().count
        self.due_s = groups[0].last_s + WINDOW_S if groups else math.inf

    def wait_s(self, limit: int, now_s: float) -> float:
        """Seconds until fewer than limit requests count, if none is added; at least limit count now."""
        groups = iter(self.groups)
        left = self.total
        while left >= limit:
            group = next(groups)
            left -= group.count
        return group.last_s + WINDOW_S - now_s


class Rates:
    """How many requests each key made in the last minute: a sliding window.

    No 60 s hold more requests of a key than its limit. The window is a row of at most 61 groups, whatever the limit is;
    a group counts until its last request is 60 s old, so that one request may count for up to a second longer than 60 s
    and none for less. What is promised holds: after Retry-After has passed the next request is accepted, unless
    others of the same key came first.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._sweep_s = clock() + WINDOW_S

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, caller: Caller) -> int:
        """Count a request, and return how many more would be accepted now.

        Raises GatewayError(RATE_LIMIT_EXCEEDED), and then counts nothing.
        """
        now_s = self._clock()
        window = self._windows.get(caller.key_id) or self._begin(caller.key_id, now_s)
        if window.due_s <= now_s:
            window.age(now_s)
        limit, total = caller.rate_limit, window.total
        if total >= limit:
            _refuse(window, limit, now_s)
        if now_s - window.began_s >= GROUP_S:
            window.begin_group(now_s)
        group = window.last
        group.last_s = now_s
        group.count += 1
        window.total = total = total + 1
        return limit - total

    def give_back(self, caller: Caller) -> None:
        """Uncount a request that the gateway itself refused later. One that no longer counts changes nothing.

        It is the newest place that goes back, which is the caller's own wherever the refusal came soon.
        """
        window = self._windows.get(caller.key_id)
        if window is not None:
            window.take_away()

    def _begin(self, key_id: str, now_s: float) -> _Window:
        if now_s >= self._sweep_s:
            self._sweep(now_s)
        window = self._windows[key_id] = _Window()
        return window

    def _sweep(self, now_s: float) -> None:
        """Forget the keys that idle. At most once a window, and only when the table is about to grow."""
        self._sweep_s = now_s + WINDOW_S
        for key_id, window in list(self._windows.items()):
            window.age(now_s)
            if not window.groups:
                del self._windows[key_id]


def _refuse(window: _Window, limit: int, now_s: float) -> NoReturn:
    # Rounded to microseconds: what the addition of floats leaves over must not become a second.
    reset_s = round(window.groups[-1].last_s + WINDOW_S - now_s, 6)
    raise GatewayError(
        RATE_LIMIT_EXCEEDED,
        f"This API key is limited to {limit} requests a minute.",
        fields=allowance(limit, 0, reset_s),
        retry_after_s=math.ceil(round(window.wait_s(limit, now_s), 6)),
    )
