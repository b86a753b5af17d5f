"""errors.py: the catalogue, what a client is told by each kind, and in each dialect's shape."""

import json
import re

import pytest

import errors
from errors import CATALOGUE, Dialect, GatewayError, Kind, PeerGone, envelope, event

# status, code, type, whether the connection ends, seconds for Retry-After
EXPECTED = """400 bad_request invalid_request_error closes -
401 invalid_api_key authentication_error stays -
403 route_not_allowed permission_error stays -
403 key_suspended permission_error stays -
404 route_not_found invalid_request_error stays -
405 method_not_allowed invalid_request_error stays -
408 request_timeout invalid_request_error closes -
411 length_required invalid_request_error stays -
413 payload_too_large invalid_request_error closes -
414 uri_too_long invalid_request_error closes -
417 expectation_failed invalid_request_error closes -
429 rate_limit_exceeded rate_limit_error stays -
429 token_quota_exceeded rate_limit_error stays -
431 header_fields_too_large invalid_request_error closes -
500 internal_error api_error closes -
500 reload_failed api_error stays -
502 backend_unavailable api_error stays -
502 backend_malformed api_error stays -
503 queue_full overloaded_error stays 5
503 queue_timeout overloaded_error stays 5
503 loading overloaded_error stays 10
503 draining overloaded_error closes 5
503 too_many_connections overloaded_error closes 2
503 memory_full overloaded_error closes 2
504 backend_timeout api_error stays -
505 http_version_not_supported invalid_request_error closes -"""

each_kind = pytest.mark.parametrize("kind", CATALOGUE, ids=[kind.code for kind in CATALOGUE])


def row(kind: Kind) -> str:
    closes = "closes" if kind.closes else "stays"
    retry = "-" if kind.retry_after_s is None else str(kind.retry_after_s)
    return f"{kind.status} {kind.code} {kind.type} {closes} {retry}"


def test_catalogue() -> None:
    assert [row(kind) for kind in CATALOGUE] == EXPECTED.splitlines()
    assert len({kind.code for kind in CATALOGUE}) == len(CATALOGUE)


@each_kind
def test_names_and_codes_agree(kind: Kind) -> None:
    names = [name for name, value in vars(errors).items() if value is kind]
    assert names == [kind.code.upper().removeprefix("HTTP_")]


@each_kind
def test_messages_are_sentences(kind: Kind) -> None:
    assert re.fullmatch(r"[A-Z][ -~]+\.", kind.message)


def test_every_503_says_when_to_come_again() -> None:
    assert all(kind.retry_after_s for kind in CATALOGUE if kind.status == 503)


# --- The exception ---


@each_kind
def test_error_without_detail(kind: Kind) -> None:
    error = GatewayError(kind)
    assert (error.message, str(error)) == (kind.message, kind.message)
    assert error.retry_after_s == kind.retry_after_s
    assert error.fields == ()


def test_detail_fields_and_retry_after_go_before_the_kinds() -> None:
    error = GatewayError(errors.QUEUE_FULL, "100 wait already.", fields=((b"A", b"1"),), retry_after_s=0)
    assert error.message == "100 wait already."
    assert error.fields == ((b"A", b"1"),)
    assert error.retry_after_s == 0
    assert not isinstance(PeerGone(), GatewayError)


# --- Envelopes ---


@each_kind
@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.RESPONSES])
def test_pitfall_32_openai_envelope_has_string_codes(kind: Kind, dialect: Dialect) -> None:
    body = json.loads(envelope(GatewayError(kind, "Why."), dialect))
    assert body == {"error": {"message": "Why.", "type": kind.type, "param": None, "code": kind.code}}
    assert isinstance(body["error"]["code"], str)


@each_kind
def test_anthropic_envelope(kind: Kind) -> None:
    body = json.loads(envelope(GatewayError(kind, "Why."), Dialect.ANTHROPIC))
    assert body == {"type": "error", "error": {"message": "Why.", "type": kind.type}}


def test_openai_is_the_default() -> None:
    error = GatewayError(errors.LOADING)
    assert envelope(error) == envelope(error, Dialect.OPENAI)


@pytest.mark.parametrize("dialect", Dialect)
def test_any_text_is_one_line_of_ascii(dialect: Dialect) -> None:
    error = GatewayError(errors.RELOAD_FAILED, 'line 1\r\n\r\ndata: "x"\u2028\u00e9\0')
    text = envelope(error, dialect)
    assert re.fullmatch(rb"[ -~]+", text)
    assert json.loads(text)["error"]["message"] == error.message
    lines = event(error, dialect).split(b"\n")
    assert lines[-2:] == [b"", b""]
    assert all(re.fullmatch(rb"(event: error|data: \{[ -~]+\})", line) for line in lines[:-2])


# --- Events ---


def test_openai_event() -> None:
    error = GatewayError(errors.BACKEND_TIMEOUT)
    assert event(error, Dialect.OPENAI) == b"data: " + envelope(error) + b"\n\n"


def test_anthropic_event() -> None:
    error = GatewayError(errors.BACKEND_TIMEOUT)
    assert event(error, Dialect.ANTHROPIC) == b"event: error\ndata: " + envelope(error, Dialect.ANTHROPIC) + b"\n\n"


def test_responses_event_is_typed_and_flat() -> None:
    name, data, *rest = event(GatewayError(errors.BACKEND_TIMEOUT, "Why."), Dialect.RESPONSES).split(b"\n")
    assert (name, rest) == (b"event: error", [b"", b""])
    body = {"type": "error", "code": "backend_timeout", "message": "Why.", "param": None}
    assert json.loads(data.removeprefix(b"data: ")) == body
