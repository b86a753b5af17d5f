"""What the mock reads from request bodies. The token counts are those of b11434's chat template with a tiny model."""

import pytest

from mock.request_bodies import (
    ApiError,
    Body,
    chat_prompt,
    count_tokens,
    max_tokens,
    prompt_of_chat,
    prompt_of_infill,
    prompt_of_input,
    prompt_of_text,
    require,
    require_list,
    text_of,
)

USER = {"role": "user", "content": "hi"}
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_missing_member_is_an_error_in_the_format_of_llama_server() -> None:
    with pytest.raises(ApiError) as caught:
        require({"prompt": None}, "prompt")
    assert caught.value.args == (400, "invalid_request_error", "'prompt' is required")
    with pytest.raises(ApiError, match="Expected 'messages' to be an array"):
        require_list({"messages": "x"}, "messages")


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": "7"}, None),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 0}, 1),
        ({"max_output_tokens": 3}, 3),
        ({"n_predict": 2}, 2),
        ({"max_completion_tokens": 6, "max_tokens": 7}, 6),
    ],
)
def test_the_maximum_length_of_an_answer(body: Body, tokens: int | None) -> None:
    assert max_tokens(body) == tokens


def test_messages_are_rendered_as_chatml() -> None:
    assert chat_prompt([USER], None) == PROMPT
    assert chat_prompt([USER], "be brief") == "<|im_start|>system\nbe brief<|im_end|>\n" + PROMPT
    assert chat_prompt([USER, "not a message"], "") == PROMPT


def test_the_text_of_a_message_is_a_text_or_its_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"text": "b"}, "c"]
    assert [text_of("a"), text_of(parts), text_of(None)] == ["a", "ab", ""]


def test_each_api_has_its_own_prompt() -> None:
    assert prompt_of_chat({"messages": [USER]}) == PROMPT
    assert prompt_of_input({"input": "hi"}) == prompt_of_input({"input": [USER]}) == PROMPT
    assert prompt_of_input({"input": "hi", "instructions": "x"}) == chat_prompt([USER], "x")
    assert prompt_of_text({"prompt": [1, 2]}) == [1, 2]
    assert prompt_of_infill({"input_prefix": "a", "input_suffix": "b"}) == "ab"


def test_tokens_are_bytes_and_a_start_token_or_the_ids_of_a_list() -> None:
    assert [count_tokens("hi"), count_tokens("ü"), count_tokens([5, 6, 7]), count_tokens("")] == [3, 3, 3, 1]
    assert count_tokens(PROMPT) == 53
