"""The gateway's own requests to llama-server: send a request, read the response whole."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from http1.bodies import Body, response_body
from http1.grammar import ResponseHead, parse_response_head, response_framing
from transport.backend_protocol import BackendProtocol
from transport.pool import ConnectionPool
from transport.waiter import Waiter

_MAX_PAGE_BYTES = 1 << 20


class PageTooLong(GatewayError):
    """A page is longer than what is read of one."""

    def __init__(self) -> None:
        super().__init__(BACKEND_MALFORMED, f"A page of the backend is longer than {_MAX_PAGE_BYTES} bytes.")


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A response that came whole: its head, and its body in pieces as they came."""

    head: ResponseHead
    pieces: tuple[bytes, ...]


class BackendFetcher:
    """Requests pages of the backend, each on a connection of its own.

    A kept connection may just have been closed, and what the gateway asks for once in a while is not worth a retry.
    """

    def __init__(self, pool: ConnectionPool, own_fields: bytes, timeout_s: float) -> None:
        """`own_fields` are the field lines that every request to the backend carries."""
        self._pool = pool
        self._own_fields = own_fields
        self._timeout_s = timeout_s

    async def __call__(self, target: bytes) -> tuple[int, bytes]:
        """GET a page: return status and body. Raises GatewayError, PageTooLong among them."""
        request = b"GET %b HTTP/1.1\r\n%b\r\n" % (target, self._own_fields)
        try:
            return await asyncio.wait_for(self._send(b"GET", request), self._timeout_s)
        except asyncio.TimeoutError:
            raise GatewayError(BACKEND_TIMEOUT) from None

    async def post(self, target: bytes, body: bytes) -> tuple[int, bytes]:
        """POST a JSON body: return status and body. The caller limits its wait. Raises GatewayError."""
        lines = b"%bContent-Type: application/json\r\nContent-Length: %d\r\n" % (self._own_fields, len(body))
        return await self._send(b"POST", b"POST %b HTTP/1.1\r\n%b\r\n%b" % (target, lines, body))

    async def listen(self, target: bytes, on_data: Callable[[], None]) -> None:
        """GET a stream, and call `on_data` whenever something of it comes, until it ends. Raises GatewayError."""
        backend = await self._pool.connect(shows_work=False)
        try:
            request = b"GET %b HTTP/1.1\r\n%b\r\n" % (target, self._own_fields)
            head = parse_response_head(await backend.send_request(request).wait())
            if head.status != HTTPStatus.OK:
                raise GatewayError(BACKEND_UNAVAILABLE, f"The backend answered {head.status}.")
            finished: Waiter[None] = Waiter()
            backend.pass_to(lambda data: on_data(), lambda cleanly: finished.set_result(None))
            on_data()  # something may have come with the head, or before it
            if not backend.ended:
                await finished.wait()
        finally:
            backend.abort()

    async def file(self, target: bytes, lines: bytes, most_bytes: int) -> FetchedFile:
        """GET a file, with further field lines. It is no sign of work: the backend sends it even if its loop hangs.

        Raises GatewayError: BACKEND_MALFORMED if it is longer than allowed, BACKEND_UNAVAILABLE if it is cut.
        """
        request = b"GET %b HTTP/1.1\r\n%b%b\r\n" % (target, self._own_fields, lines)
        try:
            return await asyncio.wait_for(self._fetch_file(request, most_bytes), self._timeout_s)
        except asyncio.TimeoutError:
            raise GatewayError(BACKEND_TIMEOUT) from None

    async def _fetch_file(self, request: bytes, most_bytes: int) -> FetchedFile:
        backend = await self._pool.connect(shows_work=False)
        try:
            head = parse_response_head(await backend.send_request(request).wait())
            body = response_body(response_framing(head, b"GET"))
            return FetchedFile(head, await read_file(backend, body, most_bytes))
        finally:
            backend.abort()

    async def status(self, target: bytes) -> int:
        return (await self(target))[0]

    async def _send(self, method: bytes, request: bytes) -> tuple[int, bytes]:
        backend = await self._pool.connect()
        try:
            head = parse_response_head(await backend.send_request(request).wait())
            body = response_body(response_framing(head, method))
            page = await read_page(backend, body)
            if len(page) > _MAX_PAGE_BYTES:
                raise PageTooLong
            if not (body.done or (backend.closed_cleanly and body.ends_at_close())):
                raise GatewayError(BACKEND_UNAVAILABLE, "The backend closed in the middle of a page.")
            return head.status, page
        finally:
            backend.abort()


async def read_file(backend: BackendProtocol, body: Body, most_bytes: int) -> tuple[bytes, ...]:
    """Read a response body whole, in a task. Raises as `BackendFetcher.file` does."""
    finished: Waiter[None] = Waiter()
    pieces: list[bytes] = []
    left = most_bytes

    def receive(data: bytes) -> None:
        nonlocal left
        try:
            piece = body.feed(data)
        except GatewayError as error:
            finished.set_exception(error)
            return
        left -= len(piece)
        if piece:
            pieces.append(piece)
        if left < 0:
            finished.set_exception(GatewayError(BACKEND_MALFORMED, f"The file is longer than {most_bytes} bytes."))
        elif body.done:
            finished.set_result(None)

    def end(cleanly: bool) -> None:
        if cleanly and body.ends_at_close():
            finished.set_result(None)
        else:
            finished.set_exception(GatewayError(BACKEND_UNAVAILABLE, "The backend closed in the middle of a file."))

    backend.pass_to(receive, end)
    receive(backend.take_received())
    if backend.ended:
        end(backend.closed_cleanly)
    await finished.wait()
    return tuple(pieces)


async def read_page(backend: BackendProtocol, body: Body) -> bytes:
    """Read a response body whole, in a task; a little more than 1 MiB of one that is longer.

    Raises BACKEND_MALFORMED. A body that is cut is returned as far as it came.
    """
    finished: Waiter[None] = Waiter()
    page = bytearray()

    def receive(data: bytes) -> None:
        try:
            page.extend(body.feed(data))
        except GatewayError as error:
            finished.set_exception(error)
            return
        if body.done or len(page) > _MAX_PAGE_BYTES:
            finished.set_result(None)

    backend.pass_to(receive, lambda cleanly: finished.set_result(None))
    receive(backend.take_received())
    if backend.ended:
        finished.set_result(None)
    await finished.wait()
    return bytes(page)
