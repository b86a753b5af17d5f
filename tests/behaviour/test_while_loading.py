"""What is answered while the model loads: requests that need no slot at once, lists of models from memory."""

import asyncio

import pytest

from proxy.last_responses import MAX_BYTES
from support.backend import LAST_CHUNK, answer, chunk, close, send
from support.gateway import CHAT, KEY, OPERATOR_KEY, OTHER_KEY, Stack, get, post, request, scenario, until

MODELS = b'{"object": "list", "data": [{"id": "tiny"}]}'
LISTS = [b"/v1/models", b"/models"]
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
WITHOUT_SLOT = [
    get(b"/v1/models"),
    get(b"/models"),
    post(b"/tokenize"),
    post(b"/detokenize"),
    post(b"/apply-template"),
    post(b"/v1/chat/completions/input_tokens"),
    post(b"/v1/messages/count_tokens"),
    post(b"/v1/chat/completions/control"),
    get(b"/props", key=OPERATOR_KEY),
    get(b"/slots", key=OPERATOR_KEY),
    get(b"/lora-adapters", key=OPERATOR_KEY),
]


@pytest.mark.parametrize("state", ["loading", "dead"])
@scenario(STATE="loading", COLD_START_WAIT="300")
async def test_requests_without_a_slot_are_answered_at_once(stack: Stack, state: str) -> None:
    if state != "loading":
        await stack.turn(state)
    for raw in WITHOUT_SLOT:
        response = await stack.ask(raw)  # the clock stands still: nothing is waited for
        assert (response.status, response.field(b"retry-after")) == (503, b"10")
        if b"/v1/messages" in raw:
            assert response.json["error"]["type"] == "overloaded_error"
        else:
            assert response.code == "loading"
    assert not stack.backend.connections


@scenario(STATE="loading")
async def test_the_connection_of_a_request_answered_at_once_stays_open(stack: Stack) -> None:
    client = await stack.client()
    for raw in WITHOUT_SLOT:
        client.send(raw)
        assert (await client.response()).status == 503


@scenario(STATE="loading", ADMIN_ROUTES="true")
async def test_a_route_that_changes_the_backend_is_answered_at_once(stack: Stack) -> None:
    response = await stack.ask(post(b"/props", b"{}", key=OPERATOR_KEY))
    assert (response.status, response.code) == (503, "loading")


@pytest.mark.parametrize("before", ["loading", "dead"])
@scenario(STATE="loading")
async def test_a_request_that_comes_after_the_model_is_ready_is_served(stack: Stack, before: str) -> None:
    """The platform's probe has the supervisor's state at once, so the gateway must not have an older one."""
    await stack.turn(before)
    clients = [await stack.client() for _ in range(3)]
    await asyncio.sleep(0)
    stack.set_state("ready")
    for client, raw in zip(clients, (get(b"/v1/models"), get(b"/slots", key=OPERATOR_KEY), post()), strict=True):
        client.send(raw)
    assert [(await client.response()).status for client in clients] == [200, 200, 200]


@scenario(STATE="loading")
async def test_inference_goes_on_being_held(stack: Stack) -> None:
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    assert (await stack.ask(get(b"/v1/models"))).status == 503
    await stack.turn("ready")
    assert (await client.response()).status == 200


@scenario(STATE="loading", KEYS=f"alice:{KEY.decode()}:1\n")
async def test_a_request_answered_at_once_does_not_count_towards_the_rate(stack: Stack) -> None:
    for _ in range(3):
        assert (await stack.ask(get(b"/v1/models"))).code == "loading"


@pytest.mark.parametrize("target", LISTS)
@pytest.mark.parametrize("pieces", ["whole", "torn", "chunked"])
@scenario()
async def test_the_last_list_of_models_is_sent_again(stack: Stack, target: bytes, pieces: str) -> None:
    whole = answer(MODELS)
    if pieces == "whole":
        stack.backend.script(send(whole))
    elif pieces == "torn":
        stack.backend.script(send(whole[: -len(MODELS)]), send(MODELS, 7))
    else:
        stack.backend.script(send(CHUNKED), send(chunk(MODELS[:9]) + chunk(MODELS[9:]) + LAST_CHUNK, 11))
    assert (await stack.ask(get(target))).body == MODELS
    for state in ("loading", "dead", "loading"):
        await stack.turn(state)
        stack.advance(3)
        for key in (KEY, OTHER_KEY, OPERATOR_KEY):
            response = await stack.ask(get(target, key=key))
            assert (response.status, response.body) == (200, MODELS)
        assert response.field(b"content-type") == b"application/json"
    assert response.field(b"age") == b"9"
    assert (await stack.ask(request(b"HEAD", target))).field(b"content-length") == b"%d" % len(MODELS)
    (other,) = set(LISTS) - {target}
    assert (await stack.ask(get(other))).code == "loading"
    assert (await stack.ask(get(target, key=None))).status == 401
    assert len(stack.backend.calls) == 1


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:-2]])
@scenario()
async def test_the_last_list_is_sent_again_if_the_backend_dies_at_work_on_it(stack: Stack, cut: bytes) -> None:
    """Whether a request crosses the end of llama-server, or comes a moment later, its client cannot know."""
    stack.backend.script(send(cut), close())
    assert (await stack.ask(get(b"/v1/models"))).code == "backend_unavailable"
    stack.backend.script(send(answer(MODELS)))
    assert (await stack.ask(get(b"/v1/models"))).body == MODELS
    stack.advance(4)  # the next request is not repeated, since its connection is new
    stack.backend.script(send(cut), close())
    response = await stack.ask(get(b"/v1/models"))
    assert (response.status, response.body, response.field(b"age")) == (200, MODELS, b"4")
    stack.backend.script(send(CHUNKED + chunk(MODELS[:9])), close())
    client = await stack.client()
    client.send(get(b"/v1/models"))
    assert (await client.take_all()).endswith(chunk(MODELS[:9]))  # a response that has begun is cut


@scenario()
async def test_the_newest_list_of_models_counts(stack: Stack) -> None:
    for body in (b"[1]", b"[2]"):
        stack.backend.script(send(answer(body)))
        assert (await stack.ask(get(b"/v1/models"))).body == body
    stack.backend.script(send(answer(b"{}", b"500 Internal Server Error")))
    assert (await stack.ask(get(b"/v1/models"))).status == 500
    await stack.turn("loading")
    assert (await stack.ask(get(b"/v1/models"))).body == b"[2]"
    await stack.turn("ready")
    stack.backend.script(send(answer(b"[3]")))
    assert (await stack.ask(get(b"/v1/models"))).body == b"[3]"


@pytest.mark.parametrize(
    ("raw", "response"),
    [
        (get(b"/v1/models"), answer(MODELS, b"503 Service Unavailable")),
        (get(b"/v1/models"), answer(MODELS, b"200 OK", b"Content-Encoding: gzip")),
        (get(b"/v1/models"), answer(b"x" * (MAX_BYTES + 1))),
        (get(b"/v1/models"), CHUNKED + chunk(b"x" * MAX_BYTES) + chunk(b"x") + LAST_CHUNK),
        (get(b"/v1/models?x=1"), answer(MODELS)),
        (request(b"HEAD", b"/v1/models"), answer(b"")),
        (get(b"/props", key=OPERATOR_KEY), answer(MODELS)),
    ],
    ids=["error", "coded", "long", "long and chunked", "query", "HEAD", "another route"],
)
@scenario()
async def test_what_is_no_plain_list_of_models_is_not_kept(stack: Stack, raw: bytes, response: bytes) -> None:
    stack.backend.script(send(response))
    await stack.ask(raw)
    await stack.turn("loading")
    asked = get(b"/props", key=OPERATOR_KEY) if b"/props" in raw else get(b"/v1/models")
    assert (await stack.ask(asked)).code == "loading"


@scenario()
async def test_a_list_that_is_cut_is_not_kept(stack: Stack) -> None:
    stack.backend.script(send(CHUNKED + chunk(MODELS)))
    client = await stack.client()
    client.send(get(b"/v1/models"))
    call = await stack.backend.call()
    await client.take_through(MODELS)
    call.connection.transport.close()
    await until(lambda: client.ended)
    await stack.turn("loading")
    assert (await stack.ask(get(b"/v1/models"))).code == "loading"


@scenario()
async def test_a_refused_connection_is_answered_at_once_too(stack: Stack) -> None:
    stack.backend.script(send(answer(MODELS)))
    assert (await stack.ask(get(b"/v1/models"))).body == MODELS
    for connection in stack.backend.connections:
        connection.transport.abort()
    stack.backend.refuse()
    assert (await stack.ask(get(b"/v1/models"))).body == MODELS
    assert (await stack.ask(post(b"/tokenize"))).code == "loading"
    assert (await stack.ask(post(CHAT, b"{}", key=None))).status == 401
