"""One file from a URL to a local .part: resumed across cut connections and boots, never two versions in one file.

It knows nothing of models but their magic: naming, digests and the final rename are model_files'. It blocks, and runs
in a process of its own.
"""

import base64
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

MAGIC = b"GGUF"
CHUNK_BYTES = 1 << 18
SOCKET_TIMEOUT_S = 60
PROGRESS_EVERY_S = 5.0
FIRST_PAUSES_S = (0.5, 1.0)
LATER_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
LOCAL_FAULTS = frozenset({errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EISDIR, errno.ENOSPC, errno.EROFS})
WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})

log = logging.getLogger(__name__)


class ModelError(Exception):
    """There is no model to load; the text is the one message that says why."""


class Interrupted(Exception):
    """The transfer stopped half-way for a reason that another try may not meet."""


@dataclass(frozen=True)
class Origin:
    """What tells one version of a remote file from another; kept beside the .part."""

    url_sha256: str
    validator: str
    total_bytes: int | None

    def resumes(self, other: "Origin") -> bool:
        """Tell whether bytes from `other` continue bytes from here; what neither side tells cannot differ."""
        known = [(self.validator, other.validator), (self.total_bytes, other.total_bytes)]
        return self.url_sha256 == other.url_sha256 and all(a == b for a, b in known if a and b)


def shown(url: str) -> str:
    """The part of a URL that may be logged: neither user, password nor query (which may be a signature)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def human(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3f} GB" if size_bytes < 100 else f"{size_bytes:.0f} GB"


def magic_complaint(head: bytes) -> str | None:
    """Say in words why these first bytes are not a GGUF file's; None where they are (or are too few to tell)."""
    if head.startswith(MAGIC):
        return None
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself (fetch it with git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a GGUF file"
    return "is not a GGUF file (its first four bytes are not GGUF)" if head else "is empty"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to a plain http that nothing vouches for."""

    def __init__(self, trust_plain: bool) -> None:
        self._trust_plain = trust_plain

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:") and not self._trust_plain:
            raise ModelError(f"{shown(req.full_url)} redirects to plain http, which needs MODEL_SHA256")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


class Download:
    """The way of one URL to one .part file. `sleep` and `clock` (monotonic seconds) are there for tests."""

    def __init__(
        self,
        url: str,
        part: Path,
        *,
        digest_known: bool,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, self._authorization = _split_credentials(url)
        self._part = part
        self._record = part.with_name(part.name + ".json")
        self._digest_known = digest_known
        self._sleep = sleep
        self._clock = clock
        self._opener = urllib.request.build_opener(_Redirects(digest_known))
        self._whole = False

    def run(self) -> None:
        """Fetch until the .part is whole. Raises ModelError where that will not succeed."""
        pauses, moved = iter(FIRST_PAUSES_S), False
        while not self._whole:
            before_bytes = self._have()
            try:
                self._attempt()
            except (Interrupted, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in LOCAL_FAULTS:
                    raise ModelError(f"{self._part} cannot be written: {error.strerror}") from None
                if self._have() > before_bytes:
                    pauses, moved = iter(LATER_PAUSES_S), True
                self._pause(next(pauses, None), _reason(error), moved)
        self._record.unlink(missing_ok=True)

    def _pause(self, pause_s: float | None, reason: str, moved: bool) -> None:
        if pause_s is None:
            kept = " (what came is kept and will be resumed)" if self._have() else ""
            raise ModelError(f"{shown(self._url)} cannot be fetched: {reason}{kept}")
        log.warning("download %s: %s; trying again in %g s", "broke off" if moved else "failed", reason, pause_s)
        self._sleep(pause_s)

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    # One attempt

    def _attempt(self) -> None:
        origin = self._load_origin()
        have_bytes = self._have()
        try:
            with self._opener.open(self._request(have_bytes, origin), timeout=SOCKET_TIMEOUT_S) as response:
                self._take(response, have_bytes, origin)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, have_bytes)

    def _request(self, have_bytes: int, origin: Origin | None) -> urllib.request.Request:
        fields = {"User-Agent": "llama-gateway", "Accept-Encoding": "identity"}
        if self._authorization:
            fields["Authorization"] = self._authorization
        if have_bytes:
            fields["Range"] = f"bytes={have_bytes}-"
            if origin and origin.validator:
                fields["If-Range"] = origin.validator
        return urllib.request.Request(self._url, headers=fields)

    def _refused(self, error: urllib.error.HTTPError, have_bytes: int) -> None:
        if error.code == 416 and have_bytes:
            total = re.fullmatch(r"bytes \*/([0-9]+)", error.headers.get("Content-Range", ""))
            if total and int(total[1]) == have_bytes:
                self._whole = True
                return
            self._forget()
            raise Interrupted("the part at hand does not belong to the file as it is now")
        words = f"HTTP status {error.code} ({error.reason})"
        if error.code in WORTH_ANOTHER_TRY:
            raise Interrupted(words)
        raise ModelError(f"{shown(self._url)} cannot be fetched: {words}")

    def _take(self, response: Any, have_bytes: int, origin: Origin | None) -> None:
        start_bytes, now = self._start(response, have_bytes)
        if start_bytes and origin and not origin.resumes(now):
            self._forget()
            raise Interrupted("the file has changed since the part at hand was fetched")
        if not self._digest_known and now.total_bytes is None and not getattr(response, "chunked", False):
            raise ModelError(f"{shown(self._url)} does not tell the file's length: set MODEL_SHA256")
        self._check_room(now.total_bytes, start_bytes)
        with self._part.open("r+b" if start_bytes else "wb") as file:
            self._record.write_text(json.dumps(now.__dict__))
            file.seek(start_bytes)
            self._copy(response, file, now.total_bytes)
        if now.total_bytes is not None and self._have() != now.total_bytes:
            raise Interrupted(f"the connection ended after {human(self._have())} of {human(now.total_bytes)}")
        self._whole = True

    def _start(self, response: Any, have_bytes: int) -> tuple[int, Origin]:
        """Tell where in the file the body starts, and what the file is now."""
        length = response.headers.get("Content-Length", "")
        total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        start_bytes = 0
        if response.status == 206:
            match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != have_bytes:
                self._forget()
                raise Interrupted("the server sent another range than was asked for")
            start_bytes = have_bytes
            total = int(match[2]) if match[2] != "*" else total and total + have_bytes
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        return start_bytes, Origin(self._url_sha256(), validator, total)

    def _copy(self, response: Any, file: IO[bytes], total_bytes: int | None) -> None:
        have_bytes = first_bytes = file.tell()
        first_s = shown_s = self._clock()
        while chunk := response.read(CHUNK_BYTES):
            if not have_bytes and (complaint := magic_complaint(chunk)):
                self._forget()
                raise ModelError(f"what {shown(self._url)} gives {complaint}")
            file.write(chunk)
            have_bytes += len(chunk)
            now_s = self._clock()
            if now_s - shown_s >= PROGRESS_EVERY_S:
                shown_s = now_s
                log.info("%s", progress(have_bytes, total_bytes, (have_bytes - first_bytes) / (now_s - first_s)))
        file.flush()
        os.fsync(file.fileno())

    def _check_room(self, total_bytes: int | None, start_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self._part.parent).free
        if total_bytes is not None and total_bytes - start_bytes > free_bytes:
            need = human(total_bytes - start_bytes)
            raise ModelError(f"{self._part.parent} has {human(free_bytes)} free, the download needs {need}")

    # What is kept beside the part

    def _url_sha256(self) -> str:
        return hashlib.sha256(self._url.encode()).hexdigest()

    def _load_origin(self) -> Origin | None:
        """Read what the part at hand came from; None where nobody knows. Another URL's part is forgotten."""
        try:
            origin = Origin(**json.loads(self._record.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        if origin.url_sha256 != self._url_sha256():
            self._forget()
            return None
        return origin

    def _forget(self) -> None:
        self._part.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def progress(have_bytes: int, total_bytes: int | None, bytes_per_s: float) -> str:
    speed = f"{human(bytes_per_s)}/s"
    if total_bytes is None:
        return f"downloaded {human(have_bytes)}, {speed}"
    share = 100 * have_bytes // max(total_bytes, 1)
    left = f", {(total_bytes - have_bytes) / bytes_per_s:.0f} s left" if bytes_per_s else ""
    return f"downloaded {human(have_bytes)} of {human(total_bytes)} ({share} %), {speed}{left}"


def _split_credentials(url: str) -> tuple[str, str]:
    """Take user and password out of a URL, which urllib does not understand, and make them a field's value."""
    parts = urlsplit(url)
    credentials, at, place = parts.netloc.rpartition("@")
    if not at:
        return url, ""
    basic = base64.b64encode(unquote(credentials).encode()).decode()
    return urlunsplit(parts._replace(netloc=place)), f"Basic {basic}"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended early"
    return str(error) or type(error).__name__


@contextmanager
def sole_writer(part: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Wait until no other worker on the same volume writes this file; where the volume has no locks, do not wait."""
    path, told = part.with_name(f".{part.name}.lock"), False
    while True:
        with path.open("wb") as file:
            if _lock(file) and _still_there(file, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        if not told:
            log.info("another worker is fetching %s; waiting for it", part.name)
        told = True
        sleep(0.5)


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        log.warning("the models' volume has no file locks: let only one worker fetch a model at a time")
    return True


def _still_there(file: IO[bytes], path: Path) -> bool:
    """Whoever held the lock before has removed its file; a lock on a removed file keeps nobody out."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
