"""What a request's head asks for, worked out once for all requests that come with the same head.

A client repeats its head with every request; what differs is the number in Content-Length. So a head is looked up by
the digest of all its other octets, and only one that is new is parsed, routed and prepared for the backend. Everything
here follows from the head and the settings alone: whether a key is good, or its rate used up, is asked each time.

What is kept holds no secret: the head by its digest, the credential by its own, and the lines for the backend are
without it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from auth import credential
from cors import Cors
from errors import Fields, GatewayError
from http1 import (
    CRLF,
    HOP_BY_HOP,
    NO_BODY,
    Limits,
    RequestHead,
    connection_options,
    expects_continue,
    field_lines,
    keeps_alive,
    parse_request_head,
    request_framing,
)
from routes import PREFLIGHT, UNROUTED, Role, Route, Routes

_MOST_PLANS = 256
_LONGEST_HEAD = 2048  # what is longer is rare, and would make 256 of them large
_LENGTH_LINE = b"\r\nContent-Length: "
_LENGTH_LINE_LOWER = _LENGTH_LINE.lower()
_MOST_DIGITS = 19
_WITHOUT_BODY = (b"GET", b"HEAD")
_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._~+/=:@-]{0,127}")

# Credentials are the gateway's to check and the backend's own to carry. With X-Conversation-Id llama-server goes on
# generating after a disconnect.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-conversation-id",
    b"x-request-id",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a head says, but for the number in Content-Length where that is spelt as usual.

    `fault` is what makes the request unacceptable whoever sends it, `no_credential` why it names no key.
    """

    method: bytes
    target: bytes
    minor: int
    words: bytes  # method and path, for the access log
    keep_alive: bool
    length: int | None  # of the body in octets, as `Planner.find` tells it: None where that is chunked
    expects: bool  # the client waits for 100 Continue
    accept: bytes
    request_id: bytes  # as the client gave it, if it did
    credential: bytes | None  # the key's SHA-256 digest
    own_lines: bytes  # CORS, for every answer
    preflight: Fields
    route: Route
    before: bytes  # the backend's head up to the request's id
    after: bytes
    fault: GatewayError | None
    no_credential: GatewayError | None
    is_special: bool  # a key alone is not enough, or not needed: refused, local, an operator's, without its body
    lacks_body: bool  # the route needs one
    is_straight: bool  # it may go on without a word about connection or body
    label: str  # the route's, as are these
    slot: bool
    rated: bool
    metered: bool
    heartbeats: bool  # it may wait so long that it needs signs of life

    def backend_request(self, request_id: bytes, octets: int, pieces: Sequence[bytes]) -> bytes:
        """The request as the backend gets it, with a body of so many octets, whose pieces these are."""
        body = b"".join(pieces)
        if octets or self.method not in _WITHOUT_BODY:
            return b"%b%b%bContent-Length: %d\r\n\r\n%b" % (self.before, request_id, self.after, octets, body)
        return b"%b%b%b\r\n" % (self.before, request_id, self.after)


def no_plan(cors: Cors) -> Plan:
    """What stands for a head that could not be read, or did not come: whatever follows is nobody's."""
    return Plan(
        method=b"GET",
        target=b"",
        minor=1,
        words=b"- -",
        keep_alive=False,
        length=None,
        expects=False,
        accept=b"",
        request_id=b"",
        credential=None,
        own_lines=field_lines(cors.fields(None)),
        preflight=(),
        route=UNROUTED,
        before=b"",
        after=b"",
        fault=None,
        no_credential=None,
        is_special=True,
        lacks_body=False,
        is_straight=False,
        label=UNROUTED.label,
        slot=False,
        rated=False,
        metered=False,
        heartbeats=False,
    )


class Planner:
    """Makes plans, and keeps the latest ones."""

    def __init__(self, limits: Limits, routes: Routes, cors: Cors, backend_fields: bytes) -> None:
        """`backend_fields` are the lines that every request to the backend carries first."""
        self._limits = limits
        self._body_bytes = limits.body_bytes
        self._routes = routes
        self._cors = cors
        self._backend_fields = backend_fields
        self._kept: dict[bytes, Plan] = {}
        self.none = no_plan(cors)
        self._none_for_head = replace(self.none, method=b"HEAD")

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, raw: bytes) -> tuple[Plan, int | None]:
        """The plan for a whole head, and its body's length in octets, None where that is chunked.

        Raises what `parse_request_head` does.
        """
        before, name, rest = raw.partition(_LENGTH_LINE)
        if not name:
            before, name, rest = raw.partition(_LENGTH_LINE_LOWER)
        if not name:
            plan = self._kept.get(sha256(raw).digest()) or self._make(raw, raw)
            return plan, plan.length
        digits, _, rest = rest.partition(CRLF)
        length = int(digits) if digits.isdigit() and len(digits) <= _MOST_DIGITS else self._body_bytes + 1
        if length > self._body_bytes:
            plan = self._parse(raw)  # which tells what is wrong, if anything is
            return plan, plan.length
        others = before + name + rest
        return self._kept.get(sha256(others).digest()) or self._make(raw, others), length

    def stand_in(self, raw: bytes) -> Plan:
        """What stands for a head that is wrong; an answer to HEAD has no content whatever else the head says."""
        return self._none_for_head if raw.startswith(b"HEAD ") else self.none

    def _make(self, raw: bytes, others: bytes) -> Plan:
        """A new plan; kept where it is likely to be wanted again. `others` are the octets that it holds for."""
        plan = self._parse(raw)
        unusual = plan.fault or plan.no_credential or plan.route.refusal or plan.request_id
        if not unusual and len(raw) <= _LONGEST_HEAD:
            if len(self._kept) >= _MOST_PLANS:
                self._kept.clear()
            self._kept[sha256(others).digest()] = plan
        return plan

    def _parse(self, raw: bytes) -> Plan:
        head = parse_request_head(raw, self._limits)
        route, framing, expects, fault = UNROUTED, NO_BODY, False, None
        try:
            framing = request_framing(head, self._limits)
            expects = expects_continue(head)
            route = self._routes.find(head.method, head.target)
        except GatewayError as error:
            fault = error.with_traceback(None)  # its frames hold it: a cycle
        secret, no_credential = None, None
        try:
            secret = None if route is PREFLIGHT else credential(head.known)
        except GatewayError as error:
            no_credential = error.with_traceback(None)
        before, after = self._backend_lines(head)
        kind = route.kind
        lacks_body = route.needs_body and framing.length == 0 and b"content-length" not in head.known
        refused = fault is not None or route.refusal is not None
        return Plan(
            method=head.method,
            target=head.target,
            minor=head.minor,
            words=b"%b %b" % (head.method, head.target.partition(b"?")[0]),
            keep_alive=keeps_alive(head),
            length=framing.length,
            expects=expects,
            accept=b", ".join(head.known.get(b"accept", ())),
            request_id=given_id(head),
            credential=None if secret is None else sha256(secret).digest(),
            own_lines=field_lines(self._cors.fields(head)),
            preflight=self._cors.preflight(head) if route is PREFLIGHT else (),
            route=route,
            before=before,
            after=after,
            fault=fault,
            no_credential=no_credential,
            is_special=refused or lacks_body or kind.local or kind.role is not Role.INFER,
            lacks_body=lacks_body,
            is_straight=keeps_alive(head) and head.minor == 1 and framing.length is not None and not kind.local,
            label=route.label,
            slot=kind.slot,
            rated=kind.rated,
            metered=kind.metered,
            heartbeats=kind.slot and head.method == b"POST",
        )

    def _backend_lines(self, head: RequestHead) -> tuple[bytes, bytes]:
        """The request as the backend gets it: same method, target and fields, our Host and credentials."""
        dropped = _NOT_FORWARDED
        if b"connection" in head.known:
            dropped = dropped | connection_options(head.known)
        before = b"%b %b HTTP/1.1\r\n%bX-Request-Id: " % (head.method, head.target, self._backend_fields)
        passed = [field for field, lower in zip(head.fields, head.names, strict=True) if lower not in dropped]
        return before, CRLF + field_lines(passed)


def given_id(head: RequestHead) -> bytes:
    """The id that the client gave its request, if it is a sane one; else none."""
    given = head.known.get(b"x-request-id", ())
    return given[0] if len(given) == 1 and _SANE_ID.fullmatch(given[0]) else b""
