"""A backend that is cut, reset or malformed, at every byte: one status line, and never a false end."""

import asyncio
import json
import re
from collections.abc import Callable

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
from support.gateway import CHAT, Stack, get, post, scenario
from support.rawclient import RawClient

SIZED = answer(b"0123456789")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\n0123\r\n6\r\n456789\r\n0\r\nT: 1\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n0123456789"
WHOLE = {"sized": SIZED, "chunked": CHUNKED, "close": UNTIL_CLOSE}

EVENTS = [event('{"n": 1}'), event('{"n": 2}'), b"event: x\ndata: 3\r\n\r\n"]
# The second event comes in two chunks; the third ends with CRLF, as some servers send it.
STREAM = STREAM_HEAD + chunk(EVENTS[0]) + chunk(EVENTS[1][:7]) + chunk(EVENTS[1][7:]) + chunk(EVENTS[2]) + LAST_CHUNK


async def raw_answer(stack: Stack, raw: bytes = b"") -> tuple[bytes, str]:
    """Return all bytes of the response to one request, and how the connection ended."""
    client = await stack.client()
    client.send(raw or post(CHAT, b"{}", b"Connection: close"))
    data = await client.take_all()
    client.close()
    return data, client.ended


def verdict(data: bytes) -> tuple[str, bytes]:
    """Return `whole`, `cut` or the status of a refusal, and the payload. Asserts that nothing follows."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 ([0-9]{3})", head)
    assert status, data
    length = re.search(rb"(?im)^Content-Length: ([0-9]+)\r?$", head)
    if length is not None:
        payload, whole = rest, len(rest) == int(length[1])
        assert len(rest) <= int(length[1])
    else:
        assert b"\r\nTransfer-Encoding: chunked\r\n" in head, data
        payload, whole = dechunk(rest)
    if status[1] == b"200":
        return ("whole" if whole else "cut"), payload
    assert whole
    return status[1].decode(), payload


def dechunk(coded: bytes) -> tuple[bytes, bool]:
    """Return the payload of a chunked body, and whether the body is complete."""
    payload = b""
    while coded:
        size, _, coded = coded.partition(b"\r\n")
        length = int(size.partition(b";")[0] or b"0", 16)
        if length == 0:
            return payload, coded == b"\r\n"
        payload += coded[:length]
        coded = coded[length + 2 :]
    return payload, False


# --- Cut at every byte ---


@pytest.mark.parametrize("end", [close, reset])
@pytest.mark.parametrize("framing", ["sized", "chunked", "close"])
@scenario()
async def test_cut_at_every_byte(stack: Stack, framing: str, end: Callable[[], Step]) -> None:
    raw = WHOLE[framing]
    head = raw.index(b"\r\n\r\n") + 4
    finished = CHUNKED.index(b"0\r\nT") + 3 if framing == "chunked" else len(raw)
    for length in range(len(raw)):
        stack.backend.script(send(raw[:length]), end())
        data, ended = await raw_answer(stack)
        found, payload = verdict(data)
        assert ended == "fin"
        if length < head:
            assert (found, json.loads(payload)["error"]["code"]) == ("502", "backend_unavailable")
        elif framing == "close" and end is close:
            assert (found, payload) == ("whole", raw[head:length])
        else:
            assert found == "cut", (length, finished, data)
            assert b"0123456789".startswith(payload)
    await stack.stop()
    assert len(stack.lines) == len(raw)
    assert {line["outcome"] for line in stack.lines[:head]} == {"refused"}
    outcomes = {(line["outcome"], line["stage"]) for line in stack.lines[head:]}
    assert outcomes == {("done", "done") if framing == "close" and end is close else ("truncated", "streaming")}


@pytest.mark.parametrize("framing", ["sized", "chunked", "close"])
@scenario()
async def test_an_http_1_0_client_sees_a_cut_response_as_a_reset(stack: Stack, framing: str) -> None:
    """If the end of the connection is the end of the body, only a reset shows that the body is cut."""
    raw = WHOLE[framing]
    for length in range(raw.index(b"\r\n\r\n") + 4, len(raw)):
        stack.backend.script(send(raw[:length]), reset())
        data, ended = await raw_answer(stack, post(minor=0))
        assert data.count(b"HTTP/1.") <= 1
        assert ended == ("fin" if framing == "sized" else "reset"), length


# --- Streams cut at every byte ---


@pytest.mark.parametrize("end", [close, reset])
@scenario()
async def test_a_stream_cut_at_every_byte_ends_with_one_error_event_or_none(
    stack: Stack, end: Callable[[], Step]
) -> None:
    head = len(STREAM_HEAD)
    boundaries = {
        len(STREAM_HEAD),
        len(STREAM_HEAD + chunk(EVENTS[0])),
        STREAM.index(chunk(EVENTS[2])),
        STREAM.index(LAST_CHUNK),
    }
    error = event(json.dumps(unavailable()))
    for length in range(head, len(STREAM)):
        stack.backend.script(send(STREAM[:length]), end())
        data, ended = await raw_answer(stack)
        body = data.partition(b"\r\n\r\n")[2]
        passed = STREAM[head:length]
        if length in boundaries:
            assert body == passed + chunk(error)
        elif length > STREAM.index(LAST_CHUNK):  # the last chunk had begun: no event may follow
            assert passed.startswith(body)
            assert not body.endswith(LAST_CHUNK)
        else:
            assert body == passed
        assert ended == "fin"


def unavailable() -> dict[str, object]:
    message = "The backend closed in the middle of its answer."
    return {"error": {"message": message, "type": "api_error", "param": None, "code": "backend_unavailable"}}


@pytest.mark.parametrize(
    ("route", "tail"),
    [
        (b"/v1/completions", b'data: {"error": {"message": "'),
        (b"/v1/messages", b'event: error\ndata: {"type": "error", "error": {"message": "'),
        (
            b"/v1/responses",
            b'event: error\ndata: {"type": "error", "sequence_number": 0, "code": "backend_unavailable", "message": "',
        ),
    ],
)
@pytest.mark.parametrize("framing", ["chunked", "close"])
@scenario()
async def test_the_error_event_is_in_the_routes_dialect(stack: Stack, route: bytes, tail: bytes, framing: str) -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n\r\n"
    sent = STREAM_HEAD + chunk(EVENTS[0]) if framing == "chunked" else plain + EVENTS[0]
    stack.backend.script(send(sent), reset())
    client = await stack.client()
    client.send(post(route))
    await client.take_through(chunk(EVENTS[0]))
    last = await client.take_through(b"\n\n\r\n")
    size, _, payload = last.partition(b"\r\n")
    assert payload.startswith(tail)
    assert payload.endswith(b"\n\n\r\n")
    assert len(payload) == int(size, 16) + 2


@scenario()
async def test_the_end_of_an_event_is_found_in_any_pieces(stack: Stack) -> None:
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS[2], 1), reset())
    data, _ = await raw_answer(stack)
    payload, whole = dechunk(data.partition(b"\r\n\r\n")[2])
    assert (payload, whole) == (EVENTS[2] + event(json.dumps(unavailable())), False)


@scenario()
async def test_a_sized_stream_gets_no_event_beyond_its_length(stack: Stack) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\n" + EVENTS[0]
    stack.backend.script(send(raw), reset())
    data, _ = await raw_answer(stack)
    assert data.partition(b"\r\n\r\n")[2] == EVENTS[0]


@scenario()
async def test_an_http_1_0_stream_ends_with_the_error_event(stack: Stack) -> None:
    stack.backend.script(send(STREAM_HEAD + chunk(EVENTS[0])), close())
    client = await stack.client()
    client.send(post(minor=0))
    await client.take_through(EVENTS[0])
    data = await client.take_all()
    assert data in (b"", event(json.dumps(unavailable())))  # a reset may destroy data before it
    assert client.ended == "reset"


# --- Garbage ---


@pytest.mark.parametrize("garbage", [b"\0", b"\r", b"\n", b"\xff", b":", b"HTTP/1.1 200 OK\r\n\r\n"])
@pytest.mark.parametrize("framing", ["sized", "chunked", "close"])
@scenario()
async def test_garbage_at_every_byte(stack: Stack, framing: str, garbage: bytes) -> None:
    raw = WHOLE[framing]
    payload_starts = raw.index(b"\r\n\r\n") + 4
    for length in range(len(raw)):
        stack.backend.script(send(raw[:length] + garbage + raw[length + 1 :]), close())
        client = await stack.client()
        client.send(post(CHAT, b"{}", b"Connection: close"))
        data = await client.take_all()
        found, payload = verdict(data)
        assert (found in ("whole", "cut", "502"), data[:5], data.count(b"HTTP/1.1 502")) == (
            True,
            b"HTTP/",
            found == "502",
        )
        if length >= payload_starts and framing != "chunked":
            assert payload[: length - payload_starts] == raw[payload_starts:length]


MALFORMED_HEADS = [
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1 099 No\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/1.2 200 OK\r\n\r\n",
    b"HTTP/2 200\r\n\r\n",
    b"http/1.1 200 OK\r\n\r\n",
    b"\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n",
    b"HTTP/1.1 200 OK\nA: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("head", MALFORMED_HEADS)
@scenario()
async def test_a_malformed_head_is_a_502_and_the_client_may_continue(stack: Stack, head: bytes) -> None:
    stack.backend.script(send(head), stall())
    client = await stack.client()
    client.send(post() + post())
    response = await client.response()
    assert (response.status, response.code) == (502, "backend_malformed")
    assert (await client.response()).body == HELLO
    assert len(stack.backend.used) == 2  # the first one is not used again
    await (await stack.backend.call()).gone.wait()


@scenario(MAX_RESPONSE_HEADER_SIZE="100")
async def test_the_limit_of_the_response_head(stack: Stack) -> None:
    def head(length: int) -> bytes:
        start = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: "
        return start + b"a" * (length - len(start))

    stack.backend.script(send(head(100) + b"\r\n\r\n"))
    assert (await stack.ask(post())).status == 200
    stack.backend.script(send(head(100) + b"\r\n\r\n", piece=103))
    assert (await stack.ask(post())).status == 200
    for raw in (head(101) + b"\r\n\r\n", head(101)):  # also before it ends
        stack.backend.script(send(raw), stall())
        assert (await stack.ask(post())).code == "backend_malformed"


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"HTTP/2.0 200 OK\r\n", b"h", b"\r\n"])
@scenario()
async def test_another_protocol_is_recognised_by_its_first_bytes(stack: Stack, first: bytes) -> None:
    stack.backend.script(send(first), stall())
    response = await stack.ask(post())
    assert (response.status, response.code) == (502, "backend_malformed")


@pytest.mark.parametrize("malformed", [b"zz\r\n", b"5\r\nabcdeXX", b"5\nabcde\r\n", b"5" + b";" * 2000 + b"\r\n"])
@scenario()
async def test_a_malformed_chunk_in_a_stream_is_an_error_event_and_the_end(stack: Stack, malformed: bytes) -> None:
    received = asyncio.Event()
    stack.backend.script(send(STREAM_HEAD + chunk(EVENTS[0])), stall(received), send(malformed), stall())
    client = await stack.client()
    client.send(post())
    await client.take_through(chunk(EVENTS[0]))
    received.set()
    rest = await client.take_all()
    assert not rest.endswith(LAST_CHUNK)
    assert rest == b"" or b"backend_malformed" in rest
    await (await stack.backend.call()).gone.wait()


@scenario()
async def test_bytes_beyond_the_announced_length_are_not_passed(stack: Stack) -> None:
    stack.backend.script(send(answer(HELLO) + answer(b"a second answer")))
    stack.backend.script(send(CHUNKED + b"HTTP/1.1 200 OK\r\n\r\n"))
    client = await stack.client()
    for raw, body in ((post(), HELLO), (post(), b"0123456789"), (get(b"/ping"), b"pong\n")):
        client.send(raw)
        assert (await client.response()).body == body
        await client.silent()
    assert len(stack.backend.used) == 2


@scenario()
async def test_bytes_without_a_request_end_the_connection(stack: Stack) -> None:
    later = asyncio.Event()
    stack.backend.script(send(answer()), stall(later), send(b"HTTP/1.1 408 Request Timeout\r\n\r\n"), stall())
    client: RawClient = await stack.client()
    client.send(post())
    await client.response()
    later.set()
    await stack.backend.used[0].gone.wait()
    client.send(post())
    assert (await client.response()).body == HELLO
    assert len(stack.backend.used) == 2
