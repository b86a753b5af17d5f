#!/usr/bin/env python3
"""Measure what the gateway adds, against the mock backend on this machine (`make bench`).

    python3 bench/run.py [options of scripts/benchmark.py]      make bench ARGS="--html report.html"

Starts mock_backend.py and gateway.py on loopback, runs scripts/benchmark.py against both, stops them, and prints the
CPU time of the gateway. The mock sends 200 tokens per second in each of 32 slots, so that the gateway is measured and
not a model. It takes 75 s. docs/BENCHMARK.md explains the figures. Exit status: that of benchmark.py.
"""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STOP_S = 15.0
PLAN = ("--concurrency", "1,8,16", "--rounds", "3", "--requests", "32", "--max-tokens", "64")
MOCK = {"MOCK_SLOTS": "32", "MOCK_TOKENS_PER_SECOND": "200", "MOCK_PROMPT_MS": "0"}
LOCAL_ONLY = {"PATH": os.environ.get("PATH", ""), "HOST": "127.0.0.1", "PORT": "0"}


@contextmanager
def server(environ: Mapping[str, str], announcement: str, *argv: str) -> Iterator[tuple[int, int]]:
    """Run a script until the block ends. Yields its pid and the port that it announces."""
    command = [sys.executable, str(SCRIPTS / argv[0]), *argv[1:]]
    process = subprocess.Popen(
        command,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process.pid, announced_port(process, announcement)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def announced_port(process: "subprocess.Popen[str]", announcement: str) -> int:
    """Read the output up to the line with the port, which the regular expression finds. Raises RuntimeError."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if found := re.search(announcement, line):
            return int(found[1])
    raise RuntimeError(f"it ended before it listened:\n{output}")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def total(page: str, name: str, label: str) -> float:
    """Sum the samples of a counter that have a label."""
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if line.startswith(name + "{")]
    return sum(float(value) for series, value in lines if label in series)


def report_cpu(used_s: float, port: int, key: str) -> None:
    """Print the CPU time of the gateway per request and per token."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        page = answer.read().decode()
    requests = total(page, "gateway_requests_total", 'code="200"')
    tokens = total(page, "gateway_tokens_total", 'type="completion"')
    if not requests:  # after --help, or if every request failed
        return
    print(f"\nThe gateway used {used_s:.2f} s of CPU for {requests:.0f} requests and {tokens:.0f} tokens", end="")
    if tokens:
        print(f": {used_s * 1e3 / requests:.2f} ms per request or {used_s * 1e6 / tokens:.0f} µs per token", end="")
    print(".")


def main(argv: Sequence[str]) -> int:
    key = "sk-bench-" + secrets.token_hex(16)
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
            command = [sys.executable, str(SCRIPTS / "benchmark.py"), *PLAN, *argv]
            command += ["--direct", f"http://127.0.0.1:{backend_port}", "--gateway", f"http://127.0.0.1:{port}"]
            started_s = cpu_s(pid)
            status = subprocess.run(command, env={**os.environ, "GATEWAY_API_KEY": key}, check=False).returncode
            if status in (0, 1):
                report_cpu(cpu_s(pid) - started_s, port, key)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
