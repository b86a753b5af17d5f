"""A request that crosses the end of its backend connection: sent again if it was not read, never if it was at work."""

import asyncio
import socket

import pytest

from support.backend import Connection, answer, close, reach, send, stall
from support.gateway import CHAT, Stack, get, post, request, scenario, until
from support.rawclient import RawClient, Response

AGAIN = send(answer(b"again"))
CONTROL = request(b"POST", b"/v1/chat/completions/control", b"{}")


async def kept(stack: Stack) -> Connection:
    """The backend's side of a connection that has carried a request, and reads no more."""
    assert (await stack.ask(post())).status == 200
    (connection,) = stack.backend.used
    connection.transport.pause_reading()
    stack.backend.script(AGAIN)
    return connection


async def sent(stack: Stack, raw: bytes) -> RawClient:
    """A client whose request is in the socket of a backend that does not read it."""
    client = await stack.client()
    client.send(raw)
    await until(lambda: any(each.stage == "awaiting_response" for each in stack.requests))
    for _ in range(5):
        await asyncio.sleep(0)
    return client


def tcp_socket(connection: Connection) -> socket.socket:
    found = connection.transport.get_extra_info("socket")
    assert found is not None
    return found  # type: ignore[no-any-return]


def send_fin(connection: Connection) -> None:
    tcp_socket(connection).shutdown(socket.SHUT_WR)


def check_sent_again(stack: Stack, response: Response) -> None:
    assert (response.status, response.body) == (200, b"again")
    assert len(stack.backend.connections) == 2
    assert len(stack.backend.calls) == 2  # the first was the one before


@pytest.mark.parametrize("raw", [post(), get(b"/v1/models"), CONTROL, post(CHAT, b"x" * 5_000_000)])
@scenario()
async def test_a_fin_in_the_same_moment(stack: Stack, raw: bytes) -> None:
    connection = await kept(stack)
    client = await stack.client()
    client.send(raw)
    send_fin(connection)
    check_sent_again(stack, await client.response())


@pytest.mark.parametrize("raw", [post(), get(b"/v1/models"), CONTROL])
@scenario()
async def test_closed_with_the_request_unread(stack: Stack, raw: bytes) -> None:
    """cpp-httplib shuts a connection down before it closes it."""
    connection = await kept(stack)
    client = await sent(stack, raw)
    send_fin(connection)
    connection.transport.abort()
    check_sent_again(stack, await client.response())


@pytest.mark.parametrize("raw", [post(), get(b"/v1/models")])
@scenario()
async def test_reset_because_the_request_is_unread(stack: Stack, raw: bytes) -> None:
    connection = await kept(stack)
    client = await sent(stack, raw)
    connection.transport.abort()
    check_sent_again(stack, await client.response())


@scenario()
async def test_a_reset_is_no_proof_for_a_request_that_must_not_be_repeated(stack: Stack) -> None:
    connection = await kept(stack)
    client = await sent(stack, CONTROL)
    connection.transport.abort()
    response = await client.response()
    assert (response.status, response.code) == (502, "backend_unavailable")
    assert len(stack.backend.calls) == 1


@scenario()
async def test_the_backend_takes_only_part_of_a_large_request(stack: Stack) -> None:
    connection = await kept(stack)
    client = await sent(stack, post(CHAT, b"x" * 9_000_000))
    send_fin(connection)
    check_sent_again(stack, await client.response())


@scenario()
async def test_the_first_sign_of_a_restart_is_a_closed_connection_and_the_request_waits(stack: Stack) -> None:
    connection = await kept(stack)
    client = await sent(stack, post())
    stack.backend.refuse()
    send_fin(connection)
    connection.transport.abort()
    await until(lambda: stack.app.readiness.state == "loading")
    await stack.backend.listen()
    assert (await client.response()).body == b"again"


@scenario()
async def test_a_request_that_is_alone_at_work_when_the_backend_dies_is_not_sent_again(stack: Stack) -> None:
    """The FIN of a process that dies looks like an orderly close, but nothing accepts connections any more."""
    assert (await stack.ask(post())).status == 200
    at_work, die = asyncio.Event(), asyncio.Event()
    stack.backend.script(reach(at_work), stall(die), close())
    client = await stack.client()
    client.send(post())
    await at_work.wait()
    stack.backend.refuse()
    die.set()
    response = await client.response()
    assert (response.status, response.code) == (502, "request_held_back")
    await stack.backend.listen()
    stack.app.readiness.doubt()
    await until(lambda: stack.app.readiness.ready)
    assert (await stack.ask(post(CHAT, b"another"))).status == 200
    assert [call.body for call in stack.backend.calls] == [b"{}", b"{}", b"another"]
    assert len(stack.backend.used) == 2


@scenario()
async def test_a_wait_for_a_backend_that_refuses_a_connection_counts_as_a_wait(stack: Stack) -> None:
    """A slot was free at once, but nothing takes the request."""
    stack.backend.refuse()
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.readiness.state == "loading" and any(r.stage == "queued" for r in stack.requests))
    for _ in range(20):
        stack.advance(0.25)
    await stack.backend.listen()
    assert (await client.response()).status == 200
    await stack.stop()
    assert stack.lines[-1]["queue_ms"] == 5000
