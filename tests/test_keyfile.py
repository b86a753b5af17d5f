"""The keys file: grammar, validity of the whole file, and atomic rewrites."""

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
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import keyfile
from keyfile import Document, Entry, KeyFileError
from support.boot import PATIENCE_S
from support.faults import Fault, environment, make_faults
from support.paths import SCRIPTS
from support.together import ENVIRON, aside

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
        (f"a:{SECRET} from=10.0.0.0/8,::1", Entry("a", DIGEST, sources=keyfile.parse_networks("10.0.0.0/8,::1"))),
        (f"a:{SECRET} tokens_per_minute=6000", Entry("a", DIGEST, tokens_per_minute=6000)),
        (f"a:{SECRET} tokens_per_month=7", Entry("a", DIGEST, tokens_per_month=7)),
        (f"a:{SECRET} max_tokens=512", Entry("a", DIGEST, max_tokens=512)),
        (f"a:{SECRET} models=chat-*,embed,chat-*", Entry("a", DIGEST, models=("chat-*", "embed"))),
        (f"a:{SECRET} models=*/q?:Q[48]_0", Entry("a", DIGEST, models=("*/q?:Q[48]_0",))),
        (f"a:{SECRET} models={'m' * 255}", Entry("a", DIGEST, models=("m" * 255,))),
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
def test_a_line_is_parsed(line: str, entry: Entry | None) -> None:
    assert keyfile.parse_line(line) == entry


def test_a_line_without_options_has_the_default_limits() -> None:
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
        (keyfile.parse_tokens_per_minute, 1, 10**15 - 1),
        (keyfile.parse_tokens_per_month, 1, 10**15 - 1),
        (keyfile.parse_max_tokens, 1, 2**31 - 1),
    ],
)
def test_a_number_has_a_minimum_and_a_maximum(parse: Callable[[str], int], low: int, high: int) -> None:
    assert [parse(str(low)), parse(str(high))] == [low, high]
    for beyond in (low - 1, high + 1):
        with pytest.raises(KeyFileError, match=f"is a whole number from {low} to {high}"):
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
        (f"a:{SECRET}:1:2026-02-30", "the expiration is not a valid date"),
        (f"a:{SECRET} role", "the role is"),
        (f"a:{SECRET} role=admin", "the role is"),
        (f"a:{SECRET} rank=1", "the options are role, parallel, priority, tokens_per_day"),
        (f"a:{SECRET} # a comment", "the options are"),
        (f"a:{SECRET} parallel=0", "parallel is a whole number from 1"),
        (f"a:{SECRET} parallel=", "parallel is"),
        (f"a:{SECRET} priority=1001", "priority is"),
        (f"a:{SECRET} tokens_per_day=0", "tokens_per_day is"),
        (f"a:{SECRET} from=", "a network is like"),
        (f"a:{SECRET} from=10.0.0.0/8 from=::1", "from is given twice"),
        (f"a:{SECRET} tokens_per_minute=x", "tokens_per_minute is"),
        (f"a:{SECRET} tokens_per_month=", "tokens_per_month is"),
        (f"a:{SECRET} max_tokens=-1", "max_tokens is"),
        (f"a:{SECRET} models=", "models is a list"),
        (f"a:{SECRET} models=a,,b", "models is a list"),
        (f"a:{SECRET} models=a;b", "models is a list"),
        (f"a:{SECRET} models=é", "models is a list"),
        (f"a:{SECRET} models={'m' * 256}", "models is a list"),
        (f"a:{SECRET} models={','.join(map(str, range(65)))}", "there are more than 64 patterns of models"),
        (f"a:{SECRET} parallel=1 parallel=2", "parallel is given twice"),
        (f"a:{SECRET}\u00a0role=operator", "a key is 16 to 128"),  # a no-break space is not a separator
        (f"a:{SECRET}\x0b", "a key is 16 to 128"),
    ],
)
def test_a_line_is_refused(line: str, complaint: str) -> None:
    with pytest.raises(KeyFileError, match="^" + re.escape(complaint)) as caught:
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
def test_an_expiration_is_converted_to_aware_utc(text: str, at: datetime) -> None:
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
def test_an_expiration_is_refused(text: str) -> None:
    with pytest.raises(KeyFileError, match="expiration"):
        keyfile.parse_expiration(text)


# The whole file


def test_an_invalid_line_is_reported_by_its_number_and_ignored() -> None:
    parsed = keyfile.parse(f"# keys\n\na:{SECRET}\nb:short\nc:{OTHER}\n".encode())
    assert [entry.key_id for entry in parsed.entries] == ["a", "c"]
    assert [complaint.partition(": ")[0] for complaint in parsed.complaints] == ["line 4"]
    assert parsed.error == ""


def test_several_lines_may_share_an_id_but_not_a_key() -> None:
    parsed = keyfile.parse(f"a:{SECRET}:1\na:{OTHER}:2\nb:{HASHED}:3\n".encode())
    assert [(entry.key_id, entry.rate_limit) for entry in parsed.entries] == [("a", 1), ("a", 2)]
    assert parsed.complaints == ("line 3: line 1 has the same key",)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ""),
        (b"\n", ""),
        (b"# no keys\n", ""),
        (b"# no keys", ""),
        (f"a:{SECRET}".encode(), ""),
        (f"a:{SECRET}\n ".encode(), ""),
        (b"\xef\xbb\xbfa:" + SECRET.encode() + b"\n", ""),
        (f"a:{SECRET}\r\nb:{OTHER}\r\n".encode(), ""),
        (f"a:{SECRET}\nb:sha2".encode(), "the last line is incomplete: it has no newline and is invalid"),
        (b"a", "the last line is incomplete: it has no newline and is invalid"),
        (b"a:short\nb:short\n", "no key line is valid"),
        (b"# c\na:short\n", "no key line is valid"),
        (f"a:{SECRET}\n\xff".encode("latin-1"), "the file is not UTF-8 text"),
        (f"a:{SECRET}\n".encode() + b"\0" * 20, "the file is not text: it contains NUL"),
        (f"a:{SECRET}\n".encode("utf-16"), "the file is not UTF-8 text"),
    ],
)
def test_a_file_as_a_whole_is_valid_or_not(data: bytes, error: str) -> None:
    assert keyfile.parse(data).error == error


def test_only_a_newline_ends_a_line() -> None:
    """With str.splitlines a comment could contain a key line."""
    for separator in "\x0b\x0c\r\x1c\x85\u2028":
        assert keyfile.parse(f"# comment{separator}a:{SECRET}\n".encode()).entries == ()


def test_messages_contain_no_part_of_a_line() -> None:
    """Any part of a line may be a secret in the wrong place."""
    rng = random.Random(3)
    for _ in range(2000):
        parts = ["".join(rng.choices("KQXZ", k=12)) for _ in range(4)]
        line = "".join(part + rng.choice([":", " ", "=", "#:", "  "]) for part in parts)
        for message in keyfile.parse(line.encode()).complaints:
            assert not any(part in message for part in parts)


def test_random_bytes_raise_nothing() -> None:
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


def test_read_returns_the_bytes_and_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"# one\n")
    stamp = keyfile.stamp(path)
    assert keyfile.read(path) == b"# one\n"
    assert stamp == keyfile.stamp(path)
    path.write_bytes(b"# three\n")
    assert keyfile.stamp(path) != stamp


def test_read_refuses_other_than_regular_files_and_files_that_are_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(keyfile.FILE_BYTES + 1)
    for name, reason in [("fifo", "not a regular file"), ("", "not a regular file"), ("large", "larger than")]:
        with pytest.raises(OSError, match=reason):
            keyfile.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        keyfile.read(tmp_path / "missing")


def open_below(folder: Path) -> list[str]:
    """Return the open files of this process below a folder. Other tests run at the same time and open other files."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed in the meantime
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
        rng.choice([(), keyfile.parse_networks("10.0.0.0/8"), keyfile.parse_networks("192.0.2.7,2001:db8::/32,::1")]),
        rng.choice([None, 1, 10**15 - 1]),
        rng.choice([None, 1, 10**15 - 1]),
        rng.choice([None, 1, 2**31 - 1]),
        rng.choice([None, ("embed",), ("chat-*", "e?")]),
    )


@pytest.mark.parametrize(
    "text", [f"a:{SECRET}:5;b:{OTHER}", f"# c\n\na:{SECRET}:5\nb:{OTHER}\n", f"a:{SECRET}:5;\r\nb:{OTHER};"]
)
def test_a_list_has_lines_between_semicolons_or_newlines(text: str) -> None:
    parsed = keyfile.parse_list(text)
    assert [(entry.key_id, entry.rate_limit) for entry in parsed.entries] == [("a", 5), ("b", None)]
    assert (parsed.complaints, parsed.error) == ((), "")


def test_an_empty_list_has_no_key_and_no_complaint() -> None:
    assert keyfile.parse_list("") == keyfile.ParsedFile((), ())
    assert keyfile.parse_list("bad; worse").complaints[1].startswith("line 2: a line is key_id:api_key")


def test_given_keys_are_added_unless_the_file_has_their_name_or_key() -> None:
    in_file = keyfile.parse_list(f"a:{SECRET};b:{OTHER}").entries
    new, same, name, key = keyfile.parse_list(f"c:{SECRET}3;a:{SECRET};b:{SECRET}4;d:{OTHER}").entries
    assert keyfile.merge(in_file, (new, same)) == ((*in_file, new), ())
    entries, clashes = keyfile.merge(in_file, (name, new, key))
    assert entries == (*in_file, new)
    assert clashes == tuple(f"the entry {each} does not count: the keys file has that name or key" for each in "bd")


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("10.0.0.0/8,2001:DB8::/32", "10.0.0.0/8,2001:db8::/32"),
        ("192.0.2.7/32,::1/128,::1", "192.0.2.7,::1"),
        ("::ffff:10.0.0.0/104,::ffff:192.0.2.7", "10.0.0.0/8,192.0.2.7"),
        ("::/0,0.0.0.0/0", "::/0,0.0.0.0/0"),
    ],
)
def test_networks_have_one_form(text: str, networks: str) -> None:
    assert keyfile.serialize_networks(keyfile.parse_networks(text)) == networks


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0.0/8", "2001:db8::1/32", "fe80::1%eth0"),
        *("host", "10.0.0.0/-1", "10.0.0.0/08x", "10.0.0.0/8,", "1", "[::1]", "10.0.0.0 /8", "\u0661.0.0.0"),
    ],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(KeyFileError, match="a network is like"):
        keyfile.parse_networks(text)


def test_the_number_of_networks_is_limited() -> None:
    networks = [f"10.0.0.{number}" for number in range(keyfile.MAX_NETWORKS + 1)]
    assert len(keyfile.parse_networks(",".join(networks[1:]))) == keyfile.MAX_NETWORKS
    with pytest.raises(KeyFileError, match="more than 64"):
        keyfile.parse_networks(",".join(networks))


def test_a_serialized_entry_parses_to_the_same_entry() -> None:
    rng = random.Random(5)
    for _ in range(500):
        entry = random_entry(rng)
        line = keyfile.serialize_entry(entry)
        assert line.parsed == entry
        assert keyfile.parse_line(line.text) == entry


def test_default_values_are_not_written() -> None:
    at = utc(2026, 12, 31)
    assert keyfile.serialize_entry(Entry("a", DIGEST)).text == f"a:{HASHED}"
    assert keyfile.serialize_entry(Entry("a", DIGEST, 5), SECRET).text == f"a:{SECRET}:5"
    assert keyfile.serialize_entry(Entry("a", DIGEST, None, at)).text == f"a:{HASHED}::2026-12-31T00:00:00Z"
    every = Entry("a", DIGEST, 0, at, "operator", 2, -1, 9, keyfile.parse_networks("10.0.0.0/8,::1"))
    assert keyfile.serialize_entry(every, SECRET).text == (
        f"a:{SECRET}:0:2026-12-31T00:00:00Z role=operator parallel=2 priority=-1 tokens_per_day=9 from=10.0.0.0/8,::1"
    )


def test_every_field_of_an_entry_is_written() -> None:
    """A field that serialize_entry omits would be lost at the next `set`."""
    default = Entry("a", DIGEST)
    rng = random.Random(6)
    for field in Entry._fields[2:]:
        values = {getattr(random_entry(rng), field) for _ in range(50)} - {getattr(default, field)}
        assert values, f"random_entry in tests/test_keyfile.py never sets {field}: add a value at its end."
        entry = Entry("a", DIGEST, **{field: values.pop()})
        assert keyfile.serialize_entry(entry).text != keyfile.serialize_entry(default).text


@pytest.mark.parametrize(
    "text",
    ["", "\n", "# c\n\n\n", f"# c\r\n  a:{SECRET}:1  \r\n\n#\tend\n", f"a:{SECRET}\nbad\n", "\n\n# naïve \u2028 x\n"],
)
def test_an_unedited_document_is_byte_for_byte_the_same(text: str) -> None:
    assert Document(text.encode()).serialize() == text.encode()


def test_a_serialized_document_ends_with_a_newline() -> None:
    assert Document(f"a:{SECRET}".encode()).serialize() == f"a:{SECRET}\n".encode()


def test_a_document_finds_the_lines_of_a_key() -> None:
    document = Document(f"# a\na:{SECRET}:1\nbad\na:{OTHER}:2\n".encode())
    assert [(index, entry.rate_limit) for index, entry in document.find("a")] == [(1, 1), (3, 2)]
    assert document.find("b") == []
    assert document.lines[1].secret == SECRET
    (complaint,) = document.complaints
    assert complaint == "line 3: a line is key_id:api_key[:rate_limit[:expiration]] followed by name=value options"


def test_an_invalid_file_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"a:{SECRET}\nb:sha".encode())
    with pytest.raises(KeyFileError, match="incomplete"):
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
    """Return what a child process prints. Resource limits and the umask would affect other tests in this process."""
    command = [sys.executable, "-c", IN_CHILD + script, str(SCRIPTS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def names(path: Path) -> list[str]:
    parsed = keyfile.parse(path.read_bytes())
    assert (parsed.complaints, parsed.error) == ((), "")
    return [entry.key_id for entry in parsed.entries]


def busy(_source: str, _target: str) -> None:
    """Fail as os.replace does if the target is a mount point."""
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A keys file with the key `a` between two comments."""
    path = tmp_path / "keys"
    path.write_text(f"# head\na:{SECRET}\n# foot\n")
    path.chmod(0o600)
    return path


def test_a_rewrite_keeps_comments_blank_lines_and_order(path: Path) -> None:
    path.write_text(f"# head\n\n a:{SECRET}:1 \n\t# between\nbad\nb:{OTHER}")
    document = keyfile.rewrite(path, append("c"))
    assert path.read_bytes() == document.serialize()
    assert path.read_text().startswith(f"# head\n\n a:{SECRET}:1 \n\t# between\nbad\nb:{OTHER}\nc:sha256$")


def test_a_rewrite_leaves_no_other_file(path: Path) -> None:
    keyfile.rewrite(path, append("b"))
    assert names(path) == ["a", "b"]
    assert os.listdir(path.parent) == ["keys"]


def test_without_a_change_nothing_is_written(path: Path) -> None:
    before = keyfile.stamp_of(path.stat())
    keyfile.rewrite(path, lambda document: None)
    assert keyfile.stamp_of(path.stat()) == before


def test_a_failed_change_leaves_the_file_as_it_was(path: Path) -> None:
    before = path.read_bytes()

    def fail(document: Document) -> None:
        document.lines.clear()
        raise LookupError

    with pytest.raises(LookupError):
        keyfile.rewrite(path, fail)
    assert path.read_bytes() == before


def test_a_missing_file_is_created_only_with_create(tmp_path: Path) -> None:
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


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of a file")


@as_root
def test_a_file_rewritten_or_created_by_root_keeps_an_owner_that_can_read_it(path: Path) -> None:
    os.chown(path, 1234, 1235)
    keyfile.rewrite(path, append("b"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)
    os.chown(path.parent, 1236, 1237)
    keyfile.rewrite(path.parent / "new", append("a"), create=True)
    assert ((path.parent / "new").stat().st_uid, (path.parent / "new").stat().st_gid) == (1236, 1237)


AS_OTHER_USER = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
os.setgroups([]); os.setgid(1235); os.setuid(1234)
keyfile.rewrite(pathlib.Path(sys.argv[2]), lambda document: document.lines.pop(0))
"""


@as_root
@pytest.mark.parametrize(("owner", "folder_mode"), [(1234, 0o755), (0, 0o777)], ids=["folder", "owner"])
def test_a_file_that_is_writable_but_not_replaceable_is_written_in_place(owner: int, folder_mode: int) -> None:
    """In a read-only folder, or with another owner and a shared group. Owner and inode are kept."""
    with tempfile.TemporaryDirectory() as folder:  # only the owner can enter pytest's own folders
        path = Path(folder, "keys")
        path.write_text(f"# head\na:{SECRET}\n")
        os.chown(path, owner, 1235)
        path.chmod(0o660)
        os.chmod(folder, folder_mode)
        before = path.stat()
        subprocess.run([sys.executable, "-c", AS_OTHER_USER, str(SCRIPTS), str(path)], check=True, env={})
        assert path.read_text() == f"a:{SECRET}\n"
        after = path.stat()
        assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)
        assert os.listdir(folder) == ["keys"]


def test_a_symlink_stays_a_symlink(path: Path) -> None:
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
def test_a_file_that_cannot_be_replaced_is_rewritten_in_place(path: Path, change: Callable[[Document], None]) -> None:
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


def test_a_file_that_is_itself_a_mount_point_is_rewritten(path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not available")
    outside = path.parent / "outside"
    outside.write_text(f"# head\nb:{SECRET}\n")
    command = ["unshare", "-m", "sh", "-c", BIND, "sh", str(path.parent), sys.executable, str(SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert outside.read_text() == f"b:{SECRET}\n"
    assert names(path) == ["a"]


def test_temporary_files_of_killed_writers_are_removed_and_no_others(path: Path) -> None:
    leftover = path.parent / f".keys.{'0' * 16}.tmp"
    others = [".other.0123456789abcdef.tmp", ".keys.tmp", "keys.bak"]
    for name in (leftover.name, *others):
        (path.parent / name).touch()
    (path.parent / f".keys.{'1' * 16}.tmp").mkdir()  # cannot be unlinked, which must not be an error
    keyfile.rewrite(path, append("b"))
    assert sorted(os.listdir(path.parent)) == sorted(["keys", f".keys.{'1' * 16}.tmp", *others])


def test_a_change_by_a_program_that_takes_no_lock_is_not_overwritten(path: Path) -> None:
    def change_with_interference(document: Document) -> None:
        append("b")(document)
        path.write_text(f"z:{OTHER}\n")

    with pytest.raises(OSError, match="changed by another program in the meantime"):
        keyfile.rewrite(path, change_with_interference)
    assert names(path) == ["z"]
    assert os.listdir(path.parent) == ["keys"]


# A limit on the file size takes the place of a full disk.
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


# Volumes that lack something: the same calls in a process whose volume has these faults

ON_A_VOLUME = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
path, warnings = pathlib.Path(sys.argv[2]), []
append = lambda document: document.lines.append(keyfile.serialize_entry(keyfile.Entry("b", b"b" * 32)))
for _ in sys.stdin:
    before, warnings[:] = path.stat(), []
    try:
        keyfile.rewrite(path, append, warn=warnings.append, wait_s=0)
        keyfile.rewrite(path, lambda document: document.lines.pop(1), warn=warnings.append, wait_s=0)
        keyfile.rewrite(path.with_name("new"), append, create=True, warn=warnings.append, wait_s=0)
    except OSError as error:
        warnings[:] = [f"error: {error.strerror}"]
    print(*sorted(set(warnings)), sep="; ", flush=True)
"""
LACKS = {
    "flock, ENOLCK": ([Fault("flock", errno=errno.ENOLCK)], ["no file locks"]),
    "flock, ENOSYS": ([Fault("flock", errno=errno.ENOSYS)], ["no file locks"]),
    "flock, EOPNOTSUPP": ([Fault("flock", errno=errno.EOPNOTSUPP)], ["no file locks"]),
    "flock, EINVAL": ([Fault("flock", errno=errno.EINVAL)], ["no file locks"]),
    "fsync, EINVAL": ([Fault("fsync", errno=errno.EINVAL)], ["cannot sync"]),
    "fsync, ENOSYS": ([Fault("fsync", errno=errno.ENOSYS)], ["cannot sync"]),
    "rename, ENOSYS": ([Fault("rename", errno=errno.ENOSYS)], ["changed in place"]),
    "rename, EOPNOTSUPP": ([Fault("rename", errno=errno.EOPNOTSUPP)], ["changed in place"]),
    "rename, EXDEV": ([Fault("rename", errno=errno.EXDEV)], ["changed in place"]),
    "rename, EEXIST": ([Fault("rename", errno=errno.EEXIST)], ["changed in place"]),
    "rename, EINVAL": ([Fault("rename", errno=errno.EINVAL)], ["changed in place"]),
    "inodes": ([Fault("stat", wrong=True), Fault("fstat", wrong=True)], []),
    "rename and truncate": (
        [Fault("rename", errno=errno.ENOSYS), Fault("truncate", errno=errno.ENOSYS)],
        ["cannot shorten a file", "changed in place"],
    ),
    "all": (
        [
            *(Fault(call, errno=errno.ENOSYS) for call in ("flock", "fsync", "rename")),
            *(Fault(call, wrong=True) for call in ("stat", "fstat")),
        ],
        ["cannot sync", "no file locks", "changed in place"],
    ),
}


def test_keys_can_be_made_and_revoked_on_a_volume_that_lacks_something(path: Path) -> None:
    faults, before = make_faults(path.parent), path.read_bytes()
    (path.parent / "volume").mkdir()
    path = path.rename(path.parent / "volume" / "keys")
    command = [sys.executable, "-c", ON_A_VOLUME, str(SCRIPTS), str(path)]
    seen = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(faults)
    ) as program:
        assert program.stdin
        assert program.stdout
        for name, (lacking, _) in LACKS.items():
            path.write_bytes(before)
            path.with_name("new").unlink(missing_ok=True)
            with faults.during(*lacking):
                print(file=program.stdin, flush=True)
                warnings = program.stdout.readline()
            seen[name] = (names(path), names(path.with_name("new")), len(os.listdir(path.parent)), warnings)
        program.stdin.close()
    assert {name: found[:3] for name, found in seen.items()} == dict.fromkeys(LACKS, (["b"], ["b"], 2))
    for name, (_, parts) in LACKS.items():
        warned = [warning for warning in seen[name][3].strip().split("; ") if warning]
        assert len(warned) == len(parts), warned
        assert all(any(part in warning for warning in warned) for part in parts), (name, warned)


def test_a_failing_disk_keeps_the_old_file(path: Path) -> None:
    faults, before = make_faults(path.parent), path.read_bytes()
    faults.set(Fault("fsync", errno=errno.EIO))
    command = [sys.executable, "-c", ON_A_VOLUME, str(SCRIPTS), str(path)]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, env=environment(faults), check=True)
    assert done.stdout == "error: Input/output error\n"
    assert path.read_bytes() == before


def test_a_file_that_was_replaced_outside_of_its_mount_is_reported(path: Path) -> None:
    with open(path) as file:
        path.unlink()
        mounted = Path(f"/proc/self/fd/{file.fileno()}")
        if not mounted.exists():
            pytest.skip("no /proc here")
        assert "mount its folder" in keyfile.detached(mounted.stat())
    assert keyfile.detached(path.parent.stat()) == ""


# The lock


def test_waiting_for_a_lock_ends_after_the_timeout(path: Path) -> None:
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="locked by another program"):
            keyfile.rewrite(path, append("b"), wait_s=0.02)
    keyfile.rewrite(path, append("b"), wait_s=0)
    assert names(path) == ["a", "b"]


def test_a_file_that_was_replaced_cannot_be_locked(path: Path) -> None:
    """A lock on the old inode does not protect the file that now has the name."""
    old = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        assert not keyfile.try_lock(old, str(path))
        path.write_text(f"z:{OTHER}\n")
        assert not keyfile.try_lock(old, str(path))
    finally:
        os.close(old)
    keyfile.rewrite(path, append("b"), wait_s=0)
    assert names(path) == ["z", "b"]


def test_a_file_that_is_replaced_while_it_is_rewritten_is_not_overwritten(path: Path) -> None:
    def change_with_interference(document: Document) -> None:
        append("b")(document)
        path.unlink()
        path.write_text(f"z:{OTHER}\n")

    with pytest.raises(OSError, match="changed by another program in the meantime"):
        keyfile.rewrite(path, change_with_interference)
    assert names(path) == ["z"]


WRITER = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
for number in range(int(sys.argv[4])):
    entry = keyfile.Entry(f"{sys.argv[3]}{number}", hashlib.sha256(f"{sys.argv[3]}{number}".encode()).digest())
    keyfile.rewrite(pathlib.Path(sys.argv[2]), lambda d: d.lines.append(keyfile.serialize_entry(entry)), create=True)
"""


WATCHED = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import keyfile
path, stamps = pathlib.Path(sys.argv[2]), []

def trace(frame, event, argument):
    # Whenever another program could take the lock, note what the file looks like to it.
    if frame.f_code.co_filename != keyfile.__file__:
        return None
    if path.exists():
        with path.open("rb") as file:
            if keyfile.try_lock(file.fileno(), str(path)):
                stamps.append(keyfile.stamp(path))
    return trace

entry = keyfile.Entry("a", hashlib.sha256(b"a").digest())
sys.settrace(trace)
keyfile.rewrite(path, lambda document: document.lines.append(keyfile.serialize_entry(entry)), create=True)
sys.settrace(None)
print(len(set(stamps)), len({stamp[1] for stamp in stamps}))
"""


def test_a_new_file_is_changed_under_the_lock_only(tmp_path: Path) -> None:
    """Else a writer that has taken the lock would take it for a change by a program that takes none."""
    words = [sys.executable, "-c", WATCHED, SCRIPTS, tmp_path / "keys"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.split() == ["2", "2"]  # the empty file, and the one that replaces it


def test_two_concurrent_writers_lose_no_change(tmp_path: Path) -> None:
    path, changes = tmp_path / "keys", 40
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(SCRIPTS), str(path), name, str(changes)]) for name in "ab"
    ]
    assert [writer.wait(PATIENCE_S) for writer in writers] == [0, 0]
    assert sorted(names(path)) == sorted(f"{name}{number}" for name in "ab" for number in range(changes))
    for name in "ab":
        assert [key for key in names(path) if key[0] == name] == [f"{name}{number}" for number in range(changes)]


# Killed writers

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
    # Counts the lines of keyfile.py that run after the change. Nothing is written before it.
    def change(document):
        if longer:
            document.lines.append(keyfile.serialize_entry(keyfile.Entry("b", bytes(32))))
        else:
            del document.lines[1]
        sys.settrace(trace)
        frame = sys._getframe(1)
        while frame is not None:
            frame.f_trace, frame = trace, frame.f_back

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != keyfile.__file__:
            return None
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

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
    assert not parsed.complaints and not parsed.error, path.read_bytes()
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
def test_a_writer_killed_at_any_line_leaves_the_old_or_the_new_file(
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
