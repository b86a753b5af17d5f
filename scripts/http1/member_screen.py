"""A quick look at JSON text: whether members of some names can be in it at all. Never wrong if it says that none is.

A name in a request body is either spelt as it is, between two quotes, or with an escape of a sign. A body without
both has no such member, whatever else is in it; that clears most bodies at the speed of a search.
"""

import re
from collections.abc import Sequence

_SPACE = rb"[ \t\r\n]*"
_ESCAPED_SIGN = re.compile(rb"\\u00(?:[4-7][0-9A-Fa-f]|3[Aa])")  # a letter, an underscore, or a colon
_ADDRESS = rb"[hH][tT][tT][pP]|[fF][iI][lL][eE]:"
# How much is read before `find` looks for the next quote: in a long string that is fifty times as fast.
_WINDOW_BYTES = 1024
# Of two windows, and of two parts of one text: no name with its quotes is longer, and in one that is spelt with escapes
# the first escape ends before that.
OVERLAP_BYTES = 32


class MemberScreen:
    """Looks for members of any type with one of `names`, and for lists with one of `lists`.

    With `addresses` it also looks for strings that begin as an address of a host or of a file does. A text with more
    than `max_depth` opening brackets, also in strings, may be nested deeper than that.
    """

    __slots__ = ("_search", "max_depth")

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
        self.max_depth = max_depth

    def may_have(self, text: bytes) -> bool:
        """Whether such a member or address may be in the text, or begin in it."""
        search, find = self._search, text.find
        if search is None:
            return False
        at = 0
        while at >= 0:
            end = at + _WINDOW_BYTES
            window_ends = end + OVERLAP_BYTES
            if search(text, at, window_ends) is not None:
                return True
            # An escape in a long string, which no window reaches, is not in a name. Most windows have no backslash.
            if find(b"\\", at, window_ends) >= 0 and _ESCAPED_SIGN.search(text, at, window_ends) is not None:
                return True
            at = find(b'"', end)
        return False

    def is_suspect(self, text: bytes) -> bool:
        """Whether a whole body may have such a member or address, or be nested too deeply."""
        depth, size, search = self.max_depth, len(text), self._search
        if depth is not None and size > depth and brackets(text, depth) > depth:
            return True
        if search is None or size > _WINDOW_BYTES or text.find(b"\\") >= 0:
            return self.may_have(text)
        return search(text) is not None  # the same for a short text without escapes, as most are


def brackets(text: bytes, most: int) -> int:
    """Return how many lists and objects may begin in a text; with more than `most`, some number above that.

    Most texts have few, and a jump from one to the next takes much less time than a count.
    """
    if len(text) <= _WINDOW_BYTES:
        return len(text) - len(text.translate(None, b"[{"))
    found, find = 0, text.find
    for bracket in (b"[", b"{"):
        at = find(bracket)
        while at >= 0 and found <= most:
            found += 1
            at = find(bracket, at + 1)
    return found
