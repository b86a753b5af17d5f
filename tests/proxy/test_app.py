"""app.py: the parts work together, from the settings alone: requests, gauges, reloads, and the backend's state."""

import asyncio
import functools
import inspect
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import keyfile
from config.loader import load_config
from config.settings import ConfigError
from core.installation import version
from proxy.app import App, backend_fields, model_name
from support.backend import STREAM_HEAD, answer, chunk, event
from support.boot import PATIENCE_S
from support.clock import Clock
from support.gateway import BACKEND_KEY, CHAT, KEYS, OPERATOR_KEY, get, make_certificate, post
from support.memory_transport import CLOSING, OPEN, Connector, MemoryTransport, MemoryWriter, run
from support.paths import ROOT
from transport.write_batching import WriteBatcher

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")


class InMemory:
    """An App whose connections are in memory, and whose files are in a folder."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.keys_file = folder / "keys"
        self.keys_file.write_text(KEYS)
        self.state_file = folder / "state.json"
        self.access_file = folder / "access.log"
        self.clock = Clock()
        self.batcher = WriteBatcher()
        self.batcher.flushed_by_loop()
        self.backends = Connector()
        environ = {
            "DATA_DIR": str(folder),
            "AUTH_KEYS_FILE": str(self.keys_file),
            "STATE_FILE": str(self.state_file),
            "ACCESS_LOG": str(self.access_file),
            "USAGE_FILE": "",
            "LOG_FORMAT": "json",
            "MAX_CONCURRENT_REQUESTS": "2",
            **settings,
        }
        config = load_config({name: value for name, value in environ.items() if value != "unset"})
        connector: Any = self.backends
        self.app = App(config, self.clock, self.batcher, connector)

    def set_state(self, state: str) -> None:
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps({"state": state}))
        part.replace(self.state_file)

    async def until(self, condition: Callable[[], object]) -> None:
        """Let timers run too: the backend's state is looked at four times a second."""
        for _ in range(1000):
            self.batcher.flush()
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it does not come true")

    def connect(self) -> MemoryTransport:
        client = MemoryTransport()
        writer: Any = MemoryWriter(client)
        self.app.sessions.open(writer, client)
        return client

    def ask(self, raw: bytes) -> bytes:
        """Return the response to a request that needs no waiting."""
        client = self.connect()
        client.receive(raw)
        self.batcher.flush()
        client.lose()
        return client.take()

    @property
    def backend(self) -> MemoryTransport:
        """The backend's end of the newest connection."""
        self.batcher.flush()
        return self.backends.transports[-1]

    def gauge(self, name: str) -> float:
        page = self.ask(get(b"/metrics")).decode()
        found = re.search(rf"(?m)^gateway_{name} ([0-9.]+)$", page)
        assert found is not None, name
        return float(found[1])


def in_memory(**settings: str) -> Callable[..., Callable[..., None]]:
    """Make a test of a coroutine function whose first parameter is an App in memory with these settings.

    The app follows the backend's state, and is closed afterwards.
    """

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def played(tmp_path: Path, **names: Any) -> None:
            around = InMemory(tmp_path, **settings)
            run(_play(test, around, names), around.clock)

        parameters = list(inspect.signature(test).parameters.values())[1:]
        own = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        played.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return played

    return decorate


async def _play(test: Callable[..., Coroutine[Any, Any, None]], around: InMemory, names: dict[str, Any]) -> None:
    watch = asyncio.ensure_future(around.app.readiness.watch())
    try:
        await test(around, **names)
    finally:
        watch.cancel()
        around.app.sessions.hang_up()
        await around.app.close()


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# --- The parts together ---


@in_memory()
async def test_a_request_passes_through_all_parts(around: InMemory) -> None:
    await around.app.reload()
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    client = around.connect()
    client.receive(post(CHAT, b"{}", b"X-Request-Id: r-1"))
    await around.until(lambda: around.backends.transports and around.backend.written)
    assert around.backend.take().startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n")
    around.backend.receive(answer())
    around.batcher.flush()
    assert client.take().startswith(b"HTTP/1.1 200 OK\r\n")
    await around.app.close()
    (line,) = map(json.loads, around.access_file.read_text().splitlines())
    assert (line["id"], line["key"], line["status"], line["outcome"]) == ("r-1", "alice", 200, "done")


@in_memory(CLIENT_HEADER_TIMEOUT="10")
async def test_the_ticker_drives_sessions_pool_and_accounts(around: InMemory) -> None:
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    idle, orphan = around.connect(), await around.app.pool.connect()
    around.ask(get(b"/ping"))
    around.app.ticker.start()
    await asyncio.sleep(10.25)
    around.app.ticker.stop()
    assert (idle.state, orphan.ended) == (CLOSING, True)
    assert around.app.metrics.requests.value(("/ping", "200")) == 1


@in_memory()
async def test_the_gauges_show_what_is_so_now(around: InMemory) -> None:
    await around.app.reload()
    assert (around.gauge("backend_up"), around.gauge("connections")) == (0, 1)  # the one that asks
    around.connect().receive(post())
    assert around.gauge("queue_depth") == 1
    around.set_state("ready")
    await around.until(lambda: around.gauge("requests_active"))
    assert (around.gauge("backend_up"), around.gauge("queue_depth"), around.gauge("connections")) == (1, 0, 2)
    around.clock.advance(5)
    assert around.gauge("uptime_seconds") >= 5
    assert around.gauge("access_log_dropped_total") == 0


@in_memory(ACCESS_LOG="")
async def test_without_an_access_log_none_is_written_and_nothing_is_dropped(around: InMemory) -> None:
    assert b"access_log_dropped" not in around.ask(get(b"/metrics"))
    await around.app.reload()
    assert not around.access_file.exists()


@in_memory()
async def test_its_version_is_that_of_the_project(around: InMemory) -> None:
    assert version() == (ROOT / "VERSION").read_text().strip()
    assert json.loads(around.ask(get(b"/health")).partition(b"\r\n\r\n")[2])["version"] == version()


@in_memory()
async def test_an_operator_begins_a_drain(around: InMemory) -> None:
    await around.app.reload()
    around.ask(post(b"/drain", b"", key=OPERATOR_KEY))
    assert around.app.lifecycle.draining


# --- What every request to the backend carries ---


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, b"Host: 127.0.0.1:8080\r\n"),
        ({"BACKEND_HOST": "::1", "PORT_BACKEND": "9"}, b"Host: [::1]:9\r\n"),
        ({"BACKEND_HOST": "/run/llama.sock"}, b"Host: localhost\r\n"),
        ({"BACKEND_API_KEY": BACKEND_KEY}, f"Host: 127.0.0.1:8080\r\nAuthorization: Bearer {BACKEND_KEY}\r\n".encode()),
    ],
)
def test_the_backend_gets_its_own_host_and_key(settings: dict[str, str], lines: bytes) -> None:
    assert backend_fields(load_config({"DATA_DIR": "/x", **settings})) == lines


# --- Keys and certificates ---


@in_memory()
async def test_a_reload_puts_the_keys_in_force_and_counts(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    assert b" 503 " in around.ask(get(b"/usage", key=OPERATOR_KEY))
    assert (await around.app.reload()).ok
    assert b" 202 " in around.ask(post(b"/drain", b"", key=OPERATOR_KEY))
    assert "keys: 3 in force" in caplog.messages
    assert b'\ngateway_keys_reload_total{result="ok"} 1\n' in around.ask(get(b"/metrics"))


@in_memory()
async def test_a_line_that_is_wrong_is_complained_of(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    around.keys_file.write_text(KEYS + "nonsense\n")
    assert (await around.app.reload()).ok
    assert [message.startswith("keys: line 4") for message in caplog.messages] == [True, False, False]


@in_memory()
async def test_each_reload_warns_of_several_keys_that_share_the_cache(
    around: InMemory, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        await around.app.reload()
        assert [message.partition(",")[0] for message in caplog.messages[1:]] == ["PROMPT_CACHE=shared"]


@in_memory(PROMPT_CACHE="private")
async def test_keys_that_share_nothing_need_no_warning(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    await around.app.reload()
    assert caplog.messages == ["keys: 3 in force"]


@in_memory()
async def test_a_file_that_cannot_be_read_leaves_the_last_good_keys(
    around: InMemory, caplog: pytest.LogCaptureFixture
) -> None:
    await around.app.reload()
    around.keys_file.unlink()
    assert not (await around.app.reload()).ok
    assert caplog.messages[-1].endswith("; the last good keys stay (3)")
    assert b'\ngateway_keys_reload_total{result="failed"} 1\n' in around.ask(get(b"/metrics"))


@in_memory()
async def test_without_any_key_the_log_says_how_to_make_one(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    around.keys_file.unlink()
    await around.app.reload()
    assert caplog.messages[-1].endswith("until there is a key: key_mgmt.py generate --name NAME")


@in_memory()
async def test_a_file_without_a_key_is_an_error(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    around.keys_file.write_text("# none\n")
    await around.app.reload()
    assert caplog.messages[-1].startswith("keys: no request is accepted until there is a key")


@in_memory(AUTH_ENABLED="false")
async def test_without_authentication_no_keys_are_missed(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    around.keys_file.unlink()
    await around.app.reload()
    assert caplog.messages == []


@in_memory()
async def test_a_reload_opens_the_access_log_again(around: InMemory) -> None:
    around.ask(get(b"/ping"))
    around.app.recorder.flush()
    around.access_file.rename(around.folder / "rotated.log")
    await around.app.reload()
    around.ask(get(b"/ping"))
    await around.app.close()
    assert around.access_file.read_text().count("\n") == 1


@in_memory(KEYS_WATCH_SECONDS="10")
async def test_a_changed_keys_file_is_read_once_it_is_still(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    await around.app.reload()
    watch = asyncio.ensure_future(around.app.watch_keys())
    await asyncio.sleep(11)
    assert len(caplog.messages) == 2
    around.keys_file.write_text("olga:" + OPERATOR_KEY.decode() + "\n")
    await asyncio.sleep(11)
    watch.cancel()
    assert caplog.messages[2:] == ["keys: 1 in force"]


def test_a_reload_whose_client_leaves_delays_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what a hanging volume gave to the one could replace what the other has read since."""
    goes_on, reads = threading.Event(), list[bytes]()
    read_file = keyfile.read

    def read(path: Path) -> bytes:
        data = read_file(path)
        reads.append(data)
        goes_on.wait(PATIENCE_S)
        return data

    async def play() -> None:
        around = InMemory(tmp_path)
        left = asyncio.ensure_future(around.app.reload())
        await around.until(lambda: reads)
        left.cancel()
        around.keys_file.write_text("olga:" + OPERATOR_KEY.decode() + "\n")
        later = asyncio.ensure_future(around.app.reload())
        await asyncio.wait([later], timeout=0.1)
        begun = len(reads)
        goes_on.set()
        assert (begun, (await later).keys) == (1, 1)
        await around.app.close()

    monkeypatch.setattr(keyfile, "read", read)
    asyncio.run(play())


@in_memory(KEYS_WATCH_SECONDS="0")
async def test_the_keys_file_need_not_be_watched(around: InMemory) -> None:
    await around.app.watch_keys()


@needs_openssl
def test_a_reload_reads_the_certificate_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = make_certificate(tmp_path)
    files = {"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(certificate.with_suffix(".key"))}

    async def play() -> None:
        around = InMemory(tmp_path, **files)
        await around.app.reload()
        day_s = 24 * 3600
        assert day_s < around.gauge("certificate_expiry_timestamp_seconds") - time.time() <= 2 * day_s
        certificate.write_text("broken")
        reloaded = await around.app.reload()
        assert reloaded.ok
        assert reloaded.complaints[0].startswith("TLS_CERT_FILE, TLS_KEY_FILE: the certificate cannot be used: ")
        assert reloaded.complaints[0].endswith("; the old one stays")
        assert around.gauge("certificate_expiry_timestamp_seconds") > time.time()
        await around.app.close()

    run(play())
    assert "the old one stays" in caplog.text


def test_a_certificate_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^TLS_CERT_FILE, TLS_KEY_FILE: "):
        InMemory(tmp_path, TLS_CERT_FILE=str(tmp_path / "none"), TLS_KEY_FILE=str(tmp_path / "none"))


# --- The backend ---


@in_memory(MAX_CONCURRENT_REQUESTS="unset")
async def test_the_backend_says_how_many_requests_it_works_on(
    around: InMemory, caplog: pytest.LogCaptureFixture
) -> None:
    around.set_state("ready")
    await around.until(lambda: around.backends.transports and around.backend.written)
    assert around.backend.take() == b"GET /props HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n"
    around.backend.receive(answer(b'{"total_slots": 4}'))
    await around.until(lambda: around.app.readiness.ready)
    assert (around.app.queue.slots, around.app.queue.open) == (4, True)
    assert "4 requests at a time: the backend's slots" in caplog.messages


@in_memory(MAX_CONCURRENT_REQUESTS="unset")
async def test_a_backend_with_one_slot_is_what_was_expected(around: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    around.backends.error = ConnectionRefusedError()
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    assert around.app.queue.slots == 1
    assert caplog.messages == ["the backend is ready (was loading)"]


@in_memory()
async def test_a_backend_that_stops_closes_the_queue_and_its_idle_connections(around: InMemory) -> None:
    await around.app.reload()
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    kept = await around.app.pool.connect()
    around.app.pool.release(kept, True)
    assert (around.app.queue.open, around.backend.state) == (True, OPEN)
    around.set_state("loading")
    await around.until(lambda: not around.app.readiness.ready)
    assert (around.app.queue.open, around.app.pool.idle_count) == (False, 0)


@in_memory(STATE_FILE="unset")
async def test_without_a_state_file_the_backend_is_asked_itself(around: InMemory) -> None:
    await around.until(lambda: around.backends.transports and around.backend.written)
    assert around.backend.take().startswith(b"GET /health HTTP/1.1\r\n")
    around.backend.receive(answer())
    await around.until(lambda: around.app.readiness.ready)


@in_memory(METRICS_BACKEND_SECONDS="10", METRICS_AUTH_ENABLED="false")
async def test_the_backends_metrics_are_on_the_page(around: InMemory) -> None:
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    client = around.connect()
    client.receive(get(b"/metrics"))
    await around.until(lambda: around.backends.transports and around.backend.written)
    assert around.backend.take().startswith(b"GET /metrics HTTP/1.1\r\n")
    around.backend.receive(answer(b"# TYPE llamacpp:n_busy gauge\nllamacpp:n_busy 2\n"))
    await around.until(lambda: client.written)
    assert b"\nllamacpp_n_busy 2.0\n" in client.take()


@in_memory()
async def test_the_slot_of_a_client_that_left_is_asked_for(around: InMemory) -> None:
    await around.app.reload()
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    client = around.connect()
    client.receive(post())
    await around.until(lambda: around.backends.transports and around.backend.written)
    client.receive_eof()
    assert around.app.queue.active == 1
    asked = 0

    def is_free() -> bool:
        """Answer each look at the slots: none is at work."""
        nonlocal asked
        for backend in around.backends.transports[1:]:
            if backend.written:
                assert backend.take().startswith(b"GET /slots HTTP/1.1\r\n")
                backend.receive(answer(b"[]"))
                asked += 1
        return around.app.queue.active == 0

    await around.until(lambda: is_free() or asked > 3)
    assert around.app.queue.active == 1, "it may still begin: its connection is open"
    around.backends.transports[0].receive_eof()
    await around.until(is_free)


@in_memory()
async def test_a_stream_that_was_left_is_recorded_if_the_gateway_ends_before_it(around: InMemory) -> None:
    await around.app.reload()
    around.set_state("ready")
    await around.until(lambda: around.app.readiness.ready)
    client = around.connect()
    client.receive(post(body=b'{"stream": true}'))
    await around.until(lambda: around.backends.transports and around.backend.written)
    stream = around.backend
    stream.receive(STREAM_HEAD + chunk(event("one")))
    client.receive_eof()
    assert stream.wrote_eof
    assert around.access_file.read_text() == ""
    await around.app.close()
    assert json.loads(around.access_file.read_text())["outcome"] == "cancelled"


@in_memory()
async def test_a_backend_that_was_started_again_may_list_its_slots(around: InMemory) -> None:
    await around.app.reload()
    for listed in (False, True):
        around.set_state("ready")
        await around.until(lambda: around.app.readiness.ready)
        number = len(around.backends.transports)
        client = around.connect()
        client.receive(post())
        await around.until(lambda: len(around.backends.transports) > number)  # noqa: B023
        await around.until(lambda: around.backend.written)
        asked = around.backend
        client.receive_eof()
        await around.until(lambda: len(around.backends.transports) > number + 1)  # noqa: B023
        look = around.backend
        await around.until(lambda: look.written)  # noqa: B023
        assert look.take().startswith(b"GET /slots HTTP/1.1\r\n")
        look.receive(answer(b"[]") if listed else answer(b"{}", b"501 Not Implemented"))
        asked.receive_eof()
        await around.until(lambda: around.app.queue.active == 0)
        around.set_state("loading")
        await around.until(lambda: not around.app.readiness.ready)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"MODEL_PATH": "/models/tiny-Q4.gguf", "MODEL_NAME": "other.gguf"}, "tiny-Q4"),
        ({"MODEL_NAME": "tiny.gguf"}, "tiny"),
        ({"MODEL_URL": "https://models.example/a/tiny.gguf?download=true"}, "tiny"),
        ({"MODEL_HF": "ggml-org/tiny:Q4_0"}, "ggml-org/tiny:Q4_0"),
        ({}, ""),
    ],
)
def test_a_model_has_the_name_that_people_know(settings: dict[str, str], name: str) -> None:
    assert model_name(load_config(settings)) == name
