"""Who a request's caller is, what forbids what it asks for, and what it is charged: all before its body is read."""

import time

from auth import Caller, allowance_lines, unauthorized
from client_wire import ClientWire
from errors import (
    DRAINING,
    LENGTH_REQUIRED,
    ROUTE_NOT_ALLOWED,
    TOKEN_QUOTA_EXCEEDED,
    TOO_MANY_CONNECTIONS,
    GatewayError,
)
from parts import Parts
from plan import Plan
from routes import Role


def identify(parts: Parts, client: ClientWire, plan: Plan) -> Caller | None:
    """Who is calling; None only where the route is public. A bad credential on a public route is no credential."""
    if parts.public_only and client in parts.public_only and plan.route.kind.role is not Role.PUBLIC:
        raise GatewayError(TOO_MANY_CONNECTIONS)
    if not parts.auth_enabled:
        return parts.anonymous
    try:
        if plan.credential is None:
            raise plan.no_credential or unauthorized()
        return parts.keys.keyring.find(plan.credential, time.time)
    except GatewayError:
        if plan.route.kind.role is Role.PUBLIC:
            return None
        raise


def check(parts: Parts, plan: Plan, caller: Caller | None) -> None:
    """Raise what forbids a known caller's request."""
    route = plan.route
    if route.refusal is not None:
        raise route.error()
    if route.kind.role is Role.OPERATOR and (caller is None or not caller.is_operator):
        raise GatewayError(ROUTE_NOT_ALLOWED)
    if route.kind.local:
        return
    if parts.draining:
        raise GatewayError(DRAINING)
    if plan.lacks_body:
        raise GatewayError(LENGTH_REQUIRED)


def charge(parts: Parts, plan: Plan, caller: Caller) -> bytes:
    """Count the request against the key's rate, once the key's tokens for today are known not to be spent.

    Returns the field lines that tell what the rate leaves.
    """
    if caller.tokens_per_day is not None and plan.metered:
        parts.observer.flush()
        if parts.ledger.spent_today(caller.key_id) >= caller.tokens_per_day:
            words = f"This API key is limited to {caller.tokens_per_day} tokens a day, and today's are used up."
            raise GatewayError(TOKEN_QUOTA_EXCEEDED, words, retry_after_s=int(parts.ledger.resets_in_s()) + 1)
    return allowance_lines(caller.rate_limit, parts.rates.take(caller))
