"""A llama-server to order: what it does is told by files in STUB_DIR, which may come and go while it runs.

    unbound       the port stays unbound while the file is there (a download under way)
    loading       everything answers 503
    deaf          /health is not answered; `deaf_slots`: /slots is not
    open          protected routes answer without the key
    stubborn      SIGTERM is ignored
    talkative     what is asked is printed
    lines         printed at the start
    exit, signal  end at once with this status, or by this signal
    family        a process of its own is started; its pid goes to the file `grandchild`

Each start adds a line to the file `starts`: a JSON object of pid, argv and environment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTROL = Path(os.environ["STUB_DIR"])


def told(name: str) -> bool:
    return (CONTROL / name).exists()


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if told("talkative"):
            print(f"asked {self.path}", flush=True)
        while told("deaf" if self.path == "/health" else "deaf_slots"):
            time.sleep(0.02)
        if told("loading"):
            self._answer(503, b'{"error":{"message":"Loading model"}}')
        elif self.path == "/health":
            self._answer(200, b'{"status":"ok"}')
        elif self.headers.get("Authorization") != f"Bearer {KEY}" and not told("open"):
            self._answer(401, b"{}")
        else:
            self._answer(200, b'{"total_slots":2}')

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A probe that has its answer may reset the connection."""


def begin() -> None:
    with (CONTROL / "starts").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "environ": dict(os.environ)}) + "\n")
    if told("lines"):
        print((CONTROL / "lines").read_text(), flush=True)
    if told("signal"):
        os.kill(os.getpid(), int((CONTROL / "signal").read_text()))
    if told("exit"):
        sys.exit(int((CONTROL / "exit").read_text()))
    if told("family"):
        child = subprocess.Popen(["sleep", "600"])
        (CONTROL / "grandchild").write_text(str(child.pid))


def main() -> None:
    begin()
    signal.signal(signal.SIGTERM, lambda *_: None if told("stubborn") else os._exit(0))
    while told("unbound"):
        time.sleep(0.02)
    Server.address_family = socket.AF_INET6 if ":" in option("--host") else socket.AF_INET
    server = Server((option("--host"), int(option("--port"))), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("0.00.026.518 I srv  llama_server: listening", flush=True)
    print("0.00.026.519 W srv  a warning", file=sys.stderr, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    KEY = Path(option("--api-key-file")).read_text().strip()
    main()
