"""How many slots of llama-server a request keeps busy, as its body says.

llama-server makes a task of each choice (`n_cmpl`, or `n` if that is missing or null) of each prompt, of each text to
embed, and of each document to rank. Each task takes a slot. Which member counts on which route was seen on the real
llama-server, and tests/e2e/test_slot_demand.py holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from config.member_rules import RULES as MEMBER_RULES
from config.settings import MOST_TASKS
from core.errors import BATCH_TOO_LARGE, TOO_MANY_CHOICES, GatewayError
from http1.json_members import JsonType, Member, Members, NameTable

# Every member of a body that some part of the gateway reads.
MEMBERS = NameTable(
    (
        "model",
        "stream",
        "n",
        "n_cmpl",
        "prompt",
        "input",
        "content",
        "documents",
        "texts",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n_predict",
        "id_slot",
        "cache_prompt",
        *(name for rule in MEMBER_RULES for name in rule.members),
    )
)

_CHOICES = ("n_cmpl", "n")
_FIELDS = "response_fields"  # the response may have no report then: what the body allows must be known
_MOST = 1 << 20  # choices, so that any number can be counted; more than any request may have
_INT32 = 1 << 31  # llama-server takes the low 32 bits of a number beyond
Found = Mapping[str, Member]


class SlotDemand(NamedTuple):
    """What a request takes: `slots`, or all if there are fewer. A batch counts as one against a key's `parallel`."""

    slots: int = 1
    is_batch: bool = False


ONE_SLOT = SlotDemand()


@dataclass(frozen=True)
class DemandRule:
    """What decides on one route. The longest list of `lists` that the body has counts, each of its elements a task."""

    choices: bool = True  # the members for choices count
    lists: tuple[str, ...] = ()
    is_batch: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The members for which a body is read, whatever their type is."""
        return (*_CHOICES, _FIELDS) if self.choices else ()

    def demand(self, found: Found) -> SlotDemand:
        """Return what a body with these members takes."""
        choices = choices_of(found) if self.choices else 1
        tasks = choices * max((length_of(found, name) for name in self.lists), default=1)
        return SlotDemand(tasks, self.is_batch) if tasks > 1 else ONE_SLOT


CHOICES = DemandRule()
PROMPTS = DemandRule(lists=("prompt",))
EMBEDDINGS = DemandRule(choices=False, lists=("input", "content"), is_batch=True)
DOCUMENTS = DemandRule(choices=False, lists=("documents", "texts"), is_batch=True)
# Of a route that is not known: each member that counts on some route may count there.
ANY_MEMBER = DemandRule(lists=("prompt", "input", "content", "documents", "texts"))
_RULES = (
    ("/completions", PROMPTS),
    ("/completion", PROMPTS),
    ("/embeddings", EMBEDDINGS),
    ("/embedding", EMBEDDINGS),
    ("/rerank", DOCUMENTS),
    ("/reranking", DOCUMENTS),
    ("/chat/completions", CHOICES),
    ("/responses", CHOICES),
    ("/infill", CHOICES),
    ("/audio/transcriptions", CHOICES),
)
RULES: Mapping[str, DemandRule] = {version + path: rule for path, rule in _RULES for version in ("", "/v1")}


def choices_of(found: Found) -> int:
    """Return how many choices a request asks for, at least 1. llama-server refuses a number below, and any text.

    Of a number that has more than 32 bits it takes the lower ones. Such a number counts as the highest.
    """
    for name in _CHOICES:
        member = found.get(name)
        if member is not None and member.type is not JsonType.NULL:
            value = member.value
            if not isinstance(value, bool | int | float):
                return 1
            return _MOST if abs(value) >= _INT32 else int(min(max(value, 1), _MOST))
    return 1


def length_of(found: Found, name: str) -> int:
    """Return how many tasks a member stands for: 1 if it is no list, or if it is the tokens of one prompt."""
    member = found.get(name)
    if member is None or member.type is not JsonType.LIST or member.has_numbers:
        return 1
    return min(max(member.length, 1), _MOST)


def asks_for_stream(members: Members) -> bool:
    """Whether a body has `"stream": true`."""
    member = members.found.get("stream")
    return member is not None and member.value is True


def check_parallel(demand: SlotDemand, parallel: int | None) -> None:
    """Raise TOO_MANY_CHOICES if a request needs more slots than its key may ever have at once."""
    if parallel is not None and demand.slots > parallel and not demand.is_batch:
        asked = f"This request asks for {_number(demand)} choices (n, n_cmpl, prompts)"
        allowed = "1 is allowed at once" if parallel == 1 else f"{parallel} are allowed at once"
        raise GatewayError(TOO_MANY_CHOICES, f"{asked}, but for this API key at most {allowed} (parallel).")


def check_batch(demand: SlotDemand, most: int) -> None:
    """Raise BATCH_TOO_LARGE if a request has more tasks than any may have: each takes llama-server memory and time."""
    if demand.slots > most:
        asked = f"This request has {_number(demand)} prompts or choices, texts or documents"
        allowed = "1 is allowed" if most == 1 else f"{most} are allowed"
        raise GatewayError(BATCH_TOO_LARGE, f"{asked}; at most {allowed} (MAX_BATCH_SIZE).")


def _number(demand: SlotDemand) -> str:
    """Return how many tasks an error names. Beyond MOST_TASKS they may not have been counted."""
    return str(demand.slots) if demand.slots <= MOST_TASKS else f"more than {MOST_TASKS}"
