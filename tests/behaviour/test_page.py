"""The page at / over real sockets: what a stranger gets, what keys may read, and that nothing else is reached."""

import json
import re

import pytest

from core.installation import page
from policy.routes import BLOCKED_PATHS, PAGE_FILES, TABLE, Role, RouteClass
from support.backend import answer, send, stall
from support.gateway import BACKEND_KEY, KEY, OPERATOR_KEY, Stack, get, post, request, scenario, until
from support.paths import TESTS
from support.rawclient import RawClient, Response

BROWSER = b"Accept: text/html,*/*;q=0.8"
WRONG_KEY = b"sk-mallory-0123456789abcdef"
INDEX = b"<!doctype html><script>start()</script>"
FILES = (TESTS / "corpus" / "page_files.txt").read_bytes().split()
HOSTILE = b"""/_app/../slots /_app/..%2fslots /_app/%2e%2e/slots /_app//slots /_app/x.js;/../../slots /_app/.js
/favicon.ico/ /sw.js%00 /sw.js%3f /workbox-../../slots.js /recommended-mcp/../slots /recommended-mcp/../slots.png
/pwa-/../slots /apple-/..%5cslots /index.html/../slots /build.json/ //index.html /./sw.js /x/sw.js /INDEX.HTML
/sw.js%20""".split()
PROPS = {"total_slots": 2, "model_path": "/models/a/secret/m.gguf", "chat_template": "x", "new_path": "/a/secret"}


def with_page(stack: Stack) -> None:
    """Give the backend a page: any path that looks like a file's is there."""
    stack.backend.own |= {path: answer(b"file " + path, b"200 OK", b'ETag: "e"') for path in FILES}
    stack.backend.own[b"/"] = answer(INDEX, b"200 OK").replace(b"application/json", b"text/html")
    stack.backend.own[b"/index.html"] = stack.backend.own[b"/"]
    stack.backend.own[b"/props?autoload=false"] = stack.backend.own[b"/props"] = answer(json.dumps(PROPS).encode())


def probed(stack: Stack) -> set[bytes]:
    """Return what the gateway itself asked the backend for, except what it needs."""
    return set(stack.backend.probes) - {b"/health", b"/slots"}


# --- What a stranger gets ---


@scenario()
async def test_a_stranger_gets_the_page_and_all_of_its_files(stack: Stack) -> None:
    with_page(stack)
    for path in (b"/", *FILES):
        response = await stack.ask(get(path, BROWSER, key=None))
        assert response.status == 200, path
        assert response.body == (INDEX if path in (b"/", b"/index.html") else b"file " + path)
        assert response.field(b"x-content-type-options") == b"nosniff"
        assert response.field(b"x-frame-options") == b"DENY"
        assert response.field(b"x-request-id").startswith(b"req-")
    assert not stack.backend.calls
    await stack.stop()
    assert {line["route"] for line in stack.lines} == {"/", PAGE_FILES}


@scenario()
async def test_a_wrong_credential_does_not_keep_the_page_from_a_stranger(stack: Stack) -> None:
    with_page(stack)
    for fields in ((), (b"X-Api-Key: a", b"Api-Key: b"), (b"Authorization: Basic x",)):
        for path in (b"/", b"/sw.js"):
            response = await stack.ask(get(path, *fields, key=WRONG_KEY if not fields else None))
            assert response.status == 200


@scenario(KEYS=f"alice:{KEY.decode()}:1\n", MAX_CONCURRENT_REQUESTS="1", MAX_QUEUE_SIZE="1")
async def test_files_take_no_slot_and_no_rate(stack: Stack) -> None:
    with_page(stack)
    stack.backend.script(stall())
    busy = await stack.client()
    busy.send(post())
    await stack.backend.call()
    for path in FILES:
        response = await stack.ask(get(path))
        assert response.status == 200
        assert b"x-ratelimit" not in response.head


@scenario()
async def test_the_backend_sees_a_file_once_and_nothing_of_the_client(stack: Stack) -> None:
    with_page(stack)
    seen: list[bytes] = []

    def note(call: object) -> None:
        seen.append(call.raw)  # type: ignore[attr-defined]

    stack.backend.own_steps = note
    for _ in range(5):
        await stack.ask(get(b"/sw.js?secret=1", b"Cookie: a=b", b"Range: bytes=0-1", b"X-Conversation-Id: 7"))
    (raw,) = (each for each in seen if b"sw.js" in each)
    assert raw.startswith(b"GET /sw.js HTTP/1.1\r\nHost: 127.0.0.1:")
    assert raw.endswith(b"Authorization: Bearer " + BACKEND_KEY.encode() + b"\r\n\r\n")
    assert raw.count(b"\r\n") == 4


@scenario()
async def test_a_body_is_not_read_and_not_passed_on(stack: Stack) -> None:
    with_page(stack)
    response = await stack.ask(request(b"GET", b"/sw.js", b"x" * 100_000, key=None))
    assert response.status == 200
    assert not stack.backend.calls
    client = await stack.client()
    client.send(request(b"GET", b"/sw.js", None, b"Content-Length: 100000", key=None))
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (200, b"close")


@scenario()
async def test_a_copy_is_not_sent_again(stack: Stack) -> None:
    with_page(stack)
    client = await stack.client()
    for _ in range(2):
        client.send(get(b"/sw.js", b'If-None-Match: "e"', key=None))
        response = await client.response()
        assert (response.status, response.body) == (304, b"")


@scenario(MAX_CONNECTIONS="4")
async def test_slow_strangers_use_no_backend_connection_and_keep_no_key_out(stack: Stack) -> None:
    big = b"x" * (8 << 20)
    stack.backend.own[b"/sw.js"] = answer(big)
    slow: list[RawClient] = []
    for _ in range(4):
        client = await stack.client(receive_buffer=4096)
        client.transport.pause_reading()
        client.send(get(b"/sw.js", key=None))
        slow.append(client)
    await until(lambda: sum(wire.write_paused for wire in stack.clients) == 4)
    assert stack.backend.probes.count(b"/sw.js") == 1
    assert not stack.backend.open
    for _ in range(4):
        assert (await stack.ask(post())).status == 200
    for client in slow:
        client.transport.abort()


# --- While there is no page ---


@scenario(STATE="loading")
async def test_while_the_model_loads_a_page_waits_for_it(stack: Stack) -> None:
    for path in (b"/", b"/build.json", b"/sw.js"):
        stack.backend.own[path] = answer(b"{}", b"503 Service Unavailable")
    response = await stack.ask(get(b"/", BROWSER, key=None))
    assert (response.status, response.body) == (503, page("loading.html"))
    response = await stack.ask(get(b"/sw.js", key=None))
    assert (response.status, response.code) == (503, "loading")
    response = await stack.ask(get(b"/", b"Accept: */*", key=None))
    assert (response.status, response.field(b"content-type")) == (200, b"text/plain; charset=utf-8")
    with_page(stack)
    stack.app.page_files.forget()
    await stack.turn("ready")
    assert (await stack.ask(get(b"/", BROWSER, key=None))).body == INDEX


@scenario(STATE="loading")
async def test_a_page_waits_while_nothing_listens(stack: Stack) -> None:
    stack.backend.refuse()
    assert (await stack.ask(get(b"/", BROWSER, key=None))).body == page("loading.html")


@scenario()
async def test_without_a_page_of_llama_servers_there_is_a_chat(stack: Stack) -> None:
    stack.backend.own[b"/"] = answer(b"{}", b"404 Not Found")
    response = await stack.ask(get(b"/", BROWSER, key=None))
    assert (response.status, response.body) == (200, page("chat.html"))


# --- UI=off ---


@scenario(UI="off")
async def test_without_a_ui_all_is_as_it_was(stack: Stack) -> None:
    with_page(stack)
    response = await stack.ask(get(b"/", BROWSER, key=None))
    assert (response.status, response.field(b"content-type")) == (200, b"text/plain; charset=utf-8")
    for path in FILES:
        assert (await stack.ask(get(path, key=None))).status == 401
        assert (await stack.ask(get(path, key=OPERATOR_KEY))).status == 404
    assert [(await stack.ask(get(b"/props", key=key))).status for key in (None, KEY, OPERATOR_KEY)] == [401, 403, 200]
    assert [call.target for call in stack.backend.calls] == [b"/props"]


# --- The properties ---


@scenario()
async def test_a_key_reads_properties_without_paths(stack: Stack) -> None:
    with_page(stack)
    response = await stack.ask(get(b"/props?model=m&autoload=true"))
    assert response.status == 502  # the scripted backend knows no model
    response = await stack.ask(get(b"/props"))
    assert response.status == 200
    assert json.loads(response.body) == {"total_slots": 2, "model_path": "m.gguf", "chat_template": "x"}
    assert b"/props?model=m&autoload=false" in stack.backend.probes
    response = await stack.ask(request(b"HEAD", b"/props"))
    assert response.status == 200
    assert json.loads((await stack.ask(get(b"/props", key=OPERATOR_KEY))).body) == PROPS


@scenario(MAX_CHEAP_REQUESTS_PER_MINUTE="2")
async def test_properties_have_the_rate_of_cheap_requests(stack: Stack) -> None:
    with_page(stack)
    assert [(await stack.ask(get(b"/props"))).status for _ in range(3)] == [200, 200, 429]


# --- The walk ---

NOBODY, INFER, OPERATOR = None, KEY, OPERATOR_KEY
ROLES = {NOBODY: Role.PUBLIC, INFER: Role.INFER, OPERATOR: Role.OPERATOR}
OPEN_TO_ALL = {"/ping": b"pong\n", "/": INDEX}  # besides files and states


def walk() -> list[tuple[str, str, RouteClass]]:
    rows = [(method, path.replace(":id", "0"), kind) for method, path, kind in TABLE if path != PAGE_FILES]
    return [row for row in rows if row[1] not in ("/drain", "/reload")]


async def walked(stack: Stack, method: str, path: str, key: bytes | None) -> Response:
    if path == "/ui/events" and key is not None:
        method = "HEAD"  # the stream does not end
    body = b"{}" if method == "POST" else None
    return await stack.ask(request(method.encode(), path.encode(), body, BROWSER, key=key))


@pytest.mark.parametrize("key", ROLES, ids=["nobody", "infer", "operator"])
@scenario(METRICS_AUTH_ENABLED="", ADMIN_ROUTES="true")
async def test_every_route_and_every_file_as_nobody_as_infer_and_as_operator(stack: Stack, key: bytes | None) -> None:
    with_page(stack)
    stack.backend.default = (send(answer(b"from the backend")),)
    for method, path, kind in walk():
        response = await walked(stack, method, path, key)
        allowed = ROLES[key] >= (Role.PUBLIC if path == "/metrics" else kind.role)
        assert response.status == (200 if allowed else 401 if key is None else 403), (method, path)
        if not allowed:
            assert "error" in json.loads(response.body)
        assert (response.body == b"from the backend") == (allowed and not kind.local), (method, path)
    for path in (*BLOCKED_PATHS, "/tools/x", "/v1/stream/x"):
        for method in ("GET", "POST"):
            assert (await walked(stack, method, path, key)).status == (401 if key is None else 403), path
    for path in FILES:
        response = await walked(stack, "GET", path.decode(), key)
        assert response.status == 200
        for method in ("POST", "DELETE", "PUT"):
            response = await walked(stack, method, path.decode(), key)
            assert response.status == (401 if key is None else 404), (method, path)


@scenario()
async def test_a_stranger_reaches_nothing_of_llama_servers_but_files(stack: Stack) -> None:
    with_page(stack)
    for path in HOSTILE:
        for method in (b"GET", b"HEAD", b"POST"):
            response = await stack.ask(request(method, path, b"" if method == b"POST" else None, BROWSER, key=None))
            assert response.status in (400, 401), (method, path)
    for path in FILES:
        await stack.ask(get(path, key=None))
    for method, path, _ in walk():
        await walked(stack, method, path, None)
    assert not stack.backend.calls
    assert probed(stack) - {b"/props"} <= {b"/", *FILES}
    assert stack.backend.probes.count(b"/props") <= 1  # the gateway's own, for the number of slots


@scenario()
async def test_a_navigation_to_another_path_is_an_error_in_json(stack: Stack) -> None:
    with_page(stack)
    response = await stack.ask(get(b"/settings", BROWSER, key=None))
    assert (response.status, response.code) == (401, "invalid_api_key")
    assert not re.search(rb"<html", response.body)


@scenario()
async def test_all_files_are_one_series_of_the_metrics(stack: Stack) -> None:
    with_page(stack)
    for path in FILES:
        await stack.ask(get(path, key=None))
    text = (await stack.ask(get(b"/metrics"))).body
    assert set(re.findall(rb'gateway_requests_total\{[^}]*route="([^"]*)"', text)) == {PAGE_FILES.encode()}


@scenario()
async def test_the_end_of_a_large_file_is_the_end_of_its_connection(stack: Stack) -> None:
    stack.backend.own[b"/sw.js"] = answer(b"x" * (8 << 20))
    for _ in range(3):
        client = await stack.client(receive_buffer=4096)
        client.send(get(b"/sw.js", b"Connection: close", key=None))
        response = await client.response()
        assert len(response.body) == 8 << 20
        await until(lambda: not stack.open_clients)
