"""response.py: heads byte for byte, bodies in the client's framing, and how a response ends that is not whole."""

import json
from typing import Any

import pytest

from core.errors import (
    BACKEND_TIMEOUT,
    BAD_REQUEST,
    INVALID_API_KEY,
    QUEUE_FULL,
    GatewayError,
)
from http1.bodies import Body, ChunkedBody, SizedBody, UnboundedBody
from proxy.response import Response
from proxy.response_info import parse_response
from support.gateway import get, post, request
from support.heads import every_answer
from support.memory_gateway import DATE, EPOCH, prepare
from support.memory_transport import ABORTED, CLOSING, OPEN, Link, MemoryTransport

SIZED = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nA: b\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
OWN = every_answer(b"r-1")


class Answered:
    """A response, and what its client got."""

    def __init__(self, raw: bytes = b"", *, keep_alive: bool = True, cors: tuple[str, ...] = ()) -> None:
        self.link = Link()
        self.transport = MemoryTransport()
        self.client = self.link.client(self.transport)
        self.response = Response(self.client, prepare(raw or post(), cors), b"r-1", EPOCH, keep_alive)

    def begin(self, head: bytes) -> bytes:
        """Begin a relayed response; return the client's head."""
        return self.response.begin_relayed(parse_response(head, b"POST"))

    @property
    def sent(self) -> bytes:
        return self.link.sent(self.client)

    @property
    def json(self) -> Any:
        return json.loads(self.sent.partition(b"\r\n\r\n")[2])


# --- Heads ---

PLAIN = b"HTTP/1.1 200 OK\r\nA: b\r\n" + DATE
KEEP, CLOSE, CODING = b"Connection: keep-alive\r\n", b"Connection: close\r\n", b"Transfer-Encoding: chunked\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 5\r\n" + DATE

HEADS = [
    # the backend's, HTTP/1.x, keep alive, the client's head, keep alive after it
    (SIZED, 1, True, LENGTH + OWN, True),
    (SIZED, 1, False, LENGTH + CLOSE + OWN, False),
    (SIZED, 0, True, LENGTH + KEEP + OWN, True),
    (SIZED, 0, False, LENGTH + CLOSE + OWN, False),
    (CHUNKED, 1, True, PLAIN + CODING + OWN, True),
    (CHUNKED, 1, False, PLAIN + CODING + CLOSE + OWN, False),
    (CHUNKED, 0, True, PLAIN + CLOSE + OWN, False),
    (CHUNKED, 0, False, PLAIN + CLOSE + OWN, False),
    (UNTIL_CLOSE, 1, True, PLAIN + CODING + OWN, True),
    (UNTIL_CLOSE, 1, False, PLAIN + CODING + CLOSE + OWN, False),
    (UNTIL_CLOSE, 0, True, PLAIN + CLOSE + OWN, False),
    (UNTIL_CLOSE, 0, False, PLAIN + CLOSE + OWN, False),
]


@pytest.mark.parametrize(("backends", "minor", "keep_alive", "head", "stays"), HEADS)
def test_a_relayed_head_has_the_framing_that_the_client_understands(
    backends: bytes, minor: int, keep_alive: bool, head: bytes, stays: bool
) -> None:
    answered = Answered(post(minor=minor), keep_alive=keep_alive)
    assert answered.begin(backends) == head + b"\r\n"
    assert answered.response.keep_alive is stays
    assert answered.response.status == 200


@pytest.mark.parametrize(
    ("minor", "keep_alive", "line"), [(1, True, b""), (1, False, CLOSE), (0, True, KEEP), (0, False, CLOSE)]
)
def test_a_response_that_was_received_whole_is_sent_in_one_piece(minor: int, keep_alive: bool, line: bytes) -> None:
    answered = Answered(post(minor=minor), keep_alive=keep_alive)
    answered.response.send_relayed(parse_response(SIZED, b"POST"), b"hello")
    assert answered.transport.written == []
    assert answered.sent == LENGTH + line + OWN + b"\r\nhello"
    assert (answered.response.started, answered.response.status) == (True, 200)


@pytest.mark.parametrize("whole", [True, False])
def test_the_backends_own_date_stays(whole: bool) -> None:
    dated = SIZED.replace(b"A: b", b"Date: Sun, 06 Nov 1994 08:49:37 GMT")
    answered = Answered()
    if whole:
        answered.response.send_relayed(parse_response(dated, b"POST"), b"hello")
        assert answered.sent == dated.removesuffix(b"\r\n") + OWN + b"\r\nhello"
    else:
        assert answered.begin(dated) == dated.removesuffix(b"\r\n") + OWN + b"\r\n"


def test_a_status_is_the_backends_own() -> None:
    answered = Answered()
    assert answered.begin(b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 0\r\n\r\n").startswith(
        b"HTTP/1.1 418 I'm a teapot\r\n"
    )
    assert answered.response.status == 418


def test_lines_for_every_response_come_last() -> None:
    answered = Answered(cors=("*",))
    answered.response.lines += b"x-ratelimit-limit-requests: 1\r\n"
    assert answered.begin(SIZED).startswith(LENGTH + OWN + b"Access-Control-Allow-Origin: *\r\n")
    assert answered.begin(SIZED).endswith(b"\r\nx-ratelimit-limit-requests: 1\r\n\r\n")


def test_a_dialect_may_look_for_the_id_in_a_field_of_its_own() -> None:
    answered = Answered(post(b"/v1/messages"))
    assert answered.begin(SIZED) == LENGTH + b"request-id: r-1\r\n" + OWN + b"\r\n"


def test_an_event_stream_can_begin_before_the_backend_has_answered() -> None:
    answered = Answered()
    answered.response.begin_event_stream()
    lines = b"Content-Type: text/event-stream\r\nCache-Control: no-cache, no-store\r\nX-Accel-Buffering: no\r\n"
    assert answered.sent == b"HTTP/1.1 200 OK\r\n" + DATE + lines + CODING + OWN + b"\r\n"
    assert (answered.response.started, answered.response.is_event_stream, answered.response.status) == (True, True, 200)


def test_to_http_1_0_such_a_stream_ends_with_its_connection() -> None:
    answered = Answered(post(minor=0))
    answered.response.begin_event_stream()
    assert b"Transfer-Encoding" not in answered.transport.take()
    answered.response.send_event(b": waiting\n\n")
    assert answered.sent.endswith(CLOSE + OWN + b"\r\n: waiting\n\n")
    assert not answered.response.keep_alive


# --- Bodies ---


def encoded(minor: int, head: bytes, body: Body, *pieces: bytes) -> list[bytes]:
    """Return what the client gets for each piece of the backend's body."""
    answered = Answered(post(minor=minor))
    answered.begin(head)
    return [answered.response.encode(body, piece, body.feed(piece)) for piece in pieces]


@pytest.mark.parametrize("minor", [0, 1])
def test_a_sized_body_passes_as_it_is(minor: int) -> None:
    assert encoded(minor, SIZED, SizedBody(5), b"he", b"llo") == [b"he", b"llo"]


def test_chunks_pass_as_they_are() -> None:
    pieces = [b"2;x=y\r\nhe\r\n", b"3\r\nll", b"o\r\n", b"0\r\n\r\n"]
    assert encoded(1, CHUNKED, ChunkedBody(), *pieces) == pieces


def test_trailers_do_not_pass() -> None:
    assert encoded(1, CHUNKED, ChunkedBody(), b"5\r\nhello\r\n0\r\nEta", b"g: x\r\n\r\n") == [
        b"5\r\nhello\r\n0\r\n",
        b"\r\n",
    ]


def test_what_follows_the_last_chunk_does_not_pass() -> None:
    assert encoded(1, CHUNKED, ChunkedBody(), b"5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK") == [b"5\r\nhello\r\n0\r\n\r\n"]


def test_to_http_1_0_the_payload_passes_without_chunks() -> None:
    pieces = [b"2\r\nhe\r\n", b"3\r\nll", b"o\r\n0\r\n\r\n"]
    assert encoded(0, CHUNKED, ChunkedBody(), *pieces) == [b"he", b"ll", b"o"]


@pytest.mark.parametrize(("minor", "pieces"), [(1, [b"2\r\nhe\r\n", b"3\r\nllo\r\n"]), (0, [b"he", b"llo"])])
def test_a_body_without_a_length_is_chunked_for_http_1_1(minor: int, pieces: list[bytes]) -> None:
    assert encoded(minor, UNTIL_CLOSE, UnboundedBody(), b"he", b"llo") == pieces


@pytest.mark.parametrize(("minor", "end"), [(1, b"0\r\n\r\n"), (0, b"")])
def test_its_end_is_the_backends_close(minor: int, end: bytes) -> None:
    answered = Answered(post(minor=minor))
    answered.begin(UNTIL_CLOSE)
    assert answered.response.end_of_close_delimited() == end


def continued(minor: int, body: Body, *pieces: bytes) -> list[bytes]:
    """Return what the client gets for each piece that continues a stream which the gateway has begun."""
    answered = Answered(post(minor=minor))
    answered.response.begin_event_stream()
    answered.response.continue_with(body)
    return [answered.response.encode(body, piece, body.feed(piece)) for piece in pieces]


def test_a_stream_that_the_gateway_began_goes_on_with_the_backends_chunks() -> None:
    pieces = [b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"]
    assert continued(1, ChunkedBody(), *pieces) == pieces
    assert continued(0, ChunkedBody(), *pieces) == [b"he", b"llo"]


def test_other_framings_are_chunked_in_such_a_stream() -> None:
    assert continued(1, SizedBody(5), b"he", b"llo") == [b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"]
    assert continued(0, SizedBody(5), b"he", b"llo") == [b"he", b"llo"]
    assert continued(1, UnboundedBody(), b"he") == [b"2\r\nhe\r\n"]


def test_no_bytes_are_no_chunk() -> None:
    """An empty chunk would end the body."""
    assert continued(1, UnboundedBody(), b"") == [b""]


# --- The gateway's own responses ---


def test_an_own_response_has_a_length_and_a_date() -> None:
    answered = Answered(get(b"/ping"))
    answered.response.send(200, b"text/plain", b"pong\n", ((b"A", b"b"),))
    assert answered.sent == (
        b"HTTP/1.1 200 OK\r\n"
        + DATE
        + b"Content-Type: text/plain\r\nContent-Length: 5\r\nCache-Control: no-store\r\n"
        + OWN
        + b"A: b\r\n\r\npong\n"
    )
    assert (answered.response.status, answered.response.keep_alive) == (200, True)


def test_a_response_to_head_has_no_content() -> None:
    answered = Answered(request(b"HEAD", b"/ping"))
    answered.response.send(200, b"text/plain", b"pong\n")
    assert answered.sent.endswith(b"\r\nContent-Length: 5\r\nCache-Control: no-store\r\n" + OWN + b"\r\n")


def test_no_content_has_no_length_and_no_type() -> None:
    answered = Answered(request(b"OPTIONS", b"/ping"))
    answered.response.send(204, b"", b"")
    assert answered.sent == b"HTTP/1.1 204 No Content\r\n" + DATE + b"Cache-Control: no-store\r\n" + OWN + b"\r\n"


# Errors


def test_an_error_is_json_in_the_routes_dialect() -> None:
    answered = Answered(post(b"/v1/messages"))
    answered.response.send_error(GatewayError(QUEUE_FULL))
    assert answered.response.status == 503
    assert answered.json == {
        "type": "error",
        "error": {"message": "The queue is full.", "type": "overloaded_error"},
        "request_id": "r-1",
    }


def test_an_error_has_its_own_fields_and_may_say_when_to_come_back() -> None:
    answered = Answered()
    answered.response.send_error(GatewayError(QUEUE_FULL, fields=((b"A", b"b"),), retry_after_s=7))
    assert b"\r\nA: b\r\nRetry-After: 7\r\n\r\n{" in answered.sent


def test_an_error_that_would_come_again_says_so() -> None:
    answered = Answered()
    answered.response.send_error(GatewayError(INVALID_API_KEY))
    response = answered.sent
    assert (b"\r\nx-should-retry: false\r\n" in response, b"Retry-After" in response) == (True, False)
    assert answered.response.keep_alive


def test_an_error_that_closes_ends_the_connection() -> None:
    answered = Answered()
    answered.response.send_error(GatewayError(BAD_REQUEST))
    assert b"\r\nConnection: close\r\n" in answered.sent
    assert not answered.response.keep_alive


@pytest.mark.parametrize(("minor", "end"), [(1, b"\n\n\r\n0\r\n\r\n"), (0, b"\n\n")])
def test_an_error_in_a_stream_that_has_begun_is_its_last_event(minor: int, end: bytes) -> None:
    answered = Answered(post(minor=minor))
    answered.response.begin_event_stream()
    head = answered.sent
    answered.response.send_error(GatewayError(BACKEND_TIMEOUT))
    event = answered.sent
    assert event.endswith(end)
    assert b'data: {"error": {' in event
    assert (answered.response.status, b"HTTP/1.1" in head, b"HTTP/1.1" in event) == (200, True, False)


# A response that cannot be completed

ERROR = GatewayError(BACKEND_TIMEOUT)


@pytest.mark.parametrize(
    ("head", "minor", "state"),
    [
        (SIZED, 1, CLOSING),
        (SIZED, 0, CLOSING),
        (CHUNKED, 1, CLOSING),
        (CHUNKED, 0, ABORTED),
        (UNTIL_CLOSE, 1, CLOSING),
        (UNTIL_CLOSE, 0, ABORTED),
    ],
)
def test_it_ends_by_a_close_if_that_is_visible_and_else_by_a_reset(head: bytes, minor: int, state: str) -> None:
    answered = Answered(post(minor=minor))
    answered.response.write(answered.begin(head) + b"he")
    answered.response.truncate(ERROR, 0, 300)
    assert answered.transport.state == state
    assert answered.sent.endswith(b"\r\n\r\nhe")
    linger = answered.transport.sock.options  # type: ignore[attr-defined]
    assert len(linger) == (state == ABORTED)


@pytest.mark.parametrize(
    ("head", "error", "reported"),
    [
        (EVENTS, ERROR, True),
        (EVENTS, None, False),
        (EVENTS.replace(b"\r\n\r\n", b"\r\nContent-Length: 99\r\n\r\n"), ERROR, False),
        (EVENTS.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), ERROR, False),
        (UNTIL_CLOSE, ERROR, False),
    ],
    ids=["events", "no error", "events of known length", "compressed events", "no events"],
)
@pytest.mark.parametrize("minor", [0, 1])
def test_the_error_is_reported_if_an_event_may_follow(
    minor: int, head: bytes, error: GatewayError | None, reported: bool
) -> None:
    answered = Answered(post(minor=minor))
    answered.response.write(answered.begin(head))
    answered.response.truncate(error, 0, 300)
    assert (b'"code": "backend_timeout"' in answered.sent) is reported


def test_a_dialect_whose_error_ends_a_stream_needs_no_cut() -> None:
    answered = Answered(post(b"/v1/responses"))
    answered.response.write(answered.begin(EVENTS))
    answered.response.truncate(ERROR, 7, 300)
    sent = answered.sent
    assert (b'"sequence_number": 7,' in sent, b'"sequence_number": 8,' in sent) == (True, True)
    assert sent.endswith(b"\r\n0\r\n\r\n")
    assert answered.transport.state == OPEN


# Events of the gateway's own behind the backend's last one


@pytest.mark.parametrize(
    ("minor", "end", "events", "whole"),
    [
        (1, b"5\r\nhello\r\n0\r\n\r\n", b"own", b"5\r\nhello\r\n3\r\nown\r\n0\r\n\r\n"),
        (1, b"5\r\nhello\r\n0\r\n\r\n", b"", b"5\r\nhello\r\n0\r\n\r\n"),
        (1, b"\r\n", b"own", b"\r\n"),  # the last chunk's size has been passed on already
        (0, b"hello", b"own", b"helloown"),
    ],
)
def test_events_are_inserted_before_the_end_if_that_is_still_there(
    minor: int, end: bytes, events: bytes, whole: bytes
) -> None:
    answered = Answered(post(minor=minor))
    answered.begin(CHUNKED)
    assert answered.response.insert_before_end(events, end) == whole


# --- A response of the gateway's own whose body comes later ---


def test_a_head_alone_says_how_long_its_body_is() -> None:
    answered = Answered(get(b"/"))
    answered.response.begin(200, 5, ((b"A", b"b"),))
    assert answered.sent == b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 5\r\nA: b\r\n" + OWN + b"\r\n"
    assert (answered.response.started, answered.response.status, answered.response.keep_alive) == (True, 200, True)


def test_a_head_without_a_body_has_no_length() -> None:
    answered = Answered(get(b"/"), keep_alive=False)
    answered.response.begin(304, None, ())
    assert answered.sent == b"HTTP/1.1 304 Not Modified\r\n" + DATE + CLOSE + OWN + b"\r\n"
