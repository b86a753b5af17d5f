"""Each client in each situation: it ends in time, without a storm of requests, and its user sees why.

A run writes a table of what all clients did, to CLIENTS_TABLE or into the cache. known.py says which cells are wrong.
"""

from collections.abc import Callable

import pytest
from cells import BY_NAME, Cell, Name
from client_table import Tools
from known import EXPECTED


@pytest.mark.parametrize("name", BY_NAME, ids="-".join)
def test_cell(cell: Callable[[Name], Cell], installed: tuple[Tools, dict[str, str]], name: Name) -> None:
    program = BY_NAME[name][0].program
    if program in installed[1]:
        pytest.skip(f"{program}: {installed[1][program]}")
    done = cell(name)
    problems = done.problems()
    if name in EXPECTED:
        assert problems, f"{name} is right now: remove its row from known.py"
        pytest.xfail(EXPECTED[name])
    assert not problems, f"{problems}\n{done}"


def test_every_expectation_is_of_a_cell() -> None:
    assert set(EXPECTED) <= set(BY_NAME)
