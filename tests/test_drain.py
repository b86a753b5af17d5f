"""The end: who waits is refused, who streams may finish, what is left is cut visibly, and the process ends with 0."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.clock import HURRY
from support.gateway import (
    CHAT,
    KEY,
    KEYS,
    OPERATOR_KEY,
    Stack,
    get,
    make_certificate,
    post,
    request,
    scenario,
    tls_scenario,
    trusting,
    until,
)
from support.rawclient import RawClient
from support.together import aside

SCRIPTS = Path(__file__).parent.parent / "scripts"
MEASURED = {name: value for name, value in os.environ.items() if name.startswith("COV")}
DRAIN = request(b"POST", b"/drain", b"", key=OPERATOR_KEY)
PATIENT = {"DRAIN_TIMEOUT": "1000"}
HASTY = {"DRAIN_TIMEOUT": "0.05"}


async def ended(stack: Stack) -> None:
    await asyncio.wait_for(stack.gateway.run_until_ended(), 20 * HURRY)


async def working(stack: Stack, *first: bytes) -> RawClient:
    """A client whose request is at the backend, which sends `first`, waits for `stack.finish`, and goes on."""
    rest = (chunk(event("end")) + LAST_CHUNK) if first else answer()
    stack.backend.script(*(send(each) for each in first), stall(stack.finish), send(rest))
    before = len(stack.backend.calls)
    client = await stack.client()
    client.send(post())
    await stack.backend.call(before)
    if first:
        await client.take_through(b"\r\n\r\n")
    return client


@scenario(**PATIENT)
async def test_idle_gateway_drains_at_once(stack):
    idle = await stack.client()
    await until(lambda: stack.parts.clients)
    stack.gateway.drain()
    await ended(stack)
    assert await idle.take_all() == b""
    with pytest.raises(ConnectionRefusedError):
        await stack.client()


@pytest.mark.parametrize("turns", range(6))
@scenario(**PATIENT)
async def test_newcomer_of_that_moment_does_not_hold_it_up(stack, turns):
    client = await stack.client()
    for _ in range(turns):
        await asyncio.sleep(0)
    stack.gateway.drain()
    await ended(stack)
    await client.until(lambda: bool(client.ended))


@scenario(**PATIENT)
async def test_operator_drains_and_nobody_else(stack):
    assert (await stack.ask(request(b"POST", b"/drain", b""))).status == 403
    assert (await stack.ask(request(b"POST", b"/drain", b"", key=None))).status == 401
    assert (await stack.ask(get(b"/drain", key=OPERATOR_KEY))).status == 405
    assert not stack.parts.draining
    client = await stack.client()
    client.send(DRAIN)
    response = await client.response()
    assert (response.status, response.json, response.field(b"connection")) == (202, {"state": "draining"}, b"close")
    await ended(stack)


@scenario(**PATIENT)
async def test_streams_and_answers_under_way_finish_and_their_connections_end(stack):
    stream, whole = await working(stack, STREAM_HEAD + chunk(event("1"))), await working(stack)
    idle = await stack.client()
    stack.gateway.drain()
    stack.gateway.drain()
    assert await idle.take_all() == b""
    stack.finish.set()
    assert await stream.take_all() == chunk(event("1")) + chunk(event("end")) + LAST_CHUNK
    response = await whole.response()
    assert (response.status, response.body, response.field(b"connection")) == (200, HELLO, b"close")
    assert await whole.take_all() == b""
    await ended(stack)
    await stack.stop()
    assert {line["outcome"] for line in stack.lines} == {"done"}


@scenario(MAX_CONCURRENT_REQUESTS="1", **PATIENT)
async def test_queued_requests_are_refused(stack):
    first = await working(stack)
    queued = await stack.client()
    queued.send(post())
    await until(lambda: stack.parts.gate.queued == 1)
    stack.gateway.drain()
    response = await queued.response()
    assert (response.status, response.code) == (503, "draining")
    assert (response.field(b"connection"), response.field(b"retry-after")) == (b"close", b"5")
    assert await queued.take_all() == b""
    stack.finish.set()
    assert (await first.response()).status == 200
    await ended(stack)
    assert len(stack.backend.calls) == 1


@pytest.mark.parametrize("state", ["ready", "loading"])
@scenario(MAX_CONCURRENT_REQUESTS="1", **PATIENT)
async def test_who_would_begin_to_wait_is_refused_too(stack, state):
    """Its body was on its way when the end began."""
    first, late = await working(stack), await stack.client()
    raw = post(CHAT, b"0123456789")
    late.send(raw[:-5])
    await until(lambda: any(c.request and c.request.stage == "reading_body" for c in stack.parts.clients))
    stack.gateway.drain()
    if state != "ready":
        stack.parts.readiness.doubt()
    late.send(raw[-5:])
    response = await late.response()
    assert (response.status, response.code, response.field(b"connection")) == (503, "draining", b"close")
    stack.finish.set()
    assert (await first.response()).status == 200
    await ended(stack)
    assert len(stack.backend.calls) == 1


@scenario(STATE="loading", **PATIENT)
async def test_held_requests_are_refused_and_a_begun_stream_gets_the_event(stack):
    plain, stream = await stack.client(), await stack.client()
    plain.send(post())
    stream.send(post(CHAT, b'{"stream": true}'))
    await until(lambda: stack.parts.gate.queued == 2)
    stack.advance(15)
    await stream.take_through(b"\n\n\r\n")
    stack.gateway.drain()
    assert (await plain.response()).code == "draining"
    rest = await stream.take_all()
    assert rest.count(b"data: ") == 1
    assert b'"code": "draining"' in rest
    assert rest.endswith(LAST_CHUNK)
    await ended(stack)


@scenario(**PATIENT)
async def test_head_that_is_on_its_way_is_answered_and_its_connection_closed(stack):
    clients = [await stack.client() for _ in range(3)]
    idle = await stack.client()
    for client in clients:
        client.send(b"GET ")
    await until(lambda: sum(wire.has_unread for wire in stack.parts.clients) == 3)
    stack.gateway.drain()
    assert await idle.take_all() == b""
    for client, rest, status in zip(
        clients, (get(b"/ping"), get(b"/health"), get(b"/v1/models")), (200, 503, 503), strict=True
    ):
        client.send(rest.removeprefix(b"GET "))
        response = await client.response()
        assert (response.status, response.field(b"connection")) == (status, b"close")
        assert await client.take_all() == b""
        if rest.startswith(b"GET /health"):
            assert response.json["state"] == "draining"
    await ended(stack)


@scenario(**PATIENT)
async def test_pipelined_request_behind_the_last_answer_is_refused(stack):
    client = await working(stack)
    client.send(post())
    stack.gateway.drain()
    stack.finish.set()
    assert (await client.response()).status == 200
    assert await client.take_all() == b""
    client.close()
    await ended(stack)


@scenario(**HASTY)
async def test_what_has_not_finished_in_time_is_cut_with_one_error_event(stack):
    stream, silent = await working(stack, STREAM_HEAD + chunk(event("1"))), await working(stack)
    sized = await working(stack, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    stack.gateway.drain()
    await ended(stack)
    rest = (await stream.take_all()).removeprefix(chunk(event("1")))
    assert rest.count(b"data: ") == 1
    assert b'"code": "draining"' in rest
    assert not rest.endswith(LAST_CHUNK)
    assert (await silent.response()).code == "draining"
    assert await sized.take_all() == b"abc"
    for call in stack.backend.calls:
        await asyncio.wait_for(call.gone.wait(), 10 * HURRY)
    await stack.stop()
    assert sorted(line["outcome"] for line in stack.lines) == ["refused", "truncated", "truncated"]


@scenario(**PATIENT)
async def test_a_second_signal_does_not_wait(stack):
    client = await working(stack, STREAM_HEAD)
    stack.gateway.drain()
    stack.gateway.stop()
    await ended(stack)
    await stack.gateway.close()
    await client.until(lambda: bool(client.ended))
    assert not client.received.endswith(LAST_CHUNK)


@tls_scenario(**PATIENT)
async def test_handshake_that_ends_after_the_end_began_is_turned_away(stack):
    loop = asyncio.get_running_loop()
    trust = trusting(stack.folder / "server.crt")
    idle = await stack.client(tls=trust)
    held = await stack.client(tls=trust)
    stack.backend.script(stall(stack.finish), send(answer()))
    held.send(post())
    await stack.backend.call()
    with socket.socket() as late:
        late.setblocking(False)
        await loop.sock_connect(late, ("127.0.0.1", stack.port))
        stack.gateway.drain()
        await idle.until(lambda: bool(idle.ended))
        _, client = await loop.create_connection(RawClient, sock=late, ssl=trust, server_hostname="localhost")
        await client.until(lambda: bool(client.ended))
        client.close()
    stack.finish.set()
    assert (await held.response()).status == 200
    await ended(stack)


# --- The process ---


@contextmanager
def process(
    folder: Path, scripts: Path = SCRIPTS, options: Sequence[str] = (), **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """gateway.py as the supervisor runs it; its first output names its port."""
    keys = folder / "keys.txt"
    if not keys.exists():
        keys.write_text(KEYS)
    environ = {
        **MEASURED,
        "PATH": os.environ["PATH"],
        "HOST": "127.0.0.1",
        "PORT": "0",
        "DATA_DIR": str(folder),
        "AUTH_KEYS_FILE": str(keys),
        **settings,
    }
    words = [sys.executable, str(scripts / "gateway.py"), *options]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as gateway:
        try:
            yield gateway
        finally:
            gateway.kill()


def port_of(gateway: subprocess.Popen[str]) -> int:
    said = []
    while line := gateway.stdout.readline():
        said.append(line)
        if " port " in line:
            return int(line.rpartition(" port ")[2])
    raise AssertionError(said)


def exchange(port: int, raw: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(raw)
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@aside
def test_pitfall_34_a_signal_ends_it_with_0_and_no_traceback(tmp_path, number):
    with process(tmp_path) as gateway:
        port = port_of(gateway)
        assert b"200 OK" in exchange(port, get(b"/ping", b"Connection: close"))
        with socket.create_connection(("127.0.0.1", port), 20):  # an idle connection does not hold it up
            gateway.send_signal(number)
            said = gateway.communicate(timeout=20)[0]
        assert gateway.returncode == 0
        assert "draining" in said
        assert "stopped" in said
        assert "Traceback" not in said


@aside
def test_pitfall_34_a_second_signal_ends_it_at_once(tmp_path):
    state = tmp_path / "state.json"
    state.write_text('{"state": "ready"}')
    with socket.create_server(("127.0.0.1", 0)) as backend:
        settings = {
            "PORT_BACKEND": str(backend.getsockname()[1]),
            "STATE_FILE": str(state),
            "MAX_CONCURRENT_REQUESTS": "1",
        }
        with (
            process(tmp_path, DRAIN_TIMEOUT="1000", **settings) as gateway,
            socket.create_connection(("127.0.0.1", port_of(gateway)), 20) as client,
        ):
            client.sendall(post())
            with backend.accept()[0] as held:
                assert held.recv(4) == b"POST"
                gateway.send_signal(signal.SIGTERM)
                while "draining" not in gateway.stdout.readline():
                    pass
                gateway.send_signal(signal.SIGTERM)
                said = gateway.communicate(timeout=20)[0]
            assert gateway.returncode == 0
            assert "Traceback" not in said


@pytest.mark.parametrize("is_parent", [True, False])
def test_a_drain_is_told_to_the_parent_that_asked_for_it_and_to_nobody_else(tmp_path, is_parent):
    told = []
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append("told"))
    try:
        with subprocess.Popen(["sleep", "60"]) as stranger:
            parent = os.getpid() if is_parent else stranger.pid
            with process(tmp_path, options=["--parent", str(parent)]) as gateway:
                port_of(gateway)
                gateway.send_signal(signal.SIGTERM)
                assert gateway.wait(20) == 0
            stranger.terminate()
            assert stranger.wait(20) == -signal.SIGTERM  # SIGUSR1, by its lower number, would have killed it first
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["told"] * is_parent


def between(folder: Path, before: str, after: str) -> Path:
    """Scripts whose gateway.py is the real one, with a line of Python before it starts and one after its end."""
    scripts = folder / "scripts"
    scripts.mkdir()
    (scripts / "gateway.py").write_text(f"""
import gc, resource, runpy, sys
sys.path[0] = {str(SCRIPTS)!r}
sys.argv[0] = {str(SCRIPTS / "gateway.py")!r}
{before}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    {after}
""")
    return scripts


@aside
def test_garbage_is_collected_once_it_listens(tmp_path):
    with process(tmp_path, between(tmp_path, "pass", 'print("collected:", gc.isenabled())')) as gateway:
        port_of(gateway)
        gateway.send_signal(signal.SIGTERM)
        assert "collected: True" in gateway.communicate(timeout=20)[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
def test_room_is_made_for_handshakes_too(tmp_path):
    certificate = make_certificate(tmp_path)
    files = {"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(certificate.with_suffix(".key"))}
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    with process(tmp_path, between(tmp_path, few, "pass"), MAX_CONNECTIONS="100", **files) as gateway:
        while "MAX_CONNECTIONS=100 may need 556 file descriptors with TLS" not in (line := gateway.stdout.readline()):
            assert line
            assert " port " not in line


@aside
def test_hangup_reloads_the_keys(tmp_path):
    with process(tmp_path, KEYS_WATCH_SECONDS="0") as gateway:
        port = port_of(gateway)
        (tmp_path / "keys.txt").write_text("olga:" + OPERATOR_KEY.decode() + " role=operator\n")
        gateway.send_signal(signal.SIGHUP)
        while "1 in force" not in gateway.stdout.readline():
            pass
        assert b" 401 " in exchange(port, get(b"/v1/models", b"Connection: close", key=KEY))
        assert b" 202 " in exchange(port, DRAIN.replace(b"Content", b"Connection: close\r\nContent"))
        assert gateway.wait(20) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this platform lets nobody else lower a limit")
@aside
def test_connections_wait_while_descriptors_have_run_out_and_the_log_stays_short(tmp_path):
    with process(tmp_path) as gateway, ExitStack() as crowd:
        port = port_of(gateway)
        fewer = len(list(Path(f"/proc/{gateway.pid}/fd").iterdir())) + 5
        _, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (fewer, hard))
        for _ in range(30):
            crowd.enter_context(socket.create_connection(("127.0.0.1", port)))
        while "out of file descriptors" not in (line := gateway.stdout.readline()):
            assert line
        crowd.close()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(get(b"/ping", b"Connection: close"))
            assert client.makefile("rb").read().endswith(b"pong\n")
        gateway.send_signal(signal.SIGTERM)
        said = gateway.communicate(timeout=20)[0]
        assert "out of file descriptors" not in said
        assert "Traceback" not in said


@aside
def test_taken_port_is_status_5_and_one_line(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        process(tmp_path, PORT=str(taken.getsockname()[1])) as gateway,
    ):
        said = gateway.communicate(timeout=20)[0]
        assert gateway.returncode == 5
        assert "cannot listen on 127.0.0.1 port" in said
        assert "Traceback" not in said


@aside
def test_bad_settings_are_status_2_and_all_told(tmp_path):
    with process(tmp_path, AUTH_ENABLED="ture", MAX_QUEUE_SIZE="-1") as gateway:
        said = gateway.communicate(timeout=20)[0]
        assert gateway.returncode == 2
        assert "AUTH_ENABLED" in said
        assert "MAX_QUEUE_SIZE" in said


@aside
def test_certificate_that_cannot_be_read_is_status_2(tmp_path):
    for name in ("a.crt", "a.key"):
        (tmp_path / name).write_text("not a certificate\n")
    files = {"TLS_CERT_FILE": str(tmp_path / "a.crt"), "TLS_KEY_FILE": str(tmp_path / "a.key")}
    with process(tmp_path, **files) as gateway:
        said = gateway.communicate(timeout=20)[0]
        assert gateway.returncode == 2
        assert "TLS_CERT_FILE" in said
        assert "Traceback" not in said


@aside
def test_old_name_of_a_setting_is_warned_of_once(tmp_path):
    with process(tmp_path, PORT="", GATEWAY_PORT="0") as gateway:
        said = []
        while " port " not in (line := gateway.stdout.readline()):
            said.append(line)
        assert sum("GATEWAY_PORT" in line for line in said) == 1
        gateway.send_signal(signal.SIGTERM)
        assert "GATEWAY_PORT" not in gateway.communicate(timeout=20)[0]


@aside
def test_check_config_prints_and_does_not_listen(tmp_path):
    words = [sys.executable, str(SCRIPTS / "gateway.py"), "--check-config"]
    done = subprocess.run(
        words, env={**MEASURED, "DATA_DIR": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0
    assert "MAX_CONCURRENT_REQUESTS" in done.stdout


@pytest.mark.parametrize("name", ["auth", "keyfile", "routes", "http1"])
@aside
def test_pitfall_44_without_a_sibling_nothing_is_served(tmp_path, name):
    scripts = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__", f"{name}.py"))
    with process(tmp_path, scripts) as gateway:
        said = gateway.communicate(timeout=20)[0]
        assert gateway.returncode == 1
        assert f"No module named '{name}'" in said
