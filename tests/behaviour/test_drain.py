"""The drain: waiting requests are refused, streams may finish, the rest is cut visibly, and the process ends with 0."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import sleep

import pytest

from core import signals
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.boot import signal_is_default
from support.clock import PATIENCE_S
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
from support.paths import SCRIPTS
from support.rawclient import RawClient
from support.together import aside

MEASURED = {name: value for name, value in os.environ.items() if name.startswith("COV")}
DRAIN = request(b"POST", b"/drain", b"", key=OPERATOR_KEY)
PATIENT = {"DRAIN_TIMEOUT": "1000"}
HASTY = {"DRAIN_TIMEOUT": "0.05"}


async def ended(stack: Stack) -> None:
    await stack.gateway.run_until_ended()


async def working(stack: Stack, *first: bytes) -> RawClient:
    """Return a client whose request is answered by `first` and, once `stack.finish` is set, by the rest."""
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
async def test_an_idle_gateway_drains_at_once(stack: Stack) -> None:
    idle = await stack.client()
    await until(lambda: stack.clients)
    stack.app.lifecycle.drain()
    await ended(stack)
    assert await idle.take_all() == b""
    with pytest.raises(ConnectionRefusedError):
        await stack.client()


@pytest.mark.parametrize("turns", range(6))
@scenario(**PATIENT)
async def test_a_connection_that_arrives_as_the_drain_begins_does_not_delay_it(stack: Stack, turns: int) -> None:
    client = await stack.client()
    for _ in range(turns):
        await asyncio.sleep(0)
    stack.app.lifecycle.drain()
    await ended(stack)
    await client.until(lambda: bool(client.ended))


@scenario(**PATIENT)
async def test_only_an_operator_may_drain(stack: Stack) -> None:
    assert (await stack.ask(request(b"POST", b"/drain", b""))).status == 403
    assert (await stack.ask(request(b"POST", b"/drain", b"", key=None))).status == 401
    assert (await stack.ask(get(b"/drain", key=OPERATOR_KEY))).status == 405
    assert not stack.app.lifecycle.draining
    client = await stack.client()
    client.send(DRAIN)
    response = await client.response()
    assert (response.status, response.json, response.field(b"connection")) == (202, {"state": "draining"}, b"close")
    await ended(stack)


@scenario(**PATIENT)
async def test_streams_and_responses_in_progress_finish_and_their_connections_end(stack: Stack) -> None:
    stream, whole = await working(stack, STREAM_HEAD + chunk(event("1"))), await working(stack)
    idle = await stack.client()
    stack.app.lifecycle.drain()
    stack.app.lifecycle.drain()
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
async def test_queued_requests_are_refused(stack: Stack) -> None:
    first = await working(stack)
    queued = await stack.client()
    queued.send(post())
    await until(lambda: stack.app.queue.queued == 1)
    stack.app.lifecycle.drain()
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
async def test_a_request_that_would_begin_to_wait_is_refused_too(stack: Stack, state: str) -> None:
    """Its body was on its way when the drain began."""
    first, late = await working(stack), await stack.client()
    raw = post(CHAT, b"0123456789")
    late.send(raw[:-5])
    await until(lambda: any(request.stage == "reading_body" for request in stack.requests))
    stack.app.lifecycle.drain()
    if state != "ready":
        stack.app.readiness.doubt()
    late.send(raw[-5:])
    response = await late.response()
    assert (response.status, response.code, response.field(b"connection")) == (503, "draining", b"close")
    stack.finish.set()
    assert (await first.response()).status == 200
    await ended(stack)
    assert len(stack.backend.calls) == 1


@scenario(STATE="loading", **PATIENT)
async def test_held_requests_are_refused_and_a_begun_stream_gets_the_event(stack: Stack) -> None:
    plain, stream = await stack.client(), await stack.client()
    plain.send(post())
    stream.send(post(CHAT, b'{"stream": true}'))
    await until(lambda: stack.app.queue.queued == 2)
    stack.advance(15)
    await stream.take_through(b"\n\n\r\n")
    stack.app.lifecycle.drain()
    assert (await plain.response()).code == "draining"
    rest = await stream.take_all()
    assert rest.count(b"data: ") == 1
    assert b'"code": "draining"' in rest
    assert rest.endswith(LAST_CHUNK)
    await ended(stack)


@scenario(**PATIENT)
async def test_a_head_that_is_on_its_way_is_answered_and_its_connection_closed(stack: Stack) -> None:
    clients = [await stack.client() for _ in range(3)]
    idle = await stack.client()
    for client in clients:
        client.send(b"GET ")
    await until(lambda: sum(each.has_unread for each in stack.clients) == 3)
    stack.app.lifecycle.drain()
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
async def test_a_pipelined_request_after_the_last_response_is_not_served(stack: Stack) -> None:
    client = await working(stack)
    client.send(post())
    stack.app.lifecycle.drain()
    stack.finish.set()
    assert (await client.response()).status == 200
    assert await client.take_all() == b""
    client.close()
    await ended(stack)


@scenario(**HASTY)
async def test_what_has_not_finished_in_time_is_cut_with_one_error_event(stack: Stack) -> None:
    stream, silent = await working(stack, STREAM_HEAD + chunk(event("1"))), await working(stack)
    sized = await working(stack, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    stack.app.lifecycle.drain()
    await ended(stack)
    rest = (await stream.take_all()).removeprefix(chunk(event("1")))
    assert rest.count(b"data: ") == 1
    assert b'"code": "draining"' in rest
    assert not rest.endswith(LAST_CHUNK)
    assert (await silent.response()).code == "draining"
    assert await sized.take_all() == b"abc"
    for call in stack.backend.calls:
        await call.gone.wait()
    await stack.stop()
    assert sorted(line["outcome"] for line in stack.lines) == ["refused", "truncated", "truncated"]


@scenario(**PATIENT)
async def test_a_second_signal_does_not_wait(stack: Stack) -> None:
    client = await working(stack, STREAM_HEAD)
    stack.app.lifecycle.drain()
    stack.gateway.stop()
    await ended(stack)
    await stack.gateway.close()
    await client.until(lambda: bool(client.ended))
    assert not client.received.endswith(LAST_CHUNK)


@tls_scenario(**PATIENT)
async def test_a_handshake_that_ends_after_the_drain_began_is_refused(stack: Stack) -> None:
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
        stack.app.lifecycle.drain()
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
    folder: Path,
    scripts: Path = SCRIPTS,
    options: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    **settings: str,
) -> Iterator[subprocess.Popen[str]]:
    """Run gateway.py as the supervisor does. Its first lines of output name its port."""
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
    command = [sys.executable, str(scripts / "gateway.py"), *options]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=pass_fds
    ) as gateway:
        try:
            yield gateway
        finally:
            gateway.kill()


def port_of(gateway: subprocess.Popen[str], output: list[str] | None = None) -> int:
    """Read the first lines, to that which names the port, into `output`."""
    output = [] if output is None else output
    while line := gateway.stdout.readline():
        output.append(line)
        if " port " in line:
            return int(line.rpartition(" port ")[2])
    raise AssertionError(output)


def exchange(port: int, raw: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        sock.sendall(raw)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def wrapped(folder: Path, before: str, after: str) -> Path:
    """Write a gateway.py that runs one line of Python, the real one, and another line; return its folder."""
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@aside
def test_a_signal_ends_the_process_with_status_0_and_no_traceback(tmp_path: Path, number: int) -> None:
    """Until then garbage is collected. The old name of a setting is warned of once."""
    scripts = wrapped(tmp_path, "pass", 'print("collected:", gc.isenabled())')
    with process(tmp_path, scripts, PORT="", GATEWAY_PORT="0") as gateway:
        begun: list[str] = []
        port = port_of(gateway, begun)
        assert sum("GATEWAY_PORT" in line for line in begun) == 1
        assert b"200 OK" in exchange(port, get(b"/ping", b"Connection: close"))
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S):  # an idle connection does not delay the end
            gateway.send_signal(number)
            output = gateway.communicate(timeout=PATIENCE_S)[0]
        assert gateway.returncode == 0
        assert "draining" in output
        assert "stopped" in output
        assert "collected: True" in output
        assert "GATEWAY_PORT" not in output
        assert "Traceback" not in output


@aside
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
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
            socket.create_connection(("127.0.0.1", port_of(gateway)), PATIENCE_S) as client,
        ):
            client.sendall(post())
            with backend.accept()[0] as held:
                assert held.recv(4) == b"POST"
                gateway.send_signal(signal.SIGTERM)
                while "draining" not in gateway.stdout.readline():
                    pass
                gateway.send_signal(signal.SIGTERM)
                output = gateway.communicate(timeout=PATIENCE_S)[0]
            assert gateway.returncode == 0
            assert "Traceback" not in output


@scenario(**PATIENT)
async def test_a_drain_is_reported_on_the_supervisors_socket_before_the_port_is_closed(stack: Stack) -> None:
    stack.app.lifecycle.drain()
    assert stack.supervisor.recv(100, socket.MSG_DONTWAIT) == b"drain"
    with socket.create_connection(("127.0.0.1", stack.port), PATIENCE_S):
        await ended(stack)


@aside
def test_the_process_reports_its_drain_and_its_end_on_the_supervisors_socket(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        options = ["--drain-socket", str(its.fileno())]
        with process(tmp_path, options=options, pass_fds=[its.fileno()]) as gateway:
            its.close()
            port_of(gateway)
            gateway.send_signal(signal.SIGTERM)
            assert ours.recv(100) == b"drain"
            assert gateway.wait(PATIENCE_S) == 0
            assert ours.recv(100) == b""


@aside
def test_a_supervisor_that_has_gone_does_not_disturb_a_drain(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        options = ["--drain-socket", str(its.fileno())]
        with process(tmp_path, options=options, pass_fds=[its.fileno()]) as gateway:
            port_of(gateway)
            its.close()
            ours.close()
            gateway.send_signal(signal.SIGTERM)
            assert "Traceback" not in gateway.communicate(timeout=PATIENCE_S)[0]
            assert gateway.returncode == 0


@aside
def test_stray_signals_change_nothing_at_any_moment(tmp_path: Path) -> None:
    with process(tmp_path) as gateway:
        while any(signal_is_default(gateway.pid, number) for number in signals.STRAY):
            assert gateway.poll() is None
            sleep(0.001)
        for number in signals.STRAY:
            gateway.send_signal(number)
        port_of(gateway)
        for number in signals.STRAY:
            gateway.send_signal(number)
        gateway.send_signal(signal.SIGTERM)
        while gateway.poll() is None:
            with suppress(ProcessLookupError):
                for number in signals.STRAY:
                    os.kill(gateway.pid, number)
            sleep(0.001)
        assert gateway.returncode == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
def test_file_descriptors_for_handshakes_are_counted(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    files = {"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(certificate.with_suffix(".key"))}
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    with process(tmp_path, wrapped(tmp_path, few, "pass"), MAX_CONNECTIONS="100", **files) as gateway:
        while "MAX_CONNECTIONS=100 may need 556 file descriptors with TLS" not in (line := gateway.stdout.readline()):
            assert line
            assert " port " not in line


@aside
def test_sighup_reloads_the_keys(tmp_path: Path) -> None:
    with process(tmp_path, KEYS_WATCH_SECONDS="0") as gateway:
        port = port_of(gateway)
        (tmp_path / "keys.txt").write_text("olga:" + OPERATOR_KEY.decode() + " role=operator\n")
        gateway.send_signal(signal.SIGHUP)
        while "1 in force" not in gateway.stdout.readline():
            pass
        assert b" 401 " in exchange(port, get(b"/v1/models", b"Connection: close", key=KEY))
        assert b" 202 " in exchange(port, DRAIN.replace(b"Content", b"Connection: close\r\nContent"))
        assert gateway.wait(PATIENCE_S) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this platform has no prlimit")
@aside
def test_without_free_descriptors_connections_wait_and_the_log_stays_short(tmp_path: Path) -> None:
    with process(tmp_path) as gateway, ExitStack() as connections:
        port = port_of(gateway)
        fewer = len(list(Path(f"/proc/{gateway.pid}/fd").iterdir())) + 5
        _, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (fewer, hard))
        for _ in range(30):
            connections.enter_context(socket.create_connection(("127.0.0.1", port)))
        while "out of file descriptors" not in (line := gateway.stdout.readline()):
            assert line
        connections.close()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(get(b"/ping", b"Connection: close"))
            assert client.makefile("rb").read().endswith(b"pong\n")
        gateway.send_signal(signal.SIGTERM)
        output = gateway.communicate(timeout=PATIENCE_S)[0]
        assert "out of file descriptors" not in output
        assert "Traceback" not in output


@aside
def test_a_port_in_use_is_status_5_and_one_line(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        process(tmp_path, PORT=str(taken.getsockname()[1])) as gateway,
    ):
        output = gateway.communicate(timeout=PATIENCE_S)[0]
        assert gateway.returncode == 5
        assert "cannot listen on 127.0.0.1 port" in output
        assert "Traceback" not in output


@aside
def test_wrong_settings_are_status_2_and_all_are_named(tmp_path: Path) -> None:
    with process(tmp_path, AUTH_ENABLED="ture", MAX_QUEUE_SIZE="-1") as gateway:
        output = gateway.communicate(timeout=PATIENCE_S)[0]
        assert gateway.returncode == 2
        assert "AUTH_ENABLED" in output
        assert "MAX_QUEUE_SIZE" in output


@aside
def test_a_certificate_that_cannot_be_read_is_status_2(tmp_path: Path) -> None:
    for name in ("a.crt", "a.key"):
        (tmp_path / name).write_text("not a certificate\n")
    files = {"TLS_CERT_FILE": str(tmp_path / "a.crt"), "TLS_KEY_FILE": str(tmp_path / "a.key")}
    with process(tmp_path, **files) as gateway:
        output = gateway.communicate(timeout=PATIENCE_S)[0]
        assert gateway.returncode == 2
        assert "TLS_CERT_FILE" in output
        assert "Traceback" not in output


@aside
def test_check_config_prints_and_does_not_listen(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gateway.py"), "--check-config"]
    done = subprocess.run(
        command,
        env={**MEASURED, "DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0
    assert "MAX_CONCURRENT_REQUESTS" in done.stdout


@aside
def test_without_one_of_its_modules_the_gateway_serves_nothing(tmp_path: Path) -> None:
    # With what was compiled, except files that are about to be renamed.
    scripts = shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in ("auth", "keyfile", "policy.routes", "http1.grammar"):
        module = scripts.joinpath(*name.split(".")).with_suffix(".py")
        module.rename(tmp_path / "missing")
        with process(tmp_path, scripts) as gateway:
            output = gateway.communicate(timeout=PATIENCE_S)[0]
            assert gateway.returncode == 1
            assert f"No module named '{name}'" in output
        (tmp_path / "missing").rename(module)
