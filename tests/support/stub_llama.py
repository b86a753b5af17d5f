"""A llama-server that a test controls by files in STUB_DIR, which may appear and disappear while it runs.

    unbound       the port is not bound (as during a download)
    loading       each response is 503
    deaf          /health is not answered
    deaf_slots    every other path is not answered
    spinning      one thread works for a quarter of the time, alone
    open          protected routes are 200 without the key
    own_key       its key is another one than it was given
    closed        its port is closed, and it lives on
    stubborn      SIGTERM is ignored
    talkative     each request is printed
    lines         are printed at the start
    version       is printed for --version
    exit, signal  end at once with this status, or by this signal
    family        start a child process, and write its pid to the file `grandchild`

Each start adds a line to the file `starts`: a JSON object of pid, argv and environment.
"""

import sys

if "--version" in sys.argv:
    from stub_orders import content_of, ordered

    print(content_of("version") if ordered("version") else "version: 11434 (stub)")
    sys.exit()

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping

from stub_orders import content_of, order_path, ordered
from stub_server import listen, serve

WORK_S = 0.005


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


def respond(path: str, fields: Mapping[str, str]) -> tuple[int, bytes]:
    if ordered("talkative"):
        print(f"asked {path}", flush=True)
    while ordered("deaf" if path == "/health" else "deaf_slots"):
        time.sleep(0.02)
    if ordered("loading"):
        return 503, b'{"error":{"message":"Loading model"}}'
    if path == "/health":
        return 200, b'{"status":"ok"}'
    if ordered("own_key") or (fields.get("authorization") != f"Bearer {KEY}" and not ordered("open")):
        return 401, b"{}"
    return 200, b'{"total_slots":2}'


def begin() -> None:
    with open(order_path("starts"), "a", encoding="utf-8") as file:
        file.write(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "environ": dict(os.environ)}) + "\n")
    if ordered("lines"):
        print(content_of("lines"), flush=True)
    if ordered("signal"):
        os.kill(os.getpid(), int(content_of("signal")))
    if ordered("exit"):
        sys.exit(int(content_of("exit")))
    if ordered("family"):
        child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
        with open(order_path("grandchild"), "w", encoding="utf-8") as file:
            file.write(str(child))


def work() -> None:
    """Keep the processor busy for a moment."""
    end_s = time.monotonic() + WORK_S
    while time.monotonic() < end_s:
        pass


def main() -> None:
    begin()
    signal.signal(signal.SIGTERM, lambda *_: None if ordered("stubborn") else os._exit(0))
    while ordered("unbound"):
        time.sleep(0.02)
    listener = listen(option("--host"), int(option("--port") or 0))
    threading.Thread(target=serve, args=(listener, respond), daemon=True).start()
    print("0.00.026.518 I srv  llama_server: listening", flush=True)
    print("0.00.026.519 W srv  a warning", file=sys.stderr, flush=True)
    while not ordered("closed"):
        if ordered("spinning"):
            work()
        time.sleep(0.02)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    while True:
        signal.pause()


if __name__ == "__main__":
    with open(option("--api-key-file"), encoding="utf-8") as file:
        KEY = file.read().strip()
    main()
