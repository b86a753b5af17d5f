"""What a browser gets at /: llama-server's page, or one of the gateway's own while there is none.

The gateway's own pages are files of scripts/pages/, each whole in itself. One waits while the model loads; the other is
a small chat for a llama-server that was built or started without its page.
"""

from http import HTTPStatus

from backend.readiness import READY, Readiness
from core.errors import BACKEND_TIMEOUT, LOADING, ROUTE_NOT_FOUND, GatewayError, PeerGone
from policy.prepared_request import PreparedRequest
from proxy.own_page import own_page
from proxy.page_files import PageFile, PageFiles
from proxy.response import Response
from transport.client_protocol import ClientProtocol

_PIECE_BYTES = 64 << 10
_PIECE_S = 30.0  # for a client to take most of one
_RELOAD_S = 2
_INDEX = b"/"
_PROBE = b"/build.json"  # needs llama-server to be ready if its page is in a folder
_SENT = (HTTPStatus.OK, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)  # the latter if a client does not take gzip


class Pages:
    """Answers requests for the page and its files."""

    def __init__(self, files: PageFiles, readiness: Readiness, connect_s: float) -> None:
        """`connect_s` bounds the wait for a file, in seconds."""
        self._files = files
        self._readiness = readiness
        self._connect_s = connect_s
        self._loading = own_page("loading.html")
        self._chat = own_page("chat.html")

    async def answer_index(self, client: ClientProtocol, response: Response, prepared: PreparedRequest) -> bool:
        """Answer a request for /; return whether there is a page for this client.

        A service worker of llama-server's page asks for / as well, with a query, and would keep whatever is a success.
        Raises LOADING or ROUTE_NOT_FOUND for it if llama-server has no page now.
        """
        found = await self._find_index(client, prepared)
        if found is not None and found.status == HTTPStatus.OK:
            await self._send(client, response, prepared, found)
            return True
        is_absent = found is not None and self._readiness.state == READY
        if b"text/html" in prepared.accept:
            self._send_own(response, prepared, is_absent=is_absent)
            return True
        if b"?" in prepared.target:
            raise GatewayError(ROUTE_NOT_FOUND if is_absent else LOADING)
        return False

    async def answer_file(self, client: ClientProtocol, response: Response, prepared: PreparedRequest) -> None:
        """Answer a request for one of the page's files. Raises ROUTE_NOT_FOUND, LOADING, or why it cannot be had."""
        path = prepared.target.partition(b"?")[0]
        if path == b"/index.html" and await self.answer_index(client, response, prepared):
            return
        try:
            found = await self._find(client, prepared, path)
        except GatewayError:
            if self._readiness.state == READY:
                raise
            raise GatewayError(LOADING) from None
        if found.status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise GatewayError(LOADING)
        if found.status not in _SENT:
            raise GatewayError(ROUTE_NOT_FOUND)
        await self._send(client, response, prepared, found)

    async def _find(self, client: ClientProtocol, prepared: PreparedRequest, path: bytes) -> PageFile:
        gzip = prepared.accepts_gzip
        kept = self._files.kept(path, gzip=gzip)
        if kept is not None:
            return kept
        return await client.run(self._files.find(path, gzip=gzip), self._connect_s, BACKEND_TIMEOUT)

    async def _find_index(self, client: ClientProtocol, prepared: PreparedRequest) -> PageFile | None:
        """Return llama-server's page, or its answer to the request for it; None if it has no page by now."""
        try:
            found = await self._find(client, prepared, _INDEX)
            if self._readiness.state == READY or found.status != HTTPStatus.OK:
                return found
            # While the model loads, its page may be there without its files.
            probed = await self._find(client, prepared, _PROBE)
        except GatewayError:
            return None
        return None if probed.status == HTTPStatus.SERVICE_UNAVAILABLE else found

    def _send_own(self, response: Response, prepared: PreparedRequest, *, is_absent: bool) -> None:
        if is_absent:
            self._chat.send(response, prepared)
        else:
            self._loading.send(response, prepared, 503, ((b"Retry-After", b"%d" % _RELOAD_S),))

    async def _send(
        self, client: ClientProtocol, response: Response, prepared: PreparedRequest, found: PageFile
    ) -> None:
        """Send a file as fast as the client takes it, so that little of it waits in memory for each client."""
        if found.status == HTTPStatus.OK and found.etag and has_copy(prepared.etags, found.etag):
            response.begin(304, None, found.fields)
            return
        response.begin(found.status, found.length, found.fields)
        if prepared.method == b"HEAD":
            return
        try:
            for piece in found.pieces:
                for at in range(0, len(piece), _PIECE_BYTES):
                    client.write(piece[at : at + _PIECE_BYTES])
                    await client.drain(_PIECE_S)
        except GatewayError:  # it gives way to others, or the gateway ends; nothing can be said within a file
            raise PeerGone from None


def has_copy(etags: bytes, etag: bytes) -> bool:
    """Whether one of a client's entity tags is that of a file (RFC 9110 section 13.1.2: a weak comparison)."""
    return any(each.strip().removeprefix(b"W/") in (etag.removeprefix(b"W/"), b"*") for each in etags.split(b","))
