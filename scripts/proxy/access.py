"""Access control, before the body is read: the caller, what forbids the request, the key's rate and quota."""

import time
from collections.abc import Sequence

import auth
from auth import Caller, KeyStore, RateLimiter, allowance, allowance_lines, unauthorized
from core.errors import (
    DRAINING,
    LENGTH_REQUIRED,
    ROUTE_NOT_ALLOWED,
    GatewayError,
)
from http1.grammar import field_lines
from policy.prepared_request import PreparedRequest
from policy.routes import Role
from proxy.token_quotas import TokenQuotas
from transport.client_protocol import ClientProtocol


def client_addresses(client: ClientProtocol, prepared: PreparedRequest) -> tuple[str, ...]:
    """Return all that the address of a request's client may be.

    There are several if two fields of a trusted proxy's request contradict each other.
    """
    if prepared.forwarded and client.is_proxy:
        return tuple([address or client.peer for address in prepared.forwarded])
    return client.addresses


class AccessControl:
    """Finds the caller of each request, and decides whether the request may go on."""

    def __init__(
        self,
        keys: KeyStore,
        rate_limiter: RateLimiter,
        quotas: TokenQuotas,
        *,
        enabled: bool,
        admin_routes: bool,
    ) -> None:
        """Without `enabled` every caller is anonymous."""
        self._keys = keys
        self._rate_limiter = rate_limiter
        self._quotas = quotas
        self._enabled = enabled
        self._anonymous = auth.ANONYMOUS_OPERATOR if admin_routes else auth.ANONYMOUS

    def authenticate(self, prepared: PreparedRequest, addresses: Sequence[str] = ()) -> Caller | None:
        """Return the caller; None only if the route is public: there an invalid credential counts as none.

        `addresses` are all that the client's may be. Raises INVALID_API_KEY or KEY_SUSPENDED.
        """
        if not self._enabled:
            return self._anonymous
        try:
            if prepared.credential is None:
                return self._find_among(prepared, addresses)
            return self._keys.keyring.find(prepared.credential, time.time, addresses)
        except GatewayError:
            if prepared.route.kind.role is Role.PUBLIC:
                return None
            raise

    def find_caller(self, client: ClientProtocol, prepared: PreparedRequest) -> Caller | None:
        """Return the caller of a request that goes on, as it is now. Raises as `authenticate` does."""
        return self.authenticate(prepared, client_addresses(client, prepared))

    def _find_among(self, prepared: PreparedRequest, addresses: Sequence[str]) -> Caller:
        """Return the caller of a request that carries no secret, or several of which one may be a key."""
        if not prepared.credentials:
            raise prepared.credential_error or unauthorized()
        return self._keys.keyring.find_one(prepared.credentials, time.time, addresses)

    def authorize(self, prepared: PreparedRequest, caller: Caller | None, draining: bool) -> None:
        """Raise what forbids the request of a known caller: first what is wrong with its head."""
        if prepared.error is not None:
            raise prepared.error
        route = prepared.route
        if route.refusal is not None:
            raise route.error()
        if route.kind.role is Role.OPERATOR and (caller is None or not caller.is_operator):
            raise GatewayError(ROUTE_NOT_ALLOWED, "This route needs an operator's key.")
        if route.kind.local:
            return
        if draining:
            raise GatewayError(DRAINING)
        if prepared.lacks_body:
            raise GatewayError(LENGTH_REQUIRED)

    def enforce_limits(self, prepared: PreparedRequest, caller: Caller) -> bytes | None:
        """Count the request against the key's rate, unless the key's tokens are used up.

        Returns the field lines that report what the rate leaves; None if the request does not count. Raises
        TOKEN_QUOTA_EXCEEDED or RATE_LIMIT_EXCEEDED.
        """
        kind = prepared.route.kind
        if not kind.rated or not self._enabled:
            return None
        if caller.limits_tokens and kind.metered:
            self._quotas.check(caller)
        return allowance_lines(caller.rate_limit, self._rate_limiter.acquire(caller))

    def refund(self, caller: Caller, started_s: float) -> bytes:
        """Uncount a request that started at this time, and that the gateway itself refused after `enforce_limits`.

        Returns the field lines that report what the rate leaves now.
        """
        self._rate_limiter.refund(caller, started_s)
        used, reset_s = self._rate_limiter.used(caller.key_id)
        return field_lines(allowance(caller.rate_limit, max(caller.rate_limit - used, 0), reset_s))
