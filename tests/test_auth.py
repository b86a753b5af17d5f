"""Who is calling, and whether they are within their rate."""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

import auth
import keyfile
from auth import Caller, Keyring, KeyStore, Rates, allowance, allowance_lines
from errors import INVALID_API_KEY, KEY_SUSPENDED, RATE_LIMIT_EXCEEDED, GatewayError

K = b"sk-plain-0123456789abcdef"
L = b"sk-other-0123456789abcdef"
NOW_S = 1_000_000_000.0


def now() -> float:
    return NOW_S


CHALLENGE = ((b"WWW-Authenticate", b"Bearer"),)


def digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def refusal(call: Callable[[], object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        call()
    return caught.value


# The credential


@pytest.mark.parametrize(
    ("known", "secret"),
    [
        ({}, None),
        ({b"host": [b"x"]}, None),
        ({b"authorization": [b"Bearer " + K]}, K),
        ({b"authorization": [b"bearer " + K]}, K),
        ({b"authorization": [b"BEARER " + K]}, K),
        ({b"authorization": [b"Bearer   " + K]}, K),
        ({b"authorization": [K]}, K),
        ({b"x-api-key": [K]}, K),
        ({b"api-key": [K]}, K),
        ({b"authorization": [b"Bearer " + K], b"x-api-key": [K]}, K),
        ({b"authorization": [K], b"x-api-key": [K], b"api-key": [K]}, K),
        ({b"authorization": [b"Bearer " + b"A" * 16]}, b"A" * 16),
        ({b"authorization": [b"Bearer " + b"z" * 128]}, b"z" * 128),
    ],
)
def test_the_credential_is(known: dict[bytes, list[bytes]], secret: bytes | None) -> None:
    assert auth.credential(known) == secret


def test_pitfall_38_every_client_s_field_is_read() -> None:
    """OpenAI sends Authorization, Anthropic x-api-key, Azure api-key."""
    for name, value in [(b"authorization", b"Bearer " + K), (b"x-api-key", K), (b"api-key", K)]:
        assert auth.credential({name: [value]}) == K


MALFORMED = [
    [b""],
    [b"Bearer"],
    [b"Bearer "],
    [b"Bearer\t" + K],
    [b"Bearer\xa0" + K],
    [b"Bearer\xc2\xa0" + K],
    [b" Bearer " + K],
    [b"Bearer " + K + b" "],
    [b"Bearer " + K + b"\n"],
    [b"BearerX " + K],
    [b"Bearer Bearer " + K],
    [b"Bearer: " + K],
    [b"Basic " + K],
    [b"Basic eDp5"],
    [b"Token " + K],
    [b"Bearer " + K + b", Bearer " + K],
    [b"Bearer " + K + b"," + K],
    [b"Bearer " + K + b"\xe9"],
    [b"Bearer " + K + b"="],
    [b'Bearer "' + K + b'"'],
    [b"Bearer " + b"k" * 15],
    [b"Bearer " + b"k" * 129],
    [b"Bearer " + b"k" * 8000],
    [K, K],
    [b"Bearer " + K, b"Bearer " + L],
    [b"Bearer " + L, b"Bearer " + K],
    [b"Basic eDp5", b"Bearer " + K],
    [b"", b"Bearer " + K],
]


@pytest.mark.parametrize("values", MALFORMED)
@pytest.mark.parametrize("beside", [{}, {b"x-api-key": [K]}], ids=["alone", "beside a good one"])
def test_a_credential_is_refused(values: list[bytes], beside: dict[bytes, list[bytes]]) -> None:
    error = refusal(lambda: auth.credential({b"authorization": values, **beside}))
    assert (error.kind, error.fields, error.message) == (INVALID_API_KEY, CHALLENGE, INVALID_API_KEY.message)


@pytest.mark.parametrize("name", [b"x-api-key", b"api-key"])
@pytest.mark.parametrize("values", [[b"Bearer " + K], [b""], [K, K], [K + b"\xa0"], [K + b"," + K]])
def test_a_field_without_scheme_takes_the_bare_key_only(name: bytes, values: list[bytes]) -> None:
    assert refusal(lambda: auth.credential({name: values})).kind is INVALID_API_KEY


@pytest.mark.parametrize(
    "known",
    [
        {b"authorization": [b"Bearer " + K], b"x-api-key": [L]},
        {b"x-api-key": [K], b"api-key": [L]},
        {b"authorization": [K], b"api-key": [L]},
        {b"authorization": [K], b"x-api-key": [K], b"api-key": [L]},
    ],
)
def test_two_different_credentials_are_refused(known: dict[bytes, list[bytes]]) -> None:
    error = refusal(lambda: auth.credential(known))
    assert (error.kind, error.fields) == (INVALID_API_KEY, CHALLENGE)
    assert error.message == "The request carries two different API keys."


def test_whatever_the_fields_hold_a_credential_is_a_key_or_refused() -> None:
    rng = random.Random(1)
    pieces = [b"Bearer", b" ", b"\t", b",", K, L, b"k", b"\xa0", b"\0", b"=", b"Basic"]
    names = [b"authorization", b"x-api-key", b"api-key"]
    for _ in range(3000):
        known = {
            name: [b"".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(rng.choice([1, 1, 2]))]
            for name in rng.sample(names, rng.randrange(4))
        }
        with contextlib.suppress(GatewayError):
            secret = auth.credential(known)
            assert (secret is None) == (not known)
            assert all(len(values) == 1 and values[0].endswith(secret or b"?") for values in known.values())


# The keyring


def entry(secret: bytes = K, **fields: object) -> keyfile.Entry:
    return keyfile.Entry(**{"key_id": "a", "digest": hashlib.sha256(secret).digest(), **fields})  # type: ignore[arg-type]


def test_the_holder_of_a_key_is_found() -> None:
    ring = Keyring.of(
        [entry(), entry(L, key_id="b", rate_limit=7, role="operator", parallel=2, priority=-1, tokens_per_day=9)], 60
    )
    assert ring.find(digest(K), now) == Caller("a", "infer", 60, None, 0, None)
    assert ring.find(digest(L), now) == Caller("b", "operator", 7, 2, -1, 9)
    assert len(ring) == 2


def test_no_keys_let_nobody_in() -> None:
    for ring in (Keyring({}), Keyring.of([])):
        assert refusal(lambda ring=ring: ring.find(digest(K), now)).kind is INVALID_API_KEY


def test_a_key_expires_at_its_moment() -> None:
    at = datetime.fromtimestamp(NOW_S, timezone.utc)
    ring = Keyring.of([entry(expires_at=at)])
    assert ring.find(digest(K), lambda: NOW_S - 0.001).key_id == "a"
    for late_s in (0.0, 0.001, 1e9):
        assert refusal(lambda late_s=late_s: ring.find(digest(K), lambda: NOW_S + late_s)).kind is INVALID_API_KEY


@pytest.mark.parametrize("text", ["2001-09-09T01:46:40", "2001-09-09T03:46:40+02:00", "2001-09-09T01:46:40Z"])
def test_pitfall_37_an_expiry_with_an_offset_is_compared_in_utc(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        ring = Keyring.of(keyfile.parse(b"a:%s::%s\n" % (K, text.encode())).entries)
        assert ring.find(digest(K), lambda: NOW_S - 1).key_id == "a"
        assert refusal(lambda: ring.find(digest(K), now)).kind is INVALID_API_KEY
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_suspended_key_is_told_so_unless_it_has_expired() -> None:
    suspended = entry(rate_limit=0)
    assert refusal(lambda: Keyring.of([suspended]).find(digest(K), now)).kind is KEY_SUSPENDED
    gone = replace(suspended, expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc))
    assert refusal(lambda: Keyring.of([gone]).find(digest(K), now)).kind is INVALID_API_KEY


def test_every_401_is_the_same() -> None:
    ring = Keyring.of([entry(expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc))])
    errors = [
        refusal(lambda: ring.find(digest(L), now)),
        refusal(lambda: ring.find(digest(K), now)),
        refusal(lambda: auth.credential({b"authorization": [b"Basic eDp5"]})),
        refusal(lambda: auth.credential({b"x-api-key": [b"short"]})),
    ]
    assert {(error.kind.status, error.message, error.fields, error.retry_after_s) for error in errors} == {
        (401, "Missing or invalid API key.", CHALLENGE, None)
    }


def test_no_secret_and_no_id_is_in_any_error() -> None:
    ring = Keyring.of([entry(key_id="alice", rate_limit=0), entry(L, key_id="alice", rate_limit=1)])
    rates = Rates(lambda: 0.0)
    caller = ring.find(digest(L), now)
    rates.take(caller)
    errors = [
        refusal(lambda: ring.find(digest(K), now)),
        refusal(lambda: ring.find(digest(K + b"x"), now)),
        refusal(lambda: rates.take(caller)),
        refusal(lambda: auth.credential({b"authorization": [K], b"x-api-key": [L]})),
    ]
    for error in errors:
        told = repr((error.message, error.fields, error.args))
        assert not any(word in told for word in ("alice", K.decode(), L.decode()))


def test_pitfall_41_memory_holds_digests_only(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    store = KeyStore(path, 60)
    assert store.reload().ok
    held: list[object] = [store]
    for item in held:  # grows while it is walked
        assert K not in repr(item).encode()
        if hasattr(item, "__dict__"):
            held.extend(vars(item).values())
        held.extend(getattr(item, name) for name in getattr(type(item), "__slots__", ()))
        if isinstance(item, dict):
            held.extend(itertools.chain(item.keys(), item.values()))
    assert hashlib.sha256(K).digest() in held


def test_pitfall_41_a_rotation_overlaps_with_each_line_s_own_limit() -> None:
    ring = Keyring.of([entry(rate_limit=1), entry(L, rate_limit=3)])
    old, new = ring.find(digest(K), now), ring.find(digest(L), now)
    rates = Rates(lambda: 0.0)
    assert rates.take(new) == 2
    assert refusal(lambda: rates.take(old)).kind is RATE_LIMIT_EXCEEDED  # one window for both
    assert rates.take(new) == 1


def test_callers_and_keyrings_do_not_change() -> None:
    caller = Keyring.of([entry()]).find(digest(K), now)
    with pytest.raises(FrozenInstanceError):
        caller.role = "operator"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Keyring.of([]).keys = {}  # type: ignore[attr-defined]


def test_the_anonymous_caller_infers_and_is_an_operator_only_as_such() -> None:
    assert (auth.ANONYMOUS.role, auth.ANONYMOUS_OPERATOR.role) == ("infer", "operator")
    assert auth.ANONYMOUS.rate_limit > 0


# The store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(b"a:" + K + b"\n")
    return path


def loaded(path: Path) -> KeyStore:
    store = KeyStore(path, 60)
    assert store.reload() == auth.Reload(True, 1)
    return store


def test_a_store_begins_with_no_keys(path: Path) -> None:
    assert refusal(lambda: KeyStore(path, 60).keyring.find(digest(K), now)).kind is INVALID_API_KEY


def test_a_reload_swaps_the_keyring_whole(path: Path) -> None:
    store = loaded(path)
    before = store.keyring
    path.write_bytes(b"b:" + L + b":5\n")
    assert store.reload() == auth.Reload(True, 1)
    assert store.keyring.find(digest(L), now) == Caller("b", "infer", 5)
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY
    assert before.find(digest(K), now).key_id == "a"  # whoever holds it is not disturbed


def test_a_bad_line_does_not_keep_a_revocation_from_taking_effect(path: Path) -> None:
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    store = KeyStore(path, 60)
    store.reload()
    path.write_bytes(b"a:" + K + b"\nnonsense\n")
    reload = store.reload()
    assert (reload.ok, reload.keys, reload.reason) == (True, 1, "")
    assert reload.complaints[0].startswith("line 2: ")
    assert refusal(lambda: store.keyring.find(digest(L), now)).kind is INVALID_API_KEY


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# nobody today\n"])
def test_an_empty_file_revokes_everything(path: Path, data: bytes) -> None:
    store = loaded(path)
    path.write_bytes(data)
    assert store.reload() == auth.Reload(True, 0)
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (as_folder, "cannot be read: not a regular file"),
        (as_fifo, "cannot be read: not a regular file"),
        (as_loop, "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"b:" + L + b"\na:sk"), "the last line is torn"),
        (lambda path: path.write_bytes(b"a:x\nb:y\n"), "not one key line is valid"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "the file is not UTF-8 text"),
        (lambda path: path.write_bytes(b"\0" * 9), "the file is not text"),
    ],
    ids=["missing", "folder", "fifo", "loop", "torn", "invalid", "binary", "zeros"],
)
def test_pitfall_36_a_keys_file_that_cannot_be_trusted_keeps_the_last_good_keys(
    path: Path, harm: Callable[[Path], object], reason: str
) -> None:
    store = loaded(path)
    harm(path)
    reload = store.reload()
    assert (reload.ok, reload.keys) == (False, 1)
    if reason.startswith("cannot"):
        reason = f"the keys file {path} (AUTH_KEYS_FILE) {reason}"
    assert reload.reason.startswith(reason)
    assert store.keyring.find(digest(K), now).key_id == "a"
    for _ in range(3):
        assert not store.changed()  # one failure is told once


def test_pitfall_36_missing_keys_file_at_boot_lets_nobody_in(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "none", 60)
    assert store.reload().ok is False
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY


def test_a_reload_never_raises(tmp_path: Path) -> None:
    store = KeyStore(Path("\0"), 60)
    assert store.reload() == auth.Reload(False, 0, (), "the keys file \0 (AUTH_KEYS_FILE) cannot be read: ValueError")
    assert not store.changed()


def test_rates_outlast_a_reload(path: Path) -> None:
    path.write_bytes(b"a:" + K + b":1\n")
    store = KeyStore(path, 60)
    store.reload()
    rates = Rates(lambda: 0.0)
    rates.take(store.keyring.find(digest(K), now))
    store.reload()
    assert refusal(lambda: rates.take(store.keyring.find(digest(K), now))).kind is RATE_LIMIT_EXCEEDED


def touch_later(path: Path, seconds: int) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_a_change_is_seen_once_it_has_settled(path: Path) -> None:
    store = loaded(path)
    assert [store.changed(), store.changed()] == [False, False]
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    assert [store.changed(), store.changed(), store.changed()] == [False, True, True]
    store.reload()
    assert [store.changed(), store.changed()] == [False, False]


def test_a_file_that_is_being_written_is_waited_for(path: Path) -> None:
    store = loaded(path)
    for second in range(1, 5):
        touch_later(path, second)
        assert not store.changed()
    assert store.changed()


def test_a_file_that_comes_goes_or_changes_its_inode_has_changed(path: Path) -> None:
    store = loaded(path)
    data = path.read_bytes()
    path.unlink()
    assert [store.changed(), store.changed()] == [False, True]
    store.reload()
    path.write_bytes(data)
    assert [store.changed(), store.changed()] == [False, True]
    assert store.reload().ok
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert [store.changed(), store.changed()] == [False, True]


def test_permissions_that_were_mended_are_a_change(path: Path) -> None:
    store = loaded(path)
    path.chmod(0o640)
    assert [store.changed(), store.changed()] == [False, True]


# The rates


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def caller(rate_limit: int, key_id: str = "a") -> Caller:
    return Caller(key_id, "infer", rate_limit)


def test_the_limit_is_accepted_and_one_more_refused(clock: Clock) -> None:
    rates = Rates(clock)
    assert [rates.take(caller(3)) for _ in range(3)] == [2, 1, 0]
    error = refusal(lambda: rates.take(caller(3)))
    assert (error.kind, error.retry_after_s) == (RATE_LIMIT_EXCEEDED, 60)
    assert error.message == "This API key is limited to 3 requests a minute."
    assert error.fields == allowance(3, 0, 60)
    clock.now_s += 59.999
    refusal(lambda: rates.take(caller(3)))
    clock.now_s += 0.001
    assert rates.take(caller(3)) == 2


def test_keys_have_windows_of_their_own(clock: Clock) -> None:
    rates = Rates(clock)
    rates.take(caller(1, "a"))
    assert rates.take(caller(1, "b")) == 0
    refusal(lambda: rates.take(caller(1, "a")))


def test_a_refused_request_counts_for_nothing(clock: Clock) -> None:
    rates = Rates(clock)
    rates.take(caller(1))
    for _ in range(50):
        clock.now_s += 1
        error = refusal(lambda: rates.take(caller(1)))
    assert error.retry_after_s == 10


def test_requests_leave_the_window_one_after_the_other(clock: Clock) -> None:
    rates = Rates(clock)
    for _ in range(3):
        rates.take(caller(3))
        clock.now_s += 10
    assert refusal(lambda: rates.take(caller(3))).retry_after_s == 30
    clock.now_s += 30
    assert rates.take(caller(3)) == 0
    assert refusal(lambda: rates.take(caller(3))).retry_after_s == 10


def test_a_lower_limit_waits_for_as_many_as_it_must(clock: Clock) -> None:
    """After `set` has lowered a limit, or with a rotation's second line."""
    rates = Rates(clock)
    for _ in range(5):
        rates.take(caller(5))
        clock.now_s += 10
    assert refusal(lambda: rates.take(caller(5))).retry_after_s == 10
    assert refusal(lambda: rates.take(caller(2))).retry_after_s == 40
    assert dict(refusal(lambda: rates.take(caller(2))).fields)[b"x-ratelimit-reset-requests"] == b"50s"


def arrivals(rng: random.Random) -> Sequence[float]:
    kind = rng.choice(["burst", "steady", "random"])
    if kind == "burst":
        return [rng.choice([0.0, 0.0, 0.0, 0.25, 30.0]) for _ in range(200)]
    if kind == "steady":
        return [rng.choice([0.3, 0.6, 0.999, 1.0, 1.001])] * 200
    return [rng.expovariate(rng.choice([0.2, 2, 20])) for _ in range(200)]


def test_no_minute_ever_holds_more_than_the_limit_nor_much_less(clock: Clock) -> None:
    rng = random.Random(7)
    for _ in range(60):
        rates, limit, accepted = Rates(clock), rng.choice([1, 2, 7, 61, 100]), []
        for pause_s in arrivals(rng):
            clock.now_s += pause_s
            # What must be refused, what must be accepted: a request counts for 60 s to 61 s.
            surely = sum(at_s > clock.now_s - 60 for at_s in accepted)
            maybe = sum(at_s > clock.now_s - 61 for at_s in accepted)
            try:
                rates.take(caller(limit))
            except GatewayError:
                assert maybe >= limit
            else:
                assert surely < limit
                accepted.append(clock.now_s)


def test_pitfall_39_retry_after_is_true(clock: Clock) -> None:
    """Who waits as long as they are told is accepted; a second less is too little."""
    rng = random.Random(8)
    waits = []
    for _ in range(60):
        rates, asking = Rates(clock), caller(rng.choice([1, 2, 7, 61, 100]))
        for pause_s in arrivals(rng):
            clock.now_s += pause_s
            wait_s = told_to_wait(rates, asking)
            if wait_s:
                waits.append(wait_s)
                clock.now_s += wait_s - 1
                assert wait_s == 1 or told_to_wait(rates, asking) == 1
                clock.now_s += 1
                rates.take(asking)
    assert len(waits) > 100
    assert (min(waits), max(waits)) == (1, 60)


def told_to_wait(rates: Rates, asking: Caller) -> int:
    """Take a place if there is one; else return what Retry-After says."""
    try:
        rates.take(asking)
    except GatewayError as error:
        return error.retry_after_s or -1
    return 0


def test_pitfall_39_remaining_and_reset_are_true(clock: Clock) -> None:
    """As many as `remaining` says are accepted at once, and after `reset` as many as the limit."""
    rng = random.Random(9)
    for _ in range(60):
        rates, limit = Rates(clock), rng.choice([1, 2, 7, 61, 100])
        for pause_s in arrivals(rng)[: limit - 1]:
            clock.now_s += min(pause_s, 1)
            remaining = rates.take(caller(limit))
        remaining = rates.take(caller(limit)) if limit == 1 else remaining
        for _ in range(remaining):
            rates.take(caller(limit))
        error = refusal(lambda rates=rates, limit=limit: rates.take(caller(limit)))
        assert dict(error.fields)[b"x-ratelimit-remaining-requests"] == b"0"
        clock.now_s += auth.WINDOW_S
        for _ in range(limit):
            rates.take(caller(limit))


def test_pitfall_39_the_fields_are_openai_s() -> None:
    assert allowance(60, 59, 60.0) == (
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1m0s"),
    )
    fields = allowance(60, 59, auth.WINDOW_S)
    assert allowance_lines(60, 59) == b"".join(b"%b: %b\r\n" % field for field in fields)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, b"0ms"),
        (-1.0, b"0ms"),
        (0.0001, b"1ms"),
        (0.35, b"350ms"),
        (0.9999, b"1000ms"),
        (1.0, b"1s"),
        (1.001, b"2s"),
        (59.5, b"1m0s"),
        (60.0, b"1m0s"),
        (360.0, b"6m0s"),
        (61.0, b"1m1s"),
        (7322.0, b"122m2s"),
    ],
)
def test_a_duration_is_written_as(duration_s: float, text: bytes) -> None:
    assert auth.serialize_duration(duration_s) == text


def test_pitfall_39_a_place_that_is_given_back_is_free_again(clock: Clock) -> None:
    rates = Rates(clock)
    rates.take(caller(2))
    rates.take(caller(2))
    rates.give_back(caller(2))
    assert rates.take(caller(2)) == 0
    refusal(lambda: rates.take(caller(2)))
    for _ in range(2):
        rates.give_back(caller(2))
    assert rates.take(caller(2)) == 1


def test_a_place_given_back_does_not_move_the_others(clock: Clock) -> None:
    rates = Rates(clock)
    rates.take(caller(2))
    clock.now_s += 30
    for _ in range(10):
        rates.take(caller(2))
        clock.now_s += 0.5
        rates.give_back(caller(2))
    clock.now_s = 1060.0
    assert rates.take(caller(2)) == 1


def test_what_was_given_back_leaves_no_trace(clock: Clock) -> None:
    rates = Rates(clock)
    for _ in range(3):
        rates.take(caller(9))
    rates.give_back(caller(9))
    clock.now_s += 30
    rates.take(caller(9))
    rates.give_back(caller(9))
    error = refusal(lambda: rates.take(caller(1)))
    assert dict(error.fields)[b"x-ratelimit-reset-requests"] == b"30s"
    clock.now_s += 30
    assert rates.take(caller(9)) == 8


def test_what_no_longer_counts_cannot_be_given_back(clock: Clock) -> None:
    rates = Rates(clock)
    rates.give_back(caller(2))
    rates.take(caller(2))
    clock.now_s += 60
    rates.give_back(caller(2))
    rates.give_back(caller(2))
    assert [rates.take(caller(2)) for _ in range(2)] == [1, 0]
    refusal(lambda: rates.take(caller(2)))


def test_a_window_takes_the_same_memory_however_many_requests_it_counts(clock: Clock) -> None:
    rates = Rates(clock)
    for _ in range(100_000):
        clock.now_s += 0.01
        rates.take(caller(10**6))
    assert len(rates._windows["a"].groups) <= 61


def test_keys_that_idle_are_forgotten_once_a_minute(clock: Clock) -> None:
    rates = Rates(clock)
    for number in range(1000):
        rates.take(caller(5, f"k{number}"))
    clock.now_s += 30
    rates.take(caller(5, "busy"))
    assert len(rates) == 1001
    clock.now_s += 59
    rates.take(caller(5, "new"))
    assert len(rates) == 2
    assert rates.take(caller(5, "busy")) == 3
    clock.now_s += 59.9
    rates.take(caller(5, "newer"))
    assert len(rates) == 3
    clock.now_s += 0.1
    rates.take(caller(5, "newest"))
    assert len(rates) == 2


# What is missing


@pytest.mark.parametrize("missing", ["keyfile", "errors"])
def test_pitfall_44_a_missing_sibling_is_fatal(tmp_path: Path, missing: str) -> None:
    """Never "no keys module, so no keys"."""
    for name in {"auth", "keyfile", "errors"} - {missing}:
        shutil.copy(Path(auth.__file__).with_name(f"{name}.py"), tmp_path)
    command = [sys.executable, "-B", "-c", "import auth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 1
    assert f"No module named '{missing}'" in done.stderr


# The size


def keys(count: int) -> bytes:
    """As many lines as `key_mgmt.py generate` writes them."""
    digests = [hashlib.sha256(b"sk-secret-%020d" % number).hexdigest() for number in range(count)]
    rest = "1000000:2096-12-31T23:59:59Z parallel=2"
    return "".join(f"key{number}:sha256${digest}:{rest}\n" for number, digest in enumerate(digests)).encode()


def test_ten_thousand_keys_are_found_by_the_same_one_lookup(path: Path) -> None:
    path.write_bytes(keys(10_000))
    store = KeyStore(path, 60)
    assert store.reload() == auth.Reload(True, 10_000)
    assert store.keyring.find(digest(b"sk-secret-%020d" % 9_999), now).key_id == "key9999"
    assert refusal(lambda: store.keyring.find(digest(b"sk-secret-%020d" % 10_000), now)).kind is INVALID_API_KEY
