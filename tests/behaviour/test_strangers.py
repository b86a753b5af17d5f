"""Connections without a valid key, however many, keep no key out."""

import re

import pytest

from support.gateway import CHAT, Stack, get, post, scenario, tls_scenario, trusting, until
from support.rawclient import RawClient

PART = b"GET /ping HTTP/1.1\r\n"
WRONG_KEY = b"sk-mallory-0123456789abcdef"


async def stranger(stack: Stack, part: bytes = PART) -> RawClient:
    """A connection that has begun a request, of which the gateway knows."""
    client = await stack.client()
    client.send(part)
    await until(lambda: sum(wire.has_unread for wire in stack.open_clients if not wire.lingers) >= 1)
    return client


@scenario(MAX_CONNECTIONS="4")
async def test_any_number_of_strangers_keeps_no_key_out(stack: Stack) -> None:
    crowd = []
    for number in range(60):
        client = await stack.client()
        client.send(b"G")
        await until(lambda number=number: sum(wire.has_unread for wire in stack.clients) == min(number + 1, 4))
        crowd.append(client)
    for _ in range(20):
        assert (await stack.ask(post())).status == 200
    for client in crowd[:56]:
        response = await client.response()
        assert (response.status, response.code) == (503, "too_many_connections")
    await stack.stop()
    assert [line["status"] for line in stack.lines].count(503) == sum(b" 503 " in c.received for c in crowd) + 56


@scenario(MAX_CONNECTIONS="2")
async def test_one_with_a_key_is_not_ended_for_one_without(stack: Stack) -> None:
    known = await stack.client()
    known.send(post())
    assert (await known.response()).status == 200
    known.send(post()[:20])
    await until(lambda: any(wire.has_unread for wire in stack.clients))
    strangers = [await stranger(stack, b"G") for _ in range(3)]
    assert (await strangers[0].response()).status == 503
    assert (await strangers[1].response()).status == 503
    known.send(post()[20:])
    assert (await known.response()).status == 200


@scenario(MAX_CONNECTIONS="2")
async def test_an_idle_one_gives_way_before_a_stranger(stack: Stack) -> None:
    known = await stack.client()
    known.send(post())
    assert (await known.response()).status == 200
    first = await stranger(stack)
    await stack.client()
    assert await known.take_all() == b""
    first.send(b"Host: x\r\n\r\n")
    assert (await first.response()).status == 200


@scenario(MAX_CONNECTIONS="1")
async def test_a_key_that_is_no_longer_valid_makes_a_stranger(stack: Stack) -> None:
    client = await stack.client()
    client.send(post())
    assert (await client.response()).status == 200
    client.send(post(key=WRONG_KEY))
    assert (await client.response()).status == 401
    client.send(b"G")
    await until(lambda: any(wire.has_unread for wire in stack.clients))
    await stack.client()
    assert (await client.response()).code == "too_many_connections"


@scenario(MAX_CONNECTIONS="1")
async def test_one_with_a_wrong_key_that_sends_no_body_takes_no_place(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, b"x" * 100, key=WRONG_KEY)[:-100])
    assert (await client.response()).status == 401
    second = await stranger(stack)
    second.send(b"Host: x\r\n\r\n")
    assert (await second.response()).status == 200


@scenario(MAX_CONNECTIONS="2")
async def test_a_stranger_that_takes_no_answer_gives_way(stack: Stack) -> None:
    client = await stack.client(receive_buffer=4096)
    client.transport.pause_reading()
    client.send(get(b"/metrics", key=None) * 2000)
    await until(lambda: any(wire.write_paused for wire in stack.clients))
    await stack.occupy(2)
    await until(lambda: len(stack.open_clients) == 2)


@scenario(MAX_CONNECTIONS="2")
async def test_sixteen_beyond_the_limit_may_use_public_routes_and_the_oldest_gives_way(stack: Stack) -> None:
    await stack.occupy(2)
    late = []
    for number in range(17):
        late.append(await stack.client())
        late[-1].send(PART)
        expected = min(number + 1, 16)
        await until(lambda expected=expected: sum(wire.has_unread for wire in stack.clients) == expected)
    response = await late.pop(0).response()
    assert (response.status, response.code) == (503, "too_many_connections")
    for client in late:
        client.send(b"Host: x\r\n\r\n")
        assert (await client.response()).status == 200


@scenario(MAX_CONNECTIONS="2")
async def test_none_vanishes_without_a_line(stack: Stack) -> None:
    silent = await stack.client()
    begun = await stranger(stack)
    await stack.occupy(2)
    assert await silent.take_all() == b""
    assert (await begun.response()).status == 503
    stack.advance(1)
    message = "MAX_CONNECTIONS: closed 2 connections that were idle or had shown no valid key, to accept new ones"
    assert message in stack.logged()
    await stack.stop()
    assert [(line["status"], line["stage"]) for line in stack.lines].count((503, "reading_head")) == 1


@pytest.mark.parametrize("part", [b"", PART])
@tls_scenario(MAX_CONNECTIONS="2")
async def test_strangers_under_tls(stack: Stack, part: bytes) -> None:
    trust = trusting(stack.folder / "server.crt")
    for _ in range(20):
        client = await stack.client(tls=trust)
        client.send(part)
        await until(
            lambda: sum(wire.has_unread for wire in stack.clients) == (2 if part else 0) or len(stack.clients) < 2
        )
    client = await stack.client(tls=trust)
    client.send(post())
    assert (await client.response()).status == 200


@tls_scenario(MAX_CONNECTIONS="3")
async def test_handshakes_do_not_vanish_without_a_line_either(stack: Stack) -> None:
    crowd = [await stack.client() for _ in range(10)]
    await until(lambda: sum(bool(client.ended) for client in crowd) == 7)
    stack.advance(61)
    message = re.compile("MAX_CONNECTIONS: aborted ([0-9]+) TLS handshakes to accept new connections")
    assert sum(int(found[1]) for line in stack.logged() if (found := message.fullmatch(line))) == 7
