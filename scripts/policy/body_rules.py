"""Which bodies may go to llama-server: how deeply nested, and with which members (see config.member_rules)."""

import json
import re
from collections.abc import Sequence
from itertools import accumulate

from config.member_rules import RULES, Bound, Bounds, Measure, MemberRule, parse_rules
from core.errors import BODY_TOO_DEEP, MEMBER_NOT_ALLOWED, GatewayError
from http1.json_members import JsonType, Member, Members
from http1.member_screen import MemberScreen
from policy.slot_demand import DemandRule

MAX_DEPTH = 100
_MAX_PARENTHESES = 100
_MAX_SCHEMA_DEPTH = 64
_ELEMENT_BYTES = 256
_CHARACTER_BYTES = 12  # in JSON, at most: two escapes of six
_BYTES = bytes(range(256))
_STEPS = {**dict.fromkeys(b"([{", 1), **dict.fromkeys(b")]}", -1)}
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_HOST = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?(?:[/?#]|\Z)", re.IGNORECASE)
_NO_HOSTS = "llama-server may not fetch from the address of an image, audio or video; send a data: URL."
# The same whatever is wrong: an address without a clear host is only known to have none (see http1.media_urls).
_LISTED_HOSTS = (
    "Images, audio and video may come from listed hosts only, and an address may have no @ and at most 2048 characters;"
    " a data: URL always works."
)

Pieces = Sequence[bytes | bytearray]


class BodyRules:
    """The rules in force: one screen for each route's rule of slots, and what is checked if it finds something."""

    def __init__(self, bounds: Bounds | None = None, max_depth: int = MAX_DEPTH) -> None:
        """`bounds` has the bound of each rule by its name; None: the defaults."""
        bounds = parse_rules("") if bounds is None else bounds
        self.max_depth = max_depth
        self._rules = tuple((rule, bounds[rule.name]) for rule in RULES if not bounds[rule.name].allows_all)
        self.looks_for_media = any(rule.measure is Measure.HOSTS for rule, _ in self._rules)
        self._names = tuple(
            name for rule, _ in self._rules if rule.measure is not Measure.HOSTS for name in rule.members
        )

    def screen(self, demand: DemandRule | None) -> MemberScreen:
        """Return what looks for members that matter on a route with this rule of slots."""
        names, lists = (demand.names, demand.lists) if demand is not None else ((), ())
        return MemberScreen((*names, *self._names), lists, addresses=self.looks_for_media, max_depth=self.max_depth)

    def check(self, members: Members, pieces: Pieces) -> None:
        """Raise BODY_TOO_DEEP or MEMBER_NOT_ALLOWED for a body with these members."""
        if members.depth > self.max_depth:
            limit = f"The request body is nested deeper than {self.max_depth} levels (MAX_JSON_DEPTH)."
            raise GatewayError(BODY_TOO_DEEP, limit)
        for rule, bound in self._rules:
            if rule.measure is Measure.HOSTS:
                _check_hosts(members, bound)
                continue  # the rule's name is no member's
            for name in rule.members:
                member = members.found.get(name)
                if member is not None:
                    _check_member(name, rule, bound, member, pieces)


def _check_hosts(members: Members, bound: Bound) -> None:
    for url in members.urls:
        match = _HOST.match(url)
        if match is None or match[1].lower() not in bound.hosts:
            message = _LISTED_HOSTS if bound.hosts else _NO_HOSTS
            raise GatewayError(MEMBER_NOT_ALLOWED, f"{message} (media_urls in MEMBER_RULES)")
    if members.has_more_urls:
        message = "The addresses of images, audio and video are of too many hosts and ports."
        raise GatewayError(MEMBER_NOT_ALLOWED, f"{message} (media_urls in MEMBER_RULES)")


def _check_member(name: str, rule: MemberRule, bound: Bound, member: Member, pieces: Pieces) -> None:
    if is_empty(member):
        return
    if bound.most == 0:
        raise GatewayError(MEMBER_NOT_ALLOWED, f"The member {name} is not allowed ({rule.name} in MEMBER_RULES).")
    excess = _EXCESS[rule.measure](member, bound.most or 0, pieces)
    if excess:
        message = f"The member {name} exceeds its limit: {excess} ({rule.name} in MEMBER_RULES)."
        raise GatewayError(MEMBER_NOT_ALLOWED, message)


def is_empty(member: Member) -> bool:
    """Whether a member says as much as none: null, false, an empty string or an empty list."""
    if member.type is JsonType.LIST:
        return member.length == 0
    return member.type is JsonType.NULL or member.value is False or member.value == ""


# --- What exceeds a bound: the limit, or "" ---


def _number(member: Member, most: int, pieces: Pieces) -> str:
    if member.type is not JsonType.NUMBER:
        return ""
    value = member.value
    is_within = isinstance(value, int | float) and 0 <= value <= most
    return "" if is_within else f"at most {most}"


def _elements(member: Member, most: int, pieces: Pieces) -> str:
    if member.length > most:
        return f"at most {most} elements"
    most_bytes = most * _ELEMENT_BYTES
    return "" if member.size_bytes <= most_bytes else f"at most {most_bytes} bytes"


def _names(member: Member, most: int, pieces: Pieces) -> str:
    """As for other lists, but of a string each character names one, too."""
    if member.type is not JsonType.STRING:
        return _elements(member, most, pieces)
    is_longer = member.size_bytes > most * _CHARACTER_BYTES + 2 or len(_text(member, pieces)) > most
    return f"at most {most} characters" if is_longer else ""


def _bytes(member: Member, most: int, pieces: Pieces) -> str:
    return "" if member.size_bytes <= most else f"at most {most} bytes"


def _grammar(member: Member, most: int, pieces: Pieces) -> str:
    excess = _bytes(member, most, pieces)
    if excess or member.type is not JsonType.STRING:
        return excess
    depth = _depth(_text(member, pieces).encode(errors="replace"), b"()")
    return f"at most {_MAX_PARENTHESES} levels of parentheses" if depth > _MAX_PARENTHESES else ""


def _schema(member: Member, most: int, pieces: Pieces) -> str:
    excess = _bytes(member, most, pieces)
    if excess or member.type is not JsonType.OBJECT:
        return excess
    depth = _depth(_STRING.sub(b"", _spelling(member, pieces)), b"[]{}")
    return f"at most {_MAX_SCHEMA_DEPTH} levels" if depth > _MAX_SCHEMA_DEPTH else ""


_EXCESS = {  # of what can be bounded; a rule of presence refuses or allows all
    Measure.NUMBER: _number,
    Measure.ELEMENTS: _elements,
    Measure.NAMES: _names,
    Measure.BYTES: _bytes,
    Measure.GRAMMAR: _grammar,
    Measure.SCHEMA: _schema,
}


def _depth(text: bytes, brackets: bytes) -> int:
    """Return how deeply these brackets are nested. All other requests wait meanwhile, so no line runs for each."""
    signs = text.translate(None, _BYTES.translate(None, brackets))
    return max(accumulate(map(_STEPS.__getitem__, signs)), default=0)


def _text(member: Member, pieces: Pieces) -> str:
    """Return a string's value; as it is spelt if that is not JSON, which llama-server refuses."""
    if isinstance(member.value, str):
        return member.value
    spelling = _spelling(member, pieces)
    try:
        return str(json.loads(spelling, strict=False))
    except ValueError:
        return spelling.decode("latin-1")


def _spelling(member: Member, pieces: Pieces) -> bytes:
    """Return a value as it is spelt in the body."""
    assert member.start is not None  # its value does not say all
    parts, at = [], 0
    end = member.start + member.size_bytes
    for piece in pieces:
        if at < end and at + len(piece) > member.start:
            parts.append(bytes(piece[max(0, member.start - at) : end - at]))
        at += len(piece)
    return b"".join(parts)
