"""The backend loads, dies, restarts and refuses: what is held, what is refused, and what /health reports."""

import pytest

from support.backend import HELLO, STREAM_HEAD, answer, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, until
from support.rawclient import RawClient


async def held(stack: Stack, number: int) -> list[RawClient]:
    """Return so many clients, each with a request that waits for the backend."""
    clients = [await stack.client() for _ in range(number)]
    for each, client in enumerate(clients):
        client.send(post(CHAT, b"%d" % each))
    await until(lambda: stack.app.queue.queued == number)
    return clients


async def health(stack: Stack) -> tuple[int, str]:
    response = await stack.ask(get(b"/health", key=None))
    return response.status, response.json["state"]


async def look(stack: Stack) -> None:
    """Let the gateway look at the backend's state again; the state must be `ready` then."""
    stack.app.readiness.doubt()
    assert not stack.app.readiness.ready
    await until(lambda: stack.app.readiness.ready, "the next look")


# --- The supervisor's state file ---


@scenario(STATE="loading")
async def test_requests_are_held_while_the_model_loads_and_none_is_lost(stack: Stack) -> None:
    clients = await held(stack, 100)
    assert not stack.backend.connections
    await stack.turn("ready")
    for client in clients:
        assert (await client.response()).body == HELLO
    assert sorted(int(call.body) for call in stack.backend.calls) == list(range(100))


@scenario(STATE="loading", MAX_CONCURRENT_REQUESTS="auto")
async def test_a_backend_that_refuses_the_gateways_key_is_not_ready(stack: Stack) -> None:
    stack.backend.own[b"/props"] = answer(b'{"error": {"message": "Invalid API Key"}}', status=b"401 Unauthorized")
    stack.set_state("ready")
    await until(lambda: stack.app.readiness.state == "dead")
    response = await stack.ask(post())
    assert (response.status, response.code) == (503, "loading")
    assert b"BACKEND_API_KEY is not its --api-key" in response.body
    for looks in (2, 3):
        stack.app.readiness.doubt()
        await until(lambda looks=looks: stack.backend.probes.count(b"/props") >= looks)  # type: ignore[misc]
    assert len([line for line in stack.logged() if line.startswith("nothing is served: llama-server refuses")]) == 1
    stack.backend.own[b"/props"] = answer(b'{"total_slots": 3}')
    await look(stack)
    assert (await stack.ask(post())).body == HELLO


@scenario(STATE="loading", COLD_START_WAIT="300")
async def test_requests_are_held_for_a_limited_time(stack: Stack) -> None:
    client, other = await held(stack, 2)
    stack.advance(299)
    late = await stack.client()
    late.send(post())
    await until(lambda: stack.app.queue.queued == 3)
    stack.advance(1)
    for each in (client, other):
        response = await each.response()
        assert (response.status, response.code, response.field(b"retry-after")) == (503, "loading", b"10")
    await stack.turn("ready")
    assert (await late.response()).status == 200
    assert len(stack.backend.calls) == 1


@scenario(STATE="loading", COLD_START_WAIT="0")
async def test_holding_can_be_turned_off(stack: Stack) -> None:
    response = await stack.ask(post())
    assert (response.status, response.code) == (503, "loading")


@scenario(STATE="loading", MAX_QUEUE_SIZE="2")
async def test_the_queue_is_bounded_while_the_model_loads(stack: Stack) -> None:
    clients = await held(stack, 2)
    response = await stack.ask(post())
    assert (response.status, response.code) == (503, "queue_full")
    assert int(response.field(b"retry-after")) >= 1
    await stack.turn("ready")
    for client in clients:
        assert (await client.response()).status == 200
    assert stack.counted("queue_rejections") == 1


@scenario()
async def test_health_reports_the_state_without_a_backend_request(stack: Stack) -> None:
    assert await health(stack) == (200, "ready")
    for state in ("loading", "draining", "ready"):
        await stack.turn(state)
        assert await health(stack) == (200 if state == "ready" else 503, state)
    for _ in range(50):
        await health(stack)
    assert stack.backend.connections == []


@scenario()
async def test_health_reports_a_dead_backend_at_once(stack: Stack) -> None:
    await stack.turn("dead")
    assert await health(stack) == (503, "dead")
    response = await stack.ask(post())
    assert (response.status, response.code) == (503, "loading")
    assert int(response.field(b"retry-after")) >= 1
    assert (await stack.ask(get(b"/ping", key=None))).status == 200
    await stack.turn("ready")
    assert (await stack.ask(post())).status == 200


@scenario(STATE="loading")
async def test_a_request_that_is_held_when_the_backend_dies_waits_for_its_restart(stack: Stack) -> None:
    clients = await held(stack, 3)
    await stack.turn("dead")
    await stack.turn("loading")
    await stack.turn("ready")
    for client in clients:
        assert (await client.response()).status == 200


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "confused"}', '{"state": 1}'])
@scenario()
async def test_a_state_file_without_a_state_changes_nothing(stack: Stack, text: str) -> None:
    stack.state_file.write_text(text)
    await look(stack)
    assert (await stack.ask(post())).status == 200
    stack.state_file.unlink()
    await look(stack)
    assert (await stack.ask(post())).status == 200


@scenario(STATE="loading")
async def test_a_client_that_leaves_while_the_model_loads_is_forgotten(stack: Stack) -> None:
    clients = [await stack.client() for _ in range(3)]
    for client in clients:
        client.send(post())
    await until(lambda: stack.app.queue.queued == 3)
    for client in clients[:2]:
        client.close()
    await until(lambda: stack.app.queue.queued == 1)
    await until(lambda: stack.app.readiness.waiting == 1)
    await stack.turn("ready")
    assert (await clients[2].response()).status == 200


# --- A connection that is refused ---


@scenario()
async def test_a_refused_connection_means_loading_and_loses_no_request(stack: Stack) -> None:
    stack.backend.refuse()
    clients = [await stack.client() for _ in range(20)]
    for number, client in enumerate(clients):
        client.send(post(CHAT, b"%d" % number))
    await until(lambda: stack.app.readiness.state == "loading")
    stack.set_state("loading")  # so that the state stays until /health is asked
    assert await health(stack) == (503, "loading")
    stack.set_state("ready")
    await stack.backend.listen()
    for client in clients:
        assert (await client.response()).body == HELLO
    assert sorted(int(call.body) for call in stack.backend.calls) == list(range(20))


@scenario(COLD_START_WAIT="60")
async def test_a_request_waits_for_a_limited_time_if_connections_are_refused(stack: Stack) -> None:
    stack.backend.refuse()
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.readiness.state == "loading")
    stack.advance(60)
    response = await client.response()
    assert (response.status, response.code) == (503, "loading")


@scenario()
async def test_connections_of_the_old_backend_are_not_used_for_the_new_one(stack: Stack) -> None:
    assert (await stack.ask(post())).status == 200
    await stack.turn("loading")
    await stack.backend.used[0].gone.wait()
    await stack.turn("ready")
    assert (await stack.ask(post())).status == 200
    assert len(stack.backend.used) == 2


@scenario()
async def test_a_request_that_was_sent_is_not_sent_again(stack: Stack) -> None:
    """The backend may have done the work. Only a request that no connection took is sent again."""
    stack.backend.script(send(b"HTTP/1.1 2"), stall())
    client = await stack.client()
    client.send(post())
    call = await stack.backend.call()
    call.connection.transport.abort()
    assert (await client.response()).status == 502
    assert len(stack.backend.calls) == 1


# --- Without a state file: one probe in the background ---


@scenario(STATE_FILE="unset", COLD_START_WAIT="60", HEALTH_TIMEOUT="60", MAX_CONCURRENT_REQUESTS="auto")
async def test_the_probe_finds_the_backend_ready_with_its_slots_and_then_dead(stack: Stack) -> None:
    stack.backend.own[b"/health"] = answer(b"{}", b"503 Service Unavailable")
    await until(lambda: stack.backend.probes)
    stack.app.readiness.doubt()
    assert await health(stack) == (503, "loading")
    stack.backend.own |= {b"/health": answer(b"{}"), b"/props": answer(b'{"total_slots": 3}')}
    await look(stack)
    assert stack.app.queue.slots == 3
    probes = len(stack.backend.probes)
    for _ in range(50):
        assert await health(stack) == (200, "ready")
        assert (await stack.ask(post())).status == 200
    assert len(stack.backend.probes) < probes + 50  # they come with time, not with requests
    for connection in stack.backend.connections:
        connection.transport.abort()
    stack.backend.refuse()
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.readiness.state == "loading")
    stack.app.readiness.doubt()  # look at once
    stack.advance(61)
    assert (await client.response()).code == "loading"
    await until(lambda: stack.app.readiness.state == "dead")
    assert await health(stack) == (503, "dead")
    stack.backend.own[b"/props"] = answer(b'{"total_slots": 5}')
    await stack.backend.listen()
    await until(lambda: stack.app.readiness.ready)
    assert stack.app.queue.slots == 5
    assert (await stack.ask(post())).status == 200


@pytest.mark.parametrize("loading", [answer(b"{}", b"503 Service Unavailable"), b"nonsense\r\n\r\n", b""])
@scenario(STATE_FILE="unset", HEALTH_TIMEOUT="0.05")
async def test_the_probe_repeats_until_the_response_is_200(stack: Stack, loading: bytes) -> None:
    """A response that does not arrive within HEALTH_TIMEOUT does not count."""
    stack.backend.own[b"/health"] = loading
    asked = len(stack.backend.probes)
    stack.app.readiness.doubt()
    await until(lambda: len(stack.backend.probes) > asked + 1)
    assert stack.app.readiness.state == "loading"
    stack.backend.own[b"/health"] = answer(b"{}")
    stack.app.readiness.doubt()
    await until(lambda: stack.app.readiness.ready)


@pytest.mark.parametrize(
    ("props", "slots"),
    [
        (answer(b'{"total_slots": 4}'), 4),
        (answer(b'{"total_slots": 0}'), 1),
        (answer(b'{"total_slots": true}'), 1),
        (answer(b'{"total_slots": "4"}'), 1),
        (answer(b"[4]"), 1),
        (answer(b"no json"), 1),
        (answer(b"{}", b"404 Not Found"), 1),
        (answer(b"[" * 100000), 1),
    ],
)
@scenario(STATE="loading", MAX_CONCURRENT_REQUESTS="auto")
async def test_the_number_of_slots_is_read_before_the_first_request(stack: Stack, props: bytes, slots: int) -> None:
    stack.backend.own[b"/props"] = props
    clients = await held(stack, 6)
    for _ in clients:
        stack.backend.script(stall())
    await stack.turn("ready")
    await stack.backend.call(slots - 1)
    assert (stack.app.queue.slots, stack.app.queue.active, stack.app.queue.queued) == (
        slots,
        slots,
        6 - slots,
    )


@scenario(STATE="loading", MAX_CONCURRENT_REQUESTS="auto", HEALTH_TIMEOUT="0.1")
async def test_the_number_of_slots_is_asked_for_again_if_the_backend_is_slow(stack: Stack) -> None:
    stack.backend.own[b"/props"] = b""
    stack.set_state("ready")
    await until(lambda: len(stack.backend.probes) > 1)
    assert await health(stack) == (503, "loading")
    stack.backend.own[b"/props"] = answer(b'{"total_slots": 8}')
    await until(lambda: stack.app.readiness.ready)
    assert stack.app.queue.slots == 8


# --- A slot is free when the backend has released it ---


def busy(number: int) -> bytes:
    slots = [b'{"is_processing": true}'] * number + [b'{"is_processing": false}']
    return answer(b"[" + b", ".join(slots) + b"]")


@pytest.mark.parametrize("begun", [b"", STREAM_HEAD], ids=["silent", "streaming"])
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_a_cancelled_requests_slot_is_held_until_the_backend_releases_it(stack: Stack, begun: bytes) -> None:
    stack.backend.own[b"/slots"] = busy(1)
    stack.backend.script(send(begun), stall())
    client, other = await stack.client(), await stack.client()
    client.send(post())
    call = await stack.backend.call()
    if begun:
        await client.take_through(b"\r\n\r\n")
    other.send(post(CHAT, b"next"))
    await until(lambda: stack.app.queue.queued == 1)
    client.reset()
    await call.gone.wait()
    await until(lambda: b"/slots" in stack.backend.probes)
    assert (stack.app.queue.active, len(stack.backend.calls)) == (1, 1)
    stack.backend.own[b"/slots"] = busy(0)
    assert (await other.response()).status == 200


@scenario(MAX_CONCURRENT_REQUESTS="2")
async def test_a_slot_that_another_request_uses_does_not_count_as_the_cancelled_ones(stack: Stack) -> None:
    """The one busy slot is that of the request that continues. The slot of the cancelled one is free."""
    stack.backend.own[b"/slots"] = busy(1)
    clients = [await stack.client() for _ in range(3)]
    for client in clients[:2]:
        stack.backend.script(send(STREAM_HEAD), stall())
        client.send(post())
        await client.take_through(b"\r\n\r\n")
    clients[2].send(post(CHAT, b"next"))
    await until(lambda: stack.app.queue.queued == 1)
    clients[0].reset()
    assert (await clients[2].response()).status == 200
    assert stack.backend.own[b"/slots"] == busy(1)


@pytest.mark.parametrize(
    "slots", [answer(b"{}"), answer(b"[1]"), answer(b"", b"501 Not Implemented"), b"nonsense\r\n\r\n"]
)
@scenario(MAX_CONCURRENT_REQUESTS="1", HEALTH_TIMEOUT="60")
async def test_slots_is_requested_once_if_it_reports_nothing(stack: Stack, slots: bytes) -> None:
    stack.backend.own[b"/slots"] = slots
    for number in range(3):
        stack.backend.script(send(STREAM_HEAD), stall())
        client = await stack.client()
        client.send(post(CHAT, b"%d" % number))
        await client.take_through(b"\r\n\r\n")
        client.reset()
    assert (await stack.ask(post())).status == 200
    assert stack.backend.probes.count(b"/slots") == 1
