"""The formats in which clients read errors, error events and heartbeats. A new dialect is one entry of DIALECTS."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import GatewayError

# Anthropic's own types, if its name for a status differs from the catalogue's.
_ANTHROPIC_TYPES = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_CONTEXT_EXCEEDED = "exceed_context_size_error"  # llama-server's type


@dataclass(frozen=True)
class Dialect:
    """What the clients of one API parse.

    `envelope` takes an error and the request's id, and returns the JSON body of an error response. `error_event` takes
    the number that follows that of the stream's last event besides (if its events have numbers), and returns the same
    error as server-sent events, for a stream whose head has been sent. `ends_stream`: the last one of them says that
    the stream is over; otherwise only its cut shows that. `heartbeat` takes the request's position in the queue (0 if
    it waits for something else) and returns an event or comment that clients ignore. `id_field` is the beginning of a
    field line, in which clients look for the request's id besides X-Request-Id.
    """

    name: str
    envelope: Callable[[GatewayError, str], bytes]
    error_event: Callable[[GatewayError, str, int], bytes]
    heartbeat: Callable[[int], bytes]
    ends_stream: bool = False
    id_field: bytes = b""


# --- OpenAI ---


def _openai_error(error: GatewayError) -> dict[str, object]:
    kind = error.kind
    if error.reported is not None:
        return {"message": error.message, "type": kind.type, **error.reported}
    return {"message": error.message, "type": kind.type, "param": None, "code": kind.code}


def _openai_envelope(error: GatewayError, request_id: str) -> bytes:
    return _json({"error": _openai_error(error)})


def _openai_event(error: GatewayError, request_id: str, number: int) -> bytes:
    return b"data: " + _openai_envelope(error, request_id) + b"\n\n"


def _comment(position: int) -> bytes:
    return b": queued %d\n\n" % position if position else b": waiting\n\n"


# --- OpenAI's /v1/responses ---


def _responses_events(error: GatewayError, request_id: str, number: int) -> bytes:
    """Return two events: libraries raise the `error` of the first one, agents read only the second one."""
    event = {
        "type": "error",
        "sequence_number": number,
        "code": error.kind.code if error.reported is None else _failure_code(error),
        "message": error.message,
        "param": None,
        "error": _openai_error(error),
    }
    response: dict[str, object] = {
        "id": f"resp_{request_id}",
        "object": "response",
        "status": "failed",
        "error": {"code": _failure_code(error), "message": error.message},
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    failed = {"type": "response.failed", "sequence_number": number + 1, "response": response}
    return b"event: error\ndata: %b\n\nevent: response.failed\ndata: %b\n\n" % (_json(event), _json(failed))


def _failure_code(error: GatewayError) -> str:
    """Return the code of a failed response. Codex repeats the request after every code that it does not know."""
    if not error.final:
        return error.kind.code
    if error.kind.type == _CONTEXT_EXCEEDED:
        return "context_length_exceeded"
    return "insufficient_quota" if error.kind.type == "insufficient_quota" else "invalid_prompt"


# --- Anthropic ---


def _anthropic_envelope(error: GatewayError, request_id: str) -> bytes:
    kind = error.kind
    body = {"message": error.message, "type": _ANTHROPIC_TYPES.get(kind.status, kind.type), **(error.reported or {})}
    return _json({"type": "error", "error": body, "request_id": request_id})


def _anthropic_event(error: GatewayError, request_id: str, number: int) -> bytes:
    return b"event: error\ndata: " + _anthropic_envelope(error, request_id) + b"\n\n"


def _anthropic_ping(position: int) -> bytes:
    return b'event: ping\ndata: {"type": "ping"}\n\n'


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


OPENAI = Dialect("openai", _openai_envelope, _openai_event, _comment)
# Its streams have typed events, with numbers.
RESPONSES = Dialect("responses", _openai_envelope, _responses_events, _comment, ends_stream=True)
ANTHROPIC = Dialect("anthropic", _anthropic_envelope, _anthropic_event, _anthropic_ping, id_field=b"request-id: ")
DIALECTS = (OPENAI, RESPONSES, ANTHROPIC)
