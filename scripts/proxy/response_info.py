"""A backend response's head, and what follows from it alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from http1.grammar import (
    CRLF,
    HOP_BY_HOP,
    UNTIL_CLOSE,
    Framing,
    ResponseHead,
    connection_options,
    keeps_alive,
    parse_response_head,
    response_framing,
)

# Not for the client: the backend's request ids, origin policy and rates are not the gateway's.
_NOT_PASSED = HOP_BY_HOP | {b"x-request-id", b"request-id"}
_NOT_PASSED_FAMILIES = (b"access-control-", b"x-ratelimit-")


class DateField:
    """The Date field line (RFC 9110 section 5.6.7), as of the last tick."""

    __slots__ = ("_clock", "line")

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch."""
        self._clock = clock
        self.update()

    def update(self) -> None:
        # None of the programs sets a locale: the names are English.
        now = time.gmtime(self._clock())
        self.line = time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", now).encode()


@dataclass(frozen=True, slots=True)
class ResponseInfo:
    """A response's head, and what follows from it alone."""

    head: ResponseHead
    status: int
    lines: bytes  # status line and field lines that are passed on, in order and case
    framing: Framing
    is_event_stream: bool
    is_coded: bool  # in a Content-Encoding
    keeps_alive: bool  # the backend's connection can carry another request
    has_date: bool
    has_usage: bool  # a success in plain text, whose tokens can be read


@lru_cache(maxsize=128)
def parse_response(raw: bytes, method: bytes) -> ResponseInfo:
    """Parse the head of a response to a request with that method. Raises BACKEND_MALFORMED.

    llama-server's heads differ in their length at most, and those of its streams not even in that.
    """
    head = parse_response_head(raw)
    framing = response_framing(head, method) if head.status >= 200 else UNTIL_CLOSE  # an interim one has no body
    return ResponseInfo(
        head=head,
        status=head.status,
        lines=relayed_lines(head),
        framing=framing,
        is_event_stream=is_event_stream(head),
        is_coded=b"content-encoding" in head.known,
        # Older llama-servers leave the body of a request that they refuse in the connection.
        keeps_alive=keeps_alive(head) and head.status < HTTPStatus.BAD_REQUEST,
        has_date=b"date" in head.known,
        has_usage=head.status == HTTPStatus.OK and b"content-encoding" not in head.known,
    )


def relayed_lines(head: ResponseHead) -> bytes:
    """Return the status line and the field lines that are passed on to the client, in order and case."""
    dropped = connection_options(head.known) | _NOT_PASSED if b"connection" in head.known else _NOT_PASSED
    if head.status == HTTPStatus.NO_CONTENT:
        dropped |= {b"content-length"}  # RFC 9110 section 8.6
    blank = b"" if b" " in head.status_line else b" "  # RFC 9112 section 4: also if no reason follows
    lines = [b"HTTP/1.1 ", head.status_line, blank, CRLF]
    for (name, value), lower in zip(head.fields, head.names, strict=True):
        if lower not in dropped and not lower.startswith(_NOT_PASSED_FAMILIES):
            lines += (name, b": ", value, CRLF)
    return b"".join(lines)


def is_event_stream(head: ResponseHead) -> bool:
    types = head.known.get(b"content-type")
    return types is not None and types[0].lower().startswith(b"text/event-stream")
