"""What bodies may ask for, as a client sees it: on every relayed route, in the dialect of its API."""

import json

import pytest

from accounting.request_record import Stage
from policy.routes import TABLE
from support.backend import LAST_CHUNK, answer, chunk, send
from support.gateway import CHAT, OPERATOR_KEY, Stack, post, request, scenario, until

NESTED = b'{"messages":[{"role":"user","content":"x","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}"
TRIGGERS = b'{"messages": [], "grammar_triggers": [{"type": 2, "value": "([\\\\s\\\\S]+)+"}]}'
RELAYED = [path.replace(":id", "0") for method, path, kind in TABLE if method == "POST" and not kind.local]


@pytest.mark.parametrize("path", RELAYED)
@scenario(ADMIN_ROUTES="true")
async def test_a_deep_body_is_refused_on_every_route(stack: Stack, path: str) -> None:
    client = await stack.client()
    client.send(post(path.encode(), NESTED, key=OPERATOR_KEY))
    response = await client.response()
    assert (response.status, response.field(b"x-should-retry")) == (400, b"false")
    assert b"MAX_JSON_DEPTH" in response.body
    assert stack.backend.calls == []


@scenario(MAX_JSON_DEPTH="12", ALLOW_PATHS="/new")
async def test_the_depth_is_a_setting_and_holds_for_allowed_paths(stack: Stack) -> None:
    client = await stack.client()
    stack.backend.script(send(answer()))
    client.send(post(b"/new", b"[" * 12 + b"]" * 12))
    assert (await client.response()).status == 200
    client.send(post(b"/new", b"[" * 13 + b"]" * 13))
    assert (await client.response()).status == 400


@pytest.mark.parametrize("path", [CHAT, b"/v1/responses", b"/v1/messages", b"/completion"])
@scenario()
async def test_a_member_is_refused_by_name_in_the_clients_dialect(stack: Stack, path: bytes) -> None:
    client = await stack.client()
    client.send(post(path, TRIGGERS))
    response = await client.response()
    assert (response.status, response.field(b"x-should-retry")) == (400, b"false")
    error = json.loads(response.body)["error"]
    assert error["type"] == "invalid_request_error"
    assert "grammar_triggers" in error["message"]
    assert stack.backend.calls == []


@scenario(MEMBER_RULES="grammar_triggers=allow")
async def test_what_is_allowed_passes_byte_for_byte(stack: Stack) -> None:
    client = await stack.client()
    stack.backend.script(send(answer()))
    client.send(post(CHAT, TRIGGERS))
    assert (await client.response()).status == 200
    assert stack.backend.calls[0].body == TRIGGERS


@scenario()
async def test_a_body_that_comes_in_pieces_is_checked_as_well(stack: Stack) -> None:
    client = await stack.client()
    raw = post(CHAT, TRIGGERS, b"Expect: 100-continue")
    client.send(raw[: -len(TRIGGERS)])
    await client.take_through(b"\r\n\r\n")
    client.send(TRIGGERS)
    assert (await client.response()).status == 400


@pytest.mark.parametrize(
    ("path", "lines", "status"),
    [
        (CHAT, [b"Content-Encoding: gzip"], 415),
        (CHAT, [b"Content-Encoding: identity", b"content-encoding: GZIP"], 415),
        (CHAT, [b"Content-Encoding: identity, deflate"], 415),
        (CHAT, [b"Content-Encoding: Identity"], 200),
        (CHAT, [b"Content-Encoding: UTF-8"], 200),
        (b"/v1/embeddings", [b"Content-Encoding: br"], 415),
        (b"/new", [b"Content-Encoding: gzip"], 200),  # it is relayed as it is
    ],
)
@scenario(ALLOW_PATHS="/new")
async def test_a_coded_body_that_cannot_be_read_is_refused(
    stack: Stack, path: bytes, lines: list[bytes], status: int
) -> None:
    """A llama-server that is built with zlib decodes it, with all that it asks for."""
    stack.backend.script(send(answer()))
    response = await stack.ask(post(path, b"{}", *lines))
    assert response.status == status
    assert status == 200 or response.code == "coding_not_supported"
    assert len(stack.backend.calls) == (status == 200)


def form(head: bytes, value: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + value + b"\r\n--x--\r\n"


@pytest.mark.parametrize("arrival", ["at once", "in two pieces", "in chunks"])
@pytest.mark.parametrize(
    ("head", "value", "status"),
    [
        (b'name="grammar"', b"root ::= " + b"(" * 5000, 400),
        (b"name=grammar", b"root ::= " + b"(" * 5000, 400),
        (b"name=grammar", b"root ::= " + b"(" * 200, 400),
        (b'name="grammar"', b"root ::= " + b"(a)" * 5000, 200),
        (b"name=grammar_triggers", b"[]x", 400),
        (b'name="json_schema"', b"{" * 5000, 200),  # as a string it is no schema
        (b'name="stop"', b"x" * 5000, 200),
    ],
)
@scenario()
async def test_a_field_of_a_form_is_a_member(
    stack: Stack, head: bytes, value: bytes, status: int, arrival: str
) -> None:
    client = await stack.client()
    if status == 200:
        stack.backend.script(send(answer()))
    body, kind = form(head, value), b"Content-Type: multipart/form-data; boundary=x"
    if arrival == "in chunks":
        head = request(b"POST", b"/v1/audio/transcriptions", None, kind, b"Transfer-Encoding: chunked")
        client.send(head + chunk(body) + LAST_CHUNK)
    elif arrival == "at once":
        client.send(post(b"/v1/audio/transcriptions", body, kind))
    else:
        raw = post(b"/v1/audio/transcriptions", body, kind)
        client.send(raw[:-40])
        await until(lambda: [request.stage for request in stack.requests] == [Stage.READING_BODY])
        client.send(raw[-40:])
    assert (await client.response()).status == status
