"""Routes that take no slot are bounded as well: in size, in rate, and in how many run at once."""

import json

import pytest

from support.backend import HELLO, answer, send, stall
from support.gateway import KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

TOKENIZE = b"/tokenize"
ROUTES = (b"/tokenize", b"/detokenize", b"/apply-template", b"/v1/messages/count_tokens", b"/v1/responses/input_tokens")


async def sent(stack: Stack, raw: bytes) -> RawClient:
    client = await stack.client()
    client.send(raw)
    return client


async def code(client: RawClient) -> tuple[int, str]:
    response = await client.response()
    error = json.loads(response.body)["error"]
    return response.status, error["message"]


@pytest.mark.parametrize("target", ROUTES)
@scenario(MAX_CHEAP_BODY_SIZE="100")
async def test_a_body_that_is_too_large_is_refused_and_the_sentence_names_the_setting(
    stack: Stack, target: bytes
) -> None:
    stack.backend.script(send(answer()))
    assert (await (await sent(stack, post(target, b"x" * 100))).response()).body == HELLO
    status, message = await code(await sent(stack, post(target, b"x" * 101)))
    assert status == 413
    assert "MAX_CHEAP_BODY_SIZE (100 bytes)" in message
    chunked = request(b"POST", target, None, b"Transfer-Encoding: chunked") + b"65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n"
    assert await code(await sent(stack, chunked)) == (413, message)
    assert len(stack.backend.calls) == 1


@scenario(MAX_CHEAP_BODY_SIZE="100")
async def test_other_routes_have_their_own_limit(stack: Stack) -> None:
    stack.backend.script(send(answer()))
    assert (await (await sent(stack, post(body=b"x" * 101))).response()).body == HELLO


@scenario(MAX_CHEAP_REQUESTS_PER_MINUTE="2")
async def test_each_key_has_a_rate_of_its_own(stack: Stack) -> None:
    stack.backend.script(*[send(answer())] * 9)
    client = await stack.client()
    for _ in range(2):
        client.send(post(TOKENIZE))
        assert (await client.response()).body == HELLO
    client.send(post(TOKENIZE))
    response = await client.response()
    assert response.status == 429
    assert (
        b"limited to 2 requests per minute that tokenize, fill a template, count tokens or read /props (MAX_"
        in response.body
    )
    assert response.field(b"retry-after") == b"60"
    client.send(post(TOKENIZE, key=OTHER_KEY))
    assert (await client.response()).body == HELLO
    client.send(post(key=KEY))
    assert (await client.response()).body == HELLO
    stack.advance(61)
    client.send(post(TOKENIZE))
    assert (await client.response()).body == HELLO


@scenario(MAX_CHEAP_REQUESTS_PER_MINUTE="1", AUTH_ENABLED="false")
async def test_without_keys_there_is_no_rate(stack: Stack) -> None:
    stack.backend.script(*[send(answer())] * 3)
    for _ in range(3):
        assert (await (await sent(stack, post(TOKENIZE, key=None))).response()).body == HELLO


@scenario(MAX_CHEAP_REQUESTS="1", MAX_QUEUE_SIZE="3")
async def test_as_many_run_at_once_as_allowed_and_the_others_wait_in_fair_order(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(TOKENIZE, b'{"content":"0"}'))
    await stack.backend.call()
    waiting = [await sent(stack, post(TOKENIZE, b'{"content":"%d"}' % number)) for number in (1, 2)]
    cheap = stack.app.cheap_routes.queue
    await until(lambda: cheap.queued == 2)
    other = await sent(stack, post(TOKENIZE, b'{"content":"3"}', key=OTHER_KEY))
    await until(lambda: cheap.queued == 3)
    assert (await (await sent(stack, post(TOKENIZE))).response()).status == 503
    leaver = waiting.pop()
    leaver.reset()
    await until(lambda: cheap.queued == 2)
    health = json.loads((await (await sent(stack, get(b"/health"))).response()).body)
    assert (health["active"], health["queued"]) == (0, 0)
    stack.finish.set()
    for client in (running, *waiting, other):
        assert (await client.response()).body == HELLO
    assert [call.body for call in stack.backend.calls] == [b'{"content":"%d"}' % number for number in (0, 3, 1)]
    assert (cheap.active, cheap.queued) == (0, 0)


@scenario(MAX_CHEAP_REQUESTS="1")
async def test_the_place_of_a_client_that_leaves_is_free_at_once(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    client = await sent(stack, post(TOKENIZE))
    await stack.backend.call()
    client.reset()
    await until(lambda: stack.app.cheap_routes.queue.active == 0)
    stack.finish.set()


@scenario(MAX_CHEAP_REQUESTS="1", MAX_CONCURRENT_REQUESTS="1")
async def test_they_and_the_slots_do_not_wait_for_each_other(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), stall(stack.finish), send(answer()))
    chat = await sent(stack, post())
    await stack.backend.call()
    cheap = await sent(stack, post(TOKENIZE))
    await until(lambda: len(stack.backend.calls) == 2)
    stack.finish.set()
    for client in (chat, cheap):
        await client.response()
