"""A gateway that a test controls by files in STUB_DIR.

    health.json   the body of each response; without it, an idle gateway's /health
    undrained     after SIGTERM it goes on until the file is removed
    gateway_exit  it ends at once, with this status

At SIGTERM it reports a drain on the socket of --drain-socket, as the gateway does. It prints each request and each
signal.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

from stub_orders import content_of, ordered
from stub_server import listen, serve

IDLE = '{"active": 0, "queued": 0, "backend_silent_s": 0.0, "idle_s": 0.0}'


def respond(path: str, fields: Mapping[str, str]) -> tuple[int, bytes]:
    print(f"stub gateway: asked {path}", flush=True)
    return 200, (content_of("health.json") if ordered("health.json") else IDLE).encode()


def leave(number: int, frame: object) -> None:
    print(f"stub gateway: signal {number}", flush=True)
    socket.socket(fileno=int(sys.argv[sys.argv.index("--drain-socket") + 1])).send(b"drain")
    threading.Thread(target=drain).start()


def drain() -> None:
    while ordered("undrained"):
        time.sleep(0.02)
    os._exit(0)


def main() -> None:
    if ordered("gateway_exit"):
        sys.exit(int(content_of("gateway_exit")))
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, lambda *_: print("stub gateway: reloading", flush=True))
    serve(listen(os.environ["HOST"], int(os.environ["PORT"])), respond)


if __name__ == "__main__":
    main()
