"""A client that still sends its request when it is refused: the answer arrives, and the time for that is bounded."""

import socket

from support.gateway import CHAT, Stack, get, post, request, scenario, tls_scenario, trusting, until
from support.rawclient import RawClient

LENGTH = 24 << 20
REFUSED = request(b"POST", CHAT, None, b"Content-Length: %d" % LENGTH, key=None)


async def upload(client: RawClient, octets: int) -> None:
    """Send so many bytes, as fast as the gateway takes them."""
    for start in range(0, octets, 1 << 20):
        client.send(b"x" * min(1 << 20, octets - start))
        await until(lambda: client.transport.is_closing() or not client.transport.get_write_buffer_size())


@scenario()
async def test_all_of_a_refused_upload_is_taken(stack: Stack) -> None:
    """However large it is: a client that reads nothing before it has sent all would not get the answer."""
    client = await stack.client()
    client.send(REFUSED)
    await upload(client, LENGTH)
    assert (await client.response()).status == 401
    assert (await client.take_all(), client.ended) == (b"", "fin")


@tls_scenario()
async def test_all_of_a_refused_upload_is_taken_under_tls(stack: Stack) -> None:
    client = await stack.client(tls=trusting(stack.folder / "server.crt"))
    client.send(REFUSED)
    await upload(client, LENGTH)
    assert (await client.response()).status == 401


@scenario()
async def test_a_slow_upload_is_taken_for_30_s(stack: Stack) -> None:
    client = await stack.client()
    client.send(REFUSED)
    assert (await client.response()).status == 401
    for second in range(0, 28, 4):
        assert stack.open_clients, f"closed after {second} s"
        wire = stack.open_clients[0]
        wire.saw_activity = False
        await until(lambda wire=wire: client.send(b"x") or wire.saw_activity)  # a tick may come between, and clear it
        stack.advance(4)
    stack.advance(2)
    await until(lambda: not stack.open_clients, "the connection is gone")


@scenario(STREAM_IDLE_TIMEOUT="1000")
async def test_a_refused_client_may_be_silent_for_5_s(stack: Stack) -> None:
    client = await stack.client()
    client.send(REFUSED)
    assert (await client.response()).status == 401
    stack.advance(4)
    assert stack.open_clients
    stack.advance(1)
    await until(lambda: not stack.open_clients, "the connection is gone")


@scenario(MAX_CONNECTIONS="2")
async def test_those_that_linger_take_no_place_and_are_bounded(stack: Stack) -> None:
    """Else strangers with one refused upload each would keep everybody out."""
    crowd = [await stack.client() for _ in range(2)]
    while len(crowd) < 150:
        crowd[-1].send(REFUSED)
        assert (await crowd[-1].response()).status == 401
        crowd.append(await stack.client())
    await until(lambda: len(stack.open_clients) == 130)
    assert (await stack.ask(post())).status == 200
    assert len(stack.open_clients) <= 130


@scenario(DRAIN_TIMEOUT="600")
async def test_a_drain_waits_2_s_for_them(stack: Stack) -> None:
    idle, early, late = await stack.client(), await stack.client(), await stack.client()
    early.send(REFUSED)
    assert (await early.response()).status == 401
    late.send(REFUSED[:-2])
    await until(lambda: any(wire.has_unread for wire in stack.clients))
    stack.app.lifecycle.drain()
    late.send(b"\r\n")
    assert (await late.response()).status == 401
    assert await idle.take_all() == b""  # the gateway has stopped listening
    assert len(stack.open_clients) == 2
    stack.advance(2)
    await until(lambda: not stack.open_clients, "both are gone")


@scenario()
async def test_keepalive_notices_clients_that_are_gone(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200
    connection = stack.clients[0].transport.get_extra_info("socket")
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3]
