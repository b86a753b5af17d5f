"""A connection to the backend: requests go out, heads come back, and the rest is whoever's asked for it."""

import asyncio
from collections.abc import Callable
from math import inf
from typing import cast

from errors import BACKEND_MALFORMED, BACKEND_UNAVAILABLE, GatewayError
from http1 import HEAD_END
from turns import Outbox
from waiting import Deadlines
from wire import Expectant, Wire

_BEGINNING = b"HTTP/1."  # of any response; who begins otherwise may never come to a head's end


class Pulse:
    """Whether the backend has sent anything, on whatever connection, since somebody last looked."""

    __slots__ = ("felt",)

    def __init__(self) -> None:
        self.felt = False


class BackendWire(Wire):
    """A connection to the backend. It is abandoned, never repaired: what surprises it aborts it."""

    __slots__ = ("_asked", "_cut", "_head_bytes", "_hearer", "_part", "_pulse", "_reused", "rest")

    def __init__(
        self, writer: asyncio.StreamWriter, deadlines: Deadlines, outbox: Outbox, head_bytes: int, pulse: Pulse
    ) -> None:
        super().__init__(writer, cast(asyncio.Transport, writer.transport), deadlines, outbox)
        self._pulse = pulse
        self._head_bytes = head_bytes
        self._hearer: Expectant | None = None  # who waits for a head
        self._asked = False  # a request is out, and bytes may come
        self._reused = False
        self._cut = False  # it closed while a head was awaited
        self._part = b""
        self.rest = b""  # what came behind the last head

    def data_received(self, data: bytes) -> None:
        self._pulse.felt = True
        if self._sink is not None:
            self._sink(data)
        elif self._hearer is not None:
            self._take_head(data, self._hearer)
        elif self._asked:
            self.rest += data
        else:
            self.abort()  # it speaks without being asked

    def ask(self, request: bytes, hearer: Expectant) -> None:
        """Send a request; `hearer` is told its response's head."""
        self._asked = True
        self.deadline_s = inf
        self._outbox.put((self.transport, request))
        self._hearer = hearer
        if self.ended:
            self._cut_before_head()

    def hear(self, hearer: Expectant) -> None:
        """Let `hearer` have the next response head, its empty line included.

        It fails with BACKEND_UNAVAILABLE or BACKEND_MALFORMED.
        """
        self._hearer = hearer
        if self.rest:
            self._take_head(self.take_rest(), hearer)
        if self.ended:
            self._cut_before_head()

    def _take_head(self, data: bytes, hearer: Expectant) -> None:
        """Look for the end of a head in what has come, and keep what has where it is not there yet."""
        part, rest = self._part, b""
        if part and HEAD_END not in part[-3:] + data:
            head, end = part + data, b""
        else:
            head, end, rest = (part + data).partition(HEAD_END)
        if len(head) > self._head_bytes and len(head.rstrip(HEAD_END)) > self._head_bytes:  # its end may be torn
            self._hearer = None
            words = f"The backend's response head exceeds MAX_RESPONSE_HEADER_SIZE ({self._head_bytes} octets)."
            hearer.fail(GatewayError(BACKEND_MALFORMED, words))
        elif end:
            self._hearer = None
            self._part = b""
            self._reused = False  # it has answered: what becomes of it now is no chance meeting
            self.rest = rest
            hearer.keep(head + end)
        elif head.startswith(_BEGINNING[: len(head)]):
            self._part = head
        else:
            self._hearer = None
            hearer.fail(GatewayError(BACKEND_MALFORMED, "The backend does not speak HTTP."))

    def _end(self, *, orderly: bool) -> None:
        super()._end(orderly=orderly)
        self._cut_before_head()

    def _cut_before_head(self) -> None:
        hearer, self._hearer = self._hearer, None
        if hearer is not None:
            self._cut = True
            hearer.fail(GatewayError(BACKEND_UNAVAILABLE, "The backend closed before it answered."))

    def take_rest(self) -> bytes:
        """What has come behind the last head so far."""
        rest, self.rest = self.rest, b""
        return rest

    def pass_to(self, sink: Callable[[bytes], None], on_end: Callable[[bool], None]) -> None:
        """From now on every received byte goes to `sink`."""
        self._sink = sink
        self.on_end = on_end

    def rest_idle(self, seconds: float) -> None:
        """Nobody expects bytes any more; any that come abort the connection, and so does the time."""
        self._sink = self.on_end = None
        self._asked = False
        self.rest = b""
        self._reused = True
        self.deadline_s = self._deadlines.now_s + seconds

    def was_stale(self) -> bool:
        """Whether it was closed in an orderly way before it had said anything in answer to a request: as a server does
        with a connection that it has kept open long enough, and that a request has just missed."""
        return self._reused and self.orderly and self._cut and not self._part
