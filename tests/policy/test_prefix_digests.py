"""prefix_digests.py: conversations are recognised by their prefixes, without their text."""

import random

from policy.prefix_digests import common_length, prefix_digests


def test_a_body_has_the_same_digests_in_any_pieces() -> None:
    body = random.Random(1).randbytes(20_000)
    whole = prefix_digests([body])
    assert prefix_digests([body[:1], body[1:7000], bytearray(body[7000:])]) == whole
    assert len(whole) > 64


def test_bodies_have_in_common_what_comes_before_their_first_difference() -> None:
    body = random.Random(2).randbytes(3000)
    whole = prefix_digests([body])
    for at in (0, 63, 64, 1000, 2999):
        other = prefix_digests([body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]])
        assert common_length(whole, other) == min(at // 64, len(whole))
    assert common_length(whole, prefix_digests([body + b"more" * 100])) == len(whole)
    assert common_length(whole, ()) == 0


def test_a_short_body_has_none_and_a_huge_one_has_a_bounded_number() -> None:
    assert prefix_digests([b"x" * 63]) == ()
    assert len(prefix_digests([bytes(1 << 22)])) == len(prefix_digests([bytes(1 << 18)])) < 400
