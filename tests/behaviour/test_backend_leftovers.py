"""A backend that answers before it has read the request's body takes the rest for another request."""

import tracemalloc

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, OPERATOR_KEY, Stack, get, post, request, scenario

STATUSES = [b"200 OK", b"400 Bad Request", b"401 Unauthorized", b"404 Not Found", b"413 Too Large", b"500 X", b"503 X"]


@pytest.mark.parametrize("status", STATUSES)
@scenario()
async def test_a_connection_that_has_refused_is_not_kept(stack: Stack, status: bytes) -> None:
    stack.backend.script(send(answer(b"{}", status)))
    stack.backend.script(send(answer(b"mine")))
    assert (await stack.ask(post(CHAT, b"GET /slots"))).status == int(status[:3])
    assert (await stack.ask(post())).body == b"mine"
    assert len(stack.backend.used) == (1 if status == b"200 OK" else 2)


@pytest.mark.parametrize(
    ("raw", "connections"),
    [
        (get(b"/v1/models"), 1),
        (request(b"GET", b"/v1/models", b""), 1),
        (request(b"GET", b"/v1/models", b"GET /slots"), 2),
        (request(b"GET", b"/slots", b"x", key=OPERATOR_KEY), 2),
        (post(b"/tokenize", b"x"), 1),
    ],
)
@scenario()
async def test_a_body_that_need_not_be_read_ends_the_connection(stack: Stack, raw: bytes, connections: int) -> None:
    """Older llama-servers read no body of a GET."""
    assert (await stack.ask(raw)).status == 200
    assert (await stack.ask(post())).status == 200
    assert len(stack.backend.used) == connections


@pytest.mark.parametrize(
    "body", [get(b"/slots"), b"{}\r\n" + get(b"/slots"), b"\r\nPOST /slots/1?action=erase HTTP/1.0\r\n\r\n"]
)
@scenario()
async def test_a_body_that_could_be_taken_for_a_request_is_not_sent(stack: Stack, body: bytes) -> None:
    chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])
    for raw in (post(CHAT, body), request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + chunked):
        response = await stack.ask(raw)
        assert (response.status, response.code) == (400, "bad_request")
        assert response.field(b"x-should-retry") == b"false"
    assert stack.backend.calls == []


@scenario(MAX_BUFFERED_BYTES="67108864")
async def test_a_body_is_not_kept_while_its_response_is_streamed(stack: Stack) -> None:
    """It would not count in MAX_BUFFERED_BYTES any more."""
    body_bytes = 16 << 20
    stack.backend.script(send(STREAM_HEAD + chunk(event("a"))), stall(stack.finish), send(LAST_CHUNK))
    client = await stack.client()
    tracemalloc.start()
    try:
        client.send(request(b"POST", CHAT, None, b"Content-Length: %d" % body_bytes))
        for _ in range(body_bytes >> 16):
            client.send(b" " * (1 << 16))
        await client.take_through(event("a"))
        assert tracemalloc.get_traced_memory()[0] < 2 * body_bytes  # the scripted backend keeps it once
    finally:
        tracemalloc.stop()
    stack.finish.set()
    await client.take_through(LAST_CHUNK)


@scenario(ALLOW_PATHS="/page")
async def test_no_coding_is_offered_to_the_backend_if_tokens_are_counted(stack: Stack) -> None:
    """The tokens of a compressed response cannot be counted. Other routes are relayed as they are."""
    codings = (b"Accept-Encoding: gzip, br", b"accept: application/json")
    for raw in (post(CHAT, b"{}", *codings), get(b"/v1/models", *codings), get(b"/page", *codings)):
        assert (await stack.ask(raw)).status == 200
    offered = [call.fields.get(b"accept-encoding") for call in stack.backend.calls]
    assert offered == [None, b"gzip, br", b"gzip, br"]
    assert {call.fields[b"accept"] for call in stack.backend.calls} == {b"application/json"}
