"""heartbeat.py: what clients see of a heartbeat."""

import pytest

from accounting.request_record import Outcome
from backend.readiness import LOADING
from core.errors import (
    BACKEND_UNAVAILABLE,
)
from proxy.heartbeat import send_heartbeat
from proxy.response import Response
from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, event
from support.gateway import CHAT, post
from support.heads import every_answer
from support.memory_gateway import DATE, EPOCH, MemoryGateway, Served, in_memory, prepare
from support.memory_transport import Link, MemoryTransport

STREAM_BODY = b'{"stream": true}'
HEAD = (
    b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Type: text/event-stream\r\nCache-Control: no-cache, no-store\r\n"
    b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n" + every_answer(b"r-1") + b"\r\n"
)


def test_the_first_heartbeat_follows_the_streams_head_and_the_others_each_other() -> None:
    link = Link()
    client = link.client()
    response = Response(client, prepare(post()), b"r-1", EPOCH, True)
    send_heartbeat(response, 3)
    assert link.sent(client) == HEAD + b"c\r\n: queued 3\n\n\r\n"
    send_heartbeat(response, 0)
    assert link.sent(client) == b"b\r\n: waiting\n\n\r\n"


def test_a_heartbeat_is_what_the_dialect_says() -> None:
    link = Link()
    client = link.client()
    response = Response(client, prepare(post(b"/v1/messages")), b"r-1", EPOCH, True)
    send_heartbeat(response, 3)
    assert link.sent(client).endswith(b'event: ping\ndata: {"type": "ping"}\n\n\r\n')


BEAT = chunk(b": queued 1\n\n")
WAITING = chunk(b": waiting\n\n")


@in_memory(heartbeat_s=15)
async def test_a_queued_stream_gets_heartbeats_with_its_position(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(post(CHAT, STREAM_BODY))
    gateway.link.advance(14.75)
    assert served.sent == b""
    gateway.link.advance(0.25)
    assert served.sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert served.sent.endswith(b"\r\n\r\n" + BEAT)
    gateway.link.advance(14.75)
    assert served.sent.count(BEAT) == 1
    gateway.link.advance(0.25)
    assert served.sent.endswith(BEAT + BEAT)


@in_memory(heartbeat_s=15)
async def test_a_stream_that_waits_for_its_first_byte_gets_heartbeats(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, STREAM_BODY))
    backend = await gateway.asked()
    gateway.link.advance(15)
    assert served.sent.endswith(WAITING)
    backend.receive(STREAM_HEAD + chunk(event("1")))
    gateway.link.advance(15)
    backend.receive(LAST_CHUNK)
    assert served.sent.endswith(WAITING + chunk(event("1")) + LAST_CHUNK)
    gateway.expect_end(served, Outcome.DONE, 200)


@in_memory(heartbeat_s=15)
async def test_a_whole_answer_to_a_stream_that_has_begun_ends_it_with_an_error(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, STREAM_BODY))
    backend = await gateway.asked()
    gateway.link.advance(15)
    backend.receive(answer())
    assert b"not the plain event stream that has begun" in served.sent
    assert served.sent.endswith(LAST_CHUNK)
    assert served.record.refusal is BACKEND_UNAVAILABLE


@pytest.mark.parametrize("raw", [post(CHAT, b"{}"), post(CHAT, b"not json"), post(b"/v1/embeddings", STREAM_BODY)])
@in_memory(heartbeat_s=15)
async def test_other_requests_get_no_heartbeats(gateway: MemoryGateway, raw: bytes) -> None:
    gateway.readiness.state = LOADING
    served = gateway.serve(raw)
    gateway.link.advance(15)
    gateway.link.advance(15)
    assert served.sent == b""


@in_memory(heartbeat_s=15)
async def test_a_refusal_after_a_heartbeat_is_the_streams_last_event(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(post(CHAT, STREAM_BODY))
    gateway.link.advance(15)
    gateway.link.advance(45)
    assert b'"code": "queue_timeout"' in served.sent
    assert served.sent.endswith(LAST_CHUNK)
    assert (served.returned, served.record.status) == ([True], 200)


# Between the backend's events


async def streaming(gateway: MemoryGateway) -> tuple[Served, MemoryTransport]:
    """Return a request whose stream has begun, and the backend."""
    served = gateway.serve(post(CHAT, STREAM_BODY))
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    backend.receive(chunk(event("1")))
    gateway.link.advance(1)
    return served, backend


@in_memory(heartbeat_s=15)
async def test_a_stream_that_pauses_gets_heartbeats(gateway: MemoryGateway) -> None:
    served, backend = await streaming(gateway)
    gateway.link.advance(14.75)
    assert served.sent.count(WAITING) == 0
    gateway.link.advance(0.25)
    gateway.link.advance(15)
    assert served.sent.endswith(chunk(event("1")) + WAITING * 2)
    backend.receive(chunk(event("2")) + LAST_CHUNK)
    assert served.sent.endswith(WAITING + chunk(event("2")) + LAST_CHUNK)


@in_memory(heartbeat_s=15)
async def test_a_stream_that_goes_on_gets_none(gateway: MemoryGateway) -> None:
    served, backend = await streaming(gateway)
    for _ in range(5):
        gateway.link.advance(10)
        backend.receive(chunk(event("2")))
    assert WAITING not in served.sent


@in_memory(heartbeat_s=15)
async def test_an_event_is_not_torn_by_a_heartbeat(gateway: MemoryGateway) -> None:
    served, backend = await streaming(gateway)
    backend.receive(chunk(b"data: "))
    for _ in range(3):
        gateway.link.advance(15)
    assert WAITING not in served.sent


@in_memory(heartbeat_s=15)
async def test_a_client_that_takes_nothing_gets_no_heartbeats(gateway: MemoryGateway) -> None:
    served, _ = await streaming(gateway)
    served.client.pause_writing()
    for _ in range(3):
        gateway.link.advance(15)
    assert WAITING not in served.sent


@in_memory(heartbeat_s=15)
async def test_a_response_that_is_no_stream_gets_no_heartbeats(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, STREAM_BODY))
    (await gateway.asked()).receive(answer(b"x" * 100)[:-50])
    for _ in range(3):
        gateway.link.advance(15)
    assert WAITING not in served.sent
