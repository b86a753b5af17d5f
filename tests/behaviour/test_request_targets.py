"""Targets in absolute form, and versions above HTTP/1.1: what the routes and the backend see."""

import pytest

from support.backend import HELLO
from support.gateway import CHAT, KEY, OPERATOR_KEY, Stack, get, post, request, scenario


@pytest.mark.parametrize("base", [b"http://gateway", b"https://other.example:8443", b"HTTP://[::1]:80"])
@scenario()
async def test_the_backend_gets_the_path_of_an_absolute_target(stack: Stack, base: bytes) -> None:
    for _ in range(2):
        assert (await stack.ask(post(base + CHAT + b"?a=http://b/c"))).body == HELLO
    for call in stack.backend.calls:
        assert call.target == CHAT + b"?a=http://b/c"
        assert call.fields[b"host"] == b"127.0.0.1:%d" % stack.backend.port
    assert (await stack.ask(get(base + b"/ping", key=None))).body == (await stack.ask(get(b"/ping"))).body
    await stack.stop()
    assert {line["route"] for line in stack.lines} == {CHAT.decode(), "/ping"}


@scenario()
async def test_an_absolute_target_reaches_no_route_that_its_path_does_not(stack: Stack) -> None:
    for base in (b"http://ping", b"http://gateway/ping@x", b"http://health:80"):
        assert (await stack.ask(get(base + b"/v1/models", key=None))).status == 401
    assert (await stack.ask(get(b"http://gateway/slots"))).status == 403
    assert (await stack.ask(get(b"http://gateway/slots", key=OPERATOR_KEY))).status == 200
    assert (await stack.ask(get(b"http://gateway/tools"))).status == 403
    assert (await stack.ask(get(b"http://gateway//v1/models"))).status == 404
    assert (await stack.ask(request(b"OPTIONS", b"http://gateway", None, key=None))).status == 204
    assert (await stack.ask(get(b"http://gateway", key=None))).body == (await stack.ask(get(b"/"))).body
    assert [call.target for call in stack.backend.calls] == [b"/slots"]


@pytest.mark.parametrize(
    "target", [b"http://", b"http:///ping", b"http://u@gateway/ping", b"http://gateway?/ping", b"ws://gateway/ping"]
)
@scenario()
async def test_other_targets_are_refused(stack: Stack, target: bytes) -> None:
    client = await stack.client()
    client.send(get(target))
    assert (await client.response()).status == 400
    assert await client.take_all() == b""


@pytest.mark.parametrize("minor", [2, 9])
@scenario()
async def test_a_higher_minor_version_is_handled_as_1_1(stack: Stack, minor: int) -> None:
    client = await stack.client()
    head = b"POST %b HTTP/1.%d\r\nHost: a\r\nAuthorization: Bearer %b\r\n" % (CHAT, minor, KEY)
    for _ in range(2):
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        response = await client.response()
        assert response.head.startswith(b"HTTP/1.1 200 ")
        assert (response.body, response.field(b"connection")) == (HELLO, None)
    assert stack.backend.calls[1].raw.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
