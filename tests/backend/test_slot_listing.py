"""slot_listing.py: what a slot of GET /slots says, whatever its form."""

from typing import Any

import pytest

from backend.slot_listing import (
    awaited_task,
    context_of,
    decoded_of,
    is_busy,
    is_streamed,
    kept_in,
    most_kept,
    most_tokens_of,
    read_of,
    task_of,
)

LISTED: dict[str, Any] = {
    "n_ctx": 512,
    "id": 3,
    "id_task": 7,
    "is_processing": True,
    "n_prompt_tokens": 59,
    "n_prompt_tokens_processed": 4,
    "n_prompt_tokens_cache": 6,
    "params": {"n_predict": 80, "stream": True},
    "next_token": [{"n_decoded": 50}],
}


def test_a_slot_of_llama_server() -> None:
    assert (task_of(LISTED), is_busy(LISTED), is_streamed(LISTED), most_tokens_of(LISTED)) == (7, True, True, 80)
    assert (decoded_of(LISTED), read_of(LISTED), kept_in(LISTED)) == (50, 10, 59)
    assert context_of(LISTED) == 512
    assert decoded_of({"next_token": {"n_decoded": 5}}) == 5  # an older version


def test_a_prompt_counts_as_far_as_it_has_been_read() -> None:
    assert read_of({**LISTED, "next_token": [{"n_decoded": 0}]}) == 10


def test_how_many_tokens_any_slot_keeps_is_known_if_all_say_so() -> None:
    fresh: dict[str, Any] = {"id": 0, "is_processing": False}
    assert most_kept([LISTED, {**LISTED, "n_prompt_tokens": 700}, fresh]) == 700
    assert most_kept([LISTED, {"id_task": 3}]) is None
    assert most_kept([LISTED, {"is_processing": True}]) is None
    assert most_kept([fresh]) is None
    assert most_kept([]) is None


def test_an_answer_is_awaited_until_its_first_token_is_sent() -> None:
    assert awaited_task(LISTED) is None
    assert awaited_task({**LISTED, "next_token": [{"n_decoded": 0}]}) == 7
    assert awaited_task({**LISTED, "params": {"stream": False}}) == 7
    assert awaited_task({**LISTED, "params": {}, "is_processing": False}) is None


@pytest.mark.parametrize("value", [None, "7", 7.0, True, -1, 1 << 40, [], {}])
def test_what_is_no_count_counts_as_none(value: object) -> None:
    names = ("n_prompt_tokens", "n_prompt_tokens_processed", "n_prompt_tokens_cache")
    slot = {**LISTED, **dict.fromkeys(names, value)}
    assert (kept_in(slot), read_of(slot)) == (0, 0)
    for listed in ([{"n_decoded": value}], [value], value):
        assert decoded_of({**LISTED, "next_token": listed}) == 0
    assert most_tokens_of({**LISTED, "params": {"n_predict": value}}) == -1
    assert (most_tokens_of({"params": value}), is_streamed({"params": value})) == (-1, False)


@pytest.mark.parametrize("value", [None, "7", 7.0, True])
def test_what_is_no_task_is_none(value: object) -> None:
    assert task_of({**LISTED, "id_task": value}) is None
    assert not is_busy({"is_processing": value}) or value is True
