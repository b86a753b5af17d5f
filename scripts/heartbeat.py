"""Signs of life for a client that asked for a stream and hears nothing: queued, model loading, or deferred.

Proxies cut a connection that is silent for 100 s or so. A request that did not ask for a stream is never answered
early; one that did gets its head and a comment line each interval until the backend's first byte.
"""

import json
from collections.abc import Sequence

from answer import Answer
from errors import Dialect

_ANTHROPIC_PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def sign_of_life(answer: Answer, body: Sequence[bytes], position: int) -> bool:
    """Send one, beginning the stream if need be; False where the request did not ask for a stream.

    `position` is the request's place in the queue, 0 where it waits for something else.
    """
    if not answer.started:
        if not asks_for_stream(body):
            return False
        answer.begin_stream()
    if answer.dialect is Dialect.ANTHROPIC:
        answer.send_event(_ANTHROPIC_PING)
    else:
        answer.send_event(b": queued %d\n\n" % position if position else b": waiting\n\n")
    return True


def asks_for_stream(body: Sequence[bytes]) -> bool:
    """Whether a JSON request body says `"stream": true`. Parsed only once a client has waited, not for each request."""
    try:
        return json.loads(b"".join(body)).get("stream") is True
    except (ValueError, AttributeError, RecursionError):
        return False
