"""CORS (the Fetch standard's CORS protocol): which origins may read a response, as header fields.

Origins are compared as a whole, as bytes: scheme, host and port, never a prefix. The relay removes the backend's own
Access-Control-* fields, so a browser sees only the gateway's.
"""

import re

from core.errors import Fields
from http1.grammar import TOKEN, RequestHead

_TOKENS = re.compile(TOKEN + rb"(?:[ \t]*,[ \t]*" + TOKEN + rb")*")
_EXPOSED = (
    b"x-request-id, request-id, retry-after, x-should-retry,"
    b" x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests,"
    b" x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_EXPOSE: Fields = ((b"Access-Control-Expose-Headers", _EXPOSED),)
_ANY: Fields = ((b"Access-Control-Allow-Origin", b"*"), *_EXPOSE)
_VARY: Fields = ((b"Vary", b"Origin"),)
_PREFLIGHT_MAX_AGE_S = b"600"


class Cors:
    """The policy of CORS_ORIGINS: exact origins, `*` for any, or none at all (off)."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)
        self.on = bool(origins)

    def fields(self, head: RequestHead | None) -> Fields:
        """Fields of every response to this request, errors included. `head` is None if it could not be parsed."""
        if not self.on:
            return ()
        if self._any:
            return _ANY  # also without an Origin: there is no Vary, so a cache may reuse this response for any origin
        origin = None if head is None else head.known.get(b"origin")
        if origin is None or len(origin) != 1 or origin[0] not in self._origins:
            return _VARY
        return ((b"Access-Control-Allow-Origin", origin[0]), *_EXPOSE, *_VARY)

    def preflight(self, head: RequestHead) -> Fields:
        """Further fields of a response to OPTIONS: the requested method and header names, echoed if they are tokens.

        Client libraries send their own headers from browsers (x-stainless-*, anthropic-version …): a fixed list would
        break them.
        """
        if not any(name == b"Access-Control-Allow-Origin" for name, _ in self.fields(head)):
            return ()
        method = head.known.get(b"access-control-request-method", ())
        headers = head.known.get(b"access-control-request-headers", ())
        fields: Fields = ((b"Access-Control-Max-Age", _PREFLIGHT_MAX_AGE_S),)
        if len(method) == 1 and _TOKENS.fullmatch(method[0]) and b"," not in method[0]:
            fields += ((b"Access-Control-Allow-Methods", method[0]),)
        if len(headers) == 1 and _TOKENS.fullmatch(headers[0]):
            fields += ((b"Access-Control-Allow-Headers", headers[0]),)
        return fields
