"""Heartbeats on a stream that the backend has not begun, and what follows them: its bytes, or one error event."""

import asyncio
import json

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, undated, until
from support.heads import every_answer
from support.rawclient import RawClient

STREAM = b'{"stream": true, "messages": []}'
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BEAT_S = 15.0
ONE_SLOT = {"MAX_CONCURRENT_REQUESTS": "1", "SSE_HEARTBEAT": "15"}


def comment(text: str) -> bytes:
    return b": " + text.encode() + b"\n\n"


async def queued(stack: Stack, body: bytes = STREAM, target: bytes = CHAT, **names: int) -> RawClient:
    """Return a client that waits while another one occupies the only slot."""
    if not stack.app.queue.active:
        stack.backend.script(stall(stack.finish), send(answer()))
        occupant = await stack.client()
        occupant.send(post())
        await stack.backend.call()
    before = stack.app.queue.queued
    client = await stack.client()
    client.send(post(target, body, b"X-Request-Id: t-1", **names))
    await until(lambda: stack.app.queue.queued == before + 1)
    return client


async def begun(client: RawClient) -> bytes:
    """Return the head with which the gateway begins a stream."""
    return await client.take_through(b"\r\n\r\n")


@scenario(**ONE_SLOT)
async def test_a_queued_stream_is_begun_after_the_interval_and_not_before(stack: Stack) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S - 0.1)
    await client.silent()
    stack.advance(0.1)
    assert undated(await begun(client)) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache, no-store\r\n"
        b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n"
        + every_answer(b"t-1")
        + b"x-ratelimit-limit-requests: 1000000\r\nx-ratelimit-remaining-requests: 999998\r\n"
        b"x-ratelimit-reset-requests: 1m0s\r\n\r\n"
    )
    for _ in range(3):
        assert await client.take_through(b"\n\n\r\n") == chunk(comment("queued 1"))
        stack.advance(BEAT_S)
    body = chunk(event("1")) + b"4;x=y\r\nab\n\n\r\n" + LAST_CHUNK
    stack.backend.script(send(STREAM_HEAD + body))
    stack.finish.set()
    assert await client.take_through(b"\n\n\r\n") == chunk(comment("queued 1"))
    assert await client.take_through(LAST_CHUNK) == body
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    await stack.stop()
    line = next(line for line in stack.lines if line["id"] == "t-1")
    assert (line["status"], line["outcome"], line["backend_status"]) == (200, "done", 200)


@scenario(**ONE_SLOT)
async def test_heartbeats_report_the_position_in_the_queue(stack: Stack) -> None:
    clients = [await queued(stack) for _ in range(3)]
    stack.advance(BEAT_S)
    for place, client in enumerate(clients, 1):
        await begun(client)
        assert await client.take_through(b"\n\n\r\n") == chunk(comment(f"queued {place}"))
    clients[0].reset()
    await until(lambda: stack.app.queue.queued == 2)
    stack.advance(BEAT_S)
    for place, client in enumerate(clients[1:], 1):
        assert await client.take_through(b"\n\n\r\n") == chunk(comment(f"queued {place}"))


@scenario(**ONE_SLOT)
async def test_anthropic_streams_have_ping_events(stack: Stack) -> None:
    client = await queued(stack, target=b"/v1/messages")
    stack.advance(BEAT_S)
    await begun(client)
    assert await client.take_through(b"\n\n\r\n") == chunk(PING)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"stream": false}',
        b'{"stream": "true"}',
        b'{"stream": 1}',
        b'{"messages": [{"content": "\\"stream\\": true"}], "options": {"stream": true}}',
        b'["stream", true]',
        b'{"stream": true',
        b"",
        b"\xff\xfe",
    ],
)
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_request_that_does_not_stream_is_never_answered_early(stack: Stack, body: bytes) -> None:
    client = await queued(stack, body)
    for _ in range(4):
        stack.advance(BEAT_S)
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)


@scenario(SSE_HEARTBEAT="0", MAX_CONCURRENT_REQUESTS="1")
async def test_heartbeats_can_be_turned_off(stack: Stack) -> None:
    client = await queued(stack)
    stack.advance(299)
    stack.finish.set()
    assert (await client.response()).body == HELLO


@scenario(**ONE_SLOT)
async def test_a_refusal_before_the_first_heartbeat_keeps_its_status(stack: Stack) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S - 1)
    stack.backend.script(send(answer(b'{"error": {"message": "no"}}', b"400 Bad Request")))
    stack.finish.set()
    assert (await client.response()).status == 400


@scenario(STATE="loading")
async def test_heartbeats_while_the_model_loads(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, STREAM))
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(BEAT_S)
    await begun(client)
    assert await client.take_through(b"\n\n\r\n") == chunk(comment("queued 1"))
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    await stack.turn("ready")
    assert await client.take_through(LAST_CHUNK) == chunk(event("1")) + LAST_CHUNK


@scenario()
async def test_heartbeats_until_the_first_event_of_the_backend(stack: Stack) -> None:
    speak, go_on = asyncio.Event(), asyncio.Event()
    stack.backend.script(stall(speak), send(STREAM_HEAD), stall(go_on), send(chunk(event("1")) + LAST_CHUNK))
    client = await stack.client()
    client.send(post(CHAT, STREAM))
    await stack.backend.call()
    stack.advance(BEAT_S)
    await begun(client)
    assert await client.take_through(b"\n\n\r\n") == chunk(comment("waiting"))
    speak.set()
    await until(lambda: [request.stage for request in stack.requests] == ["streaming"])
    for _ in range(3):
        stack.advance(BEAT_S)
        assert await client.take_through(b"\n\n\r\n") == chunk(comment("waiting"))
    go_on.set()
    assert await client.take_through(LAST_CHUNK) == chunk(event("1")) + LAST_CHUNK


# --- What follows ---


@pytest.mark.parametrize(
    "raw",
    [
        STREAM_HEAD + chunk(event("1")) + LAST_CHUNK,
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + event("1"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n" + event("1"),
    ],
    ids=["chunked", "close-delimited", "sized"],
)
@pytest.mark.parametrize("piece", [1, 10000])
@scenario(**ONE_SLOT)
async def test_the_backends_bytes_follow_in_any_framing(stack: Stack, raw: bytes, piece: int) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(send(raw, piece), close())
    stack.finish.set()
    _, payload = await client.chunks()
    assert payload == event("1")
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


OWN = (
    '{"message": "too long", "type": "exceed_context_size_error", "code": 400, "n_prompt_tokens": 9052, "n_ctx": 4096}'
)


@pytest.mark.parametrize(
    ("target", "beginning"),
    [
        (b"/v1/chat/completions", f'data: {{"error": {OWN}}}\n\n'),
        (
            b"/v1/messages",
            f'event: error\ndata: {{"type": "error", "error": {OWN}, "request_id": "t-1"}}\n\n',
        ),
        (
            b"/v1/responses",
            'event: error\ndata: {"type": "error", "sequence_number": 0, "code": "context_length_exceeded",'
            f' "message": "too long", "param": null, "error": {OWN}}}\n\nevent: response.failed\ndata: {{',
        ),
    ],
)
@scenario(**ONE_SLOT)
async def test_a_refusal_of_the_backend_becomes_one_event_in_the_routes_dialect(
    stack: Stack, target: bytes, beginning: str
) -> None:
    client = await queued(stack, target=target)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(send(answer(f'{{"error": {OWN}}}'.encode(), b"400 Bad Request")))
    stack.finish.set()
    _, payload = await client.chunks()
    assert payload.startswith(beginning.encode())
    assert b"response.failed" in payload or payload == beginning.encode()
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ((send(answer(b"not JSON", b"500 Internal Server Error")),), "backend_unavailable"),
        ((send(answer(b"{}")),), "backend_unavailable"),
        ((send(STREAM_HEAD.replace(b"200 OK", b"500 Oops") + chunk(event("1")) + LAST_CHUNK),), "backend_unavailable"),
        ((send(b"HTTP/1.1 500 Oops\r\n\r\nnot"), close()), "backend_unavailable"),
        ((send(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), close()), "backend_malformed"),
        ((send(b"HTTP/1.1 500 Oops\r\n\r\n" + b"x" * (2 << 20)),), "backend_unavailable"),
        ((send(b"nonsense\r\n\r\n"),), "backend_malformed"),
        ((send(b"HTTP/1.1 2"), reset()), "backend_unavailable"),
        ((reset(),), "backend_unavailable"),
    ],
)
@scenario(**ONE_SLOT)
async def test_a_failure_before_the_first_event_is_one_event_and_an_orderly_end(
    stack: Stack, steps: tuple[Step, ...], code: str
) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(*steps)
    stack.finish.set()
    _, payload = await client.chunks()
    error = json.loads(payload.removeprefix(b"data: "))["error"]
    assert (error["code"], payload.count(b"data: ")) == (code, 1)
    assert "HTTP/1." not in payload.decode()
    await stack.stop()
    line = next(line for line in stack.lines if line["id"] == "t-1")
    assert (line["status"], line["outcome"]) == (200, "refused")


@scenario(**ONE_SLOT, QUEUE_TIMEOUT="40", MAX_QUEUE_SIZE="3")
async def test_queue_timeout_after_heartbeats_is_an_event(stack: Stack) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    stack.advance(25)
    _, payload = await client.chunks()
    assert payload.startswith(comment("queued 1"))
    assert b'"code": "queue_timeout"' in payload
    assert not stack.app.queue.queued


@scenario(**ONE_SLOT)
async def test_a_stream_that_is_cut_after_it_began_is_visibly_cut(stack: Stack) -> None:
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), reset())
    stack.finish.set()
    rest = await client.take_all()
    assert rest.startswith(chunk(event("1")))
    assert rest.count(b"data: ") == 2
    assert b"backend_unavailable" in rest
    assert not rest.endswith(LAST_CHUNK)


@scenario(**ONE_SLOT)
async def test_an_http_1_0_client_gets_plain_bytes_and_the_end(stack: Stack) -> None:
    client = await queued(stack, minor=0)
    stack.advance(BEAT_S)
    head = await begun(client)
    assert b"Transfer-Encoding" not in head
    assert b"\r\nConnection: close\r\n" in head
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + chunk(event("2")) + LAST_CHUNK))
    stack.finish.set()
    assert await client.take_all() == comment("queued 1") + event("1") + event("2")
    assert client.ended == "fin"


@scenario(**ONE_SLOT)
async def test_an_http_1_0_client_gets_the_error_event_too(stack: Stack) -> None:
    client = await queued(stack, minor=0)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(comment("queued 1"))
    stack.backend.script(reset())
    stack.finish.set()
    payload = await client.take_all()
    assert json.loads(payload.removeprefix(b"data: "))["error"]["code"] == "backend_unavailable"


@scenario(CORS_ORIGINS="*", MAX_CONCURRENT_REQUESTS="1")
async def test_a_begun_stream_has_the_cors_fields(stack: Stack) -> None:
    await queued(stack)
    client = await stack.client()
    client.send(post(CHAT, STREAM, b"Origin: https://app.example"))
    await until(lambda: stack.app.queue.queued == 2)
    stack.advance(BEAT_S)
    assert (await begun(client)).count(b"Access-Control-Allow-Origin: *\r\n") == 1


@scenario(**ONE_SLOT)
async def test_a_stream_with_a_content_coding_cannot_follow_a_plain_head(stack: Stack) -> None:
    """The gateway's head has been sent without the content coding."""
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    stack.backend.script(
        send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + chunk(b"\x1f\x8b"))
    )
    stack.finish.set()
    rest = await client.take_through(LAST_CHUNK)
    assert b"backend_unavailable" in rest
    assert b"\x1f\x8b" not in rest
