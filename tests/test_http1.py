"""http1.py: a corpus of requests and responses crossed with the ways bytes arrive, and both sides of each limit.

A corpus file's first line says what is to come out, by which section of which RFC, and the rule in words; the bytes
follow. Files whose name begins with `head_` answer a HEAD request. The limits are small ones, so that the files are.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from bodies import ChunkedBody, RequestBody, SizedBody, UnboundedBody, encode_chunk, response_body
from errors import BACKEND_MALFORMED, GatewayError
from http1 import (
    CRLF,
    Framing,
    HeadScanner,
    Limits,
    RequestHead,
    connection_options,
    expects_continue,
    parse_request_head,
    request_framing,
    wants_keep_alive,
)
from support.feeds import FEEDS, Feed, halves, in_pieces, read_requests, read_response

CORPUS = Path(__file__).parent / "corpus"
LIMITS = Limits(request_line_bytes=200, header_line_bytes=200, headers=8, body_bytes=64)
CODES = {"bad_request", "http_version_not_supported", "uri_too_long", "header_fields_too_large", "payload_too_large"}
CODES |= {"expectation_failed", "backend_malformed"}


class Case(NamedTuple):
    """One corpus file."""

    name: str
    expected: str
    source: str
    rule: str
    raw: bytes


def load(path: Path) -> Case:
    first, _, raw = path.read_bytes().partition(b"\n")
    expected, source, rule = first.decode().removeprefix("# ").split(" -- ")
    return Case(path.stem, expected, source, rule, raw)


def files(folder: str) -> list[Any]:
    return [pytest.param(load(path), id=path.stem) for path in sorted((CORPUS / folder).glob("*.http"))]


each_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=[name.replace(" ", "_") for name in FEEDS])


# --- The corpus ---


@each_feed
@pytest.mark.parametrize("case", files("accepted"))
def test_accepted(case: Case, feed: Feed) -> None:
    assert read_requests(feed(case.raw), LIMITS).told() == case.expected
    assert case.expected.rpartition(" ")[2] not in CODES


@each_feed
@pytest.mark.parametrize("case", files("refused"))
def test_refused(case: Case, feed: Feed) -> None:
    assert read_requests(feed(case.raw), LIMITS).told() == case.expected
    assert case.expected.rpartition(" ")[2] in CODES


@each_feed
@pytest.mark.parametrize("case", files("responses"))
def test_response(case: Case, feed: Feed) -> None:
    method = b"HEAD" if case.name.startswith("head_") else b"GET"
    assert read_response(feed(case.raw), method).told() == case.expected


def test_corpus_names_its_source() -> None:
    for path in CORPUS.glob("*/*.http"):
        case = load(path)
        assert re.fullmatch(r"RFC (9110|9112|3986) section [0-9.]+|own (limit|decision)", case.source), path
        assert case.rule, path
    assert {path.suffix for path in CORPUS.glob("*/*")} == {".http"}


@pytest.mark.parametrize("case", files("refused"))
def test_refusal_names_the_limit_and_never_the_clients_bytes(case: Case) -> None:
    error = read_requests([case.raw], LIMITS).error
    assert error is not None
    assert error.kind.closes
    assert re.fullmatch(r"[A-Z][\x20-\x7e]*\.", error.message)
    setting = {414: "MAX_REQUEST_LINE_SIZE (200", 413: "MAX_REQUEST_BODY_SIZE (64", 431: "MAX_HEADER"}
    assert setting.get(error.kind.status, "") in error.message
    assert not re.search(r"x-a|folded|hello|99|chunked;|0x", error.message, re.IGNORECASE)


# --- Heads ---


def head_of(raw: bytes, limits: Limits = LIMITS) -> RequestHead:
    (head,) = read_requests([raw], limits).heads
    return head


def test_head_keeps_order_and_spelling_and_indexes_what_is_read() -> None:
    head = head_of(b"GET /x HTTP/1.1\r\nHOST: a\r\nX-B: 1\r\nConnection: a\r\nx-b: 2\r\nCONNECTION: \tb\r\n\r\n")
    assert head.fields == (
        (b"HOST", b"a"),
        (b"X-B", b"1"),
        (b"Connection", b"a"),
        (b"x-b", b"2"),
        (b"CONNECTION", b"b"),
    )
    assert head.names == (b"host", b"x-b", b"connection", b"x-b", b"connection")
    assert head.known == {b"host": [b"a"], b"connection": [b"a", b"b"]}
    assert (head.method, head.target, head.minor) == (b"GET", b"/x", 1)


@each_feed
@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_what_follows_a_head_is_left_alone(before: bytes, feed: Feed) -> None:
    scanner = HeadScanner(LIMITS)
    heads: list[bytes] = []
    rest = b""
    for piece in feed(before + b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n\0\xffGET"):
        if heads:
            rest += piece
        elif (head := scanner.feed(piece)) is not None:
            heads.append(head)
            rest = scanner.rest
    assert heads == [b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"]
    assert rest == b"\0\xffGET"
    assert not scanner.begun


def test_a_request_has_begun_with_its_first_octet() -> None:
    scanner = HeadScanner(LIMITS)
    assert scanner.feed(b"\r\n\r\n") is None
    assert not scanner.begun
    assert scanner.feed(b"G") is None
    assert scanner.begun


def test_tls_on_a_plain_port_is_told_so() -> None:
    error = read_requests([b"\x16\x03\x01"], LIMITS).error
    assert error is not None
    assert error.message == "TLS was spoken to a plain HTTP port."


def test_connection_options() -> None:
    assert connection_options({}) == frozenset()
    assert connection_options({b"connection": [b" Close,\tX-A", b"te"]}) == {b"close", b"x-a", b"te"}
    # RFC 9110 section 7.6.1: no option names a field that is meant for everybody. This one frames the message.
    assert connection_options({b"connection": [b"close, Content-Length"]}) == {b"close"}


@pytest.mark.parametrize(
    ("lines", "version", "expects"),
    [
        (b"", b"1.1", False),
        (b"Expect: 100-continue\r\n", b"1.1", True),
        (b"eXPECT: 100-CONTINUE\r\n", b"1.1", True),
        (b"Expect: 100-continue\r\n", b"1.0", False),
        (b"Expect: anything\r\n", b"1.0", False),
    ],
)
def test_pitfall_29_who_waits_for_100_continue(lines: bytes, version: bytes, expects: bool) -> None:
    head = parse_request_head(b"POST / HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, lines), LIMITS)
    assert expects_continue(head) is expects


@pytest.mark.parametrize(
    ("minor", "options", "stays"),
    [
        (1, (), True),
        (1, (b"close",), False),
        (1, (b"keep-alive", b"close"), False),
        (0, (), False),
        (0, (b"keep-alive",), True),
        (0, (b"keep-alive", b"close"), False),
    ],
)
def test_keep_alive(minor: int, options: tuple[bytes, ...], stays: bool) -> None:
    assert wants_keep_alive(minor, frozenset(options)) is stays


# --- Both sides of each limit ---


def request_line(octets: int) -> bytes:
    return b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * (octets - 14))


def header_line(octets: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\nX-A: %b\r\n\r\n" % (b"a" * (octets - 5))


def headers(lines: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % (b"X-A:\r\n" * (lines - 1))


def sized_body(octets: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (octets, b"a" * octets)


def chunked_body(octets: int) -> bytes:
    start = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return start + encode_chunk(b"a") + encode_chunk(b"a" * (octets - 1)) + b"0\r\n\r\n"


EACH_LIMIT = [
    # what, how much is allowed, the refusal, how many octets of the first request too large suffice to refuse it
    pytest.param(request_line, LIMITS.request_line_bytes, "uri_too_long", 201, id="request_line"),
    pytest.param(header_line, LIMITS.header_line_bytes, "header_fields_too_large", 16 + 9 + 201, id="header_line"),
    pytest.param(headers, LIMITS.headers, "header_fields_too_large", 16 + 9 + 8 * 6, id="headers"),
    pytest.param(sized_body, LIMITS.body_bytes, "payload_too_large", 17 + 9 + 20 + 2, id="sized_body"),
    pytest.param(chunked_body, LIMITS.body_bytes, "payload_too_large", 17 + 9 + 28 + 2 + 6 + 4, id="chunked_body"),
]


@each_feed
@pytest.mark.parametrize(("make", "most", "code", "suffice"), EACH_LIMIT)
def test_limit(make: Callable[[int], bytes], most: int, code: str, suffice: int, feed: Feed) -> None:
    accepted = read_requests(feed(make(most)), LIMITS)
    assert accepted.error is None
    assert len(accepted.heads) == 1
    assert read_requests(feed(make(most + 1)), LIMITS).told() == code


@each_feed
@pytest.mark.parametrize(("make", "most", "code", "suffice"), EACH_LIMIT)
def test_limit_holds_before_the_rest_arrives(
    make: Callable[[int], bytes], most: int, code: str, suffice: int, feed: Feed
) -> None:
    raw = make(most + 1)
    assert suffice < len(raw)
    assert read_requests(feed(raw[: suffice - 1]), LIMITS).told() == "more"
    assert read_requests(feed(raw[:suffice]), LIMITS).told() == code
    assert read_requests(feed(raw[: suffice + 2]), LIMITS).told() == code


def test_chunks_that_come_one_a_read_are_counted_too() -> None:
    body = RequestBody(None, LIMITS)
    body.feed(encode_chunk(b"a" * 32))
    body.feed(encode_chunk(b"b" * 32))
    assert (body.octets, body.pieces) == (64, [b"a" * 32, b"b" * 32])
    with pytest.raises(GatewayError, match="MAX_REQUEST_BODY_SIZE"):
        body.feed(encode_chunk(b"c"))


@each_feed
def test_limits_of_the_two_kinds_of_line_are_two(feed: Feed) -> None:
    wide, narrow = Limits(request_line_bytes=300), Limits(header_line_bytes=100)
    assert read_requests(feed(header_line(301)), wide).told() == "GET / X-A=296 octets"
    assert read_requests(feed(request_line(301)), wide).told() == "uri_too_long"
    assert read_requests(feed(request_line(301)), narrow).error is None
    assert read_requests(feed(header_line(101)), narrow).told() == "header_fields_too_large"


def test_default_limits() -> None:
    assert Limits() == Limits(8192, 8192, 64, 10 * 1024 * 1024, 65536)


def test_pitfall_26_a_line_over_64_kib_is_answered() -> None:
    endless = [b"GET / HTTP/1.1\r\nX-A: ", *[b"a" * 4096] * 40]
    assert read_requests(endless, Limits()).told() == "header_fields_too_large"
    assert read_requests([b"".join(endless)], Limits()).told() == "header_fields_too_large"


# --- Time ---


def calls(feed: list[bytes]) -> int:
    """How many functions are called, ours and the interpreter's own, to read requests that come in these pieces."""
    counted = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal counted
        counted += event.endswith("call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        read_requests(feed, Limits(headers=10_000, body_bytes=1 << 20))
    finally:
        sys.setprofile(before)
    return counted


@pytest.mark.parametrize(
    ("make", "few"),
    [
        pytest.param(request_line, 1000, id="request_line"),
        pytest.param(header_line, 1000, id="header_line"),
        pytest.param(headers, 200, id="headers"),
        pytest.param(sized_body, 1000, id="sized_body"),
        pytest.param(chunked_body, 1000, id="chunked_body"),
        pytest.param(lambda octets: b"\r\n" * octets, 1000, id="empty_lines"),
        pytest.param(lambda count: chunked_body(2)[:-5] + b"1\r\na\r\n" * count, 200, id="chunks"),
    ],
)
def test_work_is_linear(make: Callable[[int], bytes], few: int) -> None:
    once, again, fourfold = (calls(in_pieces(make(few * times), 1)) for times in (1, 2, 4))
    assert fourfold - again <= 2 * (again - once) + 8


@pytest.mark.parametrize("end", [b"\0", b"", b"a", b"a\0"])
def test_work_is_linear_in_blanks(end: bytes) -> None:
    """Two quantifiers that may take the same blanks try 10 000 000 000 ways here, which nobody waits for."""
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nX-A:%b%b\r\n\r\n" % (b" \t" * 100_000, end)
    reader = read_requests([raw], Limits(request_line_bytes=1 << 20, header_line_bytes=1 << 20))
    assert len(reader.seen) == 1


# --- Framing and bodies ---


def test_framings() -> None:
    assert isinstance(response_body(Framing(chunked=True)), ChunkedBody)
    assert isinstance(response_body(Framing(length=0)), SizedBody)
    assert isinstance(response_body(Framing()), UnboundedBody)


def test_pitfall_14_chunked_request_bodies_are_read() -> None:
    raw = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert read_requests([raw], LIMITS).payloads == [b"hello"]


@pytest.mark.parametrize("value", [b"+5", b"5_0", b"-5", b"\xd9\xa5", b"0x5", b" 5 5", b"5,5", b"", b"1" * 20])
def test_pitfall_27_a_length_is_ascii_digits(value: bytes) -> None:
    head = parse_request_head(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\n" % value, LIMITS)
    with pytest.raises(GatewayError, match="one number of at most 19 digits"):
        request_framing(head, LIMITS)


def test_pitfall_28_duplicates_are_kept_and_lines_without_colon_refused() -> None:
    assert head_of(b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nX: 2\r\n\r\n").fields[1:] == ((b"X", b"1"), (b"X", b"2"))
    assert read_requests([b"GET / HTTP/1.1\r\nHost: a\r\nX 1\r\n\r\n"], LIMITS).told() == "bad_request"


@pytest.mark.parametrize("line", [b"X: a\rb", b" folded", b"X : 1"])
def test_pitfall_29_bare_cr_folds_and_blanks_before_the_colon_are_refused(line: bytes) -> None:
    assert read_requests([b"GET / HTTP/1.1\r\nHost: a\r\nY: 1\r\n%b\r\n\r\n" % line], LIMITS).told() == "bad_request"


def test_pitfall_29_versions_are_read() -> None:
    for version, told in ((b"1.0", "GET / HTTP/1.0 close"), (b"1.1", "GET /"), (b"2.0", "http_version_not_supported")):
        assert read_requests([b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version], LIMITS).told() == told


CHUNKED_RESPONSES = [
    case for case in files("responses") if isinstance(read_response([case.values[0].raw]).body, ChunkedBody)
]


@pytest.mark.parametrize("case", CHUNKED_RESPONSES)
def test_passed_bytes_carry_the_same_payload_however_they_come(case: Case) -> None:
    """Bytes passed on as they are, and one CRLF at the end, are a chunked body of the same payload."""
    for pieces in [*halves(case.raw), *(feed(case.raw) for feed in FEEDS.values())]:
        torn = read_response(pieces)
        assert torn.told() == read_response([case.raw]).told()
        assert isinstance(torn.body, ChunkedBody)
        again = ChunkedBody()
        assert again.feed(torn.passed + CRLF if torn.body.done else torn.passed) == torn.payload
        assert again.done == torn.body.done


def test_a_stream_of_one_chunk_a_read_passes_whole() -> None:
    body = ChunkedBody()
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        chunk = encode_chunk(event)
        assert body.feed(chunk) == event
        assert body.passable == len(chunk)
    assert body.feed(b"0\r\n\r\n") == b""
    assert body.passable == 3
    assert body.done


def test_where_a_chunk_could_begin() -> None:
    raw = b"2\r\nhi\r\n1\r\na\r\n0\r\n\r\n"
    starts = []
    for at in range(len(raw) + 1):
        body = ChunkedBody()
        body.feed(raw[:at])
        if body.between_chunks():
            starts.append(raw[at:])
    assert starts == [raw, b"1\r\na\r\n0\r\n\r\n", b"0\r\n\r\n"]


def test_no_chunk_begins_where_a_refused_read_left_off() -> None:
    """Half a chunk was passed on; the read that brought its other half brought a fault, and was not passed on."""
    body = ChunkedBody()
    assert body.feed(b"6\r\nab\n\n") == b"ab\n\n"
    with pytest.raises(GatewayError):
        body.feed(b"\n\n\r\nno size\r\n")
    assert not body.between_chunks()


def test_only_a_whole_body_may_end_with_its_connection() -> None:
    sized, chunked, unbounded = SizedBody(2), ChunkedBody(), UnboundedBody()
    for body in (sized, chunked, unbounded):
        body.feed(b"1")
    assert [body.ends_at_close() for body in (sized, chunked, unbounded)] == [False, False, True]
    sized.feed(b"2")
    assert sized.ends_at_close()
    assert not unbounded.done
    assert encode_chunk(b"") == b""  # an empty chunk would be the last
    with pytest.raises(GatewayError) as caught:
        chunked.feed(b"x\r\n")
    assert caught.value.kind is BACKEND_MALFORMED
