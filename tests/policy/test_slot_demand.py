"""How many slots a body takes, on which route."""

import json

import pytest

from core.errors import BATCH_TOO_LARGE, TOO_MANY_CHOICES, GatewayError
from http1.json_members import MemberReader
from policy.body_rules import BodyRules
from policy.routes import TABLE, Routes
from policy.slot_demand import (
    CHOICES,
    DOCUMENTS,
    EMBEDDINGS,
    MEMBERS,
    ONE_SLOT,
    PROMPTS,
    DemandRule,
    SlotDemand,
    asks_for_stream,
    check_batch,
    check_parallel,
)


def demand(rule: DemandRule, body: object) -> SlotDemand:
    reader = MemberReader(MEMBERS)
    reader.feed(json.dumps(body).encode())
    while reader.step():
        pass
    return rule.demand(reader.end().found)


@pytest.mark.parametrize(
    ("rule", "body", "slots"),
    [
        (CHOICES, {}, 1),
        (CHOICES, {"n": 3}, 3),
        (CHOICES, {"n_cmpl": 3}, 3),
        (CHOICES, {"n_cmpl": 3, "n": 2}, 3),
        (CHOICES, {"n_cmpl": None, "n": 2}, 2),
        (CHOICES, {"n": 3.7}, 3),
        (CHOICES, {"n": True}, 1),
        (CHOICES, {"n": 0}, 1),
        (CHOICES, {"n": -4}, 1),
        (CHOICES, {"n": "4"}, 1),
        (CHOICES, {"n_cmpl": "4", "n": 4}, 1),
        (CHOICES, {"n": [4]}, 1),
        (CHOICES, {"n": 10**30}, 1 << 20),
        (CHOICES, {"n": 4 - 2**32}, 1 << 20),
        (CHOICES, {"n": 2**64 - 4}, 1 << 20),
        (CHOICES, {"n": -1e300}, 1 << 20),
        (CHOICES, {"prompt": ["a", "b"]}, 1),
        (CHOICES, {"extra": {"n": 4}}, 1),
        (PROMPTS, {"prompt": "a"}, 1),
        (PROMPTS, {"prompt": ["a", "b", "c"]}, 3),
        (PROMPTS, {"prompt": ["a", "b"], "n": 2}, 4),
        (PROMPTS, {"prompt": [1, 2, 3]}, 1),
        (PROMPTS, {"prompt": ["a", 2]}, 1),
        (PROMPTS, {"prompt": [[1, 2], "a"]}, 2),
        (PROMPTS, {"prompt": []}, 1),
        (PROMPTS, {"prompt": {"prompt_string": "a"}, "n": 2}, 2),
        (EMBEDDINGS, {"input": ["a"] * 5}, 5),
        (EMBEDDINGS, {"content": ["a"] * 5}, 5),
        (EMBEDDINGS, {"input": "a", "n": 4}, 1),
        (EMBEDDINGS, {"input": [1, 2, 3]}, 1),
        (DOCUMENTS, {"documents": ["a"] * 5, "n": 4}, 5),
        (DOCUMENTS, {"documents": ["a"] * 2, "texts": ["a"] * 5}, 5),
    ],
)
def test_slots(rule: DemandRule, body: object, slots: int) -> None:
    assert demand(rule, body) == (SlotDemand(slots, rule.is_batch) if slots > 1 else ONE_SLOT)


def test_the_screen_lets_pass_what_a_rule_needs() -> None:
    rules = BodyRules()
    for rule, names in ((CHOICES, ("n", "n_cmpl")), (PROMPTS, ("n", "prompt")), (EMBEDDINGS, ("input", "content"))):
        for name in names:
            assert rules.screen(rule).brackets(json.dumps({name: ["x"]}).encode()) is None
    assert rules.screen(CHOICES).brackets(b'{"prompt": ["x"]}') == 2
    assert rules.screen(EMBEDDINGS).brackets(b'{"n": 4}') == 1


# Of all bodies; the bodies of the others may ask for several.
TAKES_ONE_SLOT = {"/v1/messages", "/v1/systemone"}


def test_a_route_that_takes_a_slot_has_a_rule_unless_one_is_all_that_it_takes() -> None:
    routes = Routes()
    without = {
        path for method, path, kind in TABLE if kind.slot and not routes.find(b"POST", path.encode()).demand_rule
    }
    different = ", ".join(sorted(without ^ TAKES_ONE_SLOT))
    assert not different, (
        f"Can one body take several slots of {different}? If so, add it to _RULES in scripts/policy/slot_demand.py; if "
        "not, list it in TAKES_ONE_SLOT in tests/policy/test_slot_demand.py."
    )
    assert routes.find(b"POST", b"/v1/completions").demand_rule is PROMPTS
    assert routes.find(b"POST", b"/tokenize").demand_rule is None


@pytest.mark.parametrize("parallel", [None, 3, 4])
def test_as_many_choices_as_the_key_may_have_at_once_are_accepted(parallel: int | None) -> None:
    check_parallel(SlotDemand(3), parallel)


@pytest.mark.parametrize(
    ("parallel", "allowed"),
    [(1, "at most 1 is allowed at once (parallel)."), (2, "at most 2 are allowed at once (parallel).")],
)
def test_more_choices_are_refused_and_the_sentence_says_how_many_are_allowed(parallel: int, allowed: str) -> None:
    with pytest.raises(GatewayError, match="asks for 3 choices") as caught:
        check_parallel(SlotDemand(3), parallel)
    assert caught.value.kind is TOO_MANY_CHOICES
    assert allowed in caught.value.message


def test_a_batch_counts_as_one_against_parallel() -> None:
    check_parallel(SlotDemand(1000, is_batch=True), 1)


@pytest.mark.parametrize("is_batch", [False, True])
def test_as_many_tasks_as_are_allowed_are_accepted(is_batch: bool) -> None:
    check_batch(SlotDemand(4, is_batch), 4)


@pytest.mark.parametrize(
    ("rule", "body", "most", "sentence"),
    [
        (PROMPTS, {"prompt": ["a"] * 5}, 4, "has 5 prompts or choices, texts or documents; at most 4 are allowed"),
        (PROMPTS, {"prompt": ["a"] * 3, "n": 2}, 4, "has 6 prompts"),
        (EMBEDDINGS, {"input": ["a"] * 2}, 1, "has 2 prompts or choices, texts or documents; at most 1 is allowed"),
        (DOCUMENTS, {"texts": ["a"] * 5}, 4, "has 5 prompts"),
        (CHOICES, {"n": 5}, 4, "has 5 prompts"),
        (CHOICES, {"n": 10**6}, 4, "has 1000000 prompts"),
        (CHOICES, {"n": 10**30}, 10**6, "has more than 1000000 prompts"),
    ],
)
def test_more_tasks_are_refused_and_the_sentence_says_how_many(
    rule: DemandRule, body: object, most: int, sentence: str
) -> None:
    with pytest.raises(GatewayError) as caught:
        check_batch(demand(rule, body), most)
    assert caught.value.kind is BATCH_TOO_LARGE
    assert sentence in caught.value.message
    assert caught.value.message.endswith("allowed (MAX_BATCH_SIZE).")


def test_a_number_that_is_not_counted_is_not_named() -> None:
    with pytest.raises(GatewayError, match="asks for more than 1000000 choices"):
        check_parallel(demand(CHOICES, {"n": 10**30}), 2)


@pytest.mark.parametrize(
    ("body", "asks"),
    [
        (b'{"stream": true}', True),
        (b'{"stream": false}', False),
        (b'{"stream": 1}', False),
        (b"{}", False),
        (b"x", False),
    ],
)
def test_a_body_asks_for_a_stream(body: bytes, asks: bool) -> None:
    reader = MemberReader(MEMBERS)
    reader.feed(body)
    while reader.step():
        pass
    assert asks_for_stream(reader.end()) is asks
