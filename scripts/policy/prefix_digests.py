"""Digests of a body's prefixes, by which a conversation is recognised without keeping any of its text.

A conversation's next request repeats the body of the one before up to its last message. Each digest covers all bytes
before its place, so two bodies with the same digest have the same prefix.
"""

import secrets
from collections.abc import Iterable
from hashlib import blake2b

# Close together at first, since short conversations differ early; no further than takes a fraction of a millisecond.
_PLACES = (*range(64, 4096, 64), *range(4096, (256 << 10) + 1, 1024))
_KEY = secrets.token_bytes(32)  # so that a digest says nothing about a guessed text
_DIGEST_BYTES = 16

Digests = tuple[bytes, ...]


def prefix_digests(pieces: Iterable[bytes | bytearray]) -> Digests:
    """Return the digests of the body that these pieces make."""
    body = _start_of(pieces)
    running = blake2b(key=_KEY, digest_size=_DIGEST_BYTES)
    digests: list[bytes] = []
    at = 0
    for place in _PLACES:
        if place > len(body):
            break
        running.update(body[at:place])
        digests.append(running.copy().digest())
        at = place
    return tuple(digests)


def _start_of(pieces: Iterable[bytes | bytearray]) -> bytes:
    start = bytearray()
    for piece in pieces:
        start += piece[: _PLACES[-1] - len(start)]
        if len(start) >= _PLACES[-1]:
            break
    return bytes(start)


def common_length(one: Digests, other: Digests) -> int:
    """Return how many digests two bodies have in common, from the first on."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
