"""admission.py: when a request may go to the backend, and when its slot is free again."""

import pytest

from accounting.request_record import Outcome, Stage
from backend.left_stream import LeftStream, Shown, StreamEvents
from backend.readiness import DEAD, LOADING, READY
from core.errors import (
    DRAINING,
    QUEUE_TIMEOUT,
)
from policy.slot_demand import ONE_SLOT
from proxy.admission import Admission, Unfinished
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk
from support.gateway import CHAT, OPERATOR_KEY, get, post, request
from support.memory_gateway import WHOLE, MemoryGateway, Served, in_memory
from support.memory_transport import CLOSING, OPEN, turns_until

STREAM_BODY = b'{"stream": true}'
ADMIN = request(b"POST", b"/v1/chat/completions/control", b"{}")


# --- The queue ---


@in_memory()
async def test_a_request_waits_for_a_slot(gateway: MemoryGateway) -> None:
    busy = [gateway.queue.acquire("bob"), gateway.queue.acquire("bob")]
    served = gateway.serve(post())
    assert (served.request.stage, gateway.queue.queued) == (Stage.QUEUED, 1)
    gateway.link.advance(5)
    busy[0].release()
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE
    assert (served.record.queued_s, served.record.left_queue_s, gateway.queue.active) == (1000, 1005, 1)


@in_memory()
async def test_a_request_that_waits_too_long_is_refused(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(post())
    gateway.link.advance(60)
    assert (served.code, served.record.left_queue_s, served.returned) == ("queue_timeout", 1060, [True])
    assert (served.record.refusal, gateway.queue.active) == (QUEUE_TIMEOUT, 2)
    gateway.expect_end(served, Outcome.TIMED_OUT, 503)


@in_memory(slots=1, queue_size=1)
async def test_a_request_that_finds_the_queue_full_is_refused(gateway: MemoryGateway) -> None:
    gateway.queue.acquire("alice")
    waiting = gateway.serve(post())
    served = gateway.serve(post())
    assert (served.code, served.returned) == ("queue_full", [True])
    assert waiting.request.stage == Stage.QUEUED


@in_memory()
async def test_a_client_that_leaves_the_queue_leaves_its_place(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(post())
    served.transport.receive_eof()
    assert served.record.stage == Stage.QUEUED
    gateway.expect_end(served, Outcome.CANCELLED, 499)


@in_memory(alice={"parallel": 1})
async def test_a_keys_own_limit_makes_it_wait(gateway: MemoryGateway) -> None:
    first = gateway.serve(post())
    await gateway.asked()
    assert gateway.serve(post()).request.stage == Stage.QUEUED
    assert first.request.stage == Stage.AWAITING_RESPONSE


@in_memory()
async def test_a_route_without_a_slot_does_not_wait_for_one(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(get(b"/v1/models"))
    (await gateway.asked()).receive(answer())
    assert (served.status, served.record.left_queue_s) == (200, 0)


@in_memory()
async def test_a_drain_that_began_while_the_body_came_refuses_what_would_have_to_wait(gateway: MemoryGateway) -> None:
    gateway.fill_slots()
    served = gateway.serve(post(CHAT, b"hello")[:-2])
    gateway.lifecycle.drain()
    served.transport.receive(b"lo")
    assert (served.record.refusal, served.returned) == (DRAINING, [False])
    gateway.expect_end(served, Outcome.REFUSED, 503)


# --- The backend's state ---


@in_memory()
async def test_a_request_waits_for_the_model(gateway: MemoryGateway) -> None:
    gateway.readiness.state = LOADING
    served = gateway.serve(post())
    assert (served.request.stage, gateway.backends.asked) == (Stage.QUEUED, [])
    gateway.readiness.turn_ready()
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE


@pytest.mark.parametrize(
    ("state", "message"), [(LOADING, b"The model is loading."), (DEAD, b"The backend is down; it is being restarted.")]
)
@in_memory()
async def test_a_request_that_needs_no_slot_does_not_wait(gateway: MemoryGateway, state: str, message: bytes) -> None:
    gateway.readiness.state = state
    served = gateway.serve(post(b"/tokenize"))
    assert (served.code, message in served.sent) == ("loading", True)
    gateway.expect_end(served, Outcome.REFUSED, 503)


@pytest.mark.parametrize("state", [LOADING, DEAD])
@in_memory()
async def test_a_backend_that_has_just_become_ready_is_noticed(gateway: MemoryGateway, state: str) -> None:
    gateway.readiness.state, gateway.readiness.news = state, READY
    served = gateway.serve(post(b"/tokenize"))
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE
    gateway.readiness.state, gateway.readiness.news = LOADING, DEAD
    refused = gateway.serve(post(b"/tokenize"))
    await turns_until(lambda: refused.returned)
    assert refused.code == "loading"


@in_memory()
async def test_a_dead_backend_that_is_ready_by_now_is_asked(gateway: MemoryGateway) -> None:
    gateway.readiness.state, gateway.readiness.news = DEAD, READY
    served = gateway.serve(post())
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE


@in_memory()
async def test_a_dead_backend_that_loads_by_now_is_waited_for(gateway: MemoryGateway) -> None:
    gateway.readiness.state, gateway.readiness.news = DEAD, LOADING
    served = gateway.serve(post())
    await turns_until(lambda: gateway.readiness.pending)
    assert (served.request.stage, gateway.backends.asked) == (Stage.QUEUED, [])
    gateway.readiness.turn_ready()
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE


@in_memory()
async def test_a_dead_backend_that_is_still_dead_at_the_next_look_is_refused(gateway: MemoryGateway) -> None:
    gateway.readiness.state = gateway.readiness.news = DEAD
    served = gateway.serve(post())
    await turns_until(lambda: served.returned)
    assert b"The backend is down; it is being restarted." in served.sent
    assert gateway.queue.queued == 0
    gateway.expect_end(served, Outcome.REFUSED, 503)


@pytest.mark.parametrize("raw", [answer(HELLO), STREAM_HEAD + chunk(HELLO) + LAST_CHUNK], ids=["whole", "in pieces"])
@in_memory()
async def test_a_list_of_models_is_sent_again_while_the_model_loads(gateway: MemoryGateway, raw: bytes) -> None:
    gateway.serve(get(b"/v1/models"))
    (await gateway.asked()).receive(raw)
    gateway.readiness.state = LOADING
    gateway.link.advance(30)
    served = gateway.serve(get(b"/v1/models"))
    assert served.sent.endswith(b"\r\nAge: 30\r\n\r\n" + HELLO)
    assert (served.record.stage, served.record.backend_status, served.returned) == (Stage.DONE, 0, [True])


@in_memory()
async def test_a_model_that_takes_too_long_is_a_refusal(gateway: MemoryGateway) -> None:
    gateway.readiness.state = LOADING
    served = gateway.serve(post())
    gateway.link.advance(120)
    assert (served.code, gateway.readiness.pending[0].cancelled()) == ("loading", True)
    assert gateway.queue.active == 0
    gateway.expect_end(served, Outcome.REFUSED, 503)


@in_memory()
async def test_a_dead_backend_is_refused_at_once(gateway: MemoryGateway) -> None:
    gateway.readiness.state = DEAD
    served = gateway.serve(post())
    assert b"The backend is down; it is being restarted." in served.sent
    gateway.expect_end(served, Outcome.REFUSED, 503)


@pytest.mark.parametrize("state", [LOADING, DEAD])
@in_memory()
async def test_a_backend_that_refuses_the_connection_is_waited_for(gateway: MemoryGateway, state: str) -> None:
    gateway.backends.error, gateway.readiness.doubted = ConnectionRefusedError(), state
    served = gateway.serve(post())
    await turns_until(lambda: gateway.readiness.doubts)
    assert (served.request.stage, gateway.queue.active) == (Stage.QUEUED, 1)  # it keeps its slot
    gateway.backends.error = None
    gateway.readiness.turn_ready()
    (await gateway.asked()).receive(answer())
    assert served.sent == WHOLE
    assert gateway.queue.active == 0


@in_memory()
async def test_such_a_wait_counts_from_the_first_attempt(gateway: MemoryGateway) -> None:
    gateway.readiness.state = LOADING
    served = gateway.serve(post())
    gateway.link.advance(100)
    gateway.backends.error = ConnectionRefusedError()
    gateway.readiness.turn_ready()
    await turns_until(lambda: gateway.readiness.doubts)
    gateway.link.advance(19.75)
    assert served.sent == b""
    gateway.link.advance(0.25)
    assert served.code == "loading"


@in_memory()
async def test_such_a_wait_may_be_over_when_it_begins(gateway: MemoryGateway) -> None:
    gateway.readiness.state = LOADING
    served = gateway.serve(post())
    gateway.backends.error = ConnectionRefusedError()
    gateway.link.clock.advance(120)  # no tick has come since
    gateway.readiness.turn_ready()
    await turns_until(lambda: served.returned)
    assert served.code == "loading"


@in_memory()
async def test_a_connection_that_is_not_made_in_time_counts_as_refused(gateway: MemoryGateway) -> None:
    gateway.backends.hang = True
    served = gateway.serve(post())
    await turns_until(lambda: gateway.backends.asked)
    gateway.link.advance(10)
    await turns_until(lambda: gateway.readiness.doubts)
    assert served.request.stage == Stage.QUEUED


# --- Slots of requests that were cut short ---


@in_memory()
async def test_the_slot_of_a_client_that_left_is_released_once_the_backend_has_stopped(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    served.transport.receive_eof()
    assert (backend.wrote_eof, backend.state) == (True, OPEN)
    ((ticket, streamed),) = gateway.releases
    assert (streamed, gateway.queue.active) == (False, 1)
    (connection,) = gateway.releases.connections
    assert connection is not None
    assert not connection.ended
    backend.receive(WHOLE)  # which nobody gets
    backend.receive_eof()
    assert connection.ended
    ticket.release()
    assert gateway.queue.active == 0
    gateway.expect_end(served, Outcome.CANCELLED, 499)
    assert served.record.left.worked_until_s == served.record.ended_s  # the slot was released then, by this double


@in_memory()
async def test_a_request_that_generates_nothing_is_recorded_when_its_client_leaves(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(b"/v1/embeddings"))
    await gateway.asked()
    served.transport.receive_eof()
    gateway.expect_end(served, Outcome.CANCELLED, 499)


@in_memory(heartbeat_s=15)
async def test_a_stream_that_is_left_before_it_begins_is_recorded_when_the_backend_ends(gateway: MemoryGateway) -> None:
    served = gateway.serve(post(body=STREAM_BODY))
    backend = await gateway.asked()
    gateway.link.advance(16)
    assert served.request.stage is Stage.AWAITING_RESPONSE
    served.transport.receive_eof()
    assert gateway.records == []
    gateway.link.advance(30)
    backend.receive_eof()
    gateway.expect_end(served, Outcome.CANCELLED, 200)
    assert served.record.left.worked_until_s - served.record.ended_s == pytest.approx(30, abs=1)
    assert served.record.left.shown == Shown(has_all_in_events=False)  # this double has looked at no slot


@pytest.mark.parametrize(
    ("path", "body", "most_bytes", "may_stream"),
    [
        (CHAT, STREAM_BODY, 100, True),
        (CHAT, b'{"stream": false}', 100, False),
        (CHAT, b'{"stream": false}', 10, True),
        (b"/v1/audio/transcriptions", STREAM_BODY, 100, False),
    ],
)
def test_what_is_left_before_its_head_may_be_a_stream_unless_its_body_says_that_it_is_none(
    monkeypatch: pytest.MonkeyPatch, path: bytes, body: bytes, most_bytes: int, may_stream: bool
) -> None:
    """A large body is not looked into."""
    monkeypatch.setattr("proxy.incoming_body._SCANNED_AT_ONCE_BYTES", most_bytes)

    @in_memory()
    async def play(gateway: MemoryGateway) -> None:
        served = gateway.serve(post(path, body))
        await gateway.asked()
        served.transport.receive_eof()
        (given_up,) = gateway.releases.given_up
        assert given_up.may_stream is may_stream

    play()


@pytest.mark.parametrize(
    ("asked", "limit"), [(5, 5), ((1 << 31) - 1, (1 << 31) - 1), (1 << 31, None), ((1 << 32) + 5, None)]
)
def test_a_limit_that_the_backend_reads_as_another_number_is_none(asked: int, limit: int | None) -> None:
    @in_memory()
    async def play(gateway: MemoryGateway) -> None:
        body = b'{"max_tokens": %d}' % asked
        served = gateway.serve(post(body=body))
        await gateway.asked()
        served.transport.receive_eof()
        (given_up,) = gateway.releases.given_up
        assert (given_up.limit, given_up.body_bytes) == (limit, len(body))

    play()


@pytest.mark.parametrize(
    ("context", "path", "body", "limit"),
    [
        (None, b"/v1/completions", b'{"prompt": "a"}', None),
        (4096, b"/v1/completions", b'{"prompt": ["a", "b"], "n": 2}', 2 * 4096),
        (4096, b"/v1/completions", b'{"prompt": "a", "stream": true}', 4096),
        (4096, b"/v1/embeddings", b'{"input": ["a", "b", "c"]}', 3 * 4096),
        (4096, b"/v1/chat/completions/control", b"{}", None),
    ],
)
def test_the_prompts_of_a_client_that_left_have_no_more_tokens_than_their_slots(
    context: int | None, path: bytes, body: bytes, limit: int | None
) -> None:
    @in_memory()
    async def play(gateway: MemoryGateway) -> None:
        gateway.releases.context = context
        served = gateway.serve(post(path, body, key=OPERATOR_KEY))
        backend = await gateway.asked()
        served.transport.receive_eof()
        backend.receive_eof()
        gateway.expect_end(served, Outcome.CANCELLED, 499)
        assert served.record.left.prompt_limit == limit

    play()


@in_memory()
async def test_a_stream_is_known_to_stop_sooner(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    gateway.link.advance(2)
    backend.receive(STREAM_HEAD)
    gateway.link.advance(3)
    served.transport.receive_eof()
    assert [streamed for _, streamed in gateway.releases] == [True]
    assert [(stream.sent_s, stream.begun_s) for stream in gateway.releases.streams] == [(1000, 1002)]
    assert (served.record.stage, served.record.status) == (Stage.STREAMING, 200)
    assert gateway.records == []  # it may still generate
    backend.receive_eof()
    gateway.expect_end(served, Outcome.CANCELLED, 200)


@pytest.mark.parametrize(
    ("ahead_bytes", "is_reused", "is_certain"), [(2 << 20, True, False), (2 << 20, False, True), (100, True, True)]
)
def test_a_slot_shows_nothing_of_a_stream_far_ahead_if_others_have_had_slots_since(
    ahead_bytes: int, is_reused: bool, is_certain: bool
) -> None:
    """The stream may have ended long ago, and its slot have had another task."""

    @in_memory()
    async def play(gateway: MemoryGateway) -> None:
        served = gateway.serve(post())
        backend = await gateway.asked()
        backend.receive(STREAM_HEAD)
        if is_reused:
            gateway.queue.acquire("bob").release()
        served.transport.receive_eof()
        (stream,) = gateway.releases.streams
        stream.look([], StreamEvents(0), None, 1.0)
        backend.receive(chunk(b"data: " + b"x" * ahead_bytes + b"\n\n"))
        backend.receive_eof()
        gateway.expect_end(served, Outcome.CANCELLED, 200)
        assert (served.record.left.shown is not None) is is_certain

    play()


@in_memory()
async def test_a_slot_that_was_waited_for_is_released_in_the_same_way(gateway: MemoryGateway) -> None:
    busy = [gateway.queue.acquire("bob"), gateway.queue.acquire("bob")]
    served = gateway.serve(post())
    busy[0].release()
    await gateway.asked()
    served.transport.receive_eof()
    assert [ticket.running for ticket, _ in gateway.releases] == [True]


@in_memory()
async def test_a_stream_that_is_cut_is_recorded_as_truncated(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    backend.receive_eof()
    assert (len(gateway.releases), served.returned, served.transport.state) == (1, [False], CLOSING)
    gateway.expect_end(served, Outcome.TRUNCATED, 200)


@in_memory()
async def test_a_stream_that_falls_silent_is_recorded_as_timed_out(gateway: MemoryGateway) -> None:
    served = gateway.serve(post())
    backend = await gateway.asked()
    backend.receive(STREAM_HEAD)
    gateway.link.advance(300)
    assert gateway.records == []  # it may still generate
    backend.receive_eof()
    gateway.expect_end(served, Outcome.TIMED_OUT, 200)


@in_memory()
async def test_a_request_without_a_slot_releases_none(gateway: MemoryGateway) -> None:
    served = gateway.serve(get(b"/v1/models"))
    await gateway.asked()
    assert not served.request.backend_slots
    served.transport.receive_eof()
    assert gateway.releases == []


@in_memory()
async def test_a_client_that_leaves_while_its_connection_is_made_has_a_slot_no_more(gateway: MemoryGateway) -> None:
    gateway.backends.hang = True
    served = gateway.serve(post())
    served.transport.receive_eof()
    assert (gateway.queue.active, gateway.releases) == (0, [])
    gateway.expect_end(served, Outcome.CANCELLED, 499)


# --- What a request waits for besides a slot ---


@in_memory(isolates=True)
async def test_a_wait_for_a_slot_of_ones_own_is_no_work(gateway: MemoryGateway) -> None:
    """A client that leaves is charged for the time in which the backend worked on its request."""
    await gateway.isolation.prepare(5)
    stream = gateway.serve(post(CHAT, STREAM_BODY))
    first = await gateway.asked()
    first.receive(STREAM_HEAD)
    served = gateway.serve(post(CHAT, b"{}"))
    await turns_until(lambda: served.request.stage is Stage.QUEUED)
    gateway.link.advance(500)
    stream.transport.receive_eof()
    for ticket, _ in gateway.releases:
        ticket.release()
    await gateway.asked(2)
    gateway.link.advance(1)
    served.transport.receive_eof()
    assert (served.record.queued_s, served.record.left_queue_s, served.record.ended_s) == (1000, 1500, 1501)
    assert gateway.releases.given_up[-1].age_s == 1


async def suspects_at_work(gateway: MemoryGateway) -> tuple[Served, Served]:
    """Return a suspect that is at work, and one that waits for it."""
    await gateway.die(b'{"a": 1}', b'{"a": 2}')
    one = gateway.serve(post(CHAT, b'{"a": 1}'))
    await gateway.asked(3)
    two = gateway.serve(post(CHAT, b'{"a": 2}'))
    await turns_until(lambda: two.request.stage is Stage.QUEUED)
    return one, two


@in_memory()
async def test_a_suspect_whose_client_leaves_lets_the_next_one_run(gateway: MemoryGateway) -> None:
    one, two = await suspects_at_work(gateway)
    gateway.link.advance(7)
    one.transport.receive_eof()
    await gateway.asked(4)
    assert two.request.stage is Stage.AWAITING_RESPONSE
    assert two.record.left_queue_s == 1007
    gateway.suspects.must_run_alone(one.request.suspect())  # it has not been cleared


@in_memory()
async def test_a_suspect_that_was_found_out_while_it_waited_is_held_back(gateway: MemoryGateway) -> None:
    one, two = await suspects_at_work(gateway)
    gateway.at_work = [two.request.suspect()]
    gateway.suspects.note_cut()
    gateway.suspects.note_down()
    one.transport.receive_eof()
    await turns_until(lambda: bool(two.returned))
    assert two.code == "request_held_back"
    assert len(gateway.backends.transports) == 3


@in_memory()
async def test_what_takes_no_slot_waits_for_none(gateway: MemoryGateway) -> None:
    """The end of a stream's connection is all that it is recorded after."""
    served = gateway.serve(post(b"/tokenize"))
    await gateway.asked()
    caller = gateway.services.access.authenticate(served.record.prepared)
    assert caller is not None
    ended: list[Shown] = []
    stream = LeftStream(lambda: 0, ended.append)
    admission = Admission(gateway.services, served.client, served.record, caller, ONE_SLOT)
    admission.release_unfinished(Unfinished(None, 0, streamed=True, on_generated=None, stream=stream))
    assert ended == []
    stream.note_end()
    assert ended == [Shown(False)]
    assert gateway.releases == []
