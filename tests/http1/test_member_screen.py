"""A screen that says that no member is there is never wrong, and it clears usual bodies."""

import json
import random

import pytest

from http1.member_screen import OVERLAP_BYTES, MemberScreen, brackets

NAMES, LISTS = ("n", "n_cmpl"), ("prompt", "input")
SCREEN = MemberScreen(NAMES, LISTS)
LONG = "the quick brown fox jumps over the lazy dog\n" * 500


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


@pytest.mark.parametrize("seed", range(30))
def test_what_is_cleared_has_no_such_member(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        whole = body(rng)
        if has_member(whole):
            assert SCREEN.may_have(whole)
            at = rng.randrange(len(whole))
            first, second = whole[:at], whole[at:]
            junction = first[-OVERLAP_BYTES:] + second[:OVERLAP_BYTES]
            assert SCREEN.may_have(first) or SCREEN.may_have(second) or SCREEN.may_have(junction), (first, second)


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
    assert not SCREEN.may_have(json.dumps(members).encode())


def test_an_escaped_letter_far_within_a_string_is_not_in_a_name() -> None:
    assert not SCREEN.may_have(b'{"content":"%b\\u006e%b"}' % (b"x" * 2000, b"x" * 2000))


def test_a_screen_for_lists_alone_or_for_names_alone_or_for_nothing() -> None:
    assert not MemberScreen((), ()).may_have(b'{"n": 2, "input": ["x"], "\\u006e": 2}')
    assert not MemberScreen((), ("input",)).may_have(b'{"n": 2, "input": "x"}')
    assert MemberScreen((), ("input",)).may_have(b'{"input": ["x"]}')
    assert not MemberScreen(("n",), ()).may_have(b'{"input": ["x"]}')
    assert not MemberScreen(("n",), ()).may_have(b'{"": "%b"}' % (b"x" * 9000))
    assert MemberScreen(("n",), ()).may_have(b'{"n": "%b"}' % (b"x" * 9000))


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
@pytest.mark.parametrize("spans", [(990, 1100), (2020, 2120)])
def test_a_member_is_seen_wherever_in_a_large_body_it_is(spans: tuple[int, int], member: bytes) -> None:
    for before in range(*spans):
        assert SCREEN.may_have(b'{"a":"%b",%b,"b":1}' % (b"x" * before, member)), before
        assert SCREEN.may_have(b'{%b%b,"b":1}' % (b'"a":1,' * (before // 6) + b" " * (before % 6), member)), before


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
    counted = brackets(text.ljust(size), most)
    assert counted == found if found <= most else counted > most
