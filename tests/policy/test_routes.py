"""routes.py: which role may call which route of llama-server, in every spelling that a server could accept."""

import random
from collections.abc import Iterator

import pytest

from core.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from core.errors import METHOD_NOT_ALLOWED, ROUTE_NOT_ALLOWED, ROUTE_NOT_FOUND, GatewayError
from policy import routes
from policy.routes import PREFLIGHT, UNROUTED, Role, Route, Routes
from support.paths import TESTS

# Every route of llama-server and the gateway, by what a gateway with several users must do with it.
INFERENCE = """POST /v1/chat/completions
POST /chat/completions
POST /v1/completions
POST /completions
POST /completion
POST /v1/responses
POST /responses
POST /v1/messages
POST /infill
POST /v1/embeddings
POST /embeddings
POST /embedding
POST /v1/rerank
POST /rerank
POST /v1/reranking
POST /reranking
POST /v1/audio/transcriptions
POST /audio/transcriptions
POST /v1/systemone"""
CHEAP_WITH_BODY = """POST /tokenize
POST /detokenize
POST /apply-template
POST /v1/chat/completions/input_tokens
POST /chat/completions/input_tokens
POST /v1/responses/input_tokens
POST /responses/input_tokens
POST /v1/messages/count_tokens"""
CHEAP = "GET /v1/models\nHEAD /v1/models\nGET /models\nHEAD /models"
BOARD = "GET /ui\nHEAD /ui\nGET /ui/events\nHEAD /ui/events"  # with UI=on
CONTROL = "POST /v1/chat/completions/control"
OPERATOR_READING = "GET /slots\nHEAD /slots\nGET /lora-adapters\nHEAD /lora-adapters"
PAGE = "GET /:page"  # the row of all files, which are in tests/corpus/page_files.txt
PROPS = "GET /props\nHEAD /props"
OPERATOR_CHANGING = """POST /props
POST /lora-adapters
POST /slots/0?action=save
POST /slots/17?action=erase
POST /models
DELETE /models
POST /models/load
POST /models/unload
GET /models/sse
HEAD /models/sse"""
PUBLIC = """GET /
HEAD /
GET /ping
HEAD /ping
GET /health
HEAD /health
GET /v1/health
HEAD /v1/health
GET /metrics
HEAD /metrics"""
OWN_USE = "GET /usage\nHEAD /usage"
OWN = "POST /reload\nPOST /drain"
BLOCKED = """GET /tools
POST /tools
POST /tools/run
GET /cors-proxy
POST /cors-proxy
POST /cors-proxy/http://10.0.0.1/
POST /predict
GET /v1/stream
DELETE /v1/stream
GET /v1/stream/some-id
POST /v1/streams
POST /v1/streams/lookup"""
UNKNOWN = """GET /index.html
POST /v1/new
POST /v2/chat/completions
GET /v1
GET /pingx
GET /v1/models.json
GET /toolsx"""
FOR_ALL_KEYS = INFERENCE, CHEAP_WITH_BODY, CHEAP, CONTROL
ALL_CLASSES = *FOR_ALL_KEYS, OPERATOR_READING, PROPS, OPERATOR_CHANGING, PUBLIC, OWN_USE, OWN, BLOCKED

DEPLOYMENTS = {
    f"{'admin' if admin else 'no admin'}, allow {','.join(allow) or 'nothing'}": Routes(
        admin_routes=admin, allow_paths=allow
    )
    for admin in (False, True)
    for allow in ((), ("*",), ("/v1/*", "/slots/*", "/tools*", "/x/*", "/[a-z]*"))
}
each_deployment = pytest.mark.parametrize("name", DEPLOYMENTS)


def lines(*groups: str) -> Iterator[tuple[bytes, bytes]]:
    for group in groups:
        for line in group.splitlines():
            method, target = line.encode().split()
            yield method, target


def may(route: Route, role: Role) -> bool:
    return route.refusal is None and role >= route.kind.role


# --- The table ---


@each_deployment
def test_each_role_may_call_its_routes(name: str) -> None:
    found, admin = DEPLOYMENTS[name].find, not name.startswith("no")
    expected: dict[str, tuple[bool, bool, bool]] = dict.fromkeys(FOR_ALL_KEYS, (False, True, True))
    expected |= {PUBLIC: (True, True, True), OWN_USE: (False, True, True)}
    expected |= {OWN: (False, False, True), OPERATOR_READING: (False, False, True), PROPS: (False, False, True)}
    expected |= {OPERATOR_CHANGING: (False, False, admin), BLOCKED: (False, False, False)}
    for group, roles in expected.items():
        for method, target in lines(group):
            assert tuple(may(found(method, target), role) for role in Role) == roles, (method, target)


def test_every_row_of_the_table_is_in_this_file() -> None:
    here = {(method, target.partition(b"?")[0]) for method, target in lines(*ALL_CLASSES)}
    listed = {(method.encode(), path.replace(":id", "0").encode()) for method, path, _ in routes.TABLE}
    assert listed - {tuple(PAGE.encode().split()), *lines(BOARD)} <= here
    for blocked in routes.BLOCKED_PATHS:
        assert blocked.encode() in {path for _, path in here}


def test_every_route_in_this_file_has_its_row_in_the_table() -> None:
    found = Routes(admin_routes=True).find
    missing = [
        f"TABLE in scripts/policy/routes.py has no row for {method.decode()} {target.decode()}: add it."
        for method, target in lines(*FOR_ALL_KEYS, OPERATOR_READING, PROPS, OPERATOR_CHANGING, PUBLIC, OWN_USE, OWN)
        if found(method, target).refusal is not None
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_what_each_class_means() -> None:
    found = Routes(admin_routes=True).find
    for method, target in lines(*ALL_CLASSES):
        kind = found(method, target).kind
        one = (method, target)
        assert kind.slot == kind.metered == (one in set(lines(INFERENCE))), one
        assert kind.rated == (one in set(lines(INFERENCE, CHEAP_WITH_BODY, CHEAP))), one
        assert kind.local == (one in set(lines(PUBLIC, OWN_USE, OWN))), one
        assert kind.changing == (one in set(lines(OPERATOR_CHANGING))), one
        assert kind.blocked == (one in set(lines(BLOCKED))), one
        assert kind.kept == (one in set(lines(CHEAP))), one
        assert found(method, target).needs_body == (one in set(lines(INFERENCE, CHEAP_WITH_BODY))), one
        # A lost request is sent again only if sending it twice does no harm.
        again = set(lines(INFERENCE, CHEAP, CHEAP_WITH_BODY, OPERATOR_READING, PROPS))
        assert kind.repeatable == (one in again), one


# --- UI=on ---

WITH_UI = Routes(ui=True, admin_routes=True, allow_paths=("*",))
FILES = (TESTS / "corpus" / "page_files.txt").read_bytes().split()  # of the page of b11434, as it is built
OTHERS = b"""/build.jsonx /Index.html /index.htm /sw.js/ //sw.js /./sw.js /sw.js; /sw.js;x /sw.js%00 /%73w.js /sw.mjs
/_app /_app/ /_app/x /_app/.js /_app/../slots /_app/../slots.js /_app/..js /_app/x/../../props.js /_app//x.js
/_app/x..js /_app/%2e%2e/x.js /_app/x%2ejs /_app\\x.js /_app/x.js/ /_app/x.js/y /_app/a/b/c/d/e/f.js /_app/x.html
/_app/x.php /_APP/x.js /_app/x.js%0a /_app/x.js\xc3 /favicon /favicon.icox /favicons.ico /favicon.json /pwa-.png
/pwa-x /pwa-x.js /pwa-../slots.png /pwa-x/y.png /apple-.png /apple-x.json /maskable-icon.png /maskable-icon-x.sh
/workbox-.js /workbox-x.json /workbox-x/y.js /workbox.js /recommended-mcp /recommended-mcp/ /recommended-mcp/x.js
/recommended-mcp/../tools.png /recommended-mcp/a/b.png /tools.png /slots.json /props.json /health.js /v1/models.json
/metrics.json /:page /manifest.json /_app/:page.js /x/index.html /v1/../sw.js""".split()
OTHERS += [b"/_app/x.js\n", b"/sw.js ", b"", b"*"]


def test_every_file_of_the_page_may_be_read_by_anyone() -> None:
    assert len(FILES) > 60
    for path in (*FILES, b"/"):
        for target in (path, path + b"?__WB_REVISION__=0"):
            for method in (b"GET", b"HEAD"):
                route = WITH_UI.find(method, target)
                assert may(route, Role.PUBLIC), target
                assert route.kind.local, target
                assert (route.kind.slot, route.kind.rated) == (False, False), target


def test_all_files_have_one_label() -> None:
    assert {WITH_UI.find(b"GET", path).label for path in FILES} == {routes.PAGE_FILES}


@pytest.mark.parametrize("path", OTHERS, ids=repr)
def test_no_other_path_is_public(path: bytes) -> None:
    for query in (b"", b"?", b"?/sw.js", b"?x=/_app/x.js"):
        route = WITH_UI.find(b"GET", path + query)
        assert not may(route, Role.PUBLIC)
        assert route.label != routes.PAGE_FILES
        assert not may(Routes(ui=True).find(b"GET", path + query), Role.OPERATOR)


def test_a_very_long_name_is_none_of_a_file() -> None:
    assert routes.is_page_file(b"/_app/" + b"x" * 191 + b".js")
    assert not routes.is_page_file(b"/_app/" + b"x" * 192 + b".js")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"PATCH", b"get", b"TRACE"])
def test_files_can_only_be_read(method: bytes) -> None:
    for path in (*FILES, b"/"):
        assert Routes(ui=True).find(method, path).refusal in (ROUTE_NOT_FOUND, METHOD_NOT_ALLOWED)
        assert not may(WITH_UI.find(method, path), Role.PUBLIC)


def test_no_file_is_a_route_of_another_kind() -> None:
    """With UI=off each is a path as any other, so nothing of llama-server's API has its shape."""
    for path in FILES:
        assert Routes().find(b"GET", path).refusal is ROUTE_NOT_FOUND
    for method, target in lines(*ALL_CLASSES):
        assert not routes.is_page_file(target.partition(b"?")[0]), method


def test_anyone_may_read_the_board_and_any_key_its_stream() -> None:
    for method, target in lines(BOARD):
        route = WITH_UI.find(method, target)
        assert may(route, Role.PUBLIC) == (target == b"/ui")
        assert may(route, Role.INFER)
        assert (route.kind.local, route.kind.slot, route.kind.rated) == (True, False, False)
        assert Routes().find(method, target).refusal is ROUTE_NOT_FOUND
    assert WITH_UI.find(b"POST", b"/ui/events").refusal is METHOD_NOT_ALLOWED


def test_properties_can_be_read_by_all_keys() -> None:
    for method, target in lines(PROPS):
        route = WITH_UI.find(method, target)
        assert may(route, Role.INFER)
        assert not may(route, Role.PUBLIC)
        assert (route.kind.local, route.kind.bounded) == (True, True)
    assert not may(Routes(ui=True).find(b"POST", b"/props"), Role.OPERATOR)


def test_with_a_ui_all_other_routes_are_as_before() -> None:
    without = Routes(admin_routes=True, allow_paths=("*",))
    for method, target in lines(*FOR_ALL_KEYS, OPERATOR_READING, OPERATOR_CHANGING, PUBLIC, OWN_USE, OWN, BLOCKED):
        assert WITH_UI.find(method, target) == without.find(method, target)


def test_cheap_routes_occupy_no_slot() -> None:
    for method, target in lines(CHEAP, CHEAP_WITH_BODY, CONTROL, OPERATOR_READING):
        assert not Routes().find(method, target).kind.slot


def test_an_infer_key_reaches_no_operator_route() -> None:
    for deployment in DEPLOYMENTS.values():
        for method, target in lines(OPERATOR_READING, OPERATOR_CHANGING, OWN, BLOCKED):
            assert not may(deployment.find(method, target), Role.INFER)


def test_a_query_does_not_change_the_route() -> None:
    for method, target in lines(*ALL_CLASSES, UNKNOWN):
        for deployment in DEPLOYMENTS.values():
            for query in (b"?", b"?x=1", b"?/tools?#", b"?../../ping"):
                path = target.partition(b"?")[0]
                assert deployment.find(method, path + query) == deployment.find(method, path)


def test_metrics_may_need_a_key() -> None:
    assert Routes().find(b"GET", b"/metrics").kind.role is Role.PUBLIC
    private = Routes(metrics_auth=True)
    for method in (b"GET", b"HEAD"):
        assert private.find(method, b"/metrics").kind.role is Role.INFER
        assert private.find(method, b"/metrics").kind.local
        assert private.find(method, b"/ping").kind.role is Role.PUBLIC


def test_dialects() -> None:
    found = Routes().find
    dialects = {target: found(method, target).dialect for method, target in lines(INFERENCE, CHEAP_WITH_BODY)}
    assert {target for target, dialect in dialects.items() if dialect is ANTHROPIC} == {
        b"/v1/messages",
        b"/v1/messages/count_tokens",
    }
    assert {target for target, dialect in dialects.items() if dialect is RESPONSES} == {
        b"/v1/responses",
        b"/v1/responses/input_tokens",
        b"/responses",
        b"/responses/input_tokens",
    }


@pytest.mark.parametrize(
    ("target", "dialect"),
    [
        (b"/v1/messages/batches", ANTHROPIC),
        (b"/v1/messages/", ANTHROPIC),
        (b"/V1//Messages/x?beta=true", ANTHROPIC),
        (b"/v1/messages/../models/x", OPENAI),
        (b"/v1/messagesx", OPENAI),
        (b"/v1/responses/resp_1/cancel", RESPONSES),
        (b"/nowhere", OPENAI),
    ],
)
def test_a_path_that_is_not_listed_has_the_dialect_of_its_api(target: bytes, dialect: Dialect) -> None:
    assert Routes().find(b"POST", target).dialect is dialect
    assert Routes(allow_paths=("*",)).find(b"POST", target).dialect is dialect


def test_routes_that_answer_with_a_stream() -> None:
    found = Routes(allow_paths=("*",)).find
    targets = [target for method, target in lines(INFERENCE, CHEAP_WITH_BODY) if found(method, target).streams]
    assert targets == [
        b"/v1/chat/completions",
        b"/chat/completions",
        b"/v1/completions",
        b"/completions",
        b"/completion",
        b"/v1/responses",
        b"/responses",
        b"/v1/messages",
        b"/infill",
    ]
    assert not found(b"POST", b"/of/its/own").streams


# --- Labels ---


def test_labels_come_from_the_table() -> None:
    labels = {path for _, path, _ in routes.TABLE} | set(routes.BLOCKED_PATHS)
    for deployment in DEPLOYMENTS.values():
        for method, target in lines(*ALL_CLASSES):
            route = deployment.find(method, target)
            assert route.label in labels
            assert route.label == target.decode().partition("?")[0] or route.kind.blocked or "/slots/" in route.label
    assert Routes().find(b"POST", b"/slots/7").label == "/slots/:id"
    assert Routes().find(b"GET", b"/new").label == "unknown"
    assert Routes(allow_paths=("*",)).find(b"GET", b"/new").label == "other"
    assert UNROUTED.label == "none"
    assert PREFLIGHT.label == "OPTIONS"


# --- Methods ---


def test_an_unsupported_method_gets_the_supported_ones() -> None:
    route = Routes().find(b"DELETE", b"/v1/models")
    error = route.error()
    assert error.kind is METHOD_NOT_ALLOWED
    assert error.fields == ((b"Allow", b"GET, HEAD"),)
    assert Routes().find(b"GET", b"/v1/chat/completions").error().fields == ((b"Allow", b"POST"),)
    assert Routes().find(b"GET", b"/slots/3").error().fields == ((b"Allow", b"POST"),)
    assert Routes().find(b"get", b"/ping").refusal is METHOD_NOT_ALLOWED
    assert not Routes().find(b"PUT", b"/v1/chat/completions").needs_body


def test_an_unsupported_method_needs_the_same_role() -> None:
    assert Routes().find(b"PUT", b"/ping").kind.role is Role.PUBLIC
    for method, target in lines(*FOR_ALL_KEYS, OPERATOR_READING, OWN_USE, OWN):
        assert Routes().find(b"PATCH", target).kind.role > Role.PUBLIC, method


def test_options_is_a_preflight_on_every_path() -> None:
    for deployment in DEPLOYMENTS.values():
        for _, target in lines(*ALL_CLASSES, UNKNOWN):
            assert deployment.find(b"OPTIONS", target) is PREFLIGHT
        assert deployment.find(b"OPTIONS", b"*") is PREFLIGHT
    assert may(PREFLIGHT, Role.PUBLIC)


@pytest.mark.parametrize("method", [b"TRACE", b"CONNECT", b"PROPFIND", b"get"])
def test_only_common_methods_are_relayed_to_allowed_paths(method: bytes) -> None:
    error = Routes(allow_paths=("*",)).find(method, b"/new").error()
    assert error.kind is METHOD_NOT_ALLOWED
    assert error.fields == ((b"Allow", b"DELETE, GET, HEAD, PATCH, POST, PUT"),)


# --- Unknown paths, and ALLOW_PATHS ---


def test_unknown_paths_are_refused() -> None:
    for method, target in lines(UNKNOWN):
        route = Routes(admin_routes=True).find(method, target)
        assert route.refusal is ROUTE_NOT_FOUND
        assert not may(route, Role.OPERATOR)


def test_allowed_paths_are_inference() -> None:
    for method, target in lines(UNKNOWN):
        route = Routes(allow_paths=("*",)).find(method, target)
        assert may(route, Role.INFER)
        assert not may(route, Role.PUBLIC)
        assert route.kind.slot
        assert route.kind.rated
        assert route.kind.metered
        assert not route.kind.repeatable
        assert not route.needs_body


@pytest.mark.parametrize(
    ("pattern", "target", "allowed"),
    [
        ("/v1/new", b"/v1/new", True),
        ("/v1/new", b"/v1/new?x=/y", True),
        ("/v1/new", b"/v1/newer", False),
        ("/v1/new", b"/v1/new/", False),
        ("/v1/new", b"/v1/NEW", False),
        ("/v1/new", b"/x?/v1/new", False),
        ("/v1/new", b"/v1/ne%77", False),
        ("/v1/*", b"/v1/new/one", True),
        ("/v1/*", b"/v1/../admin", False),
        ("/v1/*", b"/v1/%2e%2E/admin", False),
        ("/v1/*", b"/v1/%u002e./admin", False),
        ("/v1/*", b"/v1\\..\\admin", False),
        ("/v1/*", b"/v1/..;x/admin", False),
        ("/v1/*", b"/v1/a..b/...", True),
        ("*", b"/a/../b", True),
        ("*", b"/", False),
        ("/*.js", b"/app.js", True),
        ("/*.js", b"/app.css", False),
        ("/[ab]", b"/a", False),
        ("/[ab]", b"/[ab]", True),
    ],
)
def test_allow_paths(pattern: str, target: bytes, allowed: bool) -> None:
    assert may(Routes(allow_paths=(pattern,)).find(b"POST", target), Role.INFER) is allowed


@pytest.mark.parametrize(
    "target",
    [b"/slots/0x", b"/slots/0000000000", b"/slots/+0", b"/slots/%200", b"/slots/", b"/slots/0/", b"/slots/0%00"],
)
def test_allow_paths_opens_nothing_below_an_operators_path(target: bytes) -> None:
    """llama-server reads a slot's number as C does, up to the first byte that is not a digit."""
    for deployment in DEPLOYMENTS.values():
        assert deployment.find(b"POST", target).refusal is ROUTE_NOT_FOUND
    assert Routes(allow_paths=("*",)).find(b"POST", b"/models/new").refusal is ROUTE_NOT_FOUND


def test_a_refusal_has_a_reason() -> None:
    assert Routes().find(b"POST", b"/models/load").error().message == (
        "Routes that change the backend need ADMIN_ROUTES=true."
    )
    blocked = Routes().find(b"GET", b"/tools").error()
    assert isinstance(blocked, GatewayError)
    assert (blocked.kind, blocked.message) == (ROUTE_NOT_ALLOWED, "This route is blocked.")
    assert blocked.fields == Routes().find(b"GET", b"/new").error().fields == ()


# --- Spellings ---


def spellings(path: bytes) -> Iterator[bytes]:
    """What some server, proxy or client could read as `path`."""
    last = path[-1:]
    yield from (path + end for end in (b"/", b"//", b"/.", b"/./", b"/x/..", b"%00", b"%00.js", b";", b";a=b", b"%3Bx"))
    yield from (
        path + end
        for end in (b"%2f", b"%2F..%2f" + path.rpartition(b"/")[2], b"\\", b"%5c", b"%3Fx", b"%23", b"/%2e", b"%252f")
    )
    yield from (b"/" + path, b"//" + path, b"/." + path, b"/x/.." + path, b"/%2e%2e" + path, b"\\" + path[1:])
    yield from (b"/x/%2e%2e/" + path[1:], b"/.;x" + path, b"/%2f" + path[1:], b"/%5C" + path[1:], b"/;" + path)
    yield from (path[:1] + path[1:].upper(), path[:2].upper() + path[2:], path.title(), path[:-1] + last.upper())
    yield path[:-1] + b"%%%02x" % ord(last)
    yield path[:-1] + b"%%25%02x" % ord(last)
    yield path[:-1] + b"%%2525%02X" % ord(last)
    yield path[:-1] + b"%%u00%02x" % ord(last)
    yield path[:-1] + b"%%U00%02X" % ord(last)
    yield path[:-1] + b"%%25u00%02x" % ord(last)
    yield path.replace(b"/", b"//")
    yield path.replace(b"/", b"\\")
    yield b"/" + path[1:].replace(b"/", b"%2f")
    yield b"/" + path[1:].replace(b"/", b"%5C")
    yield path.replace(b"/", b"/./")
    yield path.replace(b"/", b";x/")


@each_deployment
def test_no_spelling_reaches_a_listed_route(name: str) -> None:
    find = DEPLOYMENTS[name].find
    listed = {target.partition(b"?")[0] for _, target in lines(*ALL_CLASSES)}
    for path in listed:
        for spelling in set(spellings(path)) - listed:
            for method in (b"GET", b"POST", b"DELETE"):
                route = find(method, spelling)
                assert route.refusal in (ROUTE_NOT_FOUND, ROUTE_NOT_ALLOWED, METHOD_NOT_ALLOWED), spelling
                assert not may(route, Role.OPERATOR), spelling
                assert route.label in ("unknown", *routes.BLOCKED_PATHS), spelling


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completions/", b"//v1/chat/completions", b"/v1//chat/completions", b"/v1/v1/chat/completions",
        b"/v1/v1/v1/models", b"/v1/models/", b"/messages", b"/v1/v1/messages", b"/v1/messages/",
        b"/V1/Models", b"/v1/tokenize", b"/v1/ping", b"/systemone", b"/v1", b"/v1/", b"/v1/v1", b"//",
        b"/v2/chat/completions", b"/openai/v1/chat/completions", b"/v1/chat/completions/chat/completions",
        b"/v1/chat/completions/v1/messages", b"/anthropic/v1/messages", b"/a/messages/count_tokens", b"/v1/models%20",
        b"/v1/chat/completion",
    ],
)  # fmt: skip
def test_a_path_that_is_only_spelt_differently_is_answered_with_how_base_urls_end(path: bytes) -> None:
    route = Routes().find(b"POST", path)
    assert route.refusal is ROUTE_NOT_FOUND
    assert "the path or the base URL is wrong. A base URL has no slash at its end; for" in route.error().message
    assert "ends in /v1" in route.error().message
    assert route.label == "unknown"
    assert (route.dialect is ANTHROPIC) is (b"messages" in path)


def test_a_path_that_is_like_no_listed_one_is_only_not_found() -> None:
    for _, target in lines("GET /index.html\nPOST /v1/new\nPOST /v1/models/tiny\nGET /pingx\nGET /v1x"):
        assert Routes().find(b"POST", target).error().message == ROUTE_NOT_FOUND.message


def as_llama_server_decodes(path: bytes) -> bytes:
    """One pass over %XX and %uXXXX, as in llama-server's HTTP library (observed on the running server)."""
    decoded, at = b"", 0
    while at < len(path):
        width = {b"%u": 6, b"%U": 1}.get(path[at : at + 2], 3 if path[at : at + 1] == b"%" else 1)
        digits = path[at + (2 if width == 6 else 1) : at + width]
        try:
            decoded += chr(int(digits, 16)).encode() if width > 1 else path[at : at + 1]
        except ValueError:
            decoded, width = decoded + path[at : at + 1], 1
        at += width
    return decoded


def test_no_encoding_reaches_a_listed_route() -> None:
    """Paths with bytes encoded at random: what llama-server reads as a listed or a blocked path is not relayed."""
    choose = random.Random(2)
    find = Routes(allow_paths=("*",), admin_routes=True).find
    listed = [target.partition(b"?")[0] for _, target in lines(*ALL_CLASSES)]
    for _ in range(4000):
        path = choose.choice(listed)
        forms = (b"%c", b"%c", b"%%%02x", b"%%%02X", b"%%u%04x", b"%%u%04X")
        spelling = path[:1] + b"".join(choose.choice(forms) % byte for byte in path[1:])
        assert as_llama_server_decodes(spelling) == path
        if spelling not in listed:
            assert find(b"POST", spelling).refusal is not None, spelling


def test_decoding_a_path_takes_linear_time() -> None:
    """A path that can be decoded again and again is decoded four times at most."""
    find = Routes(allow_paths=("*a*a*a*", "/x/*")).find
    for target in (b"/%" + b"25" * 4000 + b"41", b"/.." * 2700, b"/" * 8000, b"/;" * 4000, b"/%u002e" * 1100):
        assert not may(find(b"POST", target), Role.OPERATOR)
