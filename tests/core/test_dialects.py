"""dialects.py: an error as a response's body and as an event, and a heartbeat, in each dialect."""

import json
import re
from typing import Any

import pytest

from core import errors
from core.dialects import ANTHROPIC, DIALECTS, OPENAI, RESPONSES, Dialect
from core.errors import CATALOGUE, GatewayError, Kind

ID = "req-5f2b8c1d9a3e-7"
each_kind = pytest.mark.parametrize("kind", CATALOGUE, ids=[kind.code for kind in CATALOGUE])
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=[dialect.name for dialect in DIALECTS])


def test_names_are_unique() -> None:
    assert len({dialect.name for dialect in DIALECTS}) == len(DIALECTS)


@each_dialect
def test_any_text_is_one_line_of_ascii(dialect: Dialect) -> None:
    error = GatewayError(errors.RELOAD_FAILED, 'line 1\r\n\r\ndata: "x"\u2028\u00e9\0')
    text = dialect.envelope(error, ID)
    assert re.fullmatch(rb"[ -~]+", text)
    assert json.loads(text)["error"]["message"] == error.message
    lines = dialect.error_event(error, ID, 1).split(b"\n")
    assert lines[-2:] == [b"", b""]
    assert all(re.fullmatch(rb"(|event: (error|response.failed)|data: \{[ -~]+\})", line) for line in lines)


# --- Envelopes ---


@each_kind
@pytest.mark.parametrize("dialect", [OPENAI, RESPONSES], ids=["openai", "responses"])
def test_openai_envelope_has_string_codes(kind: Kind, dialect: Dialect) -> None:
    body = json.loads(dialect.envelope(GatewayError(kind, "Why."), ID))
    assert body == {"error": {"message": "Why.", "type": kind.type, "param": None, "code": kind.code}}
    assert isinstance(body["error"]["code"], str)


ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@each_kind
def test_anthropic_envelope(kind: Kind) -> None:
    body = json.loads(ANTHROPIC.envelope(GatewayError(kind, "Why."), ID))
    expected = ANTHROPIC_TYPES.get(kind.status, "api_error" if kind.status == 502 else "invalid_request_error")
    assert body == {"type": "error", "error": {"message": "Why.", "type": expected}, "request_id": ID}


# --- Events ---


def test_openai_event() -> None:
    error = GatewayError(errors.BACKEND_TIMEOUT)
    assert OPENAI.error_event(error, ID, 1) == b"data: " + OPENAI.envelope(error, ID) + b"\n\n"


def test_anthropic_event() -> None:
    error = GatewayError(errors.BACKEND_TIMEOUT)
    assert ANTHROPIC.error_event(error, ID, 1) == b"event: error\ndata: " + ANTHROPIC.envelope(error, ID) + b"\n\n"


def responses_events(error: GatewayError, number: int = 0) -> list[dict[str, Any]]:
    events = RESPONSES.error_event(error, ID, number).decode().removesuffix("\n\n").split("\n\n")
    names, data = zip(*(event.removeprefix("event: ").split("\ndata: ") for event in events), strict=True)
    bodies = [json.loads(text) for text in data]
    assert list(names) == [body["type"] for body in bodies]
    return bodies


def test_responses_events_are_typed_and_the_second_one_ends_the_stream() -> None:
    first, second = responses_events(GatewayError(errors.BACKEND_UNAVAILABLE, "Why."), 7)
    nested = {"message": "Why.", "type": "api_error", "param": None, "code": "backend_unavailable"}
    flat = {"type": "error", "sequence_number": 7, "code": "backend_unavailable", "message": "Why.", "param": None}
    assert first == flat | {"error": nested}
    assert (second["type"], second["sequence_number"], second["response"]["status"]) == ("response.failed", 8, "failed")
    assert second["response"]["error"] == {"code": "backend_unavailable", "message": "Why."}
    assert second["response"]["id"] == f"resp_{ID}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GatewayError(errors.QUEUE_TIMEOUT), "queue_timeout"),
        (GatewayError(errors.LOADING), "loading"),
        (GatewayError(errors.TOKEN_QUOTA_EXCEEDED), "insufficient_quota"),
        (GatewayError(errors.BACKEND_TIMEOUT), "invalid_prompt"),
        (GatewayError(errors.QUEUE_TIMEOUT, final=True), "invalid_prompt"),
        (GatewayError(Kind(400, "x", "exceed_context_size_error", "Too long."), final=True), "context_length_exceeded"),
        (GatewayError(Kind(400, "x", "invalid_request_error", "Wrong."), final=True), "invalid_prompt"),
        (GatewayError(Kind(500, "x", "server_error", "Failed.")), "x"),
    ],
)
def test_a_failed_response_has_a_code_that_stops_agents_if_a_repetition_is_useless(
    error: GatewayError, code: str
) -> None:
    assert responses_events(error)[1]["response"]["error"]["code"] == code


# --- The backend's own error ---

OWN = {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 9052, "n_ctx": 4096}


def test_the_backends_own_error_keeps_its_members() -> None:
    error = GatewayError(Kind(400, "x", "exceed_context_size_error", "too long"), final=True, reported=OWN)
    assert json.loads(OPENAI.error_event(error, ID, 0).removeprefix(b"data: "))["error"] == OWN
    assert json.loads(ANTHROPIC.envelope(error, ID)) == {"type": "error", "error": OWN, "request_id": ID}
    first, second = responses_events(error)
    assert (first["error"], first["message"], first["code"]) == (OWN, "too long", "context_length_exceeded")
    assert second["response"]["error"] == {"code": "context_length_exceeded", "message": "too long"}


@each_dialect
def test_an_own_error_without_a_type_gets_one(dialect: Dialect) -> None:
    error = GatewayError(Kind(400, "x", "api_error", "too long"), reported={"message": "too long", "code": 1})
    body = json.loads(dialect.envelope(error, ID))["error"]
    assert body == {"message": "too long", "type": "api_error", "code": 1}


# --- Heartbeats ---


@pytest.mark.parametrize("dialect", [OPENAI, RESPONSES], ids=["openai", "responses"])
def test_openai_heartbeat_is_a_comment_with_the_position(dialect: Dialect) -> None:
    assert dialect.heartbeat(3) == b": queued 3\n\n"
    assert dialect.heartbeat(0) == b": waiting\n\n"


@pytest.mark.parametrize("position", [0, 3])
def test_anthropic_heartbeat_is_a_ping(position: int) -> None:
    assert ANTHROPIC.heartbeat(position) == b'event: ping\ndata: {"type": "ping"}\n\n'
