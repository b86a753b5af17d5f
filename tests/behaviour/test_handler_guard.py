"""A request handler that awaits what would never resume it ends with 500 and a traceback, and its client can go on."""

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytest

from support.gateway import Stack, get, scenario
from transport.client_protocol import ForeignAwait


@types.coroutine
def bare_yield() -> Generator[None, None, None]:
    yield


FOREIGN: dict[str, Callable[[], Awaitable[object]]] = {
    "a sleep": lambda: asyncio.sleep(0.01),
    "a bare yield": bare_yield,
    "an event": lambda: asyncio.Event().wait(),
}
OUTCOMES = [("t-1", 500, "refused"), ("t-2", 200, "done")]
each_foreign_await = pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)


class ForeignEndpoints:
    """In place of the endpoints: awaits something foreign the first time, as a mistaken handler would."""

    def __init__(self, endpoints: Any, foreign: Callable[[], Awaitable[object]], *, stubborn: bool = False) -> None:
        self._endpoints = endpoints
        self._foreign: Callable[[], Awaitable[object]] | None = foreign
        self._stubborn = stubborn

    async def answer(self, call: Any) -> None:
        foreign, self._foreign = self._foreign, None
        while foreign is not None:
            with suppress(ForeignAwait) if self._stubborn else nullcontext():
                await foreign()
        await self._endpoints.answer(call)


def inject(stack: Stack, **parts: Any) -> None:
    """Give the requests other parts."""
    sessions = stack.app.sessions
    sessions.services = replace(sessions.services, **parts)


def tracebacks(stack: Stack) -> list[str]:
    """Return what was logged with a traceback, and forget it: the scenario fails on what it finds in the log."""
    found = [record for record in stack.log.records if record.exc_info]
    for record in found:
        stack.log.records.remove(record)
    return [f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}" for record in found]


@each_foreign_await
@scenario()
async def test_a_foreign_await_is_a_500_and_the_next_connection_works(
    stack: Stack, foreign: Callable[[], Awaitable[object]]
) -> None:
    inject(stack, endpoints=ForeignEndpoints(stack.app.endpoints, foreign))
    response = await stack.ask(get(b"/ping", b"X-Request-Id: t-1"))
    assert (response.status, response.code, response.field(b"connection")) == (500, "internal_error", b"close")
    assert (await stack.ask(get(b"/ping", b"X-Request-Id: t-2"))).body == b"pong\n"
    assert tracebacks(stack) == [
        "request t-1 failed: ForeignAwait('a request handler may await only what ClientProtocol offers')"
    ]
    await stack.stop()
    assert [(line["id"], line["status"], line["outcome"]) for line in stack.lines] == OUTCOMES


@each_foreign_await
@scenario()
async def test_a_handler_that_does_not_stop_is_a_500_too_and_its_connection_ends(
    stack: Stack, foreign: Callable[[], Awaitable[object]]
) -> None:
    inject(stack, endpoints=ForeignEndpoints(stack.app.endpoints, foreign, stubborn=True))
    client = await stack.client()
    client.send(get(b"/ping", b"X-Request-Id: t-1"))
    assert (await client.response()).code == "internal_error"
    assert await client.take_all() == b""
    assert (await stack.ask(get(b"/ping", b"X-Request-Id: t-2"))).body == b"pong\n"
    (message,) = tracebacks(stack)
    assert message.startswith("a request handler awaits what ClientProtocol does not offer, and is ended: ForeignAwait")
    await stack.stop()
    assert [(line["id"], line["status"], line["outcome"]) for line in stack.lines] == OUTCOMES
