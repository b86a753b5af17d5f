"""A connection to the backend: requests go out, response heads come back, and bodies go to their receiver."""

import asyncio
import re
import socket
from collections.abc import Callable, Sequence
from enum import IntEnum
from math import inf
from typing import cast

from core.errors import BACKEND_MALFORMED, BACKEND_UNAVAILABLE, GatewayError
from http1.grammar import HEAD_END
from transport.peer_protocol import PeerProtocol
from transport.piece_writer import Piece, PieceWriter
from transport.tcp import CLOSED, tcp_state
from transport.ticker import Ticker
from transport.waiter import Waiter
from transport.write_batching import WriteBatcher

_BEGINNING = b"HTTP/1."  # of any response; bytes that begin differently may never contain the end of a head
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")  # nor may bytes with a line that does not end with CRLF

_CLOSED_EARLY = "The backend closed before it answered."
_LATE_END_BYTES = 4096  # more than llama-server's report of a response takes
CROSSING_MS = 20  # an end that crosses a request comes this soon after it


class Missed(IntEnum):
    """Whether the backend ended a connection before it had read the request, so that nothing was processed."""

    NO = 0
    IF_ALIVE = 1  # if the process has not died: it has closed a kept connection as the request came
    PROBABLY = 2  # only a server that resets connections on purpose can have read the request
    SURELY = 3


class LastActivity:
    """Whether the backend has sent anything, on any connection, since the flag was last cleared."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = False


class BackendProtocol(PeerProtocol):
    """A connection to the backend. It is never repaired: any surprise aborts it."""

    __slots__ = (
        "_answered",
        "_awaits_head",
        "_crossing_ms",
        "_head",
        "_last_activity",
        "_max_head_bytes",
        "_partial_head",
        "_piece_writer",
        "_requested",
        "_reused",
        "ended_s",
        "late_end",
        "leaving",
        "missed",
        "on_lost",
        "received",
    )

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        ticker: Ticker,
        batcher: WriteBatcher,
        max_head_bytes: int,
        last_activity: LastActivity,
        crossing_ms: int = CROSSING_MS,
    ) -> None:
        super().__init__(writer, cast(asyncio.Transport, writer.transport), ticker, batcher)
        self._piece_writer = PieceWriter(self.transport)
        self._last_activity = last_activity
        self._crossing_ms = crossing_ms
        self._max_head_bytes = max_head_bytes
        self._head: Waiter[bytes] = Waiter()  # gets each head; made once for all requests of the connection
        self._awaits_head = False
        self._requested = False  # a request is out, and bytes may come
        self._reused = False
        self._answered = False  # a response head has come since it was made or parked
        self._partial_head = b""
        self.ended_s = inf  # when the connection ended
        self.late_end = b""  # the end of what has come of a response that was given up
        self.leaving = False  # its request is given up, and what has still been sent of the response is read
        self.missed = Missed.NO  # whether it ended before it read the request
        self.on_lost: Callable[[BackendProtocol], None] | None = None  # called when the connection is closed
        self.received = b""  # what came after the last head

    def data_received(self, data: bytes) -> None:
        self._last_activity.seen = True
        if self._sink is not None:
            self._sink(data)
        elif self._awaits_head:
            self._scan_head(data)
        elif self._requested:
            self.received += data
        else:
            self.abort()  # it sends without a request

    def send_request(self, request: bytes | Sequence[Piece]) -> Waiter[bytes]:
        """Send a request, or the pieces of a large one; return what gets its response's head, as `expect_head` does."""
        self._requested = self._awaits_head = True
        self.deadline_s = inf
        if type(request) is bytes:
            self._batcher.write((self.transport, request))
        else:
            self._batcher.write((self._piece_writer, request))
        head = self._head
        head.done = False
        if self.ended:
            self._withdraw()
            self.missed = Missed.SURELY
            self._fail_head()
        return head

    def expect_head(self) -> Waiter[bytes]:
        """Return what gets the next response head with its empty line; or BACKEND_UNAVAILABLE, BACKEND_MALFORMED."""
        self._awaits_head = True
        self._head.done = False
        if self.received:
            self._scan_head(self.take_received())
        if self.ended:
            self._fail_head()
        return self._head

    def _scan_head(self, data: bytes) -> None:
        """Look for the end of the head; keep the bytes if it is not there yet."""
        partial, rest = self._partial_head, b""
        if partial and HEAD_END not in partial[-3:] + data:
            head, end = partial + data, b""
        else:
            head, end, rest = (partial + data).partition(HEAD_END)
        if (
            len(head) > self._max_head_bytes and len(head.rstrip(HEAD_END)) > self._max_head_bytes
        ):  # its end may be torn
            message = f"The backend's response head exceeds MAX_RESPONSE_HEADER_SIZE ({self._max_head_bytes} bytes)."
            self._fail_head(GatewayError(BACKEND_MALFORMED, message))
        elif end:
            self._awaits_head = False
            self._partial_head = b""
            self._answered = True
            self.received = rest
            self._head.set_result(head + end)
        elif not head.startswith(_BEGINNING[: len(head)]):
            self._fail_head(GatewayError(BACKEND_MALFORMED, "The backend does not speak HTTP."))
        elif _BARE_LINE_END.search(head, max(0, len(partial) - 1)):
            message = "A line of the backend's response head does not end with CRLF."
            self._fail_head(GatewayError(BACKEND_MALFORMED, message))
        else:
            self._partial_head = head

    def _end(self, *, cleanly: bool) -> None:
        ended_by_backend = not self.ended
        if ended_by_backend:
            self.ended_s = self._ticker.now_s
        super()._end(cleanly=cleanly)
        if ended_by_backend and self._awaits_head and not self._answered and not self._partial_head:
            self.missed = self._find_missed()
        self._fail_head()

    def _fail_head(self, error: GatewayError | None = None) -> None:
        """The head that is awaited, if one is, will not come: the connection has ended, or there is an error."""
        if self._awaits_head:
            self._awaits_head = False
            self._head.set_exception(error or GatewayError(BACKEND_UNAVAILABLE, _CLOSED_EARLY))

    def _find_missed(self) -> Missed:
        """Find out whether the request was read. The connection has ended without a byte of the response.

        What was not sent, or not taken by the backend's kernel, cannot have been read; a FIN acknowledges all that came
        before it. Bytes that reach a closed socket, or are unread in one that is being closed, are answered by a reset.
        If a process dies that has read all, its kernel sends a FIN and nothing else.
        """
        if self._withdraw() or self.transport.get_write_buffer_size():
            return Missed.SURELY
        if self.transport.get_extra_info("socket").family == socket.AF_UNIX:  # only unread bytes cause a reset of these
            return Missed.NO if self.closed_cleanly else Missed.SURELY
        tcp = tcp_state(self.transport)
        if self.closed_cleanly and (tcp.state == CLOSED or tcp.unacknowledged):
            return Missed.SURELY
        if not self._reused or tcp.sent_ms > self._crossing_ms:
            return Missed.NO
        return Missed.IF_ALIVE if self.closed_cleanly else Missed.PROBABLY

    def _withdraw(self) -> bool:
        """Do not send what the batcher still has; return whether there was anything."""
        return self._batcher.withdraw(self.transport, self._piece_writer)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._piece_writer.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._piece_writer.close()
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost(self)

    def take_received(self) -> bytes:
        """Return what has come after the last head so far, and keep none of it."""
        received, self.received = self.received, b""
        return received

    def pass_to(self, sink: Callable[[bytes], None], on_end: Callable[[bool], None]) -> None:
        """From now on give every received byte to `sink`; call `on_end` when the connection ends."""
        self._sink = sink
        self.on_end = on_end

    def leave(self, sink: Callable[[bytes], None], on_end: Callable[[bool], None], seconds: float) -> None:
        """Tell the backend that its client has left, and read what it has sent until it closes the connection.

        `on_end` is called once, after `seconds` at the latest.
        """
        self.leaving = True
        self.pass_to(sink, on_end)
        self.deadline_s = self._ticker.now_s + seconds
        try:
            self.transport.write_eof()
        except OSError:  # the backend has reset the connection, which asyncio has not read yet
            self.transport.abort()

    def give_up(self, seconds: float) -> None:
        """Tell the backend that no one waits for the response that is awaited. It closes the connection in the end.

        Only then is it certain that it will not begin: after a reset nothing more would be heard of it. `late_end` has
        the end of what it sends all the same. The connection is reset after `seconds`; at once if the request has not
        been sent whole, since the backend never begins it then, and if the response has begun.
        """
        is_sent = not (self._withdraw() or self.transport.get_write_buffer_size())
        if is_sent and self._awaits_head and not self.ended:
            self._awaits_head = False
            self.leave(self._keep_end, _drop, seconds)
        elif not self.leaving:
            self.abort()

    def _keep_end(self, data: bytes) -> None:
        self.late_end = (self.late_end + data)[-_LATE_END_BYTES:]

    def on_timeout(self, now_s: float) -> None:
        self._end(cleanly=False)
        self.abort()

    def park(self, seconds: float) -> None:
        """Expect nothing for at most `seconds`: bytes abort the connection, and so does the deadline."""
        self._sink = self.on_end = None
        self._requested = False
        self.received = b""
        self._reused = True
        self._answered = False
        self.deadline_s = self._ticker.now_s + seconds


def _drop(what: object) -> None:
    """Do nothing with it."""
