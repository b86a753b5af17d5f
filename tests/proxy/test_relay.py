"""relay.py: a response in pieces is whole at the client, or visibly cut, in each framing."""

import json
from typing import Any

import pytest

from accounting.token_counter import TokenCounter
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError, PeerGone
from proxy.relay import Relay, UpstreamTimeouts, backend_error
from proxy.response import Response
from proxy.response_info import parse_response
from support.backend import chunk, event
from support.feeds import FEEDS, Feed
from support.gateway import CHAT, post
from support.heads import every_answer
from support.memory_gateway import EPOCH, prepare
from support.memory_transport import ABORTED, CLOSING, OPEN, Link, MemoryTransport, run, turns_until

TYPE = b"Content-Type: text/event-stream\r\n"
EVENTS = [event("1"), event("2")]
TEXT = b"".join(EVENTS)
CODED = b"".join(map(chunk, EVENTS))
LAST = b"0\r\n\r\n"


def head(*lines: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\n" % status + TYPE + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


SIZED = head(b"Content-Length: %d" % len(TEXT))
CHUNKED = head(b"Transfer-Encoding: chunked")
UNTIL_CLOSE = head()


class Relayed:
    """A response that is relayed. `backend_end` sends it, `end` is how the handler ended: reusable, or an error."""

    def __init__(
        self,
        head: bytes,
        first: bytes = b"",
        *,
        minor: int = 1,
        begun: bool = False,
        label: str = "",
        fin: bool = False,
        target: bytes = CHAT,
    ) -> None:
        """`first` comes with the head, and the backend's end if `fin`. `begun`: the gateway has begun a stream."""
        self.link = Link()
        self.transport, self.backend_end = MemoryTransport(), MemoryTransport()
        self.client = self.link.client(self.transport)
        self.backend = self.link.backend(self.backend_end)
        received = self.backend.send_request(b"POST / HTTP/1.1\r\n\r\n")
        self.backend_end.receive(head + first)
        if fin:
            self.backend_end.receive_eof()
        self.info = parse_response(received.result(), b"POST")
        self.response = Response(self.client, prepare(post(target, minor=minor)), b"r-1", EPOCH, True)
        if begun:
            self.response.begin_event_stream()
        self.link.sent(self.client)
        self.counter = TokenCounter(label) if label else None
        self.relay = Relay(self.client, self.response, self.counter, UpstreamTimeouts(10, 600, 300))
        self.ends: list[Any] = []

    def start(self) -> "Relayed":
        self.client.run_handler(self._run(), self.ends.append)
        return self

    async def _run(self) -> Any:
        try:
            return await self.relay.run(self.backend, self.info)
        except GatewayError as error:
            return error.kind, error.message
        except PeerGone:
            return PeerGone

    @property
    def end(self) -> Any:
        return self.ends[0] if self.ends else "relaying"

    @property
    def body(self) -> bytes:
        """What the client got since the last call, without the head."""
        return self.link.sent(self.client).rpartition(every_answer(b"r-1") + b"\r\n")[2]


# --- Whole responses ---


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize(
    ("head", "raw", "minor", "body"),
    [
        (SIZED, TEXT, 1, TEXT),
        (SIZED, TEXT, 0, TEXT),
        (CHUNKED, CODED + LAST, 1, CODED + LAST),
        (CHUNKED, CODED + LAST, 0, TEXT),
        (UNTIL_CLOSE, TEXT, 0, TEXT),
    ],
)
def test_a_body_passes_in_whatever_pieces_it_arrives(
    head: bytes, raw: bytes, minor: int, body: bytes, feed: Feed
) -> None:
    relayed = Relayed(head, minor=minor).start()
    for piece in feed(raw):
        assert relayed.end == "relaying"
        relayed.backend_end.receive(piece)
    if head is UNTIL_CLOSE:
        relayed.backend_end.receive_eof()
    assert relayed.body == body
    assert (relayed.relay.complete, relayed.relay.error) == (True, None)


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
def test_a_body_until_close_becomes_chunks(feed: Feed) -> None:
    relayed = Relayed(UNTIL_CLOSE).start()
    for piece in feed(TEXT):
        relayed.backend_end.receive(piece)
    relayed.backend_end.receive_eof()
    assert relayed.body == b"".join(map(chunk, feed(TEXT))) + LAST
    assert relayed.relay.complete


@pytest.mark.parametrize(("head", "raw"), [(SIZED, TEXT), (CHUNKED, CODED + LAST)])
def test_head_and_first_bytes_are_one_write(head: bytes, raw: bytes) -> None:
    relayed = Relayed(head, raw[:3]).start()
    relayed.link.batcher.flush()
    assert len(relayed.transport.written) == 1
    assert relayed.transport.written[0].endswith(every_answer(b"r-1") + b"\r\n" + raw[:3])
    relayed.backend_end.receive(raw[3:])
    assert relayed.relay.complete


def test_a_body_that_came_with_its_head_needs_no_waiting() -> None:
    relayed = Relayed(CHUNKED, CODED + LAST).start()
    assert (relayed.body, relayed.relay.complete, relayed.end) == (CODED + LAST, True, False)


def test_a_backend_that_had_closed_before_has_ended_its_body() -> None:
    relayed = Relayed(UNTIL_CLOSE, TEXT, fin=True).start()
    assert (relayed.body, relayed.relay.complete) == (chunk(TEXT) + LAST, True)


def test_the_backends_end_after_a_whole_body_means_nothing() -> None:
    relayed = Relayed(SIZED).start()
    relayed.backend_end.receive(TEXT)
    relayed.backend_end.receive_eof()
    assert (relayed.end, relayed.relay.error) == (True, None)


# Whether the connection can carry another request


@pytest.mark.parametrize(
    ("head", "raw", "reusable"),
    [
        (SIZED, TEXT, True),
        (SIZED, TEXT + b"x", False),
        (SIZED.replace(TYPE, b"Connection: close\r\n"), TEXT, False),
        (CHUNKED, CODED + LAST, False),
    ],
    ids=["sized", "with surplus", "which is closed", "chunked"],
)
def test_the_connection_is_kept_after_a_body_of_known_length(head: bytes, raw: bytes, reusable: bool) -> None:
    relayed = Relayed(head).start()
    relayed.backend_end.receive(raw)
    assert relayed.end is reusable


def test_the_connection_is_not_kept_after_a_body_until_close() -> None:
    relayed = Relayed(UNTIL_CLOSE).start()
    relayed.backend_end.receive_eof()
    assert relayed.end is False


# Tokens


@pytest.mark.parametrize("coding", [CHUNKED, UNTIL_CLOSE])
def test_tokens_are_counted_from_the_payload_alone(coding: bytes) -> None:
    events = [event('{"choices":[{"delta":{"content":"a"}}]}')] * 3
    relayed = Relayed(coding, label="/v1/chat/completions").start()
    for each in events:
        relayed.backend_end.receive(chunk(each) if coding is CHUNKED else each)
    assert relayed.counter is not None
    assert relayed.counter.events == 3


def test_a_chunk_in_two_pieces_counts_like_a_whole_one() -> None:
    whole = chunk(event('{"choices":[{"delta":{"content":"a"}}]}'))
    relayed = Relayed(CHUNKED, label="/v1/chat/completions").start()
    for piece in (whole, whole[:9], whole[9:], whole):
        relayed.backend_end.receive(piece)
    assert relayed.counter is not None
    assert (relayed.counter.events, relayed.body) == (3, whole * 3)


# --- Responses that are cut ---

BETWEEN = [
    # the head, what was passed on, whether an event may follow it, how the backend ends
    (SIZED, EVENTS[0], False),
    (CHUNKED, chunk(EVENTS[0]), True),
    (CHUNKED, chunk(EVENTS[0]) + b"9\r\ndata", False),
    (CHUNKED, chunk(EVENTS[0]) + b"9", False),
    (CHUNKED, chunk(b"data: 1\n"), False),
    (CHUNKED, chunk(b"data: 1\n") + chunk(b"\n"), True),
    (CHUNKED, chunk(b"data: 1\r\n\r") + chunk(b"\n"), True),
    (CHUNKED, chunk(EVENTS[0])[:-2], False),
    (CHUNKED, b"", True),
    (UNTIL_CLOSE, EVENTS[0], True),
    (UNTIL_CLOSE, EVENTS[0] + b"da", False),
    (UNTIL_CLOSE, b"data: 1\r\n\r\n", True),
]


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(("head", "raw", "may_follow"), BETWEEN)
def test_a_cut_stream_ends_with_an_error_event_if_one_may_follow(
    head: bytes, raw: bytes, may_follow: bool, bytewise: bool
) -> None:
    relayed = Relayed(head).start()
    for piece in FEEDS["bytewise"](raw) if bytewise else [raw] * bool(raw):
        relayed.backend_end.receive(piece)
    relayed.backend_end.lose(ConnectionResetError())
    assert (b'"code": "backend_unavailable"' in relayed.body) is may_follow
    assert relayed.transport.state == CLOSING
    assert relayed.end is False
    assert not relayed.relay.complete
    assert relayed.relay.error is not None
    assert relayed.relay.error.message == "The backend closed in the middle of its answer."


def test_the_error_event_is_a_chunk_and_no_last_chunk_follows() -> None:
    relayed = Relayed(CHUNKED).start()
    relayed.backend_end.receive(chunk(EVENTS[0]))
    relayed.backend_end.receive_eof()
    passed, _, added = relayed.body.partition(chunk(EVENTS[0]))
    size, _, payload = added.partition(b"\r\n")
    assert (passed, int(size, 16)) == (b"", len(payload) - 2)
    assert json.loads(payload.removeprefix(b"data: "))["error"]["code"] == "backend_unavailable"


def test_a_clean_end_cuts_a_body_whose_length_is_known() -> None:
    relayed = Relayed(SIZED).start()
    relayed.backend_end.receive(TEXT[:-1])
    relayed.backend_end.receive_eof()
    assert (relayed.body, relayed.transport.state, relayed.relay.complete) == (TEXT[:-1], CLOSING, False)


@pytest.mark.parametrize(("head", "raw"), [(CHUNKED, CODED), (UNTIL_CLOSE, TEXT)])
def test_to_http_1_0_a_cut_is_a_reset(head: bytes, raw: bytes) -> None:
    """A close would look like the response's own end."""
    relayed = Relayed(head, minor=0).start()
    relayed.backend_end.receive(raw)
    relayed.backend_end.lose(ConnectionResetError())
    assert relayed.body.startswith(TEXT)
    assert relayed.transport.state == ABORTED


def test_a_response_without_events_is_cut_without_one() -> None:
    relayed = Relayed(CHUNKED.replace(TYPE, b"")).start()
    relayed.backend_end.receive(CODED)
    relayed.backend_end.receive_eof()
    assert (relayed.body, relayed.transport.state) == (CODED, CLOSING)


def test_garbage_in_a_chunked_body_cuts_it() -> None:
    relayed = Relayed(CHUNKED).start()
    relayed.backend_end.receive(chunk(EVENTS[0]))
    relayed.backend_end.receive(b"x\r\n")
    assert relayed.relay.error is not None
    assert relayed.relay.error.kind is BACKEND_MALFORMED
    assert (relayed.body, relayed.transport.state) == (chunk(EVENTS[0]), CLOSING)


def test_garbage_before_anything_was_passed_on_is_an_error() -> None:
    relayed = Relayed(CHUNKED, b"x\r\n").start()
    assert relayed.end == (BACKEND_MALFORMED, "A chunk size line is malformed.")
    assert (relayed.body, relayed.response.started) == (b"", False)


def test_a_silent_backend_is_cut_after_the_time_for_silence() -> None:
    relayed = Relayed(CHUNKED).start()
    for _ in range(5):
        relayed.backend_end.receive(chunk(EVENTS[0]))
        relayed.link.advance(299)
    relayed.link.advance(299)
    assert relayed.end == "relaying"
    relayed.link.advance(1)
    assert relayed.relay.error is not None
    assert relayed.relay.error.kind.code == BACKEND_TIMEOUT.code
    assert relayed.relay.error.message == "The answer did not go on within STREAM_IDLE_TIMEOUT."
    assert b'"code": "backend_timeout"' in relayed.body


# --- Streams that the backend ends with an error ---

NATIVE_ERROR = b'data: {"error": {"code": 500, "message": "no memory", "type": "server_error"}}\n\n'


@pytest.mark.parametrize(
    ("target", "end"),
    [
        (b"/v1/chat/completions", b""),
        (b"/v1/messages", b'event: error\ndata: {"type": "error", '),
        (b"/v1/responses", b"event: error\ndata: "),
    ],
)
@pytest.mark.parametrize("coding", [CHUNKED, UNTIL_CLOSE])
def test_its_error_follows_in_the_form_that_clients_look_for(coding: bytes, target: bytes, end: bytes) -> None:
    relayed = Relayed(coding, target=target, label=target.decode()).start()
    if coding is CHUNKED:
        relayed.backend_end.receive(chunk(EVENTS[0]))
        relayed.backend_end.receive(chunk(NATIVE_ERROR) + LAST)
    else:
        relayed.backend_end.receive(EVENTS[0] + NATIVE_ERROR)
        relayed.backend_end.receive_eof()
    _, _, added = relayed.body.partition(NATIVE_ERROR + b"\r\n")
    assert added.endswith(LAST)
    assert (end in added, b"no memory" in added) == (True, bool(end))
    assert relayed.relay.complete


def test_an_error_of_an_unknown_status_is_a_500() -> None:
    relayed = Relayed(CHUNKED, target=b"/v1/messages", label="/v1/messages").start()
    relayed.backend_end.receive(chunk(b'data: {"error": {"message": "no"}}\n\n') + LAST)
    assert b'"message": "no"' in relayed.body.partition(b"event: error")[2]


def test_a_stream_that_ends_well_is_left_alone() -> None:
    relayed = Relayed(CHUNKED, target=b"/v1/messages", label="/v1/messages").start()
    relayed.backend_end.receive(CODED + LAST)
    assert relayed.body == CODED + LAST


def test_the_error_of_a_cut_stream_has_the_number_that_follows() -> None:
    relayed = Relayed(CHUNKED, target=b"/v1/responses", label="/v1/responses").start()
    relayed.backend_end.receive(chunk(b'event: x\ndata: {"type":"x","sequence_number":41}\n\n'))
    relayed.backend_end.receive_eof()
    assert b'"sequence_number": 42,' in relayed.body


# --- The client ---


@pytest.mark.parametrize(
    ("last", "taken", "complete"),
    [(b"data: [DONE]\n\n", True, True), (b"data: [DONE]\n\n", False, False), (EVENTS[1], True, False)],
    ids=["it has all events", "it has not taken them", "there are more"],
)
def test_a_client_that_leaves_after_the_last_event_has_got_all(last: bytes, taken: bool, complete: bool) -> None:
    """Many do not wait for the end of the body, which follows."""
    relayed = Relayed(CHUNKED, label="/v1/chat/completions").start()
    relayed.backend_end.receive(chunk(EVENTS[0]) + chunk(last))
    if not taken:
        relayed.client.pause_writing()
    relayed.transport.receive_eof()
    assert (relayed.relay.complete, relayed.end) == (complete, False if complete else PeerGone)


def test_a_client_that_leaves_ends_the_relay_and_the_backend_is_read_on() -> None:
    relayed = Relayed(CHUNKED).start()
    relayed.client.pause_writing()
    assert not relayed.backend_end.reading
    relayed.transport.receive_eof()
    assert (relayed.end, relayed.backend_end.reading, relayed.client.upstream) == (PeerGone, True, None)


@pytest.mark.parametrize(
    ("is_paused", "size", "is_behind"),
    [(False, 1_000_000, False), (False, 1_100_000, True), (True, 10, False), (True, 60_000, True)],
)
def test_what_comes_for_a_client_that_has_left_is_counted_and_much_means_that_more_was_held_back(
    is_paused: bool, size: int, is_behind: bool
) -> None:
    """A Unix socket holds little, and is full only if the client took nothing."""
    relayed = Relayed(CHUNKED, label="/v1/chat/completions").start()
    relayed.backend_end.receive(chunk(EVENTS[0]))
    if is_paused:
        relayed.client.pause_writing()
    relayed.transport.receive_eof()
    remainder, ended = relayed.relay.count_remainder(relayed.backend), list[bool]()
    assert remainder is not None
    remainder.when_counted(ended.append)
    piece = chunk(event(f'{{"choices":[{{"delta":{{"content":"{"x" * 49_000}"}}}}]}}'))
    pieces = size // len(piece)
    for _ in range(pieces):
        relayed.backend_end.receive(piece)
    assert not ended
    relayed.backend_end.receive_eof()
    assert ended == [is_behind]
    assert relayed.counter is not None
    assert relayed.counter.events == pieces


def test_a_stream_without_an_event_is_read_on_until_the_backend_ends_it() -> None:
    relayed = Relayed(CHUNKED, label="/v1/chat/completions").start()
    relayed.transport.receive_eof()
    remainder, ended = relayed.relay.count_remainder(relayed.backend), list[bool]()
    assert remainder is not None
    remainder.when_counted(ended.append)
    assert relayed.backend_end.wrote_eof
    relayed.link.advance(599)
    assert not ended
    relayed.backend_end.receive(chunk(EVENTS[0]))
    relayed.link.advance(2)
    assert ended == [False]
    assert relayed.counter is not None
    assert relayed.counter.is_stream


def test_the_backend_is_read_no_faster_than_the_client_reads() -> None:
    relayed = Relayed(UNTIL_CLOSE, minor=0).start()
    relayed.transport.stall()
    relayed.backend_end.receive(b"x" * 70_000)
    relayed.link.batcher.flush()
    assert not relayed.backend_end.reading
    relayed.transport.take_unsent()
    assert relayed.backend_end.reading


def test_a_client_that_has_not_taken_its_last_response_delays_this_one() -> None:
    relayed = Relayed(CHUNKED)
    relayed.client.pause_writing()
    relayed.start()
    assert not relayed.backend_end.reading
    relayed.client.resume_writing()
    assert relayed.backend_end.reading


# --- Streams that the gateway has begun ---


@pytest.mark.parametrize(
    ("head", "raw", "body"),
    [(CHUNKED, CODED + LAST, CODED + LAST), (SIZED, TEXT, chunk(TEXT) + LAST), (UNTIL_CLOSE, TEXT, chunk(TEXT))],
)
def test_the_backends_events_continue_the_stream(head: bytes, raw: bytes, body: bytes) -> None:
    relayed = Relayed(head, begun=True).start()
    relayed.backend_end.receive(raw)
    assert relayed.body == body
    assert relayed.transport.state == OPEN


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED.replace(TYPE, b"Content-Type: application/json\r\n"),
        CHUNKED.replace(TYPE, TYPE + b"Content-Encoding: gzip\r\n"),
    ],
)
def test_another_response_cannot_continue_a_stream(head: bytes) -> None:
    relayed = Relayed(head, begun=True).start()
    assert relayed.end == (BACKEND_UNAVAILABLE, "The backend's answer is not the plain event stream that has begun.")
    assert relayed.body == b""


@pytest.mark.parametrize(
    ("page", "status", "message"),
    [
        (b'{"error": {"message": "the prompt is too long"}}', 400, "the prompt is too long"),
        (b"<html>", 502, "The backend answered 400."),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_the_backends_error_is_reported_as_its_own(page: bytes, status: int, message: str, at_once: bool) -> None:
    async def play() -> None:
        refusal = head(b"Content-Length: %d" % len(page), status=b"400 Bad Request")
        relayed = Relayed(refusal, page if at_once else b"", begun=True).start()
        if not at_once:
            await turns_until(lambda: not relayed.backend.received)
            relayed.backend_end.receive(page)
        await turns_until(lambda: relayed.ends)
        kind, text = relayed.end
        assert (kind.status, text) == (status, message)

    run(play())


def test_a_backend_that_does_not_finish_its_error_is_cut() -> None:
    async def play() -> None:
        relayed = Relayed(head(b"Content-Length: 99", status=b"400 Bad Request"), begun=True).start()
        relayed.link.advance(600)
        assert relayed.end == (BACKEND_TIMEOUT, BACKEND_TIMEOUT.message)

    run(play())


@pytest.mark.parametrize("page", [b'{"error": "no"}', b"[]", b"{}", b"\xff", b"", b'{"error": {}}'])
def test_an_error_page_in_another_form_reports_the_status(page: bytes) -> None:
    error = backend_error(503, page)
    assert (error.kind, error.message) == (BACKEND_UNAVAILABLE, "The backend answered 503.")


def test_an_error_page_of_llama_server_keeps_its_members() -> None:
    page = b'{"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 256}}'
    error = backend_error(400, page)
    assert (error.kind.status, error.message, error.kind.type) == (400, "too long", "exceed_context_size_error")
    assert error.reported is not None
    assert error.reported["n_ctx"] == 256
