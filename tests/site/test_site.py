"""The built site in a headless Chromium: its own search finds every setting, error, metric, log field and exit status.

`make docs-test` builds the site and runs this with the environment of requirements/docs.txt.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import advice
import generate
from accounting.access_lines import FIELDS
from config.settings import SETTINGS
from core.errors import CATALOGUE
from support.paths import ROOT

SITE = ROOT / "docs" / "_build" / "html"
PATIENCE_S = 300.0
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-dev-shm-usage")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--mute-audio")
# A term → the page that explains it.
TERMS: Mapping[str, str] = {
    **{setting.name: "SETTINGS.html" for setting in SETTINGS},
    **{kind.code: "TROUBLESHOOTING.html" for kind in CATALOGUE},
    **{family.name: "MONITORING.html" for family in generate.metric_families()},
    **{field.name: "ACCESS_LOG.html" for field in FIELDS},
    **{f"exit status {value}": "TROUBLESHOOTING.html" for value in advice.EXIT_STATUSES},
}


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, the page that searches it, and the terms; receives the results."""

    server: "Server"

    def do_GET(self) -> None:
        if self.path == "/terms":
            self._send(json.dumps(list(TERMS)).encode(), "application/json")
        elif self.path == "/run":
            self._send((Path(__file__).parent / "search.html").read_bytes(), "text/html")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.server.results = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(b"", "text/plain")
        self.server.reported.set()

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
        self.results: dict[str, list[str]] = {}
        self.reported = threading.Event()


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Search every term in one browser. Returns the addresses of the results per term, best first."""
    assert SITE.is_dir(), "build the site first: make docs"
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("there is no Chromium")
    assert chromium
    folder = tmp_path_factory.mktemp("browser")
    with serving() as server, (folder / "log").open("wb") as log:
        command = [chromium, *FLAGS, f"--user-data-dir={folder}/profile", f"http://127.0.0.1:{server.server_port}/run"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            reported = server.reported.wait(PATIENCE_S)
        finally:
            process.terminate()
            process.wait()
        assert reported, (folder / "log").read_text(errors="replace")[-2000:]
        return server.results


@pytest.mark.parametrize("term", TERMS)
def test_the_search_finds(results: dict[str, list[str]], term: str) -> None:
    pages = [address.partition("?")[0].partition("#")[0] for address in results[term]]
    assert TERMS[term] in pages[:5], results[term][:5]


def test_the_search_leads_to_the_section(results: dict[str, list[str]]) -> None:
    assert "SETTINGS.html#max-queue-size" in results["MAX_QUEUE_SIZE"][:2]
    assert "TROUBLESHOOTING.html#exit-status-4" in results["exit status 4"][:3]


def test_the_site_needs_no_other_host() -> None:
    pages = [path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")]
    assert [
        word for page in pages for word in re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(\w+:)?//", page)
    ] == []


def test_the_site_has_a_light_and_a_dark_theme() -> None:
    style = (SITE / "_static" / "styles" / "furo.css").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in style.replace(" ", "")
