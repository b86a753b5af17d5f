"""The files of llama-server's page, fetched when they are asked for, and kept for a minute.

Anybody may ask for them. So they are shared in memory: however many clients read them, and however slowly, llama-server
is asked for each one that it has once a minute, and for few at once.
"""

import asyncio
import re
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from backend.fetch import FetchedFile
from core.errors import LOADING, Fields, GatewayError
from proxy.own_page import GUARDS, hashes

KEPT_S = 60.0
MAX_FILE_BYTES = 16 << 20
MAX_KEPT_BYTES = 32 << 20
MAX_AT_ONCE = 2
MAX_WAITING = 64
_MAX_INDEX_BYTES = 1 << 20
# What its response says of a file; the rest, such as its origin policy, is the gateway's to say.
_PASSED = frozenset(
    (
        b"content-type",
        b"content-encoding",
        b"cache-control",
        b"etag",
        b"last-modified",
        b"cross-origin-embedder-policy",
        b"cross-origin-opener-policy",
    )
)
_INLINE_SCRIPT = re.compile(rb"<script(?:\s[^>]*)?>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)
_POLICY = (
    "default-src 'self'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


class Fetch(Protocol):
    """Asks the backend for a file; see `BackendFetcher.file`."""

    def __call__(self, target: bytes, lines: bytes, most_bytes: int) -> Coroutine[Any, Any, FetchedFile]: ...


@dataclass(frozen=True, slots=True)
class PageFile:
    """The backend's answer to a request for a file. `fields` are those of the response, without its length."""

    status: int
    fields: Fields
    etag: bytes
    pieces: tuple[bytes, ...]
    length: int
    fetched_s: float


class PageFiles:
    """The files that are kept, and those that are being fetched."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._fetch = fetch
        self._clock = clock
        self._kept: dict[tuple[bytes, bool], PageFile] = {}
        self._fetching: dict[tuple[bytes, bool], asyncio.Task[PageFile]] = {}
        self._free: asyncio.Semaphore | None = None

    def kept(self, path: bytes, *, gzip: bool) -> PageFile | None:
        """Return a file if it is in memory. `gzip`: the client accepts this coding."""
        return self._kept.get((path, gzip))

    async def find(self, path: bytes, *, gzip: bool) -> PageFile:
        """Return a file from memory or from the backend. Runs in a task. Raises GatewayError if there is no answer."""
        key = path, gzip
        found = self._kept.get(key)
        if found is not None:
            return found
        task = self._fetching.get(key)
        if task is None:
            if len(self._fetching) >= MAX_WAITING:
                # Not QUEUE_FULL, of which operators are told: anybody can ask for many files.
                raise GatewayError(LOADING, "Too many files of the page are being fetched.")
            task = self._fetching[key] = asyncio.ensure_future(self._obtain(key))
            task.add_done_callback(lambda done: self._end(key, done))
        return await asyncio.shield(task)

    async def _obtain(self, key: tuple[bytes, bool]) -> PageFile:
        path, gzip = key
        if self._free is None:
            self._free = asyncio.Semaphore(MAX_AT_ONCE)
        async with self._free:
            fetched = await self._fetch(path, b"Accept-Encoding: gzip\r\n" if gzip else b"", MAX_FILE_BYTES)
        return page_file(path, fetched, self._clock())

    def _end(self, key: tuple[bytes, bool], done: "asyncio.Task[PageFile]") -> None:
        del self._fetching[key]
        if done.cancelled() or done.exception() is not None:
            return
        found = done.result()
        if found.status == 200:
            self._kept[key] = found
            self._bound()

    def _bound(self) -> None:
        """Drop the files that were fetched first, until those that are left may be kept."""
        total = sum(each.length for each in self._kept.values())
        for key in list(self._kept):
            if total <= MAX_KEPT_BYTES:
                return
            total -= self._kept.pop(key).length

    def forget(self) -> None:
        """Drop all files: the backend may return with others."""
        self._kept.clear()

    def on_tick(self, now_s: float) -> None:
        """Drop the files that have been kept long enough."""
        if self._kept:
            oldest_s = now_s - KEPT_S
            self._kept = {key: each for key, each in self._kept.items() if each.fetched_s > oldest_s}

    async def close(self) -> None:
        """Give up what is being fetched."""
        tasks = list(self._fetching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def page_file(path: bytes, fetched: FetchedFile, fetched_s: float) -> PageFile:
    """Return the file with the fields that a client gets: those of the backend's that describe it, and the guards."""
    head = fetched.head
    fields = tuple(
        [field for field, lower in zip(head.fields, head.names, strict=True) if lower in _PASSED] + list(GUARDS)
    )
    if b"cache-control" not in head.names:
        immutable = path.startswith(b"/_app/immutable/")
        fields += ((b"Cache-Control", b"public, max-age=31536000, immutable" if immutable else b"no-cache"),)
    if b"content-encoding" in head.known:
        fields += ((b"Vary", b"Accept-Encoding"),)
    content_type = head.known.get(b"content-type", (b"",))[0]
    if content_type.startswith(b"text/html"):
        fields += ((b"Content-Security-Policy", content_policy(fetched)),)
    return PageFile(
        status=head.status,
        fields=fields,
        etag=next((value for (_, value), lower in zip(head.fields, head.names, strict=True) if lower == b"etag"), b""),
        pieces=fetched.pieces,
        length=sum(map(len, fetched.pieces)),
        fetched_s=fetched_s,
    )


def content_policy(fetched: FetchedFile) -> bytes:
    """Return the Content-Security-Policy of a page: nothing from elsewhere, and no script but its own.

    The scripts in the page itself are allowed by their hashes.
    """
    page = b"".join(fetched.pieces)[:_MAX_INDEX_BYTES]
    if fetched.head.known.get(b"content-encoding", (b"",))[0].lower() == b"gzip":
        try:
            page = zlib.decompressobj(wbits=31).decompress(page, _MAX_INDEX_BYTES)
        except zlib.error:
            page = b""
    return _POLICY.format(hashes="".join(f" '{each}'" for each in hashes(_INLINE_SCRIPT, page))).encode()
