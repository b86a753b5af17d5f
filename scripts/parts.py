"""What the gateway is put together from: every part made once, from the settings, and handed to whoever needs it."""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import auth
import logs
import tls
from admission import Gate
from answer import date_line
from backend_page import BackendPage
from client_wire import ClientWire
from config import Config
from cors import Cors
from exchange import KeyCounts, Metrics, Observer, request_ids
from metrics import Counter, Gauge, Registry
from plan import Planner
from readiness import READY, Probe, Readiness, StateFile
from relay import Patience, Pool, fetch
from routes import Routes
from slots import LettingGo, total_slots
from turns import Outbox
from usage import Ledger
from waiting import Deadlines

log = logging.getLogger("gateway")

_NO_KEYS = "nobody is let in until there is one: key_mgmt.py generate --name NAME"


class Parts:
    """The parts, and the little state that they share."""

    date: bytes  # the Date line, as of the last tick

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic, outbox: Outbox | None = None
    ) -> None:
        self.config = config
        self.clock = clock
        self.deadlines = Deadlines(clock, self._each_tick)
        own = config.auth
        self.routes = Routes(allow_paths=own.allow_paths, admin_routes=own.admin_routes, metrics_auth=own.metrics_auth)
        self.cors = Cors(config.cors_origins)
        self.keys = auth.KeyStore(own.keys_file, own.max_requests_per_minute)
        self.rates = auth.Rates(clock)
        self.auth_enabled = own.enabled
        self.anonymous = auth.ANONYMOUS_OPERATOR if own.admin_routes else auth.ANONYMOUS
        self.gate = Gate(config.queue.max_concurrent or 1, config.queue.max_size, clock)
        self.gate.hold()
        self.outbox = outbox or Outbox()
        backend, most = config.backend, config.limits.response_head_bytes
        self.pool = Pool(backend.host, backend.port, self.deadlines, self.outbox, most)
        self.backend_fields = backend_fields(config)
        self.planner = Planner(config.limits, self.routes, self.cors, self.backend_fields)
        timeouts = config.timeouts
        self.duration_s = timeouts.duration_s
        self.header_s = timeouts.client_header_s
        self.keepalive_s = timeouts.keepalive_s
        self.beat_s = config.queue.sse_heartbeat_s or inf
        self.patience = Patience(timeouts.connect_s, timeouts.request_s, timeouts.stream_idle_s)
        self.ledger = Ledger(config.usage.file, time.time)
        self.registry = Registry()
        self.operator_registry = Registry(self.registry)
        self.metrics = Metrics(self.registry)
        self.reloads = self.registry.register(
            Counter("gateway_keys_reload_total", "Reloads of the keys file, by result.", ("result",))
        )
        self.access_log = logs.AccessLog(config.log.access_file) if config.log.access_file else None
        self.observer = Observer(
            self.metrics,
            KeyCounts(self.operator_registry),
            self.ledger,
            self.access_log,
            as_json=config.log.format == "json",
            clock=clock,
            wall_clock=time.time,
        )
        self.ids = request_ids()
        self.letting_go = LettingGo(self.fetch, lambda: self.relaying)
        self.readiness = Readiness(self._source(), self._prepare, self._backend_changed)
        self.clients: dict[ClientWire, None] = {}  # every connection that is served
        self.idle: dict[ClientWire, None] = {}  # connections between requests, the longest idle first
        self.public_only: set[ClientWire] = set()  # connections beyond MAX_CONNECTIONS
        self.buffered_bytes = 0
        self.most_buffered_bytes = config.queue.max_buffered_bytes
        self.last_work_s = clock()
        self.last_backend_byte_s = clock()
        self.draining = False
        self.drain: Callable[[], None] = lambda: None  # the gateway's, once there is one
        self.backend_page = BackendPage(self.fetch, config.usage.metrics_backend_s, clock)
        self.tls = tls.make_context(config)
        self.version = version()
        self._started_s = clock()
        self._register_gauges()

    @property
    def relaying(self) -> int:
        """Requests that the backend works on in a slot, and whose clients still want them."""
        return sum(client.request is not None and client.request.holds_backend for client in self.clients)

    def uptime_s(self) -> float:
        return self.clock() - self._started_s

    def _each_tick(self) -> None:
        self.date = date_line()
        for client in tuple(self.clients):
            if client.request is not None:
                client.request.beat(self.deadlines.now_s)
        self.observer.flush()
        self.pool.tick()

    # --- Numbers that are read when somebody looks ---

    def _register_gauges(self) -> None:
        def gauge(name: str, words: str, read: Callable[[], float]) -> None:
            self.registry.register(Gauge(f"gateway_{name}", words, read=read))

        gauge("requests_active", "Requests that hold a slot.", lambda: self.gate.active)
        gauge("queue_depth", "Requests that wait for a slot.", lambda: self.gate.queued)
        gauge("connections", "Open client connections.", lambda: len(self.clients))
        gauge("backend_up", "1 while the backend is ready to serve.", lambda: self.readiness.ready)
        gauge("uptime_seconds", "Since the gateway started.", self.uptime_s)
        access_log = self.access_log
        if access_log is not None:
            words = "Access lines that a slow or full disk did not take."
            self.registry.register(Counter("gateway_access_log_dropped_total", words, read=lambda: access_log.dropped))
        self.registry.register(self.backend_page.borrowed)

    # --- Keys and certificates ---

    def reload(self) -> auth.Reload:
        """Read keys and certificates again; what cannot be trusted stays as it was, and the log says so."""
        result = self.keys.reload()
        self.reloads.inc(("ok" if result.ok else "failed",))
        for complaint in result.complaints:
            log.warning("keys: %s", complaint)
        if result.ok:
            log.info("keys: %d in force", result.keys)
        elif self.auth_enabled:
            stays = f"the last good keys stay ({result.keys})" if result.keys else _NO_KEYS
            log.error("keys: %s; %s", result.reason, stays)
        if self.access_log is not None:
            self.access_log.reopen()
        if self.tls is not None:
            tls.load_certificate(self.tls, self.config)
        return result

    async def watch_keys(self) -> None:
        """Reload by itself once the keys file has changed and is still."""
        interval_s = self.config.auth.keys_watch_s
        while interval_s:
            await asyncio.sleep(interval_s / 2)
            if self.keys.changed():
                self.reload()

    async def close(self) -> None:
        self.deadlines.stop()
        self.observer.flush()
        self.pool.close()
        await self.letting_go.close()
        self.ledger.close()
        if self.access_log is not None:
            self.access_log.close()

    # --- The backend ---

    def _source(self) -> StateFile | Probe:
        if self.config.supervision.state_file is not None:
            return StateFile(self.config.supervision.state_file)
        return Probe(self._health_status, self.config.queue.cold_start_wait_s, self.clock)

    async def _health_status(self) -> int:
        return (await self.fetch(b"/health"))[0]

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        """GET something of the backend's for the gateway itself: status and body. Raises GatewayError."""
        return await fetch(self.pool, target, self.backend_fields, self.config.timeouts.health_s)

    async def _prepare(self) -> None:
        """The backend is about to be ready: learn how many requests it can work on at once."""
        self.letting_go.forget()
        if self.config.queue.max_concurrent is None:
            slots = await total_slots(self.fetch)
            if slots != self.gate.slots:
                log.info("%d requests at a time: the backend's slots", slots)
                self.gate.resize(slots)

    def _backend_changed(self, state: str) -> None:
        if state == READY:
            self.last_work_s = self.clock()
            self.gate.resume()
        else:
            self.gate.hold()
            self.pool.close()

    def backend_silent_s(self) -> float:
        """Seconds since the backend last sent a byte, exact to the time between two calls."""
        if self.pool.pulse.felt:
            self.pool.pulse.felt = False
            self.last_backend_byte_s = self.clock()
        return self.clock() - self.last_backend_byte_s

    def idle_s(self) -> float:
        """Seconds since the last inference ended; 0 while there is one, waiting or at work."""
        return 0.0 if self.gate.active or self.gate.queued else self.clock() - self.last_work_s


def backend_fields(config: Config) -> bytes:
    """The field lines that every request to the backend carries: its own Host and its own key."""
    backend = config.backend
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    lines = f"Host: {host}:{backend.port}\r\n"
    if backend.api_key:
        lines += f"Authorization: Bearer {backend.api_key}\r\n"
    return lines.encode()


def version() -> str:
    try:
        return (Path(__file__).parent.parent / "VERSION").read_text().strip()
    except OSError:
        return "unknown"
