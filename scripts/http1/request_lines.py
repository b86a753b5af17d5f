"""The first line of an HTTP request within a body: bytes in, no I/O.

Llama-servers of before November 2025 take a body for the next request if they refuse one without reading it.
"""

import re

from core.errors import BAD_REQUEST, GatewayError

_VERSION = b" HTTP/1."
CR = ord("\r")  # that each such line has
_REQUEST_LINE = re.compile(rb"\n[A-Z]+ [^ \r\n]+ HTTP/1\.[01]\r\n")
_MAX_LINE_BYTES = 16384  # llama-server refuses a target of more than half of that
_FOUND = "A line of the request's body is the first line of an HTTP request."


def check_lines(body: bytes) -> None:
    """Raise BAD_REQUEST if a line of a whole body could begin an HTTP/1 request."""
    RequestLines().feed(body)


class RequestLines:
    """Looks for such a line in a body as it arrives. Each call takes time in proportion to the bytes that it gets."""

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = b"\n"  # the last one so far, after the end of the one before; nothing if it is too long

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises BAD_REQUEST if a line that ends in them could begin a request."""
        end = data.rfind(b"\n")
        if end < 0:
            self._keep(self._line + data[:_MAX_LINE_BYTES])
            return
        text = self._line + data
        # Nearly no text has a version of HTTP: the expression stops at each line.
        if _VERSION in text and _REQUEST_LINE.search(text) is not None:
            raise GatewayError(BAD_REQUEST, _FOUND)
        self._keep(data[end : end + 1 + _MAX_LINE_BYTES])

    def _keep(self, line: bytes) -> None:
        self._line = line if len(line) <= _MAX_LINE_BYTES else b""
