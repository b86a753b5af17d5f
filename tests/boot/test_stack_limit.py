"""stack_limit.py: how large llama-server's stacks may be."""

from pathlib import Path
from resource import RLIM_INFINITY

import pytest

from boot.stack_limit import MOST_BYTES, find_limit, memory_bytes, wanted_limit

GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("limit", "total", "memory"),
    [
        ("max", "16777216", 16 * GIB),
        ("2147483648", "16777216", 2 * GIB),
        ("", "", 0),
        ("9223372036854771712", "1024", MIB),
    ],
)
def test_memory_is_the_smaller_one_of_container_and_machine(
    tmp_path: Path, limit: str, total: str, memory: int
) -> None:
    files = [tmp_path / "memory.max", tmp_path / "meminfo"]
    files[0].write_text(limit + "\n")
    files[1].write_text(f"MemTotal:       {total} kB\nMemFree: 1 kB\n" if total else "")
    assert memory_bytes([files[0], tmp_path / "missing"], files[1]) == memory


@pytest.mark.parametrize(
    ("memory", "soft", "hard", "size"),
    [
        (64 * GIB, 8 * MIB, RLIM_INFINITY, MOST_BYTES),
        (4 * GIB, 8 * MIB, RLIM_INFINITY, GIB // 2),
        (64 * GIB, RLIM_INFINITY, RLIM_INFINITY, MOST_BYTES),
        (64 * GIB, 8 * MIB, 100 * MIB, 100 * MIB),
        (64 * GIB, 8 * MIB, 8 * MIB, None),
        (32 * MIB, 8 * MIB, RLIM_INFINITY, None),
        (0, 8 * MIB, RLIM_INFINITY, None),
    ],
)
def test_the_limit_is_raised_as_far_as_memory_and_system_allow(
    memory: int, soft: int, hard: int, size: int | None
) -> None:
    want = None if size is None else (size, hard)
    assert wanted_limit(memory, soft=soft, hard=hard, overcommit="0", address_space=RLIM_INFINITY) == want
    assert wanted_limit(memory, soft=soft, hard=hard, overcommit="2", address_space=RLIM_INFINITY) is None
    assert wanted_limit(memory, soft=soft, hard=hard, overcommit="0", address_space=GIB) is None


def test_this_machine_has_one() -> None:
    limit = find_limit()
    assert limit is None or 0 < limit[0] <= MOST_BYTES
