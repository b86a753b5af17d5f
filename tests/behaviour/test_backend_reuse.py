"""Which backend connections carry a second request."""

import socket

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, send
from support.gateway import Stack, post, scenario, until
from transport.pool import ConnectionPool
from transport.write_batching import WriteBatcher

STREAM = STREAM_HEAD + chunk(event('{"a": 1}')) + chunk(event("[DONE]")) + LAST_CHUNK


@pytest.mark.parametrize(("raw", "connections"), [(STREAM, 2), (answer(), 1)], ids=["a stream", "a sized answer"])
@scenario()
async def test_a_connection_is_used_again_only_after_a_sized_response(
    stack: Stack, raw: bytes, connections: int
) -> None:
    """llama-server closes after a stream without announcing it. A request sent meanwhile would be lost."""
    for _ in range(2):
        stack.backend.script(send(raw))
        assert (await stack.ask(post())).status == 200
    assert len({id(call.connection) for call in stack.backend.calls}) == connections


@scenario()
async def test_a_connection_that_has_answered_anything_does_not_count_as_stale(stack: Stack) -> None:
    stack.backend.script(send(answer()))
    stack.backend.script(send(b"HTTP/1.1 102 Processing\r\n\r\n"), close())
    assert (await stack.ask(post())).status == 200
    response = await stack.ask(post())
    assert (response.status, response.code) == (502, "backend_unavailable")
    assert len({id(call.connection) for call in stack.backend.calls}) == 1
    assert len(stack.backend.calls) == 2


@scenario()
async def test_a_connection_that_has_ended_is_removed(stack: Stack) -> None:
    stack.backend.script(send(answer()), close())
    assert (await stack.ask(post())).status == 200
    await until(lambda: len(stack.app.pool) == 0)
    assert stack.app.pool.acquire() is None


@scenario()
async def test_a_connection_that_has_not_taken_its_whole_request_is_closed(stack: Stack) -> None:
    """Also if it has answered: the next request would wait for the rest of this one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts nothing and reads nothing
        pool = ConnectionPool("127.0.0.1", listener.getsockname()[1], stack.app.ticker, WriteBatcher(), 65536)
        for size, kept in ((10, True), (32 << 20, False)):
            connection = await pool.connect()
            connection.transport.write(b"x" * size)
            pool.release(connection, True)
            assert (pool.acquire() is connection) is kept
            assert connection.ended is not kept
            connection.abort()
