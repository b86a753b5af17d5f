"""member_rules.py: the table of members, and the setting that changes it."""

import re

import pytest

from config.member_rules import ALLOW, BY_NAME, REFUSE, RULES, Bound, Measure, parse_rules
from policy.slot_demand import MEMBERS


def test_names_are_unique_and_the_body_reader_finds_them_all() -> None:
    assert len(BY_NAME) == len(RULES)
    members = [name for rule in RULES for name in rule.members]
    assert len(set(members)) == len(members)
    assert set(members) <= MEMBERS.names
    assert all(len(name) <= 24 and name.replace("_", "").isalpha() for name in members)  # the screen's limits


def test_every_default_is_accepted() -> None:
    bounds = parse_rules("")
    assert set(bounds) == set(BY_NAME)
    assert parse_rules(",".join(f"{rule.name}={rule.default}" for rule in RULES)) == bounds
    assert (bounds["grammar_triggers"], bounds["lora"], bounds["stop"]) == (REFUSE, ALLOW, Bound(64))


def test_entries_change_single_rows() -> None:
    bounds = parse_rules(" grammar_triggers=allow, repeat_last_n = 4096 ,,media_urls=Images.example|[::1]|10.0.0.1")
    assert bounds["grammar_triggers"].allows_all
    assert bounds["repeat_last_n"] == Bound(4096)
    assert bounds["media_urls"] == Bound(0, frozenset(("images.example", "[::1]", "10.0.0.1")))
    assert bounds["grammar_lazy"] == REFUSE


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("grammar_triggers", "has an entry that is not NAME=RULE with a known name ('grammar_triggers')"),
        ("seed=allow", "has an entry that is not NAME=RULE with a known name ('seed=allow')"),
        ("stop=3,stop=4", "has stop twice"),
        ("stop=0", "has neither allow, refuse nor a number from 1 to 2147483647 for stop"),
        ("stop=-1", "has neither allow, refuse nor a number from 1 to 2147483647 for stop"),
        ("stop=9999999999", "has neither allow, refuse nor a number from 1 to 2147483647 for stop"),
        ("grammar_lazy=3", "has neither allow nor refuse for grammar_lazy"),
        ("media_urls=http://a", "has neither allow, refuse nor host names for media_urls"),
        ("media_urls=", "has neither allow, refuse nor host names for media_urls"),
    ],
)
def test_wrong_entries_are_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        parse_rules(text)


def test_a_bound_is_possible_for_all_but_what_is_only_present() -> None:
    for rule in RULES:
        text = f"{rule.name}={'a.example' if rule.measure is Measure.HOSTS else 7}"
        if rule.measure is Measure.PRESENCE:
            with pytest.raises(ValueError, match="allow nor refuse"):
                parse_rules(text)
        else:
            assert not parse_rules(text)[rule.name].allows_all
