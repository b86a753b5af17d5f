"""Writing a request whose body is large: piece by piece, as the socket takes them, and without a copy of the whole.

To join a body of 64 KiB with its head takes 1.5 microseconds of the 45 that its request takes. One of 30 MB held the
event loop for up to 35 ms, and was in memory twice.
"""

import asyncio
import os
from collections import deque
from collections.abc import Sequence

Piece = bytes | bytearray | memoryview


class PieceWriter:
    """Writes pieces in order to a transport that is no TLS transport. In a WriteBatcher it stands for the transport.

    As long as it keeps pieces back, the transport's own buffer is above its high-water mark, or is about to be filled
    by `resume_writing`. So the transport's `get_write_buffer_size` is 0 only if all pieces have been written.
    """

    __slots__ = ("_descriptor", "_transport", "_unsent")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._unsent: deque[Piece] = deque()

    def write(self, pieces: Sequence[Piece]) -> None:
        sent = self._send(pieces)
        if sent < sum(map(len, pieces)):
            self._keep(pieces, sent)
            self.resume_writing()

    def _send(self, pieces: Sequence[Piece]) -> int:
        """Return how many bytes the socket has taken: none of more than 1,024 pieces, or if it is at fault.

        Its errors are left to the transport, which will see them too.
        """
        # What the transport has comes first, and the descriptor of a closed one may be another's by now.
        if self._transport.get_write_buffer_size() or self._transport.is_closing():
            return 0
        try:
            return os.writev(self._descriptor, pieces)
        except OSError:
            return 0

    def _keep(self, pieces: Sequence[Piece], sent: int) -> None:
        for piece in pieces:
            if sent < len(piece):
                self._unsent.append(memoryview(piece)[sent:])
            sent = max(sent - len(piece), 0)

    def resume_writing(self) -> None:
        """Hand pieces over until the transport has enough of them."""
        high = self._transport.get_write_buffer_limits()[1]
        while self._unsent and self._transport.get_write_buffer_size() <= high:
            self._transport.write(self._unsent.popleft())

    def close(self) -> None:
        """Let go of what was not written."""
        self._unsent.clear()
