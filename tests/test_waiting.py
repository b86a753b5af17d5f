"""Promises, the one clock, and the end of tasks."""

import asyncio

from waiting import end_tasks


def test_task_that_loses_a_cancellation_is_cancelled_again():
    """As `asyncio.wait_for` does before Python 3.12 where its result comes in the same turn."""
    asked = 0

    async def deaf() -> None:
        nonlocal asked
        while True:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:  # noqa: PERF203
                asked += 1
                if asked == 2:
                    raise

    async def main() -> None:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        await end_tasks([task])
        assert task.cancelled()

    asyncio.run(main())
    assert asked == 2
