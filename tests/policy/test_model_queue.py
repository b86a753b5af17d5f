"""model_queue.py: the limits that the queues of several models share."""

import asyncio
from collections.abc import Callable

import pytest

from core.errors import MODEL_LOAD_FAILED, QUEUE_FULL, GatewayError
from policy.fair_queue import Ticket
from policy.model_queue import ModelQueue, SharedLimits
from support.clock import Clock


class Two:
    """Two models' queues, both loaded, with two slots each."""

    def __init__(self, max_waiting: int = 0, *, slots: int = 2) -> None:
        self.clock = Clock()
        self.changes = 0
        self.limits = SharedLimits(max_waiting, self.count)
        self.chat, self.code = ModelQueue(self.limits, self.clock), ModelQueue(self.limits, self.clock)
        for queue in (self.chat, self.code):
            queue.resize(slots)
            queue.resume()

    def count(self) -> None:
        self.changes += 1


def with_two(*, max_waiting: int = 0, slots: int = 2) -> Callable[[Callable[[Two], None]], Callable[[], None]]:
    def decorate(test: Callable[[Two], None]) -> Callable[[], None]:
        def run() -> None:
            async def call() -> None:
                test(Two(max_waiting, slots=slots))

            asyncio.run(call())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def refusal(ticket: Ticket) -> GatewayError:
    assert ticket.waiting is not None
    error = ticket.waiting.exception()
    assert isinstance(error, GatewayError)
    return error


@with_two()
def test_a_new_queue_is_paused(two: Two) -> None:
    queue = ModelQueue(SharedLimits(0), two.clock)
    waiting = queue.acquire("alice")
    assert not waiting.running
    queue.resume()
    assert waiting.running


@with_two()
def test_parallel_counts_over_all_models(two: Two) -> None:
    running = two.chat.acquire("alice", 1)
    waiting, other = two.code.acquire("alice", 1), two.code.acquire("bob", 1)
    assert (waiting.running, other.running) == (False, True)
    assert two.code.oldest_s() is None
    running.release()
    assert waiting.running
    assert two.limits.running("alice") == 1
    waiting.release()
    assert two.limits.running("alice") == 0


@with_two()
def test_a_slot_without_a_ticket_counts_over_all_models(two: Two) -> None:
    assert two.chat.try_acquire("alice", 1, 0)
    assert not two.code.try_acquire("alice", 1, 0)
    waiting = two.code.acquire("alice", 1)
    two.chat.release_one("alice")
    assert waiting.running
    assert two.limits.running("alice") == 1


@with_two()
def test_several_slots_count_as_many_and_a_batch_as_one(two: Two) -> None:
    batch = two.chat.acquire("alice", 2, slots=2, as_one=True)
    assert two.limits.running("alice") == 1
    choices = two.code.acquire("alice", 2, slots=2)
    assert not choices.running
    batch.release()
    assert choices.running
    assert two.limits.running("alice") == 2


@with_two(slots=4)
def test_a_request_that_cannot_fit_beside_those_of_its_key_waits(two: Two) -> None:
    two.chat.acquire("alice", None, slots=3)
    large = two.chat.acquire("alice", None, slots=3)
    assert (large.running, two.chat.oldest_s()) == (False, None)


@with_two()
def test_the_first_wait_counts_with_its_priority(two: Two) -> None:
    two.code.pause()
    two.code.acquire("alice")
    two.clock.advance(10)
    two.code.acquire("bob", None, 1)
    assert two.code.oldest_s() == 1000
    assert two.code.oldest_s(30.0) == 980
    assert two.chat.oldest_s() is None


@with_two(max_waiting=2)
def test_the_limit_on_waiting_requests_is_for_all_models(two: Two) -> None:
    for queue in (two.chat, two.code):
        queue.pause()
    first, _ = two.chat.acquire("alice"), two.code.acquire("alice")
    with pytest.raises(GatewayError) as full:
        two.code.acquire("alice")
    assert full.value.kind is QUEUE_FULL
    assert "2 requests wait" in full.value.message
    two.code.acquire("bob")
    assert refusal(first).kind is QUEUE_FULL
    assert two.limits.queued == 2


@with_two()
def test_all_that_wait_can_be_refused(two: Two) -> None:
    two.chat.pause()
    waiting, left = two.chat.acquire("alice"), two.chat.acquire("bob")
    assert left.waiting is not None
    left.waiting.cancel()
    two.chat.refuse_all(lambda: GatewayError(MODEL_LOAD_FAILED))
    assert refusal(waiting).kind is MODEL_LOAD_FAILED
    assert two.chat.queued == 0


@with_two()
def test_changes_are_reported(two: Two) -> None:
    running = two.chat.acquire("alice")
    assert two.changes == 0
    two.chat.acquire("alice")
    waiting = two.chat.acquire("alice")
    assert two.changes == 1
    waiting.release()
    assert two.changes == 2
    two.clock.advance(5)
    running.release()
    assert two.changes == 3
    assert two.chat.last_work_s == 1000
