"""Every answer that the gateway gives on its own behalf, as data.

One catalogue of kinds, one exception that carries a kind to the one place that answers, one envelope a dialect. What
the backend answers, its errors included, never comes through here.
"""

import enum
import json
from dataclasses import dataclass

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Kind:
    """One row of the catalogue: what the client is told, and what becomes of the connection.

    `closes` says that the bytes that follow cannot be trusted, or will not be read. `retry_after_s` is the default for
    the Retry-After field; whoever raises may know better.
    """

    status: int
    code: str
    type: str
    message: str
    retry_after_s: int | None = None
    closes: bool = False


class GatewayError(Exception):
    """The only exception whose text is meant for a client.

    `detail` replaces the kind's message. It names the limit or the setting and never echoes the client's bytes.
    """

    def __init__(self, kind: Kind, detail: str = "", *, fields: Fields = (), retry_after_s: int | None = None) -> None:
        super().__init__(detail or kind.message)
        self.kind = kind
        self.fields = fields
        self.retry_after_s = kind.retry_after_s if retry_after_s is None else retry_after_s

    @property
    def message(self) -> str:
        return str(self.args[0])


class PeerGone(Exception):
    """The peer closed, reset or half-closed its connection; there is nobody left to answer."""


BAD_REQUEST = Kind(400, "bad_request", "invalid_request_error", "The request is malformed.", closes=True)
INVALID_API_KEY = Kind(401, "invalid_api_key", "authentication_error", "Missing or invalid API key.")
ROUTE_NOT_ALLOWED = Kind(403, "route_not_allowed", "permission_error", "This route is not allowed for this API key.")
KEY_SUSPENDED = Kind(403, "key_suspended", "permission_error", "This API key is suspended.")
ROUTE_NOT_FOUND = Kind(404, "route_not_found", "invalid_request_error", "There is no such route.")
METHOD_NOT_ALLOWED = Kind(405, "method_not_allowed", "invalid_request_error", "The route does not support this method.")
REQUEST_TIMEOUT = Kind(
    408,
    "request_timeout",
    "invalid_request_error",
    "The request did not arrive in time (CLIENT_HEADER_TIMEOUT, CLIENT_BODY_TIMEOUT).",
    closes=True,
)
LENGTH_REQUIRED = Kind(
    411, "length_required", "invalid_request_error", "The route needs a body with a Content-Length, or a chunked one."
)
PAYLOAD_TOO_LARGE = Kind(
    413, "payload_too_large", "invalid_request_error", "The request body is too large.", closes=True
)
URI_TOO_LONG = Kind(414, "uri_too_long", "invalid_request_error", "The request line is too long.", closes=True)
EXPECTATION_FAILED = Kind(
    417, "expectation_failed", "invalid_request_error", "The only expectation supported is 100-continue.", closes=True
)
RATE_LIMIT_EXCEEDED = Kind(429, "rate_limit_exceeded", "rate_limit_error", "Too many requests for this API key.")
TOKEN_QUOTA_EXCEEDED = Kind(
    429, "token_quota_exceeded", "rate_limit_error", "The API key's token quota for today is used up."
)
HEADER_FIELDS_TOO_LARGE = Kind(
    431, "header_fields_too_large", "invalid_request_error", "The request's header fields are too large.", closes=True
)
INTERNAL_ERROR = Kind(500, "internal_error", "api_error", "The gateway failed; the log says why.", closes=True)
RELOAD_FAILED = Kind(500, "reload_failed", "api_error", "The keys file could not be trusted; the last good keys stay.")
BACKEND_UNAVAILABLE = Kind(502, "backend_unavailable", "api_error", "The backend did not take or answer the request.")
BACKEND_MALFORMED = Kind(502, "backend_malformed", "api_error", "The backend's answer is not valid HTTP/1.1.")
QUEUE_FULL = Kind(503, "queue_full", "overloaded_error", "The queue is full.", retry_after_s=5)
QUEUE_TIMEOUT = Kind(
    503, "queue_timeout", "overloaded_error", "No slot became free in time (QUEUE_TIMEOUT).", retry_after_s=5
)
LOADING = Kind(
    503, "loading", "overloaded_error", "The model was not ready in time (COLD_START_WAIT).", retry_after_s=10
)
DRAINING = Kind(503, "draining", "overloaded_error", "The gateway is shutting down.", retry_after_s=5, closes=True)
TOO_MANY_CONNECTIONS = Kind(
    503,
    "too_many_connections",
    "overloaded_error",
    "The gateway has too many connections (MAX_CONNECTIONS).",
    retry_after_s=2,
    closes=True,
)
MEMORY_FULL = Kind(
    503, "memory_full", "overloaded_error", "Too many request bodies are held at once.", retry_after_s=2, closes=True
)
BACKEND_TIMEOUT = Kind(
    504,
    "backend_timeout",
    "api_error",
    "The backend did not answer in time (BACKEND_CONNECT_TIMEOUT, REQUEST_TIMEOUT, STREAM_IDLE_TIMEOUT).",
)
VERSION_NOT_SUPPORTED = Kind(
    505, "http_version_not_supported", "invalid_request_error", "The gateway speaks HTTP/1.1 and HTTP/1.0.", closes=True
)

CATALOGUE: tuple[Kind, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Kind))


class Dialect(enum.Enum):
    """Whose shape of errors and events a route's clients parse."""

    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI's /v1/responses: its stream has typed events
    ANTHROPIC = "anthropic"


def envelope(error: GatewayError, dialect: Dialect = Dialect.OPENAI) -> bytes:
    """The JSON body of an error answer."""
    body: dict[str, object] = {"message": error.message, "type": error.kind.type}
    if dialect is Dialect.ANTHROPIC:
        return json.dumps({"type": "error", "error": body}).encode()
    return json.dumps({"error": {**body, "param": None, "code": error.kind.code}}).encode()


def event(error: GatewayError, dialect: Dialect) -> bytes:
    """The same error as one server-sent event, for a stream whose head has gone out."""
    if dialect is Dialect.OPENAI:
        return b"data: " + envelope(error) + b"\n\n"
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: " + envelope(error, dialect) + b"\n\n"
    body = {"type": "error", "code": error.kind.code, "message": error.message, "param": None}
    return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
