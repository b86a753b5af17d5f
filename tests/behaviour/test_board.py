"""The board: what its stream says to whom, what ends it, and that it stands in nobody's way."""

import json
import re
import socket
from typing import Any

import pytest

from support.backend import LAST_CHUNK, STREAM_HEAD, chunk, event, send, stall
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
    undated,
    until,
)
from support.rawclient import RawClient

EVENTS = b"/ui/events"
TOKEN = event('{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a"}}],"object":"chat.completion.chunk"}')
OTHERS = ("bob", "olga")


class Viewer:
    """A client of the stream. `seen` is what the page would know: the members of all events."""

    def __init__(self, stack: Stack, client: RawClient) -> None:
        self._stack = stack
        self.client = client
        self.text = ""
        self.seen: dict[str, Any] = {}

    async def next(self) -> dict[str, Any]:
        """Let a second pass, and return the event that it brings."""
        self._stack.advance(1)
        return await self.take()

    async def take(self) -> dict[str, Any]:
        data = (await self.client.take_through(b"\n\n\r\n")).partition(b"\r\n")[2].decode()
        self.text += data
        values = dict(json.loads(data.partition("data: ")[2]))
        self.seen |= values
        return values


def says_nothing(event: dict[str, Any]) -> bool:
    """Whether an event has the time only, or the plot of a time without tokens."""
    return event.keys() <= {"t", "series"} and not any(event.get("series", {"tokens": ()})["tokens"])


async def viewer(stack: Stack, key: bytes | None = OPERATOR_KEY, *fields: bytes) -> Viewer:
    """Open the stream, and take its first event."""
    client = await stack.client()
    client.send(get(EVENTS, *fields, key=key))
    head = await client.take_through(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n"), head
    made = Viewer(stack, client)
    await made.take()
    return made


async def chat(stack: Stack, key: bytes, tokens: int = 1) -> RawClient:
    """Begin a chat whose backend sends so many tokens and then waits for `stack.finish`."""
    stack.backend.script(send(STREAM_HEAD + chunk(TOKEN * tokens)), stall(stack.finish), send(LAST_CHUNK))
    number = len(stack.backend.calls)
    client = await stack.client()
    client.send(post(CHAT, b'{"stream":true}', key=key))
    await stack.backend.call(number)
    await client.take_through(b"\n\n\r\n")
    return client


async def wait_in_queue(stack: Stack, key: bytes) -> RawClient:
    queued = stack.app.queue.queued
    client = await stack.client()
    client.send(post(key=key))
    await until(lambda: stack.app.queue.queued == queued + 1)
    return client


# --- The page ---


@scenario()
async def test_anyone_gets_the_page_and_nothing_else(stack: Stack) -> None:
    page = await stack.ask(get(b"/ui", key=None))
    assert page.status == 200
    assert page.body == stack.app.endpoints.board.content
    head = await stack.ask(request(b"HEAD", b"/ui", key=None))
    assert (head.status, head.body) == (200, b"")
    refused = await stack.ask(get(EVENTS, key=None))
    assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert (await stack.ask(get(EVENTS, key=b"sk-mallory-0123456789abcdef"))).status == 401
    assert (await stack.ask(request(b"HEAD", EVENTS))).status == 200


@scenario(UI="off")
async def test_without_the_ui_there_is_neither_page_nor_stream(stack: Stack) -> None:
    await stack.ask(post())
    for target in (b"/ui", EVENTS):
        assert (await stack.ask(get(target, key=OPERATOR_KEY))).status == 404
    assert stack.app.recorder.history is None


@scenario(AUTH_ENABLED="false")
async def test_without_keys_the_page_asks_for_none(stack: Stack) -> None:
    assert b'data-keys="none"' in (await stack.ask(get(b"/ui", key=None))).body
    assert (await viewer(stack, None)).seen["gateway"]["role"] == "infer"


# --- Who sees what ---


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_an_operator_sees_everybodys_requests_as_they_go_on(stack: Stack) -> None:
    board = await viewer(stack)
    assert board.seen["gateway"]["state"] == "ready"
    assert board.seen["slots"]["rows"] == board.seen["requests"] == []
    first = await chat(stack, KEY, tokens=5)
    others = [await wait_in_queue(stack, OTHER_KEY), await wait_in_queue(stack, KEY)]
    await board.next()
    ((key_id, label, _, _, tokens, slots),) = board.seen["slots"]["rows"]
    assert (key_id, label, tokens, slots) == ("alice", CHAT.decode(), 5, 1)
    assert [row[:2] for row in board.seen["queue"]["rows"]] == [[1, "bob"], [2, "alice"]]
    assert board.seen["now"]["tokens_per_s"] == 5.0
    stack.finish.set()
    await first.take_through(LAST_CHUNK)
    for client in others:
        await client.response()
    changed = await board.next()
    assert {row[2] for row in changed["more"]} == {"alice", "bob"}
    assert board.seen["slots"]["rows"] == board.seen["queue"]["rows"] == []
    assert [row[0] for row in board.seen["keys"]["rows"]] == ["alice", "bob", "olga"]


@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_another_key_sees_its_own_and_no_other_key(stack: Stack) -> None:
    board = await viewer(stack, KEY)
    await viewer(stack)
    busy = await chat(stack, OTHER_KEY, tokens=3)
    waiting = [await wait_in_queue(stack, OTHER_KEY), await wait_in_queue(stack, KEY)]
    await board.next()
    assert board.seen["queue"] == {
        "rows": [[1, "alice", CHAT.decode(), board.seen["queue"]["rows"][0][3], 1]],
        "queued": 1,
        "before": 0,
    }
    stack.finish.set()
    await busy.take_through(LAST_CHUNK)
    for client in waiting:
        await client.response()
    assert (await stack.ask(post(CHAT, b"{", key=OTHER_KEY))).status == 200
    await board.next()
    assert [row[2] for row in board.seen["more"]] == ["alice"]
    assert [row[0] for row in board.seen["keys"]["rows"]] == ["alice"]
    for other in OTHERS:
        assert other not in board.text


@scenario()
async def test_an_idle_keys_events_do_not_change_with_what_others_do(stack: Stack) -> None:
    board = await viewer(stack, KEY)
    assert says_nothing(await board.next())
    for _ in range(3):
        assert (await stack.ask(post(key=OTHER_KEY))).status == 200
    busy = await chat(stack, OTHER_KEY)
    assert says_nothing(await board.next())
    stack.finish.set()
    await busy.take_through(LAST_CHUNK)


@scenario()
async def test_no_prompt_and_no_key_is_in_the_stream(stack: Stack) -> None:
    board = await viewer(stack)
    await stack.ask(post(CHAT, b'{"prompt":"a great secret"}'))
    await stack.ask(post(CHAT + b"?token=hush"))
    await board.next()
    assert len(board.seen["more"]) == 2
    for secret in ("secret", "hush", KEY.decode(), OPERATOR_KEY.decode()):
        assert secret not in board.text


@scenario()
async def test_refusals_are_counted_by_kind(stack: Stack) -> None:
    await stack.ask(post(key=None))
    await stack.ask(get(b"/nowhere"))
    await stack.ask(get(b"/slots"))
    board = await viewer(stack)
    assert board.seen["failures"] == {"invalid_api_key": 1, "route_not_found": 1, "route_not_allowed": 1}
    assert (await viewer(stack, KEY)).seen["failures"] == {"route_not_found": 1, "route_not_allowed": 1}


# --- What ends a stream ---


@scenario()
async def test_a_drain_ends_the_streams_at_once_and_waits_for_none(stack: Stack) -> None:
    board = await viewer(stack)
    answer = await stack.ask(request(b"POST", b"/drain", b"", key=OPERATOR_KEY))
    assert answer.status == 202
    rest = await board.client.take_all()
    assert b'event: end\ndata: {"reason":"draining"}\n\n' in rest
    assert rest.endswith(LAST_CHUNK)
    await stack.gateway.run_until_ended()


@scenario()
async def test_a_key_that_is_revoked_ends_its_stream(stack: Stack) -> None:
    revoked, other = await viewer(stack, KEY), await viewer(stack, OTHER_KEY)
    stack.keys_file.write_text(re.sub("(?m)^alice.*\n", "", KEYS))
    assert (await stack.ask(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))).status == 200
    await other.next()
    assert await revoked.take() == {"reason": "key"}
    assert await revoked.client.take_all() == LAST_CHUNK
    assert says_nothing(await other.next())


@scenario()
async def test_a_key_whose_role_changes_gets_another_view(stack: Stack) -> None:
    board = await viewer(stack, OPERATOR_KEY)
    stack.keys_file.write_text(KEYS.replace(" role=operator", ""))
    await stack.app.reload()
    assert await board.next() == {"reason": "changed"}
    assert (await viewer(stack, OPERATOR_KEY)).seen["gateway"]["role"] == "infer"


@scenario(
    TRUSTED_PROXIES="127.0.0.1",
    KEYS=f"alice:{KEY.decode()}:100 from=192.0.2.0/24\nolga:{OPERATOR_KEY.decode()}:100 role=operator\n",
)
async def test_a_key_that_may_not_come_from_there_any_more_ends_its_stream(stack: Stack) -> None:
    board = await viewer(stack, KEY, b"X-Forwarded-For: 192.0.2.7")
    await board.next()
    stack.keys_file.write_text(stack.keys_file.read_text().replace("192.0.2.0/24", "198.51.100.0/24"))
    await stack.app.reload()
    assert await board.next() == {"reason": "key"}


@scenario(MAX_REQUEST_DURATION="5")
async def test_a_stream_has_no_time_limit(stack: Stack) -> None:
    board = await viewer(stack)
    for _ in range(20):
        await board.next()


# --- What it costs others ---


@scenario(
    MAX_CONCURRENT_REQUESTS="1", MAX_REQUESTS_PER_MINUTE="2", KEYS=f"olga:{OPERATOR_KEY.decode()} role=operator\n"
)
async def test_a_viewer_takes_no_slot_and_no_rate_and_is_no_work(stack: Stack) -> None:
    boards = [await viewer(stack) for _ in range(3)]
    stack.advance(60)
    health = (await stack.ask(get(b"/health", key=OPERATOR_KEY))).json
    assert (health["active"], health["queued"]) == (0, 0)
    assert health["idle_s"] >= 60
    assert (await stack.ask(post(key=OPERATOR_KEY))).field(b"x-ratelimit-remaining-requests") == b"1"
    assert boards[0].seen["keys"]["rows"][0][1] == [0, 2]
    for board in boards:
        board.client.close()
    await stack.stop()
    assert [line["status"] for line in stack.lines if line["route"] == "/ui/events"] == [200, 200, 200]


@scenario()
async def test_an_idle_gateway_is_not_kept_awake(stack: Stack) -> None:
    board = await viewer(stack)
    stack.advance(601)
    assert await board.take() == {"reason": "idle"}
    assert await board.client.take_all() == LAST_CHUNK


@scenario()
async def test_a_viewer_that_does_not_read_is_dropped_and_disturbs_nobody(stack: Stack) -> None:
    board = await viewer(stack)
    before = set(stack.clients)
    slow = await stack.client(receive_buffer=4096)
    await until(lambda: set(stack.clients) - before)
    (connection,) = set(stack.clients) - before
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    slow.send(get(EVENTS, key=OPERATOR_KEY))
    await slow.take_through(b"\n\n\r\n")
    slow.transport.pause_reading()
    for _ in range(600):
        stack.app.queue.acquire("alice").release()  # it is not idle
        await board.next()
        if len(stack.app.viewers) == 1:
            break
    assert len(stack.app.viewers) == 1
    await until(lambda: connection not in stack.open_clients)
    slow.transport.resume_reading()


@scenario()
async def test_viewers_are_bounded(stack: Stack) -> None:
    for _ in range(8):
        await viewer(stack, KEY)
    refused = await stack.ask(get(EVENTS))
    assert (refused.status, refused.code, refused.field(b"retry-after")) == (503, "too_many_viewers", b"30")
    assert (await viewer(stack, OTHER_KEY)).seen["gateway"]["state"] == "ready"


@scenario()
async def test_a_connection_that_ends_with_a_stream_answers_no_more(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(EVENTS, minor=0))
    head = await client.take_through(b"\r\n\r\n")
    assert b"\r\nConnection: close\r\n" in head
    assert b"Transfer-Encoding" not in head
    assert undated(head).startswith(b"HTTP/1.1 200 OK\r\n")
    assert (await client.take_through(b"\n\n")).startswith(b'data: {"t":')


@pytest.mark.parametrize("method", [b"POST", b"DELETE"])
@scenario()
async def test_only_reading_is_offered(stack: Stack, method: bytes) -> None:
    for target in (b"/ui", EVENTS):
        answer = await stack.ask(request(method, target, b"", key=OPERATOR_KEY))
        assert (answer.status, answer.field(b"allow")) == (405, b"GET, HEAD")
