"""A quick look at JSON text: whether members of some names can be in it at all. Never wrong if it says that none is.

A name in a request body is either spelt as it is, between two quotes, or with an escape of a sign. A body without
both has no such member, whatever else is in it; that clears most bodies at the speed of a search.
"""

import re
from collections.abc import Sequence
from math import inf

_SPACE = rb"[ \t\r\n]*"
_ESCAPED_SIGN = re.compile(rb"\\u00(?:[4-7][0-9A-Fa-f]|3[Aa])")  # a letter, an underscore, or a colon
_NONE = rb"\A(?!)"  # matches nothing
_ADDRESSES = [b"ht[tT][pP]", b"hT[tT][pP]", b"Ht[tT][pP]", b"HT[tT][pP]"]
_ADDRESSES += [b"fi[lL][eE]:", b"fI[lL][eE]:", b"Fi[lL][eE]:", b"FI[lL][eE]:"]
_BACKSLASH = ord("\\")
_SHORT_BYTES = 1024
# How much is kept after a quote of a longer text, at first. As long as quotes are near, it is twice as much each time.
_LEAST_BYTES = 128
_MOST_BYTES = 4096
# Of what is kept, and of two parts of one text: no name with its quotes is longer, and in one that is spelt with
# escapes the first escape ends before that.
OVERLAP_BYTES = 32
_OUTSIDE_STRINGS = b" \t\r\n[]{},:+-.0123456789Eaeflnrstu"  # all that JSON has there
_SAMPLE_BYTES = 64  # of a text without quotes: as a rule enough to see that it is a string's


class MemberScreen:
    """Looks for members of any type with one of `names`, and for lists with one of `lists`.

    With `addresses` it also looks for strings that begin as an address of a host or of a file does. A text with more
    than `most_brackets`, which are `max_depth`, may be nested deeper than that.
    """

    __slots__ = ("_search", "_search_escape", "most_brackets")

    def __init__(
        self, names: Sequence[str], lists: Sequence[str], *, addresses: bool = False, max_depth: int | None = None
    ) -> None:
        """The names are of ASCII letters and underscores, and at most 24 characters long."""
        # At the end of the text it is not known what follows.
        after = _SPACE + rb"(?:\Z|:" + _SPACE + rb"(?:\Z|\[))"
        terms = [b'%b"' % name.encode() for name in names] + [b'%b"%b' % (name.encode(), after) for name in lists]
        terms += _ADDRESSES if addresses else []
        self._search = re.compile(_any_of(terms) if terms else _NONE).search
        self._search_escape = (_ESCAPED_SIGN if terms else re.compile(_NONE)).search
        self.most_brackets = inf if max_depth is None else max_depth

    def brackets(self, text: bytes | bytearray) -> int | None:
        """Return how many lists and objects may begin in a text; None if a member or an address may begin in it.

        Of more than `most_brackets` not all are counted. Those in strings count too, except in a long one's middle.
        """
        text = shortened(text)
        return None if self._matches(text) else _brackets(text, self.most_brackets)

    def may_have(self, text: bytes | bytearray) -> bool:
        """Whether such a member or address may begin in a text."""
        return self._matches(shortened(text))

    def is_suspect(self, text: bytes | bytearray) -> bool:
        """Whether a whole body may have such a member or address, or be nested too deeply."""
        most = self.most_brackets
        if len(text) > _SHORT_BYTES:  # most are not: a call less
            text = shortened(text)
        return self._matches(text) or (len(text) > most and _brackets(text, most) > most)

    def _matches(self, text: bytes | bytearray) -> bool:
        # Most texts have no backslash.
        return self._search(text) is not None or (_BACKSLASH in text and self._search_escape(text) is not None)


def shortened(text: bytes | bytearray) -> bytes | bytearray:
    """Return a long text without the middle of its long strings, in which is no name and no bracket that nests.

    The pieces of a text may be shortened one by one: what is left of them makes the whole one's names and brackets. To
    find the next quote takes a fiftieth of the time that it takes to look at each sign.
    """
    find, size = text.find, len(text)
    parts: list[bytes | bytearray] = []
    begin, end, width = 0, _LEAST_BYTES, _LEAST_BYTES
    while end < size:
        quote = find(b'"', end)
        if quote < 0:
            quote = size
        if quote < end + width:
            width = min(2 * width, _MOST_BYTES)
        # What has no quote, and a sign that JSON has in strings only, is in a string, or llama-server refuses it.
        elif text[end : end + _SAMPLE_BYTES].strip(_OUTSIDE_STRINGS):
            parts.append(text[begin : end + OVERLAP_BYTES])
            begin, width = quote, _LEAST_BYTES
        end = quote + width
    parts.append(text[begin:])
    return b"".join(parts)


def _brackets(text: bytes | bytearray, most: float) -> int:
    """Return how many brackets a text has that begin a list or an object; of more than `most` not all are counted.

    Most long texts have few, and a jump from one to the next takes much less time than to look at each sign.
    """
    if len(text) <= _SHORT_BYTES:
        return text.count(b"[") + text.count(b"{")
    found, find = 0, text.find
    for bracket in (b"[", b"{"):
        at = find(bracket)
        while at >= 0 and found <= most:
            found += 1
            at = find(bracket, at + 1)
    return found


def _any_of(terms: Sequence[bytes]) -> bytes:
    """Return an expression for a quote and one of the terms. Each is an expression too, after its first two signs.

    The engine tries it at each quote, and must leave most of them fast: the first sign is one set, and what follows is
    tried by its second one.
    """
    by_second: dict[bytes, list[bytes]] = {}
    for term in terms:
        by_second.setdefault(term[1:2], []).append(term)
    rests = []
    for second, those in by_second.items():
        firsts = b"".join({term[:1] for term in those})
        rests.append(b"%b(?<=[%b]%b)(?:%b)" % (second, firsts, second, b"|".join([term[2:] for term in those])))
    return b'"[%b](?:%b)' % (b"".join({term[:1] for term in terms}), b"|".join(rests))
