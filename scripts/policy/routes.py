"""The table of all routes, llama-server's and the gateway's own: class, role, slot, metric label.

The table is an allow-list, because llama-server gets new routes every month: a path that is not in it in exactly this
spelling is refused. ALLOW_PATHS adds paths, but none that is blocked. Labels come from this table, never from a request
target.
"""

import enum
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from urllib.parse import unquote_to_bytes

from core.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from core.errors import (
    CODING_NOT_SUPPORTED,
    FORM_NOT_SUPPORTED,
    METHOD_NOT_ALLOWED,
    ROUTE_NOT_ALLOWED,
    ROUTE_NOT_FOUND,
    GatewayError,
    Kind,
)
from http1.member_screen import MemberScreen
from policy.body_rules import BodyRules
from policy.slot_demand import ANY_MEMBER, RULES, DemandRule


class Role(enum.IntEnum):
    """The role that a route requires. Each role includes the lower ones."""

    PUBLIC = 0
    INFER = 1
    OPERATOR = 2


@dataclass(frozen=True)
class RouteClass:
    """The properties of a group of routes."""

    name: str
    role: Role
    slot: bool = False  # occupies one of the backend's slots
    bounded: bool = False  # takes no slot, but time of the backend: has bounds of its own
    rated: bool = False  # counts towards the key's rate limit
    metered: bool = False  # responses report tokens
    kept: bool = False  # the last good response is sent again while the model loads
    local: bool = False  # answered by the gateway itself
    changing: bool = False  # changes the backend: needs ADMIN_ROUTES
    blocked: bool = False  # refused for every role
    repeatable: bool = False  # sending a request twice does no harm

    @property
    def works(self) -> bool:
        """Whether the backend works on a body, which may be too much for it."""
        return self.slot or self.bounded


INFERENCE = RouteClass("inference", Role.INFER, slot=True, rated=True, metered=True, repeatable=True)
ALLOWED = RouteClass("allowed", Role.INFER, slot=True, rated=True, metered=True)
CHEAP = RouteClass("cheap", Role.INFER, bounded=True, rated=True, repeatable=True)
LISTING = RouteClass("listing", Role.INFER, rated=True, repeatable=True, kept=True)
CONTROL = RouteClass("control", Role.INFER)
OPERATOR_READING = RouteClass("operator, reading", Role.OPERATOR, repeatable=True)
OPERATOR_CHANGING = RouteClass("operator, changing", Role.OPERATOR, changing=True)
BLOCKED = RouteClass("blocked", Role.INFER, blocked=True)
PUBLIC = RouteClass("public", Role.PUBLIC, local=True)
PAGE = RouteClass("page", Role.PUBLIC, local=True)
PROPS = RouteClass("reading, without paths", Role.INFER, bounded=True, local=True)
METRICS = RouteClass("metrics", Role.INFER, local=True)
OWN_USE = RouteClass("gateway's own", Role.INFER, local=True)
OWN = RouteClass("operator, gateway's own", Role.OPERATOR, local=True)
UNKNOWN = RouteClass("unknown", Role.INFER, blocked=True)


@dataclass(frozen=True)
class Route:
    """One method of one path. `label` is the path as in the table, for metrics and logs.

    `streams`: a request that asks for it (`"stream": true`) is answered with an event stream. `demand_rule` says which
    members of a body make it take several slots; None if it never does. `screen` finds bodies that must be read for
    their members; None if no body is relayed. `generates`: the backend generates text.
    `limit_members`: the members of the body that may limit its tokens, the one that precedes all others first; the
    gateway's own limit is appended as `limit_member`. `takes_forms`: the body may be a form with files. `by_model`: it
    is for one of the models, if there are several. `pins_slot`: llama-server obeys the `id_slot` of a body that asks
    for one answer. If `refusal` is set, the gateway responds with this error after it has checked the key. `detail` and
    `allow` are the error's message and its Allow field.
    """

    label: str
    kind: RouteClass
    needs_body: bool = False
    streams: bool = False
    demand_rule: DemandRule | None = None
    screen: MemberScreen | None = field(default=None, compare=False)
    generates: bool = False
    limit_members: tuple[str, ...] = ()
    limit_member: str = ""
    takes_forms: bool = False
    by_model: bool = False
    pins_slot: bool = False
    dialect: Dialect = OPENAI
    refusal: Kind | None = None
    detail: str = ""
    allow: bytes = b""

    def without_forms(self) -> "Route":
        """Return the route of a request with a form: refused if the route takes JSON.

        llama-server takes forms on every route, and makes a list of a field that stands several times. So a form could
        ask for several prompts, and for any number of tokens, as a limit cannot be added to it.
        """
        if self.takes_forms or not self.needs_body or self.refusal is not None:
            return self
        return replace(self, refusal=FORM_NOT_SUPPORTED)

    def without_unclear_form(self) -> "Route":
        """Return the route of a request with a form of which it is not certain how llama-server will divide it."""
        if self.refusal is not None:
            return self
        return replace(self, refusal=FORM_NOT_SUPPORTED, detail=_UNCLEAR_FORM)

    def without_codings(self) -> "Route":
        """Return the route of a request whose body is coded: refused if llama-server would decode what no limit saw.

        What ALLOW_PATHS adds is relayed as it is.
        """
        if self.screen is None or self.kind is ALLOWED or self.refusal is not None:
            return self
        return replace(self, refusal=CODING_NOT_SUPPORTED)

    def error(self) -> GatewayError:
        """Make the error of a route that has a refusal."""
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
_UNCLEAR_FORM = "The Content-Type of a form must be one line: multipart/form-data with one boundary."
PAGE_FILES = "/:page"  # the label of all files of llama-server's page, except the page itself
BOARD = ("/ui", "/ui/events")  # only with UI=on
TABLE: tuple[tuple[str, str, RouteClass], ...] = (
    *(("POST", path, INFERENCE) for path in _BODY_INFERENCE.split()),
    *(("POST", path, CHEAP) for path in _BODY_CHEAP.split()),
    ("GET", "/v1/models", LISTING),
    ("GET", "/models", LISTING),
    ("POST", "/v1/chat/completions/control", CONTROL),
    ("GET", "/slots", OPERATOR_READING),
    ("GET", "/props", PROPS),
    ("GET", "/lora-adapters", OPERATOR_READING),
    ("POST", "/props", OPERATOR_CHANGING),
    ("POST", "/lora-adapters", OPERATOR_CHANGING),
    ("POST", "/slots/:id", OPERATOR_CHANGING),
    ("POST", "/models", OPERATOR_CHANGING),
    ("DELETE", "/models", OPERATOR_CHANGING),
    ("POST", "/models/load", OPERATOR_CHANGING),
    ("POST", "/models/unload", OPERATOR_CHANGING),
    ("GET", "/models/sse", OPERATOR_CHANGING),
    ("GET", "/", PUBLIC),
    ("GET", PAGE_FILES, PAGE),
    ("GET", "/ping", PUBLIC),
    ("GET", "/health", PUBLIC),
    ("GET", "/v1/health", PUBLIC),
    ("GET", "/metrics", METRICS),
    ("GET", "/usage", OWN_USE),
    ("GET", "/ui", PUBLIC),
    ("GET", "/ui/events", OWN_USE),
    ("POST", "/reload", OWN),
    ("POST", "/drain", OWN),
)
# Of all others llama-server ignores a `"stream": true`.
_STREAMING = (
    "/v1/chat/completions /chat/completions /v1/completions /completions /completion /v1/responses /responses"
    " /v1/messages /infill"
)
# In the order in which llama-server looks for them, one that is null is passed over; and the API's own name.
_LIMITS = ("n_predict", "max_completion_tokens", "max_tokens")
_LIMIT_MEMBERS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions", "/v1/completions"), (_LIMITS, "max_tokens")),
    **dict.fromkeys(("/completions", "/completion", "/infill"), (_LIMITS, "n_predict")),
    # max_output_tokens replaces max_tokens even if it is null.
    **dict.fromkeys(("/v1/responses", "/responses"), ((*_LIMITS[:2], "max_output_tokens"), "max_output_tokens")),
    "/v1/messages": (("max_tokens",), "max_tokens"),
}
_TRANSCRIBING = ("/v1/audio/transcriptions", "/audio/transcriptions")
# Of those that read `id_slot`. Of the others llama-server chooses the slot, and ignores `cache_prompt`, too.
_PINNING = "/v1/chat/completions /chat/completions /v1/completions /completions /completion /v1/responses /responses"
_CHANGING_MODEL = ("/props", "/lora-adapters", "/slots/:id")  # of one model
_DIALECTS = {b"/messages": ANTHROPIC, b"/responses": RESPONSES}  # paths without /v1
# These and all paths below them are refused: they run tools, reach other hosts, or identify the caller by a
# conversation id instead of a key.
BLOCKED_PATHS = ("/tools", "/cors-proxy", "/predict", "/v1/stream", "/v1/streams")
# ALLOW_PATHS allows nothing below an operator's path: llama-server reads /slots/0x as slot 0.
_BELOW_OPERATOR = tuple({f"{path}/".encode() for _, path, kind in TABLE if kind.role is Role.OPERATOR})

_SLOT_ACTIONS = "/slots/:id"
_OWNS_SLOTS = "With PROMPT_CACHE=private only the gateway itself changes what the slots hold."
_SLOT_ACTION = re.compile(rb"/slots/[0-9]{1,9}")
# Files that llama-server's page has had since it is built of several ones; none of its other routes has an extension.
# Names have no empty parts between their dots, so no segment is `..`, and nothing in them can be decoded.
_NAME = rb"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_PAGE_FILE = re.compile(
    rb"/(?:index\.html|(?:build|version)\.json|manifest\.webmanifest|sw\.js"
    rb"|_app/(?:%(name)b/){0,4}%(name)b\.(?:js|mjs|css|json|wasm|svg|png|jpe?g|webp|ico|woff2?|ttf)"
    rb"|workbox-%(name)b\.js"
    rb"|(?:favicon(?:-%(name)b)?|(?:pwa|apple|maskable-icon)-%(name)b|recommended-mcp/%(name)b)"
    rb"\.(?:ico|svg|png|jpe?g|webp))" % {b"name": _NAME}
)
_MOST_PAGE_FILE_BYTES = 200
_UNICODE_ESCAPE = re.compile(rb"%[uU]([0-9A-Fa-f]{4})")  # llama-server's HTTP library decodes %u0074 to t
_PATH_END = re.compile(rb"[\x00?#]")
_READING = frozenset((b"GET", b"HEAD"))
_ALLOWED_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE"))

PREFLIGHT = Route("OPTIONS", PUBLIC)
UNROUTED = Route("none", UNKNOWN)  # for requests whose head could not be parsed
_NOT_FOUND = Route("unknown", UNKNOWN, refusal=ROUTE_NOT_FOUND)
_SPELT_OTHERWISE = (
    "There is no such route, but one with a similar path: the path or the base URL is wrong. A base URL has no slash at"
    " its end; for OpenAI's clients it ends in /v1, for Anthropic's clients it has no /v1."
)
_OTHER = Route("other", ALLOWED, demand_rule=ANY_MEMBER, by_model=True)
_MOST_SEGMENTS = 4  # of a listed path


class Routes:
    """The table as changed by ALLOW_PATHS, METRICS_AUTH_ENABLED, ADMIN_ROUTES, PROMPT_CACHE and UI.

    With `owns_slots` only the gateway itself changes what the backend's slots hold. Without `body_rules` their defaults
    are in force.
    """

    def __init__(
        self,
        *,
        allow_paths: tuple[str, ...] = (),
        admin_routes: bool = False,
        metrics_auth: bool = False,
        owns_slots: bool = False,
        ui: bool = False,
        body_rules: BodyRules | None = None,
    ) -> None:
        self._body_rules = body_rules or BodyRules()
        self._other = replace(_OTHER, screen=self._body_rules.screen(ANY_MEMBER))
        self._allow_paths = tuple(pattern.replace("[", "[[]") for pattern in allow_paths)  # only `*` is special
        self._exact: dict[bytes, dict[bytes, Route]] = {}
        self._page_file = Route(PAGE_FILES, PAGE) if ui else None
        changed = {} if metrics_auth else {METRICS: PUBLIC}
        if not ui:
            changed[PROPS] = OPERATOR_READING
        for method, path, kind in TABLE:
            if kind is PAGE or (path in BOARD and not ui):
                continue
            route = _route(path, changed.get(kind, kind), admin_routes)
            if owns_slots and path == _SLOT_ACTIONS:
                route = replace(route, refusal=ROUTE_NOT_ALLOWED, detail=_OWNS_SLOTS)
            self._add(method, route)
        self._canonical = frozenset(self._exact)
        self._without_v1 = frozenset(map(_without_v1, self._exact))

    def _add(self, method: str, route: Route) -> None:
        if method == "POST" and not route.kind.local:
            route = replace(route, screen=self._body_rules.screen(route.demand_rule))
        methods = self._exact.setdefault(route.label.encode(), {})
        methods[method.encode()] = route
        if method == "GET":
            methods[b"HEAD"] = route

    def find(self, method: bytes, target: bytes) -> Route:
        """Find the route of a request. If the request must be refused, the route has a `refusal`."""
        path = target.partition(b"?")[0]
        methods = self._exact.get(path)
        if methods is not None:
            return methods.get(method) or self._without_method(method, methods)
        if method == b"OPTIONS":
            return PREFLIGHT
        if _SLOT_ACTION.fullmatch(path):
            return self.find(method, b"/slots/:id")
        if self._page_file is not None and method in _READING and is_page_file(path):
            return self._page_file
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
        # Another spelling of a listed path would reach the same route of the backend and evade its policy.
        listed = canonical in self._canonical or canonical.startswith(_BELOW_OPERATOR)
        if listed or not self._allows(path, has_dots=b".." in segments):
            return self._not_found(canonical)
        other = replace(self._other, dialect=dialect_of(canonical))
        if method not in _ALLOWED_METHODS:
            return replace(other, refusal=METHOD_NOT_ALLOWED, allow=b", ".join(sorted(_ALLOWED_METHODS)))
        return other

    def _not_found(self, canonical: bytes) -> Route:
        """Say how base URLs end if the path is a listed one with a slash or a prefix too many, or a /v1 too few."""
        canonical = canonical.rstrip()
        for count in range(_MOST_SEGMENTS, 0, -1):
            listed = b"/" + b"/".join(canonical.split(b"/")[1:][-count:])
            if _without_v1(listed) in self._without_v1:
                return replace(_NOT_FOUND, dialect=dialect_of(listed), detail=_SPELT_OTHERWISE)
        return replace(_NOT_FOUND, dialect=dialect_of(canonical))

    def _allows(self, path: bytes, *, has_dots: bool) -> bool:
        """Whether ALLOW_PATHS allows the path. With `..` in it only `*` does: it may lead anywhere."""
        if has_dots:
            return "*" in self._allow_paths
        return any(fnmatchcase(path.decode("latin-1"), pattern) for pattern in self._allow_paths)


def _route(path: str, kind: RouteClass, admin_routes: bool) -> Route:
    needs_body = kind is INFERENCE or path in _BODY_CHEAP.split()
    limit_members, limit_member = _LIMIT_MEMBERS.get(path, ((), ""))
    route = Route(
        path,
        kind,
        needs_body=needs_body,
        streams=path in _STREAMING.split(),
        demand_rule=RULES.get(path) if kind.slot else None,
        generates=bool(limit_members) or path in _TRANSCRIBING,
        limit_members=limit_members,
        limit_member=limit_member,
        takes_forms=path in _TRANSCRIBING,
        by_model=kind.works or kind is CONTROL or (kind.changing and path in _CHANGING_MODEL),
        pins_slot=path in _PINNING.split(),
        dialect=dialect_of(path.encode()),
    )
    if kind.changing and not admin_routes:
        detail = "Routes that change the backend need ADMIN_ROUTES=true."
        return replace(route, refusal=ROUTE_NOT_ALLOWED, detail=detail)
    return route


def is_page_file(path: bytes) -> bool:
    """Whether a path, without its query, has the shape of a file of llama-server's page."""
    return len(path) <= _MOST_PAGE_FILE_BYTES and _PAGE_FILE.fullmatch(path) is not None


def _without_v1(path: bytes) -> bytes:
    while path.startswith(b"/v1/") or path == b"/v1":
        path = path[3:]
    return path or b"/"


def dialect_of(path: bytes) -> Dialect:
    """The dialect of the API to which a path belongs, also one below the API's own or with a wrong number of /v1."""
    path = _without_v1(path)
    for base, dialect in _DIALECTS.items():
        if path == base or path.startswith(base + b"/"):
            return dialect
    return OPENAI


def decoded_segments(path: bytes) -> list[bytes]:
    """The segments that a lenient server might see: decoded repeatedly, in lower case, without parameters."""
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
    """The path that a lenient server might make of these segments: empty ones removed, dots resolved."""
    kept: list[bytes] = []
    for name in segments:
        if name == b"..":
            del kept[-1:]
        elif name not in (b"", b"."):
            kept.append(name)
    return b"/" + b"/".join(kept)
