"""grammar.py: a corpus of requests and responses crossed with the ways bytes arrive, and both sides of each limit.

The limits are small, so that the corpus files are.
"""

import re
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from config.settings import Limits
from core.errors import GatewayError
from http1.bodies import encode_chunk
from http1.grammar import (
    HeadScanner,
    RequestHead,
    connection_options,
    expects_continue,
    field_lines,
    keeps_alive,
    parse_request_head,
    request_framing,
    wants_keep_alive,
)
from support.corpus import CORPUS, Case, cases, load
from support.feeds import FEEDS, Feed, in_pieces, read_requests, read_response

LIMITS = Limits(request_line_bytes=200, header_line_bytes=200, headers=8, head_bytes=1000, body_bytes=64)
CODES = {"bad_request", "http_version_not_supported", "uri_too_long", "header_fields_too_large", "payload_too_large"}
CODES |= {"expectation_failed", "backend_malformed"}

each_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=[name.replace(" ", "_") for name in FEEDS])


# --- The corpus ---


@each_feed
@pytest.mark.parametrize("case", cases("accepted"))
def test_accepted(case: Case, feed: Feed) -> None:
    assert read_requests(feed(case.raw), LIMITS).summary() == case.expected
    assert case.expected.rpartition(" ")[2] not in CODES


@each_feed
@pytest.mark.parametrize("case", cases("refused"))
def test_refused(case: Case, feed: Feed) -> None:
    assert read_requests(feed(case.raw), LIMITS).summary() == case.expected
    assert case.expected.rpartition(" ")[2] in CODES


@each_feed
@pytest.mark.parametrize("case", cases("responses"))
def test_response(case: Case, feed: Feed) -> None:
    method = b"HEAD" if case.name.startswith("head_") else b"GET"
    assert read_response(feed(case.raw), method).summary() == case.expected


def test_corpus_names_its_source() -> None:
    for path in CORPUS.glob("*/*.http"):
        case = load(path)
        assert re.fullmatch(r"RFC (9110|9112|3986) section [0-9.]+|own (limit|decision)", case.source), path
        assert case.rule, path
    assert {path.suffix for path in CORPUS.glob("*/*")} == {".http"}


@pytest.mark.parametrize("case", cases("refused"))
def test_an_error_names_the_limit_and_never_contains_the_clients_bytes(case: Case) -> None:
    error = read_requests([case.raw], LIMITS).error
    assert error is not None
    assert error.kind.closes
    assert re.fullmatch(r"[A-Z][\x20-\x7e]*\.", error.message)
    setting = {414: "MAX_REQUEST_LINE_SIZE (200", 413: "MAX_REQUEST_BODY_SIZE (64", 431: "MAX_"}
    assert setting.get(error.kind.status, "") in error.message
    assert not re.search(r"x-a|folded|hello|99|chunked;|0x", error.message, re.IGNORECASE)


# --- Heads ---


def head_of(raw: bytes, limits: Limits = LIMITS) -> RequestHead:
    (head,) = read_requests([raw], limits).heads
    return head


def test_head_keeps_order_and_case_and_maps_known_fields() -> None:
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
def test_bytes_after_a_head_are_not_consumed(before: bytes, feed: Feed) -> None:
    scanner = HeadScanner(LIMITS)
    heads: list[bytes] = []
    rest = b""
    for piece in feed(before + b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n\0\xffGET"):
        if heads:
            rest += piece
        elif (head := scanner.feed(piece)) is not None:
            heads.append(head)
            rest = scanner.trailing_data
    assert heads == [b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"]
    assert rest == b"\0\xffGET"
    assert not scanner.begun


def test_a_request_begins_with_its_first_byte() -> None:
    scanner = HeadScanner(LIMITS)
    assert scanner.feed(b"\r\n\r\n") is None
    assert not scanner.begun
    assert scanner.feed(b"G") is None
    assert scanner.begun


def test_an_incomplete_head_is_held() -> None:
    scanner = HeadScanner(LIMITS)
    assert scanner.feed(b"GET / HT") is None
    assert (scanner.partial_head, scanner.held_bytes) == (b"GET / HT", 8)


def test_tls_on_a_plain_port_is_named() -> None:
    error = read_requests([b"\x16\x03\x01"], LIMITS).error
    assert error is not None
    assert error.message == "TLS was spoken to a plain HTTP port."


def test_connection_options() -> None:
    assert connection_options({}) == frozenset()
    assert connection_options({b"connection": [b" Close,\tX-A", b"te"]}) == {b"close", b"x-a", b"te"}
    # RFC 9110 section 7.6.1: no option names a field that is meant for all recipients. This one frames the message.
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
def test_100_continue_is_expected_in_http_1_1_only(lines: bytes, version: bytes, expects: bool) -> None:
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


@pytest.mark.parametrize(
    ("version", "lines", "stays"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: x-a, Close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: Keep-Alive\r\n", True),
    ],
)
def test_keep_alive_of_a_head(version: bytes, lines: bytes, stays: bool) -> None:
    head = parse_request_head(b"GET / HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, lines), LIMITS)
    assert keeps_alive(head) is stays


def test_field_lines_are_those_that_were_parsed() -> None:
    lines = b"Host: a\r\nX-A: \r\nx-a: 1\r\n"
    assert field_lines(head_of(b"GET / HTTP/1.1\r\n" + lines + b"\r\n").fields) == lines
    assert field_lines(()) == b""


# --- Both sides of each limit ---


def request_line(size: int) -> bytes:
    return b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * (size - 14))


def header_line(size: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\nX-A: %b\r\n\r\n" % (b"a" * (size - 5))


def headers(lines: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % (b"X-A:\r\n" * (lines - 1))


def sized_body(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, b"a" * size)


def chunked_body(size: int) -> bytes:
    start = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return start + encode_chunk(b"a") + encode_chunk(b"a" * (size - 1)) + b"0\r\n\r\n"


EACH_LIMIT = [
    # the request, the limit, the error, how many bytes of the smallest request over the limit suffice to refuse it
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
    assert read_requests(feed(make(most + 1)), LIMITS).summary() == code


@each_feed
@pytest.mark.parametrize(("make", "most", "code", "suffice"), EACH_LIMIT)
def test_limit_is_enforced_before_the_rest_arrives(
    make: Callable[[int], bytes], most: int, code: str, suffice: int, feed: Feed
) -> None:
    raw = make(most + 1)
    assert suffice < len(raw)
    assert read_requests(feed(raw[: suffice - 1]), LIMITS).summary() == "more"
    assert read_requests(feed(raw[:suffice]), LIMITS).summary() == code
    assert read_requests(feed(raw[: suffice + 2]), LIMITS).summary() == code


@each_feed
def test_the_request_line_and_header_lines_have_separate_limits(feed: Feed) -> None:
    wide, narrow = Limits(request_line_bytes=300), Limits(header_line_bytes=100)
    assert read_requests(feed(header_line(301)), wide).summary() == "GET / X-A=296 bytes"
    assert read_requests(feed(request_line(301)), wide).summary() == "uri_too_long"
    assert read_requests(feed(request_line(301)), narrow).error is None
    assert read_requests(feed(header_line(101)), narrow).summary() == "header_fields_too_large"


def test_a_line_over_64_kib_is_answered() -> None:
    endless = [b"GET / HTTP/1.1\r\nX-A: ", *[b"a" * 4096] * 40]
    assert read_requests(endless, Limits()).summary() == "header_fields_too_large"
    assert read_requests([b"".join(endless)], Limits()).summary() == "header_fields_too_large"


# --- Time ---


def calls(feed: list[bytes]) -> int:
    """How many functions are called, ours and the interpreter's, to read requests that arrive in these pieces."""
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
        pytest.param(lambda lines: b"\r\n" * lines, 1000, id="empty_lines"),
        pytest.param(lambda count: chunked_body(2)[:-5] + b"1\r\na\r\n" * count, 200, id="chunks"),
    ],
)
def test_work_is_linear(make: Callable[[int], bytes], few: int) -> None:
    once, again, fourfold = (calls(in_pieces(make(few * times), 1)) for times in (1, 2, 4))
    assert fourfold - again <= 2 * (again - once) + 8


@pytest.mark.parametrize("end", [b"\0", b"", b"a", b"a\0"])
def test_work_is_linear_in_blanks(end: bytes) -> None:
    """Two quantifiers that can match the same whitespace would try 10 000 000 000 ways here."""
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nX-A:%b%b\r\n\r\n" % (b" \t" * 100_000, end)
    reader = read_requests([raw], Limits(request_line_bytes=1 << 20, header_line_bytes=1 << 20))
    assert len(reader.seen) == 1


# --- Framing and fields ---


@pytest.mark.parametrize("value", [b"+5", b"5_0", b"-5", b"\xd9\xa5", b"0x5", b" 5 5", b"5,5", b"", b"1" * 20])
def test_a_length_is_ascii_digits(value: bytes) -> None:
    head = parse_request_head(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\n" % value, LIMITS)
    with pytest.raises(GatewayError, match="one number of at most 19 digits"):
        request_framing(head, LIMITS)


def test_duplicates_are_kept_and_lines_without_colon_refused() -> None:
    assert head_of(b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nX: 2\r\n\r\n").fields[1:] == ((b"X", b"1"), (b"X", b"2"))
    assert read_requests([b"GET / HTTP/1.1\r\nHost: a\r\nX 1\r\n\r\n"], LIMITS).summary() == "bad_request"


@pytest.mark.parametrize("line", [b"X: a\rb", b" folded", b"X : 1"])
def test_bare_cr_folds_and_blanks_before_the_colon_are_refused(line: bytes) -> None:
    assert read_requests([b"GET / HTTP/1.1\r\nHost: a\r\nY: 1\r\n%b\r\n\r\n" % line], LIMITS).summary() == "bad_request"


def test_versions_are_read() -> None:
    for version, summary in (
        (b"1.0", "GET / HTTP/1.0 close"),
        (b"1.1", "GET /"),
        (b"2.0", "http_version_not_supported"),
    ):
        assert read_requests([b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version], LIMITS).summary() == summary
