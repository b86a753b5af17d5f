"""generation_watch.py: the tokens of a request that was given up, from what /slots lists."""

from math import inf
from typing import Any

from backend.generation_watch import Generated, GenerationWatch, GivenUp


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


def seen(*looks: list[dict[str, Any]], own: list[int] | None = None, **request: Any) -> Generated:
    """Look at these slots, first with what is assigned, the second time after 0.2 s, later after 1.2 s each."""
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(**{"tasks": 1, "sent_s": 0.0, "age_s": 1.0} | request), ended.append)
    now_s = 10.0
    for slots in looks:
        watch.look(slots, now_s, ([7] if own is None else own) if now_s == 10.0 else ())
        now_s += 0.2 if now_s == 10.0 else 1.2
    watch.end()
    (generated,) = ended
    return generated


NOTHING = Generated(None, None, False)


def test_what_is_generated_until_it_is_noticed_follows_from_the_pace() -> None:
    assert seen([slot(7, 100)], [slot(7, 120)], []) == Generated(120 + 105, None, False)
    assert seen([slot(7, 100)], [slot(7, 120)], [slot(7, 240)], []) == Generated(240 + 105, None, False)
    assert seen([slot(7, 100, limit=130)], [slot(7, 120, limit=130)], []) == Generated(130, None, False)
    assert seen([slot(7, 100)], [slot(7, 90)], []) == Generated(90, None, False)  # it never goes back


def test_a_slot_keeps_the_tokens_of_the_task_that_it_has_ended() -> None:
    """The last token that was generated is not in the slot."""
    looks = [slot(7, 100, prompt=10)], [slot(7, 120, prompt=10)]
    assert seen(*looks, [idle(7, 309)]) == Generated(300, 10, True)
    assert seen(*looks, [idle(7, 129)]) == Generated(120, 10, True)
    assert seen(*looks, [slot(7, 240, prompt=10)], [idle(7, 309)]) == Generated(300, 10, True)
    assert seen(looks[0], [idle(7, 129)]) == Generated(120, 10, True)  # it has ended before the second look


def test_what_a_slot_keeps_counts_only_if_it_can_be_the_tasks() -> None:
    looks = [slot(7, 100, prompt=10)], [slot(7, 120, prompt=10)]
    assert seen(*looks, [idle(8, 400)]) == Generated(225, 10, False)  # the slot has had another task since then
    assert seen(*looks, [idle(7, 128)]) == Generated(225, 10, False)  # its context was shifted
    assert seen(*looks, [idle(7, 0)]) == Generated(225, 10, False)  # the task has emptied it
    assert seen([slot(7, 100)], [slot(7, 120)], [idle(7, 309)]) == Generated(225, None, False)  # an older version


def test_what_is_followed_by_another_task_is_not_taken_to_its_limit() -> None:
    looks = [slot(7, 100, limit=900, prompt=10)], [slot(7, 120, limit=900, prompt=10)]
    assert seen(*looks, [idle(8, 400)]) == Generated(225, 10, False)


def test_a_prompt_that_has_not_been_read_whole_counts_as_far_as_it_was_read() -> None:
    looks = [slot(7, 0, prompt=5)], [slot(7, 0, prompt=9)]
    assert seen(*looks) == Generated(0, 9, False)
    assert seen(*looks, [idle(7, 12)]) == Generated(0, 12, False)
    assert seen(*looks, [idle(7, 0)]) == Generated(0, 9, False)  # the task has emptied it
    assert seen([slot(7, 0)], [idle(7, 12)]) == Generated(0, 12, False)  # it was read at once
    assert seen([slot(7, 0)], []) == Generated(0, None, False)
    assert seen(*looks, [slot(7, 30, prompt=12)], [idle(7, 51)]) == Generated(40, 12, True)


# --- Whose task it is ---


def test_a_task_that_is_not_assigned_is_not_its_own() -> None:
    """It may be another request's, though it is the only one at work."""
    assert seen([slot(7, 100, prompt=10)], [idle(7, 129)], own=[]) == NOTHING
    assert seen([slot(8, 100)], [slot(8, 120)], own=[7]) == Generated(225, None, False)  # the only one that it can be
    assert seen([slot(8, 100), slot(9, 100, 1)], [slot(8, 120)], own=[7]) == NOTHING


def test_a_task_in_the_requests_own_slot_is_its_own() -> None:
    looks = [slot(5, 1, 0), slot(8, 100, 1, prompt=10)], [idle(8, 129, 1)]
    assert seen(*looks, own=[], slot=1) == Generated(120, 10, True)
    assert seen(*looks, own=[], slot=2) == NOTHING
    both = [slot(8, 100, 0, prompt=10), slot(9, 900, 1, prompt=10)]
    assert seen(both, [idle(8, 129)], own=[], slot=0) == Generated(120, 10, True)


def test_among_several_the_assigned_one_counts_as_an_estimate() -> None:
    looks = [slot(7, 100, prompt=10), slot(8, 0, 1, prompt=90)], [idle(7, 129), slot(8, 0, 1, prompt=90)]
    assert seen(*looks) == Generated(120, 10, False)
    assert seen(*looks, own=[8]) == Generated(0, 90, False)
    both = [idle(7, 129), idle(8, 219, 1)]
    assert seen(
        [slot(7, 100, prompt=10), slot(8, 99, 1, prompt=10)], both, own=[7, 8], tasks=2, at_once=2
    ) == Generated(120 + 210, 10, True, 2)


def test_the_only_one_that_is_not_certainly_anothers_is_its_own() -> None:
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
    watch.look([slot(7, 100, prompt=10), slot(8, 100, 1, prompt=10)], 10.0, [7], {8})
    watch.look([idle(7, 129), slot(8, 120, 1, prompt=10)], 10.2, ())
    watch.end()
    assert (watch.is_certain, ended) == (True, [Generated(120, 10, True)])


def test_streams_and_other_limits_are_not_its_own() -> None:
    assert seen([slot(7, 100, stream=True)], [slot(7, 120, stream=True)]) == NOTHING
    assert seen([slot(7, 10, limit=50)], [slot(7, 12, limit=50)], limit=60) == NOTHING
    assert seen([slot(7, 10, limit=50)], [slot(7, 20, limit=50)], limit=50).tokens == 50
    looks = [slot(7, 100, limit=200, prompt=10), slot(8, 1, 1, 300)], [idle(7, 129), slot(8, 1, 1, 300)]
    assert seen(*looks, limit=200) == Generated(120, 10, True)  # the other one has another limit


def test_a_stream_that_has_not_begun_is_its_own_if_the_request_may_be_one() -> None:
    looks = [slot(7, 0, stream=True, prompt=10)], [slot(7, 0, stream=True, prompt=30)]
    assert seen(*looks) == NOTHING
    assert seen(*looks, may_stream=True) == Generated(0, 30, False)
    begun = [slot(8, 1, 1, stream=True), *looks[0]]
    assert seen(begun, [slot(7, 9, stream=True, prompt=40)], [idle(7, 49)], may_stream=True) == Generated(10, 40, True)


def test_it_is_looked_for_several_times_and_not_for_ever() -> None:
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
    assert watch.pause_s == 0
    for number in range(5):
        watch.look([slot(7, 1)], 10.0 + number, ())
        assert watch.pause_s == 0.2
    watch.look([slot(7, 1)], 15.0, ())
    assert watch.pause_s > 60
    watch.look([slot(7, 1)], 16.0, [7])
    watch.end()
    assert (watch.tasks, ended) == (set(), [NOTHING])


def test_what_was_found_is_looked_at_soon_again_and_then_seldom() -> None:
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
    watch.look([slot(7, 1)], 1.0, [7])
    assert (watch.tasks, watch.pause_s) == ({7}, 0.2)
    watch.look([slot(7, 1)], 1.0, ())  # at the same time
    assert watch.pause_s > 60


def test_it_is_at_work_as_long_as_a_look_shows_it() -> None:
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), lambda _: None)
    looks: list[tuple[list[dict[str, Any]], float]] = [
        ([slot(7, 1)], 10.0),
        ([slot(7, 2)], 11.0),
        ([slot(7, 3), slot(8, 3, 1)], 12.0),
        ([idle(7, 3), slot(8, 3, 1)], -inf),
        ([], -inf),
    ]
    assert watch.at_work_s == -inf
    for number, (slots, at_work_s) in enumerate(looks):
        watch.look(slots, 10.0 + number, [7])
        assert watch.at_work_s == at_work_s


def test_a_prompt_that_may_be_anothers_has_no_more_tokens_than_its_own_body_can_have() -> None:
    """A body of text has no more tokens than bytes, and what a template adds."""
    both = [slot(7, 100, prompt=9000), slot(8, 100, 1, prompt=35)]
    assert seen(both, both, body_bytes=100).prompt == 100 + 512
    assert seen(both, both, body_bytes=9000).prompt == 9000
    assert seen(both[:1], both[:1], body_bytes=100).prompt == 9000  # it is certain
    two = {"own": [7, 8], "tasks": 2, "at_once": 2, "prompts": 2, "body_bytes": 100}
    assert seen([*both, slot(9, 1, 2)], both, **two).prompt == 100 + 2 * 512


def test_what_is_not_found_has_had_no_more_than_any_look_has_shown() -> None:
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
    for most in (3, 8, 0):
        watch.note_most(most)
    watch.end()
    assert ended == [Generated(None, None, False, 1, 8)]


def test_the_tasks_of_another_process_are_not_its_own() -> None:
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(1, 0.0, 1.0), ended.append)
    for now_s, tokens in ((10.0, 100), (10.2, 120)):
        watch.look([slot(7, tokens)], now_s, [7])
    watch.forget_tasks()
    watch.look([slot(7, 9000)], 12.0, ())
    assert (watch.at_work_s, watch.pause_s > 60) == (-inf, True)
    watch.end()
    assert ended == [Generated(225, None, False)]


# --- Several tasks ---


def test_choices_share_a_prompt_and_prompts_have_their_own() -> None:
    """A further choice empties its slot at its end: it had gone on for as long as the first one."""
    first = [slot(7, 50, 0, prompt=10), slot(8, 48, 1, prompt=10)]
    second = [slot(7, 60, 0, prompt=10), slot(8, 58, 1, prompt=10)]
    two = {"own": [7, 8], "tasks": 2, "at_once": 2}
    assert seen(first, second, [idle(7, 109, 0), idle(8, 0, 1)], **two) == Generated(100 + 98, 10, False, 2)
    first[1], second[1] = slot(8, 48, 1, prompt=4), slot(8, 58, 1, prompt=4)
    ended = [idle(7, 109, 0), idle(8, 101, 1)]
    assert seen(first, second, ended, **two, prompts=2) == Generated(100 + 98, 14, True, 2)
    assert seen(first, second, ended[:1], **two, prompts=2) == Generated(100 + 98, 14, False, 2)


def test_prompts_are_known_only_if_all_are() -> None:
    looks = [slot(7, 50, 0, prompt=10), slot(8, 0, 1)], [slot(7, 60, 0, prompt=10), slot(8, 0, 1)]
    generated = seen(*looks, [idle(7, 109, 0)], own=[7, 8], tasks=2, at_once=2, prompts=2)
    assert (generated.tokens, generated.prompt, generated.is_exact) == (100 + 40, None, False)


def waiting(task: int, number: int, kept: int = 900) -> dict[str, Any]:
    """Return a slot whose task has not begun to read its prompt: it still has so many tokens of another one."""
    return {**slot(task, 0, number), "n_prompt_tokens_processed": 0, "n_prompt_tokens": kept}


def test_what_a_slot_keeps_of_another_task_is_none_of_a_prompt_that_has_not_been_begun() -> None:
    assert seen([waiting(7, 0)], [waiting(7, 0)]) == Generated(0, 0, False)
    assert seen([waiting(7, 0)], [idle(7, 900)]) == Generated(0, 0, False)
    assert seen([waiting(7, 0)], [idle(7, 30)]) == Generated(0, 30, False)  # it has begun since
    assert seen([{**waiting(7, 0), "next_token": [{"n_decoded": 5}]}], []).prompt is None  # the slot does not say
    assert seen([waiting(7, 0)], [idle(7, 0)]) == Generated(0, 0, False)  # the task has emptied it
    both = [slot(7, 0, prompt=10), waiting(8, 1)]
    two = {"own": [7, 8], "tasks": 2, "at_once": 2, "prompts": 2}
    assert seen(both, [idle(7, 30), idle(8, 900, 1)], **two) == Generated(0, 30, False, 2)


def test_of_choices_the_first_one_reads_the_prompt_that_they_share() -> None:
    """The slots of the others keep what they had before, until they get a copy of it."""
    begun = [slot(7, 0, 0, prompt=10), waiting(8, 1)]
    two = {"own": [7, 8], "tasks": 2, "at_once": 2}
    assert seen(begun, [idle(7, 30, 0), idle(8, 900, 1)], **two) == Generated(0, 30, False, 2)
    four = {"own": [4, 5, 6, 7], "tasks": 4, "at_once": 4, "prompts": 2}
    begun = [slot(4, 0, 0, prompt=10), waiting(5, 1), slot(6, 0, 2, prompt=20), waiting(7, 3)]
    assert seen(begun, begun, **four).prompt == 30


def test_the_end_of_a_choice_is_not_above_its_limit() -> None:
    first = [slot(7, 50, 0, 99, prompt=10), slot(8, 55, 1, 99, prompt=10)]
    second = [slot(7, 60, 0, 99, prompt=10), slot(8, 65, 1, 99, prompt=10)]
    ended = [idle(7, 107, 0), idle(8, 0, 1)]
    assert seen(first, second, ended, own=[7, 8], tasks=2, at_once=2) == Generated(98 + 99, 10, False, 2)


def test_a_choice_that_had_ended_before_had_no_more_tokens_than_the_others() -> None:
    looks = [slot(7, 50, prompt=10)], [slot(7, 60, prompt=10)], [idle(7, 109)]
    assert seen(*looks, own=[7], tasks=2, at_once=2) == Generated(100 + 50, 10, False, 2)


def test_no_more_is_charged_than_the_request_may_generate() -> None:
    looks = [slot(7, 50, limit=60, prompt=10)], [slot(7, 55, limit=60, prompt=10)]
    assert seen(*looks, [idle(7, 209)], limit=60) == Generated(60, 10, True)


def test_tasks_that_follow_each_other_are_counted_by_their_numbers() -> None:
    """Of 20 prompts two run at once: 4 had ended, some begin and end unseen, and the last is cut short."""
    many = {"tasks": 20, "at_once": 2, "prompts": 20, "own": [14, 15], "limit": 50}
    looks = (
        [slot(14, 10, 0, 50), slot(15, 20, 1, 50)],
        [slot(14, 30, 0, 50), slot(15, 40, 1, 50)],
        [slot(18, 10, 0, 50, prompt=5), slot(19, 20, 1, 50)],
        [idle(18, 29, 0), idle(21, 9, 1)],
    )
    after = 40 + 30 + 50 + 50 + 25 + 50 + 50 + 9  # from the first look: 14 and 15, 16 to 20, and a part of 21
    before = 200 * 1.0  # two slots at 100 tokens a second each, for a second
    generated = seen(*looks, **many)
    assert generated.tokens is not None
    assert 0 <= generated.tokens - (before + after) <= 60
    assert generated[1:4] == (None, False, 2)


def test_what_follows_a_requests_tasks_is_another_requests() -> None:
    few = {"tasks": 3, "at_once": 2, "own": [14, 15], "age_s": 0.1}
    looks = [slot(14, 10, 0), slot(15, 20, 1)], [slot(14, 11, 0), slot(15, 21, 1)]
    tokens = seen(*looks, [idle(13, 9000, 0), idle(17, 9000, 1)], **few).tokens
    assert tokens is not None
    assert 32 <= tokens < 100


def test_what_a_list_is_known_to_have_had_is_the_least() -> None:
    """It was given up as soon as it had begun, and has its tokens nevertheless."""
    many = {"tasks": 9, "at_once": 1, "own": [14], "age_s": 0.001}
    assert seen([slot(14, 400)], [slot(14, 400)], **many).tokens == 400


def test_a_task_that_was_cut_short_is_not_taken_to_its_limit_once_another_follows() -> None:
    many = {"tasks": 9, "at_once": 1, "own": [14], "age_s": 0.001}
    looks = [slot(14, 10, limit=500, prompt=5)], [slot(14, 10, limit=500, prompt=5)], [idle(14, 29)], [slot(15, 1)]
    tokens = seen(*looks, **many).tokens
    assert tokens is not None
    assert 25 <= tokens < 100


def test_a_task_that_was_never_seen_has_no_more_tokens_than_its_limit() -> None:
    many = {"tasks": 9, "at_once": 1, "own": [14], "age_s": 0.001}
    ended = {**idle(15, 9000), "params": {"n_predict": 20, "stream": False}}
    tokens = seen([slot(14, 10, limit=20)], [slot(14, 10, limit=20)], [ended], **many).tokens
    assert tokens is not None
    assert 40 <= tokens <= 60


def test_what_ran_while_its_tasks_were_not_found_counts_too() -> None:
    ended: list[Generated] = []
    watch = GenerationWatch(GivenUp(100, 0.0, 1.0), ended.append)
    for now_s, decoded, assigned in ((10.0, 0, []), (12.0, 200, [7]), (12.2, 220, [])):
        watch.look([slot(7, decoded, limit=10_000)], now_s, assigned)
    watch.end()
    tokens = ended[0].tokens
    assert tokens is not None
    assert abs(tokens - (3 * 100 * 1.12 + 20 + 105)) < 1


def test_tasks_too_short_to_be_seen_twice_are_counted_by_their_pace() -> None:
    many = {"tasks": 1000, "at_once": 1, "own": [100], "age_s": 2.0, "limit": 40}
    looks = [[slot(number, 20, 0, 40)] for number in (100, 110, 170)]
    generated = seen(*looks, [idle(200, 45, 0)], **many)
    assert generated.tokens is not None
    assert 2.0 * 38 * 40 <= generated.tokens - 100 * 40 * 1.12 <= 2.0 * 60 * 40
