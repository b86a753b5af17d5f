"""A screen that says that no member is there is never wrong, and it clears usual bodies."""

import itertools
import json
import random
import re

import pytest

from http1.member_screen import OVERLAP_BYTES, MemberScreen, shortened

NAMES, LISTS = ("n", "n_cmpl"), ("prompt", "input")
SCREEN = MemberScreen(NAMES, LISTS)
LONG = "the quick brown fox jumps over the lazy dog\n" * 500


def may_have(text: bytes, screen: MemberScreen = SCREEN) -> bool:
    """Whether such a member or address may begin in a part of a body."""
    return screen.brackets(text) is None


def has_member(body: bytes) -> bool:
    whole = json.loads(body)
    return any(name in whole for name in NAMES) or any(isinstance(whole.get(name), list) for name in LISTS)


def spelt(rng: random.Random, text: str) -> str:
    if rng.random() < 0.5:
        return json.dumps(text)
    return '"' + "".join(f"\\u{ord(char):04x}" if rng.random() < 0.5 else json.dumps(char)[1:-1] for char in text) + '"'


def body(rng: random.Random) -> bytes:
    names = ["n", "n_cmpl", "prompt", "input", "names", "a", "stream", "no", '"n"', "\\"]
    values = ["1", '"x"', '"n"', "[]", "[1]", '["a", "b"]', '{"n": 1}', "null", json.dumps('"n": 2'), json.dumps(LONG)]
    blank = rng.choice(("", " ", "\n\t "))
    members = [
        spelt(rng, rng.choice(names)) + blank + ":" + blank + rng.choice(values) for _ in range(rng.randrange(40))
    ]
    return ("{" + ",".join(members) + "}").encode()


def torn(rng: random.Random, text: bytes) -> list[bytes]:
    """Return a text in up to five pieces, mostly torn near a quote."""
    near = [match.start() for match in re.finditer(b'"', text)] or [0]
    places = [rng.choice(near) + rng.randrange(-40, 60) for _ in range(4)]
    cuts = sorted(min(max(place, 0), len(text)) for place in places)
    return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_cleared_has_no_such_member(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        whole = body(rng)
        if has_member(whole):
            assert may_have(whole)
            at = rng.randrange(len(whole))
            first, second = whole[:at], whole[at:]
            junction = first[-OVERLAP_BYTES:] + second[:OVERLAP_BYTES]
            assert may_have(first) or may_have(second) or may_have(junction), (first, second)
            pieces = torn(rng, whole)
            assert may_have(b"".join(map(shortened, pieces))), pieces


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"messages": [{"role": "user", "content": "hello"}], "stream": True},
        {"messages": [{"role": "user", "content": LONG}], "stream": True},
        {"messages": [{"role": "user", "content": f"{number} {LONG[:90]}"} for number in range(99)]},
        {"messages": [{"role": "user", "content": "Grüße, \u65e5\u672c"}]},
        {"messages": [{"role": "user", "content": LONG + "Grüße, \u65e5\u672c"}]},
        {"prompt": "hello"},
        {"prompt": LONG, "input": LONG},
        {"names": ["n."], "no": "an n"},
    ],
)
def test_a_usual_body_is_cleared(members: dict[str, object]) -> None:
    assert not may_have(json.dumps(members).encode())


def test_an_escaped_letter_far_within_a_string_is_not_in_a_name() -> None:
    assert not may_have(b'{"content":"%b\\u006e%b"}' % (b"x" * 2000, b"x" * 2000))


def test_a_screen_for_lists_alone_or_for_names_alone_or_for_nothing() -> None:
    assert not may_have(b'{"n": 2, "input": ["x"], "\\u006e": 2}', MemberScreen((), ()))
    assert not may_have(b'{"n": 2, "input": "x"}', MemberScreen((), ("input",)))
    assert may_have(b'{"input": ["x"]}', MemberScreen((), ("input",)))
    assert not may_have(b'{"input": ["x"]}', MemberScreen(("n",), ()))
    assert not may_have(b'{"": "%b"}' % (b"x" * 9000), MemberScreen(("n",), ()))
    assert may_have(b'{"n": "%b"}' % (b"x" * 9000), MemberScreen(("n",), ()))


@pytest.mark.parametrize(
    "member",
    [
        b'"n_cmpl":2',
        b'"n_cmp\\u006C":2',
        b'"\\u006e_\\u0063mpl":2',
        b'"prompt":["x"]',
        b'"prompt"' + b" " * 99 + b":" + b" " * 99 + b'["x"]',
    ],
)
# The windows of a body with many quotes end near these.
@pytest.mark.parametrize("spans", [(90, 140), (350, 400), (860, 910), (1890, 1940), (3940, 3990), (8030, 8080)])
def test_a_member_is_seen_wherever_in_a_large_body_it_is(spans: tuple[int, int], member: bytes) -> None:
    for before in range(*spans):
        string = b'{"a":"%b",%b,"b":1}' % (b"x" * before, member)
        dense = b'{%b%b,"b":1}' % (b'"a":1,' * (before // 6) + b" " * (before % 6), member)
        for text in (string, dense):
            assert may_have(text), before
            assert SCREEN.is_suspect(text), before


@pytest.mark.parametrize(
    ("text", "most", "found"),
    [
        (b"", 2, 0),
        (b'{"a":[]}', 2, 2),
        (b"[[[", 2, 3),
        (b"[" * 9, 2, 9),
        (b"{" * 9, 2, 9),
        (b"[{" * 9, 2, 18),
        (b"{[", 0, 2),
    ],
)
@pytest.mark.parametrize("size", [0, 1024, 1 << 20], ids=["short", "long", "very long"])
def test_brackets_are_counted_as_far_as_they_matter(text: bytes, most: int, found: int, size: int) -> None:
    screen = MemberScreen((), (), max_depth=most)
    counted = screen.brackets(text.ljust(size))
    assert counted is not None
    assert counted == found if found <= most else counted > most
    assert screen.is_suspect(text.ljust(size)) == (found > most)


def test_brackets_within_a_long_string_are_not_counted() -> None:
    screen = MemberScreen(("n",), (), max_depth=9)
    text = b'{"content":"%b%b%b","a":[1]}' % (b"words " * 99, b"[{" * 99, b"words " * 99)
    assert screen.brackets(text) == 2
    assert not screen.is_suspect(text)


@pytest.mark.parametrize("filler", [b" \t\r\n", b"1,", b"true,", b"false,", b"null,", b"-1.5E+7,2e3,"])
@pytest.mark.parametrize("end", [b"", b'"x"'])
def test_brackets_that_are_in_no_string_count_however_far_a_quote_is(filler: bytes, end: bytes) -> None:
    screen = MemberScreen(("n",), (), max_depth=10_000)
    text = b'{"a":%b[%b[%b' % (filler * 99, filler * 999, end)
    assert screen.brackets(text) == 3


def test_brackets_between_two_windows_count() -> None:
    screen = MemberScreen(("n",), (), max_depth=99)
    for before in range(90, 160):
        counted = screen.brackets(b'["x",%b,[[[1,"y","z"]]]]' % (b"1" * before))
        assert counted is not None
        assert counted >= 4, before


@pytest.mark.parametrize("address", ["http", "file:"])
def test_an_address_is_seen_in_any_case(address: str) -> None:
    screen = MemberScreen((), (), addresses=True)
    for upper in range(1 << len(address)):
        spelt = "".join(sign.upper() if upper >> at & 1 else sign for at, sign in enumerate(address))
        assert may_have(b'{"url":"%b//a"}' % spelt.encode(), screen), spelt
        assert not may_have(b'{"url":"%b//a"}' % spelt[:-1].encode(), screen), spelt


def test_an_address_with_an_escape_is_seen_wherever_it_begins() -> None:
    screen = MemberScreen((), (), addresses=True)
    for before in range(90, 150):
        url = b"\\u0068ttp://" + b"a/" * 999
        assert may_have(b'{"a":"%b","url":"%b"}' % (b"x" * before, url), screen), before


def nested(rng: random.Random, depth: int) -> str:
    """Return JSON that is nested so deeply, with up to a thousand blanks, digits or letters before each level."""
    text, ends = "", ""
    for _ in range(depth):
        size = rng.randrange(1000)
        values = ("", " " * size, "1" * size + "2,", f'"{"[" * size}",', json.dumps(LONG[:size]) + ",")
        value = rng.choice(values)
        if rng.random() < 0.5:
            text, ends = text + "[" + value, "]" + ends
        else:
            text, ends = text + "{" + ('"b":' if value.endswith(",") else "") + value + '"a":', "}" + ends
    return text + "1" + ends


@pytest.mark.parametrize("seed", range(40))
def test_a_body_that_is_nested_too_deeply_is_suspect(seed: int) -> None:
    rng = random.Random(seed)
    screen = MemberScreen(NAMES, LISTS, max_depth=12)
    text = nested(rng, rng.randrange(13, 30))
    json.loads(text)
    assert screen.is_suspect(text.encode())
