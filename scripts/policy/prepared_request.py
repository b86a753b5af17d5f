"""What a request head asks for, worked out once for all requests with the same head.

A client repeats its head with every request; only the number in Content-Length differs. So a head is looked up by the
digest of all its other bytes, and only a new one is parsed, routed and prepared for the backend. Everything here
follows from the head and the settings alone: whether a key is valid, or its rate is used up, is checked for each
request.

What is kept for all holds no secret: heads and credentials are kept as digests, and the lines for the backend are
without both. A connection keeps its own last head as it came.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256

from auth import candidates
from config.settings import Limits
from core.dialects import DIALECTS
from core.errors import Fields, GatewayError
from http1.form_fields import form_boundary
from http1.forwarded import NO_PROXIES, TrustedProxies
from http1.grammar import (
    CRLF,
    HOP_BY_HOP,
    NO_BODY,
    RequestHead,
    connection_options,
    expects_continue,
    field_lines,
    keeps_alive,
    parse_request_head,
    request_framing,
)
from policy.cors import Cors
from policy.routes import INFERENCE, PREFLIGHT, UNROUTED, Role, Route, Routes, dialect_of

_MAX_KEPT = 256
_MAX_HEAD_BYTES = 2048  # longer heads are rare, and would make 256 of them large
_LENGTH_LINE = b"\r\nContent-Length: "
_LENGTH_LINE_LOWER = _LENGTH_LINE.lower()
_MAX_DIGITS = 19
_JOINED_BYTES = 16384  # to copy so much takes less time than to send two pieces
_WITHOUT_BODY = (b"GET", b"HEAD")
_NO_CODINGS = frozenset((b"", b"identity", b"utf-8"))  # the last one is no coding, but clients send it
_GZIP = re.compile(rb"(?:^|[,\s])(?:x-)?gzip\s*(?:,|$|;\s*q=(?!0(?:\.0*)?\s*(?:,|$)))", re.IGNORECASE)
_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._~+/=:@-]{0,127}")

# The gateway checks credentials, and the backend gets its own. With X-Conversation-Id llama-server goes on generating
# after a disconnect. With Accept-Encoding it may compress a response, whose tokens could not be counted, and with Range
# it sends a part of one, or 416 when all of it has been generated.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-conversation-id",
    b"x-request-id",
    b"range",
    b"if-range",
}
_QUERY_IN_BODY = re.compile(rb"[ \t]*application/x-www-form-urlencoded", re.IGNORECASE)
_FORM = re.compile(rb"[ \t]*multipart/form-data", re.IGNORECASE)
_JSON = (b"Content-Type", b"application/json")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """All that a head says, except the number in Content-Length if it is spelt as usual.

    `error` makes the request unacceptable from any client; how its body ends is unknown then. `credential_error` says
    why it names no key.
    """

    method: bytes
    target: bytes
    minor: int  # HTTP/1.<minor>
    request_line: bytes  # method and path, for the access log
    keep_alive: bool
    keep_alive_line: bytes  # the field line that says so, if the client needs it (RFC 9112 section 9.3)
    length: int | None  # of the body in bytes; None if it is chunked
    expects_continue: bool
    accept: bytes
    accepts_gzip: bool  # only of a request that the gateway answers itself, as is the next
    etags: bytes  # those of copies that the client has
    boundary: bytes  # of the parts of its body, if that is a form with files
    request_id: bytes  # the client's own, if it is sane
    credential: bytes | None  # the SHA-256 digest of its only secret
    credentials: tuple[bytes, ...]  # the digests, if it carries several secrets: the keyring knows which is a key
    forwarded: tuple[str, ...]  # the client's addresses if a trusted proxy sent this; see TrustedProxies.clients
    response_lines: bytes  # CRLF, then the CORS field lines of every response
    preflight: Fields
    route: Route
    before_id: bytes  # the backend's head up to the request's id
    after_id: bytes
    error: GatewayError | None
    credential_error: GatewayError | None
    needs_authorization: (
        bool  # a valid key alone does not decide: refused, local, an operator's, bounded, or without its body
    )
    lacks_body: bool  # the route needs one

    @property
    def wants_heartbeats(self) -> bool:
        """Whether it may wait so long that it needs signs of life."""
        return self.route.streams and self.method == b"POST"

    def backend_request(
        self, request_id: bytes, length: int, pieces: Sequence[bytes | bytearray]
    ) -> bytes | Sequence[bytes | bytearray]:
        """Return the request for the backend, with a body of `length` bytes in `pieces`. A large one is not joined."""
        if length or self.method not in _WITHOUT_BODY:
            length_line = b"Content-Length: %d\r\n\r\n" % length
            if length > _JOINED_BYTES:
                return (b"".join((self.before_id, request_id, self.after_id, length_line)), *pieces)
            return b"".join((self.before_id, request_id, self.after_id, length_line, *pieces))
        return b"".join((self.before_id, request_id, self.after_id, CRLF))


def fallback_request(cors: Cors) -> PreparedRequest:
    """Return what stands for a head that could not be read, or did not come: it leads nowhere."""
    return PreparedRequest(
        method=b"GET",
        target=b"",
        minor=1,
        request_line=b"- -",
        keep_alive=False,
        keep_alive_line=b"",
        length=None,
        expects_continue=False,
        accept=b"",
        accepts_gzip=False,
        etags=b"",
        boundary=b"",
        request_id=b"",
        credential=None,
        credentials=(),
        forwarded=(),
        response_lines=CRLF + field_lines(cors.fields(None)),
        preflight=(),
        route=UNROUTED,
        before_id=b"",
        after_id=b"",
        error=None,
        credential_error=None,
        needs_authorization=True,
        lacks_body=False,
    )


# What the last request of a connection had in its head, except the number in Content-Length; nothing before the first.
# The next one mostly has the same, and a digest takes twice as long. It holds the client's secret for as long as the
# connection is open. A dictionary compares bytes only if their keyed hashes are equal, so no time shows how many bytes
# of a guess are right.
LastHead = dict[bytes, PreparedRequest]


class RequestCache:
    """Prepares requests, and keeps the latest ones."""

    def __init__(
        self,
        limits: Limits,
        routes: Routes,
        cors: Cors,
        backend_fields: bytes,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        """`backend_fields` are the lines that every request to the backend carries first."""
        self._proxies = proxies
        self._limits = limits
        self._body_bytes = limits.body_bytes
        # A kept head may return with a longer number in Content-Length, and must be within the limit even so.
        self._max_kept_bytes = min(_MAX_HEAD_BYTES, limits.head_bytes - _MAX_DIGITS)
        self._routes = routes
        self._cors = cors
        self._backend_fields = backend_fields
        self._kept: dict[bytes, PreparedRequest] = {}
        fallback = fallback_request(cors)
        self._fallbacks = {
            (method, dialect): replace(fallback, method=method, route=replace(UNROUTED, dialect=dialect))
            for method in (b"GET", b"HEAD")
            for dialect in DIALECTS
        }

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, raw: bytes, last: LastHead) -> tuple[PreparedRequest, int | None]:
        """Return the prepared request for a whole head, and its body's length in bytes, None if it is chunked.

        `last` is the last head of the connection, and is kept up to date.
        Raises what `parse_request_head` does.
        """
        before, name, rest = raw.partition(_LENGTH_LINE)
        if not name:
            before, name, rest = raw.partition(_LENGTH_LINE_LOWER)
        if not name:
            prepared = self._find_kept(raw, raw, last)
            return prepared, prepared.length
        digits, _, rest = rest.partition(CRLF)
        length = int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else self._body_bytes + 1
        if length > self._body_bytes:
            prepared = self._parse(raw)  # it holds the error, if this is one
            return prepared, prepared.length
        others = before + name + rest
        return last.get(others) or self._find_kept(raw, others, last), length

    def _find_kept(self, raw: bytes, others: bytes, last: LastHead) -> PreparedRequest:
        prepared = self._kept.get(blake2b(others).digest())
        if prepared is None:
            return self._prepare(raw, others)
        last.clear()
        last[others] = prepared
        return prepared

    def fallback(self, raw: bytes = b"") -> PreparedRequest:
        """Return what stands for a head that is wrong, or of which only `raw` has come.

        A response to HEAD has no content, whatever else is wrong, and an error is in the dialect of its target.
        """
        method, _, rest = raw.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        return self._fallbacks[b"HEAD" if method == b"HEAD" else b"GET", dialect_of(path)]

    def _prepare(self, raw: bytes, others: bytes) -> PreparedRequest:
        """Prepare a request, and keep it if it is likely to come again. `others` are the bytes that it holds for."""
        prepared = self._parse(raw)
        unusual = prepared.error or prepared.credential_error or prepared.route.refusal or prepared.request_id
        if not unusual and len(raw) <= self._max_kept_bytes:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[blake2b(others).digest()] = prepared
        return prepared

    def _parse(self, raw: bytes) -> PreparedRequest:
        head = parse_request_head(raw, self._limits)
        route = self._routes.find(head.method, head.target)
        types = head.known.get(b"content-type", ())
        if any(value[:10].lower() == b"multipart/" for value in types):  # in any case, and in any of the lines
            route = route.without_forms()
        boundary = form_boundary(b", ".join(types))
        if not boundary and route.screen is not None and any(map(_FORM.match, types)):
            route = route.without_unclear_form()
        codings = b",".join(head.known.get(b"content-encoding", ())).lower().split(b",")
        if not _NO_CODINGS.issuperset(map(bytes.strip, codings)):
            route = route.without_codings()
        framing, expects, error = NO_BODY, False, None
        try:
            framing = request_framing(head, self._limits)
            expects = expects_continue(head)
        except GatewayError as problem:
            error = problem.with_traceback(None)  # its frames hold it: a cycle
        digests: tuple[bytes, ...] = ()
        credential_error = None
        try:
            secrets = () if route is PREFLIGHT else candidates(head.known)
            digests = tuple([sha256(secret).digest() for secret in secrets])
        except GatewayError as problem:
            credential_error = problem.with_traceback(None)
        before_id, after_id = self._backend_lines(head, route)
        kind = route.kind
        lacks_body = route.needs_body and framing.length == 0 and b"content-length" not in head.known
        refused = error is not None or route.refusal is not None
        return PreparedRequest(
            method=head.method,
            target=head.target,
            minor=head.minor,
            request_line=b"%b %b" % (head.method, head.target.partition(b"?")[0]),
            keep_alive=keeps_alive(head),
            keep_alive_line=b"" if head.minor else b"Connection: keep-alive\r\n",
            length=framing.length,
            expects_continue=expects,
            accept=b", ".join(head.known.get(b"accept", ())),
            accepts_gzip=kind.local and _GZIP.search(values(head, b"accept-encoding")) is not None,
            etags=values(head, b"if-none-match") if kind.local else b"",
            boundary=boundary,
            request_id=given_id(head),
            credential=digests[0] if len(digests) == 1 else None,
            credentials=digests if len(digests) > 1 else (),
            forwarded=self._proxies.clients(head.known),
            response_lines=CRLF + field_lines(self._cors.fields(head)),
            preflight=self._cors.preflight(head) if route is PREFLIGHT else (),
            route=route,
            before_id=before_id,
            after_id=after_id,
            error=error,
            credential_error=credential_error,
            needs_authorization=refused or lacks_body or kind.local or kind.bounded or kind.role is not Role.INFER,
            lacks_body=lacks_body,
        )

    def _backend_lines(self, head: RequestHead, route: Route) -> tuple[bytes, bytes]:
        """Return the head for the backend: same method, target and fields, our Host and credentials.

        A route whose tokens are counted gets no Accept-Encoding: the tokens of a compressed response cannot be read.
        What ALLOW_PATHS adds is relayed as it is. llama-server reads a body of the type that curl sends by default as
        JSON, but also as a query, which no policy has seen: it gets the type of what it is.
        """
        dropped = _NOT_FORWARDED
        if route.kind is INFERENCE:
            dropped = dropped | {b"accept-encoding"}
        if b"connection" in head.known:
            dropped = dropped | connection_options(head.known)
        before_id = b"%b %b HTTP/1.1\r\n%bX-Request-Id: " % (head.method, head.target, self._backend_fields)
        passed = [
            _JSON if lower == b"content-type" and _QUERY_IN_BODY.match(field[1]) else field
            for field, lower in zip(head.fields, head.names, strict=True)
            if lower not in dropped
        ]
        return before_id, CRLF + field_lines(passed)


def values(head: RequestHead, name: bytes) -> bytes:
    """Return the values of the field lines with this name, which is in lower case, as one list."""
    return b", ".join([value for (_, value), lower in zip(head.fields, head.names, strict=True) if lower == name])


def given_id(head: RequestHead) -> bytes:
    """Return the id that the client gave its request, if it is a sane one; else nothing."""
    given = head.known.get(b"x-request-id", ())
    return given[0] if len(given) == 1 and _SANE_ID.fullmatch(given[0]) else b""
