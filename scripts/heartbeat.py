"""Signs of life for a client that asked for a stream and hears nothing: queued, model loading, or deferred.

Proxies cut a connection that is silent for 100 s or so. A request that did not ask for a stream is never answered
early; one that did gets its head and a comment line each interval until the backend's first byte.
"""

import json
from collections.abc import Sequence

from admission import Ticket
from answer import Answer
from errors import Dialect
from wire import ClientWire

_ANTHROPIC_PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class Heartbeat:
    """What a client's wire calls each interval until the backend answers."""

    __slots__ = ("_answer", "_body", "_client", "_interval_s", "_ticket")

    def __init__(
        self, client: ClientWire, answer: Answer, body: Sequence[bytes], interval_s: float, ticket: Ticket
    ) -> None:
        self._client = client
        self._answer = answer
        self._body = body
        self._interval_s = interval_s
        self._ticket = ticket

    def beat(self, now_s: float) -> None:
        if not self._answer.started:
            if not asks_for_stream(self._body):
                self._client.stop_beating()
                return
            self._answer.begin_stream()
        self._client.beat_s = now_s + self._interval_s
        self._answer.send_event(self._sign())

    def _sign(self) -> bytes:
        if self._answer.dialect is Dialect.ANTHROPIC:
            return _ANTHROPIC_PING
        if self._ticket.waiting is None or self._ticket.waiting.done():
            return b": waiting\n\n"
        return b": queued %d\n\n" % self._ticket.position()


def asks_for_stream(body: Sequence[bytes]) -> bool:
    """Whether a JSON request body says `"stream": true`. Parsed only once a client has waited, not for each request."""
    try:
        return json.loads(b"".join(body)).get("stream") is True
    except (ValueError, AttributeError, RecursionError):
        return False
