"""What a client with a wrong base URL, or none at all, is told: `/`, other spellings of listed paths, `/v1/health`."""

import pytest

from support.gateway import KEY, Stack, get, post, request, scenario

HOW_TO = "for OpenAI's clients it ends in /v1, for Anthropic's clients it has no /v1"


@pytest.mark.parametrize("key", [None, KEY, b"sk-unknown-0123456789abcdef"])
@scenario(STATE="loading")
async def test_the_root_is_alive_for_everybody_and_says_nothing_of_this_gateway(
    stack: Stack, key: bytes | None
) -> None:
    head = await stack.ask(request(b"HEAD", b"/", key=key))
    assert (head.status, head.coded) == (200, b"")
    whole = await stack.ask(get(b"/", key=key))
    assert (whole.status, whole.field(b"content-type")) == (200, b"text/plain; charset=utf-8")
    assert head.field(b"content-length") == b"%d" % len(whole.body)
    assert b"ends in /v1" in whole.body
    await stack.turn("ready")
    assert (await stack.ask(get(b"/", key=key))).body == whole.body
    assert (await stack.ask(post(b"/", key=key))).status == 405
    assert not stack.backend.calls


@scenario()
async def test_v1_health_is_health(stack: Stack) -> None:
    for state, status in (("ready", 200), ("loading", 503)):
        await stack.turn(state)
        answers = [await stack.ask(get(path, key=None)) for path in (b"/health", b"/v1/health")]
        assert [each.status for each in answers] == [status, status]
        assert answers[0].json == answers[1].json
        assert (await stack.ask(request(b"HEAD", b"/v1/health", key=None))).status == status
    await stack.stop()
    assert {line["route"] for line in stack.lines} == {"/health", "/v1/health"}


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completions/", b"//v1/chat/completions", b"/v1//chat/completions", b"/v1/v1/chat/completions",
        b"/v1", b"/v1/", b"/v1/models/", b"/v1/v1/models", b"/V1/models", b"/v1/tokenize",
    ],
)  # fmt: skip
@scenario()
async def test_a_path_that_is_spelt_differently_is_told_how_base_urls_end(stack: Stack, path: bytes) -> None:
    response = await stack.ask(post(path))
    assert (response.status, response.code) == (404, "route_not_found")
    assert HOW_TO in response.json["error"]["message"]
    assert path.decode() not in response.body.decode().replace(HOW_TO, "")
    assert (await stack.ask(post(path, key=None))).status == 401
    assert not stack.backend.calls


@pytest.mark.parametrize("path", [b"/messages", b"/v1/v1/messages", b"/v1/messages/", b"/v1/v1/messages/count_tokens"])
@scenario()
async def test_an_anthropic_client_is_told_in_its_own_form(stack: Stack, path: bytes) -> None:
    response = await stack.ask(post(path))
    assert (response.status, response.json["type"]) == (404, "error")
    assert HOW_TO in response.json["error"]["message"]


@scenario()
async def test_a_path_that_resembles_none_is_only_unknown(stack: Stack) -> None:
    response = await stack.ask(get(b"/index.html"))
    assert (response.status, response.json["error"]["message"]) == (404, "There is no such route.")
