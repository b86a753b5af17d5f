"""The gateway's own endpoints: the figures of /health, metrics and usage."""

import asyncio
import re
import time
from dataclasses import replace

import pytest

from core.health_token import health_token
from policy.prepared_request import PreparedRequest
from support.backend import STREAM_HEAD, answer, chunk, event, reset, send, stall
from support.gateway import BACKEND_KEY, CHAT, KEY, OPERATOR_KEY, OTHER_KEY, Stack, get, post, request, scenario, until

HEALTH = (b"/health", b"/v1/health")
TIMED = b'{"timings": {"cache_n": 3, "prompt_n": 4, "prompt_ms": 2.0, "predicted_n": 5, "predicted_ms": 1000.0}}'


def operator(target: bytes, *fields: bytes) -> bytes:
    return get(target, *fields, key=OPERATOR_KEY)


async def page(stack: Stack, key: bytes | None = None) -> dict[str, float]:
    """Return the metrics by the names of their series."""
    text = (await stack.ask(get(b"/metrics", key=key))).body.decode()
    series = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in series}


# --- Health ---


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_health_reports_what_the_supervisor_needs(stack: Stack) -> None:
    stack.advance(10)
    assert (await stack.ask(post())).status == 200
    stack.advance(30)
    idle = (await stack.ask(get(b"/health"))).json
    assert (idle["state"], idle["active"], idle["queued"], idle["slots"], idle["connections"]) == ("ready", 0, 0, 1, 1)
    assert (idle["idle_s"], idle["uptime_s"]) == (30, 40)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", idle["since"])
    stack.backend.script(send(STREAM_HEAD), stall(stack.finish), send(chunk(event("1"))), stall())
    clients = [await stack.client(), await stack.client()]
    for client in clients:
        client.send(post())
    await clients[0].take_through(b"\r\n\r\n")
    await until(lambda: stack.app.queue.queued == 1)
    await stack.ask(get(b"/health", key=None))
    stack.advance(40)
    busy = (await stack.ask(get(b"/health"))).json
    assert (busy["active"], busy["queued"], busy["connections"]) == (1, 1, 3)
    assert (busy["idle_s"], busy["backend_silent_s"]) == (0, 40)
    stack.advance(40)
    stack.finish.set()
    await clients[0].take_through(event("1"))
    assert (await stack.ask(get(b"/health"))).json["backend_silent_s"] == 0


@scenario(STATE="loading")
async def test_idle_time_begins_with_readiness(stack: Stack) -> None:
    stack.advance(500)
    await stack.turn("ready")
    stack.advance(10)
    assert (await stack.ask(get(b"/health"))).json["idle_s"] == 10


@scenario()
async def test_strangers_are_not_told_when_a_request_came_or_ended(stack: Stack) -> None:
    token = health_token(BACKEND_KEY).encode()
    times = {"idle_s", "backend_silent_s", "blamed", "unanswered_bytes"}
    known = [(await stack.ask(get(path, key=key))).json for key in (KEY, token) for path in HEALTH]
    strangers = [
        (await stack.ask(get(path, key=key))).json for key in (None, b"sk-wrong-0123456789abcdef") for path in HEALTH
    ]
    assert [report.keys() & times for report in known] == [times] * 4
    assert [report.keys() for report in strangers] == [known[0].keys() - times] * 4


@scenario(BACKEND_API_KEY="unset")
async def test_without_a_supervisor_nothing_but_a_key_is_a_credential(stack: Stack) -> None:
    for key in (None, b"sk-wrong-0123456789abcdef"):
        assert "idle_s" not in (await stack.ask(get(b"/health", key=key))).json
    assert "idle_s" in (await stack.ask(get(b"/health"))).json


@scenario(AUTH_ENABLED="false")
async def test_without_authentication_health_reports_all(stack: Stack) -> None:
    assert "idle_s" in (await stack.ask(get(b"/health", key=None))).json


# --- Metrics ---


def families(page: bytes) -> set[bytes]:
    return {line.split()[2] for line in page.splitlines() if line.startswith(b"# TYPE ")}


@scenario(METRICS_AUTH_ENABLED="unset")
async def test_without_a_key_metrics_show_the_state_and_no_requests(stack: Stack) -> None:
    """The difference between two pages of a quiet machine is one request: nothing that counts requests is on them."""
    await stack.ask(post())
    for key in (None, b"sk-wrong-0123456789abcdef"):
        public = await stack.ask(get(b"/metrics", key=key))
        assert public.status == 200
        assert b"gateway_backend_up 1" in public.body
        assert not re.search(rb"_total|_bucket|_sum|_count", public.body)
    whole = families((await stack.ask(get(b"/metrics"))).body)
    assert families(public.body) < whole
    assert {b"gateway_requests_total", b"gateway_tokens_total", b"gateway_request_duration_seconds"} <= whole
    head = await stack.ask(request(b"HEAD", b"/metrics", None, key=None))
    assert (head.status, head.body) == (200, b"")


@scenario(METRICS_AUTH_ENABLED="unset", METRICS_BACKEND_SECONDS="1")
async def test_without_a_key_the_backend_is_not_scraped(stack: Stack) -> None:
    """Each scrape resets the backend's averages."""
    stack.backend.own[b"/metrics"] = answer(b"")
    await stack.ask(get(b"/metrics", key=None))
    assert b"/metrics" not in stack.backend.probes
    await stack.ask(get(b"/metrics"))
    assert b"/metrics" in stack.backend.probes


@scenario(METRICS_AUTH_ENABLED="unset", AUTH_ENABLED="false")
async def test_metrics_need_no_key_if_nothing_does(stack: Stack) -> None:
    assert (await stack.ask(get(b"/metrics", key=None))).status == 200


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_gauges_show_the_current_state(stack: Stack) -> None:
    stack.backend.script(stall())
    clients = [await stack.client() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(post())
        await until(lambda number=number: stack.app.queue.active + stack.app.queue.queued == number + 1)
    stack.advance(60)
    shown = await page(stack)
    gauges = ("requests_active", "queue_depth", "connections", "backend_up", "uptime_seconds")
    assert [shown[f"gateway_{name}"] for name in gauges] == [1, 2, 4, 1, 60]
    await stack.turn("loading")
    assert (await page(stack))["gateway_backend_up"] == 0


@scenario()
async def test_histograms_and_tokens(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer(TIMED)))
    client = await stack.client()
    client.send(post())
    await stack.backend.call()
    stack.advance(2)
    stack.finish.set()
    await client.response()
    shown = await page(stack)
    kinds = {kind: shown[f'gateway_tokens_total{{type="{kind}"}}'] for kind in ("prompt", "cached", "completion")}
    assert kinds == {"prompt": 7, "cached": 3, "completion": 5}
    for name in ("request_duration_seconds", "time_to_first_byte_seconds"):
        assert (shown[f"gateway_{name}_sum"], shown[f"gateway_{name}_count"]) == (2, 1)
    assert shown["gateway_generation_tokens_per_second_sum"] == 5
    assert shown["gateway_prompt_tokens_per_second_sum"] == 2000


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_the_time_in_the_queue_is_measured(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    clients = [await stack.client(), await stack.client()]
    for number, client in enumerate(clients):
        client.send(post(CHAT, b"{}", b"X-Request-Id: r-%d" % number))
        await until(lambda number=number: stack.app.queue.queued == number)
    await stack.backend.call()
    stack.advance(3)
    stack.finish.set()
    for client in clients:
        await client.response()
    shown = await page(stack)
    assert (shown["gateway_queue_wait_seconds_sum"], shown["gateway_queue_wait_seconds_count"]) == (3, 2)
    await stack.stop()
    times = {line["id"]: (line["queue_ms"], line["first_byte_ms"], line["total_ms"]) for line in stack.lines}
    assert (times["r-0"], times["r-1"]) == ((0, 3000, 3000), (3000, 3000, 3000))


@scenario()
async def test_sent_bytes_are_counted_exactly(stack: Stack) -> None:
    client = await stack.client()
    for raw in (post(), get(b"/nowhere"), get(b"/ping")):
        client.send(raw)
        await client.response()
    sent = client.total
    assert (await page(stack))["gateway_bytes_sent_total"] == sent


@scenario()
async def test_only_operators_see_the_names_of_keys(stack: Stack) -> None:
    await stack.ask(post())
    await stack.ask(post(key=OTHER_KEY))
    assert not any("bob" in name for name in await page(stack))
    assert not any("bob" in name for name in await page(stack, KEY))
    assert any('"bob"' in name for name in await page(stack, OPERATOR_KEY))


@scenario(METRICS_BACKEND_SECONDS="10")
async def test_the_backends_metrics_are_requested_once_per_interval(stack: Stack) -> None:
    numbers = b"# HELP llamacpp:x A number.\n# TYPE llamacpp:x counter\nllamacpp:x 5\n"
    stack.backend.own[b"/metrics"] = answer(numbers)
    for _ in range(3):
        assert (await page(stack))["llamacpp_x"] == 5
    assert stack.backend.probes.count(b"/metrics") == 1
    stack.advance(10)
    stack.backend.own[b"/metrics"] = answer(b"", b"501 Not Implemented")
    assert "llamacpp_x" not in await page(stack)
    stack.advance(10)
    stack.backend.refuse()
    stack.app.pool.close_idle()
    assert "gateway_uptime_seconds" in await page(stack)
    assert stack.backend.probes.count(b"/metrics") == 2


# --- Requests without a valid key ---


@scenario()
async def test_requests_without_a_valid_key_are_logged_but_cannot_flood_the_log(stack: Stack) -> None:
    for _ in range(50):
        assert (await stack.ask(post(key=b"sk-nobody-0123456789abcdef"))).status == 401
    stack.app.recorder.flush()
    lines = [line for line in stack.logged() if "no valid key" in line]
    assert 1 <= len(lines) < 50
    assert "nobody" not in " ".join(lines)
    stack.advance(60)
    assert any(re.search("[0-9]+ more requests", line) for line in stack.logged())
    assert stack.counted("unauthorized") == 50


# --- Usage ---


@scenario(USAGE_FILE=lambda folder: str(folder / "usage.db"), GPU_COST_PER_HOUR="3.60")
async def test_usage_by_key_and_day(stack: Stack) -> None:
    for key in (KEY, KEY, OTHER_KEY):
        stack.backend.script(send(answer(TIMED)))
        assert (await stack.ask(post(key=key))).status == 200
    stack.backend.script(send(b"HTTP/1.1 2"), reset())
    assert (await stack.ask(post())).status == 502
    response = await stack.ask(operator(b"/usage"))
    rows = {row["key_id"]: row for row in response.json["rows"]}
    counted = ("requests", "prompt", "cached", "completion", "errors", "cancelled")
    assert [rows["alice"][name] for name in counted] == [3, 14, 6, 10, 1, 0]
    assert [rows["bob"][name] for name in counted] == [1, 7, 3, 5, 0, 0]
    assert rows["alice"]["cost"] == pytest.approx(rows["alice"]["gpu_s"] / 1000)
    assert response.field(b"cache-control") == b"no-store"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    days = (await stack.ask(operator(b"/usage?since=2d&by=day"))).json
    assert (days["since"], days["by"]) == ("2d", "day")
    assert {row["day"] for row in days["rows"]} <= {today, time.strftime("%Y-%m-%d", time.gmtime())}


@scenario()
async def test_usage_without_a_file_or_a_price(stack: Stack) -> None:
    assert (await stack.ask(post())).status == 200
    (row,) = (await stack.ask(operator(b"/usage?since=2020-01-01"))).json["rows"]
    assert (row["key_id"], row["requests"], "cost" in row) == ("alice", 1, False)


@scenario()
async def test_usage_of_a_key_that_never_was_is_a_404(stack: Stack) -> None:
    assert (await stack.ask(post())).status == 200
    stack.keys_file.write_text(f"olga:{OPERATOR_KEY.decode()} role=operator\n")
    assert (await stack.ask(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))).status == 200
    removed = await stack.ask(operator(b"/usage?key=alice"))
    assert ([row["requests"] for row in removed.json["rows"]], removed.json["keys"]) == ([1], [])
    later = await stack.ask(operator(b"/usage?key=alice&since=2999-01-01"))
    assert (later.status, later.json["rows"], later.json["keys"]) == (200, [], [])
    unknown = await stack.ask(operator(b"/usage?key=nobody"))
    assert (unknown.status, unknown.code) == (404, "key_not_found")
    assert b"nobody" not in unknown.body
    assert (await stack.ask(operator(b"/usage?key=olga"))).status == 200


@pytest.mark.parametrize("query", [b"since=yesterday", b"by=colour", b"since=2026-13-01", b"since=%ff", b"by="])
@scenario()
async def test_a_wrong_query_for_usage_is_refused(stack: Stack, query: bytes) -> None:
    response = await stack.ask(operator(b"/usage?" + query))
    if query == b"by=":  # an empty value counts as no value
        assert response.status == 200
        return
    assert (response.status, response.code) == (400, "bad_request")
    assert query.partition(b"=")[2] not in response.body


@scenario()
async def test_a_client_that_leaves_while_usage_is_read(stack: Stack) -> None:
    client = await stack.client()
    client.send(operator(b"/usage"))
    client.half_close()
    await client.until(lambda: bool(client.ended))
    await asyncio.get_running_loop().shutdown_default_executor()


@scenario()
async def test_a_bug_of_the_gateway_is_a_500_without_details(stack: Stack) -> None:
    """A bug is answered, logged with its traceback, and ends the connection."""

    class Broken:
        def authenticate(self, prepared: PreparedRequest):
            raise RuntimeError("a bug")

    services = stack.app.sessions.services
    stack.app.sessions.services = replace(services, access=Broken())
    client = await stack.client()
    client.send(post(CHAT, b"{}") + get(b"/ping"))
    response = await client.response()
    assert (response.status, response.code, response.field(b"connection")) == (500, "internal_error", b"close")
    assert response.json["error"]["message"] == "The gateway failed; the log says why."
    assert await client.take_all() == b""
    stack.app.sessions.services = services
    assert next(record.getMessage() for record in stack.log.records if record.exc_info).endswith("failed")
    stack.log.records.clear()
