"""off_loop.py: a call that hangs keeps neither the loop nor the process."""

import asyncio
import subprocess
import sys
import threading

import pytest

from core.off_loop import THREAD_NAME, finishes_within, run_off_loop
from support.boot import PATIENCE_S
from support.paths import SCRIPTS
from support.together import ENVIRON


def test_results_and_errors_are_the_functions() -> None:
    async def play() -> None:
        assert await run_off_loop(lambda: threading.current_thread().name) == THREAD_NAME
        with pytest.raises(ZeroDivisionError):
            await run_off_loop(lambda: 1 // 0)

    asyncio.run(play())


def test_the_loop_goes_on_while_a_call_hangs() -> None:
    async def play() -> None:
        lifted = threading.Event()
        work = run_off_loop(lifted.wait)
        assert not await finishes_within(work, 0.01)
        lifted.set()
        assert await finishes_within(work, PATIENCE_S)
        assert work.result()

    asyncio.run(play())


def test_an_error_that_is_not_awaited_stays_in_the_future() -> None:
    async def play() -> None:
        work = run_off_loop(lambda: 1 // 0)
        assert await finishes_within(work, PATIENCE_S)
        assert isinstance(work.exception(), ZeroDivisionError)

    asyncio.run(play())


def test_a_result_is_dropped_if_the_future_was_cancelled_or_the_loop_has_ended() -> None:
    lifted = threading.Event()

    async def play(cancel: bool) -> None:
        work = run_off_loop(lifted.wait)
        if cancel:
            work.cancel()
            lifted.set()
            while any(thread.name == THREAD_NAME for thread in threading.enumerate()):
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert work.cancelled()

    asyncio.run(play(True))
    lifted.clear()
    asyncio.run(play(False))
    lifted.set()


def test_a_call_that_hangs_does_not_delay_the_end_of_the_process() -> None:
    program = f"""
import asyncio, sys, threading
sys.path.insert(0, {str(SCRIPTS)!r})
from core.off_loop import finishes_within, run_off_loop

async def main():
    assert not await finishes_within(run_off_loop(threading.Event().wait), 0.01)

asyncio.run(main())
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRON, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert done.stdout == "ended\n"
