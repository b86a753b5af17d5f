"""The type of the settings: one frozen Config made of typed slices, and the error for settings that cannot be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from config.member_rules import Bounds
from core.addresses import Network
from keyfile import Entry

SHARED, PRIVATE = "shared", "private"  # PROMPT_CACHE

# Named tuples: as immutable as frozen dataclasses, and defined in a sixth of the time, which delays the start.


class ListenSettings(NamedTuple):
    """The addresses for clients and probes, TLS, and the proxies whose Forwarded fields count."""

    host: str
    port: int
    port_health: int
    tls_cert_file: Path | None
    tls_key_file: Path | None
    trusted_proxies: tuple[Network, ...]


class BackendSettings(NamedTuple):
    """Where llama-server listens, its key, and what keys share of its cache. `host` may be a Unix socket's path."""

    host: str
    port: int
    api_key: str | None
    prompt_cache: str


class AuthSettings(NamedTuple):
    """Who may call what, and how often. max_requests_per_minute is that of keys without their own."""

    enabled: bool
    keys_file: Path
    max_requests_per_minute: int
    metrics_auth: bool | None  # None: without a key, the state only
    keys_watch_s: float
    allow_paths: tuple[str, ...]
    admin_routes: bool
    api_keys: tuple[Entry, ...] | None


class QueueSettings(NamedTuple):
    """max_concurrent None: as many as llama-server has slots. max_size 0: unlimited. timeout_s 0: no timeout."""

    max_concurrent: int | None
    max_size: int
    timeout_s: float
    max_connections: int
    max_buffered_bytes: int
    cold_start_wait_s: float
    sse_heartbeat_s: float


class CheapSettings(NamedTuple):
    """Bounds of the routes that take no slot but time of the backend."""

    max_concurrent: int
    max_requests_per_minute: int
    body_bytes: int


class TimeoutSettings(NamedTuple):
    """How long the gateway waits for clients and backend. duration_s 0: no limit."""

    client_header_s: float
    client_body_s: float
    client_body_rate: int  # bytes per second; 0: off
    keepalive_s: float
    connect_s: float
    request_s: float
    stream_idle_s: float
    duration_s: float
    health_s: float


class Limits(NamedTuple):
    """Limits on what a peer may send, in bytes (`headers`: in lines). CRLF counts in a head, but not in a line."""

    request_line_bytes: int = 8192
    header_line_bytes: int = 8192
    headers: int = 64
    head_bytes: int = 65536
    body_bytes: int = 32 << 20
    response_head_bytes: int = 65536
    json_depth: int = 100


class LogSettings(NamedTuple):
    """The form of the log, and where it and the access log are."""

    format: str
    level: str
    access_file: Path | None
    dir: Path
    name: str
    worker_type: str
    instance_id: str


class UsageSettings(NamedTuple):
    """Where usage is kept, its price, and how often llama-server's metrics are read; None and 0: not at all."""

    file: Path | None
    gpu_cost_per_hour: float | None
    metrics_backend_s: float


class ModelSettings(NamedTuple):
    """The model, and how llama-server runs it. threads 0, parallel None: as llama-server chooses."""

    path: str | None
    name: str | None
    dir: Path
    url: str | None
    sha256: str | None
    hf: str | None
    ngl: int
    ctx: int
    threads: int
    parallel: int | None
    extra_args: tuple[str, ...]
    llama_bin: str | None
    load_timeout_s: float
    hf_token: str | None
    fetch_timeout_s: float
    fetch_min_rate: int  # bytes per second; 0: none


class RouterSettings(NamedTuple):
    """MODELS=router: which models one llama-server serves, and when it swaps them. `enabled` False: it has one model.

    `preset` is llama-server's own INI file. `max_loaded` models are loaded at once, those of `preload` from the start.
    `default_model` is for requests that name none; it and `preload` may have names of `aliases` (alias → model).
    switch_after_s: the longest wait for a model behind requests for others. idle_unload_s 0: never.
    """

    enabled: bool
    preset: Path | None
    max_loaded: int
    preload: tuple[str, ...]
    default_model: str | None
    aliases: Mapping[str, str]
    switch_after_s: float
    idle_unload_s: float


class SupervisionSettings(NamedTuple):
    """How the supervisor watches, restarts, drains and stops. on_idle None: IDLE_STOP_SECONDS stops everything."""

    state_file: Path | None
    wedge_timeout_s: float
    max_restarts: int
    idle_stop_s: float
    on_idle: str | None
    on_idle_timeout_s: float
    drain_timeout_s: float
    mock_backend: bool
    debug_shell: bool


class Config(NamedTuple):
    """All settings. `at_default` has the names of those that the environment does not set."""

    listen: ListenSettings
    backend: BackendSettings
    auth: AuthSettings
    queue: QueueSettings
    cheap: CheapSettings
    timeouts: TimeoutSettings
    limits: Limits
    log: LogSettings
    usage: UsageSettings
    model: ModelSettings
    router: RouterSettings
    supervision: SupervisionSettings
    data_dir: Path
    cors_origins: tuple[str, ...]
    ui: bool
    member_rules: Bounds
    warnings: tuple[str, ...] = ()
    at_default: frozenset[str] = frozenset()


class ConfigError(Exception):
    """The settings cannot be used. `complaints` has one line for each reason; none contains a secret."""

    def __init__(self, complaints: tuple[str, ...]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints
