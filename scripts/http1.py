"""HTTP/1.1 grammar, framing and field rules over bytes (RFC 9110, RFC 9112). No I/O, nothing here ever awaits.

Strict by decision: CRLF only (no bare LF or CR), no folded lines, origin-form targets only (and `*` for OPTIONS),
exactly one Host, at most one Content-Length of digits or one Transfer-Encoding that is exactly `chunked`. Whatever two
parsers could read in two ways is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from errors import (
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

# RFC 9110 section 5.6.2. A dict of fields would lose order and duplicates, and with them what the client said.
_TCHAR = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# One field line (RFC 9110 section 5.5: no control character but HTAB). Anchored at both ends, so that as many matches
# as there are lines means that every byte of every line was matched. Blanks beyond the usual one stay with the value:
# could two parts of the pattern take them, a long run of them would be tried in a quadratic number of ways.
_FIELD_LINES = re.compile(rb"^(" + TOKEN + rb"): ?([^\x00-\x08\x0a-\x1f\x7f]*)\r\n", re.MULTILINE)
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!\"$-~]+) HTTP/([0-9])\.([0-9])")  # `#` is no part of a target
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?)")
_NAME = rb"[A-Za-z0-9._~!$&'()*+,;=\-]*"  # RFC 3986 section 3.2.2, with percent-encoded octets between
_HOST = re.compile(rb"(?:" + _NAME + rb"(?:%[0-9A-Fa-f]{2}" + _NAME + rb")*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")

# The fields that somebody in the gateway reads; `known` indexes these and no others.
_READ = frozenset(
    b"host content-length transfer-encoding connection expect content-type content-encoding authorization x-api-key"
    b" api-key origin access-control-request-method access-control-request-headers x-request-id accept"
    b" date".split()
)
# RFC 9110 section 7.6.1, and the fields that this gateway frames or answers itself.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding"
    b" upgrade http2-settings".split()
)


@dataclass(frozen=True)
class Limits:
    """Bounds on what a peer may send, in octets (`headers`: in lines). CRLF does not count towards a line."""

    request_line_bytes: int = 8192
    header_line_bytes: int = 8192
    headers: int = 64
    body_bytes: int = 10 << 20
    response_head_bytes: int = 65536


class RequestHead(NamedTuple):
    """A request's head as it came: `fields` are (name, value) in wire order, names as spelt, values without OWS.

    `names` are the fields' names in lower case; `known` maps those that the gateway reads to their values.
    """

    method: bytes
    target: bytes
    minor: int  # HTTP/1.<minor>
    fields: Fields
    names: tuple[bytes, ...]
    known: Mapping[bytes, Sequence[bytes]]


class ResponseHead(NamedTuple):
    """A response's head as it came; `status_line` is what follows the version, such as `b"200 OK"`."""

    status: int
    status_line: bytes
    minor: int
    fields: Fields
    names: tuple[bytes, ...]
    known: Mapping[bytes, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Framing:
    """How a body ends: after `length` octets, with its last chunk, or (neither) when the sender closes."""

    length: int | None = None
    chunked: bool = False


NO_BODY = Framing(length=0)
CHUNKED = Framing(chunked=True)
UNTIL_CLOSE = Framing()


# --- Finding the end of a head while it still arrives ---


class HeadScanner:
    """Collects one request head, in time linear in its length, however it is torn.

    Limits hold while the head is incomplete, so that nobody has to send the end of an endless line to be refused.
    """

    __slots__ = ("_limits", "_line_start", "_lines", "_part", "_searched", "rest")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._part = bytearray()
        self._line_start = self._lines = self._searched = 0
        self.rest = b""

    @property
    def begun(self) -> bool:
        return bool(self._part) and self._part != b"\r"  # half of an empty line is none of it

    def feed(self, data: bytes) -> bytes | None:
        """Take received bytes; return the head, its empty line included, once it is whole. `rest` is what follows it.

        Empty lines before the head are dropped. Raises URI_TOO_LONG, HEADER_FIELDS_TOO_LARGE, or BAD_REQUEST.
        """
        if not self._part:
            head, end, rest = data.partition(HEAD_END)
            if end and head and head[0] in _TCHAR:
                self.rest = rest
                return head + end
        return self._feed_part(data)

    def _feed_part(self, data: bytes) -> bytes | None:
        part = self._part
        part += data
        if self._searched == 0:
            skip_empty_lines(part)
            check_first_octet(part)
            if part == b"\r":  # half of an empty line
                return None
        end = part.find(HEAD_END, max(0, self._searched - 3))
        if end >= 0:
            head, self.rest = bytes(part[: end + 4]), bytes(part[end + 4 :])
            part.clear()
            self._line_start = self._lines = self._searched = 0
            return head
        self._check_lines(part)
        self._searched = len(part)
        return None

    def _check_lines(self, part: bytearray) -> None:
        newline = part.find(b"\n", max(self._line_start, self._searched))
        while newline >= 0:
            if newline == self._line_start or part[newline - 1] != 0x0D:
                raise GatewayError(BAD_REQUEST, "A line of the head ends without CRLF.")
            self._check_length(newline - 1 - self._line_start)
            if self._lines == 0:
                parse_request_line(bytes(part[: newline - 1]))  # HTTP/0.9 and other protocols send no more than this
            self._lines += 1
            self._line_start = newline + 1
            newline = part.find(b"\n", self._line_start)
        if self._lines > self._limits.headers + 1:
            raise too_many_fields(self._limits)
        self._check_length(len(part) - self._line_start - part.endswith(b"\r"))

    def _check_length(self, octets: int) -> None:
        if self._lines == 0:
            check_request_line(octets, self._limits)
        else:
            check_header_line(octets, self._limits)


def skip_empty_lines(part: bytearray) -> None:
    """Remove CRLFs before a request line (RFC 9112 section 2.2: some clients send one after a body)."""
    while part.startswith(CRLF):
        del part[:2]


def check_first_octet(part: bytearray) -> None:
    """Refuse at once what can never become a request, TLS on a plain port above all."""
    if part and part[0] not in _TCHAR and part != b"\r":
        words = "TLS was spoken to a plain HTTP port." if part[0] == 0x16 else "The request line is malformed."
        raise GatewayError(BAD_REQUEST, words)


def check_request_line(octets: int, limits: Limits) -> None:
    if octets > limits.request_line_bytes:
        raise GatewayError(
            URI_TOO_LONG, f"The request line exceeds MAX_REQUEST_LINE_SIZE ({limits.request_line_bytes} octets)."
        )


def check_header_line(octets: int, limits: Limits) -> None:
    if octets > limits.header_line_bytes:
        raise GatewayError(
            HEADER_FIELDS_TOO_LARGE, f"A header line exceeds MAX_HEADER_LINE_SIZE ({limits.header_line_bytes} octets)."
        )


def too_many_fields(limits: Limits) -> GatewayError:
    words = f"The request has more than MAX_HEADERS ({limits.headers}) header lines."
    return GatewayError(HEADER_FIELDS_TOO_LARGE, words)


# --- Heads ---


def parse_request_head(raw: bytes, limits: Limits) -> RequestHead:
    """Parse a whole head, its final empty line included.

    Raises BAD_REQUEST, VERSION_NOT_SUPPORTED, URI_TOO_LONG or HEADER_FIELDS_TOO_LARGE.
    """
    if len(raw) > limits.request_line_bytes or len(raw) > limits.header_line_bytes:
        first, *others = raw[:-4].split(CRLF)
        check_request_line(len(first), limits)
        for line in others:
            check_header_line(len(line), limits)
    start = raw.find(CRLF)
    method, target, minor = parse_request_line(raw[:start])
    fields, names, known = parse_fields(raw, start + 2, BAD_REQUEST)
    if len(fields) > limits.headers:
        raise too_many_fields(limits)
    # RFC 9112 section 3.2: exactly one Host (HTTP/1.0 may do without), and it is a host.
    hosts = known.get(b"host", ())
    if len(hosts) != 1 and (hosts or minor == 1):
        raise GatewayError(BAD_REQUEST, "The request needs exactly one Host header.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise GatewayError(BAD_REQUEST, "The Host header is not a host with an optional port.")
    return RequestHead(method, target, minor, fields, names, known)


def parse_request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Parse `method SP target SP HTTP/1.x` (RFC 9112 section 3) into method, target and x."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise GatewayError(BAD_REQUEST, "The request line is malformed.")
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        raise GatewayError(VERSION_NOT_SUPPORTED)
    if not (target.startswith(b"/") or (target == b"*" and method == b"OPTIONS")):
        raise GatewayError(BAD_REQUEST, "The request target must be in origin form: a path that begins with '/'.")
    return method, target, int(minor)


def parse_response_head(raw: bytes) -> ResponseHead:
    """Parse a whole head, its final empty line included. Raises BACKEND_MALFORMED."""
    start = raw.find(CRLF)
    match = _STATUS_LINE.fullmatch(raw, 0, start)
    if match is None:
        raise GatewayError(BACKEND_MALFORMED, "The backend's status line is malformed.")
    minor, status_line, status = match.groups()
    return ResponseHead(int(status), status_line, int(minor), *parse_fields(raw, start + 2, BACKEND_MALFORMED))


def parse_fields(raw: bytes, start: int, kind: Kind) -> tuple[Fields, tuple[bytes, ...], dict[bytes, list[bytes]]]:
    """Parse the field lines of a head from `start` on: fields, their names in lower case, those that somebody reads."""
    fields = _FIELD_LINES.findall(raw, start)
    if len(fields) != raw.count(b"\n", start) - 1:
        raise GatewayError(kind, "A header line is not `name: value`, or contains a control character.")
    if b"  " in raw or b" \r\n" in raw or b"\t" in raw:
        fields = [(name, value.strip(b" \t")) for name, value in fields]
    names = tuple([name.lower() for name, _ in fields])
    known: dict[bytes, list[bytes]] = {}
    for at, name in enumerate(names):
        if name in _READ:
            value = fields[at][1]
            if name in known:
                known[name].append(value)
            else:
                known[name] = [value]
    return tuple(fields), names, known


def field_lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])


def connection_options(known: Mapping[bytes, Sequence[bytes]]) -> frozenset[bytes]:
    """The members of Connection, in lower case (RFC 9110 section 7.6.1): fields not to be passed on.

    Content-Length is never one of them: without it the next reader would look for another end of the body.
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
    """Whether the sender of a head will go on with the connection behind this message."""
    if head.minor == 1 and b"connection" not in head.known:
        return True
    return wants_keep_alive(head.minor, connection_options(head.known))


def expects_continue(head: RequestHead) -> bool:
    """Whether the client waits for 100 Continue. Raises EXPECTATION_FAILED for any other expectation."""
    values = head.known.get(b"expect")
    if values is None or head.minor == 0:  # RFC 9110 section 10.1.1: a 1.0 client's expectation is ignored
        return False
    if len(values) != 1 or values[0].lower() != b"100-continue":
        raise GatewayError(EXPECTATION_FAILED)
    return True


# --- Framing: RFC 9112 section 6.3, by its numbered steps ---


def request_framing(head: RequestHead, limits: Limits) -> Framing:
    """Decide how the request body ends. Raises BAD_REQUEST where two readers could differ, PAYLOAD_TOO_LARGE."""
    coded = head.known.get(b"transfer-encoding")
    sized = head.known.get(b"content-length")
    if coded is not None:
        # Steps 3 and 4. Both fields at once is how requests are smuggled; a coding other than chunked has no end.
        if sized is not None or head.minor == 0:
            raise GatewayError(BAD_REQUEST, "Transfer-Encoding is not allowed with Content-Length or in HTTP/1.0.")
        if len(coded) != 1 or coded[0].lower() != b"chunked":
            raise GatewayError(BAD_REQUEST, "The only Transfer-Encoding supported is chunked, once.")
        return CHUNKED
    if sized is None:
        return NO_BODY  # step 7
    length = _content_length(sized, BAD_REQUEST)  # steps 5 and 6
    if length > limits.body_bytes:
        raise too_large(limits)
    return Framing(length=length)


def response_framing(head: ResponseHead, method: bytes) -> Framing:
    """Decide how the response body ends. `method` is the request's. Raises BACKEND_MALFORMED."""
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
    return Framing(length=length)  # step 6, or step 8 where there is none


def _content_length(values: Sequence[bytes], kind: Kind) -> int:
    if len(values) != 1 or not values[0].isdigit() or len(values[0]) > 19:  # of bytes: isdigit knows ASCII alone
        raise GatewayError(kind, "Content-Length must be one number of at most 19 digits.")
    return int(values[0])


def too_large(limits: Limits) -> GatewayError:
    words = f"The request body exceeds MAX_REQUEST_BODY_SIZE ({limits.body_bytes} octets)."
    return GatewayError(PAYLOAD_TOO_LARGE, words)
