"""The table of llama-server's request members that touch the machine or other requests, and the setting MEMBER_RULES.

Each row says what a body may ask for by default; MEMBER_RULES changes it. policy.body_rules applies the rows. What
llama-server does with each member was read in its source and seen on b11434.
"""

import enum
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_MAX_BOUND = (1 << 31) - 1
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


class Measure(enum.Enum):
    """What a bound counts; the value says it to an operator."""

    PRESENCE = "none"
    NUMBER = "the number; a negative one counts as unlimited"
    ELEMENTS = "elements; all together 256 bytes of JSON text times the bound"
    NAMES = "elements; all together 256 bytes of JSON text times the bound; or characters of a string"
    BYTES = "bytes of JSON text"
    GRAMMAR = "bytes of JSON text; besides, 100 levels of parentheses"
    SCHEMA = "bytes of JSON text; besides, 64 levels of nesting"
    HOSTS = "hosts, separated by |"


class Bound(NamedTuple):
    """What a rule allows: at most `most` (None: everything), or for HOSTS the hosts."""

    most: int | None = 0
    hosts: frozenset[str] = frozenset()

    @property
    def allows_all(self) -> bool:
        return self.most is None


ALLOW = Bound(None)
REFUSE = Bound(0)


class MemberRule(NamedTuple):
    """One row. `members` are all of llama-server's names for it; `default` is as in MEMBER_RULES."""

    name: str
    members: tuple[str, ...]
    measure: Measure
    default: str
    reason: str


def _rule(name: str, measure: Measure, default: str, reason: str, *aliases: str) -> MemberRule:
    return MemberRule(name, (name, *aliases), measure, default, reason)


_INTERNAL = "llama-server sets it itself for chat templates"
# fmt: off
RULES: tuple[MemberRule, ...] = (
    _rule("grammar_triggers", Measure.PRESENCE, "refuse",
          f"{_INTERNAL}; as a regular expression it can keep the one loop busy for all."),
    _rule("grammar_lazy", Measure.PRESENCE, "refuse", f"{_INTERNAL}; it has no use without triggers."),
    _rule("preserved_tokens", Measure.PRESENCE, "refuse", f"{_INTERNAL}."),
    _rule("chat_parser", Measure.PRESENCE, "refuse", f"{_INTERNAL}; it is a parser in an internal form."),
    _rule("grammar", Measure.GRAMMAR, "65536",
          "Its parser recurses for each parenthesis, and each token is checked against all that it allows."),
    _rule("json_schema", Measure.SCHEMA, "131072", "It is made into a grammar, by a function that recurses."),
    _rule("response_format", Measure.SCHEMA, "131072", "It contains a JSON schema."),
    _rule("repeat_last_n", Measure.NUMBER, "65536", "So much memory is taken at once: 4 bytes for each."),
    _rule("dry_penalty_last_n", Measure.NUMBER, "65536", "So many tokens are kept, and searched for each new one."),
    _rule("dry_sequence_breakers", Measure.ELEMENTS, "32", "For each the whole vocabulary is searched."),
    _rule("samplers", Measure.NAMES, "64", "Each runs for each token, also one that is named twice."),
    _rule("stop", Measure.ELEMENTS, "64", "Each is searched for after each token.", "stop_sequences"),
    _rule("logit_bias", Measure.BYTES, "65536", "Each entry is tokenized, and applied to each token."),
    _rule("n_probs", Measure.NUMBER, "100",
          "So many candidates are sorted and written for each token.", "logprobs", "top_logprobs"),
    _rule("media_urls", Measure.HOSTS, "refuse",
          "llama-server fetches images, audio and video from the machine's own network. data: URLs always pass. Unless"
          " all is allowed, file: URLs never do, nor do addresses with an @ or more than 2,048 characters."),
    _rule("lora", Measure.ELEMENTS, "allow", "Only adapters that the operator has loaded can be chosen."),
    _rule("id_slot", Measure.PRESENCE, "allow", "The request waits for that slot, and reads what its cache holds."),
    _rule("n_keep", Measure.NUMBER, "allow", "It only says what a context shift keeps of the request's own prompt."),
    _rule("max_tokens", Measure.NUMBER, "allow",
          "Without context shift, which is off by default, a response ends when its context is full.",
          "n_predict", "max_completion_tokens", "max_output_tokens"),
)
# fmt: on
BY_NAME: Mapping[str, MemberRule] = MappingProxyType({rule.name: rule for rule in RULES})
Bounds = Mapping[str, Bound]  # by the rule's name


def accepted() -> str:
    """Describe what MEMBER_RULES accepts."""
    return f"name=allow, name=refuse or name=BOUND, comma-separated; names: {', '.join(BY_NAME)}"


def parse_rules(text: str) -> Bounds:
    """Return the bound of every rule: the default, or what the text says. Raises ValueError."""
    given: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or name not in BY_NAME:
            raise ValueError(f"has an entry that is not NAME=RULE with a known name ({entry[:80]!a})")
        if name in given:
            raise ValueError(f"has {name} twice")
        given[name] = value
    return MappingProxyType({rule.name: _parse_bound(rule, given.get(rule.name, rule.default)) for rule in RULES})


def _parse_bound(rule: MemberRule, text: str) -> Bound:
    if text in ("allow", "refuse"):
        return ALLOW if text == "allow" else REFUSE
    if rule.measure is Measure.HOSTS:
        hosts = [host.strip().lower() for host in text.split("|")]
        if not all(map(_HOST.fullmatch, hosts)):
            raise ValueError(f"has neither allow, refuse nor host names for {rule.name}")
        return Bound(0, frozenset(hosts))
    if rule.measure is Measure.PRESENCE:
        raise ValueError(f"has neither allow nor refuse for {rule.name}")
    if not re.fullmatch("[0-9]{1,10}", text) or not 0 < int(text) <= _MAX_BOUND:
        raise ValueError(f"has neither allow, refuse nor a number from 1 to {_MAX_BOUND} for {rule.name}")
    return Bound(int(text))
