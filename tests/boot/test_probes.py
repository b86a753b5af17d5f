"""One request with one deadline, to servers that respond, stall, send garbage or are not there."""

import asyncio
import os
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from boot.probes import Activity, Address, ProbeResponse, parse_activity, probe
from core.listener import find_listener
from support.gateway import until

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def probed(
    serve: Serve,
    timeout_s: float = 20,
    key: str | None = None,
    tls: ssl.SSLContext | None = None,
    body: bytes | None = None,
) -> ProbeResponse | None:
    """Probe a server that serves one connection so."""
    writers: list[asyncio.StreamWriter] = []

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(OSError):
            await serve(reader, writer)

    async def run() -> ProbeResponse | None:
        server = await asyncio.start_server(tracked, "127.0.0.1", 0, ssl=tls)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1], tls is not None)
        try:
            return await probe(address, "/health", timeout_s, key, body=body)
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
                with suppress(OSError):
                    await writer.wait_closed()

    return asyncio.run(run())


def sending(*pieces: bytes, heads: list[bytes] | None = None) -> Serve:
    """A server that reads a head, sends these pieces and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heads is not None:
            heads.append(head)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return serve


def test_a_response_is_read_to_its_end() -> None:
    heads: list[bytes] = []
    assert probed(sending(RESPONSE[:9], RESPONSE[9:], heads=heads)) == ProbeResponse(200, b"hi")
    assert heads == [b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"]


def test_a_body_is_posted() -> None:
    heads: list[bytes] = []
    assert probed(sending(RESPONSE, heads=heads), body=b'{"model": "a"}') == ProbeResponse(200, b"hi")
    assert heads[0].startswith(b"POST /health HTTP/1.1\r\n")
    assert b"\r\nContent-Type: application/json\r\nContent-Length: 14\r\n" in heads[0]


def test_a_key_is_sent_as_a_bearer_token() -> None:
    heads: list[bytes] = []
    probed(sending(RESPONSE, heads=heads), key="gateway-k")
    assert b"\r\nAuthorization: Bearer gateway-k\r\n" in heads[0]


@pytest.mark.parametrize("raw", [b"", b"SSH-2.0\r\n", b"HTTP/1.1 2000\r\n\r\n", b"HTTP/2 200 \r\n\r\n"])
def test_bytes_that_are_not_http_are_no_response(raw: bytes) -> None:
    assert probed(sending(raw)) is None


def test_a_server_that_stalls_is_given_up_at_the_deadline() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    assert probed(serve, timeout_s=0.05) is None


def test_only_the_listener_that_is_asked_for_gets_anything() -> None:
    """Also none of the key: the connection is closed without a byte."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(65536)
        received.append(data)
        if data:
            writer.write(RESPONSE)
        writer.close()

    async def run() -> list[ProbeResponse | None]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        own = find_listener("127.0.0.1", port, os.getpid())
        assert own is not None
        address = Address("127.0.0.1", port)
        found = [await probe(address, "/", 20, "gateway-k", listener=listener) for listener in (own + 1, own, None)]
        await until(lambda: len(received) == 3)  # the end of the first connection may be seen last
        server.close()
        return found

    assert asyncio.run(run()) == [None, ProbeResponse(200, b"hi"), ProbeResponse(200, b"hi")]
    assert sorted(received)[0] == b""
    assert all(sorted(received)[1:])


def test_a_unix_socket_is_probed(tmp_path: Path) -> None:
    heads: list[bytes] = []
    path = str(tmp_path / "x.sock")

    async def run() -> ProbeResponse | None:
        server = await asyncio.start_unix_server(sending(RESPONSE, heads=heads), path)
        try:
            return await probe(Address(path, 0), "/health", 20, listener=os.getpid())
        finally:
            server.close()

    assert asyncio.run(run()) == ProbeResponse(200, b"hi")
    assert b"\r\nHost: localhost\r\n" in heads[0]
    assert asyncio.run(probe(Address(path, 0), "/health", 20)) is None


def test_a_refused_connection_is_no_response() -> None:
    assert asyncio.run(probe(Address("127.0.0.1", 1), "/", 20)) is None


def test_an_endless_response_is_cut() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(RESPONSE)
        while not writer.is_closing():
            writer.write(bytes(100_000))
            await writer.drain()

    response = probed(serve)
    assert response is not None
    assert response.status == 200


def test_a_probe_can_be_cancelled_at_any_moment() -> None:
    """Also in the moment in which the response (a refusal) arrives: wait_for would swallow that cancellation."""

    async def run() -> bool:
        task = asyncio.ensure_future(probe(Address("127.0.0.1", 1), "/", 20))
        while not task.done():
            await asyncio.sleep(0)
            task.cancel()
        return task.cancelled()

    assert asyncio.run(run())


def test_a_self_signed_certificate_is_accepted(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    try:
        subprocess.run([*argv, "-subj", "/CN=x", "-keyout", key, "-out", cert], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    assert probed(sending(RESPONSE), tls=tls) == ProbeResponse(200, b"hi")


@pytest.mark.parametrize(
    ("body", "activity"),
    [
        (b'{"active": 2, "queued": 3, "backend_silent_s": 1.5, "idle_s": 0}', Activity(2, 3, 1.5, 0)),
        (b'{"active": 0, "backend_silent_s": null, "idle_s": 7.5}', Activity(0, 0, 0, 7.5)),
        (b'{"active": 0}', None),
        (b"[]", None),
        (b"not json", None),
    ],
)
def test_the_gateways_activity_is_parsed_or_unknown(body: bytes, activity: Activity | None) -> None:
    assert parse_activity(ProbeResponse(503, body)) == activity
    assert parse_activity(None) is None


def test_working_means_active_or_queued() -> None:
    assert [Activity(*counts, 0, 0).working for counts in ((0, 0), (1, 0), (0, 1))] == [False, True, True]
