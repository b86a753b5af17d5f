"""state_publisher.py: states are written in order, again until they are there, and nothing waits for the volume."""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from boot.state_publisher import StatePublisher
from core.state_file import DRAINING, LOADING, READY, StateEntry, StateWriter
from support.clock import PATIENCE_S
from support.together import aside

AT = datetime(2026, 1, 2, tzinfo=timezone.utc)
FIRST = StateEntry(LOADING, "starting")


class Publishing:
    """A publisher with its task, and what it reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[tuple[str, bool]] = []
        self.publisher = StatePublisher(StateWriter(path, lambda: AT), self._on_written, tick_s=0.01)

    def _on_written(self, entry: StateEntry) -> None:
        self.written.append((entry.state, self.path.is_file() and self.state == entry.state))

    @property
    def state(self) -> str:
        return str(json.loads(self.path.read_text())["state"])

    async def until(self, condition: Callable[[], object]) -> None:
        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), PATIENCE_S)


def publishing(path: Path, test: Callable[[Publishing], Awaitable[None]]) -> Publishing:
    async def play() -> Publishing:
        made = Publishing(path)
        task = asyncio.ensure_future(made.publisher.run())
        await test(made)
        task.cancel()
        await asyncio.wait([task])
        return made

    return asyncio.run(play())


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Let each write hang: of a FIFO without a reader, as of a volume that does not respond."""
    fifo = path.with_name(f".{path.name}.{os.getpid()}")
    os.mkfifo(fifo)
    try:
        yield
    finally:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # lets the write go on
        fifo.unlink(missing_ok=True)
        os.close(reader)


def test_states_are_written_in_order_and_reported_once(tmp_path: Path) -> None:
    async def play(made: Publishing) -> None:
        await made.publisher.check(FIRST)
        for state in (READY, READY, DRAINING):
            made.publisher.publish(StateEntry(state, ""))
        await made.publisher.settle()
        assert made.state == DRAINING
        await made.publisher.remove()
        assert not made.path.exists()

    made = publishing(tmp_path / "state.json", play)
    assert made.written == [(LOADING, True), (READY, True), (DRAINING, True)]


def test_a_path_that_is_wrong_is_an_error_at_the_start(tmp_path: Path) -> None:
    async def play(made: Publishing) -> None:
        with pytest.raises(FileNotFoundError):
            await made.publisher.check(FIRST)

    publishing(tmp_path / "none" / "state.json", play)


def test_a_full_disk_at_the_start_is_waited_for(tmp_path: Path) -> None:
    full = tmp_path / f".state.json.{os.getpid()}"
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    async def play(made: Publishing) -> None:
        full.symlink_to("/dev/full")
        await made.publisher.check(FIRST)
        await made.until(lambda: made.written)
        full.unlink()
        await made.until(made.path.exists)

    assert publishing(tmp_path / "state.json", play).written == [(LOADING, False)]


def test_a_state_is_written_again_until_it_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    folder.mkdir()

    async def play(made: Publishing) -> None:
        await made.publisher.check(FIRST)
        await made.until(lambda: made.written)
        made.path.unlink()
        folder.rmdir()
        made.publisher.publish(StateEntry(READY, ""))
        await made.until(lambda: len(made.written) == 2)
        folder.mkdir()
        await made.until(made.path.exists)
        assert made.state == READY
        made.path.unlink()
        await made.until(made.path.exists)
        await made.until(lambda: "is written again" in caplog.text)

    publishing(folder / "state.json", play)
    assert [message.partition(": ")[0] for message in caplog.messages] == [
        f"the state file {folder}/state.json cannot be written, which is tried again",
        f"the state file {folder}/state.json is written again",
    ]


@aside
def test_nothing_waits_for_a_volume_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "state.json"

    async def play(made: Publishing) -> None:
        with hanging(path):
            await made.publisher.check(FIRST)
            made.publisher.publish(StateEntry(READY, ""))
            await made.publisher.settle()
            assert not path.exists()
            assert made.written == []

    publishing(path, play)
