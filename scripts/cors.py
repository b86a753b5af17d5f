"""Cross-origin answers (the Fetch standard's CORS protocol): which origins may read what, as header fields.

Origins are compared whole, as bytes: scheme, host and port, never a prefix. The backend's own Access-Control-* fields
are stripped by the relay, so that these are the only ones that a browser sees.
"""

import re

from errors import Fields
from http1 import RequestHead

_TOKENS = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:[ \t]*,[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+)*")
_EXPOSED = (
    b"x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
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
        """What every answer to this request carries, errors included. `head` is None where none could be read."""
        if not self.on:
            return ()
        if self._any:
            return _ANY  # whoever asks: a cache may hand the answer on, and no Vary tells it not to
        origin = None if head is None else head.known.get(b"origin")
        if origin is None or len(origin) != 1 or origin[0] not in self._origins:
            return _VARY
        return ((b"Access-Control-Allow-Origin", origin[0]), *_EXPOSE, *_VARY)

    def preflight(self, head: RequestHead) -> Fields:
        """What an OPTIONS answer adds: the method and the header names asked for, echoed if they are tokens.

        Browser clients send names of their own (x-stainless-*, anthropic-version …); a fixed list breaks them.
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
