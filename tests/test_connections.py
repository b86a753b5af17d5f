"""Connections on both sides: kept, reused, pipelined, bounded in number, and under TLS."""

import asyncio
import socket
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, close, event, reset, send, stall
from support.clock import HURRY
from support.gateway import (
    CHAT,
    OPERATOR_KEY,
    Stack,
    get,
    make_certificate,
    post,
    request,
    scenario,
    tls_scenario,
    trusting,
    until,
)
from support.rawclient import RawClient

# --- Kept and reused ---


@scenario()
async def test_pitfall_31_one_connection_each_for_many_requests(stack):
    client = await stack.client()
    for number in range(30):
        stack.backend.script(send(answer(b"%d" % number)))
        client.send(post(CHAT, b"%d" % number))
        assert (await client.response()).body == b"%d" % number
    assert len(stack.backend.connections) == 1
    assert len(stack.parts.clients) == 1


@scenario()
async def test_connection_closed_behind_an_answer_is_not_used_again(stack):
    """llama-server does so behind every stream, though it does not say so."""
    client = await stack.client()
    for number in range(3):
        stack.backend.script(send(STREAM_HEAD + chunk(b"%d" % number) + LAST_CHUNK), close())
        client.send(post())
        assert (await client.response()).body == b"%d" % number
    assert len(stack.backend.used) == 3


@scenario()
async def test_request_that_missed_a_kept_connection_is_sent_again(stack):
    """A kept connection is closed instead of answered: only a new one can tell whether the backend is there."""
    client = await stack.client()
    assert (await stack.ask(post())).status == 200
    stack.backend.script(close())
    stack.backend.script(send(answer(b"again")))
    client.send(post())
    assert (await client.response()).body == b"again"
    assert len(stack.backend.used) == 2


@scenario()
async def test_request_that_a_new_connection_did_not_answer_is_not_sent_again(stack):
    client = await stack.client()
    stack.backend.script(close())
    client.send(post())
    assert (await client.response()).status == 502
    assert len(stack.backend.used) == 1


@scenario()
async def test_backends_connections_are_shared_between_clients(stack):
    for _ in range(5):
        assert (await stack.ask(post())).status == 200
    assert len(stack.backend.connections) == 1


@scenario()
async def test_as_many_backend_connections_as_requests_at_once(stack):
    finish = asyncio.Event()
    clients = [await stack.client() for _ in range(8)]
    for client in clients:
        stack.backend.script(stall(finish), send(answer()))
        client.send(post())
    await stack.backend.call(7)
    finish.set()
    for client in clients:
        assert (await client.response()).status == 200
    assert len(stack.backend.connections) == 8
    for _ in range(3):
        assert (await stack.ask(post())).status == 200
    assert len(stack.backend.connections) == 8


@pytest.mark.parametrize(
    "raw",
    [
        answer(HELLO, b"200 OK", b"Connection: close"),
        answer(HELLO, b"200 OK", b"Connection: foo, Close"),
        answer(HELLO).replace(b"1.1", b"1.0", 1),
        answer(HELLO) + b"\r\n",
    ],
)
@scenario()
async def test_connection_that_the_backend_will_not_keep_is_not_used_again(stack, raw):
    client = await stack.client()
    for _ in range(2):
        stack.backend.script(send(raw))
        client.send(post())
        assert (await client.response()).body == HELLO
    assert len(stack.backend.used) == 2


@pytest.mark.parametrize("end", [close, reset])
@scenario()
async def test_connection_that_ended_while_idle_is_not_used_again(stack, end):
    stack.backend.script(send(answer()), end())
    client = await stack.client()
    for _ in range(2):
        client.send(post())
        assert (await client.response()).body == HELLO
        await until(lambda: not any(each.transport.is_closing() for each in stack.backend.open))
        for _ in range(5):
            await asyncio.sleep(0)
    assert len(stack.backend.used) == 2


@scenario()
async def test_kept_connection_that_closes_on_a_repeatable_request_is_replaced(stack):
    """The backend may close an idle connection in the very moment in which a request is on its way to it."""
    client = await stack.client()
    client.send(get(b"/v1/models"))
    assert (await client.response()).status == 200
    stack.backend.script(close())
    client.send(get(b"/v1/models"))
    assert (await client.response()).status == 200
    assert [call.target for call in stack.backend.calls] == [b"/v1/models"] * 3


@pytest.mark.parametrize("torn", [1, 3, 50, 100000])
@scenario()
async def test_pipelined_requests_are_answered_in_order(stack, torn):
    raw = (
        post(CHAT, b"one")
        + get(b"/ping")
        + get(b"/nowhere")
        + b"\r\n"
        + post(b"/tokenize", b"two")
        + get(b"/v1/models")
    )
    stack.backend.choose = lambda call: (send(answer(call.body or b"models")),)
    client = await stack.client()
    for start in range(0, len(raw), torn):
        client.send(raw[start : start + torn])
        if torn < 100:
            await asyncio.sleep(0)
    got = [await client.response() for _ in range(5)]
    assert [each.status for each in got] == [200, 200, 404, 200, 200]
    assert [got[0].body, got[1].body, got[3].body, got[4].body] == [b"one", b"pong\n", b"two", b"models"]


@scenario()
async def test_client_that_asks_for_it_is_closed_after_its_answer(stack):
    client = await stack.client()
    client.send(get(b"/ping", b"Connection: Close") + get(b"/ping"))
    response = await client.response()
    assert response.field(b"connection") == b"close"
    assert (await client.take_all(), client.ended) == (b"", "fin")


# --- How many ---


@scenario(MAX_CONNECTIONS="2")
async def test_newcomer_takes_the_place_of_the_one_that_has_idled_longest(stack):
    first, second = await stack.client(), await stack.client()
    for client in (first, second, first):
        client.send(get(b"/ping"))
        await client.response()
    third = await stack.client()
    third.send(post())
    assert (await third.response()).status == 200
    assert await second.take_all() == b""
    first.send(get(b"/ping"))
    assert (await first.response()).status == 200


async def occupy(stack: Stack, number: int) -> list[RawClient]:
    """That many connections, each with a request that does not end."""
    clients = []
    for each in range(number):
        stack.backend.script(send(STREAM_HEAD), stall())
        client = await stack.client()
        client.send(post())
        await stack.backend.call(each)
        clients.append(client)
    return clients


@scenario(MAX_CONNECTIONS="2")
async def test_where_none_idles_there_is_room_for_public_routes_only(stack):
    await occupy(stack, 2)
    late = await stack.client()
    late.send(get(b"/ping", key=None) + get(b"/health", key=None))
    assert (await late.response()).body == b"pong\n"
    assert (await late.response()).json["connections"] == 3
    late.send(post())
    response = await late.response()
    assert (response.status, response.code, response.field(b"retry-after")) == (503, "too_many_connections", b"2")
    assert response.field(b"connection") == b"close"
    await late.until(lambda: bool(late.ended))


@scenario(MAX_CONNECTIONS="1")
async def test_room_for_public_routes_is_given_back(stack):
    await occupy(stack, 1)
    for _ in range(20):
        late = await stack.client()
        late.send(get(b"/ping", b"Connection: close", key=None))
        assert (await late.response()).status == 200
        await late.until(lambda late=late: bool(late.ended))


@scenario(MAX_CONNECTIONS="2")
async def test_sixteen_more_and_not_one_beyond(stack):
    await occupy(stack, 2)
    late = [await stack.client()]
    for number in range(1, 17):
        late[-1].send(b"GET /ping HTTP/1.1\r\n")  # one that says nothing would make room for the next
        await until(lambda number=number: sum(wire.has_unread for wire in stack.parts.clients) == number)
        if number < 16:
            late.append(await stack.client())
    too_late = await stack.client()
    response = await too_late.response()
    assert (response.status, response.code) == (503, "too_many_connections")
    await too_late.until(lambda: bool(too_late.ended))
    for client in late:
        client.send(b"Host: x\r\n\r\n")
        assert (await client.response()).status == 200


@scenario(MAX_CONNECTIONS="2")
async def test_connection_that_has_gone_counts_no_more(stack):
    for _ in range(5):
        assert (await stack.ask(post(CHAT, b"{}", b"Connection: close"))).status == 200
        await until(lambda: not stack.open_clients)


@scenario(MAX_CONNECTIONS="1")
async def test_bytes_already_sent_save_a_connection_from_making_room(stack):
    first = await stack.client()
    first.send(b"GET /ping HT")
    await until(lambda: any(wire.has_unread for wire in stack.parts.clients))
    second = await stack.client()
    second.send(get(b"/ping", key=None))
    assert (await second.response()).status == 200
    first.send(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert (await first.response()).status == 200


@scenario(MAX_CONNECTIONS="1")
async def test_room_that_was_made_can_be_made_again(stack):
    for _ in range(20):
        client = await stack.client()
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200
    assert len(stack.parts.clients) == 1


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6_loopback(), reason="there is no IPv6 loopback address")
@scenario(HOST="::1")
async def test_pitfall_35_host_may_be_ipv6_and_is_nowhere_else(stack):
    client = await stack.client(host="::1")
    client.send(post())
    assert (await client.response()).status == 200
    with pytest.raises(ConnectionRefusedError):
        await stack.client(host="127.0.0.1")
    await stack.stop()
    assert [line["peer"] for line in stack.lines] == ["::1"]


# --- TLS ---


async def tls_client(stack: Stack, name: str = "server") -> RawClient:
    return await stack.client(tls=trusting(stack.folder / f"{name}.crt"))


@tls_scenario()
async def test_pitfall_35_tls(stack):
    client = await tls_client(stack)
    assert client.transport.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
    stack.backend.script(send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK))
    client.send(post() + post() + get(b"/ping"))
    assert (await client.response()).body == event("1")
    assert (await client.response()).body == HELLO
    assert (await client.response()).body == b"pong\n"
    client.send(post(CHAT, b"x" * (1 << 20), key=None))
    assert (await client.response()).status == 401


@tls_scenario()
async def test_tls_client_that_leaves_cancels_its_request(stack):
    for number, leave in enumerate((RawClient.close, RawClient.reset)):
        stack.backend.script(send(STREAM_HEAD), stall())
        client = await tls_client(stack)
        client.send(post())
        await client.take_through(b"\r\n\r\n")
        leave(client)
        await asyncio.wait_for((await stack.backend.call(number)).gone.wait(), 10 * HURRY)


@tls_scenario()
async def test_tls_sees_a_cut_answer_as_cut(stack):
    stack.backend.script(send(STREAM_HEAD + chunk(event("1"))), reset())
    client = await tls_client(stack)
    client.send(post())
    data = await client.take_all()
    assert b"backend_unavailable" in data
    assert not data.endswith(LAST_CHUNK)
    stack.backend.script(send(b"HTTP/1.1 200 OK\r\n\r\nabc"), reset())
    client = await tls_client(stack)
    client.send(post(minor=0))
    await client.until(lambda: bool(client.ended))


@tls_scenario()
async def test_plain_words_to_the_tls_port_end_the_connection_and_nothing_else(stack):
    client = await stack.client()
    client.send(get(b"/ping"))
    await client.take_all()
    with pytest.raises(ssl.SSLCertVerificationError):
        await stack.client(tls=ssl.create_default_context())
    client = await tls_client(stack)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@tls_scenario(CLIENT_HEADER_TIMEOUT="0.05")
async def test_handshake_has_to_end_in_time(stack):
    client = await stack.client()
    await client.until(lambda: bool(client.ended))


@tls_scenario(MAX_CONNECTIONS="3")
async def test_handshakes_that_nobody_goes_on_with_are_bounded_and_keep_nobody_out(stack):
    crowd = [await stack.client() for _ in range(10)]
    await until(lambda: sum(bool(client.ended) for client in crowd) == 7)
    assert [bool(client.ended) for client in crowd] == [True] * 7 + [False] * 3  # the oldest
    at_once = await asyncio.gather(*[stack.client() for _ in range(10)])
    await until(lambda: sum(bool(client.ended) for client in [*crowd, *at_once]) == 17)
    client = await tls_client(stack)
    await until(lambda: sum(bool(client.ended) for client in at_once) == 8)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


def tls_by_hand(trust: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """A client's side of TLS that has said hello, what it hears, and what it says."""
    heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.wrap_bio(heard, said, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return tls, heard, said


@tls_scenario()
async def test_a_request_may_come_with_the_last_word_of_the_handshake(stack):
    tls, heard, said = tls_by_hand(trusting(stack.folder / "server.crt"))
    client = await stack.client()
    client.send(said.read())
    while said.pending == 0:
        await client.until(lambda: bool(client.received))
        heard.write(await client.take(len(client.received)))
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
    tls.write(get(b"/ping"))
    client.send(said.read())
    answer = b""
    while not answer.endswith(b"pong\n"):
        await client.until(lambda: bool(client.received))
        heard.write(await client.take(len(client.received)))
        with suppress(ssl.SSLWantReadError):
            answer += tls.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@tls_scenario()
async def test_who_leaves_in_a_handshake_leaves_nothing(stack):
    words = tls_by_hand(ssl.create_default_context())[2].read()
    watched = asyncio.get_running_loop()._turns.get_map()
    before = len(watched)
    for said in (b"", words[:100], words):
        for leave in (RawClient.close, RawClient.reset):
            client = await stack.client()
            await until(lambda: stack.gateway._handshakes._writers)
            client.send(said)
            leave(client)
            await until(lambda: not stack.gateway._handshakes._writers and len(watched) == before)


@tls_scenario(CLIENT_HEADER_TIMEOUT="3600")
async def test_the_end_does_not_wait_for_handshakes(stack):
    client = await stack.client()
    await until(lambda: stack.gateway._handshakes._writers)
    await stack.gateway.close()
    await client.until(lambda: bool(client.ended))


@tls_scenario()
async def test_renewed_certificate_is_served_after_a_reload(stack):
    def renew(certificate: Path, key: Path) -> None:
        (stack.folder / "server.crt").write_bytes(certificate.read_bytes())
        (stack.folder / "server.key").write_bytes(key.read_bytes())

    old = await tls_client(stack)
    first = stack.folder / "first.crt"
    first.write_bytes((stack.folder / "server.crt").read_bytes())
    renewed = make_certificate(stack.folder, "renewed")
    renew(renewed, stack.folder / "renewed.key")
    old.send(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
    assert (await old.response()).status == 200
    client = await tls_client(stack, "renewed")
    with pytest.raises(ssl.SSLCertVerificationError):
        await tls_client(stack, "first")
    for certificate in (first.read_text(), "not a certificate\n"):  # the one whose key has gone, and none
        (stack.folder / "server.crt").write_text(certificate)
        client.send(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
        assert (await client.response()).status == 200
        assert any("certificate cannot be read" in line for line in stack.logged())
        await tls_client(stack, "renewed")


@scenario()
async def test_tls_to_the_plain_port_is_told_so(stack):
    client = await stack.client()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    response = await client.response()
    assert (response.status, response.json["error"]["message"]) == (400, "TLS was spoken to a plain HTTP port.")


@scenario()
async def test_head_that_is_wrong_is_answered_without_content(stack):
    client = await stack.client()
    client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    head, _, content = (await client.take_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length: " in head
    assert content == b""


async def send_before_reading(stack, client, *pieces: bytes) -> None:
    """As a client does that looks for an answer once its request is out; it is refused after the first piece."""
    client.transport.pause_reading()
    for piece in pieces:
        client.send(piece)
        await until(lambda: client.ended or not client.transport.get_write_buffer_size())
        await until(lambda: not stack.parts.clients, "it has been refused")
    client.transport.resume_reading()


@pytest.mark.parametrize("line", [b"Content-Length: 99999999999", b"Transfer-Encoding: gzip", b"Content-Length: 1, 2"])
@scenario()
async def test_a_client_that_sends_its_body_though_the_head_was_refused_can_read_why(stack, line):
    client = await stack.client()
    await send_before_reading(stack, client, request(b"POST", CHAT, None, line), *[b"x" * 50_000] * 3)
    assert (await client.response()).status in (400, 413)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@tls_scenario()
async def test_a_tls_client_that_is_still_sending_can_read_its_refusal(stack):
    client = await tls_client(stack)
    await send_before_reading(stack, client, post(CHAT, b"x" * (8 << 20), key=None), b"x")
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (401, b"close")
    client.close()
    await until(lambda: not stack.open_clients)


@scenario()
async def test_many_may_knock_while_nobody_has_time_to_open(stack):
    """More than are accepted at once: the kernel keeps them, up to its own bound."""
    with ExitStack() as crowd:
        for _ in range(200):  # the loop does not turn meanwhile
            crowd.enter_context(socket.create_connection(("127.0.0.1", stack.port), timeout=5))
        await until(lambda: len(stack.open_clients) == 200)
