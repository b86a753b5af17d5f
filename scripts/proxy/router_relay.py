"""The relay with several models: llama-server's router ends a response as if it were whole if a model's process dies.

It adds the text "proxy error: …" as a chunk of its own, and then the last chunk. Here such a response is cut visibly.
"""

import re

from core.errors import BACKEND_UNAVAILABLE, GatewayError
from proxy.relay import Relay

# Within JSON a line end is escaped, so nothing that a model generates looks like this.
_CUT = re.compile(rb"(?:\A|(?<=\r\n))[0-9A-Fa-f]{1,8}\r\nproxy error: ")
_MARK = b"\r\nproxy error: "
_TEXT = b"proxy error: "


class RouterRelay(Relay):
    """One response of a router."""

    __slots__ = ()

    def _receive_chunk(self, data: bytes) -> None:
        if _MARK in data:
            self._receive(data)
        else:
            super()._receive_chunk(data)

    def _receive(self, data: bytes) -> None:
        cut = _CUT.search(data)
        if cut is None:
            super()._receive(data)
            return
        if cut.start():
            super()._receive(data[: cut.start()])
        self._finished.set_exception(_error())

    def _take(self, data: bytes) -> bytes:
        encoded = super()._take(data)
        if self._last.startswith(_TEXT) or (_MARK in data and _CUT.search(data) is not None):
            raise _error()
        return encoded


def _error() -> GatewayError:
    return GatewayError(BACKEND_UNAVAILABLE, "The model's process ended in the middle of its answer.")
