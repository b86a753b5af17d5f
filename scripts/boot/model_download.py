"""Downloads one file from a URL to a local .part: resumes across cut connections and boots, never mixes two versions.

Of models it knows only the GGUF magic; model_files does names, digests and the final rename. It blocks, so it runs in a
process of its own.
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
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from boot.model_errors import LOCAL_ERRORS, ModelError, ModelUnavailable, magic_complaint, redact
from boot.transfer import FetchLimits, Interrupted, RetrySchedule, TooSlow, Transfer, format_size

HEAD_BYTES = 64
CHUNK_BYTES = 1 << 18
SOCKET_TIMEOUT_S = 60
CHECK_TIMEOUT_S = 15
# The token is sent to this host only, and not to the CDN to which it redirects: that wants no token, and may log it.
HUB = "huggingface.co"
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
LOCK_POLL_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteVersion:
    """What distinguishes one version of a remote file from another. It is kept in a file next to the .part.

    `validator` is the ETag or Last-Modified field's value, empty if the server sends neither.
    """

    url_sha256: str
    validator: str
    total_bytes: int | None

    def continues(self, other: "RemoteVersion") -> bool:
        """Return whether bytes of this version can follow bytes of `other`. An unknown value is not compared."""
        pairs = [(self.validator, other.validator), (self.total_bytes, other.total_bytes)]
        return self.url_sha256 == other.url_sha256 and all(a == b for a, b in pairs if a and b)


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but from https to plain http only if a digest verifies the file.

    The Authorization field is not sent to another host, and `hub_token` to the hub alone.
    """

    def __init__(self, digest_known: bool, hub_token: str | None = None) -> None:
        self._digest_known = digest_known
        self._hub_token = hub_token

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:") and not self._digest_known:
            raise ModelError(f"{redact(req.full_url)} redirects to plain http, which needs MODEL_SHA256")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
            if self._hub_token and is_hub(newurl):
                request.add_header("Authorization", f"Bearer {self._hub_token}")
        return request


def is_hub(url: str) -> bool:
    """Return whether a URL leads to the hub itself, over TLS."""
    parts = urlsplit(url)
    return parts.scheme.lower() == "https" and parts.netloc.lower().rpartition("@")[2] in (HUB, f"{HUB}:443")


class Download:
    """The download of one URL to one .part file.

    `digest_known` says that the caller verifies the file by its SHA-256. `sleep`, `clock` (monotonic seconds) and
    `opener` are parameters for tests.
    """

    def __init__(
        self,
        url: str,
        part: Path,
        limits: FetchLimits,
        *,
        digest_known: bool,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        opener: urllib.request.OpenerDirector | None = None,
    ) -> None:
        self._url, self._authorization = _split_credentials(url)
        if limits.hub_token and not self._authorization and is_hub(url):
            self._authorization = f"Bearer {limits.hub_token}"
        self._part = part
        self._limits = limits
        self._version_file = part.with_name(part.name + ".json")
        self._digest_known = digest_known
        self._sleep = sleep
        self._clock = clock
        self._opener = opener or urllib.request.build_opener(RedirectHandler(digest_known, limits.hub_token))
        self._complete = False

    def run(self) -> None:
        """Download until the .part is complete. Raises ModelError if that will not succeed."""
        schedule, progressed = RetrySchedule(self._limits.timeout_s, self._clock), False
        while not self._complete:
            before_bytes = self._part_bytes()
            try:
                self._attempt()
            except (Interrupted, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                    raise ModelError(f"{self._part} cannot be written: {error.strerror}") from None
                if self._part_bytes() > before_bytes and not isinstance(error, TooSlow):
                    schedule.restart()
                    progressed = True
                retry_after_s = getattr(error, "retry_after_s", 0.0)
                self._pause(schedule.pause_s(retry_after_s), retry_after_s, _reason(error), progressed)
        self._version_file.unlink(missing_ok=True)

    def check(self) -> None:
        """Read the first bytes of the remote file, in one attempt; write nothing. Raises ModelError."""
        try:
            with self._opener.open(self._request(0, None), timeout=CHECK_TIMEOUT_S) as response:
                self._check_length(response, self._parse_head(response, 0)[1])
                complaint = magic_complaint(response.read(HEAD_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                status = f"HTTP status {error.code} ({error.reason})"
            kind = ModelUnavailable if error.code in RETRIED_STATUSES else ModelError
            raise kind(f"{redact(self._url)} cannot be fetched: {status}{self._token_hint(error.code)}") from None
        except (Interrupted, OSError, http.client.HTTPException) as error:
            raise ModelUnavailable(f"{redact(self._url)} cannot be fetched: {_reason(error)}") from None
        if complaint:
            raise ModelError(f"the file at {redact(self._url)} {complaint}")

    def _pause(self, pause_s: float | None, retry_after_s: float, reason: str, progressed: bool) -> None:
        if pause_s is None:
            kept = " (the part that has arrived is kept and will be resumed)" if self._part_bytes() else ""
            asked = f", which asks to wait {retry_after_s:.0f} s" if retry_after_s else ""
            limit = f"giving up after {self._limits.timeout_s:g} s without progress (MODEL_FETCH_TIMEOUT)"
            raise ModelUnavailable(f"{redact(self._url)} cannot be fetched: {reason}{asked}; {limit}{kept}")
        event = "interrupted" if progressed else "failed"
        log.warning("download %s: %s; trying again in %.0f s", event, reason, pause_s)
        self._sleep(pause_s)

    def _part_bytes(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    # One attempt

    def _attempt(self) -> None:
        version = self._load_version()
        part_bytes = self._part_bytes()
        try:
            with self._opener.open(self._request(part_bytes, version), timeout=SOCKET_TIMEOUT_S) as response:
                self._receive(response, part_bytes, version)
        except urllib.error.HTTPError as error:
            with error:
                self._on_error_status(error, part_bytes)

    def _request(self, part_bytes: int, version: RemoteVersion | None) -> urllib.request.Request:
        fields = {"User-Agent": "llama-gateway", "Accept-Encoding": "identity"}
        if self._authorization:
            fields["Authorization"] = self._authorization
        if part_bytes:
            fields["Range"] = f"bytes={part_bytes}-"
            if version and version.validator:
                fields["If-Range"] = version.validator
        return urllib.request.Request(self._url, headers=fields)

    def _on_error_status(self, error: urllib.error.HTTPError, part_bytes: int) -> None:
        if error.code == 416 and part_bytes:
            total = re.fullmatch(r"bytes \*/([0-9]+)", error.headers.get("Content-Range", ""))
            if total and int(total[1]) == part_bytes:
                self._complete = True
                return
            self._discard()
            raise Interrupted("the local part does not belong to the current remote file")
        status = f"HTTP status {error.code} ({error.reason})"
        if error.code in RETRIED_STATUSES:
            raise Interrupted(status, _retry_after_s(error.headers.get("Retry-After", "")))
        raise ModelError(f"{redact(self._url)} cannot be fetched: {status}{self._token_hint(error.code)}")

    def _token_hint(self, status: int) -> str:
        """Return what to do about a refusal, if that concerns HF_TOKEN."""
        if status not in (401, 403):
            return ""
        if is_hub(self._url):
            return (
                ": HF_TOKEN may not read it" if self._limits.hub_token else ": set HF_TOKEN to a token that may read it"
            )
        return f": HF_TOKEN is sent to https://{HUB} only" if self._limits.hub_token else ""

    def _receive(self, response: Any, part_bytes: int, version: RemoteVersion | None) -> None:
        start_bytes, current = self._parse_head(response, part_bytes)
        if start_bytes and version and not current.continues(version):
            self._discard()
            raise Interrupted("the remote file has changed since the local part was fetched")
        self._check_length(response, current)
        if part_bytes and not start_bytes:
            log.warning("the file is sent from its beginning again: it has changed, or the server cannot resume")
        self._check_free_space(current.total_bytes, start_bytes)
        with self._part.open("r+b" if start_bytes else "wb") as file:
            self._version_file.write_text(json.dumps(asdict(current)))
            file.seek(start_bytes)
            self._copy(response, file, current.total_bytes)
        if current.total_bytes is not None and self._part_bytes() != current.total_bytes:
            arrived, total = format_size(self._part_bytes()), format_size(current.total_bytes)
            raise Interrupted(f"the connection ended after {arrived} of {total}")
        self._complete = True

    def _check_length(self, response: Any, current: RemoteVersion) -> None:
        if not self._digest_known and current.total_bytes is None and not getattr(response, "chunked", False):
            raise ModelError(f"{redact(self._url)} does not send the file's length: set MODEL_SHA256")

    def _parse_head(self, response: Any, part_bytes: int) -> tuple[int, RemoteVersion]:
        """Return the position in the file at which the body starts, and the remote file's current version."""
        length = response.headers.get("Content-Length", "")
        total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        start_bytes = 0
        if response.status == 206:
            match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != part_bytes:
                self._discard()
                raise Interrupted("the server sent a range that was not requested")
            start_bytes = part_bytes
            total = int(match[2]) if match[2] != "*" else total and total + part_bytes
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        return start_bytes, RemoteVersion(self._url_sha256(), validator, total)

    def _copy(self, response: Any, file: IO[bytes], total_bytes: int | None) -> None:
        transfer = Transfer(file.tell(), total_bytes, self._limits.min_rate, self._clock)
        # read1 returns what has arrived: a trickle would keep read waiting for the rest of a chunk.
        while chunk := response.read1(CHUNK_BYTES) if transfer.have_bytes else response.read(HEAD_BYTES):
            if not transfer.have_bytes and (complaint := magic_complaint(chunk)):
                self._discard()
                raise ModelError(f"the file at {redact(self._url)} {complaint}")
            file.write(chunk)
            transfer.add(len(chunk))
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (*LOCAL_ERRORS, errno.EIO):
                raise
            log.warning("the models' volume cannot sync files (%s): a power failure may damage them", error.strerror)

    def _check_free_space(self, total_bytes: int | None, start_bytes: int) -> None:
        free_bytes = _free_bytes(self._part.parent)
        if total_bytes is not None and free_bytes is not None and total_bytes - start_bytes > free_bytes:
            need = format_size(total_bytes - start_bytes)
            raise ModelError(f"{self._part.parent} has {format_size(free_bytes)} free, the download needs {need}")

    # The version of the .part

    def _url_sha256(self) -> str:
        return hashlib.sha256(self._url.encode()).hexdigest()

    def _load_version(self) -> RemoteVersion | None:
        """Return the version that the .part belongs to; None if unknown. A part from another URL is discarded."""
        try:
            version = RemoteVersion(**json.loads(self._version_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        if version.url_sha256 != self._url_sha256():
            self._discard()
            return None
        return version

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._version_file.unlink(missing_ok=True)


def _free_bytes(folder: Path) -> int | None:
    """Return the free space, or None if the volume does not report any figures: then even its size is 0."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def _retry_after_s(text: str) -> float:
    """Parse a Retry-After field (RFC 9110 section 10.2.3): seconds or a date. 0 if it is neither, or in the past."""
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _split_credentials(url: str) -> tuple[str, str]:
    """Return the URL without user and password, which urllib does not support, and an Authorization field's value."""
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


Flock = Callable[[IO[bytes], int], None]


@contextmanager
def sole_writer(
    part: Path, *, sleep: Callable[[float], None] = time.sleep, flock: Flock = fcntl.flock
) -> Iterator[None]:
    """Wait until no other worker on the same volume writes this file. On a volume without file locks, do not wait.

    `sleep` and `flock` are parameters for tests.
    """
    path, logged = part.with_name(f".{part.name}.lock"), False
    while True:
        with path.open("ab") as file:
            if _lock(file, flock) and _is_linked(file, path):
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink()
                return
        if not logged:
            log.info("another worker is fetching %s; waiting for it", part.name)
        logged = True
        sleep(LOCK_POLL_S)


def _lock(file: IO[bytes], flock: Flock) -> bool:
    """Lock the file; return whether this worker may go on."""
    try:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        log.warning("the models' volume has no file locks: let only one worker fetch a model at a time")
    return True


def _is_linked(file: IO[bytes], path: Path) -> bool:
    """Return whether `path` is still this file. Each holder removes the lock file, so the next one locks a new file.

    Its content is compared, since some volumes have no lasting inode numbers.
    """
    mark = os.urandom(16)
    with suppress(OSError):
        file.write(mark)
        file.flush()
        return path.read_bytes().endswith(mark)
    return False
