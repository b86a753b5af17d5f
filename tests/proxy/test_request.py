"""request.py: the life of one request, phase by phase, and what it leaves behind however it ends."""

import asyncio
from contextlib import suppress

import pytest

from accounting.request_record import Outcome, Stage
from accounting.token_counter import TokenCounter
from backend.readiness import DEAD
from core.errors import (
    BACKEND_MALFORMED,
    BACKEND_TIMEOUT,
    BACKEND_UNAVAILABLE,
    BAD_REQUEST,
    EXPECTATION_FAILED,
    INTERNAL_ERROR,
    INVALID_API_KEY,
    ROUTE_NOT_FOUND,
    TOO_MANY_CONNECTIONS,
    GatewayError,
    Kind,
)
from proxy.endpoints import EndpointCall
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event
from support.gateway import CHAT, KEY, OPERATOR_KEY, get, post, request
from support.heads import every_answer
from support.memory_gateway import DATE, RATES, WHOLE, MemoryGateway, Served, in_memory
from support.memory_transport import ABORTED, CLOSING, ESTABLISHED, OPEN, MemoryTransport, turns_until
from transport.client_protocol import ForeignAwait

STREAM_BODY = b'{"stream": true}'
ADMIN = request(b"POST", b"/v1/chat/completions/control", b"{}")  # a route that takes no slot and is not repeatable


# --- A request that goes well ---


@in_memory()
async def test_a_request_is_relayed_and_recorded(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, b"{}"))
    backend = await gateway.asked()
    assert backend.take() == (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: backend\r\nX-Request-Id: r-1\r\nContent-Length: 2\r\n\r\n{}"
    )
    gateway.link.advance(3)
    backend.receive(answer())
    assert (served.sent, served.returned) == (WHOLE, [True])
    record = served.record
    assert (record.id, record.peer, record.key_id, record.stage) == (b"r-1", "192.0.2.7", "alice", Stage.DONE)
    assert (record.status, record.backend_status, record.bytes_in, record.bytes_out) == (200, 200, 2, len(WHOLE))
    assert (record.started_s, record.queued_s, record.left_queue_s) == (1000, 1000, 1000)
    assert (record.first_byte_s, record.ended_s, record.usage_source) == (1003, 1003, HELLO)
    gateway.expect_end(served, Outcome.DONE, 200)


@in_memory()
async def test_a_kept_connection_carries_the_next_request_in_the_same_callback(gateway: MemoryGateway) -> None:
    backend = await gateway.keep_connection()
    served = gateway.serve(post())
    gateway.link.batcher.flush()
    assert backend.take().startswith(b"POST ")
    backend.receive(answer())
    assert served.sent == WHOLE
    assert gateway.pool.idle_count == 1


@in_memory()
async def test_a_connection_that_the_backend_closes_is_not_kept(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    (await gateway.asked()).receive(answer(HELLO, b"200 OK", b"Connection: close"))
    assert served.returned == [True]
    assert gateway.pool.idle_count == 0


@in_memory(isolates=True)
async def test_nothing_is_sent_to_a_process_that_was_started_after_its_slot_was_leased(gateway: MemoryGateway) -> None:
    await gateway.isolation.prepare(5)
    gateway.backends.meanwhile = gateway.isolation.pause
    served = gateway.serve(post(CHAT, b"{}"))
    await turns_until(lambda: gateway.backends.transports)
    gateway.backends.meanwhile = lambda: None
    await gateway.isolation.prepare(5)
    backend = await gateway.asked(2)
    assert backend.take().endswith(b'\r\n\r\n{"id_slot":0,"cache_prompt":true}')
    assert gateway.backends.transports[0].take() == b""
    backend.receive(answer())
    gateway.expect_end(served, Outcome.DONE, 200)


@in_memory(isolates=True)
async def test_a_request_that_waits_for_an_isolated_slot_is_given_up_after_request_timeout(
    gateway: MemoryGateway,
) -> None:
    await gateway.isolation.prepare(5)
    gateway.serve(post(CHAT, STREAM_BODY))
    (await gateway.asked()).receive(STREAM_HEAD)
    waiting = gateway.serve(post(CHAT, b"{}"))
    await turns_until(lambda: waiting.request.stage is Stage.QUEUED)
    gateway.link.advance(600)
    await turns_until(lambda: waiting.returned)
    assert (waiting.status, waiting.code) == (504, "backend_timeout")


@in_memory()
async def test_streams_whose_bodies_are_gone_are_told_apart(gateway: MemoryGateway) -> None:
    """Only the one that was at work when the backend died may be held back."""
    bodies = (b'{"stream": true, "a": 1}', b'{"stream": true, "a": 2}')
    streams = [gateway.serve(post(body=body)) for body in bodies]
    await gateway.asked(2)
    for transport in gateway.backends.transports:
        transport.receive(STREAM_HEAD)
    assert [stream.request.stage for stream in streams] == [Stage.STREAMING] * 2
    assert streams[0].request.suspect() != streams[1].request.suspect()


@in_memory()
async def test_a_whole_answer_in_pieces_is_no_stream(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    assert served.request.stream_events is None
    (await gateway.asked()).receive(WHOLE[:-1])
    assert (served.request.stage, served.request.stream_events) == (Stage.STREAMING, None)


@in_memory()
async def test_a_stream_is_relayed_in_pieces_and_counted(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, STREAM_BODY))
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    assert (served.request.stage, served.request.backend_slots) == (Stage.STREAMING, 1)
    assert served.request.stream_events == 0
    backend.receive(chunk(event('{"choices":[{"delta":{"content":"a"}}]}')))
    assert served.request.stream_events == 1
    backend.receive(chunk(event("1")) + LAST_CHUNK)
    assert served.sent.endswith(chunk(event("1")) + LAST_CHUNK)
    assert (served.returned, gateway.pool.idle_count, served.request.backend_slots) == ([True], 0, 0)
    assert isinstance(served.record.usage_source, TokenCounter)
    assert gateway.queue.active == 0
    gateway.expect_end(served, Outcome.DONE, 200)


@in_memory()
async def test_tokens_of_other_routes_are_not_counted(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(b"/tokenize"))
    (await gateway.asked()).receive(answer())
    assert served.record.usage_source is None


@in_memory()
async def test_a_client_that_has_its_own_id_keeps_it(gateway: MemoryGateway) -> None:
    served = gateway.serve(get(b"/nowhere", b"X-Request-Id: mine"))
    assert b"\r\nX-Request-Id: mine\r\n" in served.sent
    assert served.record.id == b"mine"


# --- What the head says ---


@in_memory()
async def test_a_request_without_a_key_is_refused_and_the_connection_stays(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(key=None))
    assert (served.code, served.record.key_id, served.record.stage) == ("invalid_api_key", "-", Stage.AUTHENTICATING)
    assert (served.returned, served.record.refusal) == ([True], INVALID_API_KEY)
    gateway.expect_end(served, Outcome.REFUSED, 401)


@pytest.mark.parametrize(("key", "kind"), [(KEY, EXPECTATION_FAILED), (None, INVALID_API_KEY)])
@in_memory()
async def test_a_wrong_head_is_refused_after_its_key(gateway: MemoryGateway, key: bytes | None, kind: Kind) -> None:
    """Where its body ends is not known, so the connection ends in any case."""
    served = gateway.serve(post(CHAT, b"{}", b"Expect: a-pony", key=key))
    assert (served.record.refusal, served.returned) == (kind, [False])


@in_memory()
async def test_a_request_can_be_forbidden_whatever_its_head(gateway: MemoryGateway) -> None:
    for raw in (post(), post(CHAT, b"{}", b"Expect: a-pony"), post(key=None)):
        served = gateway.prepare(raw)
        served.request.forbid(GatewayError(TOO_MANY_CONNECTIONS))
        served.start()
        assert served.record.refusal is TOO_MANY_CONNECTIONS


@in_memory()
async def test_a_request_that_the_gateway_refuses_does_not_count_towards_the_rate(gateway: MemoryGateway) -> None:
    gateway.readiness.state = DEAD
    assert gateway.serve(post()).code == "loading"
    gateway.readiness.turn_ready()
    served = gateway.serve(post())
    (await gateway.asked()).receive(answer())
    assert RATES in served.sent


@in_memory()
async def test_a_refused_request_leaves_its_body_out_if_that_was_received(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(b"/nowhere", b"hello"))
    assert (served.code, served.returned, served.client.has_unread) == ("route_not_found", [True], False)


@in_memory()
async def test_a_body_that_was_not_received_ends_the_connection_of_a_refused_request(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(b"/nowhere", b"hello")[:-1])
    assert (served.record.refusal, served.returned) == (ROUTE_NOT_FOUND, [False])
    assert b"\r\nConnection: close\r\n" in served.sent


# --- The gateway's own endpoints ---


@in_memory()
async def test_an_own_endpoint_answers(gateway: MemoryGateway) -> None:
    served = gateway.serve(get(b"/ping", key=OPERATOR_KEY))
    (call,) = gateway.endpoints.calls
    assert (call.prepared.route.label, call.caller and call.caller.key_id) == ("/ping", "olga")
    assert (served.status, served.record.stage, served.record.key_id) == (200, Stage.DONE, "olga")
    gateway.expect_end(served, Outcome.DONE, 200)


@in_memory()
async def test_a_public_endpoint_has_no_caller_without_a_key(gateway: MemoryGateway) -> None:
    served = gateway.serve(get(b"/ping", key=None))
    assert (gateway.endpoints.calls[0].caller, served.record.key_id) == (None, "-")


@in_memory()
async def test_a_preflight_is_answered_without_an_endpoint(gateway: MemoryGateway) -> None:
    served = gateway.serve(request(b"OPTIONS", CHAT, key=None))
    assert (
        served.sent
        == b"HTTP/1.1 204 No Content\r\n" + DATE + b"Cache-Control: no-store\r\n" + every_answer(b"r-1") + b"\r\n"
    )
    assert gateway.endpoints.calls == []


# --- The backend's response ---


@in_memory()
async def test_interim_responses_do_not_pass(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    backend.receive(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
    assert served.sent == b""
    backend.receive(answer())
    assert served.sent == WHOLE


@in_memory()
async def test_too_many_interim_responses_are_malformed(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    (await gateway.asked()).receive(b"HTTP/1.1 100 Continue\r\n\r\n" * 17)
    assert served.record.refusal is BACKEND_MALFORMED
    gateway.expect_end(served, Outcome.REFUSED, 502)


@in_memory()
async def test_a_switch_of_protocols_is_malformed(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    (await gateway.asked()).receive(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    assert b"switched protocols without being asked" in served.sent
    assert served.record.refusal is BACKEND_MALFORMED


@in_memory()
async def test_a_malformed_head_is_a_502(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    backend.receive(b"HTTP/1.1 OK\r\n\r\n")
    assert (served.status, served.record.refusal, backend.state) == (502, BACKEND_MALFORMED, ABORTED)


@in_memory()
async def test_a_backend_that_closes_without_an_answer_is_a_502(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    (await gateway.asked()).receive_eof()
    await turns_until(lambda: served.returned)
    assert served.record.refusal is BACKEND_UNAVAILABLE
    gateway.expect_end(served, Outcome.REFUSED, 502)


@in_memory()
async def test_a_backend_that_does_not_answer_in_time_is_a_504(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    gateway.link.advance(600)
    assert (served.code, served.record.refusal) == ("backend_timeout", BACKEND_TIMEOUT)
    assert (backend.wrote_eof, backend.state) == (True, OPEN)
    gateway.link.advance(600)
    assert backend.state == ABORTED
    assert served.record.stage == Stage.AWAITING_RESPONSE
    gateway.expect_end(served, Outcome.TIMED_OUT, 504)


@in_memory()
async def test_an_answer_during_a_drain_ends_the_connection(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    gateway.lifecycle.drain()
    backend.receive(answer())
    assert b"\r\nConnection: close\r\n" in served.sent
    assert served.returned == [False]


@in_memory()
async def test_an_answer_that_was_sent_before_the_drain_ends_the_connection_too(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    gateway.lifecycle.drain()
    backend.receive(LAST_CHUNK)
    assert (served.returned, b"Connection: close" in served.sent) == ([False], False)


# Connections that ended before the backend read the request


async def crossed(
    gateway: MemoryGateway, raw: bytes, *, reset: bool = False, sent_ms: int = 0, unacknowledged: int = 0
) -> Served:
    """Serve a request on a kept connection, which the backend ends just then."""
    backend = await gateway.keep_connection()
    served = gateway.serve(raw)
    gateway.link.batcher.flush()
    assert backend.take()
    end(backend, reset=reset, sent_ms=sent_ms, unacknowledged=unacknowledged)
    return served


def end(backend: MemoryTransport, *, reset: bool = False, sent_ms: int = 0, unacknowledged: int = 0) -> None:
    backend.sock.tcp = ESTABLISHED._replace(sent_ms=sent_ms, unacknowledged=unacknowledged)
    if reset:
        backend.lose(ConnectionResetError())
    else:
        backend.receive_eof()


@pytest.mark.parametrize("reset", [False, True])
@in_memory()
async def test_a_request_that_crosses_the_end_of_its_connection_is_sent_again_on_a_new_one(
    gateway: MemoryGateway, reset: bool
) -> None:
    served = await crossed(gateway, post(), reset=reset)
    backend = await gateway.asked(2)
    assert backend.take().startswith(b"POST ")
    backend.receive(answer())
    assert (served.sent, gateway.releases, gateway.queue.active) == (WHOLE, [], 0)


@pytest.mark.parametrize("reset", [False, True])
@in_memory()
async def test_a_request_that_may_have_been_read_is_not_sent_again(gateway: MemoryGateway, reset: bool) -> None:
    served = await crossed(gateway, post(), reset=reset, sent_ms=100)
    await turns_until(lambda: served.returned)
    assert (served.status, served.record.refusal) == (502, BACKEND_UNAVAILABLE)
    assert not gateway.backends.transports[-1].written


@in_memory()
async def test_a_request_that_must_not_be_repeated_is_sent_again_only_if_it_was_surely_not_read(
    gateway: MemoryGateway,
) -> None:
    for reset in (False, True):
        served = await crossed(gateway, ADMIN, reset=reset)
        assert (served.status, served.record.refusal) == (502, BACKEND_UNAVAILABLE)
    served = await crossed(gateway, ADMIN, unacknowledged=1)
    (await gateway.asked(4)).receive(answer())
    assert served.status == 200


@in_memory()
async def test_a_request_is_sent_again_so_often_and_no_more(gateway: MemoryGateway) -> None:
    await gateway.keep_connection()
    served = await crossed(gateway, post(), unacknowledged=1)
    for connections in (3, 4, 5):  # they are new, though another one is idle
        assert served.returned == []
        end(await gateway.asked(connections), unacknowledged=1)
    assert (served.status, served.record.refusal) == (502, BACKEND_UNAVAILABLE)


@in_memory()
async def test_a_request_at_work_when_the_process_dies_waits_for_the_next_one(gateway: MemoryGateway) -> None:
    """A FIN and no process afterwards: the request may have been at work, and none is blamed here."""
    await gateway.keep_connection()
    gateway.backends.error = ConnectionRefusedError()
    backend = gateway.backends.transports[0]
    served = gateway.serve(post())
    gateway.link.batcher.flush()
    end(backend)
    await turns_until(lambda: gateway.readiness.pending)
    assert gateway.readiness.doubts == 1
    gateway.backends.error = None
    gateway.readiness.turn_ready()
    (await gateway.asked(2)).receive(answer())
    assert served.status == 200


@in_memory()
async def test_a_request_that_was_not_read_waits_for_the_next_process(gateway: MemoryGateway) -> None:
    await gateway.keep_connection()
    gateway.backends.error = ConnectionRefusedError()
    served = gateway.serve(post())
    gateway.link.batcher.flush()
    end(gateway.backends.transports[0], unacknowledged=1)
    await turns_until(lambda: gateway.readiness.pending)
    gateway.backends.error = None
    gateway.readiness.turn_ready()
    (await gateway.asked(2)).receive(answer())
    assert served.status == 200


# --- The end ---


@in_memory(duration_s=100)
async def test_a_request_may_take_so_long_and_no_longer(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    await gateway.asked()
    gateway.link.advance(100)
    assert b"The request took longer than MAX_REQUEST_DURATION allows." in served.sent
    gateway.expect_end(served, Outcome.TIMED_OUT, 504)


@in_memory(duration_s=100)
async def test_the_limit_does_not_outlast_the_request(gateway: MemoryGateway) -> None:
    served = gateway.serve(get(b"/ping"))
    again: list[bytes] = []

    class Head:
        def set_result(self, value: bytes) -> None:
            again.append(value)

        def set_exception(self, error: Exception) -> None:
            raise AssertionError

    served.client.expect_head(Head(), 1000, 1000)
    gateway.link.advance(100)
    served.transport.receive(get(b"/ping"))
    assert again == [get(b"/ping")]


@in_memory()
async def test_a_fault_of_the_gateway_is_a_500_with_a_traceback_in_the_log(gateway: MemoryGateway) -> None:
    async def broken(call: EndpointCall) -> None:
        raise ValueError("broken")

    gateway.endpoints.act = broken
    served = gateway.serve(get(b"/ping"))
    assert (served.code, served.record.refusal, served.returned) == ("internal_error", INTERNAL_ERROR, [False])
    assert b"broken" not in served.sent
    gateway.expect_end(served, Outcome.REFUSED, 500)


@in_memory()
async def test_the_log_names_the_request_that_failed(gateway: MemoryGateway, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(call: EndpointCall) -> None:
        raise ValueError("broken")

    gateway.endpoints.act = broken
    gateway.serve(get(b"/ping", b"X-Request-Id: mine"))
    (entry,) = caplog.records
    assert entry.getMessage() == "request mine failed"
    assert entry.exc_text is not None
    assert entry.exc_text.endswith("ValueError: broken")


@in_memory()
async def test_a_handler_that_goes_on_awaiting_foreign_things_is_a_500_and_ends_the_connection(
    gateway: MemoryGateway,
) -> None:
    async def stubborn(call: EndpointCall) -> None:
        for _ in range(20):
            with suppress(ForeignAwait):
                await asyncio.sleep(0.01)

    gateway.endpoints.act = stubborn
    served = gateway.serve(get(b"/ping"))
    assert (served.code, served.returned, served.transport.state) == ("internal_error", [False], ABORTED)
    gateway.expect_end(served, Outcome.REFUSED, 500)


@in_memory()
async def test_a_refusal_that_the_client_does_not_stay_for_is_a_cancellation(gateway: MemoryGateway) -> None:
    async def late(call: EndpointCall) -> None:
        call.client.ended = True
        raise GatewayError(BAD_REQUEST)

    gateway.endpoints.act = late
    served = gateway.serve(get(b"/ping"))
    assert (served.sent, served.record.refusal) == (b"", None)
    gateway.expect_end(served, Outcome.CANCELLED, 499)


@in_memory()
async def test_closing_aborts_the_connection_of_a_client_that_left(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(CHAT, b"hello")[:-2])
    served.client.cancel_wait(ConnectionError())
    served.request.cancel()
    served.request.close()
    assert served.transport.state == ABORTED


@pytest.mark.parametrize(
    ("raw", "state"),
    [(get(b"/nowhere", b"Connection: close"), CLOSING), (post(b"/nowhere", b"hello")[:-1], OPEN)],
    ids=["nothing is unread", "a body is still coming"],
)
@in_memory()
async def test_closing_waits_for_a_client_that_is_still_sending(gateway: MemoryGateway, raw: bytes, state: str) -> None:
    served = gateway.serve(raw)
    served.request.close()
    assert served.transport.state == state
    assert served.transport.wrote_eof is (state == OPEN)


@in_memory()
async def test_a_response_that_has_ended_the_connection_leaves_nothing_to_close(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(minor=0))
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    backend.receive_eof()
    assert served.transport.state == ABORTED
    served.request.close()
    assert served.transport.state == ABORTED
