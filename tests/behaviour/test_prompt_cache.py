"""PROMPT_CACHE=private: no request runs in a slot that holds another key's text, and the backend is checked first."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from support.caching_backend import Found, Model, install
from support.gateway import CHAT, KEY, OTHER_KEY, Stack, get, post, scenario, until
from support.rawclient import RawClient

COMPLETIONS, MESSAGES, EMBEDDINGS = b"/v1/completions", b"/v1/messages", b"/v1/embeddings"
CAROLS_KEY = b"sk-carol-0123456789abcdef"
KEYS = {b"alice": KEY, b"bob": OTHER_KEY, b"carol": CAROLS_KEY}
KEYS_FILE = "".join(f"{name.decode()}:{key.decode()}:1000000\n" for name, key in KEYS.items())
HEAD = "Meeting notes, confidential: the new salary of the director is 83506 from May on."


async def begin(stack: Stack, model: Model | None = None) -> Model:
    """Put the model behind the gateway, and wait until it is found fit."""
    model = model or Model()
    install(stack.backend, model)
    await stack.turn("ready")
    return model


def isolated(**settings: Any) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """A scenario with private caches whose backend is not ready yet."""
    given = {"STATE": "loading", "MAX_CONCURRENT_REQUESTS": "auto", "KEYS": KEYS_FILE, "PROMPT_CACHE": "private"}
    return scenario(**(given | settings))


def asking(name: bytes, target: bytes, body: object) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return post(target, raw, b"X-Client: " + name, b"Content-Type: application/json", key=KEYS[name])


async def cached(stack: Stack, name: bytes, target: bytes, body: object) -> int:
    """Return how much of the prompt the backend found."""
    response = await stack.ask(asking(name, target, body))
    assert response.status == 200, response
    return int(json.loads(response.body)["timings"]["cache_n"])


def leaks(model: Model) -> list[Found]:
    """The requests that ran in a slot with another key's text."""
    return [found for found in model.seen if found.key != "gateway" and found.owner not in ("", found.key)]


@isolated()
async def test_a_key_finds_its_own_prompt_and_no_other_key_does(stack: Stack) -> None:
    model = await begin(stack)
    body = {"prompt": HEAD}
    assert await cached(stack, b"alice", COMPLETIONS, body) == 0
    assert await cached(stack, b"bob", COMPLETIONS, body) == 0
    assert await cached(stack, b"alice", COMPLETIONS, body) == len(HEAD)
    assert not leaks(model)


@isolated()
async def test_two_members_are_added_and_nothing_else_changes(stack: Stack) -> None:
    await begin(stack)
    body = b' {"prompt" :"a" , "id_slot": 3, "cache_prompt": false}\n'
    await stack.ask(asking(b"alice", COMPLETIONS, body))
    assert stack.backend.calls[0].body == body[:-2] + b',"id_slot":0,"cache_prompt":true}\n'


@isolated(KEYS=KEYS_FILE.replace("1000000\n", "1000000 max_tokens=9\n", 1))
async def test_a_keys_limit_on_tokens_is_added_as_well(stack: Stack) -> None:
    await begin(stack)
    for target, body in ((COMPLETIONS, b"{}"), (MESSAGES, b'{"messages": "x"}')):
        await stack.ask(asking(b"alice", target, body))
    assert [call.body for call in stack.backend.calls] == [
        b'{"max_tokens":9,"id_slot":0,"cache_prompt":true}',
        b'{"messages": "x","max_tokens":9}',
    ]


@isolated()
async def test_conversations_of_one_key_go_to_their_own_slots(stack: Stack) -> None:
    await begin(stack)
    one, other = "a" * 200, "b" * 200
    for prompt in (one, other):
        assert await cached(stack, b"alice", COMPLETIONS, {"prompt": prompt}) == 0
    for prompt in (one, other):
        assert await cached(stack, b"alice", COMPLETIONS, {"prompt": prompt + " more"}) == 200


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (MESSAGES, {"messages": HEAD}),
        (EMBEDDINGS, {"input": HEAD}),
        (b"/v1/rerank", {"query": "x", "documents": [HEAD, HEAD + "2"]}),
        (b"/infill", {"prompt": HEAD, "input_prefix": HEAD}),
        (COMPLETIONS, {"prompt": HEAD, "n": 2}),
        (COMPLETIONS, {"prompt": [HEAD, HEAD + "2"]}),
        (CHAT, b'["not an object"]'),
        (b"/v1/audio/transcriptions", b"--x\r\nno form"),
    ],
)
@isolated()
async def test_requests_that_cannot_be_pinned_find_nothing_and_leave_nothing(
    stack: Stack, target: bytes, body: object
) -> None:
    model = await begin(stack)
    for name in (b"alice", b"bob", b"alice"):
        await stack.ask(asking(name, COMPLETIONS, {"prompt": HEAD}))
        await stack.ask(asking(name, target, body))
        await stack.ask(asking(name, COMPLETIONS, {"prompt": HEAD}))
    assert not leaks(model)
    assert any(found.cached for found in model.seen)


async def hold(stack: Stack, name: bytes, target: bytes, body: dict[str, object]) -> RawClient:
    """A client whose stream is at work until it leaves."""
    client = await stack.client()
    count = len(stack.backend.calls)
    client.send(asking(name, target, {**body, "stream": True, "hold": True}))
    await stack.backend.call(count)
    return client


@isolated()
async def test_what_cannot_be_pinned_waits_for_requests_of_other_keys_but_not_of_its_own(stack: Stack) -> None:
    await begin(stack)
    stream = await hold(stack, b"alice", COMPLETIONS, {"prompt": "x"})
    await cached(stack, b"alice", MESSAGES, {"messages": "x"})
    client = await stack.client()
    client.send(asking(b"bob", MESSAGES, {"messages": "y"}))
    await until(lambda: len(stack.requests) == 2)
    await cached(stack, b"alice", b"/v1/messages/count_tokens", {"messages": "x"})
    assert [call.fields[b"x-client"] for call in stack.backend.calls[:2]] == [b"alice", b"alice"]
    assert not client.received
    stream.close()
    assert (await client.response()).status == 200


@isolated()
async def test_a_cancelled_request_leaves_its_text_to_its_key(stack: Stack) -> None:
    model = await begin(stack, Model(total=1))
    stream = await hold(stack, b"alice", COMPLETIONS, {"prompt": HEAD})
    stream.close()
    assert await cached(stack, b"bob", COMPLETIONS, {"prompt": HEAD}) == 0
    assert not leaks(model)


@isolated()
async def test_a_client_that_leaves_while_it_waits_frees_its_place(stack: Stack) -> None:
    await begin(stack)
    stream = await hold(stack, b"alice", COMPLETIONS, {"prompt": "x"})
    waiting = await stack.client()
    waiting.send(asking(b"bob", MESSAGES, {"messages": "y"}))
    await until(lambda: len(stack.requests) == 2)
    waiting.close()
    await until(lambda: len(stack.requests) == 1)
    assert await cached(stack, b"carol", COMPLETIONS, {"prompt": "z"}) == 0
    stream.close()


@pytest.mark.parametrize("flaw", [{"erases": False}, {"lists": False}, {"host_cache": True}])
@isolated()
async def test_nothing_is_served_by_a_backend_that_cannot_keep_the_promise(stack: Stack, flaw: dict[str, bool]) -> None:
    install(stack.backend, Model(**flaw))  # type: ignore[arg-type]
    stack.set_state("ready")
    await until(lambda: stack.app.readiness.state == "dead")
    report = json.loads((await stack.ask(get(b"/health"))).body)
    assert report["state"] == report["backend"] == "dead"
    assert report["detail"].startswith("PROMPT_CACHE=private: llama-server ")
    response = await stack.ask(asking(b"alice", COMPLETIONS, {"prompt": "x"}))
    assert response.status == 503
    assert report["detail"] in json.loads(response.body)["error"]["message"]
    assert not stack.backend.calls
    assert [line for line in stack.logged() if line.startswith("nothing is served: PROMPT_CACHE")]


@isolated()
async def test_a_request_is_not_sent_if_its_slot_cannot_be_emptied(stack: Stack) -> None:
    model = await begin(stack, Model(total=1))
    await cached(stack, b"alice", COMPLETIONS, {"prompt": HEAD})
    model.erases = False
    assert (await stack.ask(asking(b"bob", COMPLETIONS, {"prompt": HEAD}))).status == 502
    assert len(stack.backend.calls) == 1
    model.erases = True
    assert await cached(stack, b"alice", COMPLETIONS, {"prompt": HEAD}) == 0  # it is not known whether it was emptied


@isolated()
async def test_a_request_whose_slot_is_being_emptied_when_the_backend_ends_waits_for_the_next_one(stack: Stack) -> None:
    model = await begin(stack, Model(total=1))
    erasing = model.hold_erase()
    client = await stack.client()
    client.send(asking(b"alice", COMPLETIONS, {"prompt": HEAD}))
    await erasing.wait()
    stack.set_state("loading")
    model.restart(stack.backend, 2)
    await stack.turn("loading")
    await stack.turn("ready")
    response = await client.response()
    assert (response.status, json.loads(response.body)["timings"]["cache_n"]) == (200, 0)
    assert len(stack.backend.calls) == 1


@isolated()
async def test_what_a_gateway_finds_at_its_start_is_nobodys(stack: Stack) -> None:
    model = Model()
    for slot in model.slots:
        slot.text, slot.owner = HEAD, "another gateway's"
    await begin(stack, model)
    assert await cached(stack, b"alice", COMPLETIONS, {"prompt": HEAD}) == 0
    assert await cached(stack, b"bob", MESSAGES, {"messages": HEAD}) == 0
    assert not leaks(model)


@isolated()
async def test_an_operator_does_not_change_the_slots(stack: Stack) -> None:
    await begin(stack)
    response = await stack.ask(post(b"/slots/0?action=restore", key=KEY))
    assert response.status == 403


@isolated()
async def test_handovers_and_cached_tokens_are_counted(stack: Stack) -> None:
    await begin(stack, Model(total=1))
    for name in (b"alice", b"alice", b"bob", b"alice"):
        await cached(stack, name, COMPLETIONS, {"prompt": HEAD})
    page = (await stack.ask(get(b"/metrics"))).body
    assert b"\ngateway_slot_handovers_total 2\n" in page
    assert b'\ngateway_cached_prompt_tokens_sum{mode="private"} %d\n' % len(HEAD) in page


@isolated()
async def test_a_request_that_came_to_a_process_with_fewer_slots_has_them_alone(stack: Stack) -> None:
    model = await begin(stack, Model(total=3))
    for name in (b"alice", b"bob"):
        await cached(stack, name, COMPLETIONS, {"prompt": HEAD})
    stream = await hold(stack, b"carol", COMPLETIONS, {"prompt": HEAD})
    await stack.turn("loading")
    model.slots.pop()  # which is carol's: that was sent before the gateway knew of the new process
    await stack.turn("ready")
    client = await stack.client()
    client.send(asking(b"bob", COMPLETIONS, {"prompt": HEAD}))
    await until(lambda: {each.record.key_id for each in stack.requests} == {"carol", "bob"})
    for _ in range(4):  # it could empty a slot and be sent meanwhile
        await stack.ask(asking(b"alice", b"/v1/messages/count_tokens", {"messages": "x"}))
    assert not any(call.fields[b"x-client"] == b"bob" for call in stack.backend.calls[3:])
    stream.close()
    assert (await client.response()).status == 200


# --- Whatever keys do ---

SECRETS = [f"{HEAD[:-9]} {number}" for number in range(6)]


def random_body(dice: random.Random) -> tuple[bytes, dict[str, object]]:
    prompt = dice.choice(SECRETS) + " and" * dice.randrange(40)
    target, body = dice.choice(
        [
            (COMPLETIONS, {"prompt": prompt}),
            (COMPLETIONS, {"prompt": prompt, "id_slot": dice.randrange(4)}),
            (COMPLETIONS, {"prompt": prompt, "n": dice.randrange(1, 4)}),
            (COMPLETIONS, {"prompt": [prompt, prompt + "!"], "cache_prompt": True}),
            (CHAT, {"messages": [{"role": "user", "content": prompt}]}),
            (MESSAGES, {"messages": prompt}),
            (EMBEDDINGS, {"input": prompt}),
        ]
    )
    return target, {**body, "stream": dice.random() < 0.3, "hold": dice.random() < 0.2}


async def play(stack: Stack, model: Model, dice: random.Random, name: bytes) -> None:
    """One request; its client may leave, and a crash may cut the response."""
    process = model.processes
    target, body = random_body(dice)
    client = await stack.client()
    client.send(asking(name, target, body))
    if body["hold"] or dice.random() < 0.1:
        for _ in range(dice.randrange(3)):
            await asyncio.sleep(0)
        client.close()
    else:
        try:
            await client.response()
        except AssertionError:
            assert (client.ended, model.processes > process) == ("fin", True)
        client.close()


@pytest.mark.parametrize("seed", range(3))
@isolated(MAX_QUEUE_SIZE="0")
async def test_no_request_runs_in_a_slot_with_another_keys_text(stack: Stack, seed: int) -> None:
    dice = random.Random(seed)
    model = await begin(stack, Model(delay=lambda: dice.randrange(20)))
    tasks: set[asyncio.Task[None]] = set()
    for number in range(200):
        tasks.add(asyncio.ensure_future(play(stack, model, dice, dice.choice(list(KEYS)))))
        if len(tasks) > 6:
            _, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if number % 20 == 19:
            await stack.turn("loading")
            if number % 60 != 59:  # then it was only late
                model.restart(stack.backend, dice.choice([2, 4, 5]))
            await stack.turn("ready")
    if tasks:
        await asyncio.wait(tasks)
    assert not leaks(model)
    assert len(model.seen) > 100
    assert sum(found.cached > 0 for found in model.seen if found.key != "gateway") > 10
