"""generation_watch.py: the tokens of a request that was given up, from what /slots lists."""

from typing import Any

import pytest

from backend.generation_watch import GenerationWatch


def slot(task: int, decoded: object, number: int = 0, limit: object = -1, *, stream: bool = False) -> dict[str, Any]:
    """Return a busy slot as llama-server lists it."""
    params = {"n_predict": limit, "stream": stream}
    return {"id": number, "id_task": task, "params": params, "next_token": [{"n_decoded": decoded}]}


def watched(
    *looks: list[dict[str, Any]], tasks: int = 1, age_s: float = 1.0, limit: int | None = None, own: int | None = None
) -> int | None:
    """Look at these slots, the second time after 0.2 s, later after 1.2 s each; return what is reported."""
    ended: list[int | None] = []
    watch = GenerationWatch(tasks, age_s, limit, own, ended.append)
    now_s = 10.0
    for busy in looks:
        watch.look(busy, now_s, set())
        now_s += 0.2 if now_s == 10.0 else 1.2
    watch.end()
    (generated,) = ended
    return generated


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
    ended: list[int | None] = []
    watches = [GenerationWatch(1, 1.0, None, None, ended.append) for _ in range(2)]
    for now_s, tokens in ((10.0, 100), (10.2, 120)):
        taken: set[int] = set()
        for watch in watches:
            taken |= watch.look([slot(1, tokens), slot(2, tokens, 1)], now_s, taken)
    for watch in watches:
        watch.end()
    assert ended == [225, 225]


@pytest.mark.parametrize("listed", [{}, {"next_token": []}, {"next_token": [{"n_decoded": "x"}], "params": 1}])
def test_slots_of_another_form_have_no_tokens(listed: dict[str, Any]) -> None:
    assert watched([{"id_task": 1, **listed}], [{"id_task": 1, **listed}]) == 0
    assert watched([{"id_task": "x", **listed}], [{"id_task": None, **listed}]) is None


def test_it_is_looked_at_at_once_and_soon_again() -> None:
    watch = GenerationWatch(1, 1.0, None, None, lambda _: None)
    assert watch.pause_s == 0
    watch.look([slot(1, 1)], 1.0, set())
    assert watch.pause_s == 0.2
    watch.look([slot(1, 1)], 1.0, set())  # at the same time
    assert watch.pause_s > 60
