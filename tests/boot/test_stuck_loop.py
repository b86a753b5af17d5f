"""stuck_loop.py: one thread that works alone is suspect; it is stuck if /slots does not answer while requests run."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.probes import Activity
from boot.stuck_loop import StuckLoop
from config.loader import load_config

BUSY = Activity(active=1, queued=0, backend_silent_s=0, idle_s=0)
IDLE = Activity(active=0, queued=0, backend_silent_s=0, idle_s=9)


@pytest.fixture
def spinning() -> Iterator[int]:
    """The pid of a process with one thread, which works without an end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process.pid
        process.kill()


class Case:
    """A StuckLoop whose answers a test gives."""

    def __init__(self, pid: int, folder: Path, **settings: str) -> None:
        self.alive = True
        self.responds = False
        self.activity: Activity | None = BUSY
        given = {"DATA_DIR": str(folder), "THREADS": "2", "WEDGE_TIMEOUT": "0.2", "HEALTH_TIMEOUT": "0.1", "NGL": "0"}
        config = load_config({**given, **settings})
        self.loop = StuckLoop(config, pid, lambda: self.alive, self._slots_respond, self._activity)

    async def _slots_respond(self, timeout_s: float) -> bool:
        await asyncio.sleep(0 if self.responds else timeout_s)
        return self.responds

    async def _activity(self) -> Activity | None:
        return self.activity

    async def until_suspect(self) -> None:
        while not self.loop.is_suspect():
            await asyncio.sleep(0.02)


def test_a_thread_that_works_alone_is_suspect_and_stuck(spinning: int, tmp_path: Path) -> None:
    async def play() -> None:
        case = Case(spinning, tmp_path)
        await case.until_suspect()
        while not (reason := await case.loop.find()):  # on a busy machine it may not run at all between two looks
            pass
        assert "and /slots does not answer" in reason

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("about", [{"responds": True}, {"alive": False}, {"activity": None}, {"activity": IDLE}])
def test_it_is_not_stuck_without_all_signs(about: dict[str, object], spinning: int, tmp_path: Path) -> None:
    async def play() -> None:
        case = Case(spinning, tmp_path)
        vars(case).update(about)
        assert await case.loop.find() == ""

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_process_that_waits_or_works_in_one_thread_anyway_is_no_suspect(spinning: int, tmp_path: Path) -> None:
    async def play() -> None:
        with subprocess.Popen(["sleep", "600"]) as waiting:
            case = Case(waiting.pid, tmp_path)
            assert not case.loop.is_suspect()
            assert await case.loop.find() == ""
            waiting.kill()
        assert not Case(spinning, tmp_path, THREADS="1").loop.is_suspect()

    asyncio.run(asyncio.wait_for(play(), 60))
