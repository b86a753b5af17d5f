"""memory_budget.py: bytes are held up to a limit, half of it by clients without a key, until they are released."""

import pytest

from core.errors import MEMORY_FULL, GatewayError
from policy.memory_budget import MemoryBudget


def test_bytes_are_held_up_to_the_limit() -> None:
    memory = MemoryBudget(10)
    memory.add(4)
    memory.add(6)
    assert memory.held_bytes == 10


def test_a_byte_more_is_refused_with_the_name_of_the_setting() -> None:
    memory = MemoryBudget(10)
    memory.add(10)
    with pytest.raises(GatewayError, match=r"MAX_BUFFERED_BYTES \(10 bytes\)") as error:
        memory.add(1)
    assert error.value.kind is MEMORY_FULL


def test_refused_bytes_count_until_they_are_released() -> None:
    """What holds them releases all that it has added, whether or not that was refused."""
    memory = MemoryBudget(10)
    with pytest.raises(GatewayError):
        memory.add(11)
    assert memory.held_bytes == 11
    memory.release(11)
    memory.add(10)
    assert memory.held_bytes == 10


def test_heads_count_with_bodies_and_may_take_half() -> None:
    budget = MemoryBudget(100)
    budget.change_unread(50)
    with pytest.raises(GatewayError, match="MAX_BUFFERED_BYTES"):
        budget.change_unread(1)
    budget.change_unread(-1)
    budget.add(50)
    with pytest.raises(GatewayError):
        budget.add(1)
    budget.change_unread(-50)
    assert (budget.held_bytes, budget.unread_bytes) == (51, 0)


def test_heads_find_no_room_beside_bodies_that_take_all() -> None:
    budget = MemoryBudget(100)
    budget.add(99)
    budget.change_unread(1)
    with pytest.raises(GatewayError):
        budget.change_unread(1)
    budget.change_unread(-2)  # less is always accepted
    assert budget.held_bytes == 99
