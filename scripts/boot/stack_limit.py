"""The stack of llama-server: large, since it reads JSON, schemas and grammars with functions that recurse.

Its threads take the size of their stacks from RLIMIT_STACK when it starts. A stack is address space; memory is only
taken for as much of it as is used.
"""

import resource
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 1 << 30
SHARE = 8  # of the memory; one thread at a time recurses deeply
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NEVER_OVERCOMMIT = "2"  # then every stack counts as a whole


def memory_bytes(limits: Sequence[Path] = _MEMORY_LIMITS, meminfo: Path = _MEMINFO) -> int:
    """Return the memory of this machine or container; 0 if the system does not report it."""
    found = [int(text) for path in limits if (text := _read(path)).isdigit()]
    fields = _read(meminfo).partition("MemTotal:")[2].split()
    return min([*found, *(int(text) << 10 for text in fields[:1])], default=0)


def wanted_limit(memory: int, *, soft: int, hard: int, overcommit: str, address_space: int) -> tuple[int, int] | None:
    """Return the new soft and hard limit of RLIMIT_STACK in bytes; None if the present ones stay.

    `overcommit` is vm.overcommit_memory, `address_space` the soft RLIMIT_AS.
    """
    if overcommit == _NEVER_OVERCOMMIT or address_space != resource.RLIM_INFINITY:
        return None
    size = min(MOST_BYTES, memory // SHARE)
    if hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    # Without a limit threads get some megabytes.
    return (size, hard) if size > (0 if soft == resource.RLIM_INFINITY else soft) else None


def find_limit() -> tuple[int, int] | None:
    """Return the limit for llama-server on this machine; None if the present one stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return wanted_limit(
        memory_bytes(), soft=soft, hard=hard, overcommit=_read(_OVERCOMMIT), address_space=address_space
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
