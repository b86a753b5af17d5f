"""errors.py: the catalogue, and the exception that carries one of its kinds."""

import re

import pytest

from core import errors
from core.errors import CATALOGUE, GatewayError, Kind, PeerGone

# status, code, type, whether the connection ends, seconds for Retry-After, whether a repetition is useless
EXPECTED = """400 bad_request invalid_request_error closes - final
400 too_many_choices invalid_request_error stays - final
400 batch_too_large invalid_request_error stays - final
400 member_not_allowed invalid_request_error stays - final
400 body_too_deep invalid_request_error stays - final
400 model_required invalid_request_error stays - final
400 too_many_tokens_asked invalid_request_error stays - final
401 invalid_api_key authentication_error stays - final
403 route_not_allowed permission_error stays - final
403 model_not_allowed permission_error stays - final
403 key_suspended permission_error stays - final
404 route_not_found invalid_request_error stays - final
404 model_not_found invalid_request_error stays - final
404 key_not_found invalid_request_error stays - final
405 method_not_allowed invalid_request_error stays - final
408 request_timeout invalid_request_error closes - -
411 length_required invalid_request_error stays - final
413 payload_too_large invalid_request_error closes - final
414 uri_too_long invalid_request_error closes - final
415 coding_not_supported invalid_request_error stays - final
415 form_not_supported invalid_request_error stays - final
417 expectation_failed invalid_request_error closes - final
429 rate_limit_exceeded rate_limit_error stays - -
429 token_quota_exceeded insufficient_quota stays - final
429 token_rate_exceeded rate_limit_error stays - -
429 caller_paused rate_limit_error stays 60 -
431 header_fields_too_large invalid_request_error closes - final
500 internal_error api_error closes - -
500 reload_failed api_error stays - -
502 backend_unavailable api_error stays - -
502 backend_malformed api_error stays - -
502 model_load_failed api_error stays 5 -
502 request_held_back api_error stays - final
503 queue_full overloaded_error stays 5 -
503 queue_timeout overloaded_error stays 5 -
503 loading overloaded_error stays 10 -
503 draining overloaded_error closes 5 -
503 too_many_connections overloaded_error closes 2 -
503 too_many_viewers overloaded_error stays 30 -
503 memory_full overloaded_error closes 2 -
504 backend_timeout api_error stays - final
505 http_version_not_supported invalid_request_error closes - final"""

each_kind = pytest.mark.parametrize("kind", CATALOGUE, ids=[kind.code for kind in CATALOGUE])


def row(kind: Kind) -> str:
    closes = "closes" if kind.closes else "stays"
    retry = "-" if kind.retry_after_s is None else str(kind.retry_after_s)
    return f"{kind.status} {kind.code} {kind.type} {closes} {retry} {'final' if kind.final else '-'}"


def test_catalogue() -> None:
    rows, expected = [row(kind) for kind in CATALOGUE], EXPECTED.splitlines()
    different = sorted(set(rows) ^ set(expected))
    assert not different, f"scripts/core/errors.py and EXPECTED in this file differ in {different}: add it to both."
    assert rows == expected
    assert len({kind.code for kind in CATALOGUE}) == len(CATALOGUE)


@each_kind
def test_names_and_codes_agree(kind: Kind) -> None:
    names = [name for name, value in vars(errors).items() if value is kind]
    assert names == [kind.code.upper().removeprefix("HTTP_")]


@each_kind
def test_messages_are_sentences(kind: Kind) -> None:
    assert re.fullmatch(r"[A-Z][ -~]+\.", kind.message)


def test_every_503_has_a_retry_after() -> None:
    assert all(kind.retry_after_s for kind in CATALOGUE if kind.status == 503)


def test_every_4xx_is_final_except_what_time_mends() -> None:
    passing = {kind.code for kind in CATALOGUE if 400 <= kind.status < 500 and not kind.final}
    assert passing == {"request_timeout", "rate_limit_exceeded", "token_rate_exceeded", "caller_paused"}


# --- The exception ---


@each_kind
def test_error_without_detail(kind: Kind) -> None:
    error = GatewayError(kind)
    assert (error.message, str(error)) == (kind.message, kind.message)
    assert error.retry_after_s == kind.retry_after_s
    assert error.final == kind.final
    assert (error.fields, error.reported) == ((), None)


def test_detail_and_retry_after_replace_those_of_the_kind() -> None:
    error = GatewayError(errors.QUEUE_FULL, "100 wait already.", fields=((b"A", b"1"),), retry_after_s=0)
    assert error.message == "100 wait already."
    assert error.fields == ((b"A", b"1"),)
    assert error.retry_after_s == 0
    assert not isinstance(PeerGone(), GatewayError)


def test_an_error_of_any_kind_may_be_final() -> None:
    assert GatewayError(errors.QUEUE_TIMEOUT, final=True).final
    assert GatewayError(errors.BAD_REQUEST).final
