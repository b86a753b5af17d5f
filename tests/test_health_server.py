"""health_server.py: what the state file says is what a probe is told, whatever other clients do."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import health_server
from health_server import HealthServer, State

PROGRAM = Path(health_server.__file__)
NOW_S = 1767323045.0
DATE = "Date: Fri, 02 Jan 2026 03:04:05 GMT\r\nCache-Control: no-store\r\nConnection: close\r\n"


def tell(path: Path, state: object) -> None:
    """Replace the state file as the supervisor does."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"state": state, "since": "2026-01-02T03:04:05Z", "detail": "", "backend_pid": 1}))
    new.replace(path)


def ask(port: int, request: bytes = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", host: str = "127.0.0.1") -> bytes:
    with socket.create_connection((host, port), timeout=10) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def status(response: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 ([0-9]{3}) [A-Z]", response)
    assert match, response
    return int(match[1])


# The state


def test_the_state_is_what_the_file_says_now(tmp_path: Path):
    path = tmp_path / "state.json"
    state = State(path)
    assert state.now() == "loading"
    for word in ("loading", "ready", "draining", "dead", "ready"):
        tell(path, word)
        assert state.now() == word
        assert state.now() == word


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": 1}', '{"state": []}', '{"state": "fine"}', "\xff"])
def test_a_file_that_cannot_be_understood_changes_nothing(tmp_path: Path, text: str):
    path = tmp_path / "state.json"
    state = State(path)
    path.write_text(text, encoding="latin-1")
    assert state.now() == "loading"
    tell(path, "ready")
    assert state.now() == "ready"
    path.write_text(text, encoding="latin-1")
    assert state.now() == "ready"


def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path):
    path = tmp_path / "state.json"
    state = State(path)
    tell(path, "ready")
    assert state.now() == "ready"
    path.unlink()
    path.mkdir()
    assert state.now() == "ready"


def test_without_its_file_the_state_is_loading_before_and_dead_after(tmp_path: Path):
    path, away = tmp_path / "state.json", tmp_path / "away"
    state = State(path)
    assert state.now() == "loading"
    tell(path, "ready")
    assert state.now() == "ready"
    path.rename(away)
    assert state.now() == "dead"
    assert state.now() == "dead"
    away.rename(path)
    assert state.now() == "ready"


def test_without_a_setting_the_state_is_loading():
    assert State(None).now() == "loading"


# The answer


@pytest.mark.parametrize("target", ["/ping", "/ready", "/ready?x=1"])
@pytest.mark.parametrize(("state", "code"), [("loading", 204), ("ready", 200), ("draining", 503), ("dead", 503)])
def test_pitfall_47_readiness_is_the_backends_state(target: str, state: str, code: int):
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert status(health_server.answer(head, state, NOW_S)) == code


@pytest.mark.parametrize("target", ["/", "/health", "/ping/", "/pinger", "//ping", "*", "/?/ready"])
@pytest.mark.parametrize("state", ["loading", "ready", "draining", "dead"])
def test_any_other_path_is_200_while_the_process_lives(target: str, state: str):
    head = f"GET {target} HTTP/1.0\r\n\r\n".encode()
    assert status(health_server.answer(head, state, NOW_S)) == 200


def test_answers_are_these_bytes():
    def answer(method: str, target: str, state: str) -> str:
        return health_server.answer(f"{method} {target} HTTP/1.1\r\n\r\n".encode(), state, NOW_S).decode()

    typed = "Content-Type: text/plain\r\nContent-Length"
    assert answer("GET", "/ready", "ready") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\nready\n"
    assert answer("HEAD", "/ready", "ready") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\n"
    assert answer("GET", "/ping", "loading") == f"HTTP/1.1 204 No Content\r\n{DATE}\r\n"
    assert answer("HEAD", "/ping", "loading") == f"HTTP/1.1 204 No Content\r\n{DATE}\r\n"
    assert answer("GET", "/ping", "dead") == f"HTTP/1.1 503 Service Unavailable\r\n{DATE}{typed}: 5\r\n\r\ndead\n"
    assert answer("GET", "/", "dead") == f"HTTP/1.1 200 OK\r\n{DATE}{typed}: 6\r\n\r\nalive\n"
    assert answer("POST", "/ping", "ready") == (
        f"HTTP/1.1 405 Method Not Allowed\r\n{DATE}Allow: GET, HEAD\r\n{typed}: 19\r\n\r\nmethod not allowed\n"
    )


@pytest.mark.parametrize(
    "line",
    [b"", b"GET", b"GET /ping", b"GET  /ping HTTP/1.1", b"GET /ping HTTP/2.0", b"GET /p\xe9 HTTP/1.1", b"\x16\x03\x01"],
)
def test_what_is_no_request_is_refused(line: bytes):
    assert status(health_server.answer(line + b"\r\n\r\n", "ready", NOW_S)) == 400


# The server


def serve(state: State, test: Callable[[int, HealthServer], Awaitable[None]], **limits: float) -> None:
    """Run a test beside a server on a free port, with whatever asyncio has to complain of an error."""
    complaints: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        server = HealthServer(state, **limits)  # type: ignore[arg-type]
        port = await server.start("127.0.0.1", 0)
        try:
            await test(port, server)
        finally:
            await server.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert complaints == []


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


def test_a_head_may_come_in_pieces():
    async def test(port: int, server: HealthServer) -> None:
        head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        assert status(await fetch(port, *(head[at : at + 1] for at in range(len(head))))) == 200

    serve(State(None), test)


def test_a_head_is_bounded_on_both_sides():
    async def test(port: int, server: HealthServer) -> None:
        for octets, code in ((health_server.HEAD_BYTES, 200), (health_server.HEAD_BYTES + 1, 431)):
            line = b"GET / HTTP/1.1\r\nX: "
            head = line + b"x" * (octets - len(line) - 4) + b"\r\n\r\n"
            assert status(await fetch(port, head)) == code
        assert status(await fetch(port, b"x" * (health_server.HEAD_BYTES + 1))) == 431

    serve(State(None), test)


def test_pitfall_46_idle_and_slow_clients_delay_no_probe():
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in idle[:25]:
            writer.write(b"GET /ping HT")
        for _ in range(20):
            assert status(await fetch(port, b"GET /ping HTTP/1.1\r\n\r\n")) == 204
        assert not any(reader.at_eof() for reader, _ in idle)
        await hang_up(idle)

    serve(State(None), test, deadline_s=60.0)


def test_pitfall_46_where_too_many_connections_are_open_the_oldest_makes_room():
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        for reader, _ in idle[:4]:
            assert await gone(reader)
        assert status(await fetch(port, b"GET /ping HTTP/1.1\r\n\r\n")) == 204
        assert await gone(idle[4][0])
        assert not any(reader.at_eof() for reader, _ in idle[5:])
        await hang_up(idle)

    serve(State(None), test, max_connections=4, deadline_s=60.0)


async def gone(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


def test_the_whole_exchange_has_one_deadline():
    async def test(port: int, server: HealthServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ping")
        assert await gone(reader)
        await hang_up([(reader, writer)])

    serve(State(None), test, deadline_s=0.05)


def test_clients_that_leave_or_reset_leave_nothing_behind():
    async def test(port: int, server: HealthServer) -> None:
        for linger in (b"\x01\0\0\0\0\0\0\0", b"\0" * 8):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.sendall(b"GET /ping")
            assert status(await fetch(port, b"GET / HTTP/1.1\r\n\r\n")) == 200
        while server._oldest_first:
            await asyncio.sleep(0)

    serve(State(None), test)


def test_a_server_that_never_started_can_be_closed():
    asyncio.run(HealthServer(State(None)).close())


def test_closing_cuts_what_is_open():
    async def test(port: int, server: HealthServer) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert status(await fetch(port, b"GET / HTTP/1.1\r\n\r\n")) == 200
        await server.close()
        for reader, _ in idle:
            assert await gone(reader)
        await hang_up(idle)

    serve(State(None), test, deadline_s=60.0)


# The program


@contextmanager
def program(**environ: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program and its port, once it listens; it is gone at the end."""
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
        timeout=30,
        check=False,
    )


def test_program_tells_the_state_of_its_file(tmp_path: Path):
    path = tmp_path / "state.json"
    with program(STATE_FILE=str(path)) as (_, port):
        assert status(ask(port)) == 204
        for state, code in (("ready", 200), ("draining", 503), ("dead", 503), ("loading", 204)):
            tell(path, state)
            assert status(ask(port)) == code
            assert status(ask(port, b"GET / HTTP/1.1\r\n\r\n")) == 200


def test_program_never_touches_gateway_or_backend(tmp_path: Path):
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
def test_pitfall_34_a_signal_ends_it_with_0_and_no_traceback(number: int):
    with program() as (process, port), socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET /ping")
        ask(port)
        process.send_signal(signal.SIGHUP)
        assert status(ask(port)) == 204
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.wait(10) == 0


def test_a_taken_port_is_one_clear_line_and_status_5():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(HOST="127.0.0.1", PORT_HEALTH=str(port))
    assert done.returncode == 5
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert f"ERROR health: cannot listen on 127.0.0.1 port {port} (HOST, PORT_HEALTH): " in done.stdout
    assert "ddress already in use" in done.stdout


def test_a_wrong_setting_is_status_2():
    done = run(PORT_HEALTH="x", AUTH_ENABLED="ture")
    assert done.returncode == 2
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [
        ["health", " PORT_HEALTH"],
        ["health", " AUTH_ENABLED"],
    ]


def test_help_is_shown_and_nothing_started():
    done = run("--help", PORT_HEALTH="x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: health_server.py")


@pytest.mark.parametrize("word", ["--hlep", "--he=1", "start"])
def test_an_unknown_argument_is_status_2_and_starts_nothing(word: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:  # where it would end with 5
        done = run(word, HOST="127.0.0.1", PORT_HEALTH=str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("health_server.py: error: ")


def test_it_listens_on_ipv6_and_logs_json(tmp_path: Path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with program(HOST="::1", LOG_FORMAT="json") as (_, port):
        assert status(ask(port, host="::1")) == 204
