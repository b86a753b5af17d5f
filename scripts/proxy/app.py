"""The composition root: every part made once, from the settings, and handed to what needs it."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from math import inf

from accounting.access_file import AccessLog
from accounting.ledger import Ledger
from accounting.recorder import Recorder
from accounting.request_history import RequestHistory
from accounting.request_metrics import KeyCounts, RequestMetrics
from accounting.request_record import RequestRecord, request_ids
from accounting.token_estimates import TokenEstimator
from auth import NO_KEY, KeyStore, RateLimiter, Reload
from backend.fetch import BackendFetcher
from backend.generation_watch import AtWork
from backend.models import ModelHooks, Models
from backend.readiness import READY, Probe, Readiness, StateFile
from backend.scraped_metrics import ScrapedMetrics
from backend.slot_isolation import SlotIsolation
from backend.slots import SlotReclaimer, total_slots
from config.settings import PRIVATE, Config
from config.tenants import shared_cache_warning
from core.errors import BACKEND_UNAVAILABLE, GatewayError
from core.health_token import health_token
from core.installation import version
from core.listener import is_socket_path
from core.off_loop import run_off_loop
from http1.forwarded import TrustedProxies
from metrics import Counter, Gauge, Registry
from policy.body_rules import BodyRules
from policy.cors import Cors
from policy.fair_queue import FairQueue
from policy.memory_budget import MemoryBudget
from policy.model_names import ModelNames, Patterns, may_use
from policy.model_queue import SharedLimits
from policy.model_scheduler import LoadState, Model, ModelScheduler, QueueTotals
from policy.prepared_request import RequestCache
from policy.routes import Routes
from policy.suspects import Suspect, Suspects
from policy.token_limiter import TokenLimiter
from proxy.access import AccessControl
from proxy.board import BoardReader, BoardSources
from proxy.board_viewers import BoardViewers
from proxy.body_scan import BodyScans
from proxy.cheap_routes import CheapRoutes
from proxy.endpoints import Endpoints
from proxy.health import Health
from proxy.key_limits import KeyLimits
from proxy.last_responses import LastResponses
from proxy.lifecycle import Lifecycle
from proxy.own_page import board_page
from proxy.page_files import PageFiles
from proxy.pages import Pages
from proxy.relay import UpstreamTimeouts
from proxy.request_services import RequestServices, RequestTimeouts
from proxy.response_info import DateField
from proxy.session import Sessions, SessionSettings
from proxy.shown_props import ShownProps
from proxy.token_quotas import TokenQuotas
from transport import tls
from transport.backend_protocol import CROSSING_MS
from transport.pool import ConnectionPool, OpenConnection
from transport.tcp import open_connection
from transport.ticker import Ticker
from transport.write_batching import WriteBatcher

log = logging.getLogger("gateway")

_SERVING_S = 600.0  # a backend that has answered so recently works: its end is the fault of what was at work
_FIRST_DEATHS = 2  # it may not have answered anything before these
CLOSE_S = 2.2  # a little longer than the access log takes to give up


class App:
    """The gateway's parts. `sessions` gets the connections; `lifecycle.drain` begins the end."""

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        batcher: WriteBatcher | None = None,
        open_connection: OpenConnection = open_connection,
        crossing_ms: int = CROSSING_MS,
    ) -> None:
        """`clock` gives monotonic seconds, `open_connection` connects to the backend.

        An end of a connection to the backend within `crossing_ms` after a request may have crossed it.

        Raises ConfigError if the certificate cannot be used.
        """
        self._config = config
        self._clock = clock
        self.tls = tls.read_certificate(config)
        self.lifecycle = Lifecycle()
        self._reading = asyncio.Lock()
        self._reload_due: asyncio.Task[Reload] | None = None
        self._reloading: set[asyncio.Task[Reload]] = set()
        self.ticker = Ticker(clock)
        batcher = batcher or WriteBatcher()
        self._make_backend(clock, batcher, open_connection, crossing_ms)
        self._make_accounting(clock)
        self._make_proxy(clock, batcher)
        self._register_gauges()

    # --- Composition ---

    def _make_backend(
        self, clock: Callable[[], float], batcher: WriteBatcher, open_connection: OpenConnection, crossing_ms: int
    ) -> None:
        config, backend = self._config, self._config.backend
        state_file = None if config.supervision.state_file is None else StateFile(config.supervision.state_file)
        self.pool = ConnectionPool(
            backend.host,
            backend.port,
            self.ticker,
            batcher,
            config.limits.response_head_bytes,
            None if state_file is None else state_file.listener,
            open_connection,
            crossing_ms,
        )
        self._fetch = BackendFetcher(self.pool, backend_fields(config), config.timeouts.health_s)
        self.queue = FairQueue(config.queue.max_concurrent or 1, config.queue.max_size, clock)
        self.queue.pause()
        self.cheap_routes = CheapRoutes(config.cheap, config.queue.max_size, clock, rated=config.auth.enabled)
        isolates = backend.prompt_cache == PRIVATE
        self.isolation = SlotIsolation(self._fetch, self._fetch.post, clock, self._doubt_backend) if isolates else None
        self.models = self._make_models(clock, state_file) if config.router.enabled else None
        self.numbers: FairQueue | QueueTotals = self.queue
        if self.models is not None:
            self.numbers = QueueTotals(self.models.scheduler, clock)
        shared_key = "" if config.auth.enabled else NO_KEY
        self.suspects = Suspects(self._requests_at_work, clock, shared_key)
        self.reclaimer = SlotReclaimer(self._fetch, self._at_work)
        probe = Probe(lambda: self._fetch.status(b"/health"), config.queue.cold_start_wait_s, clock)
        source = state_file or probe
        self.readiness = Readiness(source, self._prepare_backend, self._on_backend_state)
        self._scraped_metrics = ScrapedMetrics(self._fetch, config.usage.metrics_backend_s, clock)

    def _make_models(self, clock: Callable[[], float], state_file: StateFile | None) -> Models:
        config, router = self._config, self._config.router
        limits = SharedLimits(config.queue.max_size)
        scheduler = ModelScheduler(
            limits,
            clock,
            max_loaded=router.max_loaded,
            switch_after_s=router.switch_after_s,
            idle_unload_s=router.idle_unload_s,
            max_load_s=config.queue.cold_start_wait_s,
        )
        models = Models(
            self._fetch,
            scheduler,
            ModelNames(router.aliases, router.default_model),
            clock,
            ModelHooks(
                on_load=self._count_load,
                on_death=self._note_death,
                at_work=self._at_work,
                reasons=None if state_file is None else state_file.model_failures,
            ),
            slots=config.queue.max_concurrent,
        )
        limits.on_change = models.wake
        return models

    def _count_load(self, model: str, result: str, seconds: float) -> None:
        self.metrics.count_load(model, result, seconds)

    def _note_death(self, model: str) -> None:
        """The process of a model has died."""
        self.suspects.note_cut(model)
        self.suspects.note_down(model)

    def _at_work(self, model: str | None = None) -> Sequence[AtWork]:
        return self.sessions.at_work(model)

    def _make_accounting(self, clock: Callable[[], float]) -> None:
        config = self._config
        self.state_registry = Registry()
        self.registry = Registry(self.state_registry)
        self.operator_registry = Registry(self.registry)
        self.metrics = RequestMetrics(self.registry, config.backend.prompt_cache, by_model=config.router.enabled)
        self._reloads = self.registry.register(
            Counter("gateway_keys_reload_total", "Reloads of the keys file, by result.", ("result",))
        )
        self.ledger = Ledger(config.usage.file, time.time, instance_id=config.log.instance_id)
        self.access_log = AccessLog(config.log.access_file) if config.log.access_file else None
        self._estimator = TokenEstimator()
        self._history = RequestHistory()
        self.recorder = Recorder(
            self.metrics,
            KeyCounts(self.operator_registry),
            self.ledger,
            self.access_log,
            self._estimator,
            as_json=config.log.format == "json",
            clock=clock,
            wall_clock=time.time,
        )
        if config.ui:
            self.recorder.history = self._history

    def _make_proxy(self, clock: Callable[[], float], batcher: WriteBatcher) -> None:
        config, own, timeouts = self._config, self._config.auth, self._config.timeouts
        self._keys = KeyStore(own.keys_file, own.max_requests_per_minute, own.api_keys or ())
        self._rate_limiter = RateLimiter(clock)
        self._quotas = TokenQuotas(self.ledger, TokenLimiter(clock), self._estimator, self.recorder.flush)
        self._access = AccessControl(
            self._keys, self._rate_limiter, self._quotas, enabled=own.enabled, admin_routes=own.admin_routes
        )
        key_limits = KeyLimits(self._keys, self._rate_limiter, self._quotas)
        self.viewers = BoardViewers(self._board_reader(clock), key_limits, self._access.find_caller, clock)
        self.health = Health(
            readiness=self.readiness,
            queue=self.numbers,
            lifecycle=self.lifecycle,
            last_activity=self.pool.last_activity,
            connections=lambda: self.sessions.open_count,
            work=self._work_at_backend,
            version=version(),
            clock=clock,
        )
        self._make_endpoints(clock, key_limits)
        self.memory = MemoryBudget(config.queue.max_buffered_bytes)
        date = DateField()
        self._body_rules = BodyRules(config.member_rules, config.limits.json_depth)
        services = self._request_services(clock, date)
        routes = Routes(
            allow_paths=own.allow_paths,
            admin_routes=own.admin_routes,
            metrics_auth=bool(own.metrics_auth),
            owns_slots=self.isolation is not None,
            ui=config.ui,
            body_rules=self._body_rules,
        )
        proxies = TrustedProxies(config.listen.trusted_proxies)
        cors = Cors(config.cors_origins)
        request_cache = RequestCache(config.limits, routes, cors, backend_fields(config), proxies)
        settings = SessionSettings(
            max_connections=config.queue.max_connections,
            header_s=timeouts.client_header_s,
            keepalive_s=timeouts.keepalive_s,
            flush_s=timeouts.stream_idle_s,
        )
        self.sessions = Sessions(services, request_cache, settings, self.ticker, batcher, proxies)
        self.ticker.add_listener(lambda now_s: date.update())
        self.ticker.add_listener(self.sessions.on_tick)
        self.ticker.add_listener(self.pool.on_tick)
        self.ticker.add_listener(self.queue.on_tick)
        self.ticker.add_listener(self.page_files.on_tick)
        self.ticker.add_listener(lambda now_s: self.recorder.flush())
        self.ticker.add_listener(self.viewers.on_tick)
        if self.models is not None:
            self.ticker.add_listener(self.models.on_tick)

    def _board_reader(self, clock: Callable[[], float]) -> BoardReader:
        sources = BoardSources(
            readiness=self.readiness,
            lifecycle=self.lifecycle,
            queue=self.numbers,
            records=self._records,
            connections=lambda: self.sessions.open_count,
            history=self._history,
            flush_accounts=self.recorder.flush,
            models=self._model_states,
            version=version(),
            clock=clock,
            wall_clock=time.time,
        )
        return BoardReader(sources)

    def _model_states(self) -> list[tuple[str, str]]:
        if self.models is not None:
            return list(self.models.states().items())
        return [(model_name(self._config), self.readiness.state)]

    def _records(self) -> Iterator[tuple[RequestRecord, int]]:
        """Yield the records of the requests that are being served, each with its slots in the backend."""
        for session in self.sessions:
            if session.request is not None:
                yield session.request.record, session.request.backend_slots

    def _make_endpoints(self, clock: Callable[[], float], key_limits: KeyLimits) -> None:
        config, timeouts = self._config, self._config.timeouts
        fetch_file = BackendFetcher(self.pool, backend_fields(config), timeouts.connect_s).file
        self.page_files = PageFiles(fetch_file, clock)
        self.endpoints = Endpoints(
            health=self.health,
            health_credential=health_credential(config.backend.api_key),
            state_registry=self.state_registry,
            registry=self.registry,
            operator_registry=self.operator_registry,
            metrics_public=config.auth.metrics_auth is False,
            by_model=config.router.enabled,
            scraped_metrics=self._scraped_metrics,
            usage_ledger=self.ledger,
            key_limits=key_limits,
            gpu_cost_per_hour=config.usage.gpu_cost_per_hour,
            flush_accounts=self.recorder.flush,
            reload_keys=self.reload,
            drain=self.lifecycle.drain,
            pages=Pages(self.page_files, self.readiness, timeouts.connect_s) if config.ui else None,
            props=ShownProps(
                fetch_file,
                self.readiness,
                self.lifecycle,
                timeouts.request_s,
                None if self.models is None else self.models.names,
            ),
            board=board_page(needs_key=config.auth.enabled),
            viewers=self.viewers,
        )

    def _request_services(self, clock: Callable[[], float], date: DateField) -> RequestServices:
        queue, timeouts = self._config.queue, self._config.timeouts
        return RequestServices(
            clock=clock,
            request_ids=request_ids(),
            lifecycle=self.lifecycle,
            date=date,
            access=self._access,
            quotas=self._quotas,
            endpoints=self.endpoints,
            limits=self._config.limits,
            timeouts=RequestTimeouts(
                client_body_s=timeouts.client_body_s,
                client_body_rate=timeouts.client_body_rate,
                queue_s=queue.timeout_s,
                cold_start_s=queue.cold_start_wait_s,
                duration_s=timeouts.duration_s,
                heartbeat_s=queue.sse_heartbeat_s or inf,
                flush_s=timeouts.stream_idle_s,
            ),
            upstream_timeouts=UpstreamTimeouts(timeouts.connect_s, timeouts.request_s, timeouts.stream_idle_s),
            memory=self.memory,
            queue=self.queue,
            cheap_routes=self.cheap_routes,
            readiness=self.readiness,
            pool=self.pool,
            reclaimer=self.reclaimer,
            isolation=self.isolation,
            models=self.models,
            reads_members=self.isolation is not None or self.models is not None,
            last_responses=LastResponses(clock),
            body_scans=BodyScans(time.perf_counter),
            body_rules=self._body_rules,
            suspects=self.suspects,
            suspects_lane=FairQueue(1, 0, clock),
            backend_lives=self._backend_lives,
            recorder=self.recorder,
        )

    def _register_gauges(self) -> None:
        """Register what shows the state now: as in /health, a client without a key sees the gauges too."""

        def gauge(name: str, help_text: str, read: Callable[[], float]) -> None:
            self.state_registry.register(Gauge(f"gateway_{name}", help_text, read=read))

        gauge("requests_active", "Requests that hold slots.", lambda: self.numbers.running)
        gauge("slots_active", "Slots that requests hold; one may hold several.", lambda: self.numbers.active)
        models = self.models
        if models is None:
            gauge("queue_depth", "Requests that wait for slots.", lambda: self.queue.queued)
        else:
            self._register_models(models)
        gauge("queue_slots", "Slots that the waiting requests need.", lambda: self.numbers.queued_slots)
        gauge("connections", "Open client connections.", lambda: self.sessions.open_count)
        gauge("backend_up", "1 while the backend is ready to serve.", lambda: self.readiness.ready)
        gauge("uptime_seconds", "Since the gateway started.", self.health.uptime_s)
        help_text = "When the certificate in TLS_CERT_FILE expires, in seconds since 1970; 0 without one."
        gauge("certificate_expiry_timestamp_seconds", help_text, self._certificate_expires_at)
        isolation = self.isolation
        help_text = "Slots that were emptied because they held text of another key (PROMPT_CACHE=private)."
        handovers = Counter(
            "gateway_slot_handovers_total", help_text, read=lambda: 0 if isolation is None else isolation.handovers
        )
        self.registry.register(handovers)
        access_log = self.access_log
        if access_log is not None:
            help_text = "Access lines that a slow or full disk did not take."
            self.registry.register(
                Counter("gateway_access_log_dropped_total", help_text, read=lambda: access_log.dropped)
            )
        self.registry.register(self._scraped_metrics.families)

    def _register_models(self, models: Models) -> None:
        """Register what shows the models. A client without a key sees no names of models."""
        gauges = (
            ("queue_depth", "Requests that wait for slots.", lambda model: model.queued),
            ("model_loaded", "1 while the model is loaded.", lambda model: model.state is LoadState.LOADED),
        )
        for name, help_text, read in gauges:

            def read_all(read: Callable[[Model], float] = read) -> dict[tuple[str, ...], float]:
                return {(name,): float(read(model)) for name, model in models.scheduler.models.items()}

            self.registry.register(Gauge(f"gateway_{name}", help_text, ("model",), read=read_all))

    # --- Keys and certificates ---

    def _certificate_expires_at(self) -> float:
        return 0.0 if self.tls is None else self.tls.expires_at

    async def reload(self) -> Reload:
        """Read keys and certificates again. What cannot be trusted stays as it was, and the log says so.

        The files are read off the event loop: while their volume hangs, everything else goes on. A caller that is
        cancelled ends only its own wait: what is read late must not replace what a later reload has read.
        """
        return await asyncio.shield(self._begin_reload())

    def _begin_reload(self) -> "asyncio.Task[Reload]":
        task = asyncio.ensure_future(self._reload_in_turn())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)
        return task

    async def _reload_in_turn(self) -> Reload:
        if self.access_log is not None:
            self.access_log.reopen()
        async with self._reading:
            self._reload_due = None
            return await self._reload()

    async def _reload(self) -> Reload:
        result, tls_complaint = await run_off_loop(self._read_again)
        self._reloads.inc(("ok" if result.ok else "failed",))
        for complaint in result.complaints:
            log.warning("keys: %s", complaint)
        if result.ok:
            log.info("keys: %d in force", result.keys)
            if self._config.auth.enabled and not result.keys:
                log.error("keys: %s", result.remedy)
            self._warn_of_sharing()
            self._warn_of_patterns()
        elif self._config.auth.enabled:
            stays = f"the last good keys stay ({result.keys})" if result.keys else result.remedy
            log.error("keys: %s; %s", result.reason, stays)
        return replace(result, complaints=(*result.complaints, tls_complaint)) if tls_complaint else result

    def _warn_of_sharing(self) -> None:
        warning = shared_cache_warning(self._config, {caller.key_id for caller in self._keys.keyring})
        if warning is not None:
            log.warning("%s", warning)

    def _warn_of_patterns(self) -> None:
        """Warn of keys that are limited to models while there is only one."""
        if self.models is None and any(caller.models is not None for caller in self._keys.keyring):
            log.warning("keys: models= has no effect with MODELS=single: all keys may use the one model")

    def _read_again(self) -> tuple[Reload, str]:
        """Return what came of the keys, and what is wrong with the certificate."""
        return self._keys.reload(), "" if self.tls is None else self.tls.reload()

    def reload_soon(self) -> None:
        """Reload, unless a reload is due already: signals may come faster than a volume responds."""
        if self._reload_due is None:
            self._reload_due = self._begin_reload()

    async def watch_keys(self) -> None:
        """Reload once the keys file has changed and is still."""
        interval_s = self._config.auth.keys_watch_s
        while interval_s:
            await asyncio.sleep(interval_s / 2)
            async with self._reading:
                if await run_off_loop(self._keys.changed):
                    await self._reload()

    # --- The backend ---

    async def _prepare_backend(self) -> None:
        """The backend is about to be ready: learn how many requests it can work on at once."""
        if self.models is not None:
            await self.models.prepare()
            return
        self.reclaimer.reset()
        wanted = self._config.queue.max_concurrent
        if self.isolation is not None:
            total = await self.isolation.prepare(self._config.timeouts.request_s)
            slots = total if wanted is None else min(wanted, total)
        else:
            slots = wanted or await total_slots(self._fetch)
        if slots != self.queue.slots:
            log.info("%d requests at a time: the backend's slots", slots)
            self.queue.resize(slots)

    def _doubt_backend(self) -> None:
        """The backend has not accepted a connection, or ended one."""
        self.readiness.doubt()

    def _on_backend_state(self, state: str) -> None:
        if self.models is not None:
            self.models.wake() if state == READY else self.models.note_down()
        elif state == READY:
            self.queue.resume()
        if state != READY:
            self.suspects.note_down()
            self.page_files.forget()
            self.queue.pause()
            self.pool.close_idle()
            if self.isolation is not None:
                self.isolation.pause()

    @property
    def pending_releases(self) -> int:
        """How many cancelled requests keep their slots until the backend has stopped working on them."""
        return len(self.reclaimer) + (0 if self.models is None else self.models.pending_releases)

    async def _backend_lives(self) -> bool:
        """Return whether the backend is there: its /health answers also if its loop hangs."""
        try:
            await self._fetch.status(b"/health")
        except GatewayError as error:
            return error.kind is not BACKEND_UNAVAILABLE
        return True

    def _requests_at_work(self, model: str | None) -> Iterator[Suspect]:
        return self.sessions.suspects(model)

    def _work_at_backend(self, patterns: Patterns) -> dict[str, object]:
        """Return what the supervisor must know to judge the backend's silence, or its end; and the models' states.

        `patterns` are those of the models that are shown.
        """
        self.recorder.flush()
        served_s = self.recorder.served_s
        was_serving = served_s is not None and self._clock() - served_s <= _SERVING_S
        was_serving = was_serving or self.suspects.deaths <= _FIRST_DEATHS
        blamed = was_serving and self.suspects.was_cut_recently()
        work: dict[str, object] = {"blamed": blamed, "unanswered_bytes": self.sessions.unanswered_bytes()}
        if self.models is None:
            return work
        return {
            **work,
            "models": {name: state for name, state in self.models.states().items() if may_use(patterns, name)},
        }

    async def close(self) -> None:
        """Release everything and write what is left. A file whose volume hangs is given up after CLOSE_S."""
        self.ticker.stop()
        self.pool.end_leaving()
        await self.reclaimer.close()
        if self.models is not None:
            await self.models.close()
        self.recorder.flush()  # what the slots of cancelled requests have shown, too
        self.pool.close_idle()
        await self.page_files.close()
        for reloading in tuple(self._reloading):
            reloading.cancel()
        closing = [run_off_loop(self.ledger.close)]
        if self.access_log is not None:
            closing.append(run_off_loop(self.access_log.close))
        await asyncio.wait(closing, timeout=CLOSE_S)
        if not closing[0].done():
            log.warning("the usage file does not respond: what has been counted since its last write is lost")


def backend_fields(config: Config) -> bytes:
    """Return the field lines that every request to the backend carries: its own Host and its own key."""
    backend = config.backend
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    lines = "Host: localhost\r\n" if is_socket_path(backend.host) else f"Host: {host}:{backend.port}\r\n"
    if backend.api_key:
        lines += f"Authorization: Bearer {backend.api_key}\r\n"
    return lines.encode()


def model_name(config: Config) -> str:
    """Return how people call the model: its file's name, or its name at Hugging Face; empty if no setting says."""
    model = config.model
    file = model.path or model.name or (model.url or "").partition("?")[0]
    return file.rpartition("/")[2].removesuffix(".gguf") or model.hf or ""


def health_credential(backend_key: str | None) -> bytes | None:
    """Return the digest of the supervisor's credential for /health; None without a backend's key."""
    return None if backend_key is None else sha256(health_token(backend_key).encode()).digest()
