"""request_lines.py: a line of a body that could begin a request is found, however the body is torn."""

import pytest

from core.errors import BAD_REQUEST, GatewayError
from http1.request_lines import RequestLines, check_lines
from support.feeds import FEEDS, Feed


def holds(*pieces: bytes) -> bool:
    """Whether a line was found in the pieces of a body."""
    lines = RequestLines()
    try:
        for piece in pieces:
            lines.feed(piece)
    except GatewayError as error:
        return error.kind is BAD_REQUEST
    return False


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"GET / HTTP/1.1\r\n", True),
        (b"GET /v1/models?x HTTP/1.0\r\nHost: a\r\n\r\n", True),
        (b"{}\r\nDELETE /slots/1 HTTP/1.1\r\n\r\n", True),
        (b"a HTTP/1.1\r\nb HTTP/1.1\nPOST /x HTTP/1.1\r\n", True),
        (b"GET / HTTP/1.1\n", False),
        (b"GET / HTTP/2.0\r\n", False),
        (b"GET / HTTP/1.1 \r\n", False),
        (b" GET / HTTP/1.1\r\n", False),
        (b"get / HTTP/1.1\r\n", False),
        (b"it speaks HTTP/1.1\r\n", False),
        (rb'{"content": "\r\nGET / HTTP/1.1\r\n"}' + b"\r\n", False),
        (b"GET / HTTP/1.1", False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
def test_a_line_that_could_begin_a_request_is_found(data: bytes, *, found: bool, feed: Feed) -> None:
    assert holds(*feed(data)) is found
    assert holds(b"{}\n", *feed(data)) is found


def test_a_line_is_found_wherever_it_is_torn() -> None:
    body = b"GET /" + b"x" * 300 + b" HTTP/1.1\r\n"
    for at in range(len(body)):
        assert holds(b"a\n", body[:at], body[at:])
        assert not holds(b"a", body[:at], body[at:])


@pytest.mark.parametrize(("size", "found"), [(16_000, True), (30_000, False)])
def test_a_target_that_llama_server_refuses_is_not_kept_for(size: int, *, found: bool) -> None:
    body = b"GET /" + b"x" * size + b" HTTP/1.1\r\n"
    for piece in (100, 5000):
        pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
        assert holds(*pieces) is found
        assert holds(*pieces, b"GET / HTTP/1.1\r\n")


def test_a_body_that_is_whole_is_checked_at_once() -> None:
    check_lines(b"{}")
    check_lines(b"a\r\nb HTTP/1.1")
    with pytest.raises(GatewayError):
        check_lines(b"a\r\nGET / HTTP/1.1\r\n")


def test_lines_without_end_are_searched_once() -> None:
    """Searching the line's beginning at each version would take hours here."""
    assert not holds(b"\r" + b" HTTP/1." * 1_000_000 + b"\n")
