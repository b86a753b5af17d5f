"""Connections on both sides: kept, reused, pipelined, bounded in number, and under TLS."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, Step, answer, chunk, close, event, reset, send, stall
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
async def test_many_requests_use_one_connection_on_each_side(stack: Stack) -> None:
    client = await stack.client()
    for number in range(30):
        stack.backend.script(send(answer(b"%d" % number)))
        client.send(post(CHAT, b"%d" % number))
        assert (await client.response()).body == b"%d" % number
    assert len(stack.backend.connections) == 1
    assert len(stack.clients) == 1


@scenario()
async def test_a_connection_that_is_closed_after_a_response_is_not_used_again(stack: Stack) -> None:
    """llama-server closes after every stream without announcing it."""
    client = await stack.client()
    for number in range(3):
        stack.backend.script(send(STREAM_HEAD + chunk(b"%d" % number) + LAST_CHUNK), close())
        client.send(post())
        assert (await client.response()).body == b"%d" % number
    assert len(stack.backend.used) == 3


@scenario()
async def test_a_request_that_a_new_connection_did_not_answer_is_not_sent_again(stack: Stack) -> None:
    client = await stack.client()
    stack.backend.script(close())
    client.send(post())
    assert (await client.response()).status == 502
    assert len(stack.backend.used) == 1


@scenario()
async def test_backend_connections_are_shared_between_clients(stack: Stack) -> None:
    for _ in range(5):
        assert (await stack.ask(post())).status == 200
    assert len(stack.backend.connections) == 1


@scenario()
async def test_there_are_as_many_backend_connections_as_concurrent_requests(stack: Stack) -> None:
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
async def test_a_connection_that_the_backend_does_not_keep_is_not_used_again(stack: Stack, raw: bytes) -> None:
    client = await stack.client()
    for _ in range(2):
        stack.backend.script(send(raw))
        client.send(post())
        assert (await client.response()).body == HELLO
    assert len(stack.backend.used) == 2


@pytest.mark.parametrize("end", [close, reset])
@scenario()
async def test_a_connection_that_ended_while_idle_is_not_used_again(stack: Stack, end: Callable[[], Step]) -> None:
    stack.backend.script(send(answer()), end())
    client = await stack.client()
    for _ in range(2):
        client.send(post())
        assert (await client.response()).body == HELLO
        await until(lambda: not any(each.transport.is_closing() for each in stack.backend.open))
        for _ in range(5):
            await asyncio.sleep(0)
    assert len(stack.backend.used) == 2


@pytest.mark.parametrize("piece", [1, 3, 50, 100000])
@scenario()
async def test_pipelined_requests_are_answered_in_order(stack: Stack, piece: int) -> None:
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
    for start in range(0, len(raw), piece):
        client.send(raw[start : start + piece])
        if piece < 100:
            await asyncio.sleep(0)
    got = [await client.response() for _ in range(5)]
    assert [each.status for each in got] == [200, 200, 404, 200, 200]
    assert [got[0].body, got[1].body, got[3].body, got[4].body] == [b"one", b"pong\n", b"two", b"models"]


@scenario()
async def test_a_connection_is_closed_after_the_response_if_the_client_asks_for_it(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping", b"Connection: Close") + get(b"/ping"))
    response = await client.response()
    assert response.field(b"connection") == b"close"
    assert (await client.take_all(), client.ended) == (b"", "fin")


# --- The number of connections ---


@scenario(MAX_CONNECTIONS="2")
async def test_a_new_connection_replaces_the_one_that_has_been_idle_longest(stack: Stack) -> None:
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


@scenario(MAX_CONNECTIONS="2")
async def test_if_no_connection_is_idle_only_public_routes_are_served(stack: Stack) -> None:
    await stack.occupy(2)
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
async def test_connections_for_public_routes_are_released(stack: Stack) -> None:
    await stack.occupy(1)
    for _ in range(20):
        late = await stack.client()
        late.send(get(b"/ping", b"Connection: close", key=None))
        assert (await late.response()).status == 200
        await late.until(lambda late=late: bool(late.ended))


@scenario(MAX_CONNECTIONS="2")
async def test_a_closed_connection_does_not_count(stack: Stack) -> None:
    for _ in range(5):
        assert (await stack.ask(post(CHAT, b"{}", b"Connection: close"))).status == 200
        await until(lambda: not stack.open_clients)


@scenario(MAX_CONNECTIONS="1")
async def test_idle_connections_are_replaced_again_and_again(stack: Stack) -> None:
    for _ in range(20):
        client = await stack.client()
        client.send(get(b"/ping"))
        assert (await client.response()).status == 200
    assert len(stack.clients) == 1


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6_loopback(), reason="there is no IPv6 loopback address")
@scenario(HOST="::1")
async def test_the_gateway_listens_on_the_address_of_host_only(stack: Stack) -> None:
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
async def test_requests_streams_and_refusals_over_tls(stack: Stack) -> None:
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
async def test_a_tls_client_that_leaves_cancels_its_request(stack: Stack) -> None:
    for number, leave in enumerate((RawClient.close, RawClient.reset)):
        stack.backend.script(send(STREAM_HEAD), stall())
        client = await tls_client(stack)
        client.send(post())
        await client.take_through(b"\r\n\r\n")
        leave(client)
        await (await stack.backend.call(number)).gone.wait()


@tls_scenario()
async def test_a_cut_response_is_visible_as_cut_over_tls(stack: Stack) -> None:
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
async def test_plain_http_to_the_tls_port_ends_that_connection_only(stack: Stack) -> None:
    client = await stack.client()
    client.send(get(b"/ping"))
    await client.take_all()
    with pytest.raises(ssl.SSLCertVerificationError):
        await stack.client(tls=ssl.create_default_context())
    client = await tls_client(stack)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


@tls_scenario(CLIENT_HEADER_TIMEOUT="0.05")
async def test_a_handshake_has_a_deadline(stack: Stack) -> None:
    client = await stack.client()
    await client.until(lambda: bool(client.ended))


@tls_scenario(MAX_CONNECTIONS="3")
async def test_stalled_handshakes_are_bounded_and_delay_no_client(stack: Stack) -> None:
    stalled = [await stack.client() for _ in range(10)]
    await until(lambda: sum(bool(client.ended) for client in stalled) == 7)
    assert [bool(client.ended) for client in stalled] == [True] * 7 + [False] * 3  # the oldest
    at_once = await asyncio.gather(*[stack.client() for _ in range(10)])
    await until(lambda: sum(bool(client.ended) for client in [*stalled, *at_once]) == 17)
    client = await tls_client(stack)
    await until(lambda: sum(bool(client.ended) for client in at_once) == 8)
    client.send(get(b"/ping"))
    assert (await client.response()).status == 200


def tls_by_hand(trust: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """Return the client's side of a handshake that has begun, its input and its output."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return tls, incoming, outgoing


@tls_scenario()
async def test_a_request_may_arrive_with_the_end_of_the_handshake(stack: Stack) -> None:
    tls, incoming, outgoing = tls_by_hand(trusting(stack.folder / "server.crt"))
    client = await stack.client()
    client.send(outgoing.read())
    while outgoing.pending == 0:
        await client.until(lambda: bool(client.received))
        incoming.write(await client.take(len(client.received)))
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
    tls.write(get(b"/ping"))
    client.send(outgoing.read())
    answer = b""
    while not answer.endswith(b"pong\n"):
        await client.until(lambda: bool(client.received))
        incoming.write(await client.take(len(client.received)))
        with suppress(ssl.SSLWantReadError):
            answer += tls.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@tls_scenario()
async def test_a_client_that_leaves_during_the_handshake_leaves_nothing_behind(stack: Stack) -> None:
    hello = tls_by_hand(ssl.create_default_context())[2].read()
    registered = asyncio.get_running_loop().batching_selector.get_map()
    before = len(registered)
    for sent in (b"", hello[:100], hello):
        for leave in (RawClient.close, RawClient.reset):
            client = await stack.client()
            await until(lambda: len(stack.gateway.handshakes))
            client.send(sent)
            leave(client)
            await until(lambda: not len(stack.gateway.handshakes) and len(registered) == before)


@tls_scenario(CLIENT_HEADER_TIMEOUT="3600")
async def test_the_shutdown_does_not_wait_for_handshakes(stack: Stack) -> None:
    client = await stack.client()
    await until(lambda: len(stack.gateway.handshakes))
    await stack.gateway.close()
    await client.until(lambda: bool(client.ended))


@tls_scenario()
async def test_a_renewed_certificate_is_served_after_a_reload(stack: Stack) -> None:
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
    for certificate in (first.read_text(), "not a certificate\n"):  # its key was replaced; it is no certificate
        (stack.folder / "server.crt").write_text(certificate)
        client.send(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
        assert (await client.response()).status == 200
        assert any("certificate cannot be read" in line for line in stack.logged())
        await tls_client(stack, "renewed")


@scenario()
async def test_tls_to_the_plain_port_gets_an_error_that_names_it(stack: Stack) -> None:
    client = await stack.client()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    response = await client.response()
    assert (response.status, response.json["error"]["message"]) == (400, "TLS was spoken to a plain HTTP port.")


@scenario()
async def test_a_malformed_head_request_is_answered_without_content(stack: Stack) -> None:
    client = await stack.client()
    client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    head, _, content = (await client.take_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length: " in head
    assert content == b""


async def send_before_reading(stack: Stack, client: RawClient, *pieces: bytes) -> None:
    """Send all pieces before reading, as some clients do. The request is refused after the first piece."""
    client.transport.pause_reading()
    for piece in pieces:
        client.send(piece)
        await until(lambda: client.ended or not client.transport.get_write_buffer_size())
        await until(lambda: not stack.clients, "the request has been refused")
    client.transport.resume_reading()


@pytest.mark.parametrize("line", [b"Content-Length: 99999999999", b"Transfer-Encoding: gzip", b"Content-Length: 1, 2"])
@scenario()
async def test_a_client_that_sends_its_body_after_a_refused_head_can_read_the_refusal(
    stack: Stack, line: bytes
) -> None:
    client = await stack.client()
    await send_before_reading(stack, client, request(b"POST", CHAT, None, line), *[b"x" * 50_000] * 3)
    assert (await client.response()).status in (400, 413)
    assert (await client.take_all(), client.ended) == (b"", "fin")


@tls_scenario()
async def test_a_tls_client_that_is_still_sending_can_read_its_refusal(stack: Stack) -> None:
    client = await tls_client(stack)
    await send_before_reading(stack, client, post(CHAT, b"x" * (8 << 20), key=None), b"x")
    response = await client.response()
    assert (response.status, response.field(b"connection")) == (401, b"close")
    client.close()
    await until(lambda: not stack.open_clients)


@scenario()
async def test_many_clients_may_connect_while_the_loop_is_busy(stack: Stack) -> None:
    """These are more connections than are accepted at once. The kernel keeps them, up to its own limit."""
    with ExitStack() as stalled:
        for _ in range(200):  # the event loop does not run meanwhile
            stalled.enter_context(socket.create_connection(("127.0.0.1", stack.port), timeout=5))
        await until(lambda: len(stack.open_clients) == 200)
