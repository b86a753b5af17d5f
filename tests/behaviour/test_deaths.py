"""The backend dies of a request: the others' requests wait for the restart, and the culprit is held back."""

import pytest

from support.backend import HELLO, STREAM_HEAD, Call, Step, answer, chunk, close, event, send, stall
from support.gateway import KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

POISON = b'{"poison": %d}'


def die(stack: Stack) -> Step:
    """End as a process does: listener and connections at once."""

    async def step(call: Call) -> None:
        stack.backend.refuse()
        for each in stack.backend.calls:
            if not each.connection.transport.is_closing():
                each.connection.transport.close()

    return step


async def restart(stack: Stack) -> None:
    """The supervisor starts the backend again."""
    await until(lambda: stack.app.readiness.state == "loading")
    await stack.backend.listen()
    await until(lambda: stack.app.readiness.ready)


async def sent(stack: Stack, raw: bytes) -> RawClient:
    client = await stack.client()
    client.send(raw)
    return client


async def at_work(stack: Stack, raw: bytes, *steps: Step) -> RawClient:
    stack.backend.script(*steps)
    number = len(stack.backend.calls)
    client = await sent(stack, raw)
    await until(lambda: len(stack.backend.calls) > number)
    return client


@scenario()
async def test_a_request_that_was_alone_in_a_death_is_held_back(stack: Stack) -> None:
    stack.backend.script(die(stack))
    client = await sent(stack, post(body=POISON % 1))
    await restart(stack)
    response = await client.response()
    assert (response.status, response.code) == (502, "request_held_back")
    assert response.field(b"x-should-retry") == b"false"
    assert (await stack.ask(post(body=POISON % 1, key=OTHER_KEY))).code == "request_held_back"
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(b"/v1/completions", POISON % 1))).body == HELLO  # another route
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(body=POISON % 2))).body == HELLO
    stack.advance(3601)
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(body=POISON % 1))).body == HELLO


@scenario()
async def test_requests_of_others_wait_for_the_restart_and_the_culprit_is_found(stack: Stack) -> None:
    """Both were at work. They run again one at a time: the one is answered, the other causes the second death."""
    good = await at_work(stack, post(body=b'{"good": 1}'), stall())
    stack.backend.script(die(stack))
    bad = await sent(stack, post(body=POISON % 1, key=OTHER_KEY))
    await until(lambda: stack.app.readiness.state == "loading")
    late = await sent(stack, post(body=b'{"late": 1}'))
    by_body = {b'{"good": 1}': send(answer()), b'{"late": 1}': send(answer()), POISON % 1: die(stack)}

    async def by_its_body(call: Call) -> None:
        await by_body[call.body](call)

    for _ in range(9):
        stack.backend.script(by_its_body)
    await restart(stack)
    await until(lambda: stack.app.readiness.state == "loading" or not stack.requests)
    await restart(stack)
    assert (await bad.response()).code == "request_held_back"
    assert (await good.response()).body == HELLO
    assert (await late.response()).body == HELLO
    assert not stack.app.suspects.is_limited("alice")


@scenario()
async def test_a_stream_that_has_begun_is_cut_and_its_request_can_be_sent_again(stack: Stack) -> None:
    stream = await at_work(stack, post(body=b'{"stream": true}'), send(STREAM_HEAD + chunk(event("1"))), stall())
    await stream.take_through(event("1"))
    stack.backend.script(die(stack))
    bad = await sent(stack, post(body=POISON % 1, key=OTHER_KEY))
    rest = await stream.take_all()
    assert b"backend_unavailable" in rest
    stack.backend.script(send(answer()))
    await restart(stack)
    assert (await bad.response()).body == HELLO
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(body=b'{"stream": true}'))).body == HELLO


@scenario()
async def test_a_client_that_leaves_is_a_suspect_all_the_same(stack: Stack) -> None:
    bad = await at_work(stack, post(body=POISON % 1, key=OTHER_KEY), stall())
    bad.reset()
    await until(lambda: not stack.requests)
    stack.backend.script(die(stack))
    good = await sent(stack, post(body=b'{"good": 1}'))
    stack.backend.script(send(answer()))
    await restart(stack)
    assert (await good.response()).body == HELLO
    stack.backend.script(die(stack))
    bad = await sent(stack, post(body=POISON % 1, key=OTHER_KEY))
    await restart(stack)
    assert (await bad.response()).code == "request_held_back"


@scenario()
async def test_a_key_that_kills_again_and_again_is_paused_and_the_others_are_served(stack: Stack) -> None:
    for number in range(3):
        stack.backend.script(die(stack))
        client = await sent(stack, post(body=POISON % number, key=OTHER_KEY))
        await restart(stack)
        assert (await client.response()).code == "request_held_back"
    response = await stack.ask(post(body=POISON % 9, key=OTHER_KEY))
    assert (response.status, response.code, response.field(b"retry-after")) == (429, "caller_paused", b"60")
    assert (await stack.ask(get(b"/health", key=OTHER_KEY))).status == 200
    stack.backend.script(send(answer()))
    assert (await stack.ask(post())).body == HELLO
    stack.advance(61)
    occupant = await at_work(stack, post(body=POISON % 10, key=OTHER_KEY), stall(stack.finish), send(answer()))
    waiting = await sent(stack, post(body=POISON % 11, key=OTHER_KEY))
    await until(lambda: stack.app.queue.queued == 1)  # one at a time
    stack.backend.script(send(answer()))
    stack.finish.set()
    for each in (occupant, waiting):
        assert (await each.response()).status == 200


@scenario(MAX_CONCURRENT_REQUESTS="4")
async def test_a_key_that_gets_one_request_at_a_time_gets_one_batch_at_a_time(stack: Stack) -> None:
    for number in range(2):
        stack.backend.script(die(stack))
        client = await sent(stack, post(body=POISON % number, key=OTHER_KEY))
        await restart(stack)
        assert (await client.response()).code == "request_held_back"
    batch = b'{"input": ["a", "%d"]}'
    first, second = (post(b"/v1/embeddings", batch % number, key=OTHER_KEY) for number in range(2))
    occupant = await at_work(stack, first, stall(stack.finish), send(answer()))
    waiting = await sent(stack, second)
    await until(lambda: stack.app.queue.queued == 1)
    stack.backend.script(send(answer()))
    stack.finish.set()
    for each in (occupant, waiting):
        assert (await each.response()).status == 200


@scenario(AUTH_ENABLED="false")
async def test_without_keys_requests_are_held_back_but_nobody_is_paused(stack: Stack) -> None:
    for number in range(4):
        stack.backend.script(die(stack))
        client = await sent(stack, post(body=POISON % number, key=None))
        await restart(stack)
        assert (await client.response()).code == "request_held_back"
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(key=None))).body == HELLO


@scenario()
async def test_a_backend_that_lives_has_closed_on_purpose(stack: Stack) -> None:
    stack.backend.script(close())
    assert (await stack.ask(post())).code == "backend_unavailable"
    stack.backend.script(send(answer()))
    assert (await stack.ask(post())).body == HELLO
    assert not stack.app.suspects.active


@scenario(ADMIN_ROUTES="true", KEYS=f"olga:{KEY.decode()}:1000000 role=operator\n")
async def test_what_must_not_be_repeated_is_not(stack: Stack) -> None:
    stack.backend.script(die(stack))
    response = await stack.ask(request(b"POST", b"/lora-adapters", b"[]"))
    assert response.code == "backend_unavailable"
    await stack.backend.listen()


USAGE = b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'
HEALTH = get(b"/health")


@pytest.mark.parametrize(("answered_s", "blamed"), [(None, False), (590, True), (610, False)])
@scenario()
async def test_after_two_deaths_requests_are_blamed_only_if_the_backend_has_answered_before(
    stack: Stack, answered_s: float | None, blamed: bool
) -> None:
    """A machine on which every request fails must be given up in the end."""
    if answered_s is not None:
        stack.backend.script(send(answer(USAGE)))
        assert (await stack.ask(post())).status == 200
        assert (await stack.ask(HEALTH)).json["blamed"] is False
        stack.advance(answered_s)
    for number in range(3):
        stack.backend.script(die(stack))
        client = await sent(stack, post(body=POISON % number, key=OTHER_KEY))
        await until(lambda: stack.app.readiness.state == "loading")
        assert (await stack.ask(HEALTH)).json["blamed"] is (blamed or number < 2), number
        await restart(stack)
        assert (await client.response()).code == "request_held_back"


@scenario()
async def test_the_supervisor_learns_whether_a_request_is_to_blame(stack: Stack) -> None:
    assert (await stack.ask(HEALTH)).json["blamed"] is False
    stack.backend.script(send(answer(USAGE)))
    assert (await stack.ask(post())).status == 200
    stack.backend.script(stall(stack.finish), die(stack))
    client = await sent(stack, post(body=POISON % 1))
    await until(lambda: len(stack.backend.calls) == 2)
    busy = (await stack.ask(HEALTH)).json
    assert (busy["blamed"], busy["unanswered_bytes"]) == (False, len(POISON % 1))
    stack.finish.set()
    await until(lambda: stack.app.readiness.state == "loading")
    assert (await stack.ask(HEALTH)).json["blamed"] is True
    await restart(stack)
    assert (await client.response()).code == "request_held_back"
    stack.advance(10)
    assert (await stack.ask(HEALTH)).json["blamed"] is False
