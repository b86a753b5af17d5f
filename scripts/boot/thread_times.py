"""How much processor time each thread of a process has used: whether one works alone while the others wait."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_SHARE = 0.8  # of the time of all threads


def thread_ticks(pid: int, proc: Path = _PROC) -> Mapping[int, int]:
    """Return the clock ticks that each thread has run, by its id; nothing if the system does not report it."""
    ticks: dict[int, int] = {}
    with suppress(OSError):
        for task in (proc / str(pid) / "task").iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread may have ended
                fields = (task / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
                ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    return ticks


def one_runs(before: Mapping[int, int], after: Mapping[int, int]) -> bool:
    """Return whether one thread has used nearly all of the time between two looks, and any at all."""
    used = [ticks - before.get(thread, 0) for thread, ticks in after.items()]
    return bool(before) and sum(used) > 0 and max(used) >= _SHARE * sum(used)
