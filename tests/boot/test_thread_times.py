"""thread_times.py: which threads of a process run."""

import os
from pathlib import Path

import pytest

from boot.thread_times import one_runs, thread_ticks


def test_ticks_are_those_of_user_and_system_by_thread(tmp_path: Path) -> None:
    for thread, name in ((7, "llama"), (8, "a) b (c")):
        folder = tmp_path / "7" / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "stat").write_text(f"{thread} ({name}) R 1 7 7 0 -1 4194304 1 2 3 4 {thread}0 5 0 0 20 0 2 0 99\n")
    (tmp_path / "7" / "task" / "9").mkdir()  # it has just ended
    assert thread_ticks(7, tmp_path) == {7: 75, 8: 85}
    assert thread_ticks(8, tmp_path) == {}


def test_this_process_has_threads() -> None:
    ticks = thread_ticks(os.getpid())
    assert not ticks or os.getpid() in ticks


@pytest.mark.parametrize(
    ("before", "after", "alone"),
    [
        ({1: 0, 2: 0}, {1: 100, 2: 1}, True),
        ({1: 0, 2: 50}, {1: 80, 2: 70}, True),
        ({1: 0, 2: 0}, {1: 100, 2: 100}, False),
        ({1: 5}, {1: 5}, False),
        ({1: 0}, {1: 2, 2: 9}, True),
        ({}, {1: 9}, False),
        ({1: 9}, {}, False),
    ],
)
def test_one_thread_works_alone(before: dict[int, int], after: dict[int, int], alone: bool) -> None:
    assert one_runs(before, after) is alone
