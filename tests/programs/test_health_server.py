"""health_server.py: a probe's response is the state in the state file, whatever other clients do."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import health_server
from core.state_file import StateReader
from health_server import HealthServer
from support.boot import PATIENCE_S
from support.together import aside

PROGRAM = Path(health_server.__file__)
NOW_S = 1767323045.0
DATE = "Date: Fri, 02 Jan 2026 03:04:05 GMT\r\nCache-Control: no-store\r\nConnection: close\r\n"


def write_state(path: Path, state: str) -> None:
    """Replace the state file as the supervisor does."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"state": state, "since": "2026-01-02T03:04:05Z", "detail": "", "backend_pid": 1}))
    new.replace(path)


def ask(port: int, request: bytes = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", host: str = "127.0.0.1") -> bytes:
    with socket.create_connection((host, port), timeout=PATIENCE_S) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def status(response: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 ([0-9]{3}) [A-Z]", response)
    assert match, response
    return int(match[1])


# The response


@pytest.mark.parametrize("target", ["/ping", "/ready", "/ready?x=1"])
@pytest.mark.parametrize(("state", "code"), [("loading", 204), ("ready", 200), ("draining", 503), ("dead", 503)])
def test_readiness_is_the_backends_state(target: str, state: str, code: int) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert status(health_server.respond(head, state, NOW_S)) == code


@pytest.mark.parametrize(
    "target",
    [
        *[
            "/ready/",
            "//ready",
            "/ready//",
            "/./ready",
            "/x/../ready",
            "/READY",
            "/Ready?x",
            "/ready#x",
            "/readyz",
            "/readyz/",
        ],
        *[
            "/readiness",
            "/%72eady",
            "/ready%2F",
            "%2Fready",
            "ready",
            "http://127.0.0.1/ready",
            "HTTP://[::1]:8001//ready/?x",
        ],
    ],
)
def test_another_spelling_of_ready_is_ready(target: str) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    codes = [status(health_server.respond(head, state, NOW_S)) for state in ("loading", "ready", "draining", "dead")]
    assert codes == [204, 200, 503, 503]


@pytest.mark.parametrize(
    "target", ["/already", "/ready/now", "/x/ready", "/?ready", "http://ready", "/readyzz", "/ready.txt"]
)
def test_a_path_that_only_contains_ready_is_not_ready(target: str) -> None:
    assert status(health_server.respond(f"GET {target} HTTP/1.1\r\n\r\n".encode(), "dead", NOW_S)) == 200


@pytest.mark.parametrize("target", ["/", "/health", "/ping/", "/pinger", "//ping", "*", "/?/ready"])
@pytest.mark.parametrize("state", ["loading", "ready", "draining", "dead"])
def test_any_other_path_is_200_while_the_process_lives(target: str, state: str) -> None:
    head = f"GET {target} HTTP/1.0\r\n\r\n".encode()
    assert status(health_server.respond(head, state, NOW_S)) == 200


def test_responses_are_these_bytes() -> None:
    def response(method: str, target: str, state: str) -> str:
        return health_server.respond(f"{method} {target} HTTP/1.1\r\n\r\n".encode(), state, NOW_S).decode()

    typed = "Content-Type: text/plain\r\nContent-Length"
    assert response("GET", "/ready", "ready") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\nready\n"
    assert response("HEAD", "/ready", "ready") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\n"
    assert response("GET", "/ping", "loading") == f"HTTP/1.1 204 No Content\r\n{DATE}\r\n"
    assert response("HEAD", "/ping", "loading") == f"HTTP/1.1 204 No Content\r\n{DATE}\r\n"
    assert response("GET", "/ping", "dead") == f"HTTP/1.1 503 Service Unavailable\r\n{DATE}{typed}: 5\r\n\r\ndead\n"
    assert response("GET", "/", "dead") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\nalive\n"
    assert response("POST", "/ping", "ready") == (
        f"HTTP/1.1 405 Method Not Allowed\r\n{DATE}Allow: GET, HEAD\r\n{typed}: 19\r\n\r\nmethod not allowed\n"
    )


@pytest.mark.parametrize(
    "line",
    [b"", b"GET", b"GET /ping", b"GET  /ping HTTP/1.1", b"GET /ping HTTP/2.0", b"GET /p\xe9 HTTP/1.1", b"\x16\x03\x01"],
)
def test_bytes_that_are_not_a_request_are_refused(line: bytes) -> None:
    assert status(health_server.respond(line + b"\r\n\r\n", "ready", NOW_S)) == 400


# The server


@aside
def test_while_the_state_files_volume_hangs_the_state_is_the_last_one() -> None:
    lifted = threading.Event()

    class Hanging(StateReader):
        def read(self) -> str:
            lifted.wait()
            self.state = "ready"
            return self.state

    state = Hanging(None)
    asks = iter((b"loading", b"loading", b"loading", b"ready"))

    async def test(port: int, server: HealthServer) -> None:
        for wanted in asks:
            if wanted == b"ready":
                lifted.set()
            while (answer := await fetch(port, b"GET /ready HTTP/1.0\r\n\r\n")).endswith(b"ready\n") != (
                wanted == b"ready"
            ):
                assert status(answer) == 204
        assert status(await fetch(port, b"GET / HTTP/1.0\r\n\r\n")) == 200

    try:
        serve(test, state)
    finally:
        lifted.set()


def serve(
    test: Callable[[int, HealthServer], Awaitable[None]], state: StateReader | None = None, **limits: float
) -> None:
    """Run a test with a server on a free port; what asyncio reports is an error. The state is loading."""
    complaints: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        server = HealthServer(state or StateReader(None), **limits)  # type: ignore[arg-type]
        port = await server.start("127.0.0.1", 0)
        try:
            await test(port, server)
        finally:
            await server.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert complaints == []


async def no_task_but(before: "set[asyncio.Task[Any]]") -> None:
    while asyncio.all_tasks() - before:
        await asyncio.sleep(0)


async def fetch(port: int, *pieces: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    got = await reader.read()
    await hang_up([(reader, writer)])
    return got


async def hang_up(connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in connections:
        writer.close()
    for _, writer in connections:
        with suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("request_bytes", [b"GET /ready HTTP/1.0\n\n", b"GET /ready HTTP/1.1\r\nHost: x\n", b"\n"])
def test_a_line_that_ends_without_crlf_is_refused_at_once(request_bytes: bytes) -> None:
    async def test(port: int, _server: HealthServer) -> None:
        assert status(await fetch(port, request_bytes)) == 400

    serve(test, deadline_s=3600)


def test_a_head_may_arrive_in_pieces() -> None:
    async def test(port: int, server: HealthServer) -> None:
        head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        assert status(await fetch(port, *(head[at : at + 1] for at in range(len(head))))) == 200

    serve(test)


def test_a_head_is_bounded_on_both_sides() -> None:
    async def test(port: int, server: HealthServer) -> None:
        for size, code in ((health_server.HEAD_BYTES, 200), (health_server.HEAD_BYTES + 1, 431)):
            line = b"GET / HTTP/1.1\r\nX: "
            head = line + b"x" * (size - len(line) - 4) + b"\r\n\r\n"
            assert status(await fetch(port, head)) == code
        assert status(await fetch(port, b"x" * (health_server.HEAD_BYTES + 1))) == 431

    serve(test)


def test_idle_and_slow_clients_delay_no_probe() -> None:
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in idle[:25]:
            writer.write(b"GET /ping HT")
        for _ in range(20):
            assert status(await fetch(port, b"GET /ping HTTP/1.1\r\n\r\n")) == 204
        assert not any(reader.at_eof() for reader, _ in idle)
        await hang_up(idle)

    serve(test, deadline_s=60.0)


def test_beyond_the_maximum_the_oldest_connection_is_closed() -> None:
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        for reader, _ in idle[:4]:
            assert await closed(reader)
        assert status(await fetch(port, b"GET /ping HTTP/1.1\r\n\r\n")) == 204
        assert await closed(idle[4][0])
        assert not any(reader.at_eof() for reader, _ in idle[5:])
        await hang_up(idle)

    serve(test, max_connections=4, deadline_s=60.0)


async def closed(reader: asyncio.StreamReader) -> bool:
    """Wait for the end of the connection; return whether it came without a response."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


def test_the_whole_exchange_has_one_deadline() -> None:
    async def test(port: int, server: HealthServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ping")
        assert await closed(reader)
        await hang_up([(reader, writer)])

    serve(test, deadline_s=0.05)


def test_a_client_that_leaves_or_resets_leaves_no_task_behind() -> None:
    async def test(port: int, server: HealthServer) -> None:
        before = asyncio.all_tasks()
        for linger in (b"\x01\0\0\0\0\0\0\0", b"\0" * 8):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.sendall(b"GET /ping")
            assert status(await fetch(port, b"GET / HTTP/1.1\r\n\r\n")) == 200
        await no_task_but(before)

    serve(test)


def test_a_server_that_never_started_can_be_closed() -> None:
    asyncio.run(HealthServer(StateReader(None)).close())


def test_closing_aborts_open_connections() -> None:
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert status(await fetch(port, b"GET / HTTP/1.1\r\n\r\n")) == 200
        await server.close()
        for reader, _ in idle:
            assert await closed(reader)
        await hang_up(idle)

    serve(test, deadline_s=60.0)


# The program


@contextmanager
def program(**environ: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the program; yields the process and its port once it listens. At the end it is killed."""
    env = {**os.environ, "HOST": "127.0.0.1", "PORT_HEALTH": "0", **environ}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"listening on \S+ port ([0-9]+)", line)
            assert match, line + process.stdout.read()
            yield process, int(match[1])
        finally:
            process.kill()


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *argv],
        env={**os.environ, **environ},
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_program_reports_the_state_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with program(STATE_FILE=str(path)) as (_, port):
        assert status(ask(port)) == 204
        for state, code in (("ready", 200), ("draining", 503), ("dead", 503), ("loading", 204)):
            write_state(path, state)
            assert status(ask(port)) == code
            assert status(ask(port, b"GET / HTTP/1.1\r\n\r\n")) == 200


def test_the_program_reports_dead_once_its_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with program(STATE_FILE=str(path)) as (_, port):
        write_state(path, "ready")
        assert status(ask(port)) == 200
        path.unlink()
        assert status(ask(port)) == 503


def test_the_program_never_contacts_gateway_or_backend(tmp_path: Path) -> None:
    with ExitStack() as held:
        others = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        gateway, backend = (str(sock.getsockname()[1]) for sock in others)
        _, port = held.enter_context(program(PORT=gateway, PORT_BACKEND=backend))
        for target in (b"/", b"/ping", b"/health"):
            ask(port, b"GET " + target + b" HTTP/1.1\r\n\r\n")
        for sock in others:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.accept()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_no_traceback(number: int) -> None:
    with program() as (process, port), socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET /ping")
        ask(port)
        process.send_signal(signal.SIGHUP)
        assert status(ask(port)) == 204
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.wait(PATIENCE_S) == 0


def test_a_port_in_use_is_one_line_and_status_5() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(HOST="127.0.0.1", PORT_HEALTH=str(port))
    assert done.returncode == 5
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert f"ERROR health: error: cannot listen on 127.0.0.1 port {port} (HOST, PORT_HEALTH): " in done.stdout
    assert "ddress already in use" in done.stdout


def test_a_wrong_setting_is_status_2() -> None:
    done = run(PORT_HEALTH="x", AUTH_ENABLED="ture")
    assert done.returncode == 2
    assert [line.split(":")[:3] for line in done.stderr.splitlines()] == [
        ["health", " error", " PORT_HEALTH"],
        ["health", " error", " AUTH_ENABLED"],
    ]


def test_help_is_printed_and_nothing_is_started() -> None:
    done = run("--help", PORT_HEALTH="x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: health_server.py")


@pytest.mark.parametrize("argument", ["--hlep", "--he=1", "start"])
def test_an_unknown_argument_is_status_2_and_starts_nothing(argument: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a start would end with status 5
        done = run(argument, HOST="127.0.0.1", PORT_HEALTH=str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("health_server.py: error: ")


def test_it_listens_on_ipv6_and_logs_json(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with program(HOST="::1", LOG_FORMAT="json") as (_, port):
        assert status(ask(port, host="::1")) == 204
