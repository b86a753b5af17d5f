"""Signs of life on a stream that the backend has not begun, and what follows them: its bytes, or one error event."""

import asyncio
import json

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, undated, until
from support.rawclient import RawClient

STREAM = b'{"stream": true, "messages": []}'
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BEAT_S = 15.0
ONE_SLOT = {"MAX_CONCURRENT_REQUESTS": "1", "SSE_HEARTBEAT": "15"}


def sign(text: str) -> bytes:
    return b": " + text.encode() + b"\n\n"


async def queued(stack: Stack, body: bytes = STREAM, target: bytes = CHAT, **names: int) -> RawClient:
    """A client that waits behind one that occupies the only slot."""
    if not stack.parts.gate.active:
        stack.backend.script(stall(stack.finish), send(answer()))
        occupant = await stack.client()
        occupant.send(post())
        await stack.backend.call()
    before = stack.parts.gate.queued
    client = await stack.client()
    client.send(post(target, body, b"X-Request-Id: t-1", **names))
    await until(lambda: stack.parts.gate.queued == before + 1)
    return client


async def begun(client: RawClient) -> bytes:
    """The head with which the gateway begins a stream."""
    return await client.take_through(b"\r\n\r\n")


@scenario(**ONE_SLOT)
async def test_queued_stream_is_begun_after_the_interval_and_not_before(stack):
    client = await queued(stack)
    stack.advance(BEAT_S - 0.1)
    await client.silent()
    stack.advance(0.1)
    assert undated(await begun(client)) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
        b"Transfer-Encoding: chunked\r\nX-Request-Id: t-1\r\n"
        b"x-ratelimit-limit-requests: 1000000\r\nx-ratelimit-remaining-requests: 999998\r\n"
        b"x-ratelimit-reset-requests: 1m0s\r\n\r\n"
    )
    for _ in range(3):
        assert await client.take_through(b"\n\n\r\n") == chunk(sign("queued 1"))
        stack.advance(BEAT_S)
    body = chunk(event("1")) + b"4;x=y\r\nab\n\n\r\n" + LAST_CHUNK
    stack.backend.script(send(STREAM_HEAD + body))
    stack.finish.set()
    assert await client.take_through(b"\n\n\r\n") == chunk(sign("queued 1"))
    assert await client.take_through(LAST_CHUNK) == body
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    await stack.stop()
    line = next(line for line in stack.lines if line["id"] == "t-1")
    assert (line["status"], line["outcome"], line["backend_status"]) == (200, "done", 200)


@scenario(**ONE_SLOT)
async def test_place_in_the_queue_is_told(stack):
    clients = [await queued(stack) for _ in range(3)]
    stack.advance(BEAT_S)
    for place, client in enumerate(clients, 1):
        await begun(client)
        assert await client.take_through(b"\n\n\r\n") == chunk(sign(f"queued {place}"))
    clients[0].reset()
    await until(lambda: stack.parts.gate.queued == 2)
    stack.advance(BEAT_S)
    for place, client in enumerate(clients[1:], 1):
        assert await client.take_through(b"\n\n\r\n") == chunk(sign(f"queued {place}"))


@scenario(**ONE_SLOT)
async def test_anthropic_streams_have_anthropics_ping(stack):
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
        b"[" * 100000,
    ],
)
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_request_that_does_not_stream_is_never_answered_early(stack, body):
    client = await queued(stack, body)
    for _ in range(4):
        stack.advance(BEAT_S)
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)


@scenario(SSE_HEARTBEAT="0", MAX_CONCURRENT_REQUESTS="1")
async def test_heartbeats_may_be_switched_off(stack):
    client = await queued(stack)
    stack.advance(299)
    stack.finish.set()
    assert (await client.response()).body == HELLO


@scenario(**ONE_SLOT)
async def test_quick_refusal_has_a_status_of_its_own(stack):
    client = await queued(stack)
    stack.advance(BEAT_S - 1)
    stack.backend.script(send(answer(b'{"error": {"message": "no"}}', b"400 Bad Request")))
    stack.finish.set()
    assert (await client.response()).status == 400


@scenario(STATE="loading")
async def test_loading_model(stack):
    client = await stack.client()
    client.send(post(CHAT, STREAM))
    await until(lambda: stack.parts.gate.queued == 1)
    stack.advance(BEAT_S)
    await begun(client)
    assert await client.take_through(b"\n\n\r\n") == chunk(sign("queued 1"))
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    await stack.turn("ready")
    assert await client.take_through(LAST_CHUNK) == chunk(event("1")) + LAST_CHUNK


@scenario()
async def test_request_that_the_backend_defers_and_the_end_of_beats_with_its_first_byte(stack):
    speak, go_on = asyncio.Event(), asyncio.Event()
    stack.backend.script(stall(speak), send(STREAM_HEAD), stall(go_on), send(chunk(event("1")) + LAST_CHUNK))
    client = await stack.client()
    client.send(post(CHAT, STREAM))
    await stack.backend.call()
    stack.advance(BEAT_S)
    await begun(client)
    assert await client.take_through(b"\n\n\r\n") == chunk(sign("waiting"))
    speak.set()
    await until(lambda: [client.request.stage for client in stack.parts.clients if client.request] == ["streaming"])
    for _ in range(3):
        stack.advance(BEAT_S)
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
async def test_backends_bytes_follow_in_any_framing(stack, raw, piece):
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(send(raw, piece), close())
    stack.finish.set()
    _, payload = await client._chunks()
    assert payload == event("1")
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (
            b"/v1/chat/completions",
            'data: {"error": {"message": MESSAGE, "type": "api_error", "param": null, "code": CODE}}',
        ),
        (b"/v1/messages", 'event: error\ndata: {"type": "error", "error": {"message": MESSAGE, "type": "api_error"}}'),
        (b"/v1/responses", 'event: error\ndata: {"type": "error", "code": CODE, "message": MESSAGE, "param": null}'),
    ],
)
@scenario(**ONE_SLOT)
async def test_backends_refusal_becomes_one_event_in_the_routes_dialect(stack, target, shape):
    client = await queued(stack, target=target)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(send(answer(b'{"error": {"code": 400, "message": "too long"}}', b"400 Bad Request")))
    stack.finish.set()
    _, payload = await client._chunks()
    wanted = shape.replace("MESSAGE", '"The backend answered 400: too long"').replace("CODE", '"backend_unavailable"')
    assert payload == wanted.encode() + b"\n\n"
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
async def test_failure_before_the_backends_first_event_is_one_event_and_a_proper_end(stack, steps, code):
    client = await queued(stack)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(b"\n\n\r\n")
    stack.backend.script(*steps)
    stack.finish.set()
    _, payload = await client._chunks()
    error = json.loads(payload.removeprefix(b"data: "))["error"]
    assert (error["code"], payload.count(b"data: ")) == (code, 1)
    assert "HTTP/1." not in payload.decode()
    await stack.stop()
    line = next(line for line in stack.lines if line["id"] == "t-1")
    assert (line["status"], line["outcome"]) == (200, "refused")


@scenario(**ONE_SLOT, QUEUE_TIMEOUT="40", MAX_QUEUE_SIZE="3")
async def test_queue_timeout_after_heartbeats_is_an_event(stack):
    client = await queued(stack)
    stack.advance(BEAT_S)
    stack.advance(25)
    await begun(client)
    _, payload = await client._chunks()
    assert payload.startswith(sign("queued 1"))
    assert b'"code": "queue_timeout"' in payload
    assert not stack.parts.gate.queued


@scenario(**ONE_SLOT)
async def test_cut_after_the_backend_began_is_seen_as_a_cut(stack):
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
async def test_http_1_0_client_gets_plain_bytes_and_the_end(stack):
    client = await queued(stack, minor=0)
    stack.advance(BEAT_S)
    head = await begun(client)
    assert b"Transfer-Encoding" not in head
    assert b"\r\nConnection: close\r\n" in head
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + chunk(event("2")) + LAST_CHUNK))
    stack.finish.set()
    assert await client.take_all() == sign("queued 1") + event("1") + event("2")
    assert client.ended == "fin"


@scenario(**ONE_SLOT)
async def test_http_1_0_client_gets_the_error_event_too(stack):
    client = await queued(stack, minor=0)
    stack.advance(BEAT_S)
    await begun(client)
    await client.take_through(sign("queued 1"))
    stack.backend.script(reset())
    stack.finish.set()
    payload = await client.take_all()
    assert json.loads(payload.removeprefix(b"data: "))["error"]["code"] == "backend_unavailable"


@scenario(CORS_ORIGINS="*", MAX_CONCURRENT_REQUESTS="1")
async def test_begun_stream_is_readable_for_a_page(stack):
    await queued(stack)
    client = await stack.client()
    client.send(post(CHAT, STREAM, b"Origin: https://app.example"))
    await until(lambda: stack.parts.gate.queued == 2)
    stack.advance(BEAT_S)
    assert (await begun(client)).count(b"Access-Control-Allow-Origin: *\r\n") == 1


@scenario(**ONE_SLOT)
async def test_a_coded_stream_cannot_follow_a_plain_head(stack):
    """The head that names the coding has not been sent, and cannot be any more."""
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
