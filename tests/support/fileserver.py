"""A web server for downloads, which can be scripted to cut, to change, to refuse or to redirect; on port 0."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What is served and how, and what was requested. It may be changed while it is served.

    `content` is the body for each name that `files` lacks. Without an `etag` there is no validator, without `ranges` no
    206, without `sized` no Content-Length. `cuts`: how many bytes of the body to send before the connection ends, one
    per request. `statuses`: error statuses to send first, one per request, with `retry_after`. `redirect`: the
    Location for each name but moved.gguf. `missing`: a name with the status 404. `claimed_bytes`: a wrong
    Content-Length. `range_start`: a wrong first position in Content-Range.

    `seen` has the Range field of each request ("" = none), `fields_seen` all its fields.
    """

    content: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    ranges: bool = True
    sized: bool = True
    chunked: bool = False
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    retry_after: str = ""
    redirect: str = ""
    missing: str = ""
    claimed_bytes: int | None = None
    range_start: int | None = None
    seen: list[str] = field(default_factory=list)
    fields_seen: list[dict[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.seen.append(self.headers.get("Range", ""))
        site.fields_seen.append(dict(self.headers))
        self.close_connection = True
        name = self.path.partition("?")[0].rpartition("/")[2]
        if site.redirect and name != "moved.gguf":
            self._head(302, {"Location": site.redirect, "Content-Length": "0"})
        elif name == site.missing:
            self._head(404, {"Content-Length": "0"})
        elif site.statuses:
            asked = {"Retry-After": site.retry_after} if site.retry_after else {}
            self._head(site.statuses.pop(0), {"Content-Length": "0", **asked})
        else:
            self._send(site.files.get(name, site.content))

    def _send(self, content: bytes) -> None:
        site, total = self.site, len(content)
        requested = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        valid = self.headers.get("If-Range", site.etag) == site.etag
        fields = {"ETag": site.etag} if site.etag else {}
        status = 200
        if requested and site.ranges and valid:
            start = int(requested[1])
            if start >= total:
                self._head(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"})
                return
            status, content = 206, content[start:]
            shown = start if site.range_start is None else site.range_start
            fields["Content-Range"] = f"bytes {shown}-{total - 1}/{total}"
        if site.chunked:
            fields["Transfer-Encoding"] = "chunked"
        elif site.sized:
            fields["Content-Length"] = str(site.claimed_bytes or len(content))
        self._head(status, fields)
        cut = site.cuts.pop(0) if site.cuts else len(content)
        if site.chunked:
            end = b"0\r\n\r\n" if cut >= len(content) else b""
            self.wfile.write(b"%x\r\n%s\r\n%s" % (len(content[:cut]), content[:cut], end))
        else:
            self.wfile.write(content[:cut])

    def _head(self, status: int, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(site: Site) -> Iterator[str]:
    """Serve for the length of the block; yields the URL without a last slash."""
    handler = type("Handler", (_Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
