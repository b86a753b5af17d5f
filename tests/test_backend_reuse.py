"""Which connections to the backend carry a second request."""

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, send
from support.gateway import Stack, post, scenario

STREAM = STREAM_HEAD + chunk(event('{"a": 1}')) + chunk(event("[DONE]")) + LAST_CHUNK


async def connections_of_two(stack: Stack, *raw: bytes, ticks: int = 0, closes: bool = False) -> int:
    """How many connections two requests take, with so many ticks of the pool's between them."""
    for _ in range(2):
        stack.backend.script(*map(send, raw), *([close()] if closes else []))
        assert (await stack.ask(post())).status == 200
        for _ in range(ticks):
            stack.parts.pool.tick()
    return len({id(call.connection) for call in stack.backend.calls})


@pytest.mark.parametrize(("raw", "connections"), [(STREAM, 2), (answer(), 1)], ids=["a stream", "a sized answer"])
@scenario()
async def test_a_connection_is_used_at_once_after_a_sized_answer_only(
    stack: Stack, raw: bytes, connections: int
) -> None:
    """llama-server closes behind a stream without having said so: a request sent meanwhile would be lost."""
    assert await connections_of_two(stack, raw) == connections


@pytest.mark.parametrize(("ticks", "connections"), [(1, 2), (2, 1)])
@scenario()
async def test_after_a_stream_it_rests_for_a_whole_tick(stack: Stack, ticks: int, connections: int) -> None:
    assert await connections_of_two(stack, STREAM, ticks=ticks) == connections


@scenario()
async def test_one_that_was_closed_while_it_rested_is_let_go(stack: Stack) -> None:
    assert await connections_of_two(stack, STREAM, ticks=3, closes=True) == 2
