"""response_info.py: the Date, the backend's field lines that pass, and what a response's head says."""

import pytest

from core.errors import BACKEND_MALFORMED, GatewayError
from http1.grammar import CHUNKED, NO_BODY, UNTIL_CLOSE, Framing
from proxy.response_info import DateField, parse_response, relayed_lines
from support.clock import Clock


def test_the_date_is_that_of_the_last_update() -> None:
    clock = Clock(784111777.0)
    date = DateField(clock)
    clock.advance(1)
    assert date.line == b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"  # RFC 9110 section 5.6.7
    date.update()
    assert date.line == b"Date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"


def head(*lines: bytes, status: bytes = b"200 OK", minor: int = 1) -> bytes:
    return b"\r\n".join([b"HTTP/1.%d %b" % (minor, status), *lines, b"", b""])


def lines_of(raw: bytes, method: bytes = b"GET") -> bytes:
    return parse_response(raw, method).lines


# --- Field lines ---


def test_fields_pass_in_order_and_case() -> None:
    raw = head(b"X-Two: b", b"x-TWO: a", b"Content-Length: 5", b"Server: llama.cpp")
    assert lines_of(raw) == raw.removesuffix(b"\r\n")


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: close",
        b"Keep-Alive: timeout=5, max=100",
        b"Transfer-Encoding: chunked",
        b"TE: trailers",
        b"Trailer: Etag",
        b"Upgrade: h2c",
        b"Proxy-Authenticate: Basic",
        b"X-Request-Id: the-backends",
        b"access-control-allow-origin: *",
        b"Access-Control-Expose-Headers: x",
        b"X-RateLimit-Limit-Requests: 1",
    ],
)
def test_fields_of_one_connection_and_the_gateways_own_do_not_pass(line: bytes) -> None:
    assert lines_of(head(b"A: b", line, b"C: d")) == b"HTTP/1.1 200 OK\r\nA: b\r\nC: d\r\n"


def test_fields_that_connection_names_do_not_pass() -> None:
    raw = head(b"Connection: close, X-Internal", b"x-internal: 1", b"A: b")
    assert lines_of(raw) == b"HTTP/1.1 200 OK\r\nA: b\r\n"


def test_a_response_without_content_has_no_length() -> None:
    assert lines_of(head(b"Content-Length: 0", status=b"204 No Content")) == b"HTTP/1.1 204 No Content\r\n"


def test_a_status_without_a_reason_keeps_its_blank() -> None:
    assert lines_of(head(status=b"299")) == b"HTTP/1.1 299 \r\n"


def test_an_answer_in_http_1_0_becomes_1_1() -> None:
    assert lines_of(head(minor=0)) == b"HTTP/1.1 200 OK\r\n"


# --- What a head says ---


@pytest.mark.parametrize(
    ("raw", "method", "framing"),
    [
        (head(b"Content-Length: 5"), b"GET", Framing(length=5)),
        (head(b"Transfer-Encoding: chunked"), b"GET", CHUNKED),
        (head(), b"GET", UNTIL_CLOSE),
        (head(b"Content-Length: 5"), b"HEAD", NO_BODY),
        (head(status=b"304 Not Modified"), b"GET", NO_BODY),
        (head(status=b"100 Continue"), b"GET", UNTIL_CLOSE),
    ],
)
def test_the_framing_is_the_heads(raw: bytes, method: bytes, framing: Framing) -> None:
    assert parse_response(raw, method).framing == framing


@pytest.mark.parametrize("raw", [b"HTTP/1.1 OK\r\n\r\n", head(b"A : b"), head(b"Transfer-Encoding: gzip")])
def test_a_malformed_head_is_an_error(raw: bytes) -> None:
    with pytest.raises(GatewayError) as error:
        parse_response(raw, b"GET")
    assert error.value.kind is BACKEND_MALFORMED


@pytest.mark.parametrize(
    ("raw", "keeps_alive"),
    [
        (head(), True),
        (head(b"Connection: close"), False),
        (head(minor=0), False),
        (head(b"Connection: keep-alive", minor=0), True),
    ],
)
def test_the_backend_says_whether_it_keeps_its_connection(raw: bytes, keeps_alive: bool) -> None:
    assert parse_response(raw, b"GET").keeps_alive is keeps_alive


@pytest.mark.parametrize(
    ("raw", "has_usage"),
    [
        (head(), True),
        (head(status=b"201 Created"), False),
        (head(status=b"500 Internal Server Error"), False),
        (head(b"Content-Encoding: gzip"), False),
    ],
)
def test_tokens_are_read_from_a_plain_success(raw: bytes, has_usage: bool) -> None:
    assert parse_response(raw, b"POST").has_usage is has_usage


@pytest.mark.parametrize(
    ("line", "is_event_stream"),
    [
        (b"Content-Type: text/event-stream", True),
        (b"content-type: TEXT/Event-Stream; charset=utf-8", True),
        (b"Content-Type: application/json", False),
        (b"A: text/event-stream", False),
    ],
)
def test_an_event_stream_is_known_by_its_type(line: bytes, is_event_stream: bool) -> None:
    assert parse_response(head(line), b"POST").is_event_stream is is_event_stream


@pytest.mark.parametrize(("line", "has_date"), [(b"DATE: Sun, 06 Nov 1994 08:49:37 GMT", True), (b"A: b", False)])
def test_a_backend_may_have_its_own_date(line: bytes, has_date: bool) -> None:
    assert parse_response(head(line), b"POST").has_date is has_date


def test_heads_that_are_equal_are_parsed_once() -> None:
    assert parse_response(head(b"A: once"), b"GET") is parse_response(head(b"A: once"), b"GET")


def test_the_methods_of_equal_heads_matter() -> None:
    raw = head(b"Content-Length: 5")
    assert parse_response(raw, b"HEAD").framing != parse_response(raw, b"GET").framing
    assert relayed_lines(parse_response(raw, b"HEAD").head) == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
