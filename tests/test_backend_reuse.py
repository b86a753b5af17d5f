"""Which connections to the backend carry a second request."""

import socket

import pytest

from relay import Pool
from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, send
from support.gateway import Stack, post, scenario, until
from turns import Outbox

STREAM = STREAM_HEAD + chunk(event('{"a": 1}')) + chunk(event("[DONE]")) + LAST_CHUNK


@pytest.mark.parametrize(("raw", "connections"), [(STREAM, 2), (answer(), 1)], ids=["a stream", "a sized answer"])
@scenario()
async def test_a_connection_is_used_again_only_after_a_sized_answer(stack: Stack, raw: bytes, connections: int) -> None:
    """llama-server closes behind a stream without having said so: a request sent meanwhile would be lost."""
    for _ in range(2):
        stack.backend.script(send(raw))
        assert (await stack.ask(post())).status == 200
    assert len({id(call.connection) for call in stack.backend.calls}) == connections


@scenario()
async def test_one_that_has_said_anything_is_not_taken_for_one_that_had_been_closed(stack: Stack) -> None:
    stack.backend.script(send(answer()))
    stack.backend.script(send(b"HTTP/1.1 102 Processing\r\n\r\n"), close())
    assert (await stack.ask(post())).status == 200
    response = await stack.ask(post())
    assert (response.status, response.code) == (502, "backend_unavailable")
    assert len({id(call.connection) for call in stack.backend.calls}) == 1
    assert len(stack.backend.calls) == 2


@scenario()
async def test_where_a_closed_one_was_the_first_sign_of_a_restart_the_request_waits(stack: Stack) -> None:
    stack.backend.script(send(answer()))
    stack.backend.script(close())
    assert (await stack.ask(post())).status == 200
    stack.backend.refuse()
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.parts.readiness.state == "loading")
    await stack.backend.listen()
    assert (await client.response()).status == 200
    assert len(stack.backend.calls) == 3


@scenario()
async def test_one_that_has_ended_is_let_go(stack: Stack) -> None:
    stack.backend.script(send(answer()), close())
    assert (await stack.ask(post())).status == 200
    pool = stack.parts.pool
    await until(lambda: all(wire.ended for wire in pool._idle))
    pool.tick()
    assert pool._idle == []


@scenario()
async def test_one_that_has_not_taken_all_of_its_request_is_let_go(stack: Stack) -> None:
    """Whatever it has answered: the next request would wait behind the rest of this one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # which accepts nothing and reads nothing
        pool = Pool("127.0.0.1", listener.getsockname()[1], stack.parts.deadlines, Outbox(), 65536)
        for octets, kept in ((10, True), (32 << 20, False)):
            wire = await pool.connect()
            wire.transport.write(b"x" * octets)
            pool.take_back(wire, reusable=True)
            assert (pool.take() is wire) is kept
            assert wire.ended is not kept
            wire.abort()
