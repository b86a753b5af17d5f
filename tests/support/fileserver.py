"""A web server with one file, which it can be told to cut, to change, to refuse or to redirect; on port 0."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Shelf:
    """What is served, and how. `cuts`: how many octets of the body to send before the connection ends, one a request.

    `statuses`: refusals to give first, one a request. `seen`: the Range field of each request ("" = none).
    """

    content: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    ranges: bool = True
    sized: bool = True
    chunked: bool = False
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    redirect: str = ""
    missing: str = ""
    seen: list[str] = field(default_factory=list)
    fields_seen: list[dict[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def do_GET(self) -> None:
        shelf = self.shelf
        shelf.seen.append(self.headers.get("Range", ""))
        shelf.fields_seen.append(dict(self.headers))
        self.close_connection = True
        name = self.path.partition("?")[0].rpartition("/")[2]
        if shelf.redirect and name != "moved.gguf":
            self._head(302, {"Location": shelf.redirect, "Content-Length": "0"})
        elif name == shelf.missing:
            self._head(404, {"Content-Length": "0"})
        elif shelf.statuses:
            self._head(shelf.statuses.pop(0), {"Content-Length": "0"})
        else:
            self._give(shelf.files.get(name, shelf.content))

    def _give(self, content: bytes) -> None:
        shelf, total = self.shelf, len(content)
        asked = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        valid = self.headers.get("If-Range", shelf.etag) == shelf.etag
        fields = {"ETag": shelf.etag} if shelf.etag else {}
        status = 200
        if asked and shelf.ranges and valid:
            start = int(asked[1])
            if start >= total:
                self._head(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"})
                return
            status, content = 206, content[start:]
            fields["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if shelf.chunked:
            fields["Transfer-Encoding"] = "chunked"
        elif shelf.sized:
            fields["Content-Length"] = str(len(content))
        self._head(status, fields)
        cut = shelf.cuts.pop(0) if shelf.cuts else len(content)
        if shelf.chunked:
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
def serve(shelf: Shelf) -> Iterator[str]:
    """Serve for the length of the block; yields the URL without a last slash."""
    handler = type("Handler", (_Handler,), {"shelf": shelf})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
