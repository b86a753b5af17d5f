"""A quick look at JSON text: whether members of some names can be in it at all. Never wrong if it says that none is.

A name in a request body is either spelt as it is, between two quotes, or with an escape of a sign. A body without
both has no such member, whatever else is in it; that clears most bodies at the speed of a search.
"""

import re
from collections.abc import Sequence

_SPACE = rb"[ \t\r\n]*"
_ESCAPE = b"\\u00"
_ESCAPED_SIGN = re.compile(rb"\\u00(?:[4-7][0-9A-Fa-f]|3[Aa])")  # a letter, an underscore, or a colon
_ADDRESS = rb"[hH][tT][tT][pP]|[fF][iI][lL][eE]:"
_ADDRESS_STARTS = (b"http", b"file")
_FEW_QUOTES = 48  # up to so many a jump from quote to quote takes less time than a search for each name
_SMALL_BYTES = 2048
OVERLAP_BYTES = 32  # of two parts of one text: no name with its quotes and no escape is longer


class MemberScreen:
    """Looks for members of any type with one of `names`, and for lists with one of `lists`.

    With `addresses` it also looks for strings that begin as an address of a host or of a file does. A text with more
    than `max_depth` opening brackets, also in strings, may be nested deeper than that.
    """

    __slots__ = ("_addresses", "_names", "_search", "max_depth")

    def __init__(
        self, names: Sequence[str], lists: Sequence[str], *, addresses: bool = False, max_depth: int | None = None
    ) -> None:
        """The names are of ASCII letters and underscores, and at most 24 characters long."""
        spelt = [name.encode() for name in names]
        listed = [name.encode() for name in lists]
        # At the end of the text it is not known what follows.
        after = _SPACE + rb"(?:\Z|:" + _SPACE + rb"(?:\Z|\[))"
        kinds = [b'(?:%b)"' % b"|".join(spelt)] if spelt else []
        kinds += [b'(?:%b)"%b' % (b"|".join(listed), after)] if listed else []
        kinds += [_ADDRESS] if addresses else []
        initials = {name[:1] for name in spelt + listed} | ({b"h", b"H", b"f", b"F"} if addresses else set())
        # The engine finds a quote fast, and gives up at once after most of them.
        pattern = rb'"(?=[%b])(?:%b)' % (b"".join(sorted(initials)), b"|".join(kinds))
        self._search = re.compile(pattern).search if kinds else None
        self._names = frozenset(spelt) | frozenset(listed)
        self._addresses = _ADDRESS_STARTS if addresses else ()
        self.max_depth = max_depth

    def may_have(self, text: bytes) -> bool:
        """Whether such a member or address may be in the text, or begin in it."""
        if self._search is None or (len(text) > _SMALL_BYTES and self._has_no_name(text)):
            return False
        if self._search(text) is not None:
            return True
        # `in` takes three times as long as `find`: it tries the operand as a number first.
        return text.find(_ESCAPE) >= 0 and _ESCAPED_SIGN.search(text) is not None

    def is_suspect(self, text: bytes) -> bool:
        """Whether a whole body may have such a member or address, or be nested too deeply."""
        depth = self.max_depth
        if depth is not None and len(text) > depth and brackets(text, depth) > depth:
            return True
        return self.may_have(text)

    def _has_no_name(self, text: bytes) -> bool:
        """Whether there are so few quotes that a look between any two neighbours shows that none of the names is there.

        Most large bodies are a few long strings.
        """
        if b"\\" in text and _ESCAPE in text:
            return False
        find, names = text.find, self._names
        start = find(b'"') + 1
        for _ in range(_FEW_QUOTES):
            end = find(b'"', start) if start else -1
            if self._addresses and start and text[start : start + 4].lower() in self._addresses:
                return False
            if end < 0:
                return True
            if end - start < OVERLAP_BYTES and text[start:end] in names:
                return False
            start = end + 1
        return False


def brackets(text: bytes, most: int) -> int:
    """Return how many lists and objects may begin in a text; with more than `most`, some number above that.

    Most texts have few, and a jump from one to the next takes much less time than a count.
    """
    found, find = 0, text.find
    for bracket in (b"[", b"{"):
        at = find(bracket)
        while at >= 0 and found <= most:
            found += 1
            at = find(bracket, at + 1)
    return found
