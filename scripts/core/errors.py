"""The gateway's own error responses, as data: a catalogue of kinds, and the exception that carries one of them.

The backend's responses, its errors included, are relayed as they are and never pass through here, except an error that
comes when the client's response has begun. How a client reads an error is in core.dialects.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Kind:
    """One row of the catalogue: the response, and whether the connection stays open.

    `closes`: the connection closes after the response, because what follows on it cannot be trusted or will not be
    read. `retry_after_s` is the default value of the Retry-After field, in seconds. `final`: the same request would be
    refused again, so clients are told not to repeat it.
    """

    status: int
    code: str
    type: str
    message: str
    retry_after_s: int | None = None
    closes: bool = False
    final: bool = False


class GatewayError(Exception):
    """The only exception whose text is sent to a client.

    `detail` replaces the kind's message. It names the limit or the setting and never contains the client's bytes.
    `fields` are added to the response; `retry_after_s` and `final` replace the kind's own. `reported` is the backend's
    error object, which the client gets in place of the gateway's.
    """

    def __init__(
        self,
        kind: Kind,
        detail: str = "",
        *,
        fields: Fields = (),
        retry_after_s: int | None = None,
        final: bool = False,
        reported: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail or kind.message)
        self.kind = kind
        self.fields = fields
        self.retry_after_s = kind.retry_after_s if retry_after_s is None else retry_after_s
        self.final = final or kind.final
        self.reported = reported

    @property
    def message(self) -> str:
        return str(self.args[0])


class PeerGone(Exception):
    """The peer closed, reset or half-closed its connection: no response can be sent."""


BAD_REQUEST = Kind(400, "bad_request", "invalid_request_error", "The request is malformed.", closes=True, final=True)
TOO_MANY_CHOICES = Kind(
    400,
    "too_many_choices",
    "invalid_request_error",
    "The request asks for more choices than the API key may have at once.",
    final=True,
)
BATCH_TOO_LARGE = Kind(
    400,
    "batch_too_large",
    "invalid_request_error",
    "The request has too many prompts or choices, texts or documents (MAX_BATCH_SIZE).",
    final=True,
)
MEMBER_NOT_ALLOWED = Kind(
    400,
    "member_not_allowed",
    "invalid_request_error",
    "A member of the request body is not allowed (MEMBER_RULES).",
    final=True,
)
BODY_TOO_DEEP = Kind(
    400, "body_too_deep", "invalid_request_error", "The request body is nested too deeply (MAX_JSON_DEPTH).", final=True
)
MODEL_REQUIRED = Kind(
    400, "model_required", "invalid_request_error", "The request must name a model (model).", final=True
)
TOO_MANY_TOKENS_ASKED = Kind(
    400,
    "too_many_tokens_asked",
    "invalid_request_error",
    "The request asks for more tokens than this API key may.",
    final=True,
)
FIELDS_SEARCHED = "Looked at: Authorization (Bearer), x-api-key, api-key."  # for an API key
INVALID_API_KEY = Kind(
    401, "invalid_api_key", "authentication_error", f"Missing or invalid API key. {FIELDS_SEARCHED}", final=True
)
ROUTE_NOT_ALLOWED = Kind(
    403, "route_not_allowed", "permission_error", "This route is not allowed for this API key.", final=True
)
MODEL_NOT_ALLOWED = Kind(
    403, "model_not_allowed", "permission_error", "This API key may not use this model.", final=True
)
KEY_SUSPENDED = Kind(
    403, "key_suspended", "permission_error", "This API key is suspended: ask the operator.", final=True
)
ROUTE_NOT_FOUND = Kind(404, "route_not_found", "invalid_request_error", "There is no such route.", final=True)
MODEL_NOT_FOUND = Kind(404, "model_not_found", "invalid_request_error", "There is no such model.", final=True)
KEY_NOT_FOUND = Kind(404, "key_not_found", "invalid_request_error", "There is no such key.", final=True)
METHOD_NOT_ALLOWED = Kind(
    405, "method_not_allowed", "invalid_request_error", "The route does not support this method.", final=True
)
REQUEST_TIMEOUT = Kind(
    408,
    "request_timeout",
    "invalid_request_error",
    "The request did not arrive in time (CLIENT_HEADER_TIMEOUT, CLIENT_BODY_TIMEOUT, CLIENT_BODY_MIN_RATE).",
    closes=True,
)
LENGTH_REQUIRED = Kind(
    411,
    "length_required",
    "invalid_request_error",
    "The route needs a body with a Content-Length, or a chunked one.",
    final=True,
)
PAYLOAD_TOO_LARGE = Kind(
    413, "payload_too_large", "invalid_request_error", "The request body is too large.", closes=True, final=True
)
URI_TOO_LONG = Kind(
    414, "uri_too_long", "invalid_request_error", "The request line is too long.", closes=True, final=True
)
CODING_NOT_SUPPORTED = Kind(
    415, "coding_not_supported", "invalid_request_error", "The body may have no Content-Encoding.", final=True
)
FORM_NOT_SUPPORTED = Kind(
    415, "form_not_supported", "invalid_request_error", "The route takes JSON, not a form.", final=True
)
EXPECTATION_FAILED = Kind(
    417,
    "expectation_failed",
    "invalid_request_error",
    "The only expectation supported is 100-continue.",
    closes=True,
    final=True,
)
RATE_LIMIT_EXCEEDED = Kind(429, "rate_limit_exceeded", "rate_limit_error", "Too many requests for this API key.")
# OpenAI's own type for a used-up quota: its clients repeat every other 429.
TOKEN_QUOTA_EXCEEDED = Kind(
    429, "token_quota_exceeded", "insufficient_quota", "The API key's token quota is used up.", final=True
)
TOKEN_RATE_EXCEEDED = Kind(
    429, "token_rate_exceeded", "rate_limit_error", "Too many tokens for this API key within a minute."
)
CALLER_PAUSED = Kind(
    429,
    "caller_paused",
    "rate_limit_error",
    "Requests of this API key were at work in most of the backend's last deaths: it has to wait.",
    retry_after_s=60,
)
HEADER_FIELDS_TOO_LARGE = Kind(
    431,
    "header_fields_too_large",
    "invalid_request_error",
    "The request's header fields are too large.",
    closes=True,
    final=True,
)
INTERNAL_ERROR = Kind(500, "internal_error", "api_error", "The gateway failed; the log says why.", closes=True)
RELOAD_FAILED = Kind(500, "reload_failed", "api_error", "The keys file could not be trusted; the last good keys stay.")
BACKEND_UNAVAILABLE = Kind(502, "backend_unavailable", "api_error", "The backend did not take or answer the request.")
BACKEND_MALFORMED = Kind(502, "backend_malformed", "api_error", "The backend's answer is not valid HTTP/1.1.")
MODEL_LOAD_FAILED = Kind(502, "model_load_failed", "api_error", "The model could not be loaded.", retry_after_s=5)
REQUEST_HELD_BACK = Kind(
    502,
    "request_held_back",
    "api_error",
    "The backend died while it worked on this request: the same request is held back for an hour.",
    final=True,
)
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
TOO_MANY_VIEWERS = Kind(
    503, "too_many_viewers", "overloaded_error", "Too many streams of the board are open.", retry_after_s=30
)
MEMORY_FULL = Kind(
    503,
    "memory_full",
    "overloaded_error",
    "Too many request bodies and heads are held at once.",
    retry_after_s=2,
    closes=True,
)
# Final: the backend would need as long for the repetition.
BACKEND_TIMEOUT = Kind(
    504,
    "backend_timeout",
    "api_error",
    "The backend's answer did not begin within REQUEST_TIMEOUT, which bounds the whole generation unless it streams.",
    final=True,
)
VERSION_NOT_SUPPORTED = Kind(
    505,
    "http_version_not_supported",
    "invalid_request_error",
    "The gateway speaks HTTP/1.1 and HTTP/1.0.",
    closes=True,
    final=True,
)

CATALOGUE: tuple[Kind, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Kind))
