"""Reads a request body as it arrives, and lets other connections go on in between.

A chunked body costs time for each chunk, however small it is. So a large read is taken in slices, one per turn of the
loop, and the client is not read meanwhile.
"""

import asyncio
from collections.abc import Callable

from core.errors import GatewayError
from http1.bodies import RequestBody
from transport.waiter import Waiter

_SLICE_BYTES = 32 << 10  # a millisecond of chunks of one byte


class BodyReader:
    """Gives received bytes to a body. `waiter` gets a result once the body is complete, or its error."""

    __slots__ = ("_at", "_body", "_on_bytes", "_pause", "_pending", "_resume", "trailing_data", "waiter")

    def __init__(
        self, body: RequestBody, on_bytes: Callable[[int], None], pause: Callable[[], None], resume: Callable[[], None]
    ) -> None:
        """`on_bytes` gets the number of bytes of each piece of payload, and may raise GatewayError.

        `pause` and `resume` are called for the reading of more bytes.
        """
        self._body = body
        self._on_bytes = on_bytes
        self._pause = pause
        self._resume = resume
        self._pending = b""  # received, and left for later turns from `_at` on
        self._at = 0
        self.waiter: Waiter[None] = Waiter()
        self.trailing_data = b""  # what follows a complete body

    @property
    def has_pending(self) -> bool:
        """Whether received bytes are left for later turns."""
        return bool(self._pending)

    def receive(self, data: bytes) -> None:
        """Take received bytes."""
        if self.waiter.done:
            self.trailing_data += data
        elif self._pending:  # the transport had more to give when it was paused
            self._pending += data
        elif len(data) <= _SLICE_BYTES or not self._body.is_chunked:
            self._feed(data)
        else:
            self._pending = data
            self._pause()
            self._take_slice()

    def _take_slice(self) -> None:
        """Give the next slice to the body, and the ones after it in later turns."""
        if self.waiter.done:  # the wait has ended
            return
        start = self._at
        self._at += _SLICE_BYTES
        piece = self._pending[start : self._at]
        if self._at < len(self._pending):
            asyncio.get_running_loop().call_soon(self._take_slice)
            self._feed(piece)
        else:
            self._pending, self._at = b"", 0
            self._resume()
            self._feed(piece)

    def _feed(self, data: bytes) -> None:
        body = self._body
        try:
            before = body.payload_bytes
            body.feed(data)
            self._on_bytes(body.payload_bytes - before)
        except GatewayError as error:
            self.waiter.set_exception(error)
        else:
            if body.done:
                self.trailing_data = body.trailing_data + self._pending[self._at :]
                self.waiter.set_result(None)
