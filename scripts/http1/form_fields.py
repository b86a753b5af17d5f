"""The fields of a form with files (multipart/form-data, RFC 7578), found in passing: bytes in, members out, no I/O.

llama-server makes a JSON object of such a form, in which each field is a string, whatever it contains; files are none
of its members. Of two fields with the same name the last one counts here. llama-server makes a list of them, which it
refuses for the fields that the gateway needs.

Everything is read as llama-server's HTTP library reads it, and not as leniently as a standard allows: else a form could
show the gateway other fields than llama-server.
"""

import re

from http1.grammar import CRLF
from http1.json_members import JsonType, Member, Members, NameTable

_MOVES = 32  # of one step
_KEPT_BYTES = 1024  # of a field's value; a longer one is not kept
# Of a part's head. llama-server refuses a line of more than 8 KiB, and takes any number of shorter ones.
_LINE_BYTES = 16 << 10
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_OTHERS = rb"(?:[ \t]*;[ \t]*(?!boundary[ \t=])%b=(?:%b|\"[^\"\\]*\"))*" % (_TOKEN, _TOKEN)
_BOUNDARY = re.compile(
    rb'multipart/form-data%b[ \t]*;[ \t]*boundary=(?:"([^"\\]{1,70})"|([^"; \t,]{1,70}))%b[ \t]*' % (_OTHERS, _OTHERS)
)
_DISPOSITION = re.compile(rb"(?i:content-disposition:[ \t]*form-data;)(.*)", re.DOTALL)
_PARAMETER = re.compile(rb'(?:[^";]|"[^"]*(?:"|\Z))+')

_PREAMBLE, _HEAD, _VALUE, _EPILOGUE = range(4)


def form_boundary(content_type: bytes) -> bytes:
    """Return what separates the parts of a form, from the field Content-Type.

    Returns nothing if the body is no such form, or if two readers could understand the field differently.
    """
    match = _BOUNDARY.fullmatch(content_type)
    return b"" if match is None else match[1] or match[2]


class FormReader:
    """Finds the fields of one form. `feed`, `step` and `end` are those of a MemberReader."""

    __slots__ = (
        "_data",
        "_delimiter",
        "_first",
        "_found",
        "_head",
        "_name",
        "_names",
        "_passed",
        "_size",
        "_state",
        "_value",
    )

    def __init__(self, table: NameTable, boundary: bytes) -> None:
        self._names = table.names
        self._first = b"--" + boundary + b"\r\n"  # wherever it stands
        self._delimiter = b"\r\n--" + boundary
        self._data = b""  # what has not been read
        self._passed = 0  # bytes that have been
        self._state = _PREAMBLE
        self._head = _PartHead()
        self._name: str | None = None  # of the field that is being read, if it is one of the table's
        self._value = b""
        self._size = 0
        self._found: dict[str, Member] = {}

    def feed(self, data: bytes) -> None:
        self._data += data

    def step(self) -> bool:
        return all(self._read_head() if self._state == _HEAD else self._read_to_delimiter() for _ in range(_MOVES))

    def end(self) -> Members:
        return Members(self._found, 0, None, not self._found)

    def _read_to_delimiter(self) -> bool:
        """Pass what comes before the next delimiter; return whether there is one."""
        data = self._data
        delimiter = self._first if self._state == _PREAMBLE else self._delimiter
        at = -1 if self._state == _EPILOGUE else data.find(delimiter)
        end = max(0, len(data) - len(delimiter)) if at < 0 else at
        self._size += end
        if self._name is not None:
            self._value = (self._value + data[:end])[: _KEPT_BYTES + 1]
        if at < 0:
            self._pass(end)
            return False
        self._end_field(self._passed + end - self._size)
        # Of the first delimiter the line end stays, as after the others.
        self._pass(at + len(delimiter) - (2 if self._state == _PREAMBLE else 0))
        self._state, self._head = _HEAD, _PartHead()
        return True

    def _read_head(self) -> bool:
        """Read one line of a part's head, behind the end of the line before; return whether it was whole."""
        data = self._data
        end = data.find(CRLF, len(CRLF))
        is_other = len(data) >= len(CRLF) and not data.startswith(CRLF)  # the end of the form, or none
        if is_other or (len(data) if end < 0 else end) > _LINE_BYTES:
            self._state = _EPILOGUE
            return False
        if end < 0:
            return False
        if end > len(CRLF):
            self._head.read(data[len(CRLF) : end])
            self._pass(end)
            return True
        known = self._head.field
        self._name = known if known in self._names else None
        self._value, self._size = b"", 0
        self._pass(end + len(CRLF))
        self._state = _VALUE
        return True

    def _pass(self, count: int) -> None:
        self._data = self._data[count:]
        self._passed += count

    def _end_field(self, start: int) -> None:
        if self._name is not None and self._state == _VALUE:
            is_kept = self._size <= _KEPT_BYTES
            value = self._value.decode(errors="replace") if is_kept else None
            place = None if is_kept else start
            self._found[self._name] = Member(JsonType.STRING, value, size_bytes=self._size, start=place)
        self._name = None


class _PartHead:
    """What the lines of a part's head say. Of a name that several lines have the last one counts."""

    __slots__ = ("_is_file", "_name")

    def __init__(self) -> None:
        self._name: str | None = None
        self._is_file = False

    @property
    def field(self) -> str | None:
        """The name of the field; None if it is a file, or has no name."""
        return None if self._is_file else self._name

    def read(self, line: bytes) -> None:
        disposition = _DISPOSITION.match(line)
        if disposition is None:
            return
        parameters: dict[bytes, bytes] = {}
        for parameter in _PARAMETER.findall(disposition[1]):
            key, _, value = parameter.partition(b"=")
            parameters.setdefault(_unquoted(key), _unquoted(value))
        self._name = parameters.get(b"name", b"").decode(errors="replace")
        self._is_file = bool(parameters.get(b"filename*") or parameters.get(b"filename", self._is_file))


def _unquoted(text: bytes) -> bytes:
    text = text.strip(b" \t")
    return text[1:-1] if len(text) > 1 and text[:1] == text[-1:] == b'"' else text
