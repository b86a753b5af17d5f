"""Which callers may use which routes and how often, and what web pages see."""

import json
import time

import pytest

from core.errors import INVALID_API_KEY
from support.backend import HELLO, answer, send, stall
from support.gateway import (
    CHAT,
    KEY,
    KEYS,
    OPERATOR_KEY,
    OTHER_KEY,
    Stack,
    get,
    post,
    request,
    scenario,
    until,
)
from support.rawclient import Response

ORIGIN = b"Origin: https://app.example"
NEW_KEY = b"sk-new-0123456789abcdef"


def operator(method: bytes, target: bytes) -> bytes:
    return request(method, target, None if method == b"GET" else b"", key=OPERATOR_KEY)


async def statuses(stack: Stack, *requests: bytes) -> list[int]:
    """Send the requests on one connection; return the status of each."""
    client = await stack.client()
    got = []
    for raw in requests:
        client.send(raw)
        got.append((await client.response(raw.partition(b" ")[0])).status)
    client.close()
    return got


# --- Public routes ---


@scenario()
async def test_public_routes_need_no_key_and_no_backend_with_any_query(stack: Stack) -> None:
    for target in (b"/ping", b"/health", b"/metrics"):
        for query in (b"", b"?x=1", b"?"):
            for method in (b"GET", b"HEAD"):
                for key in (None, b"sk-nobody-0123456789abcdef", KEY):
                    assert (await stack.ask(request(method, target + query, None, key=key))).status == 200
    assert (await stack.ask(request(b"OPTIONS", b"/v1/whatever", None, key=None))).status == 204
    assert (await stack.ask(request(b"OPTIONS", b"*", None, key=None))).status == 204
    assert stack.backend.connections == []


@scenario(METRICS_AUTH_ENABLED="true")
async def test_metrics_may_need_a_key(stack: Stack) -> None:
    wanted = [401, 401, 200, 200, 200]
    asked = [
        get(b"/metrics", key=None),
        get(b"/metrics?x", key=b"bad"),
        get(b"/metrics"),
        operator(b"GET", b"/metrics"),
    ]
    assert await statuses(stack, *asked, get(b"/ping", key=None)) == wanted


@scenario()
async def test_metrics_come_in_the_requested_format_and_name_no_key_to_the_public(stack: Stack) -> None:
    await stack.ask(post())
    page = await stack.ask(get(b"/metrics", key=None))
    assert page.field(b"content-type").startswith(b"text/plain; version=0.0.4")
    assert b'gateway_requests_total{route="/v1/chat/completions",code="200"} 1' in page.body
    assert b"alice" not in page.body
    assert b"alice" not in (await stack.ask(get(b"/metrics"))).body
    page = await stack.ask(get(b"/metrics", b"Accept: application/json", key=None))
    json.loads(page.body)


# --- Credentials ---


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((), 401),
        ((b"Authorization: Bearer " + KEY,), 200),
        ((b"Authorization: bearer   " + KEY,), 200),
        ((b"Authorization: " + KEY,), 200),
        ((b"x-api-key: " + KEY,), 200),
        ((b"Api-Key: " + KEY,), 200),
        ((b"Authorization: Basic " + KEY,), 401),
        ((b"Authorization: Bearer",), 401),
        ((b"Authorization: Bearer " + KEY[:-1],), 401),
        ((b"Authorization: Bearer " + KEY, b"x-api-key: " + OTHER_KEY), 401),
        ((b"Authorization: Bearer " + KEY, b"Authorization: Bearer " + KEY), 401),
        ((b"Authorization: Bearer " + KEY, b"api-key: " + KEY), 200),
    ],
)
@scenario()
async def test_a_key_is_accepted_in_each_field_that_clients_use(
    stack: Stack, fields: tuple[bytes, ...], status: int
) -> None:
    response = await stack.ask(post(CHAT, b"{}", *fields, key=None))
    assert response.status == status
    if status == 401:
        assert (response.code, response.field(b"www-authenticate")) == ("invalid_api_key", b"Bearer")
        assert KEY not in response.body
    assert len(stack.backend.calls) == (status == 200)
    await stack.stop()
    assert [(line["key"], line["status"]) for line in stack.lines] == [("alice" if status == 200 else "-", status)]
    assert stack.counted("unauthorized") == (status == 401)


@scenario(KEYS=KEYS + f"gone:{NEW_KEY.decode()}::2020-01-01\nheld:sk-held-0123456789abcdef:0\n")
async def test_expired_and_suspended_keys(stack: Stack) -> None:
    assert (await stack.ask(post(key=NEW_KEY))).code == "invalid_api_key"
    response = await stack.ask(post(key=b"sk-held-0123456789abcdef"))
    assert (response.status, response.code) == (403, "key_suspended")
    assert response.field(b"www-authenticate") is None
    await stack.stop()
    assert [line["key"] for line in stack.lines] == ["-", "held"]  # its owner can be told


@scenario(AUTH_ENABLED="false")
async def test_without_authentication_inference_is_open_and_operator_routes_are_closed(stack: Stack) -> None:
    asked = [
        post(key=None),
        post(key=b"any"),
        get(b"/v1/models", key=None),
        get(b"/slots", key=None),
        operator(b"POST", b"/reload"),
    ]
    assert await statuses(stack, *asked) == [200, 200, 200, 403, 403]
    response = await stack.ask(post(key=None))
    assert response.field(b"x-ratelimit-limit-requests") is None


@scenario(AUTH_ENABLED="false", ADMIN_ROUTES="true")
async def test_without_authentication_admin_routes_are_open_if_enabled(stack: Stack) -> None:
    asked = [get(b"/slots", key=None), post(b"/props", key=None), request(b"POST", b"/reload", b"", key=None)]
    assert await statuses(stack, *asked) == [200, 200, 200]


# --- Roles and routes ---

DANGEROUS = [b"/tools", b"/tools/run", b"/cors-proxy", b"/predict", b"/v1/stream/abc", b"/v1/streams/lookup"]
READING = [b"/slots", b"/lora-adapters"]
CHANGING = [b"/props", b"/lora-adapters", b"/slots/0?action=erase", b"/models/load"]


@scenario()
async def test_an_infer_key_cannot_call_operator_routes(stack: Stack) -> None:
    routes = [get(target) for target in READING] + [post(target) for target in (*CHANGING, b"/reload", b"/drain")]
    for raw in routes + [raw for target in DANGEROUS for raw in (get(target), post(target))]:
        response = await stack.ask(raw)
        assert (response.status, response.code) == (403, "route_not_allowed"), raw
    assert not stack.backend.connections
    assert not stack.app.lifecycle.draining


@scenario()
async def test_an_operator_may_read_and_may_change_only_if_that_is_enabled(stack: Stack) -> None:
    assert await statuses(stack, *(operator(b"GET", target) for target in READING)) == [200] * 2
    assert await statuses(stack, *(operator(b"POST", target) for target in CHANGING)) == [403] * 4
    assert [call.target for call in stack.backend.calls] == READING


@scenario(ADMIN_ROUTES="true", ALLOW_PATHS="*")
async def test_dangerous_routes_are_refused_to_all_in_every_spelling(stack: Stack) -> None:
    assert await statuses(stack, *(operator(b"POST", target) for target in CHANGING)) == [200] * 4
    spellings = [b"/TOOLS", b"//tools", b"/x/../tools", b"/%74ools", b"/tools/", b"/tools;x", b"/%2574ools"]
    assert await statuses(stack, *(operator(b"POST", target) for target in DANGEROUS + spellings)) == [403] * 13
    spellings = [b"/Props", b"//slots", b"/v1/../props", b"/%73lots", b"/slots/0/"]
    assert await statuses(stack, *(get(target) for target in spellings)) == [404] * 5


@scenario(ALLOW_PATHS="/v2/*")
async def test_unknown_routes_are_refused_unless_allowed(stack: Stack) -> None:
    assert await statuses(stack, get(b"/v3/x"), get(b"/v3/x", key=None), get(b"/v2/x"), post(b"/v2/y")) == [
        404,
        401,
        200,
        200,
    ]
    await stack.stop()
    assert [line["route"] for line in stack.lines] == ["unknown", "unknown", "other", "other"]


@scenario()
async def test_a_wrong_method_is_answered_with_the_allowed_ones(stack: Stack) -> None:
    response = await stack.ask(get(CHAT))
    assert (response.status, response.code, response.field(b"allow")) == (405, "method_not_allowed", b"POST")
    response = await stack.ask(post(b"/ping"))
    assert (response.status, response.field(b"allow")) == (405, b"GET, HEAD")
    assert (await stack.ask(get(CHAT, key=None))).status == 401


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_requests_that_need_no_slot_are_answered_during_a_stream(stack: Stack) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    asked = [get(b"/v1/models"), post(b"/tokenize"), post(b"/v1/chat/completions/control"), operator(b"GET", b"/slots")]
    assert await statuses(stack, *asked) == [200] * 4
    assert stack.app.queue.active == 1


# --- Rate limits ---


@scenario(KEYS=f"alice:{KEY.decode()}:2\nolga:{OPERATOR_KEY.decode()}:2 role=operator\n", MAX_REQUEST_BODY_SIZE="1000")
async def test_rate_limit_fields_are_exact_and_a_refusal_costs_no_quota(stack: Stack) -> None:
    response = await stack.ask(post())
    names = [b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests"]
    assert [response.field(name) for name in names] == [b"2", b"1", b"1m0s"]
    stack.advance(20)
    for raw in (post(CHAT, b"x" * 1001), get(b"/nowhere"), get(CHAT), request(b"POST", CHAT)):
        assert (await stack.ask(raw)).status in (404, 405, 411, 413)
    response = await stack.ask(get(b"/v1/models"))
    assert [response.field(name) for name in names] == [b"2", b"0", b"1m0s"]
    stack.advance(15)
    response = await stack.ask(post())
    assert (response.status, response.code) == (429, "rate_limit_exceeded")
    assert [response.field(name) for name in names] == [b"2", b"0", b"45s"]
    retry_s = int(response.field(b"retry-after"))
    assert retry_s == 25
    stack.advance(retry_s - 0.5)
    assert (await stack.ask(post())).field(b"retry-after") == b"1"
    stack.advance(0.5)
    assert (await stack.ask(post())).status == 200
    for _ in range(4):
        assert (await stack.ask(operator(b"GET", b"/slots"))).status == 200
        assert (await stack.ask(operator(b"POST", b"/reload"))).status == 200
    assert stack.counted("rate_limited") == 2


@scenario(KEYS=f"alice:{KEY.decode()}:1\n", MAX_CONCURRENT_REQUESTS="1", MAX_QUEUE_SIZE="1", QUEUE_TIMEOUT="5")
async def test_quota_of_a_request_refused_for_load_is_refunded(stack: Stack) -> None:
    stack.app.queue.acquire("another")
    client = await stack.client()
    client.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(5)
    refused = await client.response()
    assert (refused.code, refused.field(b"x-ratelimit-remaining-requests")) == ("queue_timeout", b"1")
    assert refused.field(b"x-ratelimit-reset-requests") == b"0ms"
    client.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    stack.app.queue.resize(2)
    assert (await client.response()).status == 200
    client.send(post())
    assert (await client.response()).code == "rate_limit_exceeded"
    stack.app.queue.release("another")


def assert_midnight(response: Response) -> None:
    """The request may be repeated once a day begins, in UTC; another one may have begun since the response."""
    after_s = (int(response.field(b"retry-after")) + time.time()) % 86400
    assert min(after_s, 86400 - after_s) < 60


@scenario(KEYS=f"alice:{KEY.decode()}:100 tokens_per_day=30\n")
async def test_tokens_per_day(stack: Stack) -> None:
    body = b'{"usage": {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}}'
    for _ in range(2):
        stack.backend.script(send(answer(body)))
        assert (await stack.ask(post())).status == 200
    response = await stack.ask(post())
    assert (response.status, response.code) == (429, "token_quota_exceeded")
    assert b"limited to 30 tokens a day" in response.body
    assert_midnight(response)
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert stack.counted("rate_limited") == 1


@scenario(KEYS=f"alice:{KEY.decode()}:2\n")
async def test_a_cached_head_does_not_skip_the_checks_of_its_key(stack: Stack) -> None:
    client = await stack.client()
    for remaining in (b"1", b"0"):
        client.send(post())
        assert (await client.response()).field(b"x-ratelimit-remaining-requests") == remaining
    client.send(post())
    assert (await client.response()).code == "rate_limit_exceeded"
    stack.keys_file.write_text(f"bob:{OTHER_KEY.decode()}\n")
    await stack.app.reload()
    client.send(post())
    assert (await client.response()).code == "invalid_api_key"


# --- Reload ---


@scenario()
async def test_reload_takes_effect_on_open_connections(stack: Stack) -> None:
    client = await stack.client()
    client.send(post())
    assert (await client.response()).status == 200
    stack.keys_file.write_text(f"new:{NEW_KEY.decode()}\nolga:{OPERATOR_KEY.decode()} role=operator\nbad line\n")
    response = await stack.ask(operator(b"POST", b"/reload"))
    assert (response.status, response.json["keys"], len(response.json["complaints"])) == (200, 2, 1)
    client.send(post() + post(key=NEW_KEY))
    assert [(await client.response()).status for _ in range(2)] == [401, 200]


@scenario()
async def test_a_missing_keys_file_keeps_the_last_good_keys(stack: Stack) -> None:
    stack.keys_file.unlink()
    response = await stack.ask(operator(b"POST", b"/reload"))
    assert (response.status, response.code) == (500, "reload_failed")
    assert (await stack.ask(post())).status == 200
    page = (await stack.ask(get(b"/metrics"))).body
    assert b'gateway_keys_reload_total{result="failed"} 1' in page
    assert any("the last good keys stay (3)" in line for line in stack.logged())


@scenario(KEYS_WATCH_SECONDS="0.02")
async def test_a_change_of_the_keys_file_is_noticed(stack: Stack) -> None:
    stack.keys_file.write_text(f"new:{NEW_KEY.decode()}\n")
    while (await stack.ask(post(key=NEW_KEY))).status != 200:  # bounded by the time limit of a scenario
        pass
    assert await statuses(stack, post(key=NEW_KEY), post()) == [200, 401]


# --- What web pages see ---


@scenario(CORS_ORIGINS="https://app.example", KEYS=f"alice:{KEY.decode()}:1\n")
async def test_refusals_have_cors_fields_and_a_request_id(stack: Stack) -> None:
    asked = [
        post(CHAT, b"{}", ORIGIN, key=None),
        post(CHAT, b"{}", ORIGIN),
        post(CHAT, b"{}", ORIGIN),
        get(b"/x", ORIGIN),
    ]
    for raw, status in zip(asked, (401, 200, 429, 404), strict=True):
        response = await stack.ask(raw)
        assert (response.status, response.field(b"access-control-allow-origin")) == (status, b"https://app.example")
        assert b"retry-after" in response.field(b"access-control-expose-headers")
        assert response.field(b"x-request-id")
    client = await stack.client()
    client.send(b"BROKEN\r\n\r\n")
    response = await client.response()
    assert (response.status, response.field(b"vary")) == (400, b"Origin")
    assert (await stack.ask(get(b"/ping", b"Origin: https://evil.example"))).field(
        b"access-control-allow-origin"
    ) is None


@scenario(CORS_ORIGINS="*")
async def test_a_preflight_allows_the_fields_that_it_asks_for(stack: Stack) -> None:
    wanted = b"x-stainless-os,x-api-key, anthropic-version"
    asked = [b"Access-Control-Request-Method: POST", b"Access-Control-Request-Headers: " + wanted]
    response = await stack.ask(request(b"OPTIONS", CHAT, None, ORIGIN, *asked, key=None))
    assert (response.status, response.field(b"access-control-allow-headers")) == (204, wanted)
    assert response.field(b"access-control-allow-methods") == b"POST"
    assert response.field(b"access-control-allow-origin") == b"*"
    asked[1] = b'Access-Control-Request-Headers: x-ok, "evil\x80'
    response = await stack.ask(request(b"OPTIONS", CHAT, None, ORIGIN, *asked, key=None))
    assert response.field(b"access-control-allow-headers") is None
    assert not stack.backend.connections


# --- Envelopes ---


@scenario()
async def test_errors_have_a_body_and_a_code_that_is_a_string(stack: Stack) -> None:
    stack.backend.script(stall())
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    stack.advance(600)
    for response in (await client.response(), await stack.ask(post(key=None)), await stack.ask(get(b"/nowhere"))):
        error = response.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str)
        assert response.field(b"content-type") == b"application/json"
        assert response.field(b"date").endswith(b"GMT")


@scenario()
async def test_anthropic_routes_have_anthropics_envelope(stack: Stack) -> None:
    response = await stack.ask(post(b"/v1/messages", b"{}", key=None))
    assert response.json == {
        "type": "error",
        "error": {"message": INVALID_API_KEY.message, "type": "authentication_error"},
        "request_id": response.field(b"request-id").decode(),
    }


@scenario()
async def test_the_status_that_was_sent_is_logged_and_counted(stack: Stack) -> None:
    stack.backend.script(send(answer(HELLO, b"500 Internal Server Error")))
    asked = [post(CHAT + b"?secret=1"), post(key=None), get(b"/nowhere?secret=1"), get(b"/ping")]
    assert await statuses(stack, *asked) == [500, 401, 404, 200]
    page = (await stack.ask(get(b"/metrics", key=None))).body
    for series in (b'"/v1/chat/completions",code="500"', b'"/v1/chat/completions",code="401"', b'"unknown",code="404"'):
        assert b"gateway_requests_total{route=" + series + b"} 1" in page
    await stack.stop()
    assert [(line["status"], line["backend_status"], line["outcome"]) for line in stack.lines[:3]] == [
        (500, 500, "done"),
        (401, 0, "refused"),
        (404, 0, "refused"),
    ]
    assert "secret" not in stack.access_file.read_text()
