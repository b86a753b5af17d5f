"""added_members.py: members at the end of an object, in a body of any spelling and in any pieces."""

import json
from collections.abc import Sequence

import pytest

from http1.added_members import with_members
from http1.json_members import MemberReader, Members, NameTable

TABLE = NameTable(("id_slot",))


def members_of(body: bytes) -> Members:
    reader = MemberReader(TABLE)
    reader.feed(body)
    while reader.step():
        pass
    return reader.end()


def changed(pieces: Sequence[bytes]) -> bytes:
    body = b"".join(pieces)
    new, added = with_members(pieces, members_of(body), {"id_slot": 3, "cache_prompt": True})
    assert sum(map(len, new)) == len(body) + added
    return b"".join(new)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"id_slot":3,"cache_prompt":true}'),
        (b" { } \n", b' { "id_slot":3,"cache_prompt":true} \n'),
        (b'{"a": [1, {}] }', b'{"a": [1, {}] ,"id_slot":3,"cache_prompt":true}'),
        (b'{"id_slot": 1}', b'{"id_slot": 1,"id_slot":3,"cache_prompt":true}'),
        (b'{"a": "}"}\0 {}', b'{"a": "}","id_slot":3,"cache_prompt":true}\0 {}'),
    ],
)
def test_members_are_the_last_of_the_object(body: bytes, expected: bytes) -> None:
    assert changed([body]) == expected
    for at in range(1, len(body)):
        assert changed([body[:at], body[at:]]) == expected


def test_the_last_of_equal_names_counts() -> None:
    assert json.loads(changed([b'{"id_slot": 1, "cache_prompt": false, "\\u0069d_slot": 2}'])) == {
        "id_slot": 3,
        "cache_prompt": True,
    }
