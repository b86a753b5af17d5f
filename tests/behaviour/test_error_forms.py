"""Errors as each API's clients read them, whatever the fault: form, types, ids, and whether to try again."""

from collections.abc import Callable
from typing import Any

import pytest

from support.backend import HELLO, STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, OPERATOR_KEY, Stack, get, post, request, scenario
from support.rawclient import Response

MESSAGES, COUNT, RESPONSES = b"/v1/messages", b"/v1/messages/count_tokens", b"/v1/responses"
ID = b"X-Request-Id: t-1"


def head(line: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([line, b"Host: gateway", b"Authorization: Bearer sk-alice-0123456789abcdef", *fields, b"", b""])


# A fault of each kind in a request for a target, and the status that it gets.
FAULTS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "size": (413, lambda target: head(b"POST %b HTTP/1.1" % target, b"Content-Length: 99999999")),
    "size, digits": (413, lambda target: head(b"POST %b HTTP/1.1" % target, b"Content-Length: " + b"9" * 18)),
    "chunked size": (
        413,
        lambda target: head(b"POST %b HTTP/1.1" % target, b"Transfer-Encoding: chunked") + b"5F5E0FF\r\n",
    ),
    "chunks": (400, lambda target: head(b"POST %b HTTP/1.1" % target, b"Transfer-Encoding: chunked") + b"zz\r\n"),
    "coding": (400, lambda target: head(b"POST %b HTTP/1.1" % target, b"Transfer-Encoding: gzip, chunked")),
    "two lengths": (400, lambda target: head(b"POST %b HTTP/1.1" % target, b"Content-Length: 1", b"Content-Length: 2")),
    "expectation": (417, lambda target: head(b"POST %b HTTP/1.1" % target, b"Content-Length: 2", b"Expect: y")),
    "no body": (411, lambda target: head(b"POST %b HTTP/1.1" % target)),
    "no key": (401, lambda target: post(target, key=None)),
    "wrong key": (401, lambda target: post(target, key=b"sk-nobody-0123456789abcdef")),
    "method": (405, get),
    "no host": (400, lambda target: b"POST %b HTTP/1.1\r\nContent-Length: 0\r\n\r\n" % target),
    "a field without a colon": (400, lambda target: head(b"POST %b HTTP/1.1" % target, b"nonsense")),
    "a bare line feed": (400, lambda target: b"POST %b HTTP/1.1\r\nHost: x\nA: b\r\n\r\n" % target),
    "version": (505, lambda target: b"POST %b HTTP/2.0\r\nHost: x\r\n\r\n" % target),
    "fields": (431, lambda target: head(b"POST %b HTTP/1.1" % target, *[b"A: b"] * 100)),
    "a long field": (431, lambda target: b"POST %b HTTP/1.1\r\nA: %b" % (target, b"b" * 9000)),
    "a long target": (414, lambda target: b"POST %b?%b HTTP/1.1" % (target, b"x" * 9000)),
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    411: "invalid_request_error",
    413: "request_too_large",
    414: "invalid_request_error",
    417: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    505: "invalid_request_error",
}


async def fault(stack: Stack, raw: bytes) -> Response:
    """The one response to bytes after which the connection may stay open or not."""
    client = await stack.client()
    client.send(raw)
    response = await client.response()
    client.close()
    return response


def check_anthropic(response: Response, status: int) -> dict[str, Any]:
    body = response.json
    assert response.status == status
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", TYPES[status])
    assert body["error"].keys() == {"type", "message"}
    assert response.field(b"request-id") == response.field(b"x-request-id") == body["request_id"].encode()
    assert response.field(b"content-type") == b"application/json"
    error: dict[str, Any] = body["error"]
    return error


def check_openai(response: Response, status: int) -> dict[str, Any]:
    assert response.status == status
    assert response.json.keys() == {"error"}
    assert response.json["error"].keys() == {"message", "type", "param", "code"}
    assert response.field(b"request-id") is None
    error: dict[str, Any] = response.json["error"]
    return error


def may_retry(response: Response) -> bool:
    assert response.field(b"x-should-retry") in (None, b"false")
    return response.field(b"x-should-retry") is None


# --- The form ---


@pytest.mark.parametrize("target", [MESSAGES, COUNT, MESSAGES + b"?beta=true", MESSAGES + b"/batches"])
@pytest.mark.parametrize("name", FAULTS)
@scenario()
async def test_every_fault_on_messages_has_anthropics_form(stack: Stack, name: str, target: bytes) -> None:
    status, raw = FAULTS[name]
    if target.endswith(b"batches") and name in ("no body", "method", "chunked size", "chunks"):
        status = 404  # the body of a path that does not exist is not read
    response = await fault(stack, raw(target))
    check_anthropic(response, status)
    assert not may_retry(response)


@pytest.mark.parametrize("target", [CHAT, RESPONSES, b"/v1/messagesx"])
@pytest.mark.parametrize("name", FAULTS)
@scenario()
async def test_every_fault_elsewhere_has_openais_form(stack: Stack, name: str, target: bytes) -> None:
    status, raw = FAULTS[name]
    if b"messages" in target and name in ("no body", "method", "chunked size", "chunks"):
        status = 404
    response = await fault(stack, raw(target))
    check_openai(response, status)
    assert not may_retry(response)


@scenario(CLIENT_HEADER_TIMEOUT="10", CLIENT_BODY_TIMEOUT="20")
async def test_a_request_that_comes_too_slowly(stack: Stack) -> None:
    for target, check in ((MESSAGES, check_anthropic), (CHAT, check_openai)):
        for raw in (b"POST %b HTTP/1.1\r\nHost: x" % target, post(target)[:-1]):
            client = await stack.client()
            client.send(raw)
            await client.silent()
            stack.advance(20)
            response = await client.response()
            check(response, 408)
            assert may_retry(response)


@scenario()
async def test_an_unknown_path_below_messages(stack: Stack) -> None:
    for target in (
        b"/v1/messages/batches",
        b"/v1/messages/",
        b"//v1/messages",
        b"/v1/v1/messages",
        b"/messages",
        b"/nowhere/v1/messages",
    ):
        check_anthropic(await stack.ask(post(target)), 404)


@scenario(KEYS="alice:sk-alice-0123456789abcdef:0\n")
async def test_a_suspended_key(stack: Stack) -> None:
    for target, check in ((MESSAGES, check_anthropic), (CHAT, check_openai)):
        response = await stack.ask(post(target))
        check(response, 403)
        assert not may_retry(response)


@scenario(REQUEST_TIMEOUT="10")
async def test_faults_of_the_backend(stack: Stack) -> None:
    for target, check in ((MESSAGES, check_anthropic), (CHAT, check_openai)):
        stack.backend.script(send(b"nonsense\r\n\r\n"), stall())
        response = await stack.ask(post(target))
        check(response, 502)
        assert may_retry(response)
        stack.backend.script(stall())
        client = await stack.client()
        before = len(stack.backend.calls)
        client.send(post(target))
        await stack.backend.call(before)
        stack.advance(10)
        response = await client.response()
        assert "REQUEST_TIMEOUT" in check(response, 504)["message"]
        assert not may_retry(response)


@scenario(STATE="loading", COLD_START_WAIT="0")
async def test_no_model(stack: Stack) -> None:
    for target, check in ((MESSAGES, check_anthropic), (CHAT, check_openai)):
        response = await stack.ask(post(target))
        check(response, 503)
        assert may_retry(response)
        assert response.field(b"retry-after") is not None


# --- Limits of a key ---


@scenario(KEYS="alice:sk-alice-0123456789abcdef:1\n")
async def test_a_rate_may_be_tried_again(stack: Stack) -> None:
    await stack.ask(post())
    for target, check in ((MESSAGES, check_anthropic), (CHAT, check_openai)):
        response = await stack.ask(post(target))
        assert check(response, 429)["type"] == "rate_limit_error"
        assert may_retry(response)
        assert response.field(b"retry-after") is not None


@scenario(KEYS="alice:sk-alice-0123456789abcdef:1000 tokens_per_day=1\n")
async def test_a_quota_may_not(stack: Stack) -> None:
    used = b'{"usage":{"completion_tokens":8,"prompt_tokens":9,"total_tokens":17}}'
    stack.backend.script(send(answer(used)))
    assert (await stack.ask(post())).status == 200
    for target, check, kind in (
        (MESSAGES, check_anthropic, "rate_limit_error"),
        (CHAT, check_openai, "insufficient_quota"),
        (RESPONSES, check_openai, "insufficient_quota"),
    ):
        response = await stack.ask(post(target))
        assert check(response, 429)["type"] == kind
        assert not may_retry(response)
        assert int(response.field(b"retry-after") or 0) > 0


# --- What is not the gateway's own ---


@scenario()
async def test_answers_of_the_backend_on_messages_have_the_id_for_anthropics_clients(stack: Stack) -> None:
    own = b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_ctx":4096}}'
    stack.backend.script(send(answer(own, b"400 Bad Request", b"request-id: theirs")))
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), stall())
    for target in (MESSAGES, COUNT):
        response = await stack.ask(post(target, b"{}", ID))
        if target == MESSAGES:
            assert (response.status, response.body) == (400, own)
            assert response.field(b"x-should-retry") is None
        assert response.all(b"request-id") == [b"t-1"]
        if target == MESSAGES:
            client = await stack.client()
            client.send(post(target, b"{}", ID))
            assert b"\r\nrequest-id: t-1\r\n" in await client.take_through(b"\r\n\r\n")
    stack.backend.script(send(answer(HELLO)))
    assert (await stack.ask(post(CHAT, b"{}", ID))).field(b"request-id") is None


@scenario(CORS_ORIGINS="https://app.example")
async def test_a_page_may_read_the_fields(stack: Stack) -> None:
    response = await stack.ask(post(MESSAGES, b"{}", b"Origin: https://app.example", key=None))
    exposed = (response.field(b"access-control-expose-headers") or b"").split(b", ")
    assert {b"x-should-retry", b"request-id", b"x-request-id", b"retry-after"} <= set(exposed)


# --- Caches ---


@scenario(CORS_ORIGINS="*")
async def test_no_answer_of_the_gateways_own_is_stored(stack: Stack) -> None:
    own = [
        get(b"/ping", key=None),
        get(b"/health", key=None),
        get(b"/metrics"),
        get(b"/usage", key=OPERATOR_KEY),
        request(b"POST", b"/reload", b"", key=OPERATOR_KEY),
        request(b"HEAD", b"/health", key=None),
        request(b"OPTIONS", CHAT, None, b"Origin: https://a", b"Access-Control-Request-Method: POST", key=None),
        post(key=None),
        get(b"/nowhere"),
        get(CHAT),
    ]
    for raw in own:
        response = await stack.ask(raw)
        assert response.all(b"cache-control") == [b"no-store"], raw
    for _, raw_fault in FAULTS.values():
        assert (await fault(stack, raw_fault(CHAT))).all(b"cache-control") == [b"no-store"]
    assert (await stack.ask(post())).field(b"cache-control") is None  # the backend's own are its own
