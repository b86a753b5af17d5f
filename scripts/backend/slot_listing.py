"""What GET /slots of llama-server says of a slot and of the task that it works on, or has worked on last.

Nothing is taken for granted: a value of another type or size than llama-server's counts as none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_MOST = 1 << 40  # a larger number is no count of tokens

ListedSlot = Mapping[str, Any]


def is_busy(slot: ListedSlot) -> bool:
    """Whether a slot works on its task."""
    return slot.get("is_processing") is True


def task_of(slot: ListedSlot) -> int | None:
    """Return the number of a slot's task, None if it has had none."""
    task = slot.get("id_task")
    return task if type(task) is int else None


def is_streamed(slot: ListedSlot) -> bool:
    """Whether the answer of a slot's task is a stream."""
    return _params_of(slot).get("stream") is True


def _params_of(slot: ListedSlot) -> Mapping[str, Any]:
    params = slot.get("params")
    return params if isinstance(params, dict) else {}


def most_tokens_of(slot: ListedSlot) -> int:
    """Return the most tokens that a slot will generate, -1 if there is no limit."""
    limit = _params_of(slot).get("n_predict")
    return limit if type(limit) is int and -1 < limit < _MOST else -1


def awaited_task(slot: ListedSlot) -> int | None:
    """Return the task of a slot that works on an answer of which nothing has been sent; None if there is none."""
    is_awaited = is_busy(slot) and not (is_streamed(slot) and decoded_of(slot))
    return task_of(slot) if is_awaited else None


def decoded_of(slot: ListedSlot) -> int:
    """Return how many tokens a slot has generated, 0 if that is not known."""
    return _number(_next_token_of(slot), "n_decoded")


def shows_decoded(slot: ListedSlot) -> bool:
    """Whether a slot has had a task, and its version says how many tokens it has generated."""
    return "n_decoded" in _next_token_of(slot)


def _next_token_of(slot: ListedSlot) -> Mapping[str, Any]:
    listed = slot.get("next_token")
    first = listed[0] if isinstance(listed, list) and listed else listed
    return first if isinstance(first, dict) else {}


def read_of(slot: ListedSlot) -> int:
    """Return how many tokens of the prompt of a slot's task have been read, or were found in the slot."""
    return _number(slot, "n_prompt_tokens_processed") + _number(slot, "n_prompt_tokens_cache")


def shows_read(slot: ListedSlot) -> bool:
    """Whether a slot has had a task, and its version says how many tokens of the prompt have been read."""
    return "n_prompt_tokens_processed" in slot


def kept_in(slot: ListedSlot) -> int:
    """Return how many tokens a slot keeps: of the prompt, and all that were generated but the last one.

    They are another task's until its own has begun to read its prompt.
    """
    return _number(slot, "n_prompt_tokens")


def most_kept(slots: Sequence[ListedSlot]) -> int | None:
    """Return how many tokens any slot keeps at most, None if one that has had a task does not say."""
    had_tasks = [slot for slot in slots if is_busy(slot) or task_of(slot) is not None]
    if not had_tasks or not all("n_prompt_tokens" in slot for slot in had_tasks):
        return None
    return max(map(kept_in, had_tasks))


def context_of(slot: ListedSlot) -> int:
    """Return how many tokens a slot can hold, 0 if that is not known."""
    return _number(slot, "n_ctx")


def _number(values: Mapping[str, Any], name: str) -> int:
    """Return a count, 0 if it is none."""
    value = values.get(name)
    return value if type(value) is int and 0 < value < _MOST else 0
