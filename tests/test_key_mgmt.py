"""The command line of the keys file: called as a function, and as a process where the process is the point."""

import hashlib
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
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import accept
import auth
import config
import key_mgmt
import keyfile
import usage

SCRIPTS = Path(key_mgmt.__file__).parent
OLD = "sk-plain-0123456789abcdef"
PAST, FUTURE = "2020-01-01T00:00:00Z", "2096-12-31T23:59:59Z"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The keys file of the test, which is not there yet."""
    for name in ("DATA_DIR", "USAGE_FILE", "GPU_COST_PER_HOUR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AUTH_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "keys"


class Answer:
    """What a command did: its status, what it printed and what it said."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> object:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def call(*words: str) -> Answer:
        status = key_mgmt.main(list(words))
        return Answer(status, *capfd.readouterr())

    return call


def spawn(*words: str, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "key_mgmt.py"), *words]
    return subprocess.run(command, text=True, check=False, **{"stderr": subprocess.PIPE, **how})  # type: ignore[call-overload, no-any-return]


def entries(path: Path) -> list[keyfile.Entry]:
    parsed = keyfile.parse(path.read_bytes())
    assert (parsed.complaints, parsed.distrust) == ((), "")
    return list(parsed.entries)


def entry_of(secret: str, path: Path) -> keyfile.Entry:
    return next(entry for entry in entries(path) if entry.digest == keyfile.parse_secret(secret.strip()))


def in_time(at: datetime | None, expected: timedelta) -> bool:
    assert at is not None
    return abs(at - datetime.now(timezone.utc) - expected) < timedelta(minutes=1)


# generate


def test_generate_shows_the_key_once_and_keeps_its_hash(path: Path, run: Callable[..., Answer]) -> None:
    answer = run("generate", "--name", "alice")
    assert (answer.status, answer.err) == (0, f"key_mgmt: alice is in {path}; its key is shown this once\n")
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}\n", answer.out)
    assert entry_of(answer.out, path) == keyfile.Entry("alice", keyfile.parse_secret(answer.out.strip()))
    assert answer.out.strip() not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_generate_takes_every_limit(path: Path, run: Callable[..., Answer]) -> None:
    limits = ["--rate-limit", "7", "--expires", FUTURE, "--role", "operator", "--parallel", "2", "--priority", "-3"]
    answer = run("generate", "--name", "ops", *limits, "--tokens-per-day", "9", "--json")
    assert answer.json == {
        "key_id": "ops",
        "state": "active",
        "rate_limit": 7,
        "expires_at": FUTURE,
        "role": "operator",
        "parallel": 2,
        "priority": -3,
        "tokens_per_day": 9,
        "api_key": answer.json["api_key"],  # type: ignore[index]
    }
    assert path.read_text() == (
        f"ops:sha256${entries(path)[0].digest.hex()}:7:{FUTURE} role=operator parallel=2 priority=-3 tokens_per_day=9\n"
    )


def test_generate_plain_lets_the_file_hold_the_key(path: Path, run: Callable[..., Answer]) -> None:
    answer = run("generate", "--name", "alice", "--plain")
    assert path.read_text() == f"alice:{answer.out}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30d", timedelta(30)), ("24h", timedelta(1)), ("60m", timedelta(hours=1)), ("99999d", timedelta(99999))],
)
def test_generate_expires_after_a_time(path: Path, run: Callable[..., Answer], text: str, expected: timedelta) -> None:
    assert run("generate", "--name", "alice", "--expires", text).status == 0
    assert in_time(entries(path)[0].expires_at, expected)


def test_generate_refuses_a_name_that_is_taken(path: Path, run: Callable[..., Answer]) -> None:
    run("generate", "--name", "alice")
    before = path.read_bytes()
    answer = run("generate", "--name", "alice")
    assert (answer.status, answer.out) == (1, "")
    assert "alice has a key: rotate" in answer.err
    assert path.read_bytes() == before


def test_generate_makes_the_folder_but_not_a_path(path: Path, run: Callable[..., Answer]) -> None:
    assert run("generate", "--name", "alice", "--file", "new/keys").status == 0
    assert stat.S_IMODE(os.stat("new").st_mode) == 0o700
    answer = run("generate", "--name", "alice", "--file", "a/b/keys")
    assert (answer.status, answer.err) == (1, "key_mgmt: a/b/keys: No such file or directory\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may give files away")
def test_pitfall_42_what_root_makes_belongs_to_whom_the_folder_belongs(path: Path, run: Callable[..., Answer]) -> None:
    os.chown(path.parent, 1234, 1235)
    run("generate", "--name", "alice", "--file", "data/keys")
    for made in (path.parent / "data", path.parent / "data" / "keys"):
        assert (made.stat().st_uid, made.stat().st_gid) == (1234, 1235)


# list


def test_list_shows_what_each_may_do_and_never_a_key(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}:0\nb:{OLD}2:5:{PAST} role=operator\nc:{OLD}3::{FUTURE} parallel=2\n")
    run("generate", "--name", "d")
    answer = run("list")
    assert answer.out.splitlines() == [
        "key_id  state      rate_limit  expires_at            role      parallel  priority  tokens_per_day  stored",
        "a       suspended  0           -                     infer     -         0         -               plain",
        "b       expired    5           2020-01-01T00:00:00Z  operator  -         0         -               plain",
        "c       active     -           2096-12-31T23:59:59Z  infer     2         0         -               plain",
        "d       active     -           -                     infer     -         0         -               hashed",
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


def test_list_of_nothing_is_nothing(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text("# nobody\n")
    assert (run("list").out, run("list", "--json").json) == ("", [])


def test_a_bad_line_among_good_ones_is_a_warning(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}\nsecret-in-the-wrong-place\n")
    for words in (["list"], ["set", "--name", "a", "--rate-limit", "1"], ["generate", "--name", "b"]):
        answer = run(*words)
        assert answer.status == 0
        assert answer.err.startswith("key_mgmt: warning: line 2: a line is ")
        assert "secret-in" not in answer.err
        assert "secret-in-the-wrong-place\n" in path.read_text()


# remove, set


def test_remove_revokes_every_line_of_a_name(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"# one\na:{OLD}\nb:{OLD}2\n# two\na:{OLD}3\n")
    answer = run("remove", "--name", "a")
    assert (answer.status, answer.out, answer.err) == (0, "", "key_mgmt: removed a\n")
    assert path.read_text() == f"# one\nb:{OLD}2\n# two\n"
    assert run("remove", "--name", "b", "--json").json == {"key_id": "b", "removed": True}


def test_what_is_not_there_is_refused(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text("# nobody\n")
    for words in (["remove"], ["rotate"], ["set", "--priority", "1"]):
        answer = run(*words, "--name", "a")
        assert (answer.status, answer.out, answer.err) == (1, "", "key_mgmt: there is no key of the name a\n")


def test_set_changes_limits_and_not_the_key(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"# head\na:{OLD}:1:{FUTURE} parallel=2 # no comment\nb:{OLD}2:1:{FUTURE} parallel=2\n")
    answer = run("set", "--name", "b", "--rate-limit", "0", "--role", "operator")
    assert answer.err.endswith("key_mgmt: changed b, which is suspended\n")
    assert path.read_text().endswith(f"\nb:{OLD}2:0:{FUTURE} role=operator parallel=2\n")
    clear = ["--rate-limit", "default", "--expires", "never", "--parallel", "none", "--tokens-per-day", "none"]
    answer = run("set", "--name", "b", *clear, "--role", "infer", "--json")
    assert answer.json[0]["rate_limit"] is None  # type: ignore[index]
    assert path.read_text().endswith(f"\nb:{OLD}2\n")


def test_set_may_end_a_key_now(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}\n")
    assert run("set", "--name", "a", "--expires", PAST).err == "key_mgmt: changed a, which is expired\n"
    assert path.read_text() == f"a:{OLD}::{PAST}\n"


def test_set_ends_an_old_key_sooner_but_never_later(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}::2030-01-01\na:{OLD}2\n")
    run("set", "--name", "a", "--expires", FUTURE, "--rate-limit", "5")
    assert path.read_text() == f"a:{OLD}:5:2030-01-01T00:00:00Z\na:{OLD}2:5:{FUTURE}\n"
    run("set", "--name", "a", "--expires", "never")
    assert path.read_text() == f"a:{OLD}:5:2030-01-01T00:00:00Z\na:{OLD}2:5\n"
    run("set", "--name", "a", "--expires", PAST)
    assert path.read_text() == f"a:{OLD}:5:{PAST}\na:{OLD}2:5:{PAST}\n"


# rotate


def test_rotate_replaces_the_key_where_it_stands(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"# a\na:{OLD}:7 role=operator\n# b\nb:{OLD}2\n")
    secret = run("rotate", "--name", "a").out.strip()
    assert path.read_text() == f"# a\na:sha256${keyfile.parse_secret(secret).hex()}:7 role=operator\n# b\nb:{OLD}2\n"


def test_pitfall_41_rotate_overlaps(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}:7:{FUTURE}\nb:{OLD}2\n")
    answer = run("rotate", "--name", "a", "--overlap", "24h", "--json")
    old, new, other = entries(path)
    assert answer.json["api_key"]  # type: ignore[index]
    assert (old.digest, old.rate_limit) == (keyfile.parse_secret(OLD), 7)
    assert in_time(old.expires_at, timedelta(1))
    assert (new.rate_limit, new.expires_at) == (7, keyfile.parse_expiration(FUTURE))
    assert other.key_id == "b"
    ring = auth.Keyring.of(entries(path))
    now_s = datetime.now(timezone.utc).timestamp()
    for secret in (OLD, answer.json["api_key"]):  # type: ignore[index]
        assert ring.find(hashlib.sha256(secret.encode()).digest(), lambda at_s=now_s: at_s).key_id == "a"


def test_rotate_twice_leaves_the_first_overlap_as_it_was(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}\n")
    run("rotate", "--name", "a", "--overlap", "60m")
    run("rotate", "--name", "a", "--overlap", "24h", "--plain")
    first, second, third = entries(path)
    assert in_time(first.expires_at, timedelta(hours=1))
    assert in_time(second.expires_at, timedelta(1))
    assert third.expires_at is None
    run("rotate", "--name", "a")
    assert len(entries(path)) == 1


def test_rotate_of_an_expired_key_needs_another_end(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}::{PAST}\n")
    answer = run("rotate", "--name", "a")
    assert (answer.status, answer.out) == (1, "")
    assert "a has expired" in answer.err
    assert run("rotate", "--name", "a", "--expires", "30d").status == 0
    assert in_time(entries(path)[0].expires_at, timedelta(30))


def test_an_end_of_the_new_key_is_told(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"a:{OLD}::{FUTURE}\nb:{OLD}2\n")
    assert run("rotate", "--name", "a").err == (
        f"key_mgmt: a is in {path}; its key is shown this once and ends at {FUTURE}\n"
    )
    assert run("rotate", "--name", "b").err == f"key_mgmt: b is in {path}; its key is shown this once\n"


# check, hash


def test_check_tells_every_complaint(path: Path, run: Callable[..., Answer]) -> None:
    path.write_text(f"# c\na:{OLD}\n")
    answer = run("check")
    assert (answer.status, answer.out, answer.err) == (0, "", f"key_mgmt: {path}: 1 keys, 0 complaints\n")
    path.write_text(f"a:{OLD}\nb\nc:{OLD}\nd:{OLD}2:x")
    answer = run("check")
    assert answer.status == 1
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == [
        *["line 2", "line 3", "line 4", "the last line is torn"]
    ]
    record = run("check", "--json").json
    assert record == {"ok": False, "keys": 1, "complaints": answer.out.splitlines()}


@pytest.mark.parametrize("text", [OLD, OLD + "\n", OLD + "\r\n", f"sha256${keyfile.parse_secret(OLD).hex()}\n"])
def test_hash_reads_the_key_from_stdin(text: str) -> None:
    done = spawn("hash", input=text, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sha256${keyfile.parse_secret(OLD).hex()}\n", "")


def test_hash_as_json() -> None:
    done = spawn("hash", "--json", input=OLD, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == {"api_key": f"sha256${keyfile.parse_secret(OLD).hex()}"}


@pytest.mark.parametrize("text", ["", "\n", "short\n", OLD + "\n" + OLD, OLD + "é", OLD + " ", "k" * 9999])
def test_hash_refuses_what_is_no_key_and_does_not_repeat_it(text: str) -> None:
    done = spawn("hash", input=text, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "key_mgmt: a key is 16 to 128 of A-Z a-z 0-9 - _, or sha256$ and 64 hex digits\n"


# usage


@pytest.fixture
def ledger(path: Path) -> Path:
    """A ledger of two keys that worked today."""
    file = path.with_name("usage.db")
    book = usage.Ledger(file, time.time)
    for key_id in ("alice", "alice", "bob"):
        book.record({key_id: usage.charge([(usage.Tokens(10, 2, 5, 100.0, 200.0), "done")])})
    book.close()
    return file


def test_usage_shows_what_each_key_used(
    ledger: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = run("usage", "--usage-file", str(ledger), "--csv")
    header, *rows = [line.split(",") for line in answer.out.splitlines()]
    assert header == ["key_id", "requests", "prompt", "cached", "completion", "errors", "cancelled", "gpu_s"]
    assert [row[:7] for row in rows] == [
        ["alice", "2", "20", "4", "10", "0", "0"],
        ["bob", "1", "10", "2", "5", "0", "0"],
    ]
    monkeypatch.setenv("USAGE_FILE", str(ledger))
    by_day = run("usage", "--by", "day", "--since", "7d", "--json").json
    assert [(record["requests"], "key_id" in record) for record in by_day] == [(3, False)]  # type: ignore[attr-defined]
    table = run("usage", "--by", "key-day").out.splitlines()
    assert table[0].split()[:3] == ["day", "key_id", "requests"]
    monkeypatch.delenv("USAGE_FILE")
    monkeypatch.setenv("DATA_DIR", str(ledger.parent))
    monkeypatch.setenv("GPU_COST_PER_HOUR", "0.5")
    assert run("usage", "--csv").out.splitlines()[0].endswith(",gpu_s,cost")


def test_usage_says_what_is_missing_or_wrong(
    path: Path, run: Callable[..., Answer], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("usage", "--usage-file", "none").err == "key_mgmt: none: there is no such file\n"
    ledger.write_text("no ledger at all")
    answer = run("usage", "--usage-file", str(ledger))
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith(f"key_mgmt: {ledger}: ")


@pytest.mark.parametrize("since", ["soon", "2026-13-01", "2026-02-30"])
def test_usage_says_which_days_it_takes(ledger: Path, run: Callable[..., Answer], since: str) -> None:
    answer = run("usage", "--usage-file", str(ledger), "--since", since)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "key_mgmt: --since: expected a number of days such as 7d, or a date such as 2026-01-31\n"


@pytest.mark.parametrize("price", ["abc", "nan", "inf", "-1", "1e3", "1000001"])
def test_usage_takes_the_price_that_the_gateway_takes(
    ledger: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, price: str
) -> None:
    monkeypatch.setenv("GPU_COST_PER_HOUR", price)
    answer = run("usage", "--usage-file", str(ledger))
    assert (answer.status, answer.out) == (2, "")
    with pytest.raises(config.ConfigError) as refused:
        config.load_config({"GPU_COST_PER_HOUR": price})
    assert answer.err == f"key_mgmt: {refused.value}\n"
    monkeypatch.setenv("GPU_COST_PER_HOUR", "0")
    assert run("usage", "--usage-file", str(ledger), "--csv").out.splitlines()[1].endswith(",0.0")


def test_an_empty_usage_file_means_none(
    ledger: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(ledger.parent))
    monkeypatch.setenv("USAGE_FILE", "")
    answer = run("usage")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith("key_mgmt: USAGE_FILE is empty")
    assert run("usage", "--usage-file", str(ledger)).status == 0


@pytest.mark.parametrize("words", [["usage", "--csv", "--json"], ["--json", "usage", "--csv"]])
def test_usage_is_json_or_csv(ledger: Path, run: Callable[..., Answer], words: list[str]) -> None:
    answer = run(*words, "--usage-file", str(ledger))
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "key_mgmt: --json and --csv exclude each other: give one of them\n"


def test_usage_without_its_modules_says_so(
    path: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "usage", None)
    answer = run("usage")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "key_mgmt: usage needs usage.py beside key_mgmt.py\n"


def test_usage_of_a_lone_copy_says_so(tmp_path: Path) -> None:
    for name in ("key_mgmt", "keyfile"):
        shutil.copy(SCRIPTS / f"{name}.py", tmp_path)
    command = [sys.executable, "-B", "key_mgmt.py", "usage"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stderr) == (1, "key_mgmt: usage needs accept.py beside key_mgmt.py\n")


# Where the file is


def probe(mounted: set[str], writable: set[str]) -> Callable[[str], tuple[bool, bool]]:
    return lambda path: (path in mounted, path in writable)


@pytest.mark.parametrize("mounted", [set(), {"/data"}, {"/workspace", "/data"}, {"/runpod-volume", "/workspace"}])
@pytest.mark.parametrize("writable", [set(), {"/data"}, {"/workspace"}, {"/runpod-volume", "/workspace", "/data"}])
def test_the_folder_is_the_one_that_the_gateway_chooses(mounted: set[str], writable: set[str]) -> None:
    """The rule stands twice, because key_mgmt.py works without the gateway's modules."""
    folders = probe(mounted, writable)
    assert key_mgmt.data_dir({}, folders) == accept.find_data_dir(folders)
    assert key_mgmt.data_dir({"DATA_DIR": ""}, folders) == accept.find_data_dir(folders)
    assert key_mgmt.data_dir({"DATA_DIR": "/here"}, folders) == "/here"


def test_a_folder_is_probed_as_the_gateway_does(tmp_path: Path) -> None:
    for folder in ("/", str(tmp_path), "/nowhere"):
        assert key_mgmt.probe_folder(folder) == accept.probe_dir(folder)


def test_the_file_is_chosen_in_this_order(
    path: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(path.parent / "data"))
    run("generate", "--name", "a", "--file", "given")
    run("generate", "--name", "b")
    monkeypatch.delenv("AUTH_KEYS_FILE")
    run("generate", "--name", "c")
    assert [entries(path.parent / name)[0].key_id for name in ("given", "keys", "data/api_keys.txt")] == ["a", "b", "c"]


# The command line


@pytest.mark.parametrize("option", ["--file=other", "--quiet", "--json"])
def test_pitfall_42_common_options_stand_before_the_command_or_behind_it(
    path: Path, run: Callable[..., Answer], option: str
) -> None:
    path.write_text(f"a:{OLD}\n")
    path.with_name("other").write_text(f"b:{OLD}\n")
    before, behind, neither = run(option, "check"), run("check", option), run("check")
    assert (before.out, before.err) == (behind.out, behind.err)
    assert (before.out, before.err) != (neither.out, neither.err)


def test_quiet_leaves_data_and_errors(path: Path, run: Callable[..., Answer]) -> None:
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


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:60].encode("ascii", "replace").decode())
def test_what_makes_no_sense_is_status_2_and_changes_nothing(
    path: Path, run: Callable[..., Answer], words: list[str]
) -> None:
    path.write_text(f"a:{OLD}\n")
    answer = run(*words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err
    assert path.read_text() == f"a:{OLD}\n"


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--expires", "a duration is 1 to 5 digits and d, h or m, like 30d, 24h or 60m"),
        ("--rate-limit", "the rate limit is a whole number from 0 to 1000000000"),
        ("--name", "a key id is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter, a digit or _"),
    ],
)
def test_pitfall_42_a_complaint_says_what_is_right_and_repeats_nothing(
    path: Path, run: Callable[..., Answer], option: str, complaint: str
) -> None:
    answer = run("generate", "--name", "a", option, "!9999999999d")
    assert answer.err.endswith(f"error: argument {option}: {complaint}\n")
    assert "!9999999999d" not in answer.err


@pytest.mark.parametrize("words", [["list"], ["check"], ["remove", "--name", "a"], ["rotate", "--name", "a"]])
def test_a_file_that_is_not_there_is_status_1(path: Path, run: Callable[..., Answer], words: list[str]) -> None:
    answer = run(*words)
    assert (answer.status, answer.out, answer.err) == (1, "", f"key_mgmt: {path}: No such file or directory\n")
    assert not path.exists()


@pytest.mark.parametrize("words", [["list"], ["check"], ["generate", "--name", "a"], ["remove", "--name", "a"]])
def test_a_folder_in_its_place_is_status_1(path: Path, run: Callable[..., Answer], words: list[str]) -> None:
    path.mkdir()
    answer = run(*words)
    assert (answer.status, answer.out) == (1, "")
    assert re.fullmatch(rf"key_mgmt: {path}: (not a regular file|Is a directory)\n", answer.err)
    assert run(*words, "--file", "").status == 1


@pytest.mark.parametrize("words", [["list"], ["generate", "--name", "b"], ["set", "--name", "a", "--priority", "1"]])
def test_a_file_that_cannot_be_trusted_is_status_1(path: Path, run: Callable[..., Answer], words: list[str]) -> None:
    path.write_text(f"a:{OLD}\nb:sha2")
    answer = run(*words)
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == f"key_mgmt: {path}: the last line is torn: it lacks its newline and does not parse\n"
    assert path.read_text() == f"a:{OLD}\nb:sha2"


NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import key_mgmt, locale, shutil  # argparse imports these two when it may be too late
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(1235); os.setuid(1234)
sys.exit(key_mgmt.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("words", [["list"], ["generate", "--name", "b"]])
def test_without_permission_is_status_1(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is for its owner only
        path = Path(folder, "keys")
        path.write_text(f"a:{OLD}\n")
        path.chmod(0)
        os.chmod(folder, 0o755)
        command = [sys.executable, "-c", NOBODY, str(SCRIPTS), "--file", str(path), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"key_mgmt: {path}: Permission denied\n"


FULL = "import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); os.execv({0!r}, [{0!r}, *{1!r}])"


def test_a_full_disk_is_status_1(path: Path) -> None:
    path.write_text(f"a:{OLD}\n")
    words = [str(SCRIPTS / "key_mgmt.py"), "generate", "--name", "b"]
    command = [sys.executable, "-B", "-c", FULL.format(sys.executable, ["-B", *words])]
    environment = {"AUTH_KEYS_FILE": str(path)}  # coverage's own file would not fit either
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"key_mgmt: {path}: File too large\n")
    assert path.read_text() == f"a:{OLD}\n"
    assert os.listdir(path.parent) == ["keys"]


@pytest.mark.parametrize("words", [["list"], ["check", "--json"]])
def test_a_stdout_that_is_full_is_status_1(path: Path, words: list[str]) -> None:
    path.write_text(f"a:{OLD}\n")
    with open("/dev/full", "w") as full:
        done = spawn(*words, stdout=full)
    assert (done.returncode, done.stderr) == (1, "key_mgmt: stdout: No space left on device\n")


def test_a_key_that_could_not_be_shown_is_told(path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = spawn("generate", "--name", "a", stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "key_mgmt: the key of a is in the file but could not be shown (No space left on device): rotate or remove it\n"
    )


def close(number: int) -> Callable[[], None]:
    return lambda: os.close(number)


def test_streams_that_are_closed_are_no_traceback(path: Path) -> None:
    done = spawn("generate", "--name", "a", preexec_fn=close(1))
    assert (done.returncode, done.stderr) == (1, "key_mgmt: there is no stdout to show the key on\n")
    assert not path.exists()
    done = spawn("hash", preexec_fn=close(0))
    assert (done.returncode, done.stderr) == (1, "key_mgmt: there is no stdin to read the key from\n")
    done = spawn("generate", "--name", "a", stdout=subprocess.PIPE, stderr=None, preexec_fn=close(2))
    assert (done.returncode, len(done.stdout)) == (0, 47)
    with open("/dev/full", "w") as full:
        assert spawn("remove", "--name", "a", stderr=full).returncode == 0


class Impatient:
    """A stdin at which somebody presses Ctrl-C."""

    @property
    def buffer(self) -> "Impatient":
        return self

    def read(self, _count: int) -> bytes:
        raise KeyboardInterrupt


def test_an_interrupt_is_status_1(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Impatient())
    answer = run("hash")
    assert (answer.status, answer.out, answer.err) == (1, "", "key_mgmt: interrupted\n")


# What the help teaches


def examples() -> list[str]:
    text = key_mgmt.HELP.partition("examples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in text.splitlines()]


def test_pitfall_42_every_example_of_the_help_works(ledger: Path, tmp_path: Path) -> None:
    """In their order, in a folder with nothing but the two files (and, for `usage`, its own three)."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("key_mgmt.py", "keyfile.py"):
        shutil.copy(SCRIPTS / name, alone)
    lines = examples()
    assert {shlex.split(line.partition("key_mgmt.py ")[2], comments=True)[0] for line in lines} >= {"--file", "hash"}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AUTH_KEYS_FILE": str(alone / "keys.txt"),
        "USAGE_FILE": str(ledger),
        "KEY": OLD,
    }
    for line in lines:
        if " usage " in line:
            for name in ("accept.py", "usage.py", "meter.py"):
                shutil.copy(SCRIPTS / name, alone)
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
        assert ("--json" in shlex.split(line, comments=True)) == done.stdout.startswith(("{", "["))
    assert [entry.key_id for entry in entries(alone / "keys.txt")] == ["ops"]
    assert [entry.key_id for entry in entries(alone / "team.txt")] == ["bob"]


def test_every_command_has_an_example_and_help(run: Callable[..., Answer]) -> None:
    taught = " ".join(examples())
    assert run("--help").status == 0
    for command in key_mgmt.COMMANDS:
        assert f" {command}" in taught
        answer = run(command, "--help")
        assert (answer.status, answer.err) == (0, "")
        for option in (*key_mgmt.COMMANDS[command][1], "--file", "--json", "--quiet"):
            assert option in answer.out


def test_every_command_and_option_is_in_the_documentation() -> None:
    text = (SCRIPTS.parent / "docs" / "AUTHENTICATION.md").read_text()
    spans = " ".join(re.findall(r"`[^`\n]+`", text))
    for word in (*key_mgmt.COMMANDS, *key_mgmt.OPTIONS):
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", spans), word


# One grammar


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


@pytest.mark.parametrize(("line", "good"), LINES.items())
def test_pitfall_43_the_gateway_and_the_command_line_read_the_same_grammar(
    path: Path, run: Callable[..., Answer], line: str, good: bool
) -> None:
    path.write_text(f"other:{OLD}2\n{line}\n")
    store = auth.KeyStore(path, 60)
    reload, answer = store.reload(), run("check")
    assert (not reload.complaints) == (answer.status == 0) == good
    assert "".join(complaint + "\n" for complaint in reload.complaints) == answer.out


def test_pitfall_43_only_keyfile_knows_the_colons() -> None:
    for module in (auth, key_mgmt):
        source = Path(module.__file__ or "").read_text()
        assert not re.search(r"""(split|partition)\(["'][:#]|sha256\\\$|fromisoformat""", source)
