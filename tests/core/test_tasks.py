"""tasks.py: tasks are cancelled until they have ended."""

import asyncio

from core.tasks import end_tasks


def test_all_tasks_are_cancelled() -> None:
    async def play() -> list[bool]:
        tasks = [asyncio.ensure_future(asyncio.sleep(3600)) for _ in range(3)]
        await end_tasks(tasks)
        return [task.cancelled() for task in tasks]

    assert asyncio.run(play()) == [True, True, True]


def test_a_task_that_has_ended_keeps_its_result() -> None:
    async def play() -> None:
        task = asyncio.ensure_future(asyncio.sleep(0))
        await task
        await end_tasks([task])
        assert not task.cancelled()

    asyncio.run(play())


def test_no_tasks_are_ended_at_once() -> None:
    asyncio.run(end_tasks([]))


def test_a_task_that_fails_while_it_is_cancelled_has_ended() -> None:
    async def fragile() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("broken")

    async def play() -> None:
        task = asyncio.ensure_future(fragile())
        await asyncio.sleep(0)
        await end_tasks([task])
        assert str(task.exception()) == "broken"

    asyncio.run(play())


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """As `asyncio.wait_for` does before Python 3.12 if its result comes in the same iteration of the loop."""
    cancellations = 0

    async def careless() -> None:
        nonlocal cancellations
        while True:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:  # noqa: PERF203
                cancellations += 1
                if cancellations == 2:
                    raise

    async def play() -> None:
        task = asyncio.ensure_future(careless())
        await asyncio.sleep(0)
        await end_tasks([task])
        assert task.cancelled()

    asyncio.run(play())
    assert cancellations == 2
