"""Addresses of images, audio and video in JSON text, that llama-server would fetch: bytes in, addresses out, no I/O.

Each API nests them differently, so they are found by names alone, however deeply nested and however spelt: a member
`image_url` that is an address, or `url` and `data` if the body has an object in which one of these is an address of
media. In a string every quote is escaped, so a name with its quotes, a colon and a quote are a member.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from json import JSONDecoder

from http1.member_screen import MemberScreen

_OBJECTS = ("image_url", "audio_url", "video_url", "input_audio", "input_video", "source")
_NAMES = frozenset((*_OBJECTS, "file_url"))
_NAMES_INSIDE = frozenset(("url", "data"))
_MAX_SIGNS = 2048  # of an address, after its first four; it is longer with escapes
_SIGN = rb'(?:[^"\\]|\\(?:[^u]|u.{4}))'
# What is tried at a quote is bounded: a name has few signs, and most values are left at their first one.
_NAME = rb"(?:[a-z_]|\\u00[567][0-9A-Fa-f]){3,11}"
_START = (
    rb"(?:[hHfF]|\\u00[46][68])(?:[tTiI]|\\u00(?:[57]4|[46]9))"
    rb"(?:[tTlL]|\\u00(?:[57]4|[46][cC]))(?:[pPeE]|\\u00(?:[57]0|[46]5))"
)
# A value whose end is missing may be torn: it is found with the bytes that follow.
_MEMBER = re.compile(
    rb'"(?<=[{,]")(%b)":"(?:(%b%b{0,%d})"|(%b%b{%d}))'
    % (_NAME, _START, _SIGN, _MAX_SIGNS, _START, _SIGN, _MAX_SIGNS + 1),
    re.DOTALL,
)
# A name with an escape may be any.
_OBJECT = re.compile(rb'"(?:%b)":\{|"[^"\\]{0,16}\\u00[^"]{0,80}":\{' % "|".join(_OBJECTS).encode())
_ORIGIN = re.compile(r"(?:http|file:)[^/?#]*(?://[^/?#]*)?", re.IGNORECASE)  # of an address: scheme, host and port
_OVERLAP_BYTES = 512 + 6 * (_MAX_SIGNS + 1)
_MOST = 32  # origins of one body that are kept, each with its first address
_MEMBERS_AT_ONCE = 32  # each takes up to 40 microseconds
_UNCLEAR = "no address"
_SCREEN = MemberScreen((), (), addresses=True)
_DECODE = JSONDecoder(strict=False).raw_decode


class MediaUrls:
    """Finds the addresses in one body. `feed` takes its next bytes, once `step` has looked at all those before.

    `found` has one address of each origin, decoded; `has_more` is whether there are more origins than those. One with
    an `@`, or with more than _MAX_SIGNS, is there as "no address": llama-server takes what follows the first `@`, even
    behind the path, for the host.
    """

    __slots__ = ("_has_objects", "_inside", "_last", "_members", "_outside")

    def __init__(self) -> None:
        self._last = b""
        self._members: Iterator[re.Match[bytes]] = iter(())  # in what was fed
        self._has_objects = False
        self._inside: dict[str, str] = {}  # by origin, one more than _MOST at most
        self._outside: dict[str, str] = {}

    @property
    def found(self) -> tuple[str, ...]:
        return tuple(address for each in self._of_media for address in list(each.values())[:_MOST])

    @property
    def has_more(self) -> bool:
        return any(len(each) > _MOST for each in self._of_media)

    @property
    def _of_media(self) -> Sequence[Mapping[str, str]]:
        return (self._outside, self._inside) if self._has_objects else (self._outside,)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, 32 KiB at most. Blanks are left out: they may be between any two signs."""
        text = self._last + data.translate(None, b" \t\r\n")
        self._last = text[-_OVERLAP_BYTES:]
        self._has_objects = self._has_objects or _OBJECT.search(text) is not None
        if _SCREEN.may_have(text):
            self._members = _MEMBER.finditer(text)

    def step(self) -> bool:
        """Look at a number of members; return whether there may be more to look at."""
        members = list(islice(self._members, _MEMBERS_AT_ONCE))
        for name, whole, beginning in map(re.Match.groups, members):
            self._keep(_decoded(name), whole, beginning)
        return bool(members)

    def _keep(self, name: str, whole: bytes | None, beginning: bytes) -> None:
        """Keep an address, of which `whole` is None if it is too long."""
        kept = self._outside if name in _NAMES else self._inside if name in _NAMES_INSIDE else None
        if kept is None or len(kept) > _MOST:
            return
        address = _decoded(whole or beginning)
        origin = _ORIGIN.match(address)
        if origin is None:
            return
        if whole is None or "@" in address:
            kept[_UNCLEAR] = _UNCLEAR
        else:
            kept.setdefault(origin[0], address)


def _decoded(spelling: bytes) -> str:
    """Decode a string, whose end may be missing, in the middle of a character too."""
    try:
        text = spelling.decode()
    except ValueError:
        text = spelling.decode("latin-1")
    if "\\" not in text:  # most have none
        return text
    try:
        return str(_DECODE(f'"{text}"')[0])
    except ValueError:  # an escape that llama-server refuses, too
        return text
