"""generation_watch.py: the tokens of a request that was given up, from what /slots lists."""

from math import inf
from typing import Any

import pytest

from backend.generation_watch import Generated, GenerationWatch


def slot(
    task: int, decoded: object, number: int = 0, limit: object = -1, *, stream: bool = False, prompt: int = 0
) -> dict[str, Any]:
    """Return a busy slot as llama-server lists it. One without a prompt is that of an old version."""
    params = {"n_predict": limit, "stream": stream}
    listed = {"id": number, "id_task": task, "is_processing": True, "params": params}
    read = {"n_prompt_tokens_processed": 1, "n_prompt_tokens_cache": prompt - 1} if prompt else {}
    return {**listed, **read, "next_token": [{"n_decoded": decoded}]}


def idle(task: int, tokens: int, number: int = 0) -> dict[str, Any]:
    """Return a slot that has ended this task, and keeps so many tokens, the prompt's included."""
    listed = {"id": number, "id_task": task, "is_processing": False, "params": {"n_predict": -1, "stream": False}}
    read = {"n_prompt_tokens": tokens, "n_prompt_tokens_processed": 0, "n_prompt_tokens_cache": 0}
    return {**listed, **read, "next_token": [{"n_decoded": 0}]}


def seen(
    *looks: list[dict[str, Any]],
    tasks: int = 1,
    age_s: float = 1.0,
    limit: int | None = None,
    own: int | None = None,
    prompts: int = 1,
) -> Generated | None:
    """Look at these slots, the second time after 0.2 s, later after 1.2 s each; return what is reported."""
    ended: list[Generated | None] = []
    watch = GenerationWatch(tasks, age_s, limit, own, ended.append, prompts)
    now_s = 10.0
    for slots in looks:
        watch.look(slots, now_s, set())
        now_s += 0.2 if now_s == 10.0 else 1.2
    watch.end()
    (generated,) = ended
    return generated


def watched(*looks: list[dict[str, Any]], **options: Any) -> int | None:
    """Return the tokens that are reported, which are not exact."""
    generated = seen(*looks, **options)
    assert generated is None or not generated.is_exact
    return None if generated is None else generated.tokens


def test_what_is_generated_until_it_is_noticed_follows_from_the_pace() -> None:
    assert watched([slot(7, 100)], [slot(7, 120)], []) == 120 + 105
    assert watched([slot(7, 100)], [slot(7, 120)], [slot(7, 240)], []) == 240 + 105
    assert watched([slot(7, 100, limit=130)], [slot(7, 120, limit=130)], []) == 130


def test_what_is_not_noticed_for_long_runs_to_its_end() -> None:
    looks = [[slot(7, tokens, limit=900)] for tokens in (100, 120, 240, 360, 480)]
    assert watched(*looks) == 900
    assert watched(*looks, []) == 480 + 105
    assert watched(*([slot(7, tokens)] for tokens in (100, 120, 240, 360, 480))) == 480 + 105


def test_of_several_that_may_be_its_own_the_one_of_its_age_counts() -> None:
    older, newer = [slot(1, 500), slot(2, 100, 1)], [slot(1, 520), slot(2, 120, 1)]
    assert watched(older, newer, age_s=1.0) == 120 + 105
    assert watched(older, newer, age_s=5.0) == 520 + 105
    assert watched(older, newer, age_s=5.0, own=1) == 120 + 105
    assert watched(older, newer, tasks=2) == 640 + 210


def test_a_slot_keeps_the_tokens_of_the_task_that_it_has_ended() -> None:
    """The last token that was generated is not in the slot."""
    looks = [slot(7, 100, prompt=10)], [slot(7, 120, prompt=10)]
    assert seen(*looks, [idle(7, 309)]) == Generated(300, 10, True)
    assert seen(*looks, [slot(7, 240, prompt=10)], [idle(7, 309)]) == Generated(300, 10, True)
    assert seen(looks[0], [idle(7, 129)]) == Generated(120, 10, True)  # it has ended before the second look


def test_what_a_slot_keeps_counts_only_if_it_can_be_the_tasks() -> None:
    looks = [slot(7, 100, prompt=10)], [slot(7, 120, prompt=10)]
    assert seen(*looks, [idle(8, 400)]) == Generated(225, 10, False)  # the slot has had another task since then
    assert seen(*looks, [idle(7, 60)]) == Generated(225, 10, False)  # its context was shifted
    assert seen(*looks, [idle(7, 0)]) == Generated(225, 10, False)  # the task has emptied it
    assert watched([slot(7, 100)], [slot(7, 120)], [idle(7, 309)]) == 225  # a version that does not tell the prompt


def test_a_prompt_that_has_not_been_read_whole_is_not_known() -> None:
    looks = [slot(7, 0, prompt=5)], [slot(7, 0, prompt=9)]
    assert seen(*looks) == Generated(0, None, False)
    assert seen(*looks, [idle(7, 12)]) == Generated(0, None, False)
    assert seen(*looks, [slot(7, 30, prompt=12)], [idle(7, 51)]) == Generated(40, 12, True)


def test_choices_share_a_prompt_and_prompts_have_their_own() -> None:
    """A further choice empties its slot at its end: it had gone on for as long as the first one."""
    first = [slot(1, 50, 0, prompt=10), slot(2, 48, 1, prompt=10)]
    second = [slot(1, 60, 0, prompt=10), slot(2, 58, 1, prompt=10)]
    assert seen(first, second, [idle(1, 109, 0), idle(2, 0, 1)], tasks=2) == Generated(100 + 98, 10, False)
    first[1], second[1] = slot(2, 48, 1, prompt=4), slot(2, 58, 1, prompt=4)
    ended = [idle(1, 109, 0), idle(2, 101, 1)]
    assert seen(first, second, ended, tasks=2, prompts=2) == Generated(100 + 98, 14, True)
    assert seen(first, second, ended[:1], tasks=2, prompts=2) == Generated(100 + 98, 14, False)


def test_the_end_of_a_choice_is_not_above_its_limit() -> None:
    first = [slot(1, 50, 0, 99, prompt=10), slot(2, 55, 1, 99, prompt=10)]
    second = [slot(1, 60, 0, 99, prompt=10), slot(2, 65, 1, 99, prompt=10)]
    assert seen(first, second, [idle(1, 107, 0), idle(2, 0, 1)], tasks=2) == Generated(98 + 99, 10, False)


def test_among_several_it_is_an_estimate_and_one_that_is_at_work_is_likelier() -> None:
    looks = [slot(1, 100, prompt=10), slot(2, 100, 1, prompt=10)], [idle(1, 129), slot(2, 120, 1, prompt=10)]
    assert seen(*looks, [idle(1, 129), idle(2, 209, 1)]) == Generated(200, 10, False)
    assert seen(*looks, [idle(1, 129), idle(2, 209, 1)], tasks=2) == Generated(320, 10, True)


def test_it_is_at_work_as_long_as_a_look_shows_it() -> None:
    watch = GenerationWatch(1, 1.0, None, None, lambda _: None)
    looks: list[tuple[list[dict[str, Any]], float]] = [
        ([slot(7, 1)], -inf),  # not known to be its own yet
        ([slot(7, 2)], 11.0),
        ([slot(7, 3)], 12.0),
        ([idle(7, 3)], -inf),
        ([], -inf),
    ]
    for number, (slots, at_work_s) in enumerate(looks):
        watch.look(slots, 10.0 + number, set())
        assert watch.at_work_s == at_work_s


def test_the_tasks_of_another_process_are_not_its_own() -> None:
    ended: list[Generated | None] = []
    watch = GenerationWatch(1, 1.0, None, None, ended.append)
    for now_s, tokens in ((10.0, 100), (10.2, 120)):
        watch.look([slot(7, tokens)], now_s, set())
    watch.forget_tasks()
    assert watch.look([slot(7, 9000)], 12.0, set()) == set()
    assert (watch.at_work_s, watch.pause_s > 60) == (-inf, True)
    watch.end()
    assert ended == [Generated(225, None, False)]


def test_streams_and_other_limits_are_not_its_own() -> None:
    streams = [slot(1, 100, stream=True)], [slot(1, 120, stream=True)]
    assert watched(*streams) is None
    assert watched([slot(1, 10, limit=50)], [slot(1, 12, limit=50)], limit=60) is None
    assert watched([slot(1, 10, limit=50)], [slot(1, 20, limit=50)], limit=50) == 50


def test_nothing_that_was_seen_is_nothing_known() -> None:
    assert watched() is None
    assert watched([]) is None
    assert watched([slot(7, 100)], []) is None
    assert watched([slot(7, 100)], [slot(8, 3)]) is None


def test_two_that_were_given_up_at_once_have_a_task_each() -> None:
    ended: list[Generated | None] = []
    watches = [GenerationWatch(1, 1.0, None, None, ended.append) for _ in range(2)]
    for now_s, tokens in ((10.0, 100), (10.2, 120)):
        taken: set[int] = set()
        for watch in watches:
            taken |= watch.look([slot(1, tokens), slot(2, tokens, 1)], now_s, taken)
    for watch in watches:
        watch.end()
    assert [each and each.tokens for each in ended] == [225, 225]


@pytest.mark.parametrize("listed", [{}, {"next_token": []}, {"next_token": [{"n_decoded": "x"}], "params": 1}])
def test_slots_of_another_form_have_no_tokens(listed: dict[str, Any]) -> None:
    busy = {"is_processing": True, **listed}
    assert watched([{"id_task": 1, **busy}], [{"id_task": 1, **busy}]) == 0
    assert watched([{"id_task": "x", **busy}], [{"id_task": None, **busy}]) is None


def test_it_is_looked_at_at_once_and_soon_again() -> None:
    watch = GenerationWatch(1, 1.0, None, None, lambda _: None)
    assert watch.pause_s == 0
    watch.look([slot(1, 1)], 1.0, set())
    assert watch.pause_s == 0.2
    watch.look([slot(1, 1)], 1.0, set())  # at the same time
    assert watch.pause_s > 60
