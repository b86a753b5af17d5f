"""One question with one deadline, against servers that answer, stall, babble or are not there."""

import asyncio
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from probes import Activity, Address, Answer, ask, parse_activity

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def asked(
    serve: Serve, timeout_s: float = 20, key: str | None = None, tls: ssl.SSLContext | None = None
) -> Answer | None:
    served: list[asyncio.StreamWriter] = []

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        with suppress(OSError):
            await serve(reader, writer)

    async def run() -> Answer | None:
        server = await asyncio.start_server(tracked, "127.0.0.1", 0, ssl=tls)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1], tls is not None)
        try:
            return await ask(address, "/health", timeout_s, key)
        finally:
            server.close()
            for writer in served:
                writer.transport.abort()
                with suppress(OSError):
                    await writer.wait_closed()

    return asyncio.run(run())


def saying(*pieces: bytes, heads: list[bytes] | None = None) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heads is not None:
            heads.append(head)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return serve


def test_an_answer_is_read_to_its_end() -> None:
    heads: list[bytes] = []
    assert asked(saying(ANSWER[:9], ANSWER[9:], heads=heads)) == Answer(200, b"hi")
    assert heads == [b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"]


def test_the_key_goes_where_it_is_needed() -> None:
    heads: list[bytes] = []
    asked(saying(ANSWER, heads=heads), key="gateway-k")
    assert b"\r\nAuthorization: Bearer gateway-k\r\n" in heads[0]


@pytest.mark.parametrize("raw", [b"", b"SSH-2.0\r\n", b"HTTP/1.1 2000\r\n\r\n", b"HTTP/2 200 \r\n\r\n"])
def test_what_is_no_http_is_no_answer(raw: bytes) -> None:
    assert asked(saying(raw)) is None


def test_silence_ends_with_the_deadline() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    assert asked(serve, timeout_s=0.05) is None


def test_nobody_there_is_no_answer() -> None:
    assert asyncio.run(ask(Address("127.0.0.1", 1), "/", 20)) is None


def test_an_endless_answer_is_cut() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ANSWER)
        while not writer.is_closing():
            writer.write(bytes(100_000))
            await writer.drain()

    answer = asked(serve)
    assert answer is not None
    assert answer.status == 200


def test_whoever_asks_can_always_be_cancelled() -> None:
    """Cancelled at the very moment at which the answer (a refusal) arrives, which wait_for would swallow."""

    async def run() -> bool:
        task = asyncio.ensure_future(ask(Address("127.0.0.1", 1), "/", 20))
        while not task.done():
            await asyncio.sleep(0)
            task.cancel()
        return task.cancelled()

    assert asyncio.run(run())


def test_a_certificate_of_its_own_is_trusted(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    try:
        subprocess.run([*argv, "-subj", "/CN=x", "-keyout", key, "-out", cert], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    assert asked(saying(ANSWER), tls=tls) == Answer(200, b"hi")


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
def test_the_gateways_activity_is_read_or_unknown(body: bytes, activity: Activity | None) -> None:
    assert parse_activity(Answer(503, body)) == activity
    assert parse_activity(None) is None


def test_working_is_active_or_queued() -> None:
    assert [Activity(*counts, 0, 0).working for counts in ((0, 0), (1, 0), (0, 1))] == [False, True, True]
