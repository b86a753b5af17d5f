"""HTTP/1.1 grammar, framing and field rules over bytes (RFC 9110, RFC 9112). No I/O, no awaiting.

Strict by decision: CRLF only (no bare LF or CR), no folded lines, exactly one Host, at most one Content-Length of
digits or one Transfer-Encoding that is exactly `chunked`. Messages that two parsers could read differently are refused.
A target in absolute form is turned into origin form, so that only one form goes further.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from config.settings import Limits
from core.errors import (
    BACKEND_MALFORMED,
    BAD_REQUEST,
    EXPECTATION_FAILED,
    HEADER_FIELDS_TOO_LARGE,
    PAYLOAD_TOO_LARGE,
    URI_TOO_LONG,
    VERSION_NOT_SUPPORTED,
    Fields,
    GatewayError,
    Kind,
)

CRLF = b"\r\n"
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# RFC 9110 section 5.6.2.
_TCHAR = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# One field line (RFC 9110 section 5.5: no control character except HTAB). Anchored at both ends: if there are as many
# matches as lines, every byte of every line was matched. Whitespace beyond the usual one space stays with the value: if
# two parts of the pattern could match it, a long run of whitespace would take quadratic time.
_FIELD_LINES = re.compile(rb"^(" + TOKEN + rb"): ?([^\x00-\x08\x0a-\x1f\x7f]*)\r\n", re.MULTILINE)
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!\"$-~]+) HTTP/([0-9])\.([0-9])")  # a target contains no `#`
# A query without a path is refused: parsers differ on where its host ends.
_ABSOLUTE_FORM = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?:][^/?]*)(/[!-~]*)?")
_EMPTY_LINES = (CRLF * 1024, CRLF)  # to be removed in few steps, however many there are
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?)")
_NAME = rb"[A-Za-z0-9._~!$&'()*+,;=\-]*"  # RFC 3986 section 3.2.2, with percent-encoded bytes between
_HOST = re.compile(rb"(?:" + _NAME + rb"(?:%[0-9A-Fa-f]{2}" + _NAME + rb")*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")

# The fields that the gateway reads; `known` contains these and no others.
_KNOWN_FIELDS = frozenset(
    b"host content-length transfer-encoding connection expect content-type content-encoding authorization x-api-key"
    b" api-key origin access-control-request-method access-control-request-headers x-request-id accept"
    b" date x-forwarded-for forwarded".split()
)
# RFC 9110 section 7.6.1: fields that concern one connection and are never relayed.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding"
    b" upgrade http2-settings".split()
)


class RequestHead(NamedTuple):
    """A parsed request head.

    `target` is in origin form, or `*`. If it came in absolute form, the Host field has the host that it named.
    `minor` is 0 or 1: a higher minor version of HTTP/1 is handled as the highest supported (RFC 9110 section 2.5).
    `fields` are (name, value) in wire order, duplicates included; names keep their case, values have no surrounding
    whitespace. `names` are the fields' names in lower case. `known` maps the names that the gateway reads to their
    values.
    """

    method: bytes
    target: bytes
    minor: int  # HTTP/1.<minor>
    fields: Fields
    names: tuple[bytes, ...]
    known: Mapping[bytes, Sequence[bytes]]


class ResponseHead(NamedTuple):
    """A parsed response head. `status_line` is the part after the version, such as `b"200 OK"`.

    The other attributes are those of RequestHead.
    """

    status: int
    status_line: bytes
    minor: int
    fields: Fields
    names: tuple[bytes, ...]
    known: Mapping[bytes, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Framing:
    """How a body ends: after `length` bytes, with its last chunk, or (neither) when the sender closes."""

    length: int | None = None
    chunked: bool = False


NO_BODY = Framing(length=0)
CHUNKED = Framing(chunked=True)
UNTIL_CLOSE = Framing()


# --- Finding the end of a head while it arrives ---


class HeadScanner:
    """Collects one request head, in time linear in its length, in whatever pieces it arrives.

    The limits are enforced while the head is incomplete: a line without end is refused as soon as it exceeds its limit.
    """

    __slots__ = ("_buffer", "_limits", "_line_start", "_lines", "_searched", "trailing_data")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._line_start = self._lines = self._searched = 0
        self.trailing_data = b""

    @property
    def begun(self) -> bool:
        """Whether part of a head has arrived. Half of an empty line before it does not count."""
        return bool(self._buffer) and self._buffer != b"\r"

    @property
    def partial_head(self) -> bytes:
        """What has arrived of a head, also of one that `feed` has refused."""
        return bytes(self._buffer)

    @property
    def held_bytes(self) -> int:
        """How many bytes of an incomplete head are held."""
        return len(self._buffer)

    def reset(self) -> None:
        """Drop what has arrived of a head."""
        self._buffer.clear()
        self._line_start = self._lines = self._searched = 0

    def feed(self, data: bytes) -> bytes | None:
        """Consume received bytes; return the head, its final empty line included, once it is complete, else None.

        The bytes that follow it are then in `trailing_data`. Empty lines before the head are dropped. Raises
        URI_TOO_LONG, HEADER_FIELDS_TOO_LARGE, BAD_REQUEST or VERSION_NOT_SUPPORTED.
        """
        if not self._buffer:
            head, end, rest = data.partition(HEAD_END)
            if end and head and head[0] in _TCHAR:
                self.trailing_data = rest
                return head + end
        return self._feed_buffer(data)

    def _feed_buffer(self, data: bytes) -> bytes | None:
        buffer = self._buffer
        buffer += data
        if self._searched == 0:
            skip_empty_lines(buffer)
            check_first_byte(buffer)
            if buffer == b"\r":  # half of an empty line
                return None
        end = buffer.find(HEAD_END, max(0, self._searched - 3))
        if end >= 0:
            head, self.trailing_data = bytes(buffer[: end + 4]), bytes(buffer[end + 4 :])
            self.reset()
            return head
        self._check_lines(buffer)
        self._searched = len(buffer)
        return None

    def _check_lines(self, buffer: bytearray) -> None:
        newline = buffer.find(b"\n", max(self._line_start, self._searched))
        while newline >= 0:
            if newline == self._line_start or buffer[newline - 1] != 0x0D:
                raise GatewayError(BAD_REQUEST, "A line of the head ends without CRLF.")
            self._check_length(newline - 1 - self._line_start)
            if self._lines == 0:
                # HTTP/0.9 and other protocols may send nothing after this line.
                parse_request_line(bytes(buffer[: newline - 1]))
            self._lines += 1
            if self._lines > self._limits.headers + 1:
                raise too_many_fields(self._limits)
            self._line_start = newline + 1
            newline = buffer.find(b"\n", self._line_start)
        self._check_length(len(buffer) - self._line_start - buffer.endswith(b"\r"))
        check_head_size(len(buffer), self._limits)

    def _check_length(self, length: int) -> None:
        if self._lines == 0:
            check_request_line(length, self._limits)
        else:
            check_header_line(length, self._limits)


def skip_empty_lines(buffer: bytearray) -> None:
    """Remove CRLFs before a request line (RFC 9112 section 2.2: some clients send one after a body)."""
    for run in _EMPTY_LINES:
        while buffer.startswith(run):
            del buffer[: len(run)]


def check_first_byte(buffer: bytearray) -> None:
    """Refuse at once what can never become a request, above all TLS on a plain HTTP port."""
    if buffer and buffer[0] not in _TCHAR and buffer != b"\r":
        detail = "TLS was spoken to a plain HTTP port." if buffer[0] == 0x16 else "The request line is malformed."
        raise GatewayError(BAD_REQUEST, detail)


def check_request_line(length: int, limits: Limits) -> None:
    if length > limits.request_line_bytes:
        raise GatewayError(
            URI_TOO_LONG, f"The request line exceeds MAX_REQUEST_LINE_SIZE ({limits.request_line_bytes} bytes)."
        )


def check_header_line(length: int, limits: Limits) -> None:
    if length > limits.header_line_bytes:
        raise GatewayError(
            HEADER_FIELDS_TOO_LARGE, f"A header line exceeds MAX_HEADER_LINE_SIZE ({limits.header_line_bytes} bytes)."
        )


def check_head_size(length: int, limits: Limits) -> None:
    if length > limits.head_bytes:
        raise GatewayError(
            HEADER_FIELDS_TOO_LARGE, f"The request head exceeds MAX_REQUEST_HEADER_SIZE ({limits.head_bytes} bytes)."
        )


def too_many_fields(limits: Limits) -> GatewayError:
    detail = f"The request has more than MAX_HEADERS ({limits.headers}) header lines."
    return GatewayError(HEADER_FIELDS_TOO_LARGE, detail)


# --- Heads ---


def parse_request_head(raw: bytes, limits: Limits) -> RequestHead:
    """Parse a complete head, its final empty line included.

    Raises BAD_REQUEST, VERSION_NOT_SUPPORTED, URI_TOO_LONG or HEADER_FIELDS_TOO_LARGE.
    """
    if len(raw) > limits.request_line_bytes or len(raw) > limits.header_line_bytes:
        first, *others = raw[:-4].split(CRLF)
        check_request_line(len(first), limits)
        for line in others:
            check_header_line(len(line), limits)
    check_head_size(len(raw), limits)
    start = raw.find(CRLF)
    method, host, target, minor = parse_request_line(raw[:start])
    fields, names, known = parse_fields(raw, start + 2, BAD_REQUEST)
    if len(fields) > limits.headers:
        raise too_many_fields(limits)
    # RFC 9112 section 3.2: exactly one Host (optional in HTTP/1.0), and it is a host.
    hosts = known.get(b"host", ())
    if len(hosts) != 1 and (hosts or minor == 1):
        raise GatewayError(BAD_REQUEST, "The request needs exactly one Host header.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise GatewayError(BAD_REQUEST, "The Host header is not a host with an optional port.")
    if host and hosts:  # RFC 9112 section 3.2.2: the target's host replaces the Host field's
        fields = tuple([(each[0], host) if name == b"host" else each for each, name in zip(fields, names, strict=True)])
        known[b"host"] = [host]
    return RequestHead(method, target, minor, fields, names, known)


def parse_request_line(line: bytes) -> tuple[bytes, bytes, bytes, int]:
    """Parse `method SP target SP HTTP/1.x` (RFC 9112 section 3) into method, host, target in origin form, and x.

    The host is that of a target in absolute form, otherwise empty. Above 1, x counts as 1.
    """
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise GatewayError(BAD_REQUEST, "The request line is malformed.")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise GatewayError(VERSION_NOT_SUPPORTED)
    host = b""
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        host, target = _parse_absolute_form(method, target)
    return method, host, target, 0 if minor == b"0" else 1


def _parse_absolute_form(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Split `http://host/path` into host and origin form (RFC 9112 section 3.2.2)."""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        message = "The request target must be a path that begins with '/', or an http or https URL."
        raise GatewayError(BAD_REQUEST, message)
    host, path = match.groups()
    if not _HOST.fullmatch(host):
        raise GatewayError(BAD_REQUEST, "The request target's host is not a host with an optional port.")
    if path is None:
        path = b"*" if method == b"OPTIONS" else b"/"  # RFC 9112 sections 3.2.1 and 3.2.4
    return host, path


def parse_response_head(raw: bytes) -> ResponseHead:
    """Parse a complete head, its final empty line included. Raises BACKEND_MALFORMED."""
    start = raw.find(CRLF)
    match = _STATUS_LINE.fullmatch(raw, 0, start)
    if match is None:
        raise GatewayError(BACKEND_MALFORMED, "The backend's status line is malformed.")
    minor, status_line, status = match.groups()
    return ResponseHead(int(status), status_line, int(minor), *parse_fields(raw, start + 2, BACKEND_MALFORMED))


def parse_fields(raw: bytes, start: int, kind: Kind) -> tuple[Fields, tuple[bytes, ...], dict[bytes, list[bytes]]]:
    """Parse the field lines of a head from `start` on; return `fields`, `names` and `known` as in RequestHead.

    Raises GatewayError(kind).
    """
    fields = _FIELD_LINES.findall(raw, start)
    if len(fields) != raw.count(b"\n", start) - 1:
        raise GatewayError(kind, "A header line is not `name: value`, or contains a control character.")
    if b"  " in raw or b" \r\n" in raw or b"\t" in raw:
        fields = [(name, value.strip(b" \t")) for name, value in fields]
    names = tuple([name.lower() for name, _ in fields])
    known: dict[bytes, list[bytes]] = {}
    for at, name in enumerate(names):
        if name in _KNOWN_FIELDS:
            value = fields[at][1]
            if name in known:
                known[name].append(value)
            else:
                known[name] = [value]
    return tuple(fields), names, known


def field_lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])


def connection_options(known: Mapping[bytes, Sequence[bytes]]) -> frozenset[bytes]:
    """The members of Connection, in lower case (RFC 9110 section 7.6.1): the names of fields that must not be relayed.

    Content-Length is never one of them: without it the recipient would look for the end of the body elsewhere.
    """
    values = known.get(b"connection")
    if values is None:
        return frozenset()
    members = frozenset(member.strip(b" \t").lower() for value in values for member in value.split(b","))
    return members - {b"content-length"}


def wants_keep_alive(minor: int, options: frozenset[bytes]) -> bool:
    """RFC 9112 section 9.3."""
    return b"close" not in options and (minor == 1 or b"keep-alive" in options)


def keeps_alive(head: RequestHead | ResponseHead) -> bool:
    """Whether the sender of a head keeps the connection open after this message."""
    if head.minor == 1 and b"connection" not in head.known:
        return True
    return wants_keep_alive(head.minor, connection_options(head.known))


def expects_continue(head: RequestHead) -> bool:
    """Whether the client waits for 100 Continue. Raises EXPECTATION_FAILED on any other expectation."""
    values = head.known.get(b"expect")
    if values is None or head.minor == 0:  # RFC 9110 section 10.1.1: a 1.0 client's expectation is ignored
        return False
    if len(values) != 1 or values[0].lower() != b"100-continue":
        raise GatewayError(EXPECTATION_FAILED)
    return True


# --- Framing: RFC 9112 section 6.3, by its numbered steps ---


def request_framing(head: RequestHead, limits: Limits) -> Framing:
    """Decide how the request body ends. Raises BAD_REQUEST if two parsers could differ, or PAYLOAD_TOO_LARGE."""
    coded = head.known.get(b"transfer-encoding")
    sized = head.known.get(b"content-length")
    if coded is not None:
        # Steps 3 and 4. Requests are smuggled by sending both fields; a coding other than chunked has no end.
        if sized is not None or head.minor == 0:
            raise GatewayError(BAD_REQUEST, "Transfer-Encoding is not allowed with Content-Length or in HTTP/1.0.")
        if len(coded) != 1 or coded[0].lower() != b"chunked":
            raise GatewayError(BAD_REQUEST, "The only Transfer-Encoding supported is chunked, once.")
        return CHUNKED
    if sized is None:
        return NO_BODY  # step 7
    length = _content_length(sized, BAD_REQUEST)  # steps 5 and 6
    if length > limits.body_bytes:
        raise body_too_large(limits)
    return Framing(length=length)


def response_framing(head: ResponseHead, method: bytes) -> Framing:
    """Decide how the response body ends. `method` is the request's method. Raises BACKEND_MALFORMED."""
    coded = head.known.get(b"transfer-encoding")
    sized = head.known.get(b"content-length")
    length = None if sized is None else _content_length(sized, BACKEND_MALFORMED)
    chunked = coded is not None and len(coded) == 1 and coded[0].lower() == b"chunked"
    if coded is not None and (not chunked or sized is not None or head.minor == 0):
        raise GatewayError(BACKEND_MALFORMED, "The backend's Transfer-Encoding is ambiguous.")
    if method == b"HEAD" or head.status in (204, 304):  # step 1
        return NO_BODY
    if chunked:
        return CHUNKED
    return Framing(length=length)  # step 6, or step 8 if there is none


def _content_length(values: Sequence[bytes], kind: Kind) -> int:
    if len(values) != 1 or not values[0].isdigit() or len(values[0]) > 19:  # bytes.isdigit accepts ASCII digits only
        raise GatewayError(kind, "Content-Length must be one number of at most 19 digits.")
    return int(values[0])


def body_too_large(limits: Limits) -> GatewayError:
    detail = f"The request body exceeds MAX_REQUEST_BODY_SIZE ({limits.body_bytes} bytes)."
    return GatewayError(PAYLOAD_TOO_LARGE, detail)
