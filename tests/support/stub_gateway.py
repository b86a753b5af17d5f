"""A gateway to order, for what a real one would have to be talked into: its /health is the file STUB_DIR/health.json.

It drains at SIGTERM for as long as the file `undrained` is there, and tells its parent that it does. It says what it is
asked and what signals it got.
"""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTROL = Path(os.environ["STUB_DIR"])
IDLE = b'{"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        print(f"stub gateway: asked {self.path}", flush=True)
        told = CONTROL / "health.json"
        body = told.read_bytes() if told.exists() else IDLE
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A probe that has its answer may reset the connection."""


def leave(number: int, frame: object) -> None:
    print(f"stub gateway: signal {number}", flush=True)
    os.kill(int(sys.argv[sys.argv.index("--parent") + 1]), signal.SIGUSR1)
    threading.Thread(target=drain).start()


def drain() -> None:
    while (CONTROL / "undrained").exists():
        time.sleep(0.02)
    os._exit(0)


def main() -> None:
    if (CONTROL / "gateway_exit").exists():
        sys.exit(int((CONTROL / "gateway_exit").read_text()))
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, lambda *_: print("stub gateway: reloading", flush=True))
    Server((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
