"""API keys: the credential of a request, the keys in force, and the rate limit of each key.

A request may carry several secrets, since tools send their own beside ours; the keyring decides which one is a key. A
secret is looked up in an immutable keyring that holds SHA-256 digests only. A lookup is one dict access: it costs
the same for one key and for 10,000, and its timing reveals nothing about any key. A reload builds a new keyring and
replaces one reference. The rate limiter is separate and counts by key id, so its counts survive a reload. Nothing in
this module logs, updates metrics or does network I/O.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import keyfile
from core.addresses import Network, is_within, parse_address
from core.errors import (
    FIELDS_SEARCHED,
    INVALID_API_KEY,
    KEY_SUSPENDED,
    LOADING,
    RATE_LIMIT_EXCEEDED,
    Fields,
    GatewayError,
    Kind,
)
from core.installation import shown
from core.sliding_window import BUCKET_S, WINDOW_S, SlidingWindow, WindowTable

NO_KEY = "-"  # not a valid key id
CHALLENGE: Fields = ((b"WWW-Authenticate", b"Bearer"),)

# RFC 9110 section 11.4 requires one or more spaces after the scheme. Some tools send the key without a scheme. The two
# forms cannot be confused: a key contains no space and is longer than any scheme name.
_AUTHORIZATION = re.compile(rb"(?:[Bb][Ee][Aa][Rr][Ee][Rr] +)?(" + keyfile.SECRET.encode() + rb")").fullmatch
_BARE = re.compile(rb"(" + keyfile.SECRET.encode() + rb")").fullmatch
_FIELDS = ((b"authorization", _AUTHORIZATION), (b"x-api-key", _BARE), (b"api-key", _BARE))


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity and the limits of the key that a request carried. rate_limit is in requests per minute."""

    key_id: str
    role: str
    rate_limit: int
    parallel: int | None = None
    priority: int = 0
    tokens_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_month: int | None = None
    max_tokens: int | None = None  # of one choice
    sources: tuple[Network, ...] = ()  # the networks from which it works; none: from everywhere
    expires_s: float | None = None  # since the epoch
    models: tuple[str, ...] | None = None  # patterns of the models that it may use; None: all
    limits_tokens: bool = field(init=False, compare=False, repr=False)  # one of the four limits on tokens is set

    def __post_init__(self) -> None:
        limits = (self.tokens_per_day, self.tokens_per_minute, self.tokens_per_month, self.max_tokens)
        object.__setattr__(self, "limits_tokens", any(limit is not None for limit in limits))

    @property
    def is_operator(self) -> bool:
        return self.role == "operator"


# With AUTH_ENABLED=false all clients are one caller, so a rate limit would be shared by all of them: there is none.
ANONYMOUS = Caller(NO_KEY, "infer", 10**9)
ANONYMOUS_OPERATOR = Caller(NO_KEY, "operator", 10**9)


# The credential


def unauthorized(detail: str = "") -> GatewayError:
    """The one 401: the same for a key that is missing, malformed, unknown or expired."""
    return GatewayError(INVALID_API_KEY, detail, fields=CHALLENGE)


class KeyRefused(GatewayError):
    """A key that is known, but suspended, or sent from an address that its `from=` does not allow.

    The client sees the one 401 for the latter. `key_id` is for the logs, and so is `address`, which is not allowed, if
    it is known.
    """

    def __init__(self, kind: Kind, key_id: str, address: str = "") -> None:
        super().__init__(kind, fields=CHALLENGE if kind is INVALID_API_KEY else ())
        self.key_id = key_id
        self.address = address


def candidates(known: Mapping[bytes, Sequence[bytes]]) -> tuple[bytes, ...]:
    """Return the different secrets that a request carries: none to three, in the order of `_FIELDS`.

    known maps lower-case field names to their values in the order received. A value that cannot be a key, such as
    another scheme, another tool's token or a list, is no secret: a key in another field counts. A repeated field
    raises GatewayError(INVALID_API_KEY).
    """
    secrets: dict[bytes, None] = {}
    for name, grammar in _FIELDS:
        values = known.get(name, ())
        if len(values) > 1:
            raise unauthorized(f"A field for the API key is repeated. {FIELDS_SEARCHED}")
        match = grammar(values[0]) if values else None
        if match is not None:
            secrets[match[1]] = None
    return tuple(secrets)


# The keyring


class Keyring:
    """The keys in force, by digest. Immutable."""

    __slots__ = ("_callers",)

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = callers

    @classmethod
    def of(cls, entries: Iterable[keyfile.Entry], default_rate: int = 100) -> "Keyring":
        """Build a keyring. default_rate, in requests per minute, is for entries without a rate limit."""
        return cls({entry.digest: _caller(entry, default_rate) for entry in entries})

    def __len__(self) -> int:
        return len(self._callers)

    def __iter__(self) -> Iterator[Caller]:
        """Yield the callers of all keys, those of expired ones included."""
        return iter(self._callers.values())

    def find(self, digest: bytes, clock: Callable[[], float], addresses: Sequence[str] = ()) -> Caller:
        """Return the caller whose secret has this SHA-256 digest. clock returns seconds since the epoch.

        addresses are all that the client's may be: a key with `from=` works only if it allows each of them.

        Raises GatewayError(INVALID_API_KEY) for an unknown or expired key, and KeyRefused.
        """
        caller = self._callers.get(digest)
        if caller is None or (caller.expires_s is not None and caller.expires_s <= clock()):
            _outside(addresses, _NOWHERE)  # it takes as long as for a key that does not work from here
            raise unauthorized()
        if caller.sources and (address := _outside(addresses, caller.sources)) is not None:
            raise KeyRefused(INVALID_API_KEY, caller.key_id, address)
        if caller.rate_limit == 0:
            raise KeyRefused(KEY_SUSPENDED, caller.key_id)
        return caller

    def find_one(self, digests: Sequence[bytes], clock: Callable[[], float], addresses: Sequence[str] = ()) -> Caller:
        """Return the caller of the one key in force among several digests; the others are another system's.

        Raises as `find` does, and GatewayError(INVALID_API_KEY) if two of them are keys that work from these addresses.
        """
        in_force = [digest for digest in digests if self._is_in_force(digest, clock)]
        allowed = [digest for digest in in_force if self._is_allowed(digest, addresses)]
        if len(allowed) > 1:
            raise unauthorized(f"The request carries two different API keys. {FIELDS_SEARCHED}")
        if not in_force:
            raise unauthorized()
        return self.find((allowed or in_force)[0], clock, addresses)

    def _is_in_force(self, digest: bytes, clock: Callable[[], float]) -> bool:
        caller = self._callers.get(digest)
        return caller is not None and (caller.expires_s is None or caller.expires_s > clock())

    def _is_allowed(self, digest: bytes, addresses: Sequence[str]) -> bool:
        sources = self._callers[digest].sources
        return not sources or _outside(addresses, sources) is None


_NOWHERE = keyfile.parse_networks("0.0.0.0,::")


def _outside(addresses: Sequence[str], networks: Sequence[Network]) -> str | None:
    """Return the first address that is in none of the networks; None if each is in one, "" if there is no address."""
    outside = (address for address in addresses if not is_within(parse_address(address), networks))
    return next(outside, None if addresses else "")


class _UnreadKeyring(Keyring):
    """The given keys, until the keys file has been read for the first time: another key may be right."""

    __slots__ = ()

    def find(self, digest: bytes, clock: Callable[[], float], addresses: Sequence[str] = ()) -> Caller:
        with _not_read_yet():
            return super().find(digest, clock, addresses)

    def find_one(self, digests: Sequence[bytes], clock: Callable[[], float], addresses: Sequence[str] = ()) -> Caller:
        with _not_read_yet():
            return super().find_one(digests, clock, addresses)


@contextmanager
def _not_read_yet() -> Iterator[None]:
    """Raise LOADING in place of INVALID_API_KEY."""
    try:
        yield
    except GatewayError as error:
        if error.kind is not INVALID_API_KEY:
            raise
        raise GatewayError(LOADING, "The keys have not been read yet.") from None


def _caller(entry: keyfile.Entry, default_rate: int) -> Caller:
    rate_limit = default_rate if entry.rate_limit is None else entry.rate_limit
    expires_s = None if entry.expires_at is None else entry.expires_at.timestamp()
    limits = (entry.tokens_per_day, entry.tokens_per_minute, entry.tokens_per_month, entry.max_tokens)
    return Caller(
        entry.key_id,
        entry.role,
        rate_limit,
        entry.parallel,
        entry.priority,
        *limits,
        entry.sources,
        expires_s,
        entry.models,
    )


@dataclass(frozen=True)
class Reload:
    """The result of a reload.

    keys is the number of keys now in force. Each complaint concerns one line of the file, or the file's mount. reason
    is why the whole file was rejected, or empty; is_missing, whether that is because there is none.
    """

    ok: bool
    keys: int
    complaints: tuple[str, ...] = ()
    reason: str = ""
    is_missing: bool = False

    @property
    def remedy(self) -> str:
        """What must be done before a request is accepted, if no key is in force."""
        if self.ok or self.is_missing:
            return f"no request is accepted until there is a key: {shown('key_mgmt')} generate --name NAME"
        return "no request is accepted until that is mended"


class KeyStore:
    """The keyring of the keys file and of the given keys (API_KEYS).

    Before the first reload the given keys are in force, and requests with others are refused with 503. All methods read
    the file, so they may block. The gateway calls them off its loop, one at a time.
    """

    def __init__(self, path: Path, default_rate: int, given: tuple[keyfile.Entry, ...] = ()) -> None:
        self.keyring: Keyring = _UnreadKeyring.of(given, default_rate)
        self._path = path
        self._default_rate = default_rate
        self._given = given
        self._file_was_read = False
        self._loaded: keyfile.Stamp | None = None
        self._seen: keyfile.Stamp | None = None

    def reload(self) -> Reload:
        """Read the file and put its keys in force. On failure keep the current keys and return why. Never raises."""
        self._seen = self._loaded = self._stamp()
        try:
            data, detached = keyfile.read(self._path), keyfile.detached(self._path.stat())
        except (OSError, ValueError) as error:
            if not self._needs_no_file(error):
                reason = f"the keys file {self._path} (AUTH_KEYS_FILE) cannot be read: {_reason(error)}"
                return replace(self._keep(reason), is_missing=isinstance(error, FileNotFoundError))
            data, detached = b"", ""
        else:
            self._file_was_read = True
        parsed = keyfile.parse(data)
        complaints = (*parsed.complaints, *([detached] if detached else []))
        if parsed.error:
            return self._keep(parsed.error, complaints)
        entries, clashes = keyfile.merge(parsed.entries, self._given)
        self.keyring = Keyring.of(entries, self._default_rate)
        complaints = (*complaints, *[f"API_KEYS: {clash}" for clash in clashes])
        return Reload(True, len(self.keyring), complaints)

    def _needs_no_file(self, error: OSError | ValueError) -> bool:
        """Whether a file that cannot be read counts as empty: there has been none, and there are given keys."""
        return isinstance(error, FileNotFoundError) and bool(self._given) and not self._file_was_read

    def _keep(self, reason: str, complaints: tuple[str, ...] = ()) -> Reload:
        if isinstance(self.keyring, _UnreadKeyring):
            self.keyring = Keyring.of(self._given, self._default_rate)
        return Reload(False, len(self.keyring), complaints, reason)

    def changed(self) -> bool:
        """Return whether the file differs from the one last loaded and has not changed since the previous call.

        Call it twice per interval. At the first call that sees a change, the file may be only half written.
        """
        before, self._seen = self._seen, self._stamp()
        return self._seen != self._loaded and self._seen == before

    def _stamp(self) -> keyfile.Stamp | None:
        try:
            return keyfile.stamp(self._path)
        except (OSError, ValueError):
            return None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.strerror} for user {os.geteuid()}"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


# Rate limits


def serialize_duration(duration_s: float) -> bytes:
    """Format a duration as OpenAI does: 350ms, 1s, 6m0s. Rounded up, so that it is never too short."""
    if duration_s < 1:
        return b"%dms" % math.ceil(max(duration_s, 0) * 1000)
    minutes, seconds = divmod(math.ceil(duration_s), 60)
    return b"%dm%ds" % (minutes, seconds) if minutes else b"%ds" % seconds


def allowance(limit: int, remaining: int, reset_s: float) -> Fields:
    """Return the x-ratelimit fields. reset_s is the time until no request of the key counts any more."""
    return (
        (b"x-ratelimit-limit-requests", b"%d" % limit),
        (b"x-ratelimit-remaining-requests", b"%d" % remaining),
        (b"x-ratelimit-reset-requests", serialize_duration(reset_s)),
    )


def allowance_lines(limit: int, remaining: int) -> bytes:
    """Return the same fields as field lines, for a request that was accepted just now."""
    return _ALLOWANCE % (limit, remaining)


_ALLOWANCE = b"".join(
    b"%b: %b\r\n" % (name, value if b"reset" in name else b"%d") for name, value in allowance(0, 0, WINDOW_S)
)


class RateLimiter:
    """Counts the requests of each key in a sliding window of 60 s and refuses those above the key's limit.

    No period of 60 s contains more accepted requests of a key than its limit. A window has at most 61 buckets, whatever
    the limit. Because a bucket expires with its last request, a request counts for 60 to 61 s, never for less than 60.
    Retry-After is exact: after that time the next request is accepted, unless another of the same key arrived first.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows = WindowTable(clock())

    def __len__(self) -> int:
        return len(self._windows)

    def acquire(self, caller: Caller) -> int:
        """Count a request and return how many more would be accepted now.

        Raises GatewayError(RATE_LIMIT_EXCEEDED) if the caller is at its limit. The request is not counted then.
        """
        # Every request runs this. It makes no call that can be avoided.
        now_s = self._clock()
        window = self._windows.get(caller.key_id) or self._windows.add_key(caller.key_id, now_s)
        if window.next_expiry_s <= now_s:
            window.expire(now_s)
        limit, total = caller.rate_limit, window.total
        if total >= limit:
            _refuse(window, limit, now_s)
        bucket = window.newest
        if now_s - bucket.started_s >= BUCKET_S:
            bucket = window.add_bucket(now_s)
        bucket.last_s = now_s
        bucket.count += 1
        window.total = total = total + 1
        return limit - total

    def used(self, key_id: str) -> tuple[int, float]:
        """Return how many requests of a key count now, and the seconds until none does."""
        return self._windows.used(key_id, self._clock())

    def refund(self, caller: Caller, acquired_s: float) -> None:
        """Uncount a request that the gateway itself refused after `acquire`, unless it has expired.

        `acquired_s` is the clock's time when it was acquired, or just before that. Exactly this request's place is
        returned: a later one counts for longer, and without it the key would exceed its limit when this one expires.
        """
        window = self._windows.get(caller.key_id)
        if window is not None and self._clock() - acquired_s < WINDOW_S:
            window.remove(acquired_s, 1)


def _refuse(window: SlidingWindow, limit: int, now_s: float) -> NoReturn:
    # Rounded to microseconds, so that a floating-point error is not rounded up to a whole second.
    reset_s = round(window.reset_s(now_s), 6)
    raise GatewayError(
        RATE_LIMIT_EXCEEDED,
        f"This API key is limited to {limit} requests per minute.",
        fields=allowance(limit, 0, reset_s),
        retry_after_s=math.ceil(round(window.wait_s(limit, now_s), 6)),
    )
