"""Members of a JSON body, found as llama-server would find them, whatever its size, shape, spelling and pieces."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

import pytest

from http1.json_members import NO_MEMBERS, JsonType, Member, MemberReader, Members, NameTable

NAMES = ("n", "n_cmpl", "prompt", "input", "stream", "model")
TABLE = NameTable(NAMES)
Document = dict[str, object] | list[object] | str | int | float | bool | None


def read(pieces: Iterable[bytes]) -> Members:
    reader = MemberReader(TABLE)
    for piece in pieces:
        reader.feed(piece)
        while reader.step():
            pass
    return reader.end()


def found(body: bytes) -> dict[str, object]:
    """The members' values; of a list its length, of an object {}."""
    return {name: shown(member) for name, member in read([body]).found.items()}


def shown(member: Member) -> object:
    if member.type is JsonType.LIST:
        return [member.length]
    return {} if member.type is JsonType.OBJECT else member.value


def depth_of(body: bytes) -> int:
    """The deepest nesting, also in values that a later member of the same name replaces."""

    def depth(value: object) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    pairs = json.loads(body, strict=False, object_pairs_hook=lambda members: [value for _, value in members])
    return depth(pairs)


TYPES = {bool: JsonType.BOOLEAN, int: JsonType.NUMBER, float: JsonType.NUMBER, str: JsonType.STRING}


def expected(body: bytes) -> Members:
    """What `json` finds in a body."""
    try:
        whole = json.loads(body, strict=False)
    except ValueError:
        return Members({}, 0, None, True)
    if not isinstance(whole, dict):
        return Members({}, depth_of(body), None, True)
    members = {name: member_of(value) for name, value in whole.items() if name in NAMES}
    return Members(members, depth_of(body), body.rindex(b"}"), not whole)


def member_of(value: object) -> Member:
    if value is None:
        return Member(JsonType.NULL)
    if isinstance(value, list):
        numbers = any(type(element) in (int, float) for element in value)
        return Member(JsonType.LIST, None, len(value), numbers)
    if isinstance(value, dict):
        return Member(JsonType.OBJECT)
    assert isinstance(value, bool | int | float | str)
    return Member(TYPES[type(value)], value)


def without_sizes(members: Members) -> Members:
    return members._replace(
        found={name: replace(member, size_bytes=0, start=None) for name, member in members.found.items()}
    )


# --- Seeded bodies ---


def text(rng: random.Random) -> str:
    alphabet = rng.choice(("ab", 'n"\\{}[]:,', "é\u20ac\x01\n\t/", "x", "\\", '"'))
    return "".join(rng.choice(alphabet) for _ in range(rng.choice((0, 1, 1, 2, 5, 9, 30, 150))))


def scalar(rng: random.Random) -> object:
    number = rng.choice((0, 1, -1, 4, 12345678901234567890, 1.5, -2e-7, 1e30))
    return rng.choice((number, True, False, None, text(rng), rng.choice(NAMES)))


def value(rng: random.Random, depth: int = 0) -> object:
    if depth > 5 or rng.random() < 0.5:
        return scalar(rng)
    length = rng.choice((0, 1, 2, 3, 8))
    if rng.random() < 0.5:
        return [value(rng, depth + 1) for _ in range(length)]
    return {name(rng): value(rng, depth + 1) for _ in range(length)}


def name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else text(rng)


def spelt(rng: random.Random, text: str) -> bytes:
    """A string with some of its characters escaped that need not be."""
    whole = json.dumps(text, ensure_ascii=rng.random() < 0.5)[1:-1]
    if "\\" not in whole and rng.random() < 0.4:
        whole = "".join(f"\\u{ord(char):04x}" if rng.random() < 0.5 and ord(char) < 0x10000 else char for char in whole)
    return b'"' + whole.encode() + b'"'


def blanks(rng: random.Random) -> bytes:
    return b"" if rng.random() < 0.7 else bytes(rng.choice(b" \t\r\n") for _ in range(rng.choice((1, 2, 70))))


def encoded(rng: random.Random, value: object) -> bytes:
    if isinstance(value, dict):
        members = [
            blanks(rng) + spelt(rng, name) + blanks(rng) + b":" + encoded(rng, member) for name, member in value.items()
        ]
        if members and rng.random() < 0.3:  # a name that stands twice
            members.append(blanks(rng) + spelt(rng, rng.choice(list(value))) + b":" + encoded(rng, scalar(rng)))
        return blanks(rng) + b"{" + b",".join(members) + blanks(rng) + b"}" + blanks(rng)
    if isinstance(value, list):
        elements = b",".join(encoded(rng, element) for element in value)
        return blanks(rng) + b"[" + elements + blanks(rng) + b"]" + blanks(rng)
    plain = spelt(rng, value) if isinstance(value, str) else json.dumps(value).encode()
    return blanks(rng) + plain + blanks(rng)


def body(rng: random.Random) -> bytes:
    whole = encoded(rng, {name(rng): value(rng) for _ in range(rng.choice((0, 1, 2, 5, 9)))})
    if rng.random() < 0.25:  # no JSON any more, most likely
        at = rng.randrange(len(whole) + 1)
        whole = whole[:at] + rng.choice((b"", b",", b"}", b"]", b'"', b"x", b"{", b"\\", b"1")) + whole[at + 1 :]
    return whole


def torn(rng: random.Random, whole: bytes) -> Sequence[bytes]:
    cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.choice((1, 2, 5, 40))))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@pytest.mark.parametrize("seed", range(24))
def test_members_are_those_of_json_however_the_body_is_torn(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        whole = body(rng)
        once = read([whole])
        want = expected(whole)
        if want.end is not None or not is_lenient(whole):
            assert without_sizes(once)._replace(depth=0) == want._replace(depth=0), whole
        if want.end is not None:
            assert once.depth == want.depth, whole
        assert read([whole[at : at + 1] for at in range(len(whole))]) == once, whole
        for _ in range(4):
            pieces = torn(rng, whole)
            assert read(pieces) == once, pieces


def is_lenient(whole: bytes) -> bool:
    """Whether a body is wrong in what the reader does not check: an escape or a number."""
    return read([whole]).end is not None


@pytest.mark.parametrize("seed", range(6))
def test_every_tear_in_two_gives_the_same(seed: int) -> None:
    rng = random.Random(1000 + seed)
    whole = b"".join((b'{"model":"m",', body(rng)[1:], b""))[:600]
    once = read([whole])
    for at in range(len(whole)):
        assert read([whole[:at], whole[at:]]) == once, (whole, at)


# --- Each rule by itself ---


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (b'{"n": 4}', {"n": 4}),
        (b'\xef\xbb\xbf{"n": 4}', {"n": 4}),
        (b'{"n": 1, "n": 4}', {"n": 4}),
        (b'{"n": 4, "a": [{"n": 1}], "b": "\\"n\\": 1"}', {"n": 4}),
        (b'{"\\u006e": 4}', {"n": 4}),
        (b'{"\\u006e": 4, "n": 2, "\\u006E": 3, "x": 1}', {"n": 3}),
        (b'{"n": 4, "n": null}', {"n": None}),
        (b'{"n": [1, 2]}', {"n": [2]}),
        (b'{"n": {}}', {"n": {}}),
        (b'{"n": 4}\n\t \r', {"n": 4}),
        (b'{"n": 4}\0 anything', {"n": 4}),
        (b'{"n": "%b"}' % (b"x" * 5000), {"n": None}),
        (b'{"n": 1%b}' % (b"0" * 5000), {"n": inf}),
        (b'{"n": 1.2.3, "m": 1}', {"n": None}),
        (b'{"n": "\\x", "m": 1}', {"n": None}),
        (b'{"\\x": 1, "n": 4, "m": 1}', {"n": 4}),
        (b'{"%b": 1, "n": 4}' % (b"x" * 5000), {"n": 4}),
        (b'{"a": "%b", "n": 4}' % (b'\\"' * 5000), {"n": 4}),
        (b'{"a": "%b", "n": 4}' % (b"\\\\" * 5000), {"n": 4}),
        (b'{"a": %b1%b, "n": 4}' % (b"[" * 5000, b"]" * 5000), {"n": 4}),
    ],
)
def test_a_member_is_found_as_llama_server_reads_it(body: bytes, want: dict[str, object]) -> None:
    assert found(body) == want
    assert without_sizes(read([body[at : at + 1] for at in range(len(body))])) == without_sizes(read([body]))


def test_a_long_number_at_the_end_of_a_body_is_a_number() -> None:
    assert read([b'{"n": ' + b"9" * 300 + b"}"]).found["n"].type is JsonType.NUMBER


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"4",
        b'"n"',
        b"[]",
        b'[{"n": 4}]',
        b'\xef\xbb{"n": 4}',
        b'\xef{"n": 4}',
        b"\xef",
        b' \xef\xbb\xbf{"n": 4}',
        b'{"n": 4',
        b'{"n": 4, }',
        b'{"n": 4]',
        b'{"n": 4}}',
        b'{"n": 4} x',
        b'[{"n": 4}]\0',
        b'{"n": 4 "m": 1}',
        b'{"n" 4}',
        b"{n: 4}",
        b'{"n": tru}',
        b'{"n": t',
        b'{"n": -}',
        b'{"n": -',
        b'{"n": \0}',
        b'{"n": 4, // comment\n"m": 1}',
        b"{'n': 4}",
        b'{"n": 4, "a": [1,]}',
        b'{"n": 4, "a": "\\',
        b'{"n": 4, "a',
        b"n=4&stream=true",
    ],
)
def test_nothing_is_found_in_what_is_no_json_object(body: bytes) -> None:
    assert read([body])._replace(depth=0) == NO_MEMBERS
    assert read([body[at : at + 1] for at in range(len(body))])._replace(depth=0) == NO_MEMBERS


def test_a_list_is_counted_and_its_numbers_are_seen() -> None:
    members = read([b'{"prompt": ["a", ["b", "c"], {"d": 1}, []], "input": ["a", 1, [2]], "n": [[1], []] }']).found
    assert [(each.length, each.has_numbers) for each in members.values()] == [(4, False), (3, True), (2, False)]


def test_the_end_of_the_object_is_where_a_member_can_be_added() -> None:
    for body in (b' { "a" : [ {} ] } ', b"\xef\xbb\xbf{}", b'{"n":"}"}\0}'):
        members = read([body])
        assert members.end is not None
        added = body[: members.end] + (b"" if members.is_empty else b",") + b'"model":"m"' + body[members.end :]
        assert found(added)["model"] == "m"
        assert json.loads(added.decode("utf-8-sig").partition("\0")[0])["model"] == "m"


def test_the_size_of_a_value_is_that_of_its_spelling() -> None:
    body = b'{"prompt": ["a", {"b": "\\u0063"}], "input": "ab\\n", "n": 1.50 , "model":"%b"}' % (b"x" * 3000)
    sizes = {name: member.size_bytes for name, member in read([body]).found.items()}
    assert sizes == {"prompt": 22, "input": 6, "n": 4, "model": 3002}


@pytest.mark.parametrize("unit", [b"{},", b"1,", b'"n":4,', b'"a":{"b":[]},', b"[[[[[1]]]]],", b"[", b'"x\\"",'])
def test_a_step_passes_a_bounded_part_of_any_body(unit: bytes) -> None:
    reader = MemberReader(TABLE)
    start = b'{"a":0,' if b":" in unit else b'{"a":['
    reader.feed(start + unit * 50_000)
    steps = 0
    while reader.step():
        steps += 1
    assert steps >= 8


def test_a_name_with_its_colon_and_an_empty_list_take_a_move_each() -> None:
    reader = MemberReader(TABLE)
    units, moves, cost = 10_000, 5, 64  # the name, two brackets, an empty list, and a comma
    reader.feed(b"{" + b'"a":[[]],' * units)
    steps = 0
    while reader.step():
        steps += 1
    assert steps <= units * (moves * cost + len(b'"a":[[]],')) / 8192


def test_bytes_after_the_end_change_nothing() -> None:
    assert found(b'{"n": 4}\0{"n": 5}') == {"n": 4}
    reader = MemberReader(TABLE)
    for piece in (b'{"n": 4}\0', b'"', b"{", b'"\\'):
        reader.feed(piece)
        assert not reader.step()
    assert reader.end().found["n"].value == 4


@pytest.mark.parametrize("digits", [99, 100, 101, 150, 600, 1021, 1022, 1023, 1024, 1100, 5000])
@pytest.mark.parametrize("tail", [b"", b', "model": "' + b"x" * 2000 + b'"'])
def test_a_long_number_hides_no_member(digits: int, tail: bytes) -> None:
    number = b"4." + b"0" * digits
    for body in (
        b'{"n": ' + number + tail + b', "stream": true}',
        b'{"x": ' + number + b', "n": 4' + tail + b', "stream": true}',
        b'{"x": [1, {"y": ' + number + b'}], "n": 4' + tail + b', "stream": true}',
    ):
        for pieces in ([body], [body[:60], body[60:]], [bytes((char,)) for char in body]):
            members = read(pieces).found
            assert members["stream"].value is True
            n = members["n"].value
            assert isinstance(n, int | float)
            assert n >= 4
            assert n == 4 or digits > 1000
