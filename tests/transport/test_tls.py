"""tls.py: contexts and renewed certificates, and handshakes that fail, take too long or are too many."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from config.loader import load_config
from config.settings import Config, ConfigError
from support.gateway import make_certificate, trusting, until
from support.rawclient import RawClient
from transport.tls import Certificate, HandshakeReader, Handshakes, make_context, read_certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")

LONG_S = 3600.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two certificates, `server` and `renewed`."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificate(folder)
    make_certificate(folder, "renewed")
    return folder


def configured(certificate: Path, key: Path | None = None) -> Config:
    key = key or certificate.with_suffix(".key")
    return load_config({"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(key), "DATA_DIR": "/x"})


def certificate_of(folder: Path) -> Certificate:
    return Certificate(configured(folder / "server.crt"))


# --- Contexts ---


def test_without_a_certificate_there_is_no_context() -> None:
    assert make_context(load_config({"DATA_DIR": "/x"})) is None
    assert read_certificate(load_config({"DATA_DIR": "/x"})) is None


def test_tls_1_2_is_the_minimum(folder: Path) -> None:
    assert certificate_of(folder).context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("certificate", "key"), [("none", "none"), ("server.key", "server.key"), ("server.crt", "renewed.key")]
)
def test_an_unusable_certificate_is_a_config_error(folder: Path, certificate: str, key: str) -> None:
    with pytest.raises(ConfigError, match=r"^TLS_CERT_FILE, TLS_KEY_FILE: the certificate cannot be used: "):
        make_context(configured(folder / certificate, folder / key))


# --- Handshakes ---


class Server:
    """A listener that secures its connections, echoes what is received, and counts the secured connections."""

    def __init__(self, handshakes: Handshakes, port: int) -> None:
        self.handshakes = handshakes
        self.port = port
        self.secured: list[tuple[asyncio.StreamWriter, asyncio.Transport]] = []
        self._clients: list[RawClient] = []

    def serve(self, writer: asyncio.StreamWriter, transport: asyncio.Transport, received: bytes) -> None:
        self.secured.append((writer, transport))
        transport.write(b"echo:" + received)

    async def client(self, tls: ssl.SSLContext | None = None) -> RawClient:
        client = await RawClient.connect(self.port, tls=tls)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        await self.handshakes.end()
        for _, transport in self.secured:
            transport.abort()
        for client in self._clients:
            client.close()
        await until(lambda: all(client.ended for client in self._clients))


@asynccontextmanager
async def serving(certificate: Certificate, timeout_s: float = LONG_S, limit: int = 100) -> AsyncIterator[Server]:
    handshakes = Handshakes(certificate, timeout_s, limit)
    listener = await asyncio.start_server(lambda reader, writer: handshakes.begin(writer, server.serve), "127.0.0.1", 0)
    server = Server(handshakes, listener.sockets[0].getsockname()[1])
    try:
        yield server
    finally:
        listener.close()
        await server.close()


def run(play: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(play(), 60))  # type: ignore[arg-type]


def test_a_secured_connection_is_handed_over(folder: Path) -> None:
    trust = trusting(folder / "server.crt")
    trust.set_alpn_protocols(["h2", "http/1.1"])

    async def play() -> None:
        async with serving(certificate_of(folder)) as server:
            client = await server.client(trust)
            tls = cast(ssl.SSLObject, client.transport.get_extra_info("ssl_object"))
            assert tls.selected_alpn_protocol() == "http/1.1"
            assert await client.take(5) == b"echo:"
            await until(lambda: len(server.handshakes) == 0)
            client.close()

    run(play)


@pytest.mark.parametrize("leave", [RawClient.close, RawClient.reset])
def test_a_client_that_leaves_ends_its_handshake(folder: Path, leave: Callable[[RawClient], None]) -> None:
    async def play() -> None:
        async with serving(certificate_of(folder)) as server:
            client = await server.client()
            await until(lambda: len(server.handshakes) == 1)
            leave(client)
            await until(lambda: len(server.handshakes) == 0)
            assert server.secured == []

    run(play)


def test_plain_http_ends_the_connection(folder: Path) -> None:
    async def play() -> None:
        async with serving(certificate_of(folder)) as server:
            client = await server.client()
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            await client.until(lambda: bool(client.ended))
            await until(lambda: len(server.handshakes) == 0)
            assert server.secured == []

    run(play)


def test_a_handshake_ends_after_the_timeout(folder: Path) -> None:
    async def play() -> None:
        async with serving(certificate_of(folder), timeout_s=0.05) as server:
            client = await server.client()
            await client.until(lambda: bool(client.ended))
            await until(lambda: len(server.handshakes) == 0)

    run(play)


def test_above_the_limit_the_oldest_handshake_is_aborted(folder: Path) -> None:
    async def play() -> None:
        async with serving(certificate_of(folder), limit=2) as server:
            silent = []
            for _ in range(4):
                silent.append(await server.client())
                await until(lambda: len(server.handshakes) == min(len(silent), 2))
            await until(lambda: [bool(client.ended) for client in silent] == [True, True, False, False])
            assert await (await server.client(trusting(folder / "server.crt"))).take(5) == b"echo:"

    run(play)


def test_end_aborts_all_handshakes(folder: Path) -> None:
    async def play() -> None:
        async with serving(certificate_of(folder)) as server:
            client = await server.client()
            await until(lambda: len(server.handshakes) == 1)
            await server.handshakes.end()
            await client.until(lambda: bool(client.ended))
            await until(lambda: len(server.handshakes) == 0)

    run(play)


class Previous(asyncio.Protocol):
    lost = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


def test_bytes_after_a_handshake_are_collected_and_a_lost_connection_is_forwarded() -> None:
    previous = Previous()
    reader = HandshakeReader(previous)
    reader.data_received(b"GET ")
    reader.data_received(b"/")
    assert (reader.received, previous.lost) == (b"GET /", 0)
    reader.connection_lost(None)
    assert previous.lost == 1


# --- Renewed certificates ---


def test_a_renewed_certificate_is_used_by_later_connections(folder: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "server.crt")
    copy(folder, "server", tmp_path)

    async def play() -> None:
        certificate = read_certificate(config)
        assert certificate is not None
        async with serving(certificate) as server:
            assert await (await server.client(trusting(folder / "server.crt"))).take(5) == b"echo:"
            copy(folder, "renewed", tmp_path)
            certificate.reload()
            assert certificate.expires_at > 0
            with pytest.raises(ssl.SSLCertVerificationError):
                await server.client(trusting(folder / "server.crt"))
            assert await (await server.client(trusting(folder / "renewed.crt"))).take(5) == b"echo:"

    run(play)


@pytest.mark.parametrize("broken", ["another certificate's key", "no certificate"])
def test_an_unusable_renewed_certificate_is_logged_and_the_old_one_stays(
    folder: Path, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tmp_path / "server.crt")
    copy(folder, "server", tmp_path)

    async def play() -> None:
        certificate = read_certificate(config)
        assert certificate is not None
        renewed = (folder / "renewed.crt").read_bytes() if broken == "another certificate's key" else b"none\n"
        (tmp_path / "server.crt").write_bytes(renewed)
        certificate.reload()
        assert certificate.expires_at == 0
        async with serving(certificate) as server:
            assert await (await server.client(trusting(folder / "server.crt"))).take(5) == b"echo:"

    run(play)
    assert [record.getMessage()[:45] for record in caplog.records] == ["TLS: the certificate cannot be read again, th"]


def copy(source: Path, name: str, target: Path) -> None:
    for suffix in ("crt", "key"):
        (target / f"server.{suffix}").write_bytes((source / f"{name}.{suffix}").read_bytes())
