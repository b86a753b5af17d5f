"""session.py: one client's requests in order, the limit of connections, and the end of them all."""

import asyncio

import pytest

from accounting.request_record import Outcome, Stage
from core.errors import BAD_REQUEST, DRAINING, REQUEST_TIMEOUT, TOO_MANY_CONNECTIONS, GatewayError
from proxy.session import CLOSING, IDLE, SERVING, ClientSession, SessionSettings
from support.backend import STREAM_HEAD, answer
from support.gateway import CHAT, get, post
from support.heads import every_answer
from support.memory_gateway import MemoryGateway, in_memory
from support.memory_transport import ABORTED, ESTABLISHED, LOST, OPEN, MemoryTransport, turns_until
from support.memory_transport import CLOSING as TRANSPORT_CLOSING

PING = get(b"/ping")


def the_session(gateway: MemoryGateway, transport: MemoryTransport) -> ClientSession:
    """Return the session on this transport."""
    return next(session for session in gateway.sessions if session.client.transport is transport)


def sent(gateway: MemoryGateway, client: MemoryTransport) -> bytes:
    gateway.link.batcher.flush()
    return client.take()


def status(gateway: MemoryGateway, client: MemoryTransport) -> int:
    """Return the status that the client was sent since the last call, 0 if there is none."""
    return int(sent(gateway, client)[9:12] or 0)


# --- One request after the other ---


@in_memory()
async def test_a_connection_carries_one_request_after_the_other(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    for number in (1, 2):
        client.receive(PING)
        assert sent(gateway, client).endswith(every_answer(b"r-%d" % number) + b"\r\nown")
    assert (the_session(gateway, client).state, client.state) == (IDLE, OPEN)


@in_memory()
async def test_a_session_serves_until_the_response_is_sent(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(post())
    session = the_session(gateway, client)
    assert (session.state, session.request is not None, gateway.sessions.backend_slots) == (SERVING, True, 1)
    (await gateway.asked()).receive(answer())
    assert (session.state, session.request, gateway.sessions.backend_slots) == (IDLE, None, 0)


@in_memory()
async def test_pipelined_requests_are_answered_in_order(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(post() + PING + PING)
    assert len(gateway.endpoints.calls) == 0
    (await gateway.asked()).receive(answer())
    await turns_until(lambda: len(gateway.endpoints.calls) == 2)
    responses = sent(gateway, client)
    assert [responses.find(b"X-Request-Id: r-%d\r\n" % number) >= 0 for number in (1, 2, 3)] == [True] * 3
    assert [record.id for record in gateway.records] == [b"r-1", b"r-2", b"r-3"]


@in_memory()
async def test_a_connection_that_cannot_carry_another_request_is_closed(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(get(b"/ping", b"Connection: close"))
    assert (status(gateway, client), client.state) == (200, TRANSPORT_CLOSING)
    assert (the_session(gateway, client).state, gateway.sessions.open_count, len(gateway.sessions)) == (CLOSING, 0, 1)
    client.lose()
    assert len(gateway.sessions) == 0


@in_memory()
async def test_bytes_that_came_with_the_handshake_are_served(gateway: MemoryGateway) -> None:
    assert status(gateway, gateway.connect(received=PING)) == 200


# --- Heads that never became a request ---


@in_memory()
async def test_a_wrong_head_is_answered_once_and_recorded(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(b"GET / HTTP/1.1\r\n\r\n")  # it has no Host
    response = sent(gateway, client)
    assert response.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"exactly one Host" in response
    (record,) = gateway.records
    assert (record.status, record.refusal, record.outcome, record.stage) == (
        400,
        BAD_REQUEST,
        Outcome.REFUSED,
        Stage.READING_HEAD,
    )
    assert (record.prepared.route.label, record.key_id) == ("none", "-")


@in_memory()
async def test_a_wrong_head_of_a_head_request_gets_no_content(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(b"HEAD / HTTP/1.1\r\n\r\n")
    assert sent(gateway, client).endswith(b"\r\n\r\n")


@in_memory()
async def test_bytes_that_are_no_head_are_refused_and_what_follows_is_discarded(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(b"\x16\x03\x01")
    assert b"TLS was spoken to a plain HTTP port." in sent(gateway, client)
    assert (client.state, client.wrote_eof) == (OPEN, True)
    client.receive(b"more")
    assert gateway.records[0].refusal is BAD_REQUEST
    assert len(gateway.records) == 1


@in_memory()
async def test_a_head_that_takes_too_long_is_a_408(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(PING[:5])
    gateway.link.advance(10)
    assert status(gateway, client) == 408
    assert [record.refusal for record in gateway.records] == [REQUEST_TIMEOUT]


@in_memory()
async def test_a_client_that_leaves_half_a_head_is_recorded_as_cancelled(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(PING[:5])
    client.receive_eof()
    (record,) = gateway.records
    assert (record.status, record.outcome, record.stage) == (499, Outcome.CANCELLED, Stage.READING_HEAD)
    assert len(gateway.sessions) == 0


@in_memory()
async def test_a_client_that_sends_nothing_leaves_no_record(gateway: MemoryGateway) -> None:
    gateway.connect().receive_eof()
    assert (gateway.records, len(gateway.sessions)) == ([], 0)


@pytest.mark.parametrize(("requests", "idle_s"), [(0, 10), (1, 75)])
@in_memory()
async def test_an_idle_connection_is_closed_without_a_word(
    gateway: MemoryGateway, requests: int, idle_s: float
) -> None:
    client = gateway.connect()
    for _ in range(requests):
        client.receive(PING)
        sent(gateway, client)
    gateway.link.advance(idle_s - 0.25)
    assert client.state == OPEN
    gateway.link.advance(0.25)
    assert (sent(gateway, client), client.state) == (b"", TRANSPORT_CLOSING)
    assert len(gateway.records) == requests


# --- Clients that do not take what they asked for ---


async def stalled(gateway: MemoryGateway) -> MemoryTransport:
    """Return a client that has been sent a large response and then a small one, and takes nothing."""
    client = gateway.connect()
    client.stall()
    client.receive(post())
    (await gateway.asked()).receive(answer(b"x" * 70_000))
    gateway.link.batcher.flush()
    client.receive(PING)
    return client


@in_memory()
async def test_the_next_head_is_read_once_the_last_response_is_taken(gateway: MemoryGateway) -> None:
    client = await stalled(gateway)
    client.receive(PING)
    await asyncio.sleep(0)
    assert len(gateway.endpoints.calls) == 1
    client.take_unsent()
    await turns_until(lambda: len(gateway.endpoints.calls) == 2)
    assert the_session(gateway, client).state == IDLE


@pytest.mark.parametrize("more", [(), (PING,)], ids=["quiet", "with a next request"])
@in_memory()
async def test_a_client_that_takes_nothing_for_too_long_is_given_up(
    gateway: MemoryGateway, more: tuple[bytes, ...]
) -> None:
    client = await stalled(gateway)
    for data in more:
        client.receive(data)
    gateway.link.advance(300)
    assert client.state == ABORTED
    assert [record.outcome for record in gateway.records] == [Outcome.DONE] * 2 + [Outcome.CANCELLED] * len(more)


# --- The limit of connections ---


@in_memory()
async def test_the_connection_that_has_idled_longest_makes_room(gateway: MemoryGateway) -> None:
    clients = [gateway.connect() for _ in range(4)]
    for client in (clients[0], clients[1]):  # they have shown a key, and are closed in order
        client.receive(PING)
        sent(gateway, client)
    for states in (
        [OPEN, OPEN, ABORTED, OPEN],
        [OPEN, OPEN, ABORTED, ABORTED],
        [TRANSPORT_CLOSING, OPEN, ABORTED, ABORTED],
    ):
        newcomer = gateway.connect()
        newcomer.receive(post())
        assert [client.state for client in clients] == states
        assert the_session(gateway, newcomer).request is not None


@in_memory()
async def test_a_connection_in_use_does_not_make_room(gateway: MemoryGateway) -> None:
    serving, untaken, half = gateway.connect(), gateway.connect(), gateway.connect()
    serving.receive(post())
    untaken.stall()
    untaken.receive(PING)
    gateway.link.batcher.flush()
    half.receive(PING[:5])
    assert [the_session(gateway, client).is_quiet for client in (serving, untaken, half)] == [False] * 3
    idle = gateway.connect()
    gateway.connect()
    assert [client.state for client in (serving, untaken, half, idle)] == [OPEN, OPEN, OPEN, ABORTED]


@in_memory()
async def test_without_an_idle_one_the_oldest_that_has_shown_no_key_makes_room(gateway: MemoryGateway) -> None:
    crowd(gateway, 2)
    strangers = [gateway.connect(), gateway.connect()]
    for client in strangers:
        client.receive(PING[:5])
    newcomer = gateway.connect()
    assert [status(gateway, client) for client in strangers] == [503, 0]
    assert gateway.records[-1].refusal is TOO_MANY_CONNECTIONS
    assert not the_session(gateway, newcomer).public_only


def crowd(gateway: MemoryGateway, count: int = 4) -> list[MemoryTransport]:
    """Return clients that are all served."""
    clients = [gateway.connect() for _ in range(count)]
    for client in clients:
        client.receive(post(CHAT, b"{}")[:-1])
    return clients


@in_memory()
async def test_beyond_the_limit_there_are_public_routes_only(gateway: MemoryGateway) -> None:
    crowd(gateway)
    client = gateway.connect()
    client.receive(PING)
    assert status(gateway, client) == 200
    client.receive(get(b"/v1/models"))
    assert status(gateway, client) == 503
    assert gateway.records[-1].refusal is TOO_MANY_CONNECTIONS
    assert client.state == TRANSPORT_CLOSING


@in_memory()
async def test_not_even_those_are_without_limit(gateway: MemoryGateway) -> None:
    crowd(gateway)
    for client in (gateway.connect() for _ in range(16)):
        client.receive(PING)  # a client without a key would make room
        assert status(gateway, client) == 200
        client.receive(PING[:5])  # so would an idle one
    refused = gateway.connect()
    assert status(gateway, refused) == 503
    assert gateway.records[-1].refusal is TOO_MANY_CONNECTIONS


@in_memory()
async def test_they_make_room_for_each_other(gateway: MemoryGateway) -> None:
    crowd(gateway)
    strangers = [gateway.connect() for _ in range(16)]
    for client in strangers:
        client.receive(PING[:5])
    newcomer = gateway.connect()
    newcomer.receive(PING)
    assert [status(gateway, client) for client in (strangers[0], strangers[1], newcomer)] == [503, 0, 200]


# Clients whose connections are ending


def lingering(gateway: MemoryGateway) -> MemoryTransport:
    """Return a client whose request was refused, and that may still be sending."""
    client = gateway.connect()
    client.receive(b"\x16\x03\x01")
    assert (status(gateway, client), the_session(gateway, client).client.lingers) == (400, True)
    return client


@in_memory(settings=SessionSettings(max_connections=1, header_s=10, keepalive_s=75, flush_s=300))
async def test_a_client_that_lingers_takes_no_place(gateway: MemoryGateway) -> None:
    refused = gateway.connect()
    refused.receive(post(b"/nowhere", b"hello")[:-1])  # with a valid key, so it need not give way
    assert (status(gateway, refused), the_session(gateway, refused).client.lingers) == (404, True)
    client = gateway.connect()
    assert not the_session(gateway, client).public_only
    assert refused.state == OPEN


@in_memory()
async def test_so_many_clients_linger_and_no_more(gateway: MemoryGateway) -> None:
    clients = [lingering(gateway) for _ in range(129)]
    assert [client.state for client in clients] == [ABORTED] + [OPEN] * 128


@pytest.mark.parametrize("before", [True, False])
@in_memory()
async def test_a_drain_waits_for_them_for_a_moment(gateway: MemoryGateway, before: bool) -> None:
    if before:
        gateway.lifecycle.drain()
    client = lingering(gateway)
    if not before:
        gateway.sessions.close_idle()
    gateway.link.advance(1.75)
    assert client.state == OPEN
    gateway.link.advance(0.25)
    assert client.state == ABORTED


# --- Ticks ---


@in_memory(heartbeat_s=15)
async def test_a_tick_gives_each_waiting_stream_its_heartbeat(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    client.receive(post(CHAT, b'{"stream": true}'))
    await gateway.asked()
    gateway.link.advance(15)
    assert sent(gateway, client).endswith(b": waiting\n\n\r\n")


@in_memory(heartbeat_s=60, slots=1)
async def test_a_request_that_this_tick_has_ended_gets_no_heartbeat(gateway: MemoryGateway) -> None:
    gateway.queue.acquire("bob")
    client = gateway.connect()
    client.receive(post(CHAT, b'{"stream": true}'))
    gateway.link.advance(60)
    response = sent(gateway, client)
    assert response.startswith(b"HTTP/1.1 503 ")
    assert b"waiting" not in response


@pytest.mark.parametrize(("retransmissions", "state"), [(7, OPEN), (8, ABORTED)])
@in_memory()
async def test_a_client_that_acknowledges_nothing_any_more_is_hung_up(
    gateway: MemoryGateway, retransmissions: int, state: str
) -> None:
    client, other = gateway.connect(), gateway.connect()
    client.receive(post())
    other.receive(post())
    client.sock.tcp = ESTABLISHED._replace(retransmissions=retransmissions, unacknowledged=1)
    gateway.link.advance(10)
    assert (client.state, other.state) == (state, OPEN)


# --- The end ---


@in_memory(slots=1)
async def test_the_waits_of_one_stage_can_be_ended(gateway: MemoryGateway) -> None:
    served, queued, idle = gateway.connect(), gateway.connect(), gateway.connect()
    for client in (served, queued):
        client.receive(post())
    await gateway.asked()
    gateway.sessions.cancel_waits(GatewayError(DRAINING), Stage.QUEUED)
    assert [status(gateway, client) for client in (served, queued, idle)] == [0, 503, 0]


@in_memory()
async def test_the_waits_of_all_can_be_ended(gateway: MemoryGateway) -> None:
    served, idle, closing = gateway.connect(), gateway.connect(), gateway.connect()
    served.receive(post())
    closing.receive(get(b"/ping", b"Connection: close"))
    await gateway.asked()
    sent(gateway, closing)
    gateway.sessions.cancel_waits(GatewayError(DRAINING))
    assert [status(gateway, client) for client in (served, idle, closing)] == [503, 503, 0]


@in_memory()
async def test_a_request_whose_connection_is_being_made_can_be_ended(gateway: MemoryGateway) -> None:
    gateway.backends.hang = True
    client = gateway.connect()
    client.receive(post())
    await turns_until(lambda: gateway.backends.asked)
    gateway.sessions.cancel_waits(GatewayError(DRAINING))
    assert (status(gateway, client), gateway.readiness.doubts) == (503, 0)


@in_memory()
async def test_idle_connections_can_be_closed(gateway: MemoryGateway) -> None:
    idle, half, served = gateway.connect(), gateway.connect(), gateway.connect()
    half.receive(PING[:5])
    served.receive(post())
    gateway.sessions.close_idle()
    assert [client.state for client in (idle, half, served)] == [TRANSPORT_CLOSING, OPEN, OPEN]
    assert gateway.records == []


@in_memory()
async def test_the_end_waits_for_the_last_connection(gateway: MemoryGateway) -> None:
    clients = [gateway.connect(), gateway.connect()]
    empty = asyncio.ensure_future(gateway.sessions.wait_empty())
    await asyncio.sleep(0)
    clients[0].lose()
    await asyncio.sleep(0)
    assert not empty.done()
    clients[1].lose()
    await turns_until(empty.done)


@in_memory()
async def test_without_connections_the_end_does_not_wait(gateway: MemoryGateway) -> None:
    await gateway.sessions.wait_empty()


@in_memory()
async def test_a_connection_that_is_lost_after_the_wait_has_ended_does_not_matter(gateway: MemoryGateway) -> None:
    client = gateway.connect()
    empty = asyncio.ensure_future(gateway.sessions.wait_empty())
    await asyncio.sleep(0)
    empty.cancel()
    await turns_until(empty.done)
    client.lose()
    assert (client.state, len(gateway.sessions)) == (LOST, 0)


@in_memory()
async def test_all_can_be_hung_up(gateway: MemoryGateway) -> None:
    served, idle = gateway.connect(), gateway.connect()
    served.receive(post())
    await gateway.asked()
    gateway.sessions.hang_up()
    assert [client.state for client in (served, idle)] == [ABORTED, ABORTED]
    assert [record.outcome for record in gateway.records] == [Outcome.CANCELLED]


@in_memory(settings=SessionSettings(max_connections=1, header_s=10, keepalive_s=75, flush_s=300))
async def test_a_limit_of_one_connection_is_a_limit_of_one(gateway: MemoryGateway) -> None:
    first = gateway.connect()
    first.receive(post())
    second = gateway.connect()
    assert not the_session(gateway, first).public_only
    assert the_session(gateway, second).public_only


@in_memory()
async def test_what_the_backend_works_on_says_how_large_its_body_is(gateway: MemoryGateway) -> None:
    body = b'{"max_tokens": 5}'
    gateway.connect().receive(post(body=body))
    await gateway.asked()
    (at_work,) = gateway.sessions.at_work()
    assert (at_work.slots, at_work.is_awaited, at_work.body_bytes) == (1, True, len(body))
    assert at_work.key_id == "alice"


@in_memory()
async def test_what_the_backend_works_on_says_when_its_answer_began(gateway: MemoryGateway) -> None:
    gateway.connect().receive(post())
    backend = await gateway.asked()
    gateway.link.advance(2)
    backend.receive(STREAM_HEAD)
    (at_work,) = gateway.sessions.at_work()
    assert (at_work.sent_s, at_work.begun_s, at_work.events) == (1000, 1002, 0)
