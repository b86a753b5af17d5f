"""The keys file: grammar, trust, and rewrites that nothing interrupts halfway."""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re
import stat
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import keyfile
from keyfile import Document, Entry, Invalid
from support.together import ENVIRON, aside

SCRIPTS = Path(keyfile.__file__).parent
SECRET = "sk-plain-0123456789abcdef"
DIGEST = hashlib.sha256(SECRET.encode()).digest()
HASHED = "sha256$" + DIGEST.hex()
OTHER = "sk-other-0123456789abcdef"


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=timezone.utc)  # type: ignore[misc, arg-type]


# Fields and lines


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        (f"a:{SECRET}", Entry("a", DIGEST)),
        (f"a:{HASHED}", Entry("a", DIGEST)),
        (f"a:sha256${DIGEST.hex().upper()}", Entry("a", DIGEST)),
        (f"a:{SECRET}:120", Entry("a", DIGEST, 120)),
        (f"a:{SECRET}:0120", Entry("a", DIGEST, 120)),
        (f"a:{SECRET}:0", Entry("a", DIGEST, 0)),
        (f"a:{SECRET}:", Entry("a", DIGEST)),
        (f"a:{SECRET}::", Entry("a", DIGEST)),
        (f"a:{SECRET}:1000000000", Entry("a", DIGEST, 10**9)),
        (f"a:{SECRET}:1:2026-12-31T23:59:59Z", Entry("a", DIGEST, 1, utc(2026, 12, 31, 23, 59, 59))),
        (f"a:{SECRET}::2026-12-31", Entry("a", DIGEST, None, utc(2026, 12, 31))),
        (f"a:{SECRET} role=operator", Entry("a", DIGEST, role="operator")),
        (f"a:{SECRET}:9\tparallel=2  priority=-1", Entry("a", DIGEST, 9, parallel=2, priority=-1)),
        (f"a:{SECRET} tokens_per_day=2000000", Entry("a", DIGEST, tokens_per_day=2_000_000)),
        (f"  \ta:{SECRET} \t", Entry("a", DIGEST)),
        (f"a:{SECRET}\r", Entry("a", DIGEST)),
        (f"alice.b_c@d-e:{SECRET}", Entry("alice.b_c@d-e", DIGEST)),
        (f"{'k' * 64}:{SECRET}", Entry("k" * 64, DIGEST)),
        ("", None),
        (" \t\r", None),
        ("# alice:sk", None),
        ("  # naïve", None),
    ],
)
def test_a_line_means(line: str, entry: Entry | None) -> None:
    assert keyfile.parse_line(line) == entry


def test_a_bare_line_means_no_limits_but_the_gateway_s() -> None:
    entry = Entry("a", DIGEST, rate_limit=None, expires_at=None, role="infer", parallel=None, priority=0)
    assert keyfile.parse_line(f"a:{SECRET}") == entry
    assert entry.tokens_per_day is None


@pytest.mark.parametrize(
    ("parse", "low", "high"),
    [
        (keyfile.parse_rate_limit, 0, 10**9),
        (keyfile.parse_parallel, 1, 10**6),
        (keyfile.parse_priority, -1000, 1000),
        (keyfile.parse_tokens_per_day, 1, 10**15 - 1),
    ],
)
def test_a_number_has_two_ends(parse: Callable[[str], int], low: int, high: int) -> None:
    assert [parse(str(low)), parse(str(high))] == [low, high]
    for beyond in (low - 1, high + 1):
        with pytest.raises(Invalid, match=f"is a whole number from {low} to {high}"):
            parse(str(beyond))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("alice", "a line is key_id:api_key"),
        (f"alice {SECRET}", "a line is key_id:api_key"),
        (f":{SECRET}", "a key id is"),
        (f"-a:{SECRET}", "a key id is"),
        (f"{'k' * 65}:{SECRET}", "a key id is"),
        (f"ali\u0441e:{SECRET}", "a key id is"),  # a Cyrillic es
        (f"a\u0661:{SECRET}", "a key id is"),  # an Arabic digit one
        (f"a/b:{SECRET}", "a key id is"),
        ("a:", "a key is 16 to 128"),
        (f"a:{'k' * 15}", "a key is 16 to 128"),
        (f"a:{'k' * 129}", "a key is 16 to 128"),
        (f"a:{SECRET}é", "a key is 16 to 128"),
        (f"a:{SECRET}\u0665", "a key is 16 to 128"),
        (f"a:{HASHED[:-1]}", "a key is 16 to 128"),
        (f"a:{HASHED}0", "a key is 16 to 128"),
        (f"a:{HASHED[:-1]}g", "a key is 16 to 128"),
        (f"a:SHA256${DIGEST.hex()}", "a key is 16 to 128"),
        (f"a:{SECRET}:+5", "the rate limit is"),
        (f"a:{SECRET}:-5", "the rate limit is"),
        (f"a:{SECRET}:-0", "the rate limit is"),
        (f"a:{SECRET}:5_0", "the rate limit is"),
        (f"a:{SECRET}:\u0665", "the rate limit is"),
        (f"a:{SECRET}:1000000001", "the rate limit is"),
        (f"a:{SECRET}:{'9' * 5000}", "the rate limit is"),
        (f"a:{SECRET}:1e3", "the rate limit is"),
        (f"a:{SECRET}:1:tomorrow", "an expiration is like"),
        (f"a:{SECRET}:1:2026-12-31T23:59:59Z:1", "an expiration is like"),
        (f"a:{SECRET}:1:2026-02-30", "no date of the calendar"),
        (f"a:{SECRET} role", "the role is"),
        (f"a:{SECRET} role=admin", "the role is"),
        (f"a:{SECRET} rank=1", "the options are role, parallel, priority, tokens_per_day"),
        (f"a:{SECRET} # a comment", "the options are"),
        (f"a:{SECRET} parallel=0", "parallel is a whole number from 1"),
        (f"a:{SECRET} parallel=", "parallel is"),
        (f"a:{SECRET} priority=1001", "priority is"),
        (f"a:{SECRET} tokens_per_day=0", "tokens_per_day is"),
        (f"a:{SECRET} parallel=1 parallel=2", "parallel is given twice"),
        (f"a:{SECRET}\u00a0role=operator", "a key is 16 to 128"),  # a no-break space parts nothing
        (f"a:{SECRET}\x0b", "a key is 16 to 128"),
    ],
)
def test_a_line_is_refused(line: str, complaint: str) -> None:
    with pytest.raises(Invalid, match="^" + re.escape(complaint) if complaint[0] != "n" else complaint) as caught:
        keyfile.parse_line(line)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-12-31", utc(2026, 12, 31)),
        ("2026-12-31T23:59", utc(2026, 12, 31, 23, 59)),
        ("2026-12-31T23:59:59", utc(2026, 12, 31, 23, 59, 59)),
        ("2026-12-31t23:59:59z", utc(2026, 12, 31, 23, 59, 59)),
        ("2026-12-31T23:59:59.5Z", utc(2026, 12, 31, 23, 59, 59, 500_000)),
        ("2026-12-31T23:59:59.000001", utc(2026, 12, 31, 23, 59, 59, 1)),
        ("2026-12-31T23:59:59+02:00", utc(2026, 12, 31, 21, 59, 59)),
        ("2026-12-31T23:59:59-0530", utc(2027, 1, 1, 5, 29, 59)),
        ("2026-12-31T00:30+00:00", utc(2026, 12, 31, 0, 30)),
        ("2024-02-29", utc(2024, 2, 29)),
        ("9999-12-31T23:59:59Z", utc(9999, 12, 31, 23, 59, 59)),
    ],
)
def test_pitfall_37_an_expiry_is_aware_utc_with_offset_z_or_without(text: str, at: datetime) -> None:
    parsed = keyfile.parse_expiration(text)
    assert parsed == at
    assert parsed.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        *["", "2026", "2026-12", "20261231", "2026-W01-1", "2026-1-1", "26-12-31", " 2026-12-31", "2026-12-31 "],
        *["2026-12-31T", "2026-12-31Z", "2026-12-31T23", "2026-12-31 23:59", "2026-12-31T23:59:59+", "now", "+5"],
        *["2026-12-31T23:59:59+24:00", "2026-12-31T23:59:59+02:60", "2026-12-31T23:59:59.0000001Z", "\uff12026-12-31"],
        *["2026-12-31T24:00", "2026-12-31T23:60", "2026-12-31T23:59:60", "0000-01-01", "2023-02-29", "2026-13-01"],
        *["0001-01-01T00:00+00:01", "9999-12-31T23:59-00:01"],
    ],
)
def test_an_expiry_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="expiration"):
        keyfile.parse_expiration(text)


# The whole file


def test_a_bad_line_is_reported_by_its_number_and_skipped() -> None:
    parsed = keyfile.parse(f"# keys\n\na:{SECRET}\nb:short\nc:{OTHER}\n".encode())
    assert [entry.key_id for entry in parsed.entries] == ["a", "c"]
    assert [complaint.partition(": ")[0] for complaint in parsed.complaints] == ["line 4"]
    assert parsed.distrust == ""


def test_several_lines_may_share_an_id_but_not_a_key() -> None:
    parsed = keyfile.parse(f"a:{SECRET}:1\na:{OTHER}:2\nb:{HASHED}:3\n".encode())
    assert [(entry.key_id, entry.rate_limit) for entry in parsed.entries] == [("a", 1), ("a", 2)]
    assert parsed.complaints == ("line 3: the same key stands in line 1",)


@pytest.mark.parametrize(
    ("data", "distrust"),
    [
        (b"", ""),
        (b"\n", ""),
        (b"# nobody\n", ""),
        (b"# nobody", ""),
        (f"a:{SECRET}".encode(), ""),
        (f"a:{SECRET}\n ".encode(), ""),
        (b"\xef\xbb\xbfa:" + SECRET.encode() + b"\n", ""),
        (f"a:{SECRET}\r\nb:{OTHER}\r\n".encode(), ""),
        (f"a:{SECRET}\nb:sha2".encode(), "the last line is torn: it lacks its newline and does not parse"),
        (b"a", "the last line is torn: it lacks its newline and does not parse"),
        (b"a:short\nb:short\n", "not one key line is valid"),
        (b"# c\na:short\n", "not one key line is valid"),
        (f"a:{SECRET}\n\xff".encode("latin-1"), "the file is not UTF-8 text"),
        (f"a:{SECRET}\n".encode() + b"\0" * 20, "the file is not text: it holds NUL"),
        (f"a:{SECRET}\n".encode("utf-16"), "the file is not UTF-8 text"),
    ],
)
def test_a_file_is_trusted_or_not(data: bytes, distrust: str) -> None:
    assert keyfile.parse(data).distrust == distrust


def test_only_a_newline_ends_a_line() -> None:
    """str.splitlines would let a comment smuggle a key in."""
    for separator in "\x0b\x0c\r\x1c\x85\u2028":
        assert keyfile.parse(f"# comment{separator}a:{SECRET}\n".encode()).entries == ()


def test_no_message_holds_any_part_of_a_line() -> None:
    """Words of a line may be a secret that stands in the wrong place."""
    rng = random.Random(3)
    for _ in range(2000):
        words = ["".join(rng.choices("KQXZ", k=12)) for _ in range(4)]
        line = "".join(word + rng.choice([":", " ", "=", "#:", "  "]) for word in words)
        for message in keyfile.parse(line.encode()).complaints:
            assert not any(word in message for word in words)


def test_whatever_the_bytes_parsing_answers() -> None:
    rng = random.Random(4)
    alphabet = [
        b"a",
        b":",
        b"\n",
        b" ",
        b"=",
        b"#",
        b"\r",
        b"\0",
        b"\xc3",
        b"\xa9",
        SECRET.encode(),
        b"role",
        b"1",
        b"-",
    ]
    for _ in range(3000):
        data = b"".join(rng.choices(alphabet, k=rng.randrange(12)))
        parsed = keyfile.parse(data)
        assert all(isinstance(entry, Entry) for entry in parsed.entries)


# Reading


def test_read_gives_the_bytes_and_a_stamp_that_a_change_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"# one\n")
    data, stamp = keyfile.read(path)
    assert data == b"# one\n"
    assert stamp == keyfile.stamp_of(path.stat())
    path.write_bytes(b"# three\n")
    assert keyfile.stamp_of(path.stat()) != stamp


def test_read_refuses_what_is_no_regular_file_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(keyfile.FILE_BYTES + 1)
    for name, reason in [("fifo", "not a regular file"), ("", "not a regular file"), ("large", "larger than")]:
        with pytest.raises(OSError, match=reason):
            keyfile.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        keyfile.read(tmp_path / "missing")


def open_below(folder: Path) -> list[str]:
    """What this process has open in a folder; other tests run beside this one, and open files of their own."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith(str(folder))]


def test_no_descriptor_is_left_open(path: Path) -> None:
    def fail(document: Document) -> None:
        raise LookupError

    held = path.open()
    assert open_below(path.parent) == [str(path)]
    held.close()
    keyfile.read(path)
    keyfile.rewrite(path, append("b"))
    keyfile.rewrite(path, append("c"), replace=busy)
    keyfile.rewrite(path.parent / "new", append("a"), create=True)
    for call in (lambda: keyfile.read(path.parent), lambda: keyfile.rewrite(path, fail)):
        with contextlib.suppress(OSError, LookupError):
            call()
    assert open_below(path.parent) == []


# Editing


def random_entry(rng: random.Random) -> Entry:
    return Entry(
        rng.choice(string.ascii_letters) + "".join(rng.choices(string.ascii_letters + "._@-", k=rng.randrange(8))),
        rng.randbytes(32),
        rng.choice([None, 0, 1, 10**9]),
        rng.choice([None, utc(2026, 1, 1), utc(999, 1, 1, 1, 1, 1, 5)]),
        rng.choice(keyfile.ROLES),
        rng.choice([None, 1, 10**6]),
        rng.choice([0, -1000, 7]),
        rng.choice([None, 1, 10**15 - 1]),
    )


def test_what_is_written_is_read_as_the_same() -> None:
    rng = random.Random(5)
    for _ in range(500):
        entry = random_entry(rng)
        line = keyfile.serialize_entry(entry)
        assert line.found == entry
        assert keyfile.parse_line(line.text) == entry


def test_an_entry_is_written_as_short_as_can_be() -> None:
    at = utc(2026, 12, 31)
    assert keyfile.serialize_entry(Entry("a", DIGEST)).text == f"a:{HASHED}"
    assert keyfile.serialize_entry(Entry("a", DIGEST, 5), SECRET).text == f"a:{SECRET}:5"
    assert keyfile.serialize_entry(Entry("a", DIGEST, None, at)).text == f"a:{HASHED}::2026-12-31T00:00:00Z"
    every = Entry("a", DIGEST, 0, at, "operator", 2, -1, 9)
    assert keyfile.serialize_entry(every, SECRET).text == (
        f"a:{SECRET}:0:2026-12-31T00:00:00Z role=operator parallel=2 priority=-1 tokens_per_day=9"
    )


def test_every_field_of_an_entry_is_written() -> None:
    """A field that serialize_entry forgets would vanish at the next `set`."""
    blank = Entry("a", DIGEST)
    rng = random.Random(6)
    for field in fields(Entry)[2:]:
        values = {getattr(random_entry(rng), field.name) for _ in range(50)} - {getattr(blank, field.name)}
        entry = Entry("a", DIGEST, **{field.name: values.pop()})
        assert keyfile.serialize_entry(entry).text != keyfile.serialize_entry(blank).text


@pytest.mark.parametrize(
    "text",
    ["", "\n", "# c\n\n\n", f"# c\r\n  a:{SECRET}:1  \r\n\n#\tend\n", f"a:{SECRET}\nbad\n", "\n\n# naïve \u2028 x\n"],
)
def test_a_document_that_nobody_touches_is_the_same_to_the_byte(text: str) -> None:
    assert Document(text.encode()).serialize() == text.encode()


def test_a_document_ends_with_a_newline_whatever_the_file_did() -> None:
    assert Document(f"a:{SECRET}".encode()).serialize() == f"a:{SECRET}\n".encode()


def test_a_document_finds_the_lines_of_a_key() -> None:
    document = Document(f"# a\na:{SECRET}:1\nbad\na:{OTHER}:2\n".encode())
    assert [(index, entry.rate_limit) for index, entry in document.find("a")] == [(1, 1), (3, 2)]
    assert document.find("b") == []
    assert document.lines[1].secret == SECRET
    assert document.complaints == ("line 3: a line is key_id:api_key[:rate_limit[:expiration]], then name=value words",)


def test_a_file_that_cannot_be_trusted_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"a:{SECRET}\nb:sha".encode())
    with pytest.raises(Invalid, match="torn"):
        keyfile.rewrite(path, append("c"))
    assert path.read_bytes() == f"a:{SECRET}\nb:sha".encode()


# Rewriting


def append(key_id: str) -> Callable[[Document], None]:
    digest = hashlib.sha256(key_id.encode()).digest()
    return lambda document: document.lines.append(keyfile.serialize_entry(Entry(key_id, digest)))


def drop_first(document: Document) -> None:
    del document.lines[0]


IN_CHILD = """
import errno, os, pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import keyfile
path = pathlib.Path(sys.argv[2])
append = lambda document: document.lines.append(keyfile.serialize_entry(keyfile.Entry("a", b"a" * 32)))
"""


def in_child(script: str, path: Path) -> str:
    """What a process of its own prints: limits and the umask are the whole process's, and other tests run in this."""
    command = [sys.executable, "-c", IN_CHILD + script, str(SCRIPTS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def names(path: Path) -> list[str]:
    parsed = keyfile.parse(path.read_bytes())
    assert (parsed.complaints, parsed.distrust) == ((), "")
    return [entry.key_id for entry in parsed.entries]


def busy(_source: str, _target: str) -> None:
    """Refuse as the kernel does where the target is a mount point."""
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A keys file with the key a and comments around it."""
    path = tmp_path / "keys"
    path.write_text(f"# head\na:{SECRET}\n# foot\n")
    path.chmod(0o600)
    return path


def test_a_rewrite_keeps_comments_blank_lines_and_order(path: Path) -> None:
    path.write_text(f"# head\n\n a:{SECRET}:1 \n\t# between\nbad\nb:{OTHER}")
    document = keyfile.rewrite(path, append("c"))
    assert path.read_bytes() == document.serialize()
    assert path.read_text().startswith(f"# head\n\n a:{SECRET}:1 \n\t# between\nbad\nb:{OTHER}\nc:sha256$")


def test_a_rewrite_leaves_nothing_beside_the_file(path: Path) -> None:
    keyfile.rewrite(path, append("b"))
    assert names(path) == ["a", "b"]
    assert os.listdir(path.parent) == ["keys"]


def test_a_change_that_changes_nothing_writes_nothing(path: Path) -> None:
    before = keyfile.stamp_of(path.stat())
    keyfile.rewrite(path, lambda document: None)
    assert keyfile.stamp_of(path.stat()) == before


def test_a_change_that_fails_leaves_the_file(path: Path) -> None:
    before = path.read_bytes()

    def fail(document: Document) -> None:
        document.lines.clear()
        raise LookupError

    with pytest.raises(LookupError):
        keyfile.rewrite(path, fail)
    assert path.read_bytes() == before


def test_a_missing_file_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(FileNotFoundError):
        keyfile.rewrite(path, append("a"))
    assert not path.exists()
    in_child("os.umask(0); keyfile.rewrite(path, append, create=True)", path)
    assert names(path) == ["a"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keyfile.rewrite(path, append("b"), create=True)
    assert names(path) == ["a", "b"]


@pytest.mark.parametrize("replace", [os.replace, busy], ids=["replaced", "in place"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_rewrite_keeps_mode_and_owner(path: Path, mode: int, replace: Callable[[str, str], None]) -> None:
    path.chmod(mode)
    before = path.stat()
    if not os.access(path, os.W_OK):
        pytest.skip("only root writes a read-only file")
    keyfile.rewrite(path, append("b"), replace=replace)
    after = path.stat()
    assert stat.S_IMODE(after.st_mode) == mode
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone may give files away")


@as_root
def test_pitfall_42_what_root_rewrites_or_makes_stays_readable_to_the_gateway(path: Path) -> None:
    os.chown(path, 1234, 1235)
    keyfile.rewrite(path, append("b"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)
    os.chown(path.parent, 1236, 1237)
    keyfile.rewrite(path.parent / "new", append("a"), create=True)
    assert ((path.parent / "new").stat().st_uid, (path.parent / "new").stat().st_gid) == (1236, 1237)


AS_NOBODY = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
os.setgroups([]); os.setgid(1235); os.setuid(1234)
keyfile.rewrite(pathlib.Path(sys.argv[2]), lambda document: document.lines.pop(0))
"""


@as_root
@pytest.mark.parametrize(("owner", "folder_mode"), [(1234, 0o755), (0, 0o777)], ids=["folder", "owner"])
def test_a_file_that_may_be_written_but_not_replaced_is_written(owner: int, folder_mode: int) -> None:
    """A read-only folder, or a file of another owner that a group shares: neither is lost by a rewrite."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is for its owner only
        path = Path(folder, "keys")
        path.write_text(f"# head\na:{SECRET}\n")
        os.chown(path, owner, 1235)
        path.chmod(0o660)
        os.chmod(folder, folder_mode)
        before = path.stat()
        subprocess.run([sys.executable, "-c", AS_NOBODY, str(SCRIPTS), str(path)], check=True, env={})
        assert path.read_text() == f"a:{SECRET}\n"
        after = path.stat()
        assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)
        assert os.listdir(folder) == ["keys"]


def test_a_symlink_stays_one(path: Path) -> None:
    (path.parent / "far").mkdir()
    link = path.parent / "far" / "link"
    link.symlink_to("../keys")
    keyfile.rewrite(link, append("b"))
    assert link.is_symlink()
    assert names(path) == ["a", "b"]
    dangling = path.parent / "dangling"
    dangling.symlink_to("far/made")
    keyfile.rewrite(dangling, append("c"), create=True)
    assert dangling.is_symlink()
    assert names(path.parent / "far" / "made") == ["c"]


@pytest.mark.parametrize("change", [append("longer"), drop_first], ids=["longer", "shorter"])
def test_pitfall_42_a_file_that_cannot_be_replaced_is_rewritten_in_place(
    path: Path, change: Callable[[Document], None]
) -> None:
    before = path.stat().st_ino
    document = keyfile.rewrite(path, change, replace=busy)
    assert path.read_bytes() == document.serialize()
    assert path.stat().st_ino == before
    assert os.listdir(path.parent) == ["keys"]


BIND = """
mount --bind "$1/outside" "$1/keys" && "$2" -B -c '
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import keyfile
keyfile.rewrite(pathlib.Path(sys.argv[2]), lambda document: document.lines.pop(0))
' "$3" "$1/keys"
"""


def test_pitfall_42_a_file_mounted_alone_is_rewritten(path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    outside = path.parent / "outside"
    outside.write_text(f"# head\nb:{SECRET}\n")
    command = ["unshare", "-m", "sh", "-c", BIND, "sh", str(path.parent), sys.executable, str(SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert outside.read_text() == f"b:{SECRET}\n"
    assert names(path) == ["a"]


def test_what_a_killed_writer_left_is_swept_and_nothing_else(path: Path) -> None:
    litter = path.parent / f".keys.{'0' * 16}.tmp"
    others = [".other.0123456789abcdef.tmp", ".keys.tmp", "keys.bak"]
    for name in (litter.name, *others):
        (path.parent / name).touch()
    (path.parent / f".keys.{'1' * 16}.tmp").mkdir()  # cannot be unlinked, and must not stop anybody
    keyfile.rewrite(path, append("b"))
    assert sorted(os.listdir(path.parent)) == sorted(["keys", f".keys.{'1' * 16}.tmp", *others])


def test_an_editor_that_asks_for_no_lock_is_not_overwritten(path: Path) -> None:
    def change_behind_the_back(document: Document) -> None:
        append("b")(document)
        path.write_text(f"z:{OTHER}\n")

    with pytest.raises(OSError, match="changed by another program meanwhile"):
        keyfile.rewrite(path, change_behind_the_back)
    assert names(path) == ["z"]
    assert os.listdir(path.parent) == ["keys"]


# What is written from some moment on meets a limit where it would meet a full disk.
FULL_DISK = """
limits = resource.getrlimit(resource.RLIMIT_FSIZE)

def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))

def grow(document):
    append(document)
    if not in_place:
        fill_the_disk()

def fill_and_refuse(source, target):
    fill_the_disk()
    raise OSError(errno.EBUSY, "Device or resource busy")

try:
    keyfile.rewrite(path, grow, replace=fill_and_refuse)
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # coverage writes at the end
"""


@pytest.mark.parametrize("in_place", [False, True])
def test_a_full_disk_leaves_the_old_file(path: Path, in_place: bool) -> None:
    before = path.read_bytes()
    assert in_child(f"in_place = {in_place}{FULL_DISK}", path) == "File too large\n"
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["keys"]


def test_a_replacement_that_fails_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fail(source: str, target: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        keyfile.rewrite(path, append("b"), replace=fail)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["keys"]


# The lock


def test_a_lock_that_is_held_is_waited_for_and_not_for_ever(path: Path) -> None:
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="locked by another program"):
            keyfile.rewrite(path, append("b"), wait_s=0.02)
    keyfile.rewrite(path, append("b"), wait_s=0)
    assert names(path) == ["a", "b"]


def test_who_waited_for_a_file_that_was_replaced_edits_the_new_one(path: Path) -> None:
    """The lock of a file without a name is worth nothing."""
    seen = []

    def outer(document: Document) -> None:
        # While the outer rewrite holds the lock, the file is replaced and removed behind its back.
        path.unlink()
        descriptor = os.open(path.parent / "other", os.O_CREAT | os.O_RDWR)
        try:
            seen.append(keyfile._is_mine(descriptor, str(path)))
            path.write_text(f"z:{OTHER}\n")
            seen.append(keyfile._is_mine(descriptor, str(path)))
        finally:
            os.close(descriptor)
        raise LookupError

    with pytest.raises(LookupError):
        keyfile.rewrite(path, outer)
    assert seen == [False, False]
    keyfile.rewrite(path, append("b"))
    assert names(path) == ["z", "b"]


WRITER = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
for number in range(int(sys.argv[4])):
    entry = keyfile.Entry(f"{sys.argv[3]}{number}", hashlib.sha256(f"{sys.argv[3]}{number}".encode()).digest())
    keyfile.rewrite(pathlib.Path(sys.argv[2]), lambda d: d.lines.append(keyfile.serialize_entry(entry)), create=True)
"""


def test_pitfall_42_two_writers_lose_nothing(tmp_path: Path) -> None:
    path, changes = tmp_path / "keys", 40
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(SCRIPTS), str(path), name, str(changes)]) for name in "ab"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(names(path)) == sorted(f"{name}{number}" for name in "ab" for number in range(changes))
    for name in "ab":
        assert [key for key in names(path) if key[0] == name] == [f"{name}{number}" for number in range(changes)]


# Being killed

KILLED = """
import errno, os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import keyfile
path, in_place, longer = pathlib.Path(sys.argv[2]), sys.argv[3] == "in place", sys.argv[4] == "longer"
old = path.read_bytes()

def replace(source, target):
    if in_place:
        raise OSError(errno.EBUSY, "busy")
    os.replace(source, target)

def rewrite_and_die_before_line(left):
    # Counts the lines of keyfile.py that run after the change was made: nothing is written before.
    changed = False

    def change(document):
        nonlocal changed
        changed = True
        if longer:
            document.lines.append(keyfile.serialize_entry(keyfile.Entry("b", bytes(32))))
        else:
            del document.lines[1]

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != keyfile.__file__:
            return None
        left -= changed
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    keyfile.rewrite(path, change, replace=replace)
    os._exit(0)

deaths, seen, status = 0, set(), -signal.SIGKILL
while status == -signal.SIGKILL:
    path.write_bytes(old)
    child = os.fork()
    if child == 0:
        rewrite_and_die_before_line(deaths + 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deaths += status != 0
    parsed = keyfile.parse(path.read_bytes())
    assert not parsed.complaints and not parsed.distrust, path.read_bytes()
    seen.add(tuple(entry.key_id for entry in parsed.entries))
print(deaths, status, sorted(seen))
"""


@pytest.mark.parametrize("how", ["replaced", "in place"])
@pytest.mark.parametrize(
    ("which", "outcomes"),
    [("longer", [("q", "a"), ("q", "a", "b")]), ("shorter", [("a",), ("q", "a")])],
    ids=["longer", "shorter"],
)
@aside
def test_a_writer_killed_at_any_line_leaves_the_old_file_or_the_new(
    tmp_path: Path, how: str, which: str, outcomes: list[tuple[str, ...]]
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# head\nq:{SECRET}:1\na:{OTHER}\n")
    command = [sys.executable, "-c", KILLED, str(SCRIPTS), str(path), how, which]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    deaths, status, seen = done.stdout.split(" ", 2)
    assert (status, seen.strip()) == ("0", str(outcomes))
    assert int(deaths) > 50
