#!/usr/bin/env python3
"""Measure how long others wait while large bodies are read (`python3 bench/large_bodies.py [BODIES] [MIB]`).

Starts mock_backend.py with one slot, which one stream occupies, and gateway.py. Then it sends bodies of small members,
24 of 10 MiB each unless the arguments say otherwise, whose requests wait for the slot, and measures GET /ping on a kept
connection, about 200 times per second. It prints the percentiles of the time to /ping's answer, in milliseconds, and
the gateway's CPU time, from the first byte of the bodies until 5 s after the last. Exit status: 1 if the 99th
percentile is 20 ms or more.
"""

import multiprocessing
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from run import LOCAL_ONLY, cpu_s, server

LIMIT_MS = 20.0
AFTER_S = 5.0
MOCK = {"MOCK_SLOTS": "1", "MOCK_TOKENS_PER_SECOND": "50"}
SHAPES = {
    "small members": lambda size: b"{" + b",".join(b'"k%d":%d' % (at, at) for at in range(size // 13)) + b"}",
    "small members named n": lambda size: b"{" + b'"n":1,' * (size // 6) + b'"n":1}',
    "a list of small objects": lambda size: b'{"prompt":[' + b"{}," * (size // 3) + b"{}]}",
}


def request(port: int, key: str, body: bytes) -> socket.socket:
    """Send a request for a completion; its answer is not read."""
    link = socket.create_connection(("127.0.0.1", port))
    fields = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    link.sendall(b"POST /v1/completions HTTP/1.1\r\n" + fields.encode() + body)
    return link


def ping(port: int, parent: Connection) -> None:
    """Ask for /ping until the parent sends something; then send it how many milliseconds each answer took."""
    times = []
    with socket.create_connection(("127.0.0.1", port)) as link:
        while not parent.poll(0.005):
            start_s = time.perf_counter()
            link.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            link.recv(4096)
            times.append((time.perf_counter() - start_s) * 1000)
    parent.send(sorted(times))


def measure(port: int, key: str, body: bytes, count: int) -> list[float]:
    """Let requests with this body wait for the slot; return the sorted times of /ping meanwhile, in milliseconds."""
    parent, child = multiprocessing.Pipe()
    pinging = multiprocessing.Process(target=ping, args=(port, child))
    pinging.start()
    links = [request(port, key, body) for _ in range(count)]
    time.sleep(AFTER_S)
    parent.send(None)
    times: list[float] = parent.recv()
    pinging.join()
    for link in links:
        link.close()
    return times


def main(argv: Sequence[str]) -> int:
    count, size = (*map(int, argv), *(24, 10)[len(argv) :])
    key = "sk-bench-" + secrets.token_hex(16)
    worst_ms = 0.0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        keys = Path(folder) / "keys.txt"
        keys.write_text(f"bench:{key}:1000000000\n")
        settings = LOCAL_ONLY | {"DATA_DIR": folder, "AUTH_KEYS_FILE": str(keys)}
        mock = server(LOCAL_ONLY | MOCK, r"listening on http://\S+:(\d+)", "mock_backend.py", "--port", "0")
        with (
            mock as (_, backend_port),
            server(settings | {"PORT_BACKEND": str(backend_port)}, r"listens on .* port (\d+)", "gateway.py") as found,
        ):
            pid, port = found
            with request(port, key, b'{"prompt":"x","max_tokens":100000,"stream":true}') as occupant:
                occupant.recv(1)
                for shape, body in SHAPES.items():
                    used_s = cpu_s(pid)
                    times = measure(port, key, body(size << 20), count)
                    used_s = cpu_s(pid) - used_s
                    p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
                    worst_ms = max(worst_ms, p99)
                    shown = f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {times[-1]:.1f} ms of {len(times)}"
                    print(f"{shape}: {count} bodies of {size} MiB: /ping {shown}; {used_s:.1f} s of CPU")
    return int(worst_ms >= LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
