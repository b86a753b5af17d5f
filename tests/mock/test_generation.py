"""A generated answer."""

from typing import Any

import pytest

from mock.generation import FILLER, Generation, timings_of


def generate(prompt: object = "hi", words: int = 3, **more: Any) -> Generation:
    generation = Generation(prompt, "mock", 1, max_tokens=words, finish_reason="length", **more)
    for _ in range(words):
        generation.next_word()
    return generation


def test_the_text_says_that_it_is_a_mock_and_depends_only_on_the_prompt() -> None:
    texts = [generate(prompt, 40).text for prompt in ("hi", "hi", "ho")]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("This is the mock backend: no model is loaded. Your prompt of 3 tokens has the checksum")
    assert FILLER in texts[0]


def test_each_word_is_one_token_and_begins_with_a_space_except_the_first() -> None:
    generation = generate()
    assert (generation.words, generation.word) == (["This", " is", " the"], " the")
    assert (generation.completion_tokens, generation.total_tokens) == (3, 6)


def test_cached_tokens_are_fewer_than_those_of_the_prompt() -> None:
    assert [generate(cached_tokens=count).cached_tokens for count in (-1, 2, 99)] == [0, 2, 2]
    assert generate(cached_tokens=2).uncached_tokens == 1


def test_timings_are_consistent() -> None:
    generation = generate(cached_tokens=1)
    generation.started_s, generation.first_s, generation.last_s = 1.0, 1.5, 2.0
    timings = generation.timings
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (1, 2, 3)
    assert (timings["prompt_ms"], timings["predicted_ms"]) == (500.0, 500.0)
    # The first token belongs to the time of the prompt, so two tokens took 500 ms.
    assert (timings["predicted_per_token_ms"], timings["predicted_per_second"]) == (250.0, 4.0)


@pytest.mark.parametrize(("steps", "elapsed_ms"), [(0, 0.0), (0, 5.0), (1, 0.0)])
def test_timings_of_nothing_divide_by_no_zero(steps: int, elapsed_ms: float) -> None:
    timings = timings_of("predicted", 1, steps, elapsed_ms)
    assert (timings["predicted_per_token_ms"], timings["predicted_per_second"]) == (elapsed_ms, 0.0)
