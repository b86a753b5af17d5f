"""When the slot of a cancelled request is free: as /slots tells, and in time whatever it tells."""

import asyncio
import json
from collections.abc import Callable

import pytest

import turns
from admission import Gate, Ticket
from errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError, Kind
from slots import LettingGo
from support.clock import Clock
from support.gateway import until
from support.hurry import HurriedLoop, HurriedSelector
from turns import Outbox


class Backend:
    """Answers GET /slots as it is told: so many busy slots, no answer for a reason, or a page of another kind."""

    def __init__(self, *answers: int | Kind | tuple[int, bytes]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        assert target == b"/slots"
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Kind):
            raise GatewayError(answer)
        if isinstance(answer, tuple):
            return answer
        return 200, json.dumps([{"is_processing": True}] * answer + [{"is_processing": False}]).encode()


class Place:
    """A gate with cancelled requests, whose slots are let go."""

    def __init__(self, backend: Backend, let_go_s: float = 3600.0) -> None:
        self.gate = Gate(8, 0, Clock())
        self.letting_go = LettingGo(backend.fetch, lambda: 0, let_go_s)

    def cancel(self) -> Ticket:
        ticket = self.gate.apply("alice")
        self.letting_go.release(ticket, streamed=True)
        return ticket


def run(play: Callable[[], object]) -> None:
    turns.run(play(), HurriedLoop(HurriedSelector(Outbox())))


@pytest.mark.parametrize("kind", [BACKEND_TIMEOUT, BACKEND_UNAVAILABLE])
def test_a_backend_too_busy_to_tell_is_asked_again(kind: Kind) -> None:
    """During a long prompt /slots takes its time; what nobody wants any more may well be still at work."""

    async def play() -> None:
        backend = Backend(kind, kind, 1, 0)
        place = Place(backend)
        place.cancel()
        await until(lambda: backend.asked == 3)
        assert place.gate.active == 1
        await until(lambda: place.gate.active == 0)
        place.cancel()
        await until(lambda: place.gate.active == 0)
        assert backend.asked == 5  # it was not given up

    run(play)


@pytest.mark.parametrize("odd", [(501, b"[]"), (200, b"{}"), (200, b"[1]"), (200, b"["), BACKEND_MALFORMED])
def test_a_backend_that_does_not_tell_is_asked_once(odd: Kind | tuple[int, bytes]) -> None:
    async def play() -> None:
        backend = Backend(odd)
        place = Place(backend)
        place.cancel()
        await until(lambda: place.gate.active == 0)
        place.cancel()
        assert place.gate.active == 0
        assert backend.asked == 1
        place.letting_go.forget()
        place.cancel()
        await until(lambda: place.gate.active == 0)
        assert backend.asked == 2

    run(play)


def test_each_is_held_for_as_long_as_the_bound_allows_and_no_longer() -> None:
    async def play() -> None:
        backend = Backend(8)
        place = Place(backend, let_go_s=0.5)
        clock = asyncio.get_running_loop().time
        place.cancel()
        await until(lambda: backend.asked == 1)
        second_s = clock()
        place.cancel()
        await until(lambda: place.gate.active == 1)
        await until(lambda: place.gate.active == 0)
        assert clock() - second_s >= 0.5

    run(play)


def test_the_end_releases_all() -> None:
    async def play() -> None:
        place = Place(Backend(8))
        place.cancel()
        await place.letting_go.close()
        assert place.gate.active == 0

    run(play)
