"""The table of llama-server's and the gateway's own routes: class, role, slot, metric label.

The table is an allow-list: a path that is not in it, spelt exactly so, is refused, since new routes appear in
llama-server every month. ALLOW_PATHS adds to it, never past what is blocked. Labels come from here, never from a
target.
"""

import enum
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from urllib.parse import unquote_to_bytes

from errors import METHOD_NOT_ALLOWED, ROUTE_NOT_ALLOWED, ROUTE_NOT_FOUND, Dialect, GatewayError, Kind


class Role(enum.IntEnum):
    """Who may call a route; each role may do what the lower ones may."""

    PUBLIC = 0
    INFER = 1
    OPERATOR = 2


@dataclass(frozen=True)
class RouteClass:
    """What the routes of one kind have in common."""

    name: str
    role: Role
    slot: bool = False  # waits for one of the backend's slots
    rated: bool = False  # counts towards the key's rate
    metered: bool = False  # its answers tell tokens
    local: bool = False  # the gateway answers
    changing: bool = False  # needs ADMIN_ROUTES
    blocked: bool = False  # refused, whoever asks
    repeatable: bool = False  # asking twice does no harm


INFERENCE = RouteClass("inference", Role.INFER, slot=True, rated=True, metered=True, repeatable=True)
ALLOWED = RouteClass("allowed", Role.INFER, slot=True, rated=True, metered=True)
CHEAP = RouteClass("cheap", Role.INFER, rated=True, repeatable=True)
CONTROL = RouteClass("control", Role.INFER)
OPERATOR_READING = RouteClass("operator, reading", Role.OPERATOR, repeatable=True)
OPERATOR_CHANGING = RouteClass("operator, changing", Role.OPERATOR, changing=True)
BLOCKED = RouteClass("blocked", Role.INFER, blocked=True)
PUBLIC = RouteClass("public", Role.PUBLIC, local=True)
OWN = RouteClass("operator, gateway's own", Role.OPERATOR, local=True)
UNKNOWN = RouteClass("unknown", Role.INFER, blocked=True)


@dataclass(frozen=True)
class Route:
    """One method of one path. `label` is the path as the table spells it, for metrics and logs.

    `refusal` is what the gateway answers, once the key has been checked, where the route leads nowhere.
    """

    label: str
    kind: RouteClass
    needs_body: bool = False
    dialect: Dialect = Dialect.OPENAI
    refusal: Kind | None = None
    detail: str = ""
    allow: bytes = b""

    def error(self) -> GatewayError:
        """The refusal, as an error of its own."""
        assert self.refusal is not None
        return GatewayError(self.refusal, self.detail, fields=((b"Allow", self.allow),) if self.allow else ())


_BODY_INFERENCE = (
    "/v1/chat/completions /chat/completions /v1/completions /completions /completion /v1/responses /responses"
    " /v1/messages /infill /v1/embeddings /embeddings /embedding /v1/rerank /rerank /v1/reranking /reranking"
    " /v1/audio/transcriptions /audio/transcriptions /v1/systemone"
)
_BODY_CHEAP = (
    "/tokenize /detokenize /apply-template /v1/chat/completions/input_tokens /chat/completions/input_tokens"
    " /v1/responses/input_tokens /responses/input_tokens /v1/messages/count_tokens"
)
TABLE: tuple[tuple[str, str, RouteClass], ...] = (
    *(("POST", path, INFERENCE) for path in _BODY_INFERENCE.split()),
    *(("POST", path, CHEAP) for path in _BODY_CHEAP.split()),
    ("GET", "/v1/models", CHEAP),
    ("GET", "/models", CHEAP),
    ("POST", "/v1/chat/completions/control", CONTROL),
    ("GET", "/slots", OPERATOR_READING),
    ("GET", "/props", OPERATOR_READING),
    ("GET", "/lora-adapters", OPERATOR_READING),
    ("POST", "/props", OPERATOR_CHANGING),
    ("POST", "/lora-adapters", OPERATOR_CHANGING),
    ("POST", "/slots/:id", OPERATOR_CHANGING),
    ("POST", "/models", OPERATOR_CHANGING),
    ("DELETE", "/models", OPERATOR_CHANGING),
    ("POST", "/models/load", OPERATOR_CHANGING),
    ("POST", "/models/unload", OPERATOR_CHANGING),
    ("GET", "/models/sse", OPERATOR_CHANGING),
    ("GET", "/ping", PUBLIC),
    ("GET", "/health", PUBLIC),
    ("GET", "/metrics", PUBLIC),
    ("GET", "/usage", OWN),
    ("POST", "/reload", OWN),
    ("POST", "/drain", OWN),
)
# These, and all below them: they run tools, reach other hosts, or answer by conversation instead of by key.
BLOCKED_PATHS = ("/tools", "/cors-proxy", "/predict", "/v1/stream", "/v1/streams")
# ALLOW_PATHS opens nothing below an operator's path: llama-server takes /slots/0x for slot 0.
_BELOW_OPERATOR = tuple({f"{path}/".encode() for _, path, kind in TABLE if kind.role is Role.OPERATOR})

_SLOT_ACTION = re.compile(rb"/slots/[0-9]{1,9}")
_UNICODE_ESCAPE = re.compile(rb"%[uU]([0-9A-Fa-f]{4})")  # llama-server's HTTP library takes %u0074 for t
_PATH_END = re.compile(rb"[\x00?#]")
_ALLOWED_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE"))

PREFLIGHT = Route("OPTIONS", PUBLIC)
UNROUTED = Route("none", UNKNOWN)  # the label of a request whose head could not be read
_NOT_FOUND = Route("unknown", UNKNOWN, refusal=ROUTE_NOT_FOUND)
_OTHER = Route("other", ALLOWED)


class Routes:
    """The table with this deployment's additions: ALLOW_PATHS, METRICS_AUTH_ENABLED and ADMIN_ROUTES."""

    def __init__(self, *, allow_paths: tuple[str, ...] = (), admin_routes: bool = False, metrics_auth: bool = False):
        self._allow_paths = tuple(pattern.replace("[", "[[]") for pattern in allow_paths)  # only `*` is special
        self._exact: dict[bytes, dict[bytes, Route]] = {}
        for method, path, kind in TABLE:
            private = metrics_auth and path == "/metrics"
            self._add(method, _route(path, replace(kind, role=Role.INFER) if private else kind, admin_routes))
        self._canonical = frozenset(self._exact)

    def _add(self, method: str, route: Route) -> None:
        methods = self._exact.setdefault(route.label.encode(), {})
        methods[method.encode()] = route
        if method == "GET":
            methods[b"HEAD"] = route

    def find(self, method: bytes, target: bytes) -> Route:
        """Find the route of a request; one that leads nowhere has a `refusal`."""
        path = target.partition(b"?")[0]
        methods = self._exact.get(path)
        if methods is not None:
            return methods.get(method) or self._without_method(method, methods)
        if method == b"OPTIONS":
            return PREFLIGHT
        if _SLOT_ACTION.fullmatch(path):
            return self.find(method, b"/slots/:id")
        return self._find_unlisted(method, path)

    def _without_method(self, method: bytes, methods: dict[bytes, Route]) -> Route:
        if method == b"OPTIONS":
            return PREFLIGHT
        allow = b", ".join(sorted(methods))
        first = next(iter(methods.values()))
        return replace(first, refusal=METHOD_NOT_ALLOWED, detail="", allow=allow, needs_body=False)

    def _find_unlisted(self, method: bytes, path: bytes) -> Route:
        segments = decoded_segments(path)
        canonical = canonical_path(segments)
        for blocked in BLOCKED_PATHS:
            if canonical == blocked.encode() or canonical.startswith(blocked.encode() + b"/"):
                return Route(blocked, BLOCKED, refusal=ROUTE_NOT_ALLOWED, detail="This route is blocked.")
        # Another spelling of a listed path would reach the backend's route past that route's own policy.
        listed = canonical in self._canonical or canonical.startswith(_BELOW_OPERATOR)
        if listed or not self._allows(path, climbs=b".." in segments):
            return _NOT_FOUND
        if method not in _ALLOWED_METHODS:
            return replace(_OTHER, refusal=METHOD_NOT_ALLOWED, allow=b", ".join(sorted(_ALLOWED_METHODS)))
        return _OTHER

    def _allows(self, path: bytes, *, climbs: bool) -> bool:
        """Whether ALLOW_PATHS lets the path in. Where one that climbs comes out, no pattern but `*` can tell."""
        if climbs:
            return "*" in self._allow_paths
        return any(fnmatchcase(path.decode("latin-1"), pattern) for pattern in self._allow_paths)


def _route(path: str, kind: RouteClass, admin_routes: bool) -> Route:
    needs_body = kind is INFERENCE or path in _BODY_CHEAP.split()
    route = Route(path, kind, needs_body=needs_body, dialect=_dialect(path))
    if kind.changing and not admin_routes:
        words = "Routes that change the backend need ADMIN_ROUTES=true."
        return replace(route, refusal=ROUTE_NOT_ALLOWED, detail=words)
    return route


def _dialect(path: str) -> Dialect:
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    return Dialect.RESPONSES if path.endswith("/responses") else Dialect.OPENAI


def decoded_segments(path: bytes) -> list[bytes]:
    """The segments that a lenient server might see: decoded to the end, lower case, without parameters."""
    for _ in range(4):
        decoded = unquote_to_bytes(_UNICODE_ESCAPE.sub(_unescape, path))
        if decoded == path:
            break
        path = decoded
    path = _PATH_END.split(path.lower().replace(b"\\", b"/"), maxsplit=1)[0]
    return [segment.partition(b";")[0] for segment in path.split(b"/")]


def _unescape(match: re.Match[bytes]) -> bytes:
    return chr(int(match[1], 16)).encode("utf-8", "replace")


def canonical_path(segments: list[bytes]) -> bytes:
    """The path that a lenient server might take these for: no empty ones, dots resolved."""
    kept: list[bytes] = []
    for name in segments:
        if name == b"..":
            del kept[-1:]
        elif name not in (b"", b"."):
            kept.append(name)
    return b"/" + b"/".join(kept)
