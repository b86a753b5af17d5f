"""TLS towards clients: the certificate, and a limited number of handshakes."""

import asyncio
import logging
import ssl
from collections.abc import Callable

from config.settings import Config, ConfigError
from core.summed_log import SummedLog
from core.tasks import end_tasks
from transport.certificate import expires_at

log = logging.getLogger("gateway")

# Receives the connection's writer, the transport to use from now on, and the bytes that the client has sent so far.
OnSecured = Callable[[asyncio.StreamWriter, asyncio.Transport, bytes], None]


class HandshakeReader(asyncio.Protocol):
    """Collects the bytes that arrive directly after a handshake, before `start_tls` returns.

    `previous` is the writer's protocol. The writer is closed when its protocol learns that the connection is lost.
    """

    def __init__(self, previous: asyncio.BaseProtocol) -> None:
        self._previous = previous
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._previous.connection_lost(exc)


class Handshakes:
    """The handshakes in progress, of which any client can start any number.

    If there are `limit` and one more starts, the oldest is aborted: a client that completes its handshake is served
    despite any number of clients that do not. Each handshake may take `timeout_s`.
    """

    def __init__(self, certificate: "Certificate", timeout_s: float, limit: int) -> None:
        self._certificate = certificate
        self._timeout_s = timeout_s
        self._limit = limit
        self._writers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # the oldest first
        self.gave_way = SummedLog("MAX_CONNECTIONS: aborted %d TLS handshakes to accept new connections")

    def __len__(self) -> int:
        return len(self._writers)

    def begin(self, writer: asyncio.StreamWriter, on_secured: OnSecured) -> None:
        """Start the handshake on a connection that has just been accepted."""
        if len(self._writers) >= self._limit:
            oldest = next(iter(self._writers))
            oldest.cancel()
            self.gave_way.add()
            self._writers.pop(oldest).transport.abort()  # a task that is cancelled before its first step does not
        task = asyncio.ensure_future(self._secure(writer, on_secured))
        self._writers[task] = writer
        task.add_done_callback(lambda task: self._writers.pop(task, None))

    async def _secure(self, writer: asyncio.StreamWriter, on_secured: OnSecured) -> None:
        plain = writer.transport
        reader = HandshakeReader(plain.get_protocol())
        # Nothing can have been read yet: a task's first step precedes the first event of a transport that was created
        # in the same iteration of the loop.
        try:
            secured = await asyncio.get_running_loop().start_tls(
                plain, reader, self._certificate.context, server_side=True, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:  # the client made an error, left, or exceeded the timeout
            error.with_traceback(None)  # its frames refer to the error: a reference cycle that keeps 300 KiB
            secured = None
        if secured is None or secured.is_closing():
            plain.abort()
            reader.connection_lost(None)  # asyncio calls this only after a completed handshake
        else:
            on_secured(writer, secured, reader.received)

    async def end(self) -> None:
        """Abort all handshakes."""
        for writer in self._writers.values():
            writer.transport.abort()
        await end_tasks(self._writers)


def make_context(config: Config) -> ssl.SSLContext | None:
    """Return a context for TLS 1.2 or later with the configured certificate; None if there is none.

    Raises ConfigError if the certificate cannot be used.
    """
    if config.listen.tls_cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.listen.tls_cert_file, config.listen.tls_key_file)
    except (OSError, ssl.SSLError) as error:
        complaint = f"TLS_CERT_FILE, TLS_KEY_FILE: the certificate cannot be used: {error}"
        raise ConfigError((complaint,)) from error
    return context


class Certificate:
    """The context for future connections, with the certificate as last read. Raises ConfigError if it cannot be used.

    A renewed certificate gets a new context: the old one may be in use on another thread than `reload`.
    """

    def __init__(self, config: Config) -> None:
        context = make_context(config)
        assert context is not None
        self.context = context
        self.expires_at = 0.0  # in seconds since 1970; 0 until `reload`
        self._config = config

    def reload(self) -> str:
        """Read the certificate again. If it cannot be used, log that, keep the old one, and return why; else ""."""
        assert self._config.listen.tls_cert_file is not None
        try:
            self.context = make_context(self._config) or self.context
        except ConfigError as error:
            log.error("TLS: the certificate cannot be read again, the old one stays: %s", error)
            return f"{error}; the old one stays"
        self.expires_at = expires_at(self._config.listen.tls_cert_file)
        return ""


def read_certificate(config: Config) -> Certificate | None:
    """Return the certificate, None if none is configured. Raises ConfigError if it cannot be used."""
    return None if config.listen.tls_cert_file is None else Certificate(config)
