"""Streams that fail: the reason reaches each API's clients, and says whether to try again."""

import json
from typing import Any

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, until
from support.rawclient import RawClient

MESSAGES, RESPONSES = b"/v1/messages", b"/v1/responses"
BODY = b'{"stream": true}'
BEAT_S = 15.0
ONE_SLOT = {"MAX_CONCURRENT_REQUESTS": "1", "SSE_HEARTBEAT": "15"}
NUMBERED = b'event: response.created\ndata: {"type":"response.created","sequence_number":4,"response":{}}\n\n'


def events_of(payload: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a stream's events."""
    lines = [line for line in payload.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


async def begun(stack: Stack, target: bytes, body: bytes = BODY) -> RawClient:
    """A client whose stream the gateway has begun, and whose answer waits for `stack.finish`."""
    client = await stack.client()
    client.send(post(target, body, b"X-Request-Id: t-1"))
    await stack.backend.call()
    stack.advance(BEAT_S)
    await client.take_through(b"\r\n\r\n")
    await client.take_through(b"\n\n\r\n")
    return client


async def failed(stack: Stack, sent: bytes, target: bytes = RESPONSES) -> list[dict[str, Any]]:
    """The events that follow what a backend sends before it resets, on a connection that goes on."""
    stack.backend.script(send(STREAM_HEAD + sent), reset())
    client = await stack.client()
    client.send(post(target, BODY))
    await client.take_through(b"\r\n\r\n")
    await client.take_through(sent)
    _, payload = await client.chunks()
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    return events_of(payload)


# --- A refusal after a heartbeat ---


@pytest.mark.parametrize(
    ("status", "own", "code"),
    [
        (
            b"400 Bad Request",
            {"code": 400, "message": "m", "type": "exceed_context_size_error"},
            "context_length_exceeded",
        ),
        (b"400 Bad Request", {"code": 400, "message": "m", "type": "invalid_request_error"}, "invalid_prompt"),
        (b"401 Unauthorized", {"code": 401, "message": "m", "type": "authentication_error"}, "invalid_prompt"),
        (b"501 Not Implemented", {"code": 501, "message": "m", "type": "not_supported_error"}, "invalid_prompt"),
        (b"500 Internal Server Error", {"code": 500, "message": "m", "type": "server_error"}, "server_error"),
        (b"503 Service Unavailable", {"code": 503, "message": "m", "type": "unavailable_error"}, "unavailable_error"),
        (b"429 Too Many Requests", {"code": 429, "message": "m", "type": "rate_limit_error"}, "rate_limit_error"),
    ],
)
@scenario(SSE_HEARTBEAT="15")
async def test_a_failed_response_says_whether_to_try_again(
    stack: Stack, status: bytes, own: dict[str, Any], code: str
) -> None:
    stack.backend.script(stall(stack.finish), send(answer(json.dumps({"error": own}).encode(), status)))
    client = await begun(stack, RESPONSES)
    stack.finish.set()
    _, payload = await client.chunks()
    error, failure = events_of(payload)
    assert (error["type"], error["sequence_number"], error["error"], error["code"]) == ("error", 0, own, code)
    assert (failure["type"], failure["sequence_number"]) == ("response.failed", 1)
    assert failure["response"]["error"] == {"code": code, "message": "m"}
    await stack.stop()
    assert [(line["status"], line["backend_status"]) for line in stack.lines] == [(200, int(status[:3]))]


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (b"", "invalid_prompt"),
        (b"<html>", "invalid_prompt"),
        (b'{"error": "x"}', "invalid_prompt"),
        (b"[" * 50_000, "invalid_prompt"),
    ],
    ids=["empty", "HTML", "text", "deep"],
)
@scenario(SSE_HEARTBEAT="15")
async def test_a_refusal_in_another_form_is_told_by_its_status(stack: Stack, page: bytes, code: str) -> None:
    stack.backend.script(stall(stack.finish), send(answer(page, b"413 Content Too Large")))
    client = await begun(stack, RESPONSES)
    stack.finish.set()
    _, payload = await client.chunks()
    error, failure = events_of(payload)
    assert error["message"] == "The backend answered 413."
    assert failure["response"]["error"]["code"] == code


@scenario(SSE_HEARTBEAT="15", KEYS="alice:sk-alice-0123456789abcdef:10\n")
async def test_a_refusal_of_the_backends_counts_towards_the_rate_as_without_heartbeats(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer(b'{"error": {"message": "no"}}', b"400 Bad Request")))
    client = await begun(stack, CHAT)
    stack.finish.set()
    await client.chunks()
    assert (await stack.ask(post())).field(b"x-ratelimit-remaining-requests") == b"8"


@scenario(**ONE_SLOT, QUEUE_TIMEOUT="40")
async def test_a_refusal_of_the_gateways_own_may_be_tried_again(stack: Stack) -> None:
    stack.backend.script(stall())
    occupant = await stack.client()
    occupant.send(post())
    await stack.backend.call()
    client = await stack.client()
    client.send(post(RESPONSES, BODY))
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(BEAT_S)
    await client.take_through(b"\r\n\r\n")
    stack.advance(25)
    _, payload = await client.chunks()
    assert [body.get("code") for body in events_of(payload)] == ["queue_timeout", None]
    assert events_of(payload)[1]["response"]["error"]["code"] == "queue_timeout"


# --- A cut in the middle ---


@scenario()
async def test_a_responses_stream_that_is_cut_ends_as_failed(stack: Stack) -> None:
    error, failure = await failed(stack, chunk(event('{"type": "response.in_progress"}')))
    assert (error["type"], error["sequence_number"], error["code"]) == ("error", 0, "backend_unavailable")
    assert error["error"]["message"] == error["message"] == "The backend closed in the middle of its answer."
    assert (failure["type"], failure["sequence_number"]) == ("response.failed", 1)
    await stack.stop()
    assert [line["outcome"] for line in stack.lines][:1] == ["truncated"]


@pytest.mark.parametrize("piece", [1, 10, 1000])
@scenario()
async def test_numbers_go_on_from_what_was_passed(stack: Stack, piece: int) -> None:
    sent = b"".join(chunk(NUMBERED[start : start + piece]) for start in range(0, len(NUMBERED), piece))
    error, failure = await failed(stack, sent)
    assert (error["sequence_number"], failure["sequence_number"]) == (5, 6)


@scenario()
async def test_a_responses_stream_that_is_cut_inside_an_event_is_cut_off(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(NUMBERED[:-1])), reset())
    client = await stack.client()
    client.send(post(RESPONSES, BODY))
    await client.take_through(chunk(NUMBERED[:-1]))
    assert await client.take_all() == b""


@scenario(STREAM_IDLE_TIMEOUT="60", SSE_HEARTBEAT="0")
async def test_a_responses_stream_that_stalls_ends_as_failed(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(NUMBERED)), stall())
    client = await stack.client()
    client.send(post(RESPONSES, BODY))
    await client.take_through(chunk(NUMBERED))
    stack.advance(0)
    stack.advance(60)
    _, payload = await client.chunks()
    _, failure = events_of(payload)
    assert failure["response"]["error"]["code"] == "backend_timeout"
    assert "STREAM_IDLE_TIMEOUT" in failure["response"]["error"]["message"]


@scenario(MAX_REQUEST_DURATION="50", SSE_HEARTBEAT="0")
async def test_a_stream_that_takes_too_long_is_not_to_be_tried_again(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(NUMBERED)), stall())
    client = await stack.client()
    client.send(post(RESPONSES, BODY))
    await client.take_through(chunk(NUMBERED))
    stack.advance(50)
    _, payload = await client.chunks()
    _, failure = events_of(payload)
    assert failure["response"]["error"]["code"] == "invalid_prompt"
    assert "MAX_REQUEST_DURATION" in failure["response"]["error"]["message"]


@scenario()
async def test_an_http_1_0_client_sees_a_failed_response_and_a_proper_end(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(NUMBERED)), close())
    client = await stack.client()
    client.send(post(RESPONSES, BODY, minor=0))
    await client.take_through(NUMBERED)
    assert [body["type"] for body in events_of(await client.take_all())] == ["error", "response.failed"]
    assert client.ended == "fin"


# --- An error of llama-server's in the middle ---

OWN = {"code": 500, "message": "Compute error.", "type": "server_error"}
IN_THE_MIDDLE = b"data: " + json.dumps({"error": OWN}).encode() + b"\n\n"


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize("target", [RESPONSES, MESSAGES, CHAT])
@scenario()
async def test_an_error_in_the_middle_is_followed_by_the_form_of_the_api(
    stack: Stack, target: bytes, piece: int
) -> None:
    sent = chunk(event('{"x": 1}')) + chunk(IN_THE_MIDDLE)
    stack.backend.script(send(STREAM_HEAD + sent, piece), send(LAST_CHUNK))
    response = await stack.ask(post(target, BODY, b"X-Request-Id: t-1"))
    assert response.coded.startswith(sent)
    added = events_of(response.body.partition(IN_THE_MIDDLE)[2])
    if target == CHAT:
        assert added == []
    elif target == MESSAGES:
        assert added == [{"type": "error", "error": OWN, "request_id": "t-1"}]
    else:
        error, failure = added
        assert (error["error"], failure["response"]["error"]["message"]) == (OWN, "Compute error.")
        assert failure["response"]["error"]["code"] == "server_error"


@scenario()
async def test_an_error_in_anthropics_form_is_left_alone(stack: Stack) -> None:
    own = b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"x"}}\n\n'
    stack.backend.script(send(STREAM_HEAD + chunk(own) + LAST_CHUNK))
    assert (await stack.ask(post(MESSAGES, BODY))).body == own


# --- Routes that have no streams ---


@pytest.mark.parametrize(
    "target",
    [b"/v1/embeddings", b"/embedding", b"/v1/rerank", b"/v1/systemone", b"/v1/audio/transcriptions", b"/allowed"],
)
@scenario(**ONE_SLOT, ALLOW_PATHS="/allowed")
async def test_a_route_without_streams_is_never_answered_early(stack: Stack, target: bytes) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    occupant = await stack.client()
    occupant.send(post())
    await stack.backend.call()
    client = await stack.client()
    client.send(post(target, BODY))
    await until(lambda: stack.app.queue.queued == 1)
    for _ in range(4):
        stack.advance(BEAT_S)
    await client.silent()
    stack.backend.script(send(answer(b'{"error": {"message": "no"}}', b"501 Not Implemented")))
    stack.finish.set()
    assert (await client.response()).status == 501
