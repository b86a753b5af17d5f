"""access.py: who is calling, what forbids the request, and the key's rate and quota."""

from dataclasses import replace
from typing import Any

import pytest

from accounting.token_estimates import TokenEstimator
from auth import ANONYMOUS, ANONYMOUS_OPERATOR, Caller, KeyRefused, RateLimiter
from core.errors import (
    DRAINING,
    INVALID_API_KEY,
    KEY_SUSPENDED,
    LENGTH_REQUIRED,
    METHOD_NOT_ALLOWED,
    RATE_LIMIT_EXCEEDED,
    ROUTE_NOT_ALLOWED,
    ROUTE_NOT_FOUND,
    TOKEN_QUOTA_EXCEEDED,
    GatewayError,
    Kind,
)
from keyfile import parse_networks
from policy.token_limiter import TokenLimiter
from proxy.access import AccessControl
from proxy.token_quotas import TokenQuotas
from support.clock import Clock
from support.gateway import CHAT, KEY, OPERATOR_KEY, get, post, request
from support.memory_gateway import ALICE, OLGA, Keys, Ledger, prepare
from support.memory_transport import Link

DRAIN = request(b"POST", b"/drain", b"")
UNKNOWN_KEY = b"sk-mallory-0123456789abcdef"


class Access:
    """Access control, and what it keeps accounts with."""

    def __init__(self, *, enabled: bool = True, admin_routes: bool = False, **alice: Any) -> None:
        keys: Any = Keys(**alice)
        ledger: Any = Ledger()
        self.clock = Clock()
        self.ledger = ledger
        self.flushes = 0
        quotas = TokenQuotas(ledger, TokenLimiter(self.clock), TokenEstimator(), self._flush)
        self.control = AccessControl(keys, RateLimiter(self.clock), quotas, enabled=enabled, admin_routes=admin_routes)

    def _flush(self) -> None:
        self.flushes += 1

    def authenticated(self, raw: bytes) -> Caller | Kind | None:
        try:
            return self.control.authenticate(prepare(raw))
        except GatewayError as error:
            return error.kind

    def authorized(self, raw: bytes, caller: Caller | None = ALICE, *, draining: bool = False) -> Kind | None:
        """Return what forbids the request, or None."""
        try:
            self.control.authorize(prepare(raw), caller, draining)
        except GatewayError as error:
            return error.kind
        return None


# --- The caller ---


def test_a_key_names_its_caller() -> None:
    access = Access()
    assert access.authenticated(post()) == ALICE
    assert access.authenticated(post(key=OPERATOR_KEY)) == OLGA


def test_a_valid_key_counts_beside_the_token_of_another_system() -> None:
    access = Access()
    assert access.authenticated(post(CHAT, b"{}", b"x-api-key: sk-0123456789abcdef")) == ALICE
    assert access.authenticated(post(CHAT, b"{}", b"x-api-key: " + KEY, key=UNKNOWN_KEY)) == ALICE


@pytest.mark.parametrize(
    "raw",
    [
        post(key=None),
        post(key=UNKNOWN_KEY),
        post(CHAT, b"{}", b"x-api-key: sk-0123456789abcdef", key=UNKNOWN_KEY),
        post(CHAT, b"{}", b"x-api-key: " + OPERATOR_KEY),
    ],
)
def test_a_request_without_one_valid_key_is_refused(raw: bytes) -> None:
    assert Access().authenticated(raw) is INVALID_API_KEY


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (post(CHAT, b"{}", b"x-api-key: " + OPERATOR_KEY), "The request carries two different API keys."),
        (post(CHAT, b"{}", b"Authorization: Bearer " + KEY), "A field for the API key is repeated."),
    ],
)
def test_the_reason_is_given(raw: bytes, reason: str) -> None:
    with pytest.raises(GatewayError) as error:
        Access().control.authenticate(prepare(raw))
    assert reason in error.value.message


def test_a_suspended_key_is_refused() -> None:
    assert Access(rate_limit=0).authenticated(post()) is KEY_SUSPENDED


def test_an_expired_key_is_refused() -> None:
    assert Access(expires_s=1.0).authenticated(post()) is INVALID_API_KEY


def test_on_a_public_route_an_invalid_key_counts_as_none() -> None:
    access = Access()
    assert access.authenticated(get(b"/metrics", key=None)) is None
    assert access.authenticated(get(b"/metrics", key=UNKNOWN_KEY)) is None
    assert access.authenticated(get(b"/metrics", key=OPERATOR_KEY)) == OLGA
    assert Access(rate_limit=0).authenticated(get(b"/metrics")) is None


def test_the_caller_of_a_request_that_goes_on_is_looked_up_again() -> None:
    access, client = Access(), Link().client()
    assert access.control.find_caller(client, prepare(get(CHAT))) == ALICE
    with pytest.raises(GatewayError):
        access.control.find_caller(client, prepare(get(CHAT, key=UNKNOWN_KEY)))


def test_behind_a_proxy_the_caller_is_looked_up_with_the_clients_address() -> None:
    access, client = Access(sources=parse_networks("192.0.2.0/24")), Link().client()
    client.is_proxy = True
    prepared = replace(prepare(get(CHAT)), forwarded=("192.0.2.9",))
    assert access.control.find_caller(client, prepared).key_id == "alice"  # type: ignore[union-attr]
    with pytest.raises(KeyRefused):
        access.control.find_caller(client, replace(prepared, forwarded=("198.51.100.9",)))


def test_without_authentication_every_caller_is_anonymous() -> None:
    assert Access(enabled=False).authenticated(post(key=UNKNOWN_KEY)) == ANONYMOUS
    assert Access(enabled=False, admin_routes=True).authenticated(post(key=None)) == ANONYMOUS_OPERATOR


# --- What forbids a request ---


@pytest.mark.parametrize("raw", [post(), get(b"/v1/models"), get(b"/ping"), request(b"OPTIONS", b"/usage")])
def test_what_may_be_called_with_a_key_may_be_called(raw: bytes) -> None:
    assert Access().authorized(raw) is None


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (get(b"/nowhere"), ROUTE_NOT_FOUND),
        (get(b"/tools"), ROUTE_NOT_ALLOWED),
        (get(b"/v1/chat/completions"), METHOD_NOT_ALLOWED),
        (request(b"POST", b"/props", b"{}"), ROUTE_NOT_ALLOWED),
    ],
)
def test_what_the_table_refuses_is_refused(raw: bytes, kind: Kind) -> None:
    assert Access().authorized(raw, OLGA) is kind


@pytest.mark.parametrize(("caller", "kind"), [(OLGA, None), (ALICE, ROUTE_NOT_ALLOWED), (None, ROUTE_NOT_ALLOWED)])
@pytest.mark.parametrize("raw", [get(b"/slots"), get(b"/props"), DRAIN])
def test_operators_routes_are_for_operators(raw: bytes, caller: Caller | None, kind: Kind | None) -> None:
    assert Access().authorized(raw, caller) is kind


def test_a_gateway_that_drains_relays_no_new_request() -> None:
    access = Access()
    assert access.authorized(post(), draining=True) is DRAINING
    assert access.authorized(get(b"/health"), None, draining=True) is None
    assert access.authorized(DRAIN, OLGA, draining=True) is None


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (request(b"POST", b"/v1/chat/completions"), LENGTH_REQUIRED),
        (request(b"POST", b"/v1/chat/completions", None, b"Transfer-Encoding: chunked"), None),
        (post(body=b""), None),
        (get(b"/v1/models"), None),
    ],
)
def test_a_body_must_be_announced_if_the_route_needs_one(raw: bytes, kind: Kind | None) -> None:
    assert Access().authorized(raw) is kind


# --- The key's rate ---


def test_a_request_counts_and_its_response_reports_what_is_left() -> None:
    lines = Access().control.enforce_limits(prepare(post()), ALICE)
    assert lines == (
        b"x-ratelimit-limit-requests: 100\r\nx-ratelimit-remaining-requests: 99\r\nx-ratelimit-reset-requests: 1m0s\r\n"
    )


@pytest.mark.parametrize("raw", [get(b"/slots"), get(b"/ping"), get(b"/nowhere")])
def test_other_routes_do_not_count(raw: bytes) -> None:
    assert Access().control.enforce_limits(prepare(raw), ALICE) is None


def test_without_authentication_nothing_counts() -> None:
    assert Access(enabled=False).control.enforce_limits(prepare(post()), ANONYMOUS) is None


def test_a_key_above_its_rate_is_refused_until_a_request_is_refunded() -> None:
    access = Access()
    alice, prepared = Caller("alice", "infer", 1), prepare(post())
    started_s = access.clock()
    access.control.enforce_limits(prepared, alice)
    access.clock.advance(30)
    with pytest.raises(GatewayError) as error:
        access.control.enforce_limits(prepared, alice)
    assert error.value.kind is RATE_LIMIT_EXCEEDED
    lines = access.control.refund(alice, started_s)
    assert dict(line.split(b": ") for line in lines.splitlines()) == {
        b"x-ratelimit-limit-requests": b"1",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"0ms",
    }
    assert access.control.enforce_limits(prepared, alice) is not None


# --- The key's quota ---

FRUGAL = Caller("alice", "infer", 100, tokens_per_day=1000)


def test_a_key_may_use_its_tokens() -> None:
    access = Access()
    access.ledger.spent = 999
    assert access.control.enforce_limits(prepare(post()), FRUGAL) is not None
    assert access.flushes == 1  # what has ended by now is charged first


def test_a_key_that_has_used_its_tokens_is_refused_until_the_next_day() -> None:
    access = Access()
    access.ledger.spent = 1000
    with pytest.raises(GatewayError, match="is limited to 1000 tokens a day, and today's are used up") as error:
        access.control.enforce_limits(prepare(post()), FRUGAL)
    assert (error.value.kind, error.value.retry_after_s) == (TOKEN_QUOTA_EXCEEDED, 1235)


def test_a_refused_request_does_not_count_towards_the_rate() -> None:
    access = Access()
    access.ledger.spent = 1000
    with pytest.raises(GatewayError):
        access.control.enforce_limits(prepare(post()), FRUGAL)
    access.ledger.spent = 0
    lines = access.control.enforce_limits(prepare(post()), FRUGAL)
    assert lines is not None
    assert b"remaining-requests: 99\r\n" in lines


def test_routes_without_tokens_have_no_quota() -> None:
    access = Access()
    access.ledger.spent = 1000
    assert access.control.enforce_limits(prepare(post(b"/tokenize")), FRUGAL) is not None
    assert access.flushes == 0
