"""File operations off the event loop: a volume that hangs stops a thread of its own, and nothing else.

asyncio's executor is not used: at the end it waits for all of its threads, and a call that hangs never returns.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
THREAD_NAME = "off-loop"


def run_off_loop(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run a function in a thread of its own; return a future of its result or exception.

    The future may be cancelled or left alone: the function goes on, and its result is dropped. The thread does not
    delay the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return future


async def finishes_within(work: "asyncio.Future[T]", seconds: float) -> bool:
    """Wait for work at most so long; return whether it has finished. It is not cancelled, and its error not raised."""
    await asyncio.wait([work], timeout=seconds)
    return work.done()
