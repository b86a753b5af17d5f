"""What a request body says about the tokens to generate, and the limit of a key that is added to it."""

from collections.abc import Mapping
from typing import NamedTuple

from core.errors import TOO_MANY_TOKENS_ASKED, GatewayError
from http1.json_members import JsonType, Member, Members
from policy.routes import Route
from policy.slot_demand import choices_of, length_of

_MAX_NUMBER = 1 << 40  # so that any number can be counted
# In /v1/responses llama-server looks for this after the API's own member.
_FALLBACK = "max_tokens"
_STOPS = frozenset(("stop", "stop_sequences"))


class TokensAsked(NamedTuple):
    """How many answers a request asks for, and of how many tokens each.

    `max_tokens` is None without a limit. `member` is the member with the limit (`is_named`), or the one in which the
    gateway would add its own; it is empty if the route has none, or if the backend will refuse the value.
    `prompt_bytes` is the size of the prompts as they are spelt, 0 if they are not in one member. `has_stop`: it names
    stop words.
    """

    choices: int = 1
    prompts: int = 1
    max_tokens: int | None = None
    member: str = ""
    is_named: bool = False
    prompt_bytes: int = 0
    has_stop: bool = False

    @property
    def answers(self) -> int:
        return self.choices * self.prompts


ONE_ANSWER = TokensAsked()


def tokens_asked(route: Route, members: Members) -> TokensAsked:
    """Return what a body asks for on a route."""
    found, rule = members.found, route.demand_rule
    if not route.generates:
        return ONE_ANSWER
    choices = choices_of(found) if rule is not None else 1
    has_stop = not _STOPS.isdisjoint(found)
    if rule is None or "prompt" not in rule.lists:
        return TokensAsked(choices, 1, *_limit_asked(route, found), has_stop=has_stop)
    prompt = found.get("prompt")
    return TokensAsked(
        choices,
        length_of(found, "prompt"),
        *_limit_asked(route, found),
        prompt_bytes=0 if prompt is None else prompt.size_bytes,
        has_stop=has_stop,
    )


def _limit_asked(route: Route, found: Mapping[str, Member]) -> tuple[int | None, str, bool]:
    """Return the limit that counts, its member, and whether it is named. A negative one is none, as in llama-server."""
    for name in route.limit_members:
        member = found.get(name)
        if member is None or member.type is JsonType.NULL:
            continue
        number = _whole(member)
        if number is None:
            return None, "", False
        return (None, name, False) if number < 0 else (max(number, 1), name, True)
    fallback = found.get(_FALLBACK)
    if fallback is not None and _FALLBACK not in route.limit_members and route.limit_members:
        number = _whole(fallback)
        return (None if number is None or number < 0 else max(number, 1)), route.limit_member, False
    return None, route.limit_member, False


def _whole(member: Member) -> int | None:
    """Return a number without its fraction, as llama-server reads it; None if the value is no number."""
    value = member.value
    if not isinstance(value, bool | int | float) or value != value:  # noqa: PLR0124 - NaN is no number
        return None
    return int(min(max(value, -1), _MAX_NUMBER))


def limit_tokens(asked: TokensAsked, cap: int) -> TokensAsked:
    """Return what is asked for under a key's limit. Raises TOO_MANY_TOKENS_ASKED if the body asks for more."""
    if asked.max_tokens is not None and asked.max_tokens > cap:
        message = f"This request asks for {asked.max_tokens} tokens ({asked.member})"
        raise GatewayError(TOO_MANY_TOKENS_ASKED, f"{message}, but for this API key at most {cap} are allowed.")
    return asked._replace(max_tokens=asked.max_tokens or cap)
