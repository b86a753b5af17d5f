"""All settings: what each is called, how its text is parsed, its default, and where its value is in Config.

A field of Config and its setting are one row. Parsing, `--check-config` and the generated pages of docs/ are made from
SETTINGS, the table of all rows. Config is frozen and made of typed slices.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from config.converters import (
    ARGS,
    BACKEND_HOST,
    FILE,
    FLAG,
    HF_NAME,
    HF_TOKEN,
    HOST_NAME,
    KEYS,
    LEVEL,
    LOG_FORMAT,
    MEMBER_RULES,
    MODEL,
    MODEL_ALIASES,
    MODEL_FILE,
    MODEL_NAMES,
    MODELS,
    NAME,
    NETWORKS,
    ORIGINS,
    PATH,
    PRICE,
    PROMPT_CACHE,
    ROUTES,
    SECRET,
    SHA256,
    TEXT,
    URL,
    Converter,
    auto,
    decimal,
    size,
    whole,
)
from config.member_rules import Bounds
from core.addresses import Network
from keyfile import Entry

SHARED, PRIVATE = "shared", "private"  # PROMPT_CACHE
YEAR_S = 365 * 86400
MOST_TASKS = 10**6  # the highest MAX_BATCH_SIZE
ALIASES = {"BACKEND_PORT": "PORT_BACKEND", "GATEWAY_PORT": "PORT"}
OFF_WHEN_EMPTY = frozenset({"ACCESS_LOG", "USAGE_FILE"})


class Setting(NamedTuple):
    """How a field of Config is set. `default` is text as in the environment (None: no default).

    A secret is never shown, and may be in a file that NAME_FILE names. `path` is the field's path in Config, which
    SETTINGS adds.
    """

    name: str
    converter: Converter
    default: str | None
    unit: str
    help: str
    secret: bool = False
    path: str = ""


# Named tuples: as immutable as frozen dataclasses, and defined in a sixth of the time, which delays the start.
# fmt: off


class ListenSettings(NamedTuple):
    """The addresses for clients and probes, TLS, and the proxies whose Forwarded fields count."""

    host: Annotated[str, Setting("HOST", HOST_NAME, "0.0.0.0", "",  # noqa: S104 - a container is reached from outside
            "Address on which the gateway and the health server listen; the default is all interfaces.")]
    port: Annotated[int, Setting("PORT", whole(0, 65535), "8000", "",
            "The gateway's port; 8000 is usual for OpenAI-compatible servers (0: any free port).")]
    port_health: Annotated[int, Setting("PORT_HEALTH", whole(0, 65535), "8001", "",
            "The health server's port, separate so that probes never wait behind clients (0: any free port).")]
    tls_cert_file: Annotated[Path | None, Setting("TLS_CERT_FILE", PATH, None, "",
            "Certificate chain (PEM). Unset: plain HTTP, since most platforms terminate TLS in front of the gateway.")]
    tls_key_file: Annotated[Path | None, Setting("TLS_KEY_FILE", PATH, None, "",
            "The certificate's private key (PEM). Both files are read again at reload.")]
    trusted_proxies: Annotated[tuple[Network, ...], Setting("TRUSTED_PROXIES", NETWORKS, "", "",
            "Proxies whose X-Forwarded-For or Forwarded names the client; none, since every client can send these.")]


class BackendSettings(NamedTuple):
    """Where llama-server listens, its key, and what keys share of its cache. `host` may be a Unix socket's path."""

    host: Annotated[str, Setting("BACKEND_HOST", BACKEND_HOST, "127.0.0.1", "",
            "llama-server's address; on loopback no client can bypass the gateway. On shared machines, a Unix socket.")]
    port: Annotated[int, Setting("PORT_BACKEND", whole(1, 65535), "8080", "",
            "llama-server's port; 8080 is its own default. Not used if BACKEND_HOST is a Unix socket.")]
    api_key: Annotated[str | None, Setting("BACKEND_API_KEY", SECRET, None, "",
            "Key that the gateway sends to llama-server. Unset: a new one is generated at each start.", secret=True)]
    prompt_cache: Annotated[str, Setting("PROMPT_CACHE", PROMPT_CACHE, "shared", "",
            "Whether keys share llama-server's cache and can learn from it what others ask: shared, or private.")]


class ModelSettings(NamedTuple):
    """The model, and how llama-server runs it. threads 0, parallel None: as llama-server chooses."""

    path: Annotated[str | None, Setting("MODEL_PATH", FILE, None, "",
            "The model file; takes precedence over MODEL_NAME. There is no default model.")]
    name: Annotated[str | None, Setting("MODEL_NAME", MODEL_FILE, None, "",
            "The model file inside MODELS_DIR. There is no default model.")]
    dir: Annotated[Path, Setting("MODELS_DIR", PATH, "$DATA_DIR/models", "",
            "Folder of models and downloads; on the volume, so that they outlive the container.")]
    url: Annotated[str | None, Setting("MODEL_URL", URL, None, "",
            "URL to download the model from if its file is missing. Masked, since such URLs may be signed.",
            secret=True)]
    sha256: Annotated[str | None, Setting("MODEL_SHA256", SHA256, None, "",
            "SHA-256 digest of the download. Without it only the transport protects the file.")]
    hf: Annotated[str | None, Setting("MODEL_HF", HF_NAME, None, "",
            "Hugging Face model, passed to llama-server as -hf; excludes the other model settings.")]
    ngl: Annotated[int, Setting("NGL", whole(0, 100000), "99", "layers",
            "Layers to offload to the GPU; the default exceeds common models, so it offloads all layers.")]
    ctx: Annotated[int, Setting("CTX", whole(0, 1 << 30), "16384", "tokens",
            "Context size of all slots together; the default fits most GPUs (0: the model's training context).")]
    threads: Annotated[int, Setting("THREADS", whole(0, 4096), "0", "threads",
            "CPU threads of llama-server (0: llama-server decides).")]
    parallel: Annotated[int | None, Setting("PARALLEL", whole(1, 4096), None, "slots",
            "Slots of llama-server. Unset: llama-server decides; with PROMPT_CACHE=private 4.")]
    extra_args: Annotated[tuple[str, ...], Setting("EXTRA_ARGS", ARGS, "", "",
            "Further arguments of llama-server, split as a shell would.")]
    llama_bin: Annotated[str | None, Setting("LLAMA_BIN", FILE, None, "",
            "Path of llama-server. Unset: /app/llama-server, else the first on PATH.")]
    load_timeout_s: Annotated[float, Setting("MODEL_LOAD_TIMEOUT", decimal(0, YEAR_S), "0", "seconds",
            "Longest time to load the model (0: no limit, since network volumes are slow).")]
    hf_token: Annotated[str | None, Setting("HF_TOKEN", HF_TOKEN, None, "",
            "Hugging Face token, for MODEL_URL and MODEL_HF; sent to https://huggingface.co and no other host.",
            secret=True)]
    fetch_timeout_s: Annotated[float, Setting("MODEL_FETCH_TIMEOUT", decimal(0, YEAR_S), "600", "seconds",
            "Longest time without progress in which the fetch of MODEL_URL is tried again; outages pass in minutes.")]
    # bytes per second; 0: none
    fetch_min_rate: Annotated[int, Setting("MODEL_FETCH_MIN_RATE", size(0, 1 << 30), "10KiB", "bytes per second",
            "Lowest rate of the fetch over 30 s; below it a new connection is made, and may be faster (0: off).")]


class RouterSettings(NamedTuple):
    """MODELS=router: which models one llama-server serves, and when it swaps them. `enabled` False: it has one model.

    `preset` is llama-server's own INI file. `max_loaded` models are loaded at once, those of `preload` from the start.
    `default_model` is for requests that name none; it and `preload` may have names of `aliases` (alias → model).
    switch_after_s: the longest wait for a model behind requests for others. idle_unload_s 0: never.
    """

    enabled: Annotated[bool, Setting("MODELS", MODELS, "single", "",
            "Whether llama-server serves one model (single), or several of MODELS_DIR or MODELS_PRESET (router).")]
    preset: Annotated[Path | None, Setting("MODELS_PRESET", PATH, None, "",
            "llama-server's INI file: a section for each model. With it MODELS_DIR counts only if it is set too.")]
    max_loaded: Annotated[int, Setting("MODELS_MAX", whole(1, 1000), "1", "models",
            "Models that are loaded at once; one, since more may not fit the GPU's memory.")]
    preload: Annotated[tuple[str, ...], Setting("MODELS_PRELOAD", MODEL_NAMES, "", "",
            "Models to load at the start; the service is ready once they are loaded. None: each at its first request.")]
    default_model: Annotated[str | None, Setting("DEFAULT_MODEL", MODEL, None, "",
            "The model of requests that name none. Unset: the only model; with several, such a request gets 400.")]
    aliases: Annotated[Mapping[str, str], Setting("MODEL_ALIASES", MODEL_ALIASES, "", "",
            "Further names of models, for clients that have a name built in.")]
    switch_after_s: Annotated[float, Setting("MODEL_SWITCH_AFTER", decimal(0, YEAR_S), "30", "seconds",
            "Longest wait for a model behind requests for those that are loaded; short waits mean more swaps.")]
    idle_unload_s: Annotated[float, Setting("MODELS_IDLE_UNLOAD", decimal(0, YEAR_S), "0", "seconds",
            "Time without a request after which a model is unloaded, which frees the GPU (0: off).")]


class AuthSettings(NamedTuple):
    """Who may call what, and how often. max_requests_per_minute is that of keys without their own."""

    enabled: Annotated[bool, Setting("AUTH_ENABLED", FLAG, "true", "",
            "Whether requests need an API key. Authentication is on by default; disable it explicitly.")]
    keys_file: Annotated[Path, Setting("AUTH_KEYS_FILE", PATH, "$DATA_DIR/api_keys.txt", "",
            "The API keys file; on the volume, so that keys outlive the container.")]
    max_requests_per_minute: Annotated[int, Setting("MAX_REQUESTS_PER_MINUTE", whole(1, 10**9), "100", "per minute",
            "Rate limit of keys that have none of their own: ample for a person, low for a runaway script.")]
    # None: without a key, the state only
    metrics_auth: Annotated[bool | None, Setting("METRICS_AUTH_ENABLED", FLAG, None, "",
            "Whether /metrics needs an API key. Unset: without a key it has the state, and counts no requests.")]
    keys_watch_s: Annotated[float, Setting("KEYS_WATCH_SECONDS", decimal(0, 86400), "2", "seconds",
            "Interval at which the keys file is checked for changes (0: only at SIGHUP or POST /reload).")]
    allow_paths: Annotated[tuple[str, ...], Setting("ALLOW_PATHS", ROUTES, "", "",
            "Further paths to relay as inference; none, since new routes of llama-server may do anything.")]
    admin_routes: Annotated[bool, Setting("ADMIN_ROUTES", FLAG, "false", "",
            "Whether operator keys may call routes that change llama-server; off, since few deployments need them.")]
    api_keys: Annotated[tuple[Entry, ...] | None, Setting("API_KEYS", KEYS, None, "",
            "Further keys, as in the keys file, which takes precedence; for machines without a volume. Prefer hashes.",
            secret=True)]


class QueueSettings(NamedTuple):
    """max_concurrent None: as many as llama-server has slots. max_size 0: unlimited. timeout_s 0: no timeout."""

    max_concurrent: Annotated[int | None, Setting("MAX_CONCURRENT_REQUESTS", auto(whole(1, 10**6)), "auto", "slots",
            "Slots that inference requests hold at once; most take one. auto: as many as llama-server has.")]
    max_size: Annotated[int, Setting("MAX_QUEUE_SIZE", whole(0, 10**6), "100", "requests",
            "Requests that may wait for a slot; the default is some minutes of work (0: no limit).")]
    timeout_s: Annotated[float, Setting("QUEUE_TIMEOUT", decimal(0, YEAR_S), "0", "seconds",
            "Longest wait for a slot (0: as long as the client stays connected).")]
    max_connections: Annotated[int, Setting("MAX_CONNECTIONS", whole(1, 10**6), "1024", "connections",
            "Client connections at once; the default, with as many to the backend, is within usual open-file limits.")]
    max_buffered_bytes: Annotated[int, Setting("MAX_BUFFERED_BYTES", size(1, 1 << 50), "512MiB", "bytes",
            "Bodies and unfinished heads held in total; the default is 16 of the largest: 4 slots and a queue (503).")]
    cold_start_wait_s: Annotated[float, Setting("COLD_START_WAIT", decimal(0, YEAR_S), "300", "seconds",
            "Longest wait for the model to load; the default covers most loads and clients' timeouts (0: no wait).")]
    sse_heartbeat_s: Annotated[float, Setting("SSE_HEARTBEAT", decimal(0, YEAR_S), "15", "seconds",
            "Interval of heartbeats on a waiting stream; proxies close silent connections after 60 to 100 s (0: off).")]


class CheapSettings(NamedTuple):
    """Bounds of the routes that take no slot but time of the backend."""

    max_concurrent: Annotated[int, Setting("MAX_CHEAP_REQUESTS", whole(1, 10**6), "2", "requests",
            "Requests at once that count tokens, tokenize or fill templates: they take no slot, but time of the CPU.")]
    max_requests_per_minute: Annotated[int, Setting("MAX_CHEAP_REQUESTS_PER_MINUTE",
            whole(1, 10**9), "600", "per minute",
            "Such requests of one key in 60 s, besides its own rate limit; enough for one before each answer (429).")]
    body_bytes: Annotated[int, Setting("MAX_CHEAP_BODY_SIZE", size(1, 1 << 40), "4MiB", "bytes",
            "Largest body of such a request; the default is the text of a million tokens (413).")]


class TimeoutSettings(NamedTuple):
    """How long the gateway waits for clients and backend. duration_s 0: no limit."""

    client_header_s: Annotated[float, Setting("CLIENT_HEADER_TIMEOUT", decimal(0.001, YEAR_S), "30", "seconds",
            "Longest time to receive a request's head; enough for slow links, too short for slow-loris attacks.")]
    client_body_s: Annotated[float, Setting("CLIENT_BODY_TIMEOUT", decimal(0.001, YEAR_S), "30", "seconds",
            "Longest pause while a request's body is received; a stalled upload frees its memory.")]
    # bytes per second; 0: off
    client_body_rate: Annotated[int, Setting("CLIENT_BODY_MIN_RATE", size(0, 1 << 30), "500", "bytes per second",
            "Lowest average rate of a body once CLIENT_BODY_TIMEOUT has passed; slower uploads hardly exist (0: off).")]
    keepalive_s: Annotated[float, Setting("KEEPALIVE_TIMEOUT", decimal(0.001, YEAR_S), "75", "seconds",
            "Longest idle time of a client connection between requests; above the 60 s of common load balancers.")]
    connect_s: Annotated[float, Setting("BACKEND_CONNECT_TIMEOUT", decimal(0.001, YEAR_S), "10", "seconds",
            "Longest time to connect to llama-server; a busy machine may need seconds.")]
    request_s: Annotated[float, Setting("REQUEST_TIMEOUT", decimal(0.001, YEAR_S), "600", "seconds",
            "Longest wait for llama-server's answer to begin: to the end of the generation, unless it streams (504).")]
    stream_idle_s: Annotated[float, Setting("STREAM_IDLE_TIMEOUT", decimal(0.001, YEAR_S), "300", "seconds",
            "Longest silence once llama-server's answer has begun; even slow models generate tokens far faster.")]
    duration_s: Annotated[float, Setting("MAX_REQUEST_DURATION", decimal(0, YEAR_S), "0", "seconds",
            "Longest duration of a request in total (0: no limit, since long generations are legitimate).")]
    health_s: Annotated[float, Setting("HEALTH_TIMEOUT", decimal(0.001, YEAR_S), "2", "seconds",
            "Longest time for one probe of llama-server's /health, which answers at once when healthy.")]


class Limits(NamedTuple):
    """Limits on what a peer may send; all sizes are in bytes. CRLF counts in a head, but not in a line."""

    request_line_bytes: Annotated[int, Setting("MAX_REQUEST_LINE_SIZE", size(64, 1 << 24), "8192", "bytes",
            "Longest request line; the default is that of common servers (414).")] = 8192
    header_line_bytes: Annotated[int, Setting("MAX_HEADER_LINE_SIZE", size(64, 1 << 24), "8192", "bytes",
            "Longest header line of a request; llama-server accepts no longer one (431).")] = 8192
    headers: Annotated[int, Setting("MAX_HEADERS", whole(1, 10000), "64", "header lines",
            "Header lines of a request; browsers send about 30 (431).")] = 64
    head_bytes: Annotated[int, Setting("MAX_REQUEST_HEADER_SIZE", size(64, 1 << 24), "65536", "bytes",
            "Largest head of a request, request line included; enough for 64 usual lines (431).")] = 65536
    body_bytes: Annotated[int, Setting("MAX_REQUEST_BODY_SIZE", size(1, 1 << 40), "32MiB", "bytes",
            "Largest request body; the default fits images and minutes of audio in base64 (413).")] = 32 << 20
    response_head_bytes: Annotated[int, Setting("MAX_RESPONSE_HEADER_SIZE", size(64, 1 << 30), "65536", "bytes",
            "Largest head of llama-server's response; the default is far more than it sends (502).")] = 65536
    json_depth: Annotated[int, Setting("MAX_JSON_DEPTH", whole(1, 10000), "100", "levels",
            "Deepest nesting of a request body; each level takes llama-server's stack, and real ones have about"
            " 20.")] = 100
    batch_size: Annotated[int, Setting("MAX_BATCH_SIZE", whole(1, MOST_TASKS), "2048", "tasks",
            "Choices of all prompts, texts to embed or documents to rank of one request, each a task for"
            " llama-server; the default is what OpenAI's embeddings allow (400).")] = 2048


class LogSettings(NamedTuple):
    """The form of the log, and where it and the access log are."""

    format: Annotated[str, Setting("LOG_FORMAT", LOG_FORMAT, "text", "",
            "Format of the log and the access log: text for people, json for log collectors.")]
    level: Annotated[str, Setting("LOG_LEVEL", LEVEL, "info", "",
            "Lowest severity that is logged; info logs one line per event, but none per request.")]
    access_file: Annotated[Path | None, Setting("ACCESS_LOG", PATH, "$DATA_DIR/logs/api_access.log", "",
            "The access log, one line per request; reopened at SIGHUP. Empty: no access log.")]
    dir: Annotated[Path, Setting("LOG_DIR", PATH, "$DATA_DIR/logs", "",
            "Folder of the boot logs; on the volume, so that they outlive the container.")]
    # Before the name, since its default has the value.
    worker_type: Annotated[str, Setting("WORKER_TYPE", NAME, "", "",
            "Kind of worker, used in the name of the boot logs' folder.")]
    name: Annotated[str, Setting("LOG_NAME", NAME, "llama", "",
            "Folder inside LOG_DIR; with WORKER_TYPE the default is llama-WORKER_TYPE.")]
    instance_id: Annotated[str, Setting("INSTANCE_ID", NAME, None, "",
            "Name of this instance's ledger and boot logs on a shared volume. Unset: RUNPOD_POD_ID or the host name.")]


class UsageSettings(NamedTuple):
    """Where usage is kept, its price, and how often llama-server's metrics are read; None and 0: not at all."""

    file: Annotated[Path | None, Setting("USAGE_FILE", PATH, "$DATA_DIR/usage.db", "",
            "The usage ledger: SQLite files in the folder of this name and `.d`. Empty: usage is kept in memory only.")]
    gpu_cost_per_hour: Annotated[float | None, Setting("GPU_COST_PER_HOUR", PRICE, None, "per hour",
            "Price of the machine, from which reports compute costs. Unset: reports contain no costs.")]
    metrics_backend_s: Annotated[float, Setting("METRICS_BACKEND_SECONDS", decimal(0, 86400), "0", "seconds",
            "Shortest interval between scrapes of llama-server's metrics (0: off). Each scrape resets its averages.")]


class SupervisionSettings(NamedTuple):
    """How the supervisor watches, restarts, drains and stops. on_idle None: IDLE_STOP_SECONDS stops everything."""

    state_file: Annotated[Path | None, Setting("STATE_FILE", PATH, None, "",
            "File in which the supervisor publishes the backend's state; set by the supervisor itself.")]
    wedge_timeout_s: Annotated[float, Setting("WEDGE_TIMEOUT", decimal(0.001, YEAR_S), "120", "seconds",
            "Silence after which llama-server counts as hung and is restarted; longer than a slow probe.")]
    max_restarts: Annotated[int, Setting("MAX_RESTARTS", whole(0, 1000), "5", "restarts",
            "Restarts within 10 minutes, or in a row without becoming ready, before the container ends (0: none).")]
    idle_stop_s: Annotated[float, Setting("IDLE_STOP_SECONDS", decimal(0, YEAR_S), "0", "seconds",
            "Time without inference after which ON_IDLE runs, or everything stops (0: off).")]
    on_idle: Annotated[str | None, Setting("ON_IDLE", TEXT, None, "",
            "Shell command to run when idle. Unset: everything stops. Masked, since it may contain a token.",
            secret=True)]
    on_idle_timeout_s: Annotated[float, Setting("ON_IDLE_TIMEOUT", decimal(0, YEAR_S), "300", "seconds",
            "Longest time that ON_IDLE may run before it is killed; it should only call an API (0: no limit).")]
    drain_timeout_s: Annotated[float, Setting("DRAIN_TIMEOUT", decimal(0, YEAR_S), "7", "seconds",
            "Time for streams to finish after SIGTERM; `docker stop` allows 10 s in total.")]
    mock_backend: Annotated[bool, Setting("MOCK_BACKEND", FLAG, "false", "",
            "Whether mock_backend.py runs instead of llama-server; for trials without a model.")]
    debug_shell: Annotated[bool, Setting("DEBUG_SHELL", FLAG, "false", "",
            "Whether start.sh opens a shell instead of starting the services; for a container that does not start.")]


class Config(NamedTuple):
    """All settings. `at_default` has the names of those that the environment does not set."""

    # The first, since other settings have its value in their defaults.
    data_dir: Annotated[Path, Setting("DATA_DIR", PATH, None, "",
            "Folder of keys, models, logs and usage. Unset: the first mounted of /runpod-volume, /workspace, /data,"
            " else ./data.")]
    listen: ListenSettings
    backend: BackendSettings
    model: ModelSettings
    router: RouterSettings
    auth: AuthSettings
    queue: QueueSettings
    cheap: CheapSettings
    timeouts: TimeoutSettings
    limits: Limits
    member_rules: Annotated[Bounds, Setting("MEMBER_RULES", MEMBER_RULES, "", "",
            "Changes to what bodies may ask llama-server for; docs/ISOLATION.md has the members and their defaults.")]
    cors_origins: Annotated[tuple[str, ...], Setting("CORS_ORIGINS", ORIGINS, "", "",
            "Origins of web pages that may call the gateway; none, since every visitor can read a key in a page.")]
    ui: Annotated[bool, Setting("UI", FLAG, "on", "",
            "Whether browsers get a chat page at / and a board at /ui, and keys can read /props, without paths.")]
    log: LogSettings
    usage: UsageSettings
    supervision: SupervisionSettings
    warnings: tuple[str, ...] = ()
    at_default: frozenset[str] = frozenset()
# fmt: on


def _settings_of(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a class and of its slices. A field that is neither is the loader's own."""
    for field, annotation in kind.__annotations__.items():
        if hasattr(annotation, "__metadata__"):
            yield annotation.__metadata__[0]._replace(path=prefix + field)
        elif hasattr(annotation, "_fields"):
            yield from _settings_of(annotation, f"{field}.")


SETTINGS: tuple[Setting, ...] = tuple(_settings_of(Config))


class ConfigError(Exception):
    """The settings cannot be used. `complaints` has one line for each reason; none contains a secret."""

    def __init__(self, complaints: tuple[str, ...]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints
