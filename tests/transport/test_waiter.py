"""waiter.py: one result or one error, and what it resumes."""

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest

from core.errors import PeerGone
from support.memory_transport import outcome
from transport.waiter import Waiter


def test_a_result_resumes_what_waits_at_once() -> None:
    waiter: Waiter[str] = Waiter()
    resumed: list[bool] = []
    waiter.on_done = lambda: resumed.append(waiter.done)
    waiter.set_result("result")
    assert resumed == [True]
    assert waiter.result() == "result"


def test_an_error_resumes_what_waits_and_is_raised() -> None:
    waiter: Waiter[str] = Waiter()
    resumed: list[bool] = []
    waiter.on_done = lambda: resumed.append(waiter.done)
    waiter.set_exception(ValueError("broken"))
    assert resumed == [True]
    with pytest.raises(ValueError, match=r"^broken$"):
        waiter.result()


def test_a_result_may_come_before_anything_waits() -> None:
    waiter: Waiter[str] = Waiter()
    assert not waiter.done
    waiter.set_result("early")
    assert (waiter.done, waiter.result()) == (True, "early")


@pytest.mark.parametrize(
    "again", [lambda waiter: waiter.set_result(2), lambda waiter: waiter.set_exception(KeyError())]
)
@pytest.mark.parametrize(
    ("first", "kept"),
    [(lambda waiter: waiter.set_result(1), 1), (lambda waiter: waiter.set_exception(OSError()), OSError)],
)
def test_what_comes_second_is_ignored(
    first: Callable[[Waiter[int]], None], kept: object, again: Callable[[Waiter[int]], None]
) -> None:
    waiter: Waiter[int] = Waiter()
    resumed: list[None] = []
    waiter.on_done = lambda: resumed.append(None)
    first(waiter)
    again(waiter)
    assert len(resumed) == 1
    assert outcome(waiter) == kept


class Broken(Exception):
    pass


def test_a_raised_error_is_not_kept() -> None:
    """Its traceback holds frames that hold the connection: it would be a reference cycle."""
    waiter: Waiter[None] = Waiter()
    waiter.set_exception(Broken())
    gc.disable()
    try:
        try:
            waiter.result()
        except Broken as error:
            kept = weakref.ref(error)
        assert kept() is None
    finally:
        gc.enable()


# --- In an asyncio task ---


def test_a_task_waits_for_the_result() -> None:
    async def play() -> str:
        waiter: Waiter[str] = Waiter()
        asyncio.get_running_loop().call_soon(waiter.set_result, "result")
        return await waiter.wait()

    assert asyncio.run(play()) == "result"


def test_a_task_gets_the_error() -> None:
    async def play() -> None:
        waiter: Waiter[str] = Waiter()
        asyncio.get_running_loop().call_soon(waiter.set_exception, ValueError("broken"))
        await waiter.wait()

    with pytest.raises(ValueError, match=r"^broken$"):
        asyncio.run(play())


def test_a_task_does_not_wait_for_what_is_there() -> None:
    waiter: Waiter[str] = Waiter()
    waiter.set_result("early")
    step = waiter.wait()
    with pytest.raises(StopIteration) as end:
        step.send(None)
    assert end.value.value == "early"


# --- The outcome of an asyncio future ---


def test_a_futures_result_is_copied() -> None:
    async def play() -> object:
        waiter: Waiter[str] = Waiter()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.add_done_callback(waiter.copy_from)
        future.set_result("result")
        return await waiter.wait()

    assert asyncio.run(play()) == "result"


@pytest.mark.parametrize(
    ("end", "error"),
    [(lambda future: future.set_exception(OSError()), OSError), (lambda future: future.cancel(), PeerGone)],
)
def test_a_futures_error_is_copied_and_cancelled_means_gone(
    end: Callable[["asyncio.Future[str]"], None], error: type[Exception]
) -> None:
    async def play() -> None:
        waiter: Waiter[str] = Waiter()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.add_done_callback(waiter.copy_from)
        end(future)
        await waiter.wait()

    with pytest.raises(error):
        asyncio.run(play())
