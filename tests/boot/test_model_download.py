"""A download: resumed, refused, redirected, never two versions in one file; over a real web server on loopback."""

import errno
import fcntl
import hashlib
import json
import logging
import time
import urllib.error
import urllib.request
from email.utils import formatdate
from http.client import HTTPMessage
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pytest

from boot.model_download import (
    Download,
    RedirectHandler,
    RemoteVersion,
    is_hub,
    sole_writer,
)
from boot.model_errors import ModelError, ModelUnavailable
from boot.transfer import FetchLimits
from support.fileserver import Site, serve
from support.ports import reserved_port

GGUF = b"GGUF" + bytes(range(256)) * 40
LIMITS = FetchLimits(600.0, 0)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf.part"


def attempt(url: str, part: Path, limits: FetchLimits, *, digest_known: bool = False) -> list[float]:
    """Download to the .part; return the pauses between the attempts, in which alone time passes."""
    pauses: list[float] = []
    Download(url, part, limits, digest_known=digest_known, sleep=pauses.append, clock=lambda: float(sum(pauses))).run()
    return pauses


def download(url: str, part: Path, *, digest_known: bool = False) -> list[float]:
    """Download to the .part, and check that nothing else is left; return the pauses between the attempts."""
    pauses = attempt(url, part, LIMITS, digest_known=digest_known)
    assert [path.name for path in part.parent.iterdir()] == [part.name]
    return pauses


def failure(url: str, part: Path, *, digest_known: bool = False, limits: FetchLimits | None = None) -> str:
    """Return the error of a download that must fail."""
    with pytest.raises(ModelError) as caught:
        attempt(url, part, limits or FetchLimits(3.0, 0), digest_known=digest_known)
    return str(caught.value)


# Complete and resumed


def test_a_file_is_downloaded_with_one_request(part: Path) -> None:
    site = Site(GGUF)
    with serve(site) as url:
        assert download(f"{url}/m.gguf", part) == []
    assert part.read_bytes() == GGUF
    assert site.seen == [""]


def test_a_cut_download_is_resumed_where_it_ended(part: Path) -> None:
    site = Site(GGUF, cuts=[1000, 2000])
    with serve(site) as url:
        assert download(f"{url}/m.gguf", part) == [1.0, 1.0]
    assert part.read_bytes() == GGUF
    assert site.seen == ["", "bytes=1000-", "bytes=3000-"]


def test_the_part_of_an_earlier_boot_is_resumed(part: Path) -> None:
    part.write_bytes(GGUF[:5000])
    site = Site(GGUF)
    with serve(site) as url:
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == GGUF
    assert site.seen == ["bytes=5000-"]


def test_a_complete_part_is_complete_without_a_body(part: Path) -> None:
    part.write_bytes(GGUF)
    site = Site(GGUF)
    with serve(site) as url:
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == GGUF
    assert site.seen == [f"bytes={len(GGUF)}-"]


def test_a_part_that_is_longer_than_the_file_is_discarded(part: Path) -> None:
    part.write_bytes(GGUF + b"more")
    with serve(Site(GGUF)) as url:
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == GGUF


@pytest.mark.parametrize("etag", ['"two"', ""])
def test_two_versions_are_never_joined(part: Path, etag: str) -> None:
    new = b"GGUF" + GGUF[::-1] + b"and more"
    site = Site(GGUF, cuts=[1000, *[0] * 9], etag='"one"' if etag else "")
    with serve(site) as url:
        message = failure(f"{url}/m.gguf", part)
        assert message.endswith("(the part that has arrived is kept and will be resumed)")
        site.content, site.etag, site.cuts = new, etag, []
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == new


def test_the_part_of_another_url_is_not_resumed(part: Path) -> None:
    site = Site(GGUF, cuts=[1000, *[0] * 9])
    with serve(site) as url:
        failure(f"{url}/one.gguf", part)
        site.cuts.clear()
        site.seen.clear()
        download(f"{url}/two.gguf", part)
    assert site.seen == [""]


def test_a_server_without_ranges_sends_all_of_it_again(part: Path) -> None:
    with serve(Site(GGUF, cuts=[1000], ranges=False)) as url:
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == GGUF


def test_a_wrong_range_is_not_appended(part: Path) -> None:
    part.write_bytes(GGUF[:100])
    site = Site(GGUF, range_start=7)
    with serve(site) as url:
        assert download(f"{url}/m.gguf", part) == [1.0]
    assert part.read_bytes() == GGUF
    assert site.seen == ["bytes=100-", ""]


def test_a_chunked_body_is_complete_only_with_its_last_chunk(part: Path) -> None:
    site = Site(GGUF, chunked=True, cuts=[1000], ranges=False)
    with serve(site) as url:
        download(f"{url}/m.gguf", part)
    assert part.read_bytes() == GGUF
    assert len(site.seen) == 2


def test_a_body_without_a_length_needs_the_digest(part: Path) -> None:
    with serve(Site(GGUF, sized=False)) as url:
        assert failure(f"{url}/m.gguf", part) == f"{url}/m.gguf does not send the file's length: set MODEL_SHA256"
        download(f"{url}/m.gguf", part, digest_known=True)
    assert part.read_bytes() == GGUF


def test_versions_continue_each_other_unless_a_known_value_differs() -> None:
    assert RemoteVersion("u", "", 5).continues(RemoteVersion("u", '"e"', None))
    assert not RemoteVersion("u", '"d"', 5).continues(RemoteVersion("u", '"e"', 5))
    assert not RemoteVersion("u", "", 5).continues(RemoteVersion("u", "", 6))
    assert not RemoteVersion("u", "", 5).continues(RemoteVersion("v", "", 5))


def test_the_version_is_kept_next_to_an_incomplete_part(part: Path) -> None:
    with serve(Site(GGUF, cuts=[1000, *[0] * 9])) as url:
        failure(f"{url}/m.gguf", part)
    sha256 = hashlib.sha256(f"{url}/m.gguf".encode()).hexdigest()
    kept = json.loads(part.with_name("m.gguf.part.json").read_text())
    assert kept == {"url_sha256": sha256, "validator": '"one"', "total_bytes": len(GGUF)}


# Refused


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_client_error_is_final(part: Path, status: int) -> None:
    site = Site(GGUF, statuses=[status])
    with serve(site) as url:
        message = failure(f"{url}/m.gguf", part)
    assert message.startswith(f"{url}/m.gguf cannot be fetched: HTTP status {status} (")
    assert len(site.seen) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_an_overloaded_server_is_asked_again(part: Path, status: int) -> None:
    with serve(Site(GGUF, statuses=[status] * 7)) as url:
        assert download(f"{url}/m.gguf", part) == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert part.read_bytes() == GGUF


def test_the_pause_that_a_server_asks_for_is_made(part: Path) -> None:
    with serve(Site(GGUF, statuses=[429, 503], retry_after="20")) as url:
        assert download(f"{url}/m.gguf", part) == [20.0, 20.0]
    assert part.read_bytes() == GGUF


def test_a_pause_is_also_given_as_a_date(part: Path) -> None:
    for date, low, high in [(formatdate(time.time() + 120, usegmt=True), 60, 121), ("yesterday", 1, 1)]:
        with serve(Site(GGUF, statuses=[503], retry_after=date)) as url:
            (pause,) = download(f"{url}/m.gguf", part)
        part.unlink()
        assert low <= pause <= high


def test_a_pause_beyond_the_limit_is_not_made(part: Path) -> None:
    with serve(Site(GGUF, statuses=[429], retry_after="601")) as url:
        message = failure(f"{url}/m.gguf", part, limits=LIMITS)
    assert message.endswith(
        "HTTP status 429 (Too Many Requests), which asks to wait 601 s; "
        "giving up after 600 s without progress (MODEL_FETCH_TIMEOUT)"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_server_that_is_not_there_is_given_up_after_the_limit(part: Path, host: str) -> None:
    pauses: list[float] = []
    with reserved_port() as sock:
        url, limits = f"http://{host}:{sock.getsockname()[1]}/m.gguf", FetchLimits(50.0, 0)
        fetch = Download(url, part, limits, digest_known=True, sleep=pauses.append, clock=lambda: float(sum(pauses)))
        with pytest.raises(ModelUnavailable, match="after 50 s without progress") as caught:
            fetch.run()
    assert "cannot be fetched: " in str(caught.value)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 19.0]


def test_a_trickle_is_ended_and_is_no_progress(part: Path) -> None:
    ticks = iter(range(0, 100000, 16))  # 16 s from one look at the clock to the next
    with (
        serve(Site(GGUF, ranges=False)) as url,
        pytest.raises(ModelUnavailable, match=r"B/s arrive, less than 100 KB/s \(MODEL_"),
    ):
        Download(
            f"{url}/m.gguf", part, FetchLimits(600.0, 100_000), digest_known=True, sleep=lambda _: None,
            clock=lambda: next(ticks),
        ).run()  # fmt: skip


def test_a_web_page_is_not_downloaded_to_its_end(part: Path) -> None:
    with serve(Site(b"<html>please log in</html>")) as url:
        message = failure(f"{url}/m.gguf", part)
    assert message == f"the file at {url}/m.gguf is a web page, not a GGUF file"
    assert list(part.parent.iterdir()) == []


def test_a_disk_that_is_too_small_is_reported_before_it_is_full(part: Path) -> None:
    with serve(Site(GGUF, claimed_bytes=10**17)) as url:
        message = failure(f"{url}/m.gguf", part)
    assert message.startswith(f"{part.parent} has ")
    assert message.endswith(" free, the download needs 100000000 GB")
    assert not part.exists()


def test_a_part_that_cannot_be_written_is_final(part: Path) -> None:
    part.mkdir()
    with serve(Site(GGUF)) as url:
        assert failure(f"{url}/m.gguf", part) == f"{part} cannot be written: Is a directory"


# Redirects and credentials


class TokenHub(urllib.request.OpenerDirector):
    """Stands for https://huggingface.co: it refuses everything, and keeps the credentials that it got."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str | None] = []

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        self.seen.append(fullurl.get_header("Authorization"))
        raise urllib.error.HTTPError(fullurl.full_url, 401, "Unauthorized", HTTPMessage(), BytesIO())


def test_a_redirect_to_another_host_is_followed_without_the_credentials(part: Path) -> None:
    site, other = Site(GGUF), Site(GGUF)
    with serve(other) as other_url, serve(site) as url:
        site.redirect = f"{other_url}/moved.gguf"
        download(f"{url.replace('//', '//me:secret@')}/m.gguf", part)
    assert site.fields_seen[0]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "Authorization" not in other.fields_seen[0]


def test_a_redirect_on_one_host_keeps_the_credentials(part: Path) -> None:
    site = Site(GGUF)
    with serve(site) as url:
        site.redirect = f"{url}/moved.gguf"
        download(f"{url.replace('//', '//me:secret@')}/m.gguf", part)
    assert [fields["Authorization"] for fields in site.fields_seen] == ["Basic bWU6c2VjcmV0"] * 2


def redirected(
    digest_known: bool, start: str, target: str, authorization: str = "", token: str | None = None
) -> urllib.request.Request | None:
    request = urllib.request.Request(start, headers={"Authorization": authorization} if authorization else {})
    handler = RedirectHandler(digest_known, token)
    return handler.redirect_request(request, BytesIO(), 302, "Found", HTTPMessage(), target)


@pytest.mark.parametrize(
    ("url", "hub"),
    [
        ("https://huggingface.co/a/b/resolve/main/m.gguf", True), ("https://HuggingFace.co:443/m", True),
        ("http://huggingface.co/m", False), ("https://huggingface.co:8443/m", False),
        ("https://cdn-lfs.huggingface.co/m", False), ("https://cas-bridge.xethub.hf.co/m", False),
        ("https://huggingface.co.evil.example/m", False), ("https://evilhuggingface.co/m", False),
        ("https://huggingface.co@evil.example/m", False), ("https://evil.example/huggingface.co", False),
    ],
)  # fmt: skip
def test_the_token_is_sent_to_the_hub_only_over_redirects_too(url: str, hub: bool) -> None:
    assert is_hub(url) is hub
    for start, sent in [("https://huggingface.co/m", "Bearer hf_secret"), ("https://other.example/m", "")]:
        request = redirected(True, start, url, sent, "hf_secret")
        assert request
        assert request.get_header("Authorization") == ("Bearer hf_secret" if hub else None), start


def test_the_token_is_not_sent_to_another_server_and_the_refusal_says_so(part: Path) -> None:
    site = Site(GGUF, statuses=[401])
    with serve(site) as url:
        message = failure(f"{url}/m.gguf", part, limits=FetchLimits(600.0, 0, "hf_secret"))
    assert message.endswith("HTTP status 401 (Unauthorized): HF_TOKEN is sent to https://huggingface.co only")
    assert "Authorization" not in site.fields_seen[0]


@pytest.mark.parametrize(("token", "hint"), [("hf_secret", "may not read it"), (None, "set HF_TOKEN to a token")])
def test_the_hub_gets_the_token_and_its_refusal_says_what_to_do(part: Path, token: str | None, hint: str) -> None:
    hub = TokenHub()
    url = "https://huggingface.co/a/b/resolve/main/m.gguf"
    with pytest.raises(ModelError, match=hint):
        Download(url, part, FetchLimits(600.0, 0, token), digest_known=False, opener=hub).run()
    assert hub.seen == [f"Bearer {token}" if token else None]


def test_a_redirect_from_https_to_plain_http_needs_the_digest() -> None:
    with pytest.raises(ModelError, match=r"^https://x\.example/m redirects to plain http, which needs MODEL_SHA256$"):
        redirected(False, "https://x.example/m?signature=1", "http://y.example/m")
    assert redirected(True, "https://x.example/m", "http://y.example/m") is not None
    assert redirected(False, "https://x.example/m", "https://y.example/m") is not None
    assert redirected(False, "http://x.example/m", "http://y.example/m") is not None


# One writer


def test_the_lock_is_held_for_the_length_of_the_block_and_then_removed(part: Path) -> None:
    lock = part.with_name(".m.gguf.part.lock")
    with sole_writer(part), lock.open("wb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not lock.exists()


def test_a_second_writer_waits_and_logs_it_once(part: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = sole_writer(part)
    first.__enter__()
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            first.__exit__(None, None, None)

    with sole_writer(part, sleep=sleep):
        assert pauses == [0.5] * 3
    assert caplog.messages == ["another worker is fetching m.gguf.part; waiting for it"]


def test_a_volume_without_file_locks_is_written_without_waiting(part: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flock(file: IO[bytes], operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with sole_writer(part, flock=flock):
        assert "the models' volume has no file locks" in caplog.text


def test_a_lock_on_a_removed_file_does_not_count(part: Path) -> None:
    lock = part.with_name(".m.gguf.part.lock")
    attempts: list[int] = []

    def flock(file: IO[bytes], operation: int) -> None:
        if not attempts:
            lock.unlink()  # as its holder does in this moment
        attempts.append(file.fileno())
        fcntl.flock(file, operation)

    with sole_writer(part, sleep=lambda seconds: None, flock=flock):
        assert len(attempts) == 2
        assert lock.exists()
