"""Readiness: its two sources, its waiters, and the loop that looks. There is no socket: sources are scripted."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backend.readiness import DEAD, DRAINING, LOADING, READY, Probe, Readiness, Source, StateFile
from core.errors import BACKEND_UNAVAILABLE, GatewayError
from support.clock import Clock

FAR_AWAY_S = 3600.0


class Script:
    """A source whose state the test sets."""

    def __init__(self, state: str, pause_s: float = FAR_AWAY_S) -> None:
        self.state = state
        self.looks = 0
        self._last = ""
        self._looked = asyncio.Event()
        self._pause_s = pause_s

    async def look(self) -> str:
        self.looks += 1
        self._looked.set()
        self._last = self.state
        return self.state

    def has_changed(self) -> bool:
        return self.state != self._last

    def pause_s(self, state: str) -> float:
        return self._pause_s

    async def await_looks(self, count: int) -> None:
        """Wait until there have been so many looks in all."""
        while self.looks < count:
            self._looked.clear()
            await self._looked.wait()


class Case:
    """A Readiness over a source, and the calls that it has made in order."""

    def __init__(self, source: Source) -> None:
        self.calls: list[str] = []
        self.readiness = Readiness(source, self._prepare, self.calls.append)

    async def _prepare(self) -> None:
        assert not self.readiness.ready
        self.calls.append("prepare")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Let the loop look for the length of the block."""
        task = asyncio.ensure_future(self.readiness.watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 30)

    asyncio.run(bounded())


# Sources


def test_the_state_file_is_read_at_each_look_and_the_state_stays_without_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "state.json"
        source = StateFile(path)
        assert await source.look() == LOADING
        for state in (READY, DRAINING, DEAD, READY):
            new = tmp_path / f"{state}.json"
            new.write_text(json.dumps({"state": state}))
            new.replace(path)
            assert await source.look() == state
        path.unlink()
        assert await source.look() == READY
        assert source.pause_s(READY) == source.pause_s(LOADING) == 0.25

    run(scenario)


def test_the_state_file_has_changed_if_it_is_another_one_than_at_the_last_look(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "state.json"
        source = StateFile(path)
        assert not source.has_changed()
        path.write_text(json.dumps({"state": READY}))
        assert source.has_changed()
        await source.look()
        assert not source.has_changed()

    run(scenario)


def test_only_a_look_shows_whether_a_backend_that_is_probed_has_changed() -> None:
    assert not probe([], Clock()).has_changed()


def probe(responses: list[int | None], clock: Clock) -> Probe:
    """A probe that is dead after 60 s without a response. A response is a status; None: there is none."""

    async def ask() -> int:
        status = responses.pop(0)
        if status is None:
            raise GatewayError(BACKEND_UNAVAILABLE)
        return status

    return Probe(ask, 60, clock)


def test_the_probe_is_ready_at_200_and_loading_at_any_other_status() -> None:
    async def scenario() -> None:
        source = probe([503, 200, 404], Clock())
        assert [await source.look() for _ in range(3)] == [LOADING, READY, LOADING]

    run(scenario)


def test_the_probe_is_dead_once_its_time_has_passed_without_a_response() -> None:
    async def scenario() -> None:
        clock = Clock()
        source = probe([None, None, 503, None, None, 200], clock)
        clock.advance(60)
        assert await source.look() == LOADING
        clock.advance(0.1)
        assert await source.look() == DEAD
        assert await source.look() == LOADING
        clock.advance(60)
        assert await source.look() == LOADING
        clock.advance(0.1)
        assert await source.look() == DEAD
        assert await source.look() == READY

    run(scenario)


def test_the_probe_looks_less_often_once_it_is_ready() -> None:
    source = probe([], Clock())
    assert [source.pause_s(state) for state in (LOADING, DEAD, READY)] == [1.0, 1.0, 5.0]


# The state


@pytest.mark.parametrize("state", [DRAINING, DEAD])
def test_a_new_state_is_reported_once(state: str) -> None:
    async def scenario() -> None:
        source = Script(state, pause_s=0)
        case = Case(source)
        async with case.watching():
            await source.await_looks(3)
        assert (case.readiness.state, case.readiness.ready) == (state, False)
        assert case.calls == [state]

    run(scenario)


def test_the_backend_is_prepared_before_it_is_called_ready_and_not_again_while_it_is() -> None:
    async def scenario() -> None:
        source = Script(READY, pause_s=0)
        case = Case(source)
        async with case.watching():
            await case.readiness.when_ready()
            await source.await_looks(source.looks + 2)
        assert case.calls == ["prepare", READY]

    run(scenario)


def test_a_preparation_that_fails_ends_the_loop_before_ready() -> None:
    async def scenario() -> None:
        async def prepare() -> None:
            raise ZeroDivisionError

        readiness = Readiness(Script(READY), prepare, lambda state: None)
        with pytest.raises(ZeroDivisionError):
            await readiness.watch()
        assert readiness.state == LOADING

    run(scenario)


# Waiters


def test_all_waiters_are_done_at_ready_and_a_later_one_at_once() -> None:
    async def scenario() -> None:
        case = Case(Script(READY))
        waiters = [case.readiness.when_ready() for _ in range(3)]
        assert not any(waiter.done() for waiter in waiters)
        async with case.watching():
            await asyncio.wait(waiters)
        assert case.readiness.when_ready().done()

    run(scenario)


def test_a_cancelled_waiter_disturbs_no_other_and_is_not_kept() -> None:
    async def scenario() -> None:
        case = Case(Script(READY))
        first, second = case.readiness.when_ready(), case.readiness.when_ready()
        kept = weakref.ref(first)
        first.cancel()
        await asyncio.wait([first])
        del first
        gc.collect()
        assert kept() is None
        async with case.watching():
            await second

    run(scenario)


def test_a_waiter_that_is_cancelled_in_the_moment_of_ready_is_left_alone() -> None:
    async def scenario() -> None:
        waiters: list[asyncio.Future[None]] = []

        async def prepare() -> None:
            waiters[0].cancel()  # its callback, which removes it, comes only in the loop's next round

        readiness = Readiness(Script(READY), prepare, lambda state: None)
        waiters += [readiness.when_ready(), readiness.when_ready()]
        watching = asyncio.ensure_future(readiness.watch())
        await waiters[1]
        assert waiters[0].cancelled()
        watching.cancel()
        await asyncio.wait([watching])

    run(scenario)


# Doubt


def test_a_doubt_ends_ready_until_the_next_look_which_comes_before_its_time() -> None:
    async def scenario() -> None:
        source = Script(READY)
        case = Case(source)
        async with case.watching():
            await case.readiness.when_ready()
            case.readiness.doubt()
            assert case.readiness.state == LOADING
            await case.readiness.when_ready()
        assert source.looks == 2
        assert case.calls == ["prepare", READY, LOADING, "prepare", READY]

    run(scenario)


def test_a_doubt_changes_no_state_but_ready() -> None:
    async def scenario() -> None:
        source = Script(DEAD)
        case = Case(source)
        async with case.watching():
            await source.await_looks(1)
            case.readiness.doubt()
            assert not case.readiness.ready
            await source.await_looks(2)
        assert case.calls == [DEAD]

    run(scenario)


# What has changed since the last look


def test_a_change_is_found_without_waiting_for_the_next_look() -> None:
    async def scenario() -> None:
        source = Script(LOADING)
        case = Case(source)
        async with case.watching():
            await source.await_looks(1)
            assert not case.readiness.has_news()
            await case.readiness.catch_up()
            source.state = READY
            assert case.readiness.has_news()
            await case.readiness.catch_up()
            assert (case.readiness.ready, case.readiness.has_news(), source.looks) == (True, False, 2)
            assert case.calls == ["prepare", READY]

    run(scenario)


def test_those_that_come_while_the_backend_is_prepared_wait_for_that() -> None:
    async def scenario() -> None:
        source, go_on = Script(READY), asyncio.Event()

        async def prepare() -> None:
            await go_on.wait()

        readiness = Readiness(source, prepare, lambda state: None)
        task = asyncio.ensure_future(readiness.watch())
        await source.await_looks(1)
        assert (readiness.ready, readiness.has_news()) == (False, True)
        go_on.set()
        await readiness.catch_up()
        assert (readiness.ready, readiness.has_news(), source.looks) == (True, False, 1)
        task.cancel()

    run(scenario)


def test_a_doubt_is_not_a_change() -> None:
    async def scenario() -> None:
        source = Script(READY)
        case = Case(source)
        async with case.watching():
            await case.readiness.when_ready()
            case.readiness.doubt()
            assert (case.readiness.ready, case.readiness.has_news()) == (False, False)
            await source.await_looks(2)

    run(scenario)
