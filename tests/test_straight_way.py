"""A request that finds all it needs at hand takes the straight way, and is told what it would be on the long one."""

import asyncio
import re
from typing import Any

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
from support.clock import HURRY
from support.gateway import CHAT, KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

ID = b"X-Request-Id: t-1"
TOLD = b'{"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 7}}'
LARGE = b"x" * (300 << 10)

# What the backend does, and whether the client's connection goes on behind it.
ANSWERS: dict[str, tuple[list[Step], bool]] = {
    "whole": ([send(answer())], True),
    "whole, in pieces": ([send(answer(), piece=7)], True),
    "head and body by themselves": ([send(answer()[: -len(HELLO)]), send(HELLO)], True),
    "large": ([send(answer(LARGE))], True),
    "empty": ([send(answer(b""))], True),
    "without content": ([send(b"HTTP/1.1 204 No Content\r\n\r\n")], True),
    "an error of its own": ([send(answer(b'{"error": 1}', b"500 Internal Server Error", b"Connection: close"))], True),
    "with tokens": ([send(answer(TOLD))], True),
    "coded": ([send(answer(TOLD, b"200 OK", b"Content-Encoding: gzip"))], True),
    "interim first": ([send(b"HTTP/1.1 100 Continue\r\n\r\n" + answer())], True),
    "interim with a length": ([send(b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n"), send(answer())], True),
    "stream": ([send(STREAM_HEAD), send(chunk(event("1"))), send(chunk(event("2")) + LAST_CHUNK)], True),
    "close-delimited": ([send(b"HTTP/1.1 200 OK\r\n\r\nhello"), close()], True),
    "surplus": ([send(answer() + b"surplus")], True),
    "malformed": ([send(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n")], True),
    "ambiguous": ([send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")], True),
    "a head too large": ([send(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000)], True),
    "switching": ([send(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")], True),
    "reset before the head": ([reset()], True),
    "cut head": ([send(b"HTTP/1.1 200 OK\r\nCont"), close()], True),
    "cut body": ([send(answer()[:-3]), close()], False),
    "cut stream": ([send(STREAM_HEAD + chunk(event("1"))), close()], False),
}


async def prime(stack: Stack) -> None:
    """Leave an idle connection to the backend behind, and a client's plan."""
    stack.backend.script(send(answer()))
    assert (await stack.ask(post(CHAT, b"{}", ID))).status == 200


async def told(stack: Stack, raw: bytes, steps: list[Step], goes_on: bool) -> bytes:
    """All that one client is told, until its next request is answered or its connection ends."""
    stack.backend.script(*steps)
    client = await stack.client()
    client.send(raw)
    if goes_on:
        response = await client.response(raw.partition(b" ")[0])
        client.send(get(b"/ping"))
        assert (await client.response()).body == b"pong\n"
        received = response.head + response.coded
    else:
        received = await client.take_all()
    client.close()
    return re.sub(rb"(remaining-requests|Date): [^\r]+", rb"\1: so", received)


@pytest.mark.parametrize("name", ANSWERS)
@scenario()
async def test_client_and_log_are_told_the_same_on_either_way(stack: Stack, name: str) -> None:
    steps, goes_on = ANSWERS[name]
    long = await told(stack, post(CHAT, b"{}", ID), steps, goes_on)
    stack.parts.pool.close()
    await prime(stack)
    calls = len(stack.backend.calls)
    straight = await told(stack, post(CHAT, b"{}", ID), steps, goes_on)
    assert straight == long
    assert stack.backend.calls[calls].connection is stack.backend.calls[calls - 1].connection
    await stack.stop()
    lines = [{**line, "ts": 0} for line in stack.lines if line["route"] == CHAT.decode()]
    assert len(lines) == 3
    assert lines[0] == lines[2]


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@scenario()
async def test_routes_without_a_slot_take_it_too(stack: Stack, method: bytes) -> None:
    await prime(stack)
    stack.backend.script(send(answer()[: -len(HELLO)] if method == b"HEAD" else answer()))
    client = await stack.client()
    client.send(request(method, b"/v1/models"))
    assert (await client.response(method)).status == 200
    assert len({id(call.connection) for call in stack.backend.calls}) == 1
    assert stack.counted("requests", "/v1/models", "200") == 1


async def asked(stack: Stack, *settings: Any) -> tuple[RawClient, Any]:
    """A client whose request went the straight way, and waits for the backend."""
    await prime(stack)
    stack.backend.script(*settings)
    client = await stack.client()
    client.send(post(CHAT, b'{"stream": true}'))
    call = await stack.backend.call(1)
    assert call.connection is stack.backend.calls[0].connection
    return client, call


@pytest.mark.parametrize("leave", [RawClient.close, RawClient.reset, RawClient.half_close])
@scenario()
async def test_a_client_that_leaves_takes_the_backend_s_connection_along(stack: Stack, leave: Any) -> None:
    client, call = await asked(stack, stall())
    leave(client)
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await until(lambda: stack.counted("cancelled", "awaiting_response") == 1)


@pytest.mark.parametrize(("minor", "fields"), [(1, [b"Connection: close"]), (0, []), (0, [b"Connection: keep-alive"])])
@scenario()
async def test_who_has_to_be_told_of_the_connection_is_told(stack: Stack, minor: int, fields: list[bytes]) -> None:
    """The straight way says nothing of it: whoever must hear `close` or `keep-alive` goes the long one."""
    await prime(stack)
    stack.backend.script(send(answer()))
    client = await stack.client()
    client.send(post(CHAT, b"{}", *fields, minor=minor))
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)
    keeps = b"Connection: keep-alive" in fields
    assert response.field(b"connection") == (b"keep-alive" if keeps else b"close")
    if not keeps:
        await client.until(lambda: client.ended == "fin")


@scenario()
async def test_an_interim_answer_that_comes_alone_is_no_answer(stack: Stack) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n"
    client, _ = await asked(stack, send(interim), stall(stack.finish), send(answer()))
    await client.silent()
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.body) == (200, HELLO)


@scenario(REQUEST_TIMEOUT="60")
async def test_time_is_up(stack: Stack) -> None:
    client, call = await asked(stack, stall())
    stack.advance(61)
    response = await client.response()
    assert (response.status, response.code) == (504, "backend_timeout")
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@scenario()
async def test_a_kept_connection_that_closes_in_that_moment_costs_nobody_anything(stack: Stack) -> None:
    await prime(stack)
    stack.backend.script(close())
    stack.backend.script(send(answer()))
    response = await stack.ask(post(CHAT, b"{}"))
    assert (response.status, response.body) == (200, HELLO)
    assert len({id(call.connection) for call in stack.backend.calls}) == 2


@scenario(SSE_HEARTBEAT="5")
async def test_signs_of_life_come_meanwhile(stack: Stack) -> None:
    client, _ = await asked(stack, stall(stack.finish), send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    stack.advance(6)
    assert b": waiting\n\n" in await client.take_through(b": waiting\n\n")
    stack.finish.set()
    assert (await client.take_through(LAST_CHUNK)).endswith(chunk(event("1")) + LAST_CHUNK)


@scenario(SSE_HEARTBEAT="5")
async def test_a_whole_refusal_of_the_backend_ends_a_stream_that_has_begun(stack: Stack) -> None:
    client, _ = await asked(
        stack, stall(stack.finish), send(answer(b'{"error": {"message": "no"}}', b"400 Bad Request"))
    )
    stack.advance(6)
    await client.take_through(b": waiting\n\n")
    stack.finish.set()
    assert b"The backend answered 400: no" in await client.take_through(LAST_CHUNK)


@scenario(DRAIN_TIMEOUT="30")
async def test_a_drain_lets_it_finish_and_says_close(stack: Stack) -> None:
    client, _ = await asked(stack, stall(stack.finish), send(answer()))
    stack.gateway.drain()
    stack.finish.set()
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (200, b"close")
    await client.until(lambda: client.ended == "fin")
    await asyncio.wait_for(stack.gateway.run_until_ended(), 10 * HURRY)


@scenario(DRAIN_TIMEOUT="0.05")
async def test_a_drain_that_is_over_refuses_it(stack: Stack) -> None:
    client, call = await asked(stack, stall())
    stack.gateway.drain()
    assert (await client.response()).code == "draining"
    await asyncio.wait_for(call.gone.wait(), 10 * HURRY)


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_it_holds_its_slot_until_it_is_answered(stack: Stack) -> None:
    client, _ = await asked(stack, stall(stack.finish), send(answer()))
    other = await stack.client()
    other.send(post(CHAT, b"{}", key=OTHER_KEY))
    await until(lambda: stack.parts.gate.queued == 1)
    stack.finish.set()
    assert (await client.response()).status == (await other.response()).status == 200


@scenario()
async def test_requests_behind_each_other_are_answered_in_order(stack: Stack) -> None:
    await prime(stack)
    for number in range(5):
        stack.backend.script(send(answer(b"%d" % number)))
    client = await stack.client()
    client.send(post() * 2 + get(b"/ping") + post() * 3)
    bodies = [(await client.response()).body for _ in range(6)]
    assert bodies == [b"0", b"1", b"pong\n", b"2", b"3", b"4"]


@scenario(KEYS=f"alice:{KEY.decode()}:3\n")
async def test_a_known_head_is_not_a_known_key(stack: Stack) -> None:
    """What is kept of a head lets nobody in: the key's rate and its end count each time."""
    await prime(stack)
    client = await stack.client()
    for remaining in (b"1", b"0"):
        client.send(post())
        assert (await client.response()).field(b"x-ratelimit-remaining-requests") == remaining
    client.send(post())
    assert (await client.response()).code == "rate_limit_exceeded"
    stack.keys_file.write_text(f"bob:{OTHER_KEY.decode()}\n")
    stack.parts.reload()
    client.send(post())
    assert (await client.response()).code == "invalid_api_key"
