"""What a client of a key with limits on tokens sees, and that no way of asking hides what was used."""

import json
import socket
import time
from datetime import datetime, timezone
from typing import Any

import pytest

from accounting.token_estimates import OVERRUN_TOKENS
from support.backend import LAST_CHUNK, STREAM_HEAD, Call, Step, answer, chunk, event, send, stall
from support.gateway import CHAT, KEY, OPERATOR_KEY, Stack, get, post, scenario, until
from support.rawclient import RawClient

COMPLETIONS, NATIVE, RESPONSES, MESSAGES = b"/v1/completions", b"/completion", b"/v1/responses", b"/v1/messages"
LIMIT, REMAINING, RESET = (b"x-ratelimit-%b-tokens" % name for name in (b"limit", b"remaining", b"reset"))


def keys(options: str) -> str:
    return f"alice:{KEY.decode()}:1000000 {options}\n"


def used(prompt: int, completion: int) -> bytes:
    """Return a response that reports these tokens."""
    return answer(b'{"usage":{"prompt_tokens":%d,"completion_tokens":%d}}' % (prompt, completion))


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


# --- max_tokens ---


@pytest.mark.parametrize(
    ("target", "sent", "received"),
    [
        (CHAT, b'{"messages": []}', b'{"messages": [],"max_tokens":50}'),
        (CHAT, b'{"max_tokens": 50}', b'{"max_tokens": 50}'),
        (CHAT, b'{"max_tokens": null}', b'{"max_tokens": null,"max_tokens":50}'),
        (CHAT, b'{"n_predict": -1}', b'{"n_predict": -1,"n_predict":50}'),
        (NATIVE, b"{}", b'{"n_predict":50}'),
        (RESPONSES, b'{"input":"}"} ', b'{"input":"}","max_output_tokens":50} '),
        (MESSAGES, b'{"n_predict":3}', b'{"n_predict":3,"max_tokens":50}'),
        (b"/v1/embeddings", b'{"input":"a"}', b'{"input":"a"}'),
        (CHAT, b"no json", b"no json"),
        (CHAT, b"[1]", b"[1]"),
        (CHAT, b'{"max_tokens": "9"}', b'{"max_tokens": "9"}'),
    ],
)
@scenario(KEYS=keys("max_tokens=50"))
async def test_the_limit_of_a_key_is_added_to_a_body_without_one(
    stack: Stack, target: bytes, sent: bytes, received: bytes
) -> None:
    assert (await stack.ask(post(target, sent))).status == 200
    assert stack.backend.calls[0].body == received
    assert stack.backend.calls[0].fields[b"content-length"] == b"%d" % len(received)


@scenario(KEYS=keys("max_tokens=50"))
async def test_a_request_for_more_is_refused_in_a_sentence_and_its_connection_stays(stack: Stack) -> None:
    client = await stack.client()
    client.send(post(CHAT, body(max_tokens=51)))
    response = await client.response()
    assert (response.status, response.code) == (400, "too_many_tokens_asked")
    assert response.json["error"]["message"] == (
        "This request asks for 51 tokens (max_tokens), but for this API key at most 50 are allowed."
    )
    client.send(post(CHAT, body(max_tokens=50)))
    assert (await client.response()).status == 200
    assert stack.app.queue.active == 0


@scenario(KEYS=keys("max_tokens=50"))
async def test_the_limit_is_added_to_a_large_chunked_body(stack: Stack) -> None:
    client = await stack.client()
    text = b'{"prompt":"' + b"x" * 100_000
    client.send(post(COMPLETIONS, b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""))
    client.send(chunk(text) + chunk(b'"}') + LAST_CHUNK)
    assert (await client.response()).status == 200
    assert stack.backend.calls[0].body == text + b'","max_tokens":50}'


# --- tokens_per_minute ---


@scenario(KEYS=keys("tokens_per_minute=1000"))
async def test_answers_report_what_is_left_of_the_minute(stack: Stack) -> None:
    stack.backend.script(send(used(20, 30)))
    response = await stack.ask(post(CHAT, body(max_tokens=500)))
    assert [response.field(name) for name in (LIMIT, REMAINING, RESET)] == [b"1000", b"494", b"1m0s"]
    stack.backend.script(send(used(20, 30)))
    response = await stack.ask(post(CHAT, body(max_tokens=500)))
    assert int(response.field(REMAINING)) in range(400, 445)  # the first one counts with 50 now


@scenario(KEYS=keys("tokens_per_minute=1000"), MAX_CONCURRENT_REQUESTS="1")
async def test_a_request_that_has_waited_is_refused_if_the_others_have_used_up_the_minute(stack: Stack) -> None:
    """What a request reserves for its prompt is only an estimate."""
    stack.backend.script(stall(stack.finish), send(used(900, 200)))
    first, second = [await stack.client() for _ in range(2)]
    first.send(post(CHAT, body(max_tokens=200)))
    await stack.backend.call()
    second.send(post(CHAT, body(max_tokens=200)))
    await until(lambda: stack.app.numbers.queued == 1)
    stack.finish.set()
    assert (await first.response()).status == 200
    response = await second.response()
    assert (response.status, response.code) == (429, "token_rate_exceeded")
    assert len(stack.backend.calls) == 1


@scenario(KEYS=keys("tokens_per_minute=1000"))
async def test_the_retry_after_of_a_used_up_minute_is_exact(stack: Stack) -> None:
    stack.backend.script(send(used(100, 800)))
    assert (await stack.ask(post(CHAT, body(max_tokens=800)))).status == 200
    stack.advance(0.25)  # it is charged
    stack.advance(11.75)
    response = await stack.ask(post(CHAT, body(max_tokens=500)))
    assert (response.status, response.code) == (429, "token_rate_exceeded")
    assert response.field(b"x-should-retry") is None
    assert [response.field(name) for name in (LIMIT, REMAINING, RESET)] == [b"1000", b"100", b"49s"]
    retry_s = int(response.field(b"retry-after"))
    assert retry_s == 49  # 48.25 s
    stack.advance(retry_s - 1)
    assert (await stack.ask(post(CHAT, body(max_tokens=500)))).status == 429
    stack.advance(1)
    assert (await stack.ask(post(CHAT, body(max_tokens=500)))).status == 200
    assert stack.counted("rate_limited") == 2


@scenario(KEYS=keys("tokens_per_minute=1000"))
async def test_requests_at_once_reserve_before_they_run(stack: Stack) -> None:
    clients = [await stack.client() for _ in range(5)]
    for client in clients:
        stack.backend.script(stall(stack.finish), send(used(10, 400)))
        client.send(post(CHAT, body(max_tokens=400)))
    await until(lambda: len(stack.backend.calls) == 2)
    stack.finish.set()
    assert sorted([(await client.response()).status for client in clients]) == [200, 200, 429, 429, 429]


@scenario(KEYS=keys("tokens_per_minute=1000"), MAX_CONCURRENT_REQUESTS="1", QUEUE_TIMEOUT="5")
async def test_what_the_gateway_refuses_reserves_nothing(stack: Stack) -> None:
    stack.app.queue.acquire("another")
    client = await stack.client()
    client.send(post(CHAT, body(max_tokens=900)))
    await until(lambda: stack.app.queue.queued == 1)
    stack.advance(5)
    assert (await client.response()).code == "queue_timeout"
    stack.app.queue.release("another")
    assert (await stack.ask(post(CHAT, body(max_tokens=900)))).status == 200


@scenario(KEYS=keys("tokens_per_minute=1000"), MAX_CONCURRENT_REQUESTS="1")
async def test_a_client_that_leaves_the_queue_returns_what_it_reserved(stack: Stack) -> None:
    stack.app.queue.acquire("another")
    client = await stack.client()
    client.send(post(CHAT, body(max_tokens=900)))
    await until(lambda: stack.app.queue.queued == 1)
    client.close()
    await until(lambda: stack.app.queue.queued == 0)
    stack.app.queue.release("another")
    assert (await stack.ask(post(CHAT, body(max_tokens=900)))).status == 200


# --- tokens_per_month, tokens_per_day ---


@scenario(KEYS=keys("tokens_per_month=30"))
async def test_tokens_per_month(stack: Stack) -> None:
    for _ in range(2):
        stack.backend.script(send(used(10, 10)))
        assert (await stack.ask(post())).status == 200
    response = await stack.ask(post())
    assert (response.status, response.code) == (429, "token_quota_exceeded")
    assert b"limited to 30 tokens a month" in response.body
    first = datetime.fromtimestamp(time.time() + int(response.field(b"retry-after")) + 60, timezone.utc)
    assert (first.day, first.hour) == (1, 0)
    assert response.field(b"x-should-retry") == b"false"


@scenario(KEYS=keys("tokens_per_day=1000"), MAX_CONCURRENT_REQUESTS="4")
async def test_the_quota_is_looked_at_again_when_the_slot_is_given(stack: Stack) -> None:
    clients = [await stack.client() for _ in range(10)]
    for client in clients:
        stack.backend.script(send(used(2, 600)))
        client.send(post(CHAT, body(max_tokens=600)))
    statuses = [(await client.response()).status for client in clients]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 5  # 1000 tokens, and what the four slots had been given before
    assert stack.app.queue.active == stack.app.queue.queued == 0


@scenario(KEYS=keys("tokens_per_day=100"))
async def test_a_response_without_its_report_is_charged(stack: Stack) -> None:
    stack.backend.script(send(answer(body(content="x" * 600))))
    assert (await stack.ask(post(NATIVE, body(prompt="a", response_fields=["content"])))).status == 200
    assert (await stack.ask(post())).code == "token_quota_exceeded"
    await stack.stop()
    line = stack.lines[0]
    assert line["estimated_tokens"] == line["prompt_tokens"] + line["completion_tokens"] > 200


@scenario(KEYS=keys(""))
async def test_of_a_request_for_a_response_without_its_report_the_limit_on_tokens_is_known(stack: Stack) -> None:
    """Also of a key without a limit on tokens: what is charged at most follows from it."""
    stack.backend.script(send(answer(body(model="m"))))
    assert (await stack.ask(post(NATIVE, body(prompt="a", n_predict=7, response_fields=["model"])))).status == 200
    await stack.stop()
    assert stack.lines[0]["completion_tokens"] == 7


@pytest.mark.parametrize("streamed", [True, False])
@scenario(KEYS=keys("tokens_per_day=100"))
async def test_a_client_that_leaves_is_charged(stack: Stack, streamed: bool) -> None:
    begun = [send(STREAM_HEAD + chunk(event('{"choices":[{"delta":{"role":"assistant"}}]}')))] if streamed else []
    stack.backend.script(*begun, stall())
    client = await stack.client()
    client.send(post(CHAT, body(messages="x" * 400, stream=streamed)))
    await stack.backend.call()
    await until(
        lambda: stack.requests and stack.requests[0].stage == ("streaming" if streamed else "awaiting_response")
    )
    client.close()
    await until(lambda: not stack.requests and not len(stack.app.reclaimer))
    assert (await stack.ask(post())).code == "token_quota_exceeded"
    await stack.stop()
    assert (stack.lines[0]["outcome"], stack.lines[0]["estimated_tokens"] > 100) == ("cancelled", True)


CONTENT = chunk(event('{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"x"}}]}'))


async def left_stream(stack: Stack, *rest: Step) -> RawClient:
    """A client that reads nothing leaves a stream that has begun, and of which more is to come."""
    stack.backend.script(send(STREAM_HEAD + CONTENT), *(rest or [stall()]))
    client = await stack.client(receive_buffer=4096)
    (connection,) = stack.clients
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.send(post(COMPLETIONS, body(prompt="a", stream=True)))
    await until(lambda: stack.requests and stack.requests[0].stage == "streaming")
    client.transport.pause_reading()
    return client


async def completion_tokens(stack: Stack) -> int:
    await until(lambda: stack.counted("cancelled", "streaming") == 1)
    await stack.stop()
    assert stack.lines[0]["estimated_tokens"] == stack.lines[0]["prompt_tokens"] + stack.lines[0]["completion_tokens"]
    return int(stack.lines[0]["completion_tokens"])


@scenario()
async def test_what_a_client_had_not_read_when_it_left_is_charged(stack: Stack) -> None:
    """More than the gateway holds for a client: the rest is in the sockets between backend and gateway."""
    client = await left_stream(stack, send(CONTENT * 9000, 1 << 20), stall())
    await until(lambda: any(each.write_paused for each in stack.clients))
    client.close()
    assert await completion_tokens(stack) in range(9001, 9001 + OVERRUN_TOKENS + 1)


@scenario()
async def test_what_comes_after_the_client_has_left_is_charged(stack: Stack) -> None:
    """llama-server notices the end at its next token, and what it was sending then still arrives."""

    async def last_tokens(call: Call) -> None:
        await call.gone.wait()
        call.connection.transport.write(CONTENT * 5)
        call.connection.transport.close()

    client = await left_stream(stack, last_tokens)
    stack.backend.calls[0].connection.stays = True
    client.close()
    assert await completion_tokens(stack) == 6 + OVERRUN_TOKENS


@scenario()
async def test_a_backend_that_does_not_notice_is_waited_for_as_long_as_a_request_may_take(stack: Stack) -> None:
    client = await left_stream(stack)
    connection = stack.backend.calls[0].connection
    connection.stays = True
    client.close()
    await connection.gone.wait()
    stack.advance(599)
    assert stack.counted("cancelled", "streaming") == 0
    stack.advance(1)
    await until(lambda: stack.counted("cancelled", "streaming") == 1)
    connection.transport.abort()  # it reads no more, and so does not see that the gateway has closed
    assert await completion_tokens(stack) == 1 + OVERRUN_TOKENS


@scenario()
async def test_a_whole_answer_that_comes_after_its_client_has_left_is_charged_as_it_reports(stack: Stack) -> None:
    """A busy llama-server does not notice that the client has left, and what /slots shows may say nothing."""

    async def answer_late(call: Call) -> None:
        await call.gone.wait()
        call.connection.transport.write(late)
        call.connection.transport.close()

    timings = {"cache_n": 3, "prompt_n": 7, "prompt_ms": 1.0, "prompt_per_token_ms": 0.1, "prompt_per_second": 9.0}
    timings |= {"predicted_n": 1500, "predicted_ms": 9.0, "predicted_per_token_ms": 0.1, "predicted_per_second": 9.0}
    text = json.dumps({"content": "x" * 9000, "timings": timings}, separators=(",", ":")).encode()
    late = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
    stack.backend.script(answer_late)
    client = await stack.client()
    client.send(post(COMPLETIONS, body(prompt="a")))
    call = await stack.backend.call()
    call.connection.stays = True
    client.close()
    await until(lambda: stack.counted("cancelled", "awaiting_response") == 1)
    await stack.stop()
    line = stack.lines[0]
    assert (line["prompt_tokens"], line["completion_tokens"], line["estimated_tokens"]) == (10, 1500, 0)


@scenario()
async def test_a_stream_that_was_left_is_charged_no_more_than_it_asked_for(stack: Stack) -> None:
    """No key's limit made the gateway read the body, and the slots show nothing: its time is that of 40,000 tokens."""
    timings = b'{"timings":{"cache_n":3,"prompt_n":7,"prompt_ms":1.0,"predicted_n":200,"predicted_ms":1000.0}}'
    stack.backend.script(send(answer(timings)))
    assert (await stack.ask(post(body=body()))).status == 200
    stack.backend.script(send(STREAM_HEAD + CONTENT), stall())
    client = await stack.client()
    client.send(post(COMPLETIONS, body(prompt="a", stream=True, max_tokens=7)))
    await until(lambda: stack.requests and stack.requests[0].stage == "streaming")
    stack.advance(200)
    client.close()
    await until(lambda: stack.counted("cancelled", "streaming") == 1)
    await stack.stop()
    assert stack.lines[-1]["completion_tokens"] == 7


@scenario()
async def test_garbage_after_the_client_has_left_ends_the_count(stack: Stack) -> None:
    async def garbage(call: Call) -> None:
        await call.gone.wait()
        call.connection.transport.write(CONTENT + b"no chunk\r\n")
        await until(lambda: stack.counted("cancelled", "streaming") == 1)
        call.connection.transport.abort()

    client = await left_stream(stack, garbage)
    stack.backend.calls[0].connection.stays = True
    client.close()
    assert await completion_tokens(stack) in (1 + OVERRUN_TOKENS, 2 + OVERRUN_TOKENS)


# --- Own use ---


@scenario(KEYS=keys("tokens_per_day=1000 max_tokens=50") + f"olga:{OPERATOR_KEY.decode()}:9 role=operator\n")
async def test_any_key_sees_its_own_use_and_an_operator_all(stack: Stack) -> None:
    stack.backend.script(send(used(10, 20)))
    assert (await stack.ask(post())).status == 200
    own = (await stack.ask(get(b"/usage"))).json
    assert [(row["key_id"], row["prompt"], row["completion"]) for row in own["rows"]] == [("alice", 10, 20)]
    (limits,) = own["keys"]
    assert (limits["key_id"], limits["max_tokens"]) == ("alice", 50)
    assert (limits["tokens_per_day"]["used"], limits["tokens_per_day"]["left"]) == (30, 970)
    assert 0 < limits["tokens_per_day"]["resets_in_s"] <= 86400
    assert limits["requests_per_minute"]["used"] == 1
    response = await stack.ask(get(b"/usage?key=olga"))
    assert (response.status, response.code) == (403, "route_not_allowed")
    all_keys = (await stack.ask(get(b"/usage", key=OPERATOR_KEY))).json
    assert [limits["key_id"] for limits in all_keys["keys"]] == ["alice", "olga"]
    one = (await stack.ask(get(b"/usage?key=alice&by=day", key=OPERATOR_KEY))).json
    assert ([row["prompt"] for row in one["rows"]], len(one["keys"])) == ([10], 1)
    assert (await stack.ask(get(b"/usage", key=None))).status == 401
