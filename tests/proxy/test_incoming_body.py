"""incoming_body.py: the body is read whole, within its limits, and let go as soon as it is not needed."""

from itertools import count
from random import Random

import pytest

from accounting.request_record import Outcome, Stage
from core.errors import (
    BAD_REQUEST,
    MEMORY_FULL,
    REQUEST_TIMEOUT,
)
from http1.grammar import CONTINUE
from proxy.incoming_body import IncomingBody, digest_of
from support.backend import STREAM_HEAD
from support.gateway import CHAT, OPERATOR_KEY, post, request
from support.memory_gateway import MemoryGateway, in_memory, prepare
from support.memory_transport import end_of


@in_memory()
async def test_a_body_is_read_before_anything_else_is_taken(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, b"hello")[:-2])
    assert (served.request.stage, gateway.queue.active, gateway.memory.held_bytes) == (Stage.READING_BODY, 0, 3)
    served.transport.receive(b"lo")
    backend = await gateway.asked()
    assert backend.take().endswith(b"\r\nContent-Length: 5\r\n\r\nhello")
    assert (gateway.memory.held_bytes, served.request.unanswered_bytes) == (5, 5)
    backend.receive(STREAM_HEAD)
    assert (gateway.memory.held_bytes, served.request.unanswered_bytes) == (0, 0)  # it is not needed any more


@in_memory()
async def test_what_is_released_is_gone_except_a_small_body_that_is_kept(gateway: MemoryGateway) -> None:
    for size, kept in ((8, b'{"n": 1}'), (9, b"")):
        raw = b'{"n": 1}' + b" " * (size - 8)
        client = gateway.link.client()
        body = IncomingBody(gateway.services, client, prepare(post(CHAT, raw)), size)
        end_of(client).receive(raw)
        assert body.take_if_received()
        body.release(keeps_bytes=8)
        assert (b"".join(body.pieces), gateway.memory.held_bytes) == (kept, 0)
        assert (body.members_if_small() is None) == (not kept)
        body.release()
        assert b"".join(body.pieces) == b""


@in_memory()
async def test_a_chunked_body_is_sent_with_its_length(gateway: MemoryGateway) -> None:
    raw = request(b"POST", CHAT, None, b"Transfer-Encoding: chunked")
    served = gateway.serve(raw + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")
    assert (await gateway.asked()).take().endswith(b"\r\nContent-Length: 5\r\n\r\nhello")
    assert served.request.unanswered_bytes == 5


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("received", [0, 14, 33])
@in_memory()
async def test_a_body_with_the_first_line_of_a_request_is_refused(
    gateway: MemoryGateway, received: int, chunked: bool
) -> None:
    """However it is torn. Old llama-servers would take it for a request."""
    body = b"hello\r\nGET /slots HTTP/1.1\r\n\r\n"
    if chunked:
        head = request(b"POST", CHAT, None, b"Transfer-Encoding: chunked")
        raw = head + b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])
    else:
        raw = post(CHAT, body)
        head = raw[: -len(body)]
    begin = len(head) + received
    served = gateway.serve(raw[:begin] if received else raw)
    if received:
        served.transport.receive(raw[begin:])
    assert served.request.record.refusal is BAD_REQUEST
    assert not gateway.backends.transports


def dense(name: bytes) -> bytes:
    """A body that takes many steps to be read."""
    return b'{"n": 1, "%b": [%b0]}' % (name, b"{}," * 70)


@in_memory(scan_clock=count(0, 0.0005).__next__)
async def test_bodies_are_read_in_turns_by_key(gateway: MemoryGateway) -> None:
    for name in (b"first", b"second", b"third"):
        gateway.serve(post(CHAT, dense(name)))
    gateway.serve(post(CHAT, dense(b"other"), key=OPERATOR_KEY))
    await gateway.asked(2)
    sent = [backend.take() for backend in gateway.backends.transports]
    assert (dense(b"first") in sent[0], dense(b"other") in sent[1]) == (True, True)


@pytest.mark.parametrize(("before", "is_known"), [(b'"%b"' % (b"x" * 800), True), (b"[[]],[]," * 100 + b"[]", False)])
@in_memory(scan_clock=count(0, 0.002).__next__)
async def test_members_are_found_at_once_unless_that_takes_long(
    gateway: MemoryGateway, before: bytes, is_known: bool
) -> None:
    client, raw = gateway.link.client(), b'{"a": [%b], "n": 1}' % before
    body = IncomingBody(gateway.services, client, prepare(post(CHAT, raw)), len(raw))
    end_of(client).receive(raw)
    assert body.take_if_received()
    assert (body.members_if_small() is not None) is is_known
    body.release()


EXPECTING = post(CHAT, b"hello", b"Expect: 100-continue")


@in_memory()
async def test_a_client_that_expects_100_gets_it_before_its_body(gateway: MemoryGateway) -> None:
    served = gateway.serve(EXPECTING.removesuffix(b"hello"))
    assert served.sent == CONTINUE


@pytest.mark.parametrize(("received", "sent"), [(b"he", b""), (b"hello", b"")])
@in_memory()
async def test_a_client_that_did_not_wait_for_100_does_not_get_it(
    gateway: MemoryGateway, received: bytes, sent: bytes
) -> None:
    assert gateway.serve(EXPECTING.removesuffix(b"hello") + received).sent == sent


@in_memory()
async def test_a_body_that_takes_too_long_is_a_time_out(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, b"hello")[:-2])
    gateway.link.advance(30)
    assert (served.code, served.record.refusal, served.returned) == ("request_timeout", REQUEST_TIMEOUT, [False])
    assert served.record.bytes_in == 3
    gateway.expect_end(served, Outcome.TIMED_OUT, 408)


@in_memory()
async def test_a_malformed_body_is_refused(gateway: MemoryGateway) -> None:
    served = gateway.serve(request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + b"x\r\n")
    assert (served.record.refusal, served.returned) == (BAD_REQUEST, [False])


@pytest.mark.parametrize("received", [0, 1001])
@in_memory()
async def test_a_body_that_there_is_no_memory_for_is_refused(gateway: MemoryGateway, received: int) -> None:
    raw = post(CHAT, b"x" * 1001)
    served = gateway.serve(raw[: len(raw) - 1001 + received])
    if not received:
        served.transport.receive(b"x" * 1001)
    assert (served.code, served.record.refusal) == ("memory_full", MEMORY_FULL)
    gateway.expect_end(served, Outcome.REFUSED, 503)


@in_memory()
async def test_a_client_that_leaves_while_it_sends_has_cancelled(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, b"hello")[:-2])
    served.transport.receive_eof()
    assert (served.sent, served.record.stage, served.record.bytes_in) == (b"", Stage.READING_BODY, 3)
    gateway.expect_end(served, Outcome.CANCELLED, 499)


@pytest.mark.parametrize("size", [0, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_digest_does_not_depend_on_the_pieces(size: int) -> None:
    body = Random(7).randbytes(size)
    whole = digest_of("/v1/chat/completions", (body,))
    assert digest_of("/v1/chat/completions", [body[: size // 3], body[size // 3 :]]) == whole
    assert digest_of("/v1/completions", (body,)) != whole


@pytest.mark.parametrize("at", [0, (512 << 10) - 1, -(512 << 10), -1])
def test_a_digest_covers_a_large_bodys_start_and_end(at: int) -> None:
    body = bytearray(3 << 20)
    changed = bytearray(body)
    changed[at] = 1
    assert digest_of("", (changed,)) != digest_of("", (body,))


def test_bodies_of_other_lengths_have_other_digests() -> None:
    assert digest_of("", (bytes(3 << 20),)) != digest_of("", (bytes((3 << 20) + 1),))
