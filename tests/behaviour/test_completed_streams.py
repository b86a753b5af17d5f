"""A client that leaves after a stream's last event was served whole; one that leaves before was not."""

import pytest

from support.backend import STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, OTHER_KEY, Stack, post, scenario, until
from support.paths import TESTS
from support.rawclient import RawClient

MESSAGES, RESPONSES, NATIVE = b"/v1/messages", b"/v1/responses", b"/completion"
BODY = b'{"stream": true}'
ANSWERS = {
    CHAT: "chat.sse",
    b"/v1/completions": "completions.sse",
    RESPONSES: "responses.sse",
    MESSAGES: "messages.sse",
    NATIVE: "completion.sse",
}
WAYS = {"fin": RawClient.close, "reset": RawClient.reset, "half-close": RawClient.half_close}
# With one slot: whether it was released at once shows in whether the next request is served.
SLOT = {"MAX_CONCURRENT_REQUESTS": "1"}


def recorded(target: bytes) -> bytes:
    return (TESTS / "answers" / ANSWERS[target]).read_bytes()


async def leave(stack: Stack, client: RawClient, way: str = "fin") -> None:
    WAYS[way](client)
    await until(lambda: not stack.clients, "the connection is gone")


async def outcome(stack: Stack) -> tuple[str, str, int]:
    await stack.stop()
    (line,) = (line for line in stack.lines if line["id"] == "t-1")
    return line["outcome"], line["stage"], line["status"]


async def streaming(stack: Stack, target: bytes, sent: bytes, minor: int = 1) -> RawClient:
    """A client that has received `sent`, of an answer whose end never comes."""
    stack.backend.script(send(STREAM_HEAD + sent), stall())
    client = await stack.client()
    client.send(post(target, BODY, b"X-Request-Id: t-1", minor=minor))
    return client


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", ANSWERS)
@scenario(**SLOT)
async def test_a_client_that_leaves_after_the_last_event_was_served_whole(
    stack: Stack, target: bytes, way: str
) -> None:
    events = recorded(target)
    client = await streaming(stack, target, chunk(events))
    await client.take_through(chunk(events))
    await leave(stack, client, way)
    assert stack.app.queue.active == 0  # /slots was not asked first
    assert b"/slots" not in stack.backend.probes
    assert stack.counted("cancelled", "streaming") == 0
    assert await outcome(stack) == ("done", "done", 200)
    assert stack.lines[0]["completion_tokens"] == 6


@pytest.mark.parametrize("target", ANSWERS)
@scenario()
async def test_a_client_that_leaves_before_the_last_event_has_cancelled(stack: Stack, target: bytes) -> None:
    last = recorded(target).rstrip().rpartition(b"\n\n")
    client = await streaming(stack, target, chunk(last[0] + last[1]))
    await client.take_through(chunk(last[0] + last[1]))
    await leave(stack, client)
    await until(lambda: stack.counted("cancelled", "streaming") == 1)
    assert await outcome(stack) == ("cancelled", "streaming", 200)


@pytest.mark.parametrize("piece", [1, 5])
@pytest.mark.parametrize("target", [CHAT, RESPONSES, MESSAGES])
@scenario()
async def test_the_last_event_is_seen_however_it_is_torn(stack: Stack, target: bytes, piece: int) -> None:
    events = recorded(target)[-200:]
    events = events[events.index(b"\n\n") + 2 :] if target != RESPONSES else b"event: response.completed\ndata: {}\n\n"
    chunks = b"".join(chunk(events[start : start + piece]) for start in range(0, len(events), piece))
    client = await streaming(stack, target, chunk(event("{}")) + chunks)
    await client.take_through(chunks)
    await leave(stack, client)
    assert (await outcome(stack))[0] == "done"


@scenario()
async def test_a_long_last_event_is_known_by_its_beginning(stack: Stack) -> None:
    last = b'event: response.completed\ndata: {"response":{"x":"%b"}}\n\n' % (b"x" * 300_000)
    client = await streaming(stack, RESPONSES, chunk(last))
    await client.take_through(chunk(last))
    await leave(stack, client)
    assert (await outcome(stack))[0] == "done"


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (CHAT, b'data: {"error":{"code":500,"message":"x","type":"server_error"}}\n\n'),
        (MESSAGES, b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"x"}}\n\n'),
    ],
)
@scenario()
async def test_the_backends_error_is_a_last_event(stack: Stack, target: bytes, error: bytes) -> None:
    client = await streaming(stack, target, chunk(error))
    await client.take_through(chunk(error))
    await leave(stack, client)
    assert (await outcome(stack))[0] == "done"


@scenario()
async def test_a_client_of_http_1_0_that_leaves_after_the_last_event(stack: Stack) -> None:
    client = await streaming(stack, CHAT, chunk(recorded(CHAT)), minor=0)
    await client.take_through(recorded(CHAT))
    await leave(stack, client)
    assert (await outcome(stack))[0] == "done"


@scenario()
async def test_text_that_looks_like_the_last_event_is_none(stack: Stack) -> None:
    sent = chunk(event('{"choices":[{"delta":{"content":"data: [DONE]\\n\\n"}}]}'))
    client = await streaming(stack, CHAT, sent)
    await client.take_through(sent)
    await leave(stack, client)
    assert (await outcome(stack))[0] == "cancelled"


@scenario()
async def test_a_client_that_has_not_taken_the_last_event_has_cancelled(stack: Stack) -> None:
    filler = chunk(b"data: " + b"x" * 60_000 + b"\n\n")
    stack.backend.script(send(STREAM_HEAD + filler * 100 + chunk(b"data: [DONE]\n\n")), stall())
    client = await stack.client(receive_buffer=4096)
    client.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(post(CHAT, BODY, b"X-Request-Id: t-1"))
    await until(lambda: stack.clients and stack.clients[0].write_paused, "the client takes nothing")
    client.reset()
    await until(lambda: not stack.clients, "the connection is gone")
    assert (await outcome(stack))[0] == "cancelled"


@scenario(**SLOT)
async def test_the_next_request_gets_the_slot_at_once(stack: Stack) -> None:
    client = await streaming(stack, CHAT, chunk(recorded(CHAT)))
    await client.take_through(chunk(recorded(CHAT)))
    stack.backend.script(send(answer()))
    other = await stack.client()
    other.send(post(key=OTHER_KEY))
    await until(lambda: stack.app.queue.queued == 1)
    client.close()
    assert (await other.response()).status == 200
    assert b"/slots" not in stack.backend.probes
