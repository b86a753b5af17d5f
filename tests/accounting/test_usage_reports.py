"""usage_reports.py: reports in each spelling; tests/accounting/test_token_counter.py reads whole responses."""

import json
from typing import Any

import pytest

from accounting.usage_reports import (
    Choice,
    Tokens,
    add_tokens,
    choices_in,
    first_members,
    generated_bytes,
    is_unfinished,
    last_members,
    parse_json,
    parse_members,
    reported,
    says_generated,
)


@pytest.mark.parametrize(
    ("response", "tokens"),
    [
        ({"timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3}, "usage": {"prompt_tokens": 9}}, Tokens(3, 1, 3)),
        ({"usage": {"prompt_tokens": 4, "completion_tokens": 2}}, Tokens(4, 0, 2)),
        ({"usage": {"input_tokens": 4, "cache_read_input_tokens": 6, "output_tokens": 2}}, Tokens(10, 6, 2)),
        ({"type": "response.completed", "response": {"usage": {"input_tokens": 4}}}, Tokens(4, 0, 0)),
        ({"type": "message_start", "message": {"usage": {"input_tokens": 4}}}, Tokens(4, 0, 0)),
        ({"tokens_evaluated": 2, "tokens_predicted": 5}, Tokens(2, 0, 5)),
        ({"tokens_predicted": 5}, Tokens(0, 0, 5)),
        ({"content": "a"}, None),
    ],
)
def test_reports(response: dict[str, Any], tokens: Tokens | None) -> None:
    assert reported(response) == tokens


@pytest.mark.parametrize(
    ("event", "unfinished"),
    [
        ({"choices": [{"finish_reason": None}]}, True),
        ({"choices": [{"finish_reason": "stop"}]}, False),
        ({"choices": [{}, 7]}, False),
        ({"choices": []}, False),
        ({"stop": False}, True),
        ({"stop": True}, False),
        ({"type": "response.created"}, True),
        ({"type": "response.completed"}, False),
        ({"tokens_predicted": 5, "stop": True}, False),
        ({"tokens_predicted": 5}, True),
        ({"tokens_evaluated": 5}, True),
        ({}, False),
    ],
)
def test_which_events_are_not_the_last_of_a_choice(event: dict[str, Any], unfinished: bool) -> None:
    assert is_unfinished(event) is unfinished


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ({"tokens_evaluated": 2}, False),
        ({"tokens_evaluated": 2, "tokens_predicted": 5}, True),
        ({"tokens_evaluated": 2, "timings": {"predicted_n": 5}}, True),
        ({"usage": {"completion_tokens": 5}}, True),
    ],
)
def test_which_reports_have_what_was_generated(response: dict[str, Any], says: bool) -> None:
    assert says_generated(response) is says


def test_choices_that_share_a_prompt_have_it_once() -> None:
    one, other = Tokens(10, 3, 5, 1.0, 2.0, 4), Tokens(10, 4, 7, 3.0, 1.0)
    assert add_tokens(one, other, one_prompt=True) == Tokens(10, 4, 12, 3.0, 3.0, 4)
    assert add_tokens(one, other, one_prompt=False) == Tokens(20, 7, 12, 4.0, 3.0, 4)


def test_choices_are_measured_by_their_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"arguments": "{}ä"}}]}
    choices = [{"index": 0, "message": message, "finish_reason": "length"}, 5, {"text": "\ud800"}]
    assert choices_in({"choices": choices}) == [Choice(4, 0, True), Choice(3)]
    assert choices_in({"choices": 7}) == choices_in({}) == []


def test_generated_text_of_any_depth_is_measured() -> None:
    value: object = "ab"
    for _ in range(5000):
        value = [value]
    assert generated_bytes({"content": value, "model": "not this", "n": 5}) == 2


def test_settings_under_a_path_are_no_generated_text() -> None:
    response = {"generation_settings/grammar": "x" * 15_000, "generation_settings/samplers": ["top_k"], "content": "ab"}
    assert generated_bytes(response) == 2


def test_members_are_found_from_both_ends() -> None:
    text = b'{"usage":{"a":1},"data":[1],"timings":{"b":2}}'
    assert last_members(text[-25:]) == {"timings": {"b": 2}}
    assert first_members(text[:30]) == {"usage": {"a": 1}}
    assert first_members(b'{"usage":{"a":') == last_members(b'"usage":{') == {}


def test_what_is_no_json_has_no_value() -> None:
    assert parse_json(b"[") is parse_json(b"\xff") is parse_json(b"[" * 100_000) is None
    assert parse_members(json.dumps([1]).encode()) == {}
