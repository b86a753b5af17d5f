"""bodies.py: framings, chunked coding in any pieces, and which bytes of a response may be relayed unchanged."""

import random
import re

import pytest

from config.settings import Limits
from core.errors import BACKEND_MALFORMED, BAD_REQUEST, GatewayError
from http1.bodies import (
    ChunkedBody,
    RequestBody,
    SizedBody,
    UnboundedBody,
    encode_chunk,
    response_body,
)
from http1.grammar import CRLF, Framing
from support.corpus import Case, cases
from support.feeds import FEEDS, halves, read_requests, read_response

LIMITS = Limits(body_bytes=64)


def test_the_framing_decides_the_kind_of_body() -> None:
    assert isinstance(response_body(Framing(chunked=True)), ChunkedBody)
    assert isinstance(response_body(Framing(length=0)), SizedBody)
    assert isinstance(response_body(Framing()), UnboundedBody)


# --- Request bodies ---


def test_chunked_request_bodies_are_read() -> None:
    raw = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert read_requests([raw], LIMITS).payloads == [b"hello"]


def test_chunks_that_arrive_one_per_read_count_towards_the_limit() -> None:
    body = RequestBody(None, LIMITS)
    body.feed(encode_chunk(b"a" * 32))
    body.feed(encode_chunk(b"b" * 32))
    assert (body.payload_bytes, body.pieces) == (64, [b"a" * 32 + b"b" * 32])
    with pytest.raises(GatewayError, match=r"MAX_REQUEST_BODY_SIZE \(64 bytes\)"):
        body.feed(encode_chunk(b"c"))


# --- Relayed chunks ---

CHUNKED_RESPONSES = [
    case for case in cases("responses") if isinstance(read_response([case.values[0].raw]).body, ChunkedBody)
]


@pytest.mark.parametrize("case", CHUNKED_RESPONSES)
def test_relayed_bytes_carry_the_same_payload_in_any_pieces(case: Case) -> None:
    """The relayed bytes and one CRLF at the end are a chunked body with the same payload."""
    for pieces in [*halves(case.raw), *(feed(case.raw) for feed in FEEDS.values())]:
        torn = read_response(pieces)
        assert torn.summary() == read_response([case.raw]).summary()
        assert isinstance(torn.body, ChunkedBody)
        again = ChunkedBody()
        assert again.feed(torn.relayed + CRLF if torn.body.done else torn.relayed) == torn.payload
        assert again.done == torn.body.done


def test_a_stream_with_one_chunk_per_read_is_relayed_whole() -> None:
    body = ChunkedBody()
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        chunk = encode_chunk(event)
        assert body.feed(chunk) == event
        assert body.relayable == len(chunk)
    assert body.feed(b"0\r\n\r\n") == b""
    assert body.relayable == 3
    assert body.done


def test_whole_chunk_takes_exactly_one_chunk() -> None:
    body = ChunkedBody()
    assert body.whole_chunk(b"2\r\nhi\r\n") == b"hi"
    for data in (b"2\r\nhi", b"2\r\nhi\r\n0\r\n\r\n", b"0\r\n\r\n", b"2;a\r\nhi\r\n", b"\r\nhi", b"2\r\nhi\n\n", b"hi"):
        assert body.whole_chunk(data) == b""
    assert body.between_chunks()


@pytest.mark.parametrize("before", [b"2", b"2\r\nh", b"0\r\n"])
def test_whole_chunk_takes_nothing_inside_a_chunk(before: bytes) -> None:
    body = ChunkedBody()
    body.feed(before)
    assert body.whole_chunk(b"2\r\nhi\r\n") == b""


def test_between_chunks_is_true_where_a_chunk_can_begin() -> None:
    raw = b"2\r\nhi\r\n1\r\na\r\n0\r\n\r\n"
    starts = []
    for at in range(len(raw) + 1):
        body = ChunkedBody()
        body.feed(raw[:at])
        if body.between_chunks():
            starts.append(raw[at:])
    assert starts == [raw, b"1\r\na\r\n0\r\n\r\n", b"0\r\n\r\n"]


def test_no_chunk_begins_after_a_malformed_read() -> None:
    """Half a chunk was relayed. The read with its other half was malformed, and was not relayed."""
    body = ChunkedBody()
    assert body.feed(b"6\r\nab\n\n") == b"ab\n\n"
    with pytest.raises(GatewayError):
        body.feed(b"\n\n\r\nno size\r\n")
    assert not body.between_chunks()


def test_only_a_complete_body_may_end_with_its_connection() -> None:
    sized, chunked, unbounded = SizedBody(2), ChunkedBody(), UnboundedBody()
    for body in (sized, chunked, unbounded):
        body.feed(b"1")
    assert [body.ends_at_close() for body in (sized, chunked, unbounded)] == [False, False, True]
    sized.feed(b"2")
    assert sized.ends_at_close()
    assert not unbounded.done


def test_no_chunk_is_encoded_for_an_empty_payload() -> None:
    assert encode_chunk(b"") == b""  # an empty chunk would be the last one
    assert encode_chunk(b"a" * 16) == b"10\r\n" + b"a" * 16 + b"\r\n"


def test_a_malformed_response_body_is_a_malformed_backend() -> None:
    with pytest.raises(GatewayError) as caught:
        ChunkedBody().feed(b"x\r\n")
    assert caught.value.kind is BACKEND_MALFORMED


# --- Bounds on the chunks of a request ---


class ByHand:
    """A decoder of chunked coding that is plain to read: whole input, one chunk after the other."""

    def __init__(self, raw: bytes) -> None:
        self.payload, self.rest, self.is_valid = b"", raw, True
        while True:
            line, end, rest = self.rest.partition(CRLF)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,16})(;[a-z=]+)?", line)
            if match is None or not end:
                self.is_valid = False
                return
            size = int(match[1], 16)
            if size == 0:
                self.is_valid, self.rest = rest.startswith(CRLF), rest[2:]
                return
            if rest[size : size + 2] != CRLF:
                self.is_valid = False
                return
            self.payload, self.rest = self.payload + rest[:size], rest[size + 2 :]


def random_chunks(choose: random.Random) -> bytes:
    """Chunks of all small sizes, whose payload looks like chunks, now and then with a byte that is wrong."""
    coded = b""
    for _ in range(choose.randrange(40)):
        size = choose.choice((1, 1, 2, 3, 9, 10, 14, 15, 16, 17, choose.randrange(1, 300)))
        payload = choose.choice(
            (b"1\r\nx\r\n" * size, b"\r\n" * size, bytes(choose.choices(b"1\r\n0aF;x", k=size)), choose.randbytes(size))
        )[:size]
        form = choose.choice((b"%x", b"%x", b"%x", b"%X", b"0%x", b"000%X"))
        coded += form % size + choose.choice((b"",) * 9 + (b";a=b",)) + CRLF + payload + CRLF
    raw = bytearray(coded + choose.choice((b"0\r\n\r\n", b"000;a\r\n\r\n")) + choose.choice((b"", b"1\r\nx\r\n")))
    if choose.random() < 0.2:
        at = choose.randrange(len(raw))
        raw[at : at + choose.randrange(2)] = choose.choice((b"", b"\n", b"\r\n", b"g", b"1"))
    return bytes(raw)


@pytest.mark.parametrize("limits", [None, Limits()])
def test_chunks_are_decoded_as_by_hand_in_any_pieces(limits: Limits | None) -> None:
    choose = random.Random(11)
    valid = 0
    for _ in range(1500):
        raw = random_chunks(choose)
        expected = ByHand(raw)
        cuts = sorted(choose.choices(range(len(raw) + 1), k=choose.choice((0, 1, 2, 20))))
        body, payload, rest = ChunkedBody(BAD_REQUEST, limits), b"", b""
        try:
            for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
                if body.done:
                    rest += raw[start:end]
                else:
                    payload += body.feed(raw[start:end])
                    rest = body.trailing_data
        except GatewayError:
            assert not expected.is_valid, raw
            continue
        if body.done:  # a malformed byte may have become a trailer
            assert expected.is_valid or b"\r\n0" in raw, raw
        if expected.is_valid:
            assert (body.done, payload, rest) == (True, expected.payload, expected.rest), raw
            valid += 1
    assert valid > 1000


def read_chunks(coded: bytes, size: int) -> RequestBody:
    body = RequestBody(None, Limits())
    for at in range(0, len(coded), size):
        body.feed(coded[at : at + size])
    return body


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_small_chunks_are_accepted_up_to_an_allowance(size: int) -> None:
    """65536 chunks of one byte have 262144 bytes of framing more than payload; the last chunk counts, too."""
    few = read_chunks(b"1\r\nx\r\n" * 65534 + b"0\r\n\r\n", size)
    assert (few.done, few.payload_bytes) == (True, 65534)
    with pytest.raises(GatewayError, match=r"The body's chunks are too small.* by more than 262144 bytes\.") as caught:
        read_chunks(b"1\r\nx\r\n" * 65537, size)
    assert caught.value.kind is BAD_REQUEST


def test_chunks_whose_payload_outweighs_their_framing_are_accepted_in_any_number() -> None:
    assert read_chunks(b"5\r\nhello\r\n" * 200_000 + b"0\r\n\r\n", 65536).payload_bytes == 1_000_000


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_chunk_extensions_are_bounded_in_sum(size: int) -> None:
    chunk = b"64;" + b"e" * 127 + b"\r\n" + b"x" * 100 + b"\r\n"
    assert read_chunks(chunk * 128, size).payload_bytes == 12800
    with pytest.raises(GatewayError, match="chunk extensions are longer than 16384 bytes in total"):
        read_chunks(chunk * 129, size)


def test_the_chunks_of_a_response_are_not_bounded() -> None:
    body = ChunkedBody()
    for _ in range(20):
        body.feed(b"1;%b\r\nx\r\n" % (b"e" * 1000))
        assert len(body.feed(b"1\r\nx\r\n" * 10_000)) == 10_000


def test_a_request_body_without_a_length_is_chunked() -> None:
    assert RequestBody(None, LIMITS).is_chunked
    assert not RequestBody(64, LIMITS).is_chunked


def test_small_pieces_of_a_body_are_kept_together() -> None:
    """Each alone would take more memory than its bytes."""
    for length in (None, 300_000):
        body = RequestBody(length, Limits())
        for _ in range(300):
            data = bytes(1000)
            body.feed(encode_chunk(data) if length is None else data)
        assert b"".join(body.pieces) == bytes(300_000)
        assert len(body.pieces) == 5
    body = RequestBody(None, Limits())
    for size in (10, 100_000, 10, 10, 5000):
        body.feed(encode_chunk(b"x" * size))
    assert [len(piece) for piece in body.pieces] == [10, 100_000, 20, 5000]
