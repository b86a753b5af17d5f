"""What the backend and the client receive, byte for byte, over real sockets."""

import asyncio
import hashlib
import random

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, expect, send, stall
from support.gateway import BACKEND_KEY, CHAT, KEY, OTHER_KEY, Stack, get, post, request, scenario, undated
from support.heads import every_answer

ID = b"X-Request-Id: t-1"
RATES = (
    b"x-ratelimit-limit-requests: 1000000\r\nx-ratelimit-remaining-requests: 999999\r\n"
    b"x-ratelimit-reset-requests: 1m0s\r\n"
)
OWN = every_answer(b"t-1") + RATES + b"\r\n"  # what the gateway adds to every relayed head, last


def own_fields(stack: Stack) -> bytes:
    """Return the fields with which every request to the backend begins."""
    fields = f"Host: 127.0.0.1:{stack.backend.port}\r\nAuthorization: Bearer {BACKEND_KEY}\r\nX-Request-Id: t-1\r\n"
    return fields.encode()


# --- Responses ---


@scenario()
async def test_a_sized_response_passes_unchanged(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nX-Two:  b \r\nx-TWO: a\r\nContent-Length: 5\r\n\r\nhello"))
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID))
    response = await client.response()
    assert (
        undated(response.head) + response.body
        == b"HTTP/1.1 200 OK\r\nX-Two: b\r\nx-TWO: a\r\nContent-Length: 5\r\n" + OWN + b"hello"
    )


@scenario()
async def test_a_chunked_response_passes_chunk_by_chunk(stack: Stack) -> None:
    coded = b'5\r\nhello\r\n00A;x="y"\r\n0123456789\r\n0\r\n\r\n'
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n" + coded))
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID))
    head = await client.take_through(b"\r\n\r\n")
    assert undated(head) == b"HTTP/1.1 200 OK\r\nA: b\r\nTransfer-Encoding: chunked\r\n" + OWN
    assert await client.take(len(coded)) == coded
    client.send(get(b"/ping"))
    assert (await client.response()).body == b"pong\n"


@scenario()
async def test_a_close_delimited_response_becomes_chunked(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\n\r\nhello"), close())
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID))
    response = await client.response()
    assert undated(response.head) == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + OWN
    assert (response.body, response.coded[-5:]) == (b"hello", LAST_CHUNK)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@scenario()
async def test_trailers_are_dropped_whole_or_in_pieces(stack: Stack) -> None:
    coded = b"2\r\nhi\r\n0\r\nX-Secret: 1\r\nEtag: x\r\n\r\n"
    for piece in (1, 7, len(coded)):
        stack.backend.script(
            send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Etag\r\n\r\n"), send(coded, piece)
        )
        client = await stack.client()
        client.send(post(CHAT, b"{}", ID))
        response = await client.response()
        assert response.coded == b"2\r\nhi\r\n0\r\n\r\n"
        assert response.field(b"trailer") is None
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200


@pytest.mark.parametrize("framing", ["sized", "chunked", "close"])
@scenario()
async def test_a_response_may_arrive_byte_by_byte(stack: Stack, framing: str) -> None:
    text = b'data: {"a": 1}\n\n' * 3
    raw = {
        "sized": answer(text),
        "chunked": STREAM_HEAD + b"".join(chunk(text[at : at + 7]) for at in range(0, len(text), 7)) + LAST_CHUNK,
        "close": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text,
    }[framing]
    stack.backend.script(send(raw, piece=1), *([close()] if framing == "close" else []))
    response = await stack.ask(post())
    assert response.body == text


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize("framing", ["sized", "chunked", "close"])
@scenario()
async def test_sixteen_megabytes_pass_unchanged(stack: Stack, framing: str, minor: int) -> None:
    payload = random.Random(framing).randbytes(1 << 20) * 16
    head = {
        "sized": b"Content-Length: %d" % len(payload),
        "chunked": b"Transfer-Encoding: chunked",
        "close": b"Server: x",
    }
    coded = b"".join(chunk(payload[at : at + 99999]) for at in range(0, len(payload), 99999)) + LAST_CHUNK
    stack.backend.script(
        send(b"HTTP/1.1 200 OK\r\n" + head[framing] + b"\r\n\r\n"),
        send(coded if framing == "chunked" else payload, piece=1 << 18),
        *([close()] if framing == "close" else []),
    )
    client = await stack.client()
    client.send(post(minor=minor))
    response = await client.response()
    assert hashlib.sha256(response.body).digest() == hashlib.sha256(payload).digest()
    if framing == "chunked" and minor == 1:
        assert hashlib.sha256(response.coded).digest() == hashlib.sha256(coded).digest()


@pytest.mark.parametrize("framing", ["chunked", "close", "sized"])
@scenario()
async def test_each_event_arrives_before_the_next_one_is_sent(stack: Stack, framing: str) -> None:
    """The backend sends event n + 1 only after the client has received event n, so that no clock is needed."""
    events = [event(f"token {number}") for number in range(8)]
    received = [asyncio.Event() for _ in events]
    heads = {
        "chunked": STREAM_HEAD,
        "close": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
        "sized": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % sum(map(len, events)),
    }
    ends = {"chunked": (send(LAST_CHUNK),), "close": (close(),), "sized": ()}
    steps = [send(heads[framing])]
    for each, each_received in zip(events, received, strict=True):
        steps += [send(chunk(each) if framing == "chunked" else each), stall(each_received)]
    stack.backend.script(*steps, *ends[framing])
    client = await stack.client()
    client.send(post())
    await client.take_through(b"\r\n\r\n")
    for each, each_received in zip(events, received, strict=True):
        await client.take_through(each)
        each_received.set()
    if framing != "sized":
        assert (await client.take_through(LAST_CHUNK))[-5:] == LAST_CHUNK


@scenario()
async def test_the_head_passes_before_the_body_begins(stack: Stack) -> None:
    received = asyncio.Event()
    stack.backend.script(send(STREAM_HEAD), stall(received), send(chunk(event("x")) + LAST_CHUNK))
    client = await stack.client()
    client.send(post())
    assert b" 200 OK\r\n" in await client.take_through(b"\r\n\r\n")
    received.set()
    await client.take_through(LAST_CHUNK)


@pytest.mark.parametrize("framing", ["chunked", "close"])
@scenario()
async def test_an_http_1_0_client_gets_the_payload_and_then_the_end(stack: Stack, framing: str) -> None:
    raw = {
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\nT: 1\r\n\r\n",
        "close": b"HTTP/1.1 200 OK\r\n\r\nabcde",
    }[framing]
    stack.backend.script(send(raw, piece=3), close())
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID, b"Connection: keep-alive", minor=0))
    assert undated(await client.take_all()) == b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + OWN + b"abcde"
    assert client.ended == "fin"


@scenario()
async def test_an_http_1_0_client_may_keep_the_connection_after_a_sized_response(stack: Stack) -> None:
    client = await stack.client()
    for _ in range(2):
        client.send(post(CHAT, b"{}", b"Connection: Keep-Alive", minor=0))
        response = await client.response()
        assert (response.body, response.field(b"connection")) == (HELLO, b"keep-alive")
    client.send(post(minor=0))
    response = await client.response()
    assert response.field(b"connection") == b"close"
    assert await client.take_all() == b""


@scenario()
async def test_responses_of_an_http_1_0_backend(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    stack.backend.script(send(b"HTTP/1.0 200 OK\r\n\r\nok"), close())
    client = await stack.client()
    for _ in range(2):
        client.send(post())
        response = await client.response()
        assert (response.head[:15], response.body) == (b"HTTP/1.1 200 OK", b"ok")
    assert len(stack.backend.used) == 2  # an HTTP/1.0 answer without keep-alive ends its connection


@scenario()
async def test_a_head_request_is_answered_without_a_body(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"))
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"))
    client = await stack.client()
    client.send(request(b"HEAD", b"/v1/models", None, ID) + get(b"/ping"))
    response = await client.response(b"HEAD")
    assert undated(response.head) == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + OWN
    assert (await client.response()).body == b"pong\n"
    client.send(request(b"HEAD", b"/v1/models") + request(b"HEAD", b"/ping") + get(b"/ping"))
    for length in (None, b"5"):
        assert (await client.response(b"HEAD")).field(b"content-length") == length
    assert (await client.response()).body == b"pong\n"
    assert {call.raw.split(b" ")[0] for call in stack.backend.calls} == {b"HEAD"}
    assert len(stack.backend.used) == 1


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 2\r\n\r\nok", b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"]
)
@scenario()
async def test_the_date_of_the_backend_is_the_only_one(stack: Stack, framing: str) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\ndate: then\r\n" + framing))
    response = await stack.ask(post())
    assert (response.head.lower().count(b"\r\ndate:"), response.field(b"date"), response.body) == (1, b"then", b"ok")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@scenario()
async def test_statuses_without_a_body(stack: Stack, status: bytes) -> None:
    framings = (b"", b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n")
    for fields in framings:
        stack.backend.script(send(b"HTTP/1.1 " + status + b"\r\n" + fields + b"\r\n"))
    client = await stack.client()
    for fields in framings:
        client.send(post() + get(b"/ping"))
        response = await client.response()
        assert response.head.startswith(b"HTTP/1.1 " + status + b"\r\n")
        expected = fields.startswith(b"Content-Length") and status.startswith(b"304")  # RFC 9110 section 8.6
        assert (response.field(b"content-length") is not None) is expected
        assert (await client.response()).body == b"pong\n"
    assert len(stack.backend.used) == 1


@scenario()
async def test_the_status_and_its_reason_pass_unchanged(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 299 Quite \xe9t\xe9\r\nContent-Length: 0\r\n\r\n"))
    stack.backend.script(send(b"HTTP/1.1 418\r\nContent-Length: 0\r\n\r\n"))
    assert (await stack.ask(post())).head.startswith(b"HTTP/1.1 299 Quite \xe9t\xe9\r\n")
    assert (await stack.ask(post())).head.startswith(b"HTTP/1.1 418 \r\n")  # RFC 9112 section 4


@scenario()
async def test_interim_responses_are_not_passed(stack: Stack) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    for piece in (1, 1000):
        stack.backend.script(send(interim + answer(), piece))
        response = await stack.ask(post())
        assert (response.status, response.body, response.field(b"link")) == (200, HELLO, None)


@scenario()
async def test_endless_interim_responses_are_a_502(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 102 Processing\r\n\r\n" * 17))
    assert (await stack.ask(post())).code == "backend_malformed"


@scenario()
async def test_switching_protocols_is_a_502(stack: Stack) -> None:
    stack.backend.script(
        send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), stall()
    )
    response = await stack.ask(post(CHAT, b"{}", b"Upgrade: x", b"Connection: upgrade"))
    assert (response.status, response.code) == (502, "backend_malformed")
    assert b"upgrade" not in stack.backend.calls[0].fields


@scenario()
async def test_errors_of_the_backend_pass_unchanged(stack: Stack) -> None:
    body = b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}'
    stack.backend.script(send(answer(body, b"400 Bad Request", b"Connection: close")), close())
    client = await stack.client()
    client.send(post() + get(b"/ping"))
    response = await client.response()
    assert (response.status, response.body) == (400, body)
    assert response.field(b"connection") is None  # the backend's connection ends, the client's does not
    assert (await client.response()).status == 200


@scenario(CORS_ORIGINS="https://app.example")
async def test_the_only_allow_origin_field_is_the_gateways(stack: Stack) -> None:
    theirs = [b"Access-Control-Allow-%b: x" % name for name in (b"Origin", b"Credentials", b"Headers", b"Methods")]
    stack.backend.script(
        send(answer(HELLO, b"200 OK", *theirs, b"access-control-max-age: 1", b"X-Request-Id: theirs", b"Vary: Accept"))
    )
    response = await stack.ask(post(CHAT, b"{}", ID, b"Origin: https://app.example"))
    assert response.all(b"access-control-allow-origin") == [b"https://app.example"]
    assert [name for name, _ in response.fields if name.lower().startswith(b"access-control-")] == [
        b"Access-Control-Allow-Origin",
        b"Access-Control-Expose-Headers",
    ]
    assert response.all(b"x-request-id") == [b"t-1"]
    assert response.all(b"vary") == [b"Accept", b"Origin"]


@scenario()
async def test_hop_by_hop_fields_of_the_response_are_dropped(stack: Stack) -> None:
    hop = [b"Connection: X-Hop, keep-alive", b"X-Hop: 1", b"Keep-Alive: timeout=5, max=100", b"Upgrade: h2c"]
    hop += [b"Proxy-Authenticate: Basic", b"TE: trailers", b"Proxy-Connection: close"]
    stack.backend.script(send(answer(HELLO, b"200 OK", *hop, b"X-Kept: 1")))
    response = await stack.ask(post(CHAT, b"{}", ID))
    assert [name for name, _ in response.fields][:3] == [b"Content-Type", b"Content-Length", b"X-Kept"]
    assert undated(response.head).endswith(b"X-Kept: 1\r\n" + OWN)


# --- Requests ---


@scenario()
async def test_a_sized_request_is_forwarded_unchanged(stack: Stack) -> None:
    wanted = b"POST /v1/chat/completions?a=%20b HTTP/1.1\r\n" + own_fields(stack)
    wanted += b'X-One: 1\r\nx-one: 2\r\nContent-Length: 9\r\n\r\n{"a": 1}\n'
    stack.backend.script(expect(wanted), send(answer()))
    assert (await stack.ask(post(CHAT + b"?a=%20b", b'{"a": 1}\n', ID, b"X-One: 1", b"x-one:2"))).status == 200


@pytest.mark.parametrize("piece", [1, 5, 1000])
@scenario()
async def test_a_chunked_request_is_forwarded_with_its_exact_length(stack: Stack, piece: int) -> None:
    coded = b"5;n=v\r\nhello\r\n6\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
    wanted = b"POST /v1/chat/completions HTTP/1.1\r\n" + own_fields(stack) + b"Content-Length: 11\r\n\r\nhello world"
    stack.backend.script(expect(wanted), send(answer()))
    raw = request(b"POST", CHAT, None, ID, b"Transfer-Encoding: chunked") + coded
    client = await stack.client()
    for start in range(0, len(raw), piece):
        client.send(raw[start : start + piece])
        await asyncio.sleep(0)
    assert (await client.response()).status == 200


@pytest.mark.parametrize("chunked", [False, True])
@scenario(MAX_BUFFERED_BYTES="10MiB")
async def test_a_body_of_ten_megabytes_is_forwarded_unchanged(stack: Stack, chunked: bool) -> None:
    body = random.Random(10).randbytes(10 << 20)
    pieces = b"".join(chunk(body[at : at + 77777]) for at in range(0, len(body), 77777)) + LAST_CHUNK
    raw = request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + pieces if chunked else post(CHAT, body)
    for _ in range(2):
        assert (await stack.ask(raw)).status == 200
        assert stack.backend.calls.pop().body == body
    assert stack.app.memory.held_bytes == 0


@scenario()
async def test_the_method_and_an_empty_body_are_forwarded(stack: Stack) -> None:
    stack.backend.script(expect(b"GET /v1/models HTTP/1.1\r\n" + own_fields(stack) + b"\r\n"), send(answer()))
    assert (await stack.ask(get(b"/v1/models", ID))).status == 200
    wanted = b"POST /tokenize HTTP/1.1\r\n" + own_fields(stack) + b"Content-Length: 0\r\n\r\n"
    stack.backend.script(expect(wanted), send(answer()))
    assert (await stack.ask(post(b"/tokenize", b"", ID))).status == 200


@scenario()
async def test_hop_by_hop_fields_of_the_request_are_dropped(stack: Stack) -> None:
    fields = [b"Connection: X-Hop , close,Keep-Alive", b"X-Hop: 1", b"Keep-Alive: 5", b"TE: trailers", b"Upgrade: x"]
    fields += [
        b"Proxy-Authorization: y",
        b"Proxy-Connection: z",
        b"HTTP2-Settings: q",
        b"Trailer: t",
        b"Expect: 100-continue",
    ]
    wanted = b"POST /v1/chat/completions HTTP/1.1\r\n" + own_fields(stack) + b"X-Kept: 1\r\nContent-Length: 2\r\n\r\n{}"
    stack.backend.script(expect(wanted), send(answer()))
    client = await stack.client()
    client.send(post(CHAT, b"{}", ID, *fields, b"X-Kept: 1"))
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (200, b"close")
    assert await client.take_all() == b""


@pytest.mark.parametrize("credential", [b"Authorization: Bearer ", b"authorization: ", b"X-Api-Key: ", b"api-key: "])
@scenario()
async def test_each_credential_field_is_replaced_by_the_backends_key(stack: Stack, credential: bytes) -> None:
    wanted = (
        b"POST /v1/messages HTTP/1.1\r\n" + own_fields(stack) + b"anthropic-version: 1\r\nContent-Length: 2\r\n\r\n{}"
    )
    stack.backend.script(expect(wanted), send(answer()))
    raw = post(b"/v1/messages", b"{}", credential + KEY, ID, b"anthropic-version: 1", key=None)
    assert (await stack.ask(raw)).status == 200


@scenario()
async def test_every_credential_of_a_request_is_dropped(stack: Stack) -> None:
    response = await stack.ask(post(CHAT, b"{}", b"x-api-key: " + KEY, b"api-key: " + KEY))
    assert response.status == 200
    assert KEY not in stack.backend.calls[0].raw
    response = await stack.ask(post(CHAT, b"{}", b"x-api-key: " + OTHER_KEY))
    assert (response.status, len(stack.backend.calls)) == (401, 1)


@scenario(BACKEND_API_KEY="unset", AUTH_ENABLED="false")
async def test_without_a_backend_key_no_credential_is_sent(stack: Stack) -> None:
    assert (await stack.ask(post(CHAT, b"{}", b"X-Api-Key: x"))).status == 200
    assert sorted(stack.backend.calls[0].fields) == [b"content-length", b"host", b"x-request-id"]


@scenario()
async def test_the_conversation_id_is_dropped(stack: Stack) -> None:
    await stack.ask(post(CHAT, b"{}", b"X-Conversation-Id: c-1", b"x-conversation-id: c-2"))
    assert b"conversation" not in stack.backend.calls[0].raw.lower()


@scenario()
async def test_a_valid_request_id_of_the_client_is_kept(stack: Stack) -> None:
    for given in (b"X-Request-Id: evil id", b"X-Request-Id: " + b"a" * 200, b"X-Request-Id: a\r\nX-Request-Id: b"):
        response = await stack.ask(post(CHAT, b"{}", given))
        assert response.field(b"x-request-id").startswith(b"req-")
    assert (await stack.ask(post(CHAT, b"{}", b"X-Request-Id: abc-1"))).field(b"x-request-id") == b"abc-1"
    ids = [call.fields[b"x-request-id"] for call in stack.backend.calls]
    assert len(set(ids)) == 4
    assert ids[3] == b"abc-1"
