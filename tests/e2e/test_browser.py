"""The openai package in a real browser, in a page of another origin than the gateway's: what CORS allows it to see."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stack import HERE, TEAM_KEY, Gateway, LlamaServer, running

PATIENCE_S = 60.0
SPENT_KEY = "sk-e2e-spent-0123456789abcdef"
KINDS = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript"}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--enable-logging=stderr",  # including the page's console
)


class Origin(ThreadingHTTPServer):
    """The page's own server: it serves the page, its modules and its task, and receives what the page has seen."""

    daemon_threads = True

    def __init__(self, packages: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.packages = packages
        self.task: dict[str, str] = {}
        self.seen: dict[str, Any] = {}
        self.reported = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Origin
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/task":
            self._send(200, "application/json", json.dumps(self.server.task).encode())
            return
        root = self.server.packages if self.path.startswith("/node_modules/openai/") else HERE / "browser"
        file = (root / self.path.lstrip("/")).resolve()
        if file.is_file() and root.resolve() in file.parents:
            self._send(200, KINDS.get(file.suffix, "application/octet-stream"), file.read_bytes())
        else:
            self._send(404, "text/plain", b"")

    def do_POST(self) -> None:
        self.server.seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(204, "text/plain", b"")
        self.server.reported.set()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(packages: Path) -> Iterator[Origin]:
    with Origin(packages) as origin:
        thread = threading.Thread(target=origin.serve_forever, daemon=True)
        thread.start()
        yield origin
        origin.shutdown()
        thread.join()


def visit(chromium: str, origin: Origin, folder: Path) -> str:
    """Open the page, wait until it has reported what it saw, and return the browser's console output."""
    profile, log = folder / "profile", folder / "chromium.log"
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", f"{origin.url}/page.html"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        reported = origin.reported.wait(PATIENCE_S)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(profile, ignore_errors=True)
    output = log.read_text(errors="replace")
    assert reported, output[-4000:]
    return output


@pytest.fixture(scope="module")
def visits(
    browser: tuple[str, Path], backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Origin, str]]]:
    """Visit the same page on an allowed and on another origin. Each visit: the page's server and the console output."""
    chromium, packages = browser
    folder = tmp_path_factory.mktemp("browser")
    with serving(packages) as allowed, serving(packages) as other:
        gateway = Gateway(folder, backend, CORS_ORIGINS=f"https://app.example,{allowed.url}")
        with Path(gateway.settings["AUTH_KEYS_FILE"]).open("a") as keys:
            keys.write(f"spent:{SPENT_KEY}:1\n")
        for _ in running(gateway):
            found = {}
            for name, origin in {"allowed": allowed, "other": other}.items():
                origin.task = {"gateway": gateway.url, "key": TEAM_KEY, "spentKey": SPENT_KEY}
                (folder / name).mkdir()
                found[name] = origin, visit(chromium, origin, folder / name)
            yield found


@pytest.fixture
def seen(visits: dict[str, tuple[Origin, str]]) -> dict[str, Any]:
    return visits["allowed"][0].seen


def test_chat(seen: dict[str, Any]) -> None:
    assert seen["chat"]["text"]
    assert seen["chat"]["tokens"] == 8


def test_the_request_id_and_the_rate_limit_can_be_read(seen: dict[str, Any]) -> None:
    assert re.fullmatch(r"req-\S+", seen["chat"]["requestId"])
    assert seen["chat"]["remaining"].isdigit()


def test_stream(seen: dict[str, Any]) -> None:
    assert seen["stream"]["text"]
    assert seen["stream"]["pieces"] > 1


def test_models(seen: dict[str, Any]) -> None:
    assert seen["models"]["ids"] == ["tiny"]


def test_a_wrong_key_is_a_readable_401(seen: dict[str, Any]) -> None:
    refusal = seen["wrongKey"]
    assert (refusal["error"], refusal["status"], refusal["code"]) == ("AuthenticationError", 401, "invalid_api_key")
    assert "API key" in refusal["message"]
    assert refusal["requestId"]


def test_a_spent_rate_limit_is_a_readable_429(seen: dict[str, Any]) -> None:
    refusal = seen["spent"]
    assert (refusal["error"], refusal["status"], refusal["code"]) == ("RateLimitError", 429, "rate_limit_exceeded")
    assert 0 < int(refusal["retryAfter"]) <= 60
    assert refusal["requestId"]


def test_the_console_of_the_allowed_page_has_no_cors_error(visits: dict[str, tuple[Origin, str]]) -> None:
    assert "CORS policy" not in visits["allowed"][1]


@pytest.mark.parametrize("act", ["chat", "stream", "models", "wrongKey", "spent"])
def test_another_origin_sees_nothing(visits: dict[str, tuple[Origin, str]], act: str) -> None:
    refusal = visits["other"][0].seen[act]
    assert (refusal["error"], refusal["status"]) == ("APIConnectionError", None)


def test_the_console_of_the_other_page_names_cors(visits: dict[str, tuple[Origin, str]]) -> None:
    origin, console = visits["other"]
    output = [line for line in console.splitlines() if "has been blocked by CORS policy" in line]
    assert output
    assert all(f"from origin '{origin.url}'" in line for line in output)
    assert "No 'Access-Control-Allow-Origin' header" in output[0]
