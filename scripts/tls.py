"""TLS towards the clients: the certificate, and the handshakes, of which not all that begin come to an end."""

import asyncio
import logging
import ssl
from collections.abc import Callable

from config import Config, ConfigError
from waiting import end_tasks

log = logging.getLogger("gateway")

# Gets the connection's writer, the transport to use from now on, and what the client has said so far.
Done = Callable[[asyncio.StreamWriter, asyncio.Transport, bytes], None]


class Usher(asyncio.Protocol):
    """Takes what comes right behind a handshake, before anybody knows that it has ended.

    `former` is the writer's own protocol, which lets the writer go when it is told that the connection is lost.
    """

    def __init__(self, former: asyncio.BaseProtocol) -> None:
        self._former = former
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._former.connection_lost(exc)


class Handshakes:
    """Those under way. They are no connections yet, and anybody can begin one.

    Where there are `most` and one more begins, the oldest ends: whoever means it gets through a crowd that does not.
    """

    def __init__(self, context: ssl.SSLContext, seconds: float, most: int) -> None:
        """Each may take so many `seconds`."""
        self._context = context
        self._seconds = seconds
        self._most = most
        self._writers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # the oldest first

    def begin(self, writer: asyncio.StreamWriter, done: Done) -> None:
        """Secure a connection that has just been accepted; `done` gets it."""
        if len(self._writers) >= self._most:
            oldest = next(iter(self._writers))
            oldest.cancel()
            self._writers.pop(oldest).transport.abort()  # a task that is cancelled before it begins does not
        task = asyncio.ensure_future(self._shake(writer, done))
        self._writers[task] = writer
        task.add_done_callback(lambda task: self._writers.pop(task, None))

    async def _shake(self, writer: asyncio.StreamWriter, done: Done) -> None:
        plain = writer.transport
        usher = Usher(plain.get_protocol())
        # Nothing can have been read yet: a task's first step comes before the first event of a transport that has been
        # made in the same turn.
        try:
            secured = await asyncio.get_running_loop().start_tls(
                plain, usher, self._context, server_side=True, ssl_handshake_timeout=self._seconds
            )
        except OSError as error:  # the client's mistake, or it has left, or its time is up
            error.with_traceback(None)  # whose frames hold what holds the error: a cycle, and 300 KiB
            secured = None
        if secured is None or secured.is_closing():
            plain.abort()
            usher.connection_lost(None)  # which asyncio tells those only whose handshake has ended
        else:
            done(writer, secured, usher.received)

    async def end(self) -> None:
        for writer in self._writers.values():
            writer.transport.abort()
        await end_tasks(self._writers)


def make_context(config: Config) -> ssl.SSLContext | None:
    """TLS 1.2 or later with the certificate of the settings; None where there is none. Raises ConfigError."""
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


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Read a renewed certificate; connections from now on use it. One that cannot be read changes nothing."""
    assert config.listen.tls_cert_file is not None
    try:
        make_context(config)  # first: a context takes a new certificate before it finds that the key does not fit
        context.load_cert_chain(config.listen.tls_cert_file, config.listen.tls_key_file)
    except (ConfigError, OSError, ssl.SSLError) as error:
        log.error("TLS: the certificate cannot be read again, the old one stays: %s", error)
