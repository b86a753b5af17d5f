"""key_mgmt.py: most tests call its main(); those about streams, limits and permissions run it as a process."""

import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import auth
import key_mgmt
import keyfile
from accounting import ledger
from config import converters
from config.loader import load_config
from config.settings import ConfigError
from support.faults import Fault, environment, make_faults
from support.paths import SCRIPTS
from support.together import ENVIRON, aside

MORE_LIMITS = ["--tokens-per-minute", "8", "--tokens-per-month", "10", "--max-tokens", "5"]
OLD = "sk-plain-0123456789abcdef"
PAST, FUTURE = "2020-01-01T00:00:00Z", "2096-12-31T23:59:59Z"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The keys file of the test. It does not exist yet."""
    for name in ("DATA_DIR", "USAGE_FILE", "GPU_COST_PER_HOUR", "API_KEYS", "API_KEYS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AUTH_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "keys"


class Response:
    """The exit status and the output of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> object:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Response]:
    def call(*argv: str) -> Response:
        status = key_mgmt.main(list(argv))
        return Response(status, *capfd.readouterr())

    return call


def spawn(*argv: str, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "key_mgmt.py"), *argv]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, text=True, check=False, **{"stderr": subprocess.PIPE, "env": buffered, **how})  # type: ignore[call-overload, no-any-return]


def entries(path: Path) -> list[keyfile.Entry]:
    parsed = keyfile.parse(path.read_bytes())
    assert (parsed.complaints, parsed.error) == ((), "")
    return list(parsed.entries)


def entry_of(secret: str, path: Path) -> keyfile.Entry:
    return next(entry for entry in entries(path) if entry.digest == keyfile.parse_secret(secret.strip()))


def is_in(at: datetime | None, expected: timedelta) -> bool:
    assert at is not None
    return abs(at - datetime.now(timezone.utc) - expected) < timedelta(minutes=1)


# generate


def test_generate_prints_the_key_and_stores_its_digest(path: Path, run: Callable[..., Response]) -> None:
    answer = run("generate", "--name", "alice")
    assert (answer.status, answer.err) == (0, f"key_mgmt: added alice to {path}; the key is shown only once\n")
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}\n", answer.out)
    assert entry_of(answer.out, path) == keyfile.Entry("alice", keyfile.parse_secret(answer.out.strip()))
    assert answer.out.strip() not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_generate_accepts_every_limit(path: Path, run: Callable[..., Response]) -> None:
    limits = ["--rate-limit", "7", "--expires", FUTURE, "--role", "operator", "--parallel", "2", "--priority", "-3"]
    limits += ["--tokens-per-day", "9", *MORE_LIMITS, "--models", "chat-*,embed", "--from", "10.0.0.0/8,::1"]
    answer = run("generate", "--name", "ops", *limits, "--json")
    assert answer.json == {
        "key_id": "ops",
        "state": "active",
        "rate_limit": 7,
        "expires_at": FUTURE,
        "role": "operator",
        "parallel": 2,
        "priority": -3,
        "tokens_per_day": 9,
        "tokens_per_minute": 8,
        "tokens_per_month": 10,
        "max_tokens": 5,
        "models": "chat-*,embed",
        "from": "10.0.0.0/8,::1",
        "api_key": answer.json["api_key"],  # type: ignore[index]
    }
    assert path.read_text() == (
        f"ops:sha256${entries(path)[0].digest.hex()}:7:{FUTURE} role=operator parallel=2 priority=-3 tokens_per_day=9"
        " tokens_per_minute=8 tokens_per_month=10 max_tokens=5 models=chat-*,embed from=10.0.0.0/8,::1\n"
    )


def test_generate_plain_stores_the_key_itself(path: Path, run: Callable[..., Response]) -> None:
    answer = run("generate", "--name", "alice", "--plain")
    assert path.read_text() == f"alice:{answer.out}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30d", timedelta(30)), ("24h", timedelta(1)), ("60m", timedelta(hours=1)), ("99999d", timedelta(99999))],
)
def test_generate_accepts_an_expiration_relative_to_now(
    path: Path, run: Callable[..., Response], text: str, expected: timedelta
) -> None:
    assert run("generate", "--name", "alice", "--expires", text).status == 0
    assert is_in(entries(path)[0].expires_at, expected)


def test_generate_refuses_a_name_that_exists(path: Path, run: Callable[..., Response]) -> None:
    run("generate", "--name", "alice")
    before = path.read_bytes()
    answer = run("generate", "--name", "alice")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith("key_mgmt: error: alice already has a key: use rotate")
    assert path.read_bytes() == before


def test_generate_creates_the_folder_but_not_its_parents(path: Path, run: Callable[..., Response]) -> None:
    assert run("generate", "--name", "alice", "--file", "new/keys").status == 0
    assert stat.S_IMODE(os.stat("new").st_mode) == 0o700
    answer = run("generate", "--name", "alice", "--file", "a/b/keys")
    assert (answer.status, answer.err) == (1, "key_mgmt: error: there is no folder a, which a/b would be in\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of a file")
def test_a_file_and_a_folder_created_by_root_get_the_owner_of_the_parent_folder(
    path: Path, run: Callable[..., Response]
) -> None:
    os.chown(path.parent, 1234, 1235)
    run("generate", "--name", "alice", "--file", "data/keys")
    for created in (path.parent / "data", path.parent / "data" / "keys"):
        assert (created.stat().st_uid, created.stat().st_gid) == (1234, 1235)


# list


QUOTAS = ["tokens_per_day", "tokens_per_minute", "tokens_per_month", "max_tokens"]
OPTION_COLUMNS = ["role", "parallel", "priority", *QUOTAS, "models", "from"]
NO_QUOTAS = ["-"] * len(QUOTAS)


def test_list_shows_limits_and_never_a_key(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}:0\nb:{OLD}2:5:{PAST} role=operator\nc:{OLD}3::{FUTURE} parallel=2 models=e* from=::1\n")
    run("generate", "--name", "d")
    answer = run("list")
    header, *rows = [line.split() for line in answer.out.splitlines()]
    different = set(header) ^ {"key_id", "state", "rate_limit", "expires_at", *OPTION_COLUMNS, "stored"}
    assert not different, f"`list` of scripts/key_mgmt.py and OPTION_COLUMNS in this file differ in {different}"
    assert rows == [
        ["a", "suspended", "0", "-", "infer", "-", "0", *NO_QUOTAS, "-", "-", "plain"],
        ["b", "expired", "5", PAST, "operator", "-", "0", *NO_QUOTAS, "-", "-", "plain"],
        ["c", "active", "default", FUTURE, "infer", "2", "0", *NO_QUOTAS, "e*", "::1", "plain"],
        ["d", "active", "default", "-", "infer", "-", "0", *NO_QUOTAS, "-", "-", "hashed"],
    ]
    shown = run("list", "--json")
    assert [(record["key_id"], record["state"], record["stored"]) for record in shown.json] == [  # type: ignore[attr-defined]
        ("a", "suspended", "plain"),
        ("b", "expired", "plain"),
        ("c", "active", "plain"),
        ("d", "active", "hashed"),
    ]
    for entry in entries(path):
        assert entry.digest.hex() not in answer.out + shown.out
    assert OLD not in answer.out + shown.out


def test_list_of_an_empty_file_is_empty(path: Path, run: Callable[..., Response]) -> None:
    path.write_text("# no keys\n")
    assert (run("list").out, run("list", "--json").json) == ("", [])


def test_an_invalid_line_among_valid_ones_is_a_warning(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}\nsecret-in-the-wrong-place\n")
    for argv in (["list"], ["set", "--name", "a", "--rate-limit", "1"], ["generate", "--name", "b"]):
        answer = run(*argv)
        assert answer.status == 0
        assert answer.err.startswith("key_mgmt: warning: line 2: a line is ")
        assert "secret-in" not in answer.err
        assert "secret-in-the-wrong-place\n" in path.read_text()


# remove, set


def test_remove_deletes_every_line_of_a_name(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"# one\na:{OLD}\nb:{OLD}2\n# two\na:{OLD}3\n")
    answer = run("remove", "--name", "a")
    assert (answer.status, answer.out, answer.err) == (0, "", "key_mgmt: removed a\n")
    assert path.read_text() == f"# one\nb:{OLD}2\n# two\n"
    assert run("remove", "--name", "b", "--json").json == {"key_id": "b", "removed": True}


def test_a_name_that_does_not_exist_is_an_error(path: Path, run: Callable[..., Response]) -> None:
    path.write_text("# no keys\n")
    for argv in (["remove"], ["rotate"], ["set", "--priority", "1"]):
        answer = run(*argv, "--name", "a")
        assert (answer.status, answer.out, answer.err) == (
            1,
            "",
            f"key_mgmt: error: there is no key named a in {path}\n",
        )


def test_a_line_that_is_not_valid_is_named_if_its_name_is_meant(path: Path, run: Callable[..., Response]) -> None:
    text = f"b:{OLD}2\na:{OLD}:120:30d\n"
    path.write_text(text)
    answer = run("set", "--name", "a", "--expires", "30d")
    assert answer.status == 1
    complaint = "is not valid; edit line 2: an expiration is like"
    assert answer.err.startswith(f"key_mgmt: error: {path} has that name in a line that {complaint}")
    assert path.read_text() == text


def test_set_changes_limits_and_not_the_key(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"# head\na:{OLD}:1:{FUTURE} parallel=2 # no comment\nb:{OLD}2:1:{FUTURE} parallel=2\n")
    answer = run("set", "--name", "b", "--rate-limit", "0", "--role", "operator")
    assert answer.err.endswith("key_mgmt: changed b (now suspended)\n")
    assert path.read_text().endswith(f"\nb:{OLD}2:0:{FUTURE} role=operator parallel=2\n")
    clear = ["--rate-limit", "default", "--expires", "never", "--parallel", "none", "--tokens-per-day", "none"]
    answer = run("set", "--name", "b", *clear, "--role", "infer", "--json")
    assert answer.json[0]["rate_limit"] is None  # type: ignore[index]
    assert path.read_text().endswith(f"\nb:{OLD}2\n")


def test_set_can_expire_a_key_at_once(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}\n")
    assert run("set", "--name", "a", "--expires", PAST).err == "key_mgmt: changed a (now expired)\n"
    assert path.read_text() == f"a:{OLD}::{PAST}\n"


def test_set_lets_an_old_key_expire_earlier_but_never_later(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}::2030-01-01\na:{OLD}2\n")
    run("set", "--name", "a", "--expires", FUTURE, "--rate-limit", "5")
    assert path.read_text() == f"a:{OLD}:5:2030-01-01T00:00:00Z\na:{OLD}2:5:{FUTURE}\n"
    run("set", "--name", "a", "--expires", "never")
    assert path.read_text() == f"a:{OLD}:5:2030-01-01T00:00:00Z\na:{OLD}2:5\n"
    run("set", "--name", "a", "--expires", PAST)
    assert path.read_text() == f"a:{OLD}:5:{PAST}\na:{OLD}2:5:{PAST}\n"


# rotate


def test_rotate_replaces_the_key_in_its_line(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"# a\na:{OLD}:7 role=operator\n# b\nb:{OLD}2\n")
    secret = run("rotate", "--name", "a").out.strip()
    assert path.read_text() == f"# a\na:sha256${keyfile.parse_secret(secret).hex()}:7 role=operator\n# b\nb:{OLD}2\n"


def test_rotate_with_overlap_keeps_the_old_key_for_that_time(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}:7:{FUTURE}\nb:{OLD}2\n")
    answer = run("rotate", "--name", "a", "--overlap", "24h", "--json")
    old, new, other = entries(path)
    assert answer.json["api_key"]  # type: ignore[index]
    assert (old.digest, old.rate_limit) == (keyfile.parse_secret(OLD), 7)
    assert is_in(old.expires_at, timedelta(1))
    assert (new.rate_limit, new.expires_at) == (7, keyfile.parse_expiration(FUTURE))
    assert other.key_id == "b"
    ring = auth.Keyring.of(entries(path))
    now_s = datetime.now(timezone.utc).timestamp()
    for secret in (OLD, answer.json["api_key"]):  # type: ignore[index]
        assert ring.find(hashlib.sha256(secret.encode()).digest(), lambda at_s=now_s: at_s).key_id == "a"


def test_rotate_says_until_when_the_old_key_works(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}\n")
    said = run("rotate", "--name", "a", "--overlap", "24h").err
    until = re.search(r"rotated a, whose old key works until (\S+) at most, in ", said)
    assert until is not None
    assert is_in(keyfile.parse_expiration(until[1]), timedelta(hours=24))


def test_remove_says_that_a_key_of_the_environment_works_again(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(f"a:{OLD}\nb:{OLD}2\n")
    monkeypatch.setenv("API_KEYS", f"b:{OLD}3")
    assert run("remove", "--name", "a").err == "key_mgmt: removed a\n"
    warning = "key_mgmt: warning: API_KEYS has a key of b, which is in force now: remove it there\n"
    assert run("remove", "--name", "b").err == "key_mgmt: removed b\n" + warning


def test_remove_removes_whatever_is_wrong_with_the_keys_of_the_environment(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(f"a:{OLD}\n")
    monkeypatch.setenv("API_KEYS_FILE", str(path.with_name("missing")))
    answer = run("remove", "--name", "a")
    assert (answer.status, answer.err, path.read_text()) == (0, "key_mgmt: removed a\n", "")


def test_a_second_rotation_does_not_prolong_the_first_overlap(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}\n")
    run("rotate", "--name", "a", "--overlap", "60m")
    run("rotate", "--name", "a", "--overlap", "24h", "--plain")
    first, second, third = entries(path)
    assert is_in(first.expires_at, timedelta(hours=1))
    assert is_in(second.expires_at, timedelta(1))
    assert third.expires_at is None
    run("rotate", "--name", "a")
    assert len(entries(path)) == 1


def test_rotate_of_an_expired_key_needs_an_expiration(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}::{PAST}\n")
    answer = run("rotate", "--name", "a")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "key_mgmt: error: a has expired: give the new key an expiration with --expires\n"
    assert run("rotate", "--name", "a", "--expires", "30d").status == 0
    assert is_in(entries(path)[0].expires_at, timedelta(30))


def test_the_expiration_of_a_new_key_is_reported(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"a:{OLD}::{FUTURE}\nb:{OLD}2\n")
    assert run("rotate", "--name", "a").err == (
        f"key_mgmt: rotated a, whose old key has ended, in {path}; the key is shown only once; it expires at {FUTURE}\n"
    )
    assert (
        run("rotate", "--name", "b").err
        == f"key_mgmt: rotated b, whose old key has ended, in {path}; the key is shown only once\n"
    )


# check, hash


def test_check_reports_every_invalid_line(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"# c\na:{OLD}\n")
    answer = run("check")
    assert (answer.status, answer.out, answer.err) == (0, "", f"key_mgmt: {path}: 1 key, 0 complaints\n")
    path.write_text(f"a:{OLD}\nb\nc:{OLD}\nd:{OLD}2:x")
    answer = run("check")
    assert answer.status == 1
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == [
        *["line 2", "line 3", "line 4", "the last line is incomplete"]
    ]
    record = run("check", "--json").json
    assert record == {"ok": False, "keys": 1, "complaints": answer.out.splitlines()}


def test_check_knows_the_keys_in_the_environment(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", f"b:{OLD}2;c:{OLD}3")
    answer = run("check")
    summary = f"key_mgmt: {path}: 0 keys and 2 of API_KEYS, 0 complaints\n"
    assert (answer.status, answer.out, answer.err) == (0, "", summary)
    path.write_text(f"a:{OLD}\nb:{OLD}4\n")
    answer = run("check")
    assert answer.status == 1
    assert answer.out == "API_KEYS: the entry b does not count: the keys file has that name or key\n"
    assert answer.err == f"key_mgmt: {path}: 2 keys and 1 of API_KEYS, 1 complaint\n"
    monkeypatch.setenv("API_KEYS", "b:secret")
    answer = run("check", "--json")
    complaints = ["API_KEYS: line 1: a key is 16 to 128 of A-Z a-z 0-9 - _, or sha256$ and 64 hex digits"]
    complaints += ["API_KEYS: no key line is valid"]
    assert answer.json == {"ok": False, "keys": 2, "complaints": complaints}


def test_check_reads_the_file_of_keys_in_the_environment(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = path.with_name("given")
    monkeypatch.setenv("API_KEYS_FILE", str(given))
    answer = run("check")
    missing = "key_mgmt: error: API_KEYS_FILE: the file cannot be read: No such file or directory\n"
    assert (answer.status, answer.err) == (1, missing)
    given.write_text(f"b:{OLD}2\n")
    assert run("check", "--json").json == {"ok": True, "keys": 1, "complaints": []}
    monkeypatch.setenv("API_KEYS", f"b:{OLD}2")
    answer = run("check")
    assert (answer.status, "contradict each other" in answer.err) == (2, True)


@pytest.fixture
def hash_of(run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Response]:
    """Return what `hash` does with a text on stdin, and arguments."""

    def call(text: str, *argv: str) -> Response:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return run("hash", *argv)

    return call


def test_hash_prints_a_line_to_paste(hash_of: Callable[..., Response]) -> None:
    line = f"sha256${keyfile.parse_secret(OLD).hex()}"
    answer = hash_of(OLD + "\n", "--line")
    assert (answer.status, answer.out) == (0, f"first:{line}\n")
    assert "single quotes" in answer.err
    limits = ["--rate-limit", "5", "--from", "::1", "--role", "operator"]
    answer = hash_of(OLD, "--quiet", "--line", "--name", "bob", *limits)
    assert (answer.out, answer.err) == (f"bob:{line}:5 role=operator from=::1\n", "")
    assert hash_of(OLD, "--line", "--json").json == {"line": f"first:{line}"}


@pytest.mark.parametrize("option", [["--name", "bob"], ["--rate-limit", "5"]])
def test_hash_takes_a_name_and_limits_for_a_line_only(hash_of: Callable[..., Response], option: list[str]) -> None:
    answer = hash_of(OLD, *option)
    assert (answer.status, answer.out) == (2, "")
    assert "give --line" in answer.err


@pytest.mark.parametrize("text", [OLD, OLD + "\n", OLD + "\r\n", f"sha256${keyfile.parse_secret(OLD).hex()}\n"])
def test_hash_reads_the_key_from_stdin(hash_of: Callable[..., Response], text: str) -> None:
    answer = hash_of(text)
    assert (answer.status, answer.out, answer.err) == (0, f"sha256${keyfile.parse_secret(OLD).hex()}\n", "")


def test_hash_as_json() -> None:
    done = spawn("hash", "--json", input=OLD, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == {"api_key": f"sha256${keyfile.parse_secret(OLD).hex()}"}


@pytest.mark.parametrize("text", ["", "\n", "short\n", OLD + "\n" + OLD, OLD + "é", OLD + " ", "k" * 9999])
def test_hash_refuses_an_invalid_key_and_does_not_repeat_it(hash_of: Callable[..., Response], text: str) -> None:
    answer = hash_of(text)
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "key_mgmt: error: a key is 16 to 128 of A-Z a-z 0-9 - _, or sha256$ and 64 hex digits\n"


# Files that are mounted by themselves, and volumes that lack something

MOUNTED_ALONE = """
mount --bind "$1/outside" "$1/keys" && rm "$1/outside" && "$2" -B "$3/key_mgmt.py" remove --name a --file "$1/keys"
"""


def test_a_file_that_was_replaced_outside_of_its_mount_is_reported(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not available")
    for name in ("outside", "keys"):
        (tmp_path / name).write_text("a:sk-plain-0123456789abcdef\n")
    command = ["unshare", "-m", "sh", "-c", MOUNTED_ALONE, "sh", str(tmp_path), sys.executable, str(SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "which still shows the old one: mount its folder, not the file" in done.stderr


def test_a_volume_without_locks_is_a_warning(path: Path, tmp_path: Path) -> None:
    faults = make_faults(tmp_path)
    faults.set(Fault("flock", errno=errno.ENOLCK))
    command = [sys.executable, str(SCRIPTS / "key_mgmt.py"), "generate", "--name", "bob", "--file", str(path)]
    for more, warned in ([], 1), (["--quiet"], 0):
        path.write_text("")
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=True, env=environment(faults))
        assert done.stderr.count("warning: ") == warned
        assert f"{path}: the volume has no file locks" in done.stderr or not warned


# usage


@pytest.fixture
def usage_file(path: Path) -> Path:
    return make_usage_file(path.parent)


def make_usage_file(folder: Path) -> Path:
    """Write a ledger with the usage of two keys today."""
    file = folder / "usage.db"
    book = ledger.Ledger(file, time.time, instance_id="one")
    for key_id in ("alice", "alice", "bob"):
        book.record({key_id: ledger.charge([(ledger.Tokens(10, 2, 5, 100.0, 200.0), "done")])})
    book.close()
    return file


def test_usage_shows_the_usage_of_each_key(
    usage_file: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = run("usage", "--usage-file", str(usage_file), "--csv")
    header, *rows = [line.split(",") for line in answer.out.splitlines()]
    assert header == [
        "key_id",
        "requests",
        "prompt",
        "cached",
        "completion",
        "errors",
        "cancelled",
        "gpu_s",
        "estimated",
    ]
    assert [row[:7] for row in rows] == [
        ["alice", "2", "20", "4", "10", "0", "0"],
        ["bob", "1", "10", "2", "5", "0", "0"],
    ]
    monkeypatch.setenv("USAGE_FILE", str(usage_file))
    by_day = run("usage", "--by", "day", "--since", "7d", "--json").json
    assert [(record["requests"], "key_id" in record) for record in by_day] == [(3, False)]  # type: ignore[attr-defined]
    table = run("usage", "--by", "key-day").out.splitlines()
    assert table[0].split()[:3] == ["day", "key_id", "requests"]
    monkeypatch.delenv("USAGE_FILE")
    monkeypatch.setenv("DATA_DIR", str(usage_file.parent))
    monkeypatch.setenv("GPU_COST_PER_HOUR", "0.5")
    assert run("usage", "--csv").out.splitlines()[0].endswith(",gpu_s,estimated,cost")


def test_usage_of_one_key(usage_file: Path, run: Callable[..., Response]) -> None:
    rows = run("usage", "--usage-file", str(usage_file), "--key", "bob", "--by", "day", "--json").json
    assert [row["requests"] for row in rows] == [1]  # type: ignore[attr-defined]
    assert run("usage", "--usage-file", str(usage_file), "--key", "carol", "--json").json == []


def test_usage_of_a_key_that_has_none_says_so(usage_file: Path, run: Callable[..., Response]) -> None:
    answer = run("usage", "--usage-file", str(usage_file), "--key", "nobody", "--json")
    assert (answer.status, answer.out) == (0, "[]\n")
    assert answer.err == f"key_mgmt: no use of nobody is recorded in {usage_file}\n"


def test_usage_shows_quotas_what_is_left_and_when_they_reset(
    path: Path, usage_file: Path, run: Callable[..., Response]
) -> None:
    path.write_text(f"alice:{OLD} tokens_per_day=100 tokens_per_month=20\nbob:{OLD}2 max_tokens=5\ncarol:{OLD}3\n")
    alice, bob, carol = run("usage", "--usage-file", str(usage_file), "--quotas", "--json").json  # type: ignore[misc]
    assert {name: alice[name] for name in ("tokens_per_day", "day_used", "day_left")} == {
        "tokens_per_day": 100,
        "day_used": 30,
        "day_left": 70,
    }
    assert (alice["month_used"], alice["month_left"], bob["month_left"], bob["max_tokens"]) == (30, 0, None, 5)
    assert (carol["key_id"], carol["day_used"]) == ("carol", 0)
    assert keyfile.parse_expiration(alice["day_ends"]) > datetime.now(timezone.utc)
    assert re.fullmatch(r"20[0-9]{2}-[0-9]{2}-01T00:00:00Z", alice["month_ends"])
    table = run("usage", "--usage-file", str(usage_file), "--quotas", "--key", "bob").out.splitlines()
    assert (len(table), table[1].split()[:2]) == (2, ["bob", "-"])
    usage_file.write_text("no ledger at all")
    unreadable = run("usage", "--usage-file", str(usage_file), "--quotas")
    assert (unreadable.status, unreadable.out) == (1, "")
    assert unreadable.err.startswith(f"key_mgmt: error: {usage_file}: ")


def test_usage_shows_quotas_before_any_use_is_recorded(path: Path, run: Callable[..., Response]) -> None:
    path.write_text(f"alice:{OLD} tokens_per_day=100\n")
    answer = run("usage", "--usage-file", "none", "--quotas", "--json")
    (alice,) = answer.json  # type: ignore[misc]
    assert (alice["tokens_per_day"], alice["day_used"], alice["day_left"]) == (100, 0, 100)
    left = "key_mgmt: none: no gateway has recorded use there yet: the quotas are unused\n"
    assert (answer.status, answer.err) == (0, left)


def test_usage_shows_the_quotas_of_given_keys(
    path: Path, usage_file: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", f"alice:{OLD} tokens_per_day=100;bob:{OLD}2")
    show = ("usage", "--usage-file", str(usage_file), "--quotas", "--json")
    assert [(key["key_id"], key["day_left"]) for key in run(*show).json] == [("alice", 70), ("bob", None)]  # type: ignore[attr-defined]
    path.write_text(f"alice:{OLD} tokens_per_day=50\n")  # the file takes precedence
    assert [(key["key_id"], key["day_left"]) for key in run(*show).json] == [("alice", 20), ("bob", None)]  # type: ignore[attr-defined]
    monkeypatch.delenv("API_KEYS")
    path.unlink()
    assert f"there is no {path}" in run(*show).err


def test_a_period_without_use_is_said_to_be_one(run: Callable[..., Response], usage_file: Path) -> None:
    answer = run("usage", "--usage-file", str(usage_file), "--since", "2099-01-01")
    assert (answer.status, answer.out, answer.err) == (0, "", f"key_mgmt: no use is recorded in {usage_file}\n")


def test_usage_reports_a_missing_or_unreadable_ledger(
    path: Path, run: Callable[..., Response], usage_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("usage", "--usage-file", "none").err == "key_mgmt: error: none: no gateway has recorded use there yet\n"
    usage_file.write_text("no ledger at all")
    answer = run("usage", "--usage-file", str(usage_file))
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith(f"key_mgmt: error: {usage_file}: ")


@pytest.mark.parametrize("since", ["soon", "2026-13-01", "2026-02-30"])
def test_usage_refuses_an_invalid_since(usage_file: Path, run: Callable[..., Response], since: str) -> None:
    answer = run("usage", "--usage-file", str(usage_file), "--since", since)
    assert (answer.status, answer.out) == (2, "")
    assert (
        answer.err == "key_mgmt: error: --since: expected a number of days such as 7d, or a date such as 2026-01-31\n"
    )


@pytest.mark.parametrize("price", ["abc", "nan", "inf", "-1", "1e3", "1000001"])
def test_usage_accepts_the_same_prices_as_the_gateway(
    usage_file: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch, price: str
) -> None:
    monkeypatch.setenv("GPU_COST_PER_HOUR", price)
    answer = run("usage", "--usage-file", str(usage_file))
    assert (answer.status, answer.out) == (2, "")
    with pytest.raises(ConfigError) as refused:
        load_config({"GPU_COST_PER_HOUR": price})
    assert answer.err == f"key_mgmt: error: {refused.value}\n"
    monkeypatch.setenv("GPU_COST_PER_HOUR", "0")
    assert run("usage", "--usage-file", str(usage_file), "--csv").out.splitlines()[1].endswith(",0.0")


def test_an_empty_usage_file_setting_is_an_error(
    usage_file: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(usage_file.parent))
    monkeypatch.setenv("USAGE_FILE", "")
    answer = run("usage")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith("key_mgmt: error: USAGE_FILE is empty")
    assert run("usage", "--usage-file", str(usage_file)).status == 0


@pytest.mark.parametrize("argv", [["usage", "--csv", "--json"], ["--json", "usage", "--csv"]])
def test_usage_refuses_json_with_csv(usage_file: Path, run: Callable[..., Response], argv: list[str]) -> None:
    answer = run(*argv, "--usage-file", str(usage_file))
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "key_mgmt: error: --json and --csv cannot be used together\n"


def test_usage_without_its_modules_names_the_missing_folder(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accounting", None)
    answer = run("usage")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "key_mgmt: error: the command usage needs accounting/ in the folder of key_mgmt.py\n"


def test_usage_without_the_other_folders_is_an_error(tmp_path: Path) -> None:
    for name in ("key_mgmt", "keyfile"):
        shutil.copy(SCRIPTS / f"{name}.py", tmp_path)
    command = [sys.executable, "-B", "key_mgmt.py", "usage"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stderr) == (
        1,
        "key_mgmt: error: the command usage needs accounting/ in the folder of key_mgmt.py\n",
    )


# The default file


def probe(mounted: set[str], writable: set[str]) -> Callable[[str], tuple[bool, bool]]:
    return lambda path: (path in mounted, path in writable)


@pytest.mark.parametrize("mounted", [set(), {"/data"}, {"/workspace", "/data"}, {"/runpod-volume", "/workspace"}])
@pytest.mark.parametrize("writable", [set(), {"/data"}, {"/workspace"}, {"/runpod-volume", "/workspace", "/data"}])
def test_the_default_folder_is_that_of_the_gateway(mounted: set[str], writable: set[str]) -> None:
    """The rule is implemented twice, because key_mgmt.py works without the gateway's modules."""
    folders = probe(mounted, writable)
    assert key_mgmt.data_dir({}, folders) == converters.find_data_dir(folders)
    assert key_mgmt.data_dir({"DATA_DIR": ""}, folders) == converters.find_data_dir(folders)
    assert key_mgmt.data_dir({"DATA_DIR": "/here"}, folders) == "/here"


def test_folders_are_probed_as_by_the_gateway(tmp_path: Path) -> None:
    for folder in ("/", str(tmp_path), "/nowhere"):
        assert key_mgmt.probe_folder(folder) == converters.probe_dir(folder)


def test_an_option_comes_before_a_setting_and_a_setting_before_the_default(
    path: Path, run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(path.parent / "data"))
    run("generate", "--name", "a", "--file", "given")
    run("generate", "--name", "b")
    monkeypatch.delenv("AUTH_KEYS_FILE")
    run("generate", "--name", "c")
    assert [entries(path.parent / name)[0].key_id for name in ("given", "keys", "data/api_keys.txt")] == ["a", "b", "c"]


# The command line


@pytest.mark.parametrize("option", ["--file=other", "--quiet", "--json"])
def test_common_options_may_come_before_or_after_the_command(
    path: Path, run: Callable[..., Response], option: str
) -> None:
    path.write_text(f"a:{OLD}\n")
    path.with_name("other").write_text(f"b:{OLD}\n")
    before, after, without = run(option, "check"), run("check", option), run("check")
    assert (before.out, before.err) == (after.out, after.err)
    assert (before.out, before.err) != (without.out, without.err)


def test_quiet_prints_only_data_and_errors(path: Path, run: Callable[..., Response]) -> None:
    answer = run("generate", "--quiet", "--name", "a")
    assert (answer.err, len(answer.out)) == ("", 47)
    assert run("--quiet", "remove", "--name", "a").err == ""
    assert run("--quiet", "remove", "--name", "a").err != ""


WRONG = [
    [],
    ["frobnicate"],
    ["gen", "--name", "a"],
    ["generate"],
    ["generate", "--nam", "a"],
    ["generate", "--name", ""],
    ["generate", "--name", "a b"],
    ["generate", "--name", "a:b"],
    ["generate", "--name", "-"],
    ["generate", "--name", "\udcff"],
    ["generate", "--name", "a", "--rate-limit", "-1"],
    ["generate", "--name", "a", "--rate-limit", "1.5"],
    ["generate", "--name", "a", "--rate-limit", "5_0"],
    ["generate", "--name", "a", "--rate-limit", ""],
    ["generate", "--name", "a", "--rate-limit", "9" * 5000],
    ["generate", "--name", "a", "--expires", "9999999999d"],
    ["generate", "--name", "a", "--expires", "100000d"],
    ["generate", "--name", "a", "--expires", "-1d"],
    ["generate", "--name", "a", "--expires", "d"],
    ["generate", "--name", "a", "--expires", ""],
    ["generate", "--name", "a", "--expires", "0m"],
    ["generate", "--name", "a", "--expires", "30"],
    ["generate", "--name", "a", "--expires", "1d12h"],
    ["generate", "--name", "a", "--expires", PAST],
    ["generate", "--name", "a", "--expires", "2026-02-30"],
    ["generate", "--name", "a", "--role", "admin"],
    ["generate", "--name", "a", "--parallel", "0"],
    ["generate", "--name", "a", "--tokens-per-day", "0"],
    ["generate", "--name", "a", "--priority", "high"],
    ["rotate", "--name", "a", "--overlap", "forever"],
    ["rotate", "--name", "a", "--expires", PAST],
    ["set", "--name", "a"],
    ["hash", OLD],
    ["list", "--file"],
    ["usage", "--by", "week"],
]


@pytest.mark.parametrize("argv", WRONG, ids=lambda argv: " ".join(argv)[:60].encode("ascii", "replace").decode())
def test_wrong_usage_is_status_2_and_changes_nothing(path: Path, run: Callable[..., Response], argv: list[str]) -> None:
    path.write_text(f"a:{OLD}\n")
    answer = run(*argv)
    assert (answer.status, answer.out) == (2, "")
    assert re.search("^key_mgmt(.py)?[a-z ]*: error: ", answer.err, re.MULTILINE)
    assert path.read_text() == f"a:{OLD}\n"


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (
            "--expires",
            "an expiration is like 2026-12-31, 2026-12-31T23:59:59Z or 2026-12-31T23:59:59+02:00,"
            " or a duration like 30d, 24h or 60m, or never",
        ),
        ("--rate-limit", "the rate limit is a whole number from 0 to 1000000000"),
        ("--name", "a key id is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter, a digit or _"),
    ],
)
def test_an_error_names_the_rule_and_does_not_repeat_the_value(
    path: Path, run: Callable[..., Response], option: str, complaint: str
) -> None:
    answer = run("generate", "--name", "a", option, "!9999999999d")
    assert answer.err.endswith(f"error: argument {option}: {complaint}\n")
    assert "!9999999999d" not in answer.err


@pytest.mark.parametrize("argv", [["list"], ["check"], ["remove", "--name", "a"], ["rotate", "--name", "a"]])
def test_a_missing_file_is_status_1(path: Path, run: Callable[..., Response], argv: list[str]) -> None:
    answer = run(*argv)
    where = "it is the --file, else AUTH_KEYS_FILE, else in DATA_DIR"
    complaint = f"key_mgmt: error: there is no {path}: {where}, and generate makes it\n"
    assert (answer.status, answer.out, answer.err) == (1, "", complaint)
    given = run(*argv, "--file", str(path))
    assert (given.status, given.err) == (1, f"key_mgmt: error: there is no {path}: generate makes it\n")
    assert not path.exists()


@pytest.mark.parametrize("argv", [["list"], ["check"], ["generate", "--name", "a"], ["remove", "--name", "a"]])
def test_a_folder_instead_of_a_file_is_status_1(path: Path, run: Callable[..., Response], argv: list[str]) -> None:
    path.mkdir()
    answer = run(*argv)
    assert (answer.status, answer.out) == (1, "")
    assert re.fullmatch(rf"key_mgmt: error: {path}: (not a regular file|Is a directory)\n", answer.err)
    assert run(*argv, "--file", "").status == 1


@pytest.mark.parametrize("argv", [["list"], ["generate", "--name", "b"], ["set", "--name", "a", "--priority", "1"]])
def test_an_invalid_file_is_status_1(path: Path, run: Callable[..., Response], argv: list[str]) -> None:
    path.write_text(f"a:{OLD}\nb:sha2")
    answer = run(*argv)
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == f"key_mgmt: error: {path}: the last line is incomplete: it has no newline and is invalid\n"
    assert path.read_text() == f"a:{OLD}\nb:sha2"


AS_OTHER_USER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import key_mgmt, locale, shutil  # argparse imports these two later, without permission
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(1235); os.setuid(1234)
sys.exit(key_mgmt.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("argv", [["list"], ["generate", "--name", "b"]])
def test_without_permission_is_status_1(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # only the owner can enter pytest's own folders
        path = Path(folder, "keys")
        path.write_text(f"a:{OLD}\n")
        path.chmod(0)
        os.chmod(folder, 0o755)
        command = [sys.executable, "-c", AS_OTHER_USER, str(SCRIPTS), "--file", str(path), *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"key_mgmt: error: {path}: Permission denied\n"


FULL = "import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); os.execv({0!r}, [{0!r}, *{1!r}])"


def test_a_full_disk_is_status_1(path: Path) -> None:
    path.write_text(f"a:{OLD}\n")
    argv = [str(SCRIPTS / "key_mgmt.py"), "generate", "--name", "b"]
    command = [sys.executable, "-B", "-c", FULL.format(sys.executable, ["-B", *argv])]
    environment = {"AUTH_KEYS_FILE": str(path)}  # without coverage, whose own file would not fit either
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"key_mgmt: error: {path}: File too large\n")
    assert path.read_text() == f"a:{OLD}\n"
    assert os.listdir(path.parent) == ["keys"]


@pytest.mark.parametrize("argv", [["list"], ["check", "--json"]])
def test_a_full_stdout_is_status_1(path: Path, argv: list[str]) -> None:
    path.write_text(f"a:{OLD}\n")
    with open("/dev/full", "w") as full:
        done = spawn(*argv, stdout=full)
    assert (done.returncode, done.stderr) == (1, "key_mgmt: error: stdout: No space left on device\n")


def test_a_key_that_could_not_be_shown_is_reported(path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = spawn("generate", "--name", "a", stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "key_mgmt: error: the new key of a is in the file but could not be shown (No space left on device): "
        "rotate or remove it\n"
    )


def close(number: int) -> Callable[[], None]:
    return lambda: os.close(number)


def test_closed_streams_cause_no_traceback(path: Path) -> None:
    done = spawn("generate", "--name", "a", preexec_fn=close(1))
    assert (done.returncode, done.stderr) == (1, "key_mgmt: error: stdout is closed: the key could not be shown\n")
    assert not path.exists()
    done = spawn("hash", preexec_fn=close(0))
    assert (done.returncode, done.stderr) == (1, "key_mgmt: error: stdin is closed: there is no key to read\n")
    done = spawn("generate", "--name", "a", stdout=subprocess.PIPE, stderr=None, preexec_fn=close(2))
    assert (done.returncode, len(done.stdout)) == (0, 47)
    with open("/dev/full", "w") as full:
        assert spawn("remove", "--name", "a", stderr=full).returncode == 0


class InterruptedStdin:
    """A stdin whose read is interrupted by Ctrl-C."""

    @property
    def buffer(self) -> "InterruptedStdin":
        return self

    def read(self, _count: int) -> bytes:
        raise KeyboardInterrupt


def test_an_interrupt_is_status_1(run: Callable[..., Response], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", InterruptedStdin())
    answer = run("hash")
    assert (answer.status, answer.out, answer.err) == (1, "", "key_mgmt: interrupted\n")


# The help


def examples() -> list[str]:
    text = key_mgmt.HELP.partition("examples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in text.splitlines()]


@aside
def test_every_example_of_the_help_works(tmp_path: Path) -> None:
    """In order, in a folder that contains only the two files (and, for `usage`, the folders that it needs)."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("key_mgmt.py", "keyfile.py"):
        shutil.copy(SCRIPTS / name, alone)
    lines = examples()
    assert {shlex.split(line.partition("key_mgmt.py ")[2], comments=True)[0] for line in lines} >= {"--file", "hash"}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{ENVIRON['PATH']}",
        "AUTH_KEYS_FILE": str(alone / "keys.txt"),
        "USAGE_FILE": str(make_usage_file(tmp_path)),
        "KEY": OLD,
    }
    for line in lines:
        if " usage " in line:
            for name in ("accounting", "config", "core"):
                with suppress(FileExistsError):
                    (alone / name).symlink_to(SCRIPTS / name)
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
        assert ("--json" in shlex.split(line, comments=True)) == done.stdout.startswith(("{", "["))
    assert [entry.key_id for entry in entries(alone / "keys.txt")] == ["ops"]
    assert [entry.key_id for entry in entries(alone / "team.txt")] == ["bob"]


def test_every_command_has_an_example_and_help(run: Callable[..., Response]) -> None:
    text = " ".join(examples())
    assert run("--help").status == 0
    for command in key_mgmt.COMMANDS:
        assert f" {command}" in text
        answer = run(command, "--help")
        assert (answer.status, answer.err) == (0, "")
        for option in (*key_mgmt.COMMANDS[command][1], "--file", "--json", "--quiet"):
            assert option.strip("[]") in answer.out


def test_the_help_of_a_command_keeps_the_names_of_settings(run: Callable[..., Response]) -> None:
    assert "Report errors in the file and in API_KEYS; exit" in " ".join(run("check", "--help").out.split())


def test_every_command_and_option_is_in_the_documentation() -> None:
    text = (SCRIPTS.parent / "docs" / "AUTHENTICATION.md").read_text()
    spans = " ".join(re.findall(r"`[^`\n]+`", text))
    for name in (*key_mgmt.COMMANDS, *key_mgmt.OPTIONS):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", spans), name


# The grammar


LINES: Mapping[str, bool] = {
    f"a:{OLD}": True,
    f"a:{OLD}:5:2026-12-31T23:59:59+02:00 role=operator": True,
    f"a:sha256${'0' * 64}": True,
    f"a:sha256${'0' * 63}": False,
    f"a:{OLD}:5_0": False,
    f"a:{OLD} role=root": False,
    f"é:{OLD}": False,
    "a": False,
}


@pytest.mark.parametrize(("line", "valid"), LINES.items())
def test_the_gateway_and_the_command_line_accept_the_same_lines(
    path: Path, run: Callable[..., Response], line: str, valid: bool
) -> None:
    path.write_text(f"other:{OLD}2\n{line}\n")
    store = auth.KeyStore(path, 60)
    reload, answer = store.reload(), run("check")
    assert (not reload.complaints) == (answer.status == 0) == valid
    assert "".join(complaint + "\n" for complaint in reload.complaints) == answer.out


def test_only_keyfile_parses_lines() -> None:
    for module in (auth, key_mgmt):
        source = Path(module.__file__ or "").read_text()
        assert not re.search(r"""(split|partition)\(["'][:#]|sha256\\\$|fromisoformat""", source)
