"""API keys: credentials, keyrings, reloads and rate limits."""

import contextlib
import errno
import gc
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError
from datetime import datetime, timezone
from pathlib import Path

import pytest

import auth
import keyfile
from auth import Caller, KeyRefused, Keyring, KeyStore, RateLimiter, allowance, allowance_lines, unauthorized
from core.errors import FIELDS_SEARCHED, INVALID_API_KEY, KEY_SUSPENDED, LOADING, RATE_LIMIT_EXCEEDED, GatewayError
from support.clock import Clock
from support.faults import Fault, environment, make_faults
from support.paths import SCRIPTS

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


def reachable(root: object) -> Iterator[object]:
    """Yield each object that root refers to, directly or not, except code and classes."""
    queue, seen = [root], {id(root)}
    for item in queue:  # grows while it is iterated
        yield item
        for other in gc.get_referents(item):
            if id(other) not in seen and not isinstance(other, type | types.ModuleType | types.FunctionType):
                seen.add(id(other))
                queue.append(other)


# The credential


@pytest.mark.parametrize(
    ("known", "secrets"),
    [
        ({}, ()),
        ({b"host": [b"x"]}, ()),
        ({b"authorization": [b"Bearer " + K]}, (K,)),
        ({b"authorization": [b"bearer " + K]}, (K,)),
        ({b"authorization": [b"BEARER " + K]}, (K,)),
        ({b"authorization": [b"Bearer   " + K]}, (K,)),
        ({b"authorization": [K]}, (K,)),
        ({b"x-api-key": [K]}, (K,)),
        ({b"api-key": [K]}, (K,)),
        ({b"authorization": [b"Bearer " + K], b"x-api-key": [K]}, (K,)),
        ({b"authorization": [K], b"x-api-key": [K], b"api-key": [K]}, (K,)),
        ({b"authorization": [b"Bearer " + b"A" * 16]}, (b"A" * 16,)),
        ({b"authorization": [b"Bearer " + b"z" * 128]}, (b"z" * 128,)),
        ({b"authorization": [b"Bearer " + K], b"x-api-key": [L]}, (K, L)),
        ({b"x-api-key": [K], b"api-key": [L]}, (K, L)),
        ({b"authorization": [L], b"x-api-key": [K], b"api-key": [L]}, (L, K)),
        ({b"authorization": [K], b"x-api-key": [L], b"api-key": [b"M" * 16]}, (K, L, b"M" * 16)),
    ],
)
def test_the_different_secrets_are_candidates(known: dict[bytes, list[bytes]], secrets: tuple[bytes, ...]) -> None:
    assert auth.candidates(known) == secrets


def test_the_fields_of_all_client_libraries_are_read() -> None:
    """OpenAI sends Authorization, Anthropic x-api-key, Azure api-key."""
    for name, value in [(b"authorization", b"Bearer " + K), (b"x-api-key", K), (b"api-key", K)]:
        assert auth.candidates({name: [value]}) == (K,)


NO_KEY_OF_OURS = [
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer\t" + K,
    b"Bearer\xa0" + K,
    b"Bearer\xc2\xa0" + K,
    b" Bearer " + K,
    b"Bearer " + K + b" ",
    b"Bearer " + K + b"\n",
    b"BearerX " + K,
    b"Bearer Bearer " + K,
    b"Bearer: " + K,
    b"Basic " + K,
    b"Basic eDp5",
    b"Token " + K,
    b"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    b"Bearer " + K + b", Bearer " + K,
    b"Bearer " + K + b"," + K,
    b"Bearer " + K + b"\xe9",
    b"Bearer " + K + b"=",
    b'Bearer "' + K + b'"',
    b"Bearer " + b"k" * 15,
    b"Bearer " + b"k" * 129,
    b"Bearer " + b"k" * 8000,
]


@pytest.mark.parametrize("value", NO_KEY_OF_OURS)
def test_what_cannot_be_a_key_is_no_candidate_and_hides_none(value: bytes) -> None:
    assert auth.candidates({b"authorization": [value]}) == ()
    assert auth.candidates({b"authorization": [value], b"x-api-key": [K]}) == (K,)
    assert auth.candidates({b"authorization": [value], b"api-key": [K]}) == (K,)


REPEATED = [
    [K, K],
    [b"Bearer " + K, b"Bearer " + L],
    [b"Bearer " + L, b"Bearer " + K],
    [b"Basic eDp5", b"Bearer " + K],
    [b"", b"Bearer " + K],
]


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"api-key"])
@pytest.mark.parametrize("values", REPEATED)
@pytest.mark.parametrize("other", [{}, {b"x-api-key": [K]}, {b"api-key": [K]}], ids=["alone", "x-api-key", "api-key"])
def test_a_repeated_field_is_refused(name: bytes, values: list[bytes], other: dict[bytes, list[bytes]]) -> None:
    error = refusal(lambda: auth.candidates({**other, name: values}))
    assert (error.kind, error.fields) == (INVALID_API_KEY, CHALLENGE)
    assert error.message == f"A field for the API key is repeated. {FIELDS_SEARCHED}"


@pytest.mark.parametrize("name", [b"x-api-key", b"api-key"])
@pytest.mark.parametrize("value", [b"Bearer " + K, b"", K + b"\xa0", K + b"," + K])
def test_fields_without_a_scheme_accept_only_the_key_itself(name: bytes, value: bytes) -> None:
    assert auth.candidates({name: [value]}) == ()


def test_random_fields_give_keys_or_a_refusal() -> None:
    rng = random.Random(1)
    pieces = [b"Bearer", b" ", b"\t", b",", K, L, b"k", b"\xa0", b"\0", b"=", b"Basic"]
    names = [b"authorization", b"x-api-key", b"api-key"]
    for _ in range(3000):
        known = {
            name: [b"".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(rng.choice([1, 1, 2]))]
            for name in rng.sample(names, rng.randrange(4))
        }
        with contextlib.suppress(GatewayError):
            secrets = auth.candidates(known)
            assert len(set(secrets)) == len(secrets) <= len(known)
            assert all(len(values) == 1 for values in known.values())
            assert all(any(values[0].endswith(secret) for values in known.values()) for secret in secrets)


# The keyring


def entry(secret: bytes = K, **fields: object) -> keyfile.Entry:
    return keyfile.Entry(**{"key_id": "a", "digest": hashlib.sha256(secret).digest(), **fields})  # type: ignore[arg-type]


def test_a_key_is_found_with_its_limits() -> None:
    ring = Keyring.of(
        [
            entry(),
            entry(
                L,
                key_id="b",
                rate_limit=7,
                role="operator",
                parallel=2,
                priority=-1,
                tokens_per_day=9,
                max_tokens=5,
                models=("m",),
            ),
        ],
        60,
    )
    assert ring.find(digest(K), now) == Caller("a", "infer", 60, None, 0, None)
    assert ring.find(digest(L), now) == Caller("b", "operator", 7, 2, -1, 9, max_tokens=5, models=("m",))
    assert [ring.find(digest(key), now).limits_tokens for key in (K, L)] == [False, True]
    assert len(ring) == 2


def test_an_empty_keyring_refuses_every_key() -> None:
    for ring in (Keyring({}), Keyring.of([])):
        assert refusal(lambda ring=ring: ring.find(digest(K), now)).kind is INVALID_API_KEY


def test_the_key_among_several_secrets_is_found() -> None:
    ring = Keyring.of([entry(), entry(b"N" * 16, key_id="suspended", rate_limit=0)])
    unknown = digest(b"M" * 16)
    for digests in ([digest(K), unknown], [unknown, digest(K)], [unknown, digest(K), digest(L)]):
        assert ring.find_one(digests, now).key_id == "a"
    assert refusal(lambda: ring.find_one([unknown, digest(b"N" * 16)], now)).kind is KEY_SUSPENDED
    error = refusal(lambda: ring.find_one([unknown, digest(L)], now))
    assert (error.kind, error.message) == (INVALID_API_KEY, INVALID_API_KEY.message)


def test_two_different_keys_are_refused() -> None:
    """Even if both are of one id, or one is suspended: which one was meant is not known."""
    ring = Keyring.of([entry(), entry(L, key_id="b"), entry(b"M" * 16), entry(b"N" * 16, key_id="c", rate_limit=0)])
    for other in (L, b"M" * 16, b"N" * 16):
        error = refusal(lambda other=other: ring.find_one([digest(K), digest(other)], now))
        assert (error.kind, error.fields) == (INVALID_API_KEY, CHALLENGE)
        assert error.message == f"The request carries two different API keys. {FIELDS_SEARCHED}"


def test_an_expired_key_hides_no_other() -> None:
    ring = Keyring.of([entry(), entry(L, key_id="b", expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc))])
    assert ring.find_one([digest(L), digest(K)], now).key_id == "a"


def test_a_key_is_valid_until_its_expiration() -> None:
    at = datetime.fromtimestamp(NOW_S, timezone.utc)
    ring = Keyring.of([entry(expires_at=at)])
    assert ring.find(digest(K), lambda: NOW_S - 0.001).key_id == "a"
    for late_s in (0.0, 0.001, 1e9):
        assert refusal(lambda late_s=late_s: ring.find(digest(K), lambda: NOW_S + late_s)).kind is INVALID_API_KEY


@pytest.mark.parametrize("text", ["2001-09-09T01:46:40", "2001-09-09T03:46:40+02:00", "2001-09-09T01:46:40Z"])
def test_an_expiration_with_an_offset_is_compared_in_utc(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        ring = Keyring.of(keyfile.parse(b"a:%s::%s\n" % (K, text.encode())).entries)
        assert ring.find(digest(K), lambda: NOW_S - 1).key_id == "a"
        assert refusal(lambda: ring.find(digest(K), now)).kind is INVALID_API_KEY
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_suspended_key_has_an_error_of_its_own_unless_it_has_expired() -> None:
    suspended = entry(rate_limit=0)
    assert refusal(lambda: Keyring.of([suspended]).find(digest(K), now)).kind is KEY_SUSPENDED
    gone = suspended._replace(expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc))
    assert refusal(lambda: Keyring.of([gone]).find(digest(K), now)).kind is INVALID_API_KEY


def test_a_key_with_networks_works_from_these_alone() -> None:
    ring = Keyring.of([entry(sources=keyfile.parse_networks("10.0.0.0/8,::1")), entry(L, key_id="b")])
    for addresses in (["10.1.2.3"], ["::1"], ["::ffff:10.0.0.1"], ["10.1.2.3", "10.1.2.4"]):
        assert ring.find(digest(K), now, addresses).key_id == "a"
    for addresses in ([], ["11.0.0.1"], ["local"], [""], ["10.1.2.3", "192.0.2.7"]):
        error = refusal(lambda addresses=addresses: ring.find(digest(K), now, addresses))
        assert isinstance(error, KeyRefused)
        assert (error.key_id, error.kind, str(error)) == ("a", INVALID_API_KEY, str(unauthorized()))
        assert error.fields == unauthorized().fields
    assert ring.find(digest(L), now, ["192.0.2.7"]).key_id == "b"


def test_a_suspended_key_is_unknown_from_elsewhere() -> None:
    ring = Keyring.of([entry(rate_limit=0, sources=keyfile.parse_networks("::1"))])
    assert refusal(lambda: ring.find(digest(K), now, ["::1"])).kind is KEY_SUSPENDED
    assert refusal(lambda: ring.find(digest(K), now, ["::2"])).kind is INVALID_API_KEY


def test_among_several_keys_the_one_counts_that_works_from_here() -> None:
    ring = Keyring.of([entry(sources=keyfile.parse_networks("::1")), entry(L, key_id="b")])
    both = [digest(K), digest(L)]
    assert ring.find_one(both, now, ["::2"]).key_id == "b"
    assert "two different" in str(refusal(lambda: ring.find_one(both, now, ["::1"])))
    assert isinstance(refusal(lambda: ring.find_one([digest(K), bytes(32)], now, ["::2"])), KeyRefused)


def test_all_401_errors_are_identical() -> None:
    ring = Keyring.of([entry(expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc))])
    errors = [
        refusal(lambda: ring.find(digest(L), now)),
        refusal(lambda: ring.find(digest(K), now)),
        refusal(lambda: ring.find_one([digest(K), digest(L)], now)),
        auth.unauthorized(),
    ]
    assert {(error.kind.status, error.message, error.fields, error.retry_after_s) for error in errors} == {
        (401, f"Missing or invalid API key. {FIELDS_SEARCHED}", CHALLENGE, None)
    }


def test_errors_contain_no_secret_and_no_key_id() -> None:
    ring = Keyring.of([entry(key_id="alice", rate_limit=0), entry(L, key_id="alice", rate_limit=1)])
    limiter = RateLimiter(lambda: 0.0)
    caller = ring.find(digest(L), now)
    limiter.acquire(caller)
    errors = [
        refusal(lambda: ring.find(digest(K), now)),
        refusal(lambda: ring.find(digest(K + b"x"), now)),
        refusal(lambda: limiter.acquire(caller)),
        refusal(lambda: ring.find_one([digest(K), digest(L)], now)),
        refusal(lambda: auth.candidates({b"authorization": [K, L]})),
    ]
    for error in errors:
        text = repr((error.message, error.fields, error.args))
        assert not any(secret in text for secret in ("alice", K.decode(), L.decode()))


def test_a_key_store_keeps_digests_and_no_secrets(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    store = KeyStore(path, 60)
    assert store.reload().ok
    held = list(reachable(store))
    assert not any(K in repr(item).encode() for item in held)
    assert digest(K) in held


GIVEN = keyfile.parse_list("a:sk-given-0123456789abcdef:5;c:sk-third-0123456789abcdef").entries
GIVEN_A, GIVEN_C = (each.digest for each in GIVEN)


def test_given_keys_are_in_force_without_a_file(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "none", 60, GIVEN)
    assert len(store.keyring) == 2
    assert store.reload() == auth.Reload(True, 2)
    assert store.keyring.find(GIVEN_C, now).key_id == "c"
    assert not store.changed()


def test_given_keys_are_in_force_before_the_file_is_read_and_others_may_be_right(path: Path) -> None:
    given = keyfile.parse_list("a:sk-given-0123456789abcdef:0;c:sk-third-0123456789abcdef").entries
    store = KeyStore(path, 60, given)
    assert store.keyring.find(GIVEN_C, now).key_id == "c"
    assert refusal(lambda: store.keyring.find(GIVEN_A, now)).kind is KEY_SUSPENDED
    assert refusal(lambda: store.keyring.find(digest(L), now)).kind is LOADING


def test_the_file_takes_precedence_over_given_keys(path: Path) -> None:
    store = KeyStore(path, 60, GIVEN)
    clash = "API_KEYS: the entry a does not count: the keys file has that name or key"
    assert store.reload() == auth.Reload(True, 2, (clash,))
    assert store.keyring.find(digest(K), now).key_id == "a"
    assert refusal(lambda: store.keyring.find(GIVEN_A, now)).kind is INVALID_API_KEY
    path.write_bytes(b"x:sk-given-0123456789abcdef\n")
    assert store.reload().complaints == (clash,)
    assert store.keyring.find(GIVEN_A, now).key_id == "x"


def test_a_line_that_file_and_given_keys_share_is_no_clash(path: Path) -> None:
    path.write_bytes(b"a:sk-given-0123456789abcdef:5\n")
    assert KeyStore(path, 60, GIVEN).reload() == auth.Reload(True, 2)


def test_given_keys_stay_through_reloads_and_a_file_that_appears_is_added(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = KeyStore(path, 60, GIVEN)
    assert store.reload().keys == 2
    path.write_bytes(b"b:" + L + b"\n")
    assert not store.changed()
    assert store.changed()
    assert store.reload() == auth.Reload(True, 3)
    path.unlink()
    gone = store.reload()
    assert (gone.ok, gone.keys) == (False, 3)  # what was in force stays: the file may be on a volume that has failed
    path.write_bytes(b"# none\n")
    assert store.reload() == auth.Reload(True, 2)


def test_given_keys_stay_in_force_if_the_file_cannot_be_read(tmp_path: Path) -> None:
    store = KeyStore(tmp_path, 60, GIVEN)
    refused = store.reload()
    assert (refused.ok, refused.keys) == (False, 2)
    assert store.keyring.find(GIVEN_A, now).rate_limit == 5


class Forbidden(type(Path())):  # type: ignore[misc]
    """A file that this user may not read, whoever that is."""

    def __fspath__(self) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_file_that_this_user_may_not_read_is_named_so(path: Path) -> None:
    refused = KeyStore(Forbidden(path), 60).reload()
    assert refused.reason.endswith(f": Permission denied for user {os.geteuid()}")
    assert refused.remedy == "no request is accepted until that is mended"


def test_two_lines_of_one_id_share_a_window_and_keep_their_own_limits() -> None:
    ring = Keyring.of([entry(rate_limit=1), entry(L, rate_limit=3)])
    old, new = ring.find(digest(K), now), ring.find(digest(L), now)
    limiter = RateLimiter(lambda: 0.0)
    assert limiter.acquire(new) == 2
    assert refusal(lambda: limiter.acquire(old)).kind is RATE_LIMIT_EXCEEDED  # one window for both
    assert limiter.acquire(new) == 1


def test_callers_and_keyrings_are_immutable() -> None:
    caller = Keyring.of([entry()]).find(digest(K), now)
    with pytest.raises(FrozenInstanceError):
        caller.role = "operator"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Keyring.of([]).keys = {}  # type: ignore[attr-defined]


def test_the_two_anonymous_callers_differ_in_their_role() -> None:
    assert (auth.ANONYMOUS.role, auth.ANONYMOUS_OPERATOR.role) == ("infer", "operator")
    assert (auth.ANONYMOUS.is_operator, auth.ANONYMOUS_OPERATOR.is_operator) == (False, True)
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


def test_a_store_has_no_keys_before_its_first_reload(path: Path) -> None:
    store = KeyStore(path, 60)
    for find in (lambda: store.keyring.find(digest(K), now), lambda: store.keyring.find_one([digest(K)], now)):
        assert refusal(find).kind is LOADING  # it may be a key
    path.unlink()
    store.reload()
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY


def test_a_reload_replaces_the_whole_keyring(path: Path) -> None:
    store = loaded(path)
    before = store.keyring
    path.write_bytes(b"b:" + L + b":5\n")
    assert store.reload() == auth.Reload(True, 1)
    assert store.keyring.find(digest(L), now) == Caller("b", "infer", 5)
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY
    assert before.find(digest(K), now).key_id == "a"  # the old keyring itself is unchanged


def test_a_revocation_takes_effect_despite_an_invalid_line(path: Path) -> None:
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    store = KeyStore(path, 60)
    store.reload()
    path.write_bytes(b"a:" + K + b"\nnonsense\n")
    reload = store.reload()
    assert (reload.ok, reload.keys, reload.reason) == (True, 1, "")
    assert reload.complaints[0].startswith("line 2: ")
    assert refusal(lambda: store.keyring.find(digest(L), now)).kind is INVALID_API_KEY


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# no keys\n"])
def test_an_empty_file_revokes_all_keys(path: Path, data: bytes) -> None:
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
    ("damage", "reason"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (as_folder, "cannot be read: not a regular file"),
        (as_fifo, "cannot be read: not a regular file"),
        (as_loop, "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"b:" + L + b"\na:sk"), "the last line is incomplete"),
        (lambda path: path.write_bytes(b"a:x\nb:y\n"), "no key line is valid"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "the file is not UTF-8 text"),
        (lambda path: path.write_bytes(b"\0" * 9), "the file is not text"),
    ],
    ids=["missing", "folder", "fifo", "loop", "incomplete", "invalid", "binary", "zeros"],
)
def test_an_invalid_file_leaves_the_last_good_keys_in_force(
    path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    store = loaded(path)
    damage(path)
    reload = store.reload()
    assert (reload.ok, reload.keys) == (False, 1)
    if reason.startswith("cannot"):
        reason = f"the keys file {path} (AUTH_KEYS_FILE) {reason}"
    assert reload.reason.startswith(reason)
    assert store.keyring.find(digest(K), now).key_id == "a"
    for _ in range(3):
        assert not store.changed()  # a failure is reported only once


def test_a_keys_file_missing_at_start_leaves_the_keyring_empty(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "none", 60)
    assert store.reload().ok is False
    assert refusal(lambda: store.keyring.find(digest(K), now)).kind is INVALID_API_KEY


def test_a_reload_never_raises(tmp_path: Path) -> None:
    store = KeyStore(Path("\0"), 60)
    assert store.reload() == auth.Reload(False, 0, (), "the keys file \0 (AUTH_KEYS_FILE) cannot be read: ValueError")
    assert not store.changed()


def test_counts_survive_a_reload(path: Path) -> None:
    path.write_bytes(b"a:" + K + b":1\n")
    store = KeyStore(path, 60)
    store.reload()
    limiter = RateLimiter(lambda: 0.0)
    limiter.acquire(store.keyring.find(digest(K), now))
    store.reload()
    assert refusal(lambda: limiter.acquire(store.keyring.find(digest(K), now))).kind is RATE_LIMIT_EXCEEDED


def touch_later(path: Path, seconds: int) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_a_change_is_reported_at_the_second_call_that_sees_it(path: Path) -> None:
    store = loaded(path)
    assert [store.changed(), store.changed()] == [False, False]
    path.write_bytes(b"a:" + K + b"\nb:" + L + b"\n")
    assert [store.changed(), store.changed(), store.changed()] == [False, True, True]
    store.reload()
    assert [store.changed(), store.changed()] == [False, False]


def test_a_file_that_keeps_changing_is_not_reported(path: Path) -> None:
    store = loaded(path)
    for second in range(1, 5):
        touch_later(path, second)
        assert not store.changed()
    assert store.changed()


def test_a_file_that_appears_disappears_or_is_replaced_has_changed(path: Path) -> None:
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


def test_a_file_that_was_replaced_outside_of_its_mount_is_reported(path: Path) -> None:
    with path.open() as file:
        mounted = Path(f"/proc/self/fd/{file.fileno()}")
        if not mounted.exists():
            pytest.skip("no /proc here")
        store = KeyStore(mounted, 60)
        assert store.reload().complaints == ()
        path.unlink()
        assert [store.changed(), store.changed()] == [False, True]
        (complaint,) = store.reload().complaints
        assert "the file was replaced outside of this mount" in complaint


WITHOUT_INODES = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from auth import KeyStore
path = pathlib.Path(sys.argv[2])
store = KeyStore(path, 60)
assert store.reload().keys == 1
assert [store.changed(), store.changed()] == [False, False]
path.write_text("")
assert [store.changed(), store.changed()] == [False, True]
assert store.reload().keys == 0
"""


def test_a_revocation_is_noticed_on_a_volume_whose_inodes_change(path: Path) -> None:
    faults = make_faults(path.parent)
    faults.set(Fault("stat", wrong=True), Fault("fstat", wrong=True))
    command = [sys.executable, "-c", WITHOUT_INODES, str(SCRIPTS), str(path)]
    subprocess.run(command, env=environment(faults), check=True)


def test_new_permissions_are_a_change(path: Path) -> None:
    store = loaded(path)
    path.chmod(0o640)
    assert [store.changed(), store.changed()] == [False, True]


# Rate limits


@pytest.fixture
def clock() -> Clock:
    return Clock()


def caller(rate_limit: int, key_id: str = "a") -> Caller:
    return Caller(key_id, "infer", rate_limit)


def test_requests_up_to_the_limit_are_accepted_and_one_more_is_refused(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    assert [limiter.acquire(caller(3)) for _ in range(3)] == [2, 1, 0]
    error = refusal(lambda: limiter.acquire(caller(3)))
    assert (error.kind, error.retry_after_s) == (RATE_LIMIT_EXCEEDED, 60)
    assert error.message == "This API key is limited to 3 requests per minute."
    assert error.fields == allowance(3, 0, 60)
    clock.now_s += 59.999
    refusal(lambda: limiter.acquire(caller(3)))
    clock.now_s += 0.001
    assert limiter.acquire(caller(3)) == 2


def test_each_key_id_has_its_own_window(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limiter.acquire(caller(1, "a"))
    assert limiter.acquire(caller(1, "b")) == 0
    refusal(lambda: limiter.acquire(caller(1, "a")))


def test_refused_requests_are_not_counted(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limiter.acquire(caller(1))
    for _ in range(50):
        clock.now_s += 1
        error = refusal(lambda: limiter.acquire(caller(1)))
    assert error.retry_after_s == 10


def test_requests_expire_one_after_the_other(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(3):
        limiter.acquire(caller(3))
        clock.now_s += 10
    assert refusal(lambda: limiter.acquire(caller(3))).retry_after_s == 30
    clock.now_s += 30
    assert limiter.acquire(caller(3)) == 0
    assert refusal(lambda: limiter.acquire(caller(3))).retry_after_s == 10


def test_retry_after_waits_for_enough_requests_to_expire(clock: Clock) -> None:
    """More requests than the limit count after `set` has lowered it, or with the second line of a rotation."""
    limiter = RateLimiter(clock)
    for _ in range(5):
        limiter.acquire(caller(5))
        clock.now_s += 10
    assert refusal(lambda: limiter.acquire(caller(5))).retry_after_s == 10
    assert refusal(lambda: limiter.acquire(caller(2))).retry_after_s == 40
    assert dict(refusal(lambda: limiter.acquire(caller(2))).fields)[b"x-ratelimit-reset-requests"] == b"50s"


def arrivals(rng: random.Random) -> Sequence[float]:
    kind = rng.choice(["burst", "steady", "random"])
    if kind == "burst":
        return [rng.choice([0.0, 0.0, 0.0, 0.25, 30.0]) for _ in range(200)]
    if kind == "steady":
        return [rng.choice([0.3, 0.6, 0.999, 1.0, 1.001])] * 200
    return [rng.expovariate(rng.choice([0.2, 2, 20])) for _ in range(200)]


def test_each_minute_accepts_the_limit_and_no_more(clock: Clock) -> None:
    rng = random.Random(7)
    for _ in range(60):
        limiter, limit, accepted = RateLimiter(clock), rng.choice([1, 2, 7, 61, 100]), []
        for pause_s in arrivals(rng):
            clock.now_s += pause_s
            # A request counts for at least 60 s and at most 61 s.
            at_least = sum(at_s > clock.now_s - 60 for at_s in accepted)
            at_most = sum(at_s > clock.now_s - 61 for at_s in accepted)
            try:
                limiter.acquire(caller(limit))
            except GatewayError:
                assert at_most >= limit
            else:
                assert at_least < limit
                accepted.append(clock.now_s)


def test_retry_after_is_exact(clock: Clock) -> None:
    """A request is accepted after that many seconds, and refused one second earlier."""
    rng = random.Random(8)
    waits = []
    for _ in range(60):
        limiter, key = RateLimiter(clock), caller(rng.choice([1, 2, 7, 61, 100]))
        for pause_s in arrivals(rng):
            clock.now_s += pause_s
            wait_s = retry_after(limiter, key)
            if wait_s:
                waits.append(wait_s)
                clock.now_s += wait_s - 1
                assert wait_s == 1 or retry_after(limiter, key) == 1
                clock.now_s += 1
                limiter.acquire(key)
    assert len(waits) > 100
    assert (min(waits), max(waits)) == (1, 60)


def retry_after(limiter: RateLimiter, key: Caller) -> int:
    """Count a request and return 0, or return the Retry-After of its refusal."""
    try:
        limiter.acquire(key)
    except GatewayError as error:
        return error.retry_after_s or -1
    return 0


def test_remaining_and_reset_are_exact(clock: Clock) -> None:
    """`remaining` requests are accepted at once, and as many as the limit after `reset`."""
    rng = random.Random(9)
    for _ in range(60):
        limiter, limit = RateLimiter(clock), rng.choice([1, 2, 7, 61, 100])
        for pause_s in arrivals(rng)[: limit - 1]:
            clock.now_s += min(pause_s, 1)
            remaining = limiter.acquire(caller(limit))
        remaining = limiter.acquire(caller(limit)) if limit == 1 else remaining
        for _ in range(remaining):
            limiter.acquire(caller(limit))
        error = refusal(lambda limiter=limiter, limit=limit: limiter.acquire(caller(limit)))
        assert dict(error.fields)[b"x-ratelimit-remaining-requests"] == b"0"
        clock.now_s += auth.WINDOW_S
        for _ in range(limit):
            limiter.acquire(caller(limit))


def test_the_fields_are_those_of_openai() -> None:
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
def test_a_duration_is_formatted(duration_s: float, text: bytes) -> None:
    assert auth.serialize_duration(duration_s) == text


def test_a_refunded_request_can_be_made_again(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limiter.acquire(caller(2))
    limiter.acquire(caller(2))
    limiter.refund(caller(2), clock())
    assert limiter.acquire(caller(2)) == 0
    refusal(lambda: limiter.acquire(caller(2)))
    for _ in range(2):
        limiter.refund(caller(2), clock())
    assert limiter.acquire(caller(2)) == 1


def test_a_refund_does_not_prolong_the_other_requests(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limiter.acquire(caller(2))
    clock.now_s += 30
    for _ in range(10):
        acquired_s = clock()
        limiter.acquire(caller(2))
        clock.now_s += 0.5
        limiter.refund(caller(2), acquired_s)
    clock.now_s = 1060.0
    assert limiter.acquire(caller(2)) == 1


def test_a_refunded_request_affects_neither_reset_nor_remaining(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(3):
        limiter.acquire(caller(9))
    limiter.refund(caller(9), clock())
    clock.now_s += 30
    limiter.acquire(caller(9))
    limiter.refund(caller(9), clock())
    error = refusal(lambda: limiter.acquire(caller(1)))
    assert dict(error.fields)[b"x-ratelimit-reset-requests"] == b"30s"
    clock.now_s += 30
    assert limiter.acquire(caller(9)) == 8


def test_refunds_of_uncounted_requests_do_nothing(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limiter.refund(caller(2), clock())
    acquired_s = clock()
    limiter.acquire(caller(2))
    clock.now_s += 60
    limiter.refund(caller(2), acquired_s)
    limiter.refund(caller(2), clock())
    assert [limiter.acquire(caller(2)) for _ in range(2)] == [1, 0]
    refusal(lambda: limiter.acquire(caller(2)))


def test_a_late_refund_returns_no_place_of_another_request(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    early_s = clock()
    for _ in range(5):
        limiter.acquire(caller(10))
    clock.now_s += 61
    for _ in range(10):
        limiter.acquire(caller(10))
    for _ in range(5):
        limiter.refund(caller(10), early_s)
    refusal(lambda: limiter.acquire(caller(10)))


def test_a_refund_returns_the_requests_own_place(clock: Clock) -> None:
    """Without the later one's place two would be accepted at 60 s: three within 30 s."""
    limiter = RateLimiter(clock)
    first_s = clock()
    limiter.acquire(caller(2))
    clock.now_s += 40
    limiter.acquire(caller(2))
    limiter.refund(caller(2), first_s)
    clock.now_s += 20
    assert limiter.acquire(caller(2)) == 0
    refusal(lambda: limiter.acquire(caller(2)))


@pytest.mark.parametrize("seed", range(20))
def test_no_60_s_hold_more_accepted_requests_than_the_limit_whatever_is_refunded(clock: Clock, seed: int) -> None:
    chance = random.Random(seed)
    limiter, limit = RateLimiter(clock), 7
    pending: list[float] = []
    accepted: list[float] = []
    for _ in range(3000):
        clock.now_s += chance.choice((0, 0.01, 0.3, 1, 9))
        if pending and chance.random() < 0.3:
            limiter.refund(caller(limit), pending.pop(chance.randrange(len(pending))))
        try:
            limiter.acquire(caller(limit))
        except GatewayError:
            continue
        (pending if chance.random() < 0.5 else accepted).append(clock())
    kept = sorted(accepted + pending)
    assert all(later - first >= 60 for first, later in zip(kept, kept[limit:], strict=False))
    assert len(accepted) > 200


def test_memory_is_the_same_for_any_number_of_requests(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(61):
        clock.now_s += 1
        limiter.acquire(caller(10**6))
    objects = sum(1 for _ in reachable(limiter))
    for _ in range(100_000):
        clock.now_s += 0.01
        limiter.acquire(caller(10**6))
    assert sum(1 for _ in reachable(limiter)) < 2 * objects


def test_windows_of_idle_keys_are_removed_once_a_minute(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for number in range(1000):
        limiter.acquire(caller(5, f"k{number}"))
    clock.now_s += 30
    limiter.acquire(caller(5, "busy"))
    assert len(limiter) == 1001
    clock.now_s += 59
    limiter.acquire(caller(5, "new"))
    assert len(limiter) == 2
    assert limiter.acquire(caller(5, "busy")) == 3
    clock.now_s += 59.9
    limiter.acquire(caller(5, "newer"))
    assert len(limiter) == 3
    clock.now_s += 0.1
    limiter.acquire(caller(5, "newest"))
    assert len(limiter) == 2


# Missing modules


@pytest.mark.parametrize("missing", ["keyfile", "core"])
def test_a_missing_module_is_fatal(tmp_path: Path, missing: str) -> None:
    """The gateway must not start without authentication."""
    for name in {"auth.py", "keyfile.py", "core"} - {missing, f"{missing}.py"}:
        copy = shutil.copytree if name == "core" else shutil.copy
        copy(SCRIPTS / name, tmp_path / name)
    command = [sys.executable, "-B", "-c", "import auth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 1
    assert f"No module named '{missing}'" in done.stderr


# Many keys


def keys(count: int) -> bytes:
    """Return count lines in the form that `key_mgmt.py generate` writes."""
    digests = [hashlib.sha256(b"sk-secret-%020d" % number).hexdigest() for number in range(count)]
    rest = "1000000:2096-12-31T23:59:59Z parallel=2"
    return "".join(f"key{number}:sha256${digest}:{rest}\n" for number, digest in enumerate(digests)).encode()


def test_ten_thousand_keys_are_loaded_and_found(path: Path) -> None:
    path.write_bytes(keys(10_000))
    store = KeyStore(path, 60)
    assert store.reload() == auth.Reload(True, 10_000)
    assert store.keyring.find(digest(b"sk-secret-%020d" % 9_999), now).key_id == "key9999"
    assert refusal(lambda: store.keyring.find(digest(b"sk-secret-%020d" % 10_000), now)).kind is INVALID_API_KEY
