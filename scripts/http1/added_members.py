"""Members added to a JSON request body, at the end of its object: of two with the same name the last one counts."""

import json
from collections.abc import Iterable, Mapping, Sequence

from http1.json_members import Members


def with_members(
    pieces: Iterable[bytes | bytearray], members: Members, added: Mapping[str, bool | int | float | str]
) -> tuple[Sequence[bytes | bytearray], int]:
    """Add members at the end of the object in a body; return the new pieces, and how many bytes were added.

    `members` is what was found in the body, which must be an object.
    """
    assert members.end is not None  # the caller has seen that it is an object
    text = json.dumps(added, separators=(",", ":"))[1:-1].encode()
    if text and not members.is_empty:
        text = b"," + text
    changed: list[bytes | bytearray] = []
    at = 0
    for piece in pieces:
        place = members.end - at
        at += len(piece)
        if 0 <= place < len(piece):
            changed += (piece[:place], text, piece[place:])
        else:
            changed.append(piece)
    return changed, len(text)
