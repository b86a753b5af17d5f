"""The members of a JSON request body that the gateway needs, found in passing: bytes in, members out, no I/O.

The reader follows the root object's members and skips all other text with regular expressions, long strings with one
search for their end. It takes received bytes in any pieces, and each `step` does a bounded amount of work, so that a
body of any size and shape can be read in turns.

It finds what llama-server's parser (nlohmann::json) finds: a name may be spelt with escapes, the last of two equal
names counts, a byte order mark is skipped, and a NUL after the document ends it. It checks the structure, but neither
escapes nor UTF-8 nor numbers: llama-server refuses what is wrong there, so an error of that kind hides no member.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import NamedTuple

_STEP_COST = 8192  # of one step: bytes, of which each takes 100 to 200 nanoseconds in a run of small members
# Of one move, besides the bytes that it passes: it takes 2 to 6 microseconds. Small nested values, and lists whose
# names are the table's or escaped, need a move for each few bytes: that is 1,000 to 1,700 nanoseconds a byte.
_MOVE_COST = 64
_STRING_COST = 128  # of one move in a long string: most of them pass many bytes, by a fast search
_WINDOW_BYTES = 4096  # what one regular expression reads at most
_ESCAPED_BYTES = 1024  # what it reads at most of a long string, behind an escape
_SHORT_BYTES = 1024  # a longer name is none of the table's, and the value of a longer scalar is not kept

_SPACE = rb"[ \t\r\n]*"
# Longer ones are found by a search for their end. It takes the engine long to give up one that its window cuts.
_STRING = rb'"[^"\\]{0,1024}(?:\\.[^"\\]{0,1024}){0,96}"'
_NUMBER = rb"-?[0-9][0-9.eE+\-]{0,99}"
_SCALAR = rb"(?:" + _STRING + rb"|" + _NUMBER + rb"|true|false|null)"


def _or_flat(value: bytes) -> bytes:
    """Return the expression of `value`, or of a list or an object of such values."""
    space = _SPACE
    member = _STRING + space + b":" + space + value + space
    elements = rb"\[" + space + rb"(?:" + value + space + rb"(?:," + space + value + space + rb")*)?\]"
    members = rb"\{" + space + rb"(?:" + member + rb"(?:," + space + member + rb")*)?\}"
    return rb"(?:" + value[3:-1] + rb"|" + elements + rb"|" + members + rb")"


def _member(name: bytes, value: bytes) -> bytes:
    return _SPACE + name + _SPACE + b":" + _SPACE + value + _SPACE


_FLAT = _or_flat(_SCALAR)
# By how many levels of nesting a value may have. With more of them, the expressions take long to compile.
_BY_LEVELS = (_SCALAR, _FLAT)

_SPACES = re.compile(_SPACE)
_SHORT_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_SHORT_NAME = re.compile(_SHORT_STRING.pattern + rb"(" + _SPACE + rb":)?", re.DOTALL)
_SHORT_SCALAR = re.compile(rb"(?:-?[0-9][0-9.eE+\-]*|true|false|null)(?=[ \t\r\n,\]}])")
_DIGITS = re.compile(rb"[0-9.eE+\-]*")
_NUMBER_START = re.compile(rb"-?[0-9]")
_ESCAPED_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_LITERALS = (b"true", b"false", b"null")
# Elements and members that can be passed at once, each with the comma behind it.
_ELEMENTS = tuple(re.compile(rb"(?:" + _SPACE + value + _SPACE + rb",)+", re.DOTALL) for value in _BY_LEVELS)
_MEMBERS = tuple(re.compile(rb"(?:" + _member(_STRING, value) + rb",)+", re.DOTALL) for value in _BY_LEVELS)
_ONE_MEMBER = re.compile(_member(rb'"((?:[^"\\]|\\.)*)"', rb"(?:(" + _SCALAR + b")|" + _FLAT + b")") + b",", re.DOTALL)
_ONE_ELEMENT = tuple(
    re.compile(_SPACE + rb"(?:(" + _NUMBER + rb")|" + value + rb")" + _SPACE + b",", re.DOTALL) for value in _BY_LEVELS
)
_DECODE = json.JSONDecoder(strict=False).raw_decode
_MAX_SIZE = 1 << 62
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA, _COLON_CHAR, _SPACE_CHAR, _NUL = b'"\\,: \0'
_LIST, _OBJECT = b"[{"
_OPENED_BY = {ord("]"): _LIST, ord("}"): _OBJECT}


class JsonType(Enum):
    """The type of a member's value."""

    NULL = auto()
    BOOLEAN = auto()
    NUMBER = auto()
    STRING = auto()
    LIST = auto()
    OBJECT = auto()


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the root object.

    `value` is that of a scalar that is spelt in less than 1 KiB; a longer number is infinite, as what it stands for is
    not known, and a longer string None. `length` is the number of a list's elements, and `has_numbers` whether one of
    them is a number. `size_bytes` is the size of the value as it is spelt, and `start` its offset in the body, None if
    `value` says all.
    """

    type: JsonType
    value: bool | int | float | str | None = None
    length: int = 0
    has_numbers: bool = False
    size_bytes: int = 0
    start: int | None = None


class Members(NamedTuple):
    """What has been found in a body.

    `found` has the members of the table by name. `depth` is the deepest nesting of lists and objects. `end` is the
    offset of the root object's closing brace, None if the body is no JSON object; then nothing is found. `is_empty`
    is whether the object has no member, so that one that is added needs no comma. `urls` are addresses of media in it,
    if they were looked for, and `has_more_urls` whether there are too many to be kept.
    """

    found: Mapping[str, Member]
    depth: int
    end: int | None
    is_empty: bool
    urls: tuple[str, ...] = ()
    has_more_urls: bool = False


NO_MEMBERS = Members({}, 0, None, True)


class NameTable:
    """The names to look for, and what passes over runs of members of the root object."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names` are of ASCII letters, digits and underscores."""
        self.names = frozenset(names)
        listed = b"|".join(sorted(name.encode() for name in self.names))
        other = rb'"(?!(?:' + listed + rb')")[^"\\]*"'
        self.may_have_names = re.compile(rb'"(?:' + listed + rb')"|\\u00').search
        self.runs = tuple(
            re.compile(
                rb"(?:" + _member(_STRING, _SCALAR) + b",|" + _member(other, value) + rb",)+",
                re.DOTALL,
            )
            for value in _BY_LEVELS
        )


# What may come next; a FIRST one, or the end of the list or object.
_FIRST_ELEMENT, _ELEMENT, _VALUE, _FIRST_NAME, _NAME, _COLON, _AFTER_VALUE, _STRING_REST, _NUMBER_REST = range(9)
_DOCUMENT, _END = 9, 10
_BEFORE_VALUE = (_FIRST_ELEMENT, _ELEMENT, _VALUE)
_BEFORE_NAME = (_FIRST_NAME, _NAME)


class MemberReader:
    """Finds the members of one body.

    `feed` takes the next bytes, and `step` reads on as long as it returns True. `end` returns the members.
    """

    __slots__ = (
        "_at",
        "_base",
        "_data",
        "_depth",
        "_end",
        "_expect",
        "_failed",
        "_found",
        "_has_members",
        "_has_numbers",
        "_in_name",
        "_length",
        "_max_depth",
        "_name",
        "_nesting",
        "_start",
        "_table",
        "_type",
    )

    def __init__(self, table: NameTable, max_depth: int | None = None) -> None:
        """A body that is nested deeper than `max_depth` is not read on: nothing is found, and `depth` shows why."""
        self._table = table
        self._max_depth = _MAX_SIZE if max_depth is None else max_depth
        self._data = b""  # what has not been read, from `_at` on
        self._at = 0
        self._base = 0  # the offset of `_data` in the body
        self._expect = _DOCUMENT
        self._nesting = bytearray()  # the brackets that are open
        self._depth = 0
        self._in_name = False  # the string that is being passed is a name
        self._failed = False  # the body is no JSON
        self._has_members = False
        self._end: int | None = None
        self._found: dict[str, Member] = {}
        self._name: str | None = None  # of the member that is being read, if it is one of the table's
        self._type = JsonType.NULL
        self._start = 0  # where its value starts
        self._length = 0
        self._has_numbers = False

    def feed(self, data: bytes) -> None:
        """Take the bytes that follow those before."""
        self._base += self._at
        self._data = self._data[self._at :] + data
        self._at = 0

    def step(self) -> bool:
        """Read on a little; return whether more can be read before more bytes come."""
        left = _STEP_COST
        end = len(self._data)
        while self._at < end and not self._failed:
            if left <= 0:
                return True
            before = self._at
            cost = _STRING_COST if self._expect == _STRING_REST else 0
            after = self._move(self._data, before, end)
            if after is None:
                return False
            self._at = after
            left -= cost or _MOVE_COST + after - before
        if self._failed:
            self._at = end
        return False

    def end(self) -> Members:
        """Return what was found, after all bytes have been read."""
        if self._failed or self._end is None or self._at < len(self._data):
            return NO_MEMBERS._replace(depth=self._depth)
        return Members(self._found, self._depth, self._end, not self._has_members)

    def _move(self, data: bytes, at: int, end: int) -> int | None:
        """Read the next part; return where it ends, or None if more bytes are needed to know."""
        expect = self._expect
        if expect == _STRING_REST:
            return self._pass_string(data, at, end)
        if expect == _NUMBER_REST:
            return self._pass_number(data, at)
        if data[at] <= _SPACE_CHAR:
            at = self._pass_space(data, at)
            if at == end:
                return at
        if expect in _BEFORE_NAME:
            return self._read_name(data, at, end)
        if expect in _BEFORE_VALUE:
            return self._read_value(data, at, end)
        return self._read_sign(data, at, end)

    def _read_sign(self, data: bytes, at: int, end: int) -> int | None:
        """Read what belongs to the document, but to none of its values and names."""
        if self._expect == _AFTER_VALUE:
            return self._read_separator(data[at], at)
        if self._expect == _DOCUMENT:
            return self._begin(data, at)
        if self._expect == _END:
            return self._check_end(data, at, end)
        self._failed = data[at] != _COLON_CHAR
        self._expect = _VALUE
        return at + 1

    def _pass_space(self, data: bytes, at: int) -> int:
        match = _SPACES.match(data, at)
        assert match is not None  # it may be empty
        return match.end()

    def _begin(self, data: bytes, at: int) -> int | None:
        if at == self._base == 0 and data[0] == _BYTE_ORDER_MARK[0]:
            mark = data[:3]
            self._failed = not _BYTE_ORDER_MARK.startswith(mark)
            return 3 if len(mark) == len(_BYTE_ORDER_MARK) else None
        self._failed = data[at] not in (_LIST, _OBJECT)
        return self._open(data[at], at)

    def _check_end(self, data: bytes, at: int, end: int) -> int:
        """Nothing may follow the document, but llama-server reads no further than to a NUL."""
        if data[at] != _NUL:
            self._failed = True
        elif self._end is not None:
            self._expect = _STRING_REST
        return end

    # --- Lists and objects ---

    def _read_separator(self, char: int, at: int) -> int:
        if char == _COMMA:
            self._expect = _ELEMENT if self._nesting[-1] == _LIST else _NAME
            return at + 1
        return self._close(char, at)

    def _open(self, char: int, at: int) -> int:
        self._nesting.append(char)
        self._depth = max(self._depth, len(self._nesting))
        self._failed = self._failed or self._depth > self._max_depth
        self._expect = _FIRST_ELEMENT if char == _LIST else _FIRST_NAME
        if len(self._nesting) == 2:
            self._length, self._has_numbers = 0, False
        return at + 1

    def _close(self, char: int, at: int) -> int:
        nesting = self._nesting
        if _OPENED_BY.get(char) != nesting[-1]:
            self._failed = True
            return at
        nesting.pop()
        if nesting:
            self._end_value(at + 1)
        else:
            self._expect = _END
            self._end = self._base + at if char == ord("}") else None
        return at + 1

    def _levels(self) -> int:
        """How many levels of nesting can be passed at once, so that none is deeper than what was met one by one."""
        return min(self._depth - len(self._nesting), 1)

    # --- Names ---

    def _read_name(self, data: bytes, at: int, end: int) -> int | None:
        in_root = len(self._nesting) == 1
        runs = self._table.runs if in_root else _MEMBERS
        match = runs[self._levels()].match(data, at, min(end, at + _WINDOW_BYTES))
        if match is not None:
            self._expect = _NAME
            self._has_members = True
            if in_root and self._table.may_have_names(data, at, match.end()):
                self._find_in_run(match[0])
            return match.end()
        if data[at] != _QUOTE:
            if self._expect == _FIRST_NAME:
                return self._close(data[at], at)
            self._failed = True
            return at
        self._has_members = True
        short = _SHORT_NAME.match(data, at, min(end, at + _SHORT_BYTES))
        if in_root:
            if short is None and end - at < _SHORT_BYTES:
                return None
            self._name = None if short is None else self._known(short[1])
        if short is not None and short[2]:
            self._expect = _VALUE
            return short.end()
        self._expect, self._in_name = _STRING_REST, True
        return at + 1

    def _find_in_run(self, run: bytes) -> None:
        """Of equal spellings the last one counts here as well: it replaces the others in the dictionary."""
        last = dict(_ONE_MEMBER.findall(run))
        for spelling, value in last.items():
            name = self._known(spelling)
            if name is not None:  # its value is a scalar: a run has no other
                self._found[name] = _scalar_member(value)

    def _known(self, spelling: bytes) -> str | None:
        """Return the name if it is one of the table's."""
        name = spelling.decode("latin-1") if b"\\" not in spelling else _text(spelling)
        return name if name in self._table.names else None

    # --- Values ---

    def _read_value(self, data: bytes, at: int, end: int) -> int | None:
        nesting, expect = len(self._nesting), self._expect
        if expect != _VALUE:
            after = self._pass_elements(data, at, end)
            if after is not None:
                return after
            if expect == _FIRST_ELEMENT and data[at] == ord("]"):
                return self._close(data[at], at)
        char = data[at]
        if char in (_LIST, _OBJECT):
            self._begin_value(JsonType.LIST if char == _LIST else JsonType.OBJECT, at, nesting)
            after = self._open(char, at)
            is_empty = after < end and data[after] in _OPENED_BY
            return self._close(data[after], after) if is_empty else after
        if char == _QUOTE:
            return self._read_string(data, at, end, nesting)
        return self._read_scalar(data, at, end, nesting)

    def _pass_elements(self, data: bytes, at: int, end: int) -> int | None:
        levels = self._levels()
        match = _ELEMENTS[levels].match(data, at, min(end, at + _WINDOW_BYTES))
        if match is None:
            return None
        self._expect = _ELEMENT
        if len(self._nesting) == 2 and self._name is not None:
            numbers = _ONE_ELEMENT[levels].findall(data, at, match.end())
            self._length += len(numbers)
            self._has_numbers = self._has_numbers or any(numbers)
        return match.end()

    def _begin_value(self, kind: JsonType, at: int, nesting: int) -> None:
        if nesting == 1:
            self._type, self._start = kind, self._base + at
        elif nesting == 2 and self._nesting[-1] == _LIST:
            self._length += 1
            self._has_numbers = self._has_numbers or kind is JsonType.NUMBER

    def _end_value(self, after: int, value: bool | int | float | str | None = None) -> None:
        """A value ends, which is a scalar or has been closed."""
        self._expect = _AFTER_VALUE
        if len(self._nesting) == 1 and self._name is not None and self._nesting[0] == _OBJECT:
            size_bytes = self._base + after - self._start
            is_list = self._type is JsonType.LIST
            length, has_numbers = (self._length, self._has_numbers) if is_list else (0, False)
            start = self._start if value is None and self._type is not JsonType.NULL else None
            self._found[self._name] = Member(self._type, value, length, has_numbers, size_bytes, start)
            self._name = None

    def _read_string(self, data: bytes, at: int, end: int, nesting: int) -> int | None:
        if nesting == 1 and self._name is not None:
            short = _SHORT_STRING.match(data, at, min(end, at + _SHORT_BYTES))
            if short is not None:
                self._begin_value(JsonType.STRING, at, nesting)
                self._end_value(short.end(), _text(short[1]))
                return short.end()
            if end - at < _SHORT_BYTES:
                return None
        self._begin_value(JsonType.STRING, at, nesting)
        self._expect, self._in_name = _STRING_REST, False
        return at + 1

    def _read_scalar(self, data: bytes, at: int, end: int, nesting: int) -> int | None:
        match = _SHORT_SCALAR.match(data, at, min(end, at + _SHORT_BYTES))
        if match is not None:
            is_kept = nesting == 1 and self._name is not None
            kind, value = _scalar(match[0]) if is_kept else (_scalar_type(match[0]), None)
            self._begin_value(kind, at, nesting)
            self._end_value(match.end(), value)
            return match.end()
        if _NUMBER_START.match(data, at) is not None:
            if end - at <= _SHORT_BYTES and self._pass_digits(data, at) == end:
                return None
            self._begin_value(JsonType.NUMBER, at, nesting)
            self._expect = _NUMBER_REST
            return at + 1
        rest = data[at : at + 5]
        torn = rest == b"-" or any(literal.startswith(rest) for literal in _LITERALS)
        self._failed = not torn or at + len(rest) < end
        return None

    def _pass_number(self, data: bytes, at: int) -> int:
        after = self._pass_digits(data, at)
        if after < len(data):
            self._end_value(after, inf)
        return after

    def _pass_digits(self, data: bytes, at: int) -> int:
        match = _DIGITS.match(data, at)
        assert match is not None  # it may be empty
        return match.end()

    def _pass_string(self, data: bytes, at: int, end: int) -> int | None:
        """Pass what is left of a string, or what has come of it without half of an escape sequence."""
        if self._end is not None:  # behind the document
            return end
        quote = data.find(b'"', at)
        if quote < 0:
            after = end - _backslashes(data, at, end) % 2
            return after if after > at else None
        if _backslashes(data, at, quote) % 2:
            # More escapes are likely to follow: the expression takes less time for them.
            match = _ESCAPED_TEXT.match(data, quote + 1, min(end, quote + 1 + _ESCAPED_BYTES))
            assert match is not None  # it may be empty
            return match.end()
        if self._in_name:
            self._expect = _COLON
        else:
            self._end_value(quote + 1)
        return quote + 1


def _backslashes(data: bytes, start: int, end: int) -> int:
    """How many backslashes there are in a row before `end`."""
    if end <= start or data[end - 1] != _BACKSLASH:
        return 0
    text = data[start:end]
    return len(text) - len(text.rstrip(b"\\"))


def _text(spelling: bytes) -> str | None:
    """Return a string's value from its spelling between quotes; None if it has none."""
    try:
        text = spelling.decode("utf-8", "surrogatepass")
        return str(_DECODE(f'"{text}"')[0]) if "\\" in text else text
    except ValueError:
        return None


def _scalar_member(spelling: bytes) -> Member:
    if spelling.startswith(b'"'):
        return Member(JsonType.STRING, _text(spelling[1:-1]), size_bytes=len(spelling))
    kind, value = _scalar(spelling)
    return Member(kind, value, size_bytes=len(spelling))


def _scalar(spelling: bytes) -> tuple[JsonType, bool | int | float | None]:
    """Return the type and the value of a number or a literal; a number that is none has no value."""
    kind = _scalar_type(spelling)
    try:
        value = json.loads(spelling)
    except ValueError:
        return kind, None
    return kind, value if isinstance(value, int | float) else None


def _scalar_type(spelling: bytes) -> JsonType:
    """Return the type of a number or a literal."""
    if spelling not in _LITERALS:
        return JsonType.NUMBER
    return JsonType.NULL if spelling == b"null" else JsonType.BOOLEAN
