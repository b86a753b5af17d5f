"""The environment, read once into one frozen and validated Config; every complaint is made at once.

SETTINGS is the one table: parsing, `--check-config` and the table in docs/CONFIGURATION.md come from it. Nothing here
opens a socket, makes a folder or logs; what is not wrong but doubtful is in `Config.warnings`.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import accept
from http1 import Limits

YEAR_S = 365 * 86400
ALIASES = {"GATEWAY_PORT": "PORT"}
OFF_WHEN_EMPTY = frozenset({"ACCESS_LOG", "USAGE_FILE"})
EVERYWHERE = ("0.0.0.0", "::")


# Named tuples throughout: as frozen as dataclasses, and six times quicker to define, which is time before accepting.


class Listen(NamedTuple):
    host: str
    port: int
    port_health: int
    tls_cert_file: Path | None
    tls_key_file: Path | None


class Backend(NamedTuple):
    host: str
    port: int
    api_key: str | None


class Auth(NamedTuple):
    enabled: bool
    keys_file: Path
    max_requests_per_minute: int
    metrics_auth: bool
    keys_watch_s: float
    allow_paths: tuple[str, ...]
    admin_routes: bool


class Queue(NamedTuple):
    """max_concurrent None = as many as llama-server has slots; max_size 0 = unlimited; timeout_s 0 = none."""

    max_concurrent: int | None
    max_size: int
    timeout_s: float
    max_connections: int
    max_buffered_bytes: int
    cold_start_wait_s: float
    sse_heartbeat_s: float


class Timeouts(NamedTuple):
    client_header_s: float
    client_body_s: float
    keepalive_s: float
    connect_s: float
    request_s: float
    stream_idle_s: float
    duration_s: float
    health_s: float


class Log(NamedTuple):
    format: str
    level: str
    access_file: Path | None
    dir: Path
    name: str
    worker_type: str
    instance_id: str


class Usage(NamedTuple):
    file: Path | None
    gpu_cost_per_hour: float | None
    metrics_backend_s: float


class Model(NamedTuple):
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


class Supervision(NamedTuple):
    state_file: Path | None
    wedge_timeout_s: float
    max_restarts: int
    idle_stop_s: float
    on_idle: str | None
    drain_timeout_s: float
    mock_backend: bool
    debug_shell: bool


class Config(NamedTuple):
    listen: Listen
    backend: Backend
    auth: Auth
    queue: Queue
    timeouts: Timeouts
    limits: Limits
    log: Log
    usage: Usage
    model: Model
    supervision: Supervision
    data_dir: Path
    cors_origins: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class ConfigError(Exception):
    """The settings cannot be used; `complaints` has one line for each reason, without any secret."""

    def __init__(self, complaints: tuple[str, ...]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


class Setting(NamedTuple):
    """One row: `default` is what one would write in the environment (None = nothing), `path` its place in Config."""

    name: str
    path: str
    converter: accept.Converter
    default: str | None
    unit: str
    text: str
    secret: bool = False


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("HOST", "listen.host", accept.HOST_NAME, "0.0.0.0", "",
            "Address that the gateway and the health server listen on; a container is reached from outside."),
    Setting("PORT", "listen.port", accept.whole(0, 65535), "8000", "",
            "The gateway's port, the usual one for OpenAI-compatible servers (0: any free one)."),
    Setting("PORT_HEALTH", "listen.port_health", accept.whole(0, 65535), "8001", "",
            "The health server's port, its own so that probes never wait behind clients (0: any free one)."),
    Setting("PORT_BACKEND", "backend.port", accept.whole(1, 65535), "8080", "",
            "llama-server's port, its own default."),
    Setting("BACKEND_HOST", "backend.host", accept.HOST_NAME, "127.0.0.1", "",
            "llama-server's address; loopback, so that nobody gets past the gateway."),
    Setting("BACKEND_API_KEY", "backend.api_key", accept.SECRET, None, "",
            "Key between gateway and llama-server; unset, a new one is made at each boot.", True),
    Setting("DATA_DIR", "data_dir", accept.PATH, None, "",
            "Keys, models, logs, usage; unset, the first mounted of /runpod-volume, /workspace, /data, else ./data."),
    Setting("MODEL_PATH", "model.path", accept.FILE, None, "",
            "The model's file; wins over MODEL_NAME. No model is assumed."),
    Setting("MODEL_NAME", "model.name", accept.MODEL_FILE, None, "",
            "The model's file inside MODELS_DIR. No model is assumed."),
    Setting("MODELS_DIR", "model.dir", accept.PATH, "$DATA_DIR/models", "",
            "Where models lie and downloads go; on the volume, so that they outlive the container."),
    Setting("MODEL_URL", "model.url", accept.URL, None, "",
            "Whence to fetch the model where it is not there yet; masked, since such URLs may be signed.", True),
    Setting("MODEL_SHA256", "model.sha256", accept.SHA256, None, "",
            "The download's digest; without it only the transport vouches for the file."),
    Setting("MODEL_HF", "model.hf", accept.HF_NAME, None, "",
            "Hugging Face model, given to llama-server's -hf; excludes the other model settings."),
    Setting("NGL", "model.ngl", accept.whole(0, 100000), "99", "layers",
            "Layers to put on the GPU; more than common models have, so all of them."),
    Setting("CTX", "model.ctx", accept.whole(0, 1 << 30), "16384", "tokens",
            "Context shared by all slots; fits most cards (0: as the model was trained)."),
    Setting("THREADS", "model.threads", accept.whole(0, 4096), "0", "threads",
            "CPU threads of llama-server (0: as llama-server thinks best)."),
    Setting("PARALLEL", "model.parallel", accept.whole(1, 4096), None, "slots",
            "Slots of llama-server; unset, llama-server decides."),
    Setting("EXTRA_ARGS", "model.extra_args", accept.ARGS, "", "",
            "Further arguments of llama-server, split as a shell would."),
    Setting("LLAMA_BIN", "model.llama_bin", accept.FILE, None, "",
            "llama-server's binary; unset, /app/llama-server or the first on the PATH."),
    Setting("MODEL_LOAD_TIMEOUT", "model.load_timeout_s", accept.decimal(0, YEAR_S), "0", "seconds",
            "How long a load may take; 0, as long as llama-server lives: network volumes are slow."),
    Setting("AUTH_ENABLED", "auth.enabled", accept.FLAG, "true", "",
            "Whether a key is asked for; an open gateway must be wished for."),
    Setting("AUTH_KEYS_FILE", "auth.keys_file", accept.PATH, "$DATA_DIR/api_keys.txt", "",
            "The keys file; on the volume, so that keys outlive the container."),
    Setting("MAX_REQUESTS_PER_MINUTE", "auth.max_requests_per_minute", accept.whole(1, 10**9), "100", "a minute",
            "Rate of a key whose line names none: ample for a person, little for a runaway script."),
    Setting("METRICS_AUTH_ENABLED", "auth.metrics_auth", accept.FLAG, "false", "",
            "Whether /metrics asks for a key; scrapers rarely have one, and the public page names no key."),
    Setting("KEYS_WATCH_SECONDS", "auth.keys_watch_s", accept.decimal(0, 86400), "2", "seconds",
            "Interval at which the keys file is looked at; a stat costs nothing (0: at SIGHUP only)."),
    Setting("ALLOW_PATHS", "auth.allow_paths", accept.ROUTES, "", "",
            "Further paths to relay as inference; none, since llama-server's new routes may do anything."),
    Setting("ADMIN_ROUTES", "auth.admin_routes", accept.FLAG, "false", "",
            "Whether operator keys may call routes that change llama-server; off, as few need them."),
    Setting("USAGE_FILE", "usage.file", accept.PATH, "$DATA_DIR/usage.db", "",
            "The usage ledger; empty, it is kept in memory only."),
    Setting("GPU_COST_PER_HOUR", "usage.gpu_cost_per_hour", accept.PRICE, None, "an hour",
            "Turns usage into money in reports; unset, reports have no money."),
    Setting("METRICS_BACKEND_SECONDS", "usage.metrics_backend_s", accept.decimal(0, 86400), "0", "seconds",
            "Least interval between scrapes of llama-server's metrics (0: off, as each scrape resets its averages)."),
    Setting("MAX_CONCURRENT_REQUESTS", "queue.max_concurrent", accept.auto(accept.whole(1, 10**6)), "auto", "requests",
            "Inference requests that run at once; auto: llama-server's slots, more would wait there unseen."),
    Setting("MAX_QUEUE_SIZE", "queue.max_size", accept.whole(0, 10**6), "100", "requests",
            "Requests that may wait for a slot: some minutes' work (0: unlimited)."),
    Setting("QUEUE_TIMEOUT", "queue.timeout_s", accept.decimal(0, YEAR_S), "0", "seconds",
            "How long a request may wait for a slot; 0, as long as its client does."),
    Setting("MAX_CONNECTIONS", "queue.max_connections", accept.whole(1, 10**6), "1024", "connections",
            "Client connections at once; within the usual limit of open files once the backend's are added."),
    Setting("REQUEST_TIMEOUT", "timeouts.request_s", accept.decimal(0.001, YEAR_S), "300", "seconds",
            "How long the backend may take to the response's head: a long prompt's prefill (504)."),
    Setting("STREAM_IDLE_TIMEOUT", "timeouts.stream_idle_s", accept.decimal(0.001, YEAR_S), "300", "seconds",
            "Longest silence of the backend between bytes of a response; a slow model's tokens are far quicker."),
    Setting("MAX_REQUEST_DURATION", "timeouts.duration_s", accept.decimal(0, YEAR_S), "0", "seconds",
            "Longest exchange in all; 0, none, as long generations are legitimate."),
    Setting("CLIENT_HEADER_TIMEOUT", "timeouts.client_header_s", accept.decimal(0.001, YEAR_S), "30", "seconds",
            "Time for a request's whole head: slow links pass, slow-loris clients do not."),
    Setting("CLIENT_BODY_TIMEOUT", "timeouts.client_body_s", accept.decimal(0.001, YEAR_S), "30", "seconds",
            "Longest pause between reads of a request's body; a stalled upload frees its memory."),
    Setting("KEEPALIVE_TIMEOUT", "timeouts.keepalive_s", accept.decimal(0.001, YEAR_S), "75", "seconds",
            "How long a client connection may idle between requests; above load balancers' usual 60."),
    Setting("BACKEND_CONNECT_TIMEOUT", "timeouts.connect_s", accept.decimal(0.001, YEAR_S), "10", "seconds",
            "Time to connect to the backend; a busy machine may need seconds."),
    Setting("HEALTH_TIMEOUT", "timeouts.health_s", accept.decimal(0.001, YEAR_S), "2", "seconds",
            "Time for one probe of the backend's /health, which answers at once when it is well."),
    Setting("MAX_REQUEST_BODY_SIZE", "limits.body_bytes", accept.size(1, 1 << 40), "10MiB", "octets",
            "Largest request body: long contexts and a few images (413)."),
    Setting("MAX_BUFFERED_BYTES", "queue.max_buffered_bytes", accept.size(1, 1 << 50), "256MiB", "octets",
            "Request bodies held at once in all; keeps a small machine alive (503)."),
    Setting("MAX_HEADERS", "limits.headers", accept.whole(1, 10000), "64", "field lines",
            "Header fields of a request; browsers send about 30 (431)."),
    Setting("MAX_HEADER_LINE_SIZE", "limits.header_line_bytes", accept.size(64, 1 << 24), "8192", "octets",
            "Longest header field line; llama-server takes no longer one (431)."),
    Setting("MAX_REQUEST_LINE_SIZE", "limits.request_line_bytes", accept.size(64, 1 << 24), "8192", "octets",
            "Longest request line, as common servers have it (414)."),
    Setting("MAX_RESPONSE_HEADER_SIZE", "limits.response_head_bytes", accept.size(64, 1 << 30), "65536", "octets",
            "Largest head of a backend's response; far more than llama-server sends (502)."),
    Setting("CORS_ORIGINS", "cors_origins", accept.ORIGINS, "", "",
            "Web pages that may call the gateway; none, as a key in a page is everybody's."),
    Setting("COLD_START_WAIT", "queue.cold_start_wait_s", accept.decimal(0, YEAR_S), "300", "seconds",
            "How long a request is held while the model loads: most loads, and most clients' patience (0: not held)."),
    Setting("SSE_HEARTBEAT", "queue.sse_heartbeat_s", accept.decimal(0, YEAR_S), "15", "seconds",
            "Silence before a comment line on a waiting stream; proxies cut after 60 to 100 (0: off)."),
    Setting("DRAIN_TIMEOUT", "supervision.drain_timeout_s", accept.decimal(0, YEAR_S), "7", "seconds",
            "Time for streams to finish at SIGTERM; `docker stop` allows 10 in all."),
    Setting("TLS_CERT_FILE", "listen.tls_cert_file", accept.PATH, None, "",
            "Certificate chain (PEM); unset, plain HTTP, as most platforms end TLS in front."),
    Setting("TLS_KEY_FILE", "listen.tls_key_file", accept.PATH, None, "",
            "The certificate's private key (PEM); both are read again at reload."),
    Setting("LOG_FORMAT", "log.format", accept.LOG_FORMAT, "text", "",
            "Form of log and access lines; people read first, collectors say json."),
    Setting("LOG_LEVEL", "log.level", accept.LEVEL, "info", "",
            "The least severity that is logged; info has one line an event, none a request."),
    Setting("ACCESS_LOG", "log.access_file", accept.PATH, "$DATA_DIR/logs/api_access.log", "",
            "One line a request; reopened at SIGHUP. Empty, there is none."),
    Setting("LOG_DIR", "log.dir", accept.PATH, "$DATA_DIR/logs", "",
            "Folder of the boot logs; on the volume, so that they outlive the container."),
    Setting("WORKER_TYPE", "log.worker_type", accept.NAME, "", "",
            "The kind of worker in the boot logs' folder name; one kind needs no name."),
    Setting("LOG_NAME", "log.name", accept.NAME, "llama", "",
            "Folder inside LOG_DIR; with WORKER_TYPE the default is llama-WORKER_TYPE."),
    Setting("INSTANCE_ID", "log.instance_id", accept.NAME, None, "",
            "The machine in the boot logs' file names; unset, its host name."),
    Setting("STATE_FILE", "supervision.state_file", accept.PATH, None, "",
            "Where the supervisor tells the others the backend's state; it sets this itself."),
    Setting("WEDGE_TIMEOUT", "supervision.wedge_timeout_s", accept.decimal(0.001, YEAR_S), "120", "seconds",
            "Silence after which llama-server counts as wedged and is restarted; longer than a slow probe."),
    Setting("MAX_RESTARTS", "supervision.max_restarts", accept.whole(0, 1000), "5", "restarts",
            "Crashes survived within 10 minutes; more will not help (0: the first ends the container)."),
    Setting("IDLE_STOP_SECONDS", "supervision.idle_stop_s", accept.decimal(0, YEAR_S), "0", "seconds",
            "Time without inference after which ON_IDLE runs or all stops (0: off, for machines that stay)."),
    Setting("ON_IDLE", "supervision.on_idle", accept.TEXT, None, "",
            "Shell command to run when idle; unset, everything stops. Masked, since it may hold a token.", True),
    Setting("DEBUG_SHELL", "supervision.debug_shell", accept.FLAG, "false", "",
            "Whether start.sh opens a shell in place of the services; for a container that will not start."),
    Setting("MOCK_BACKEND", "supervision.mock_backend", accept.FLAG, "false", "",
            "Whether mock_backend.py takes llama-server's place; for trying things without a model."),
)
# fmt: on


class Reading:
    """What came of one environment: `values`, `shown` (text and source) by setting's name, complaints, warnings."""

    def __init__(self, environ: Mapping[str, str], probe: accept.Probe) -> None:
        self.values: dict[str, Any] = {}
        self.shown: dict[str, tuple[str | None, str]] = {}
        self.complaints: list[str] = []
        self.warnings: list[str] = list(_near_misses(environ))
        self._environ = environ
        self._found = {"INSTANCE_ID": re.sub("[^A-Za-z0-9-]", "-", os.uname().nodename)}
        self._found["DATA_DIR"] = environ.get("DATA_DIR") or accept.find_data_dir(probe)
        if environ.get("WORKER_TYPE"):
            self._found["LOG_NAME"] = "llama-" + environ["WORKER_TYPE"]
        for setting in SETTINGS:
            self._read(setting)
        self.complaints += _contradictions(self.values)
        self.warnings += _doubts(self.values)

    def _read(self, setting: Setting) -> None:
        text, source = self._given(setting)
        if text is None:
            text, source = self._default(setting), "default"
        self.shown[setting.name] = ("(not shown)" if setting.secret and text else text, source)
        if not text and (text is None or setting.name in OFF_WHEN_EMPTY):
            self.values[setting.name] = None
            return
        try:
            self.values[setting.name] = setting.converter.parse(text)
        except ValueError as problem:
            self.shown[setting.name] = ("(refused)", source)
            if source == "default" and self.complaints:
                return  # made from a setting that has its own complaint
            value = "value" if setting.secret or setting.converter is accept.ARGS else f"value {accept.quoted(text)}"
            self.complaints.append(f"{setting.name}: the {value} {problem}; accepted: {setting.converter.accepts}")

    def _default(self, setting: Setting) -> str | None:
        text = self._found.get(setting.name, setting.default)
        return text and text.replace("$DATA_DIR", self._found["DATA_DIR"])

    def _given(self, setting: Setting) -> tuple[str | None, str]:
        """The text that the environment has for a setting (None = unset), and the name that it stands under."""
        name = setting.name
        names = [name, *(alias for alias, real in ALIASES.items() if real == name), *[name + "_FILE"] * setting.secret]
        given = {source: self._environ[source] for source in names if self._environ.get(source)}
        if not given:
            return ("" if name in OFF_WHEN_EMPTY and name in self._environ else None), name
        if len(given) > 1 and (setting.secret or len(set(given.values())) > 1):
            self.complaints.append(f"{' and '.join(given)} contradict each other: set one of them")
        self.warnings += [f"{alias} is an old name; set {name}" for alias in given if alias in ALIASES]
        source, text = next(iter(given.items()))
        if source != name + "_FILE":
            return text, source
        try:
            return accept.read_secret(text), source
        except ValueError as problem:
            self.complaints.append(f"{source}: {problem}")
            return None, source


def _near_misses(environ: Mapping[str, str]) -> Iterator[str]:
    """Names that look like a misspelt setting: the first word is one of ours, and the whole is close to one of ours."""
    names = {setting.name for setting in SETTINGS}
    known = names | set(ALIASES) | {setting.name + "_FILE" for setting in SETTINGS if setting.secret}
    first_words = {name.partition("_")[0] for name in names}
    for name in sorted(name for name, value in environ.items() if value):
        if name.startswith("LLAMA_ARG_"):
            yield f"{accept.quoted(name)} does not reach llama-server; use EXTRA_ARGS"
        elif name not in known and name.partition("_")[0] in first_words:
            for near in difflib.get_close_matches(name, names, 1, 0.85):
                yield f"{accept.quoted(name)} is not a setting; is {near} meant?"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are right by themselves but not together; one that could not be read is missing from values."""
    yield from _port_clashes(values)
    if (values.get("TLS_CERT_FILE", "?") is None) is not (values.get("TLS_KEY_FILE", "?") is None):
        yield "TLS_CERT_FILE and TLS_KEY_FILE are set together or not at all"
    url = values.get("MODEL_URL")
    unsafe = url and url[:5].lower() == "http:" and not accept.is_loopback(accept.url_host(url))
    if unsafe and values.get("MODEL_SHA256", "?") is None:
        yield "MODEL_URL: plain http needs MODEL_SHA256, unless the host is loopback; use https or set the digest"
    others = [name for name in ("MODEL_PATH", "MODEL_NAME", "MODEL_URL") if values.get(name)]
    if values.get("MODEL_HF") and others:
        yield f"MODEL_HF excludes {' and '.join(others)}: set one or the other"
    if values.get("METRICS_AUTH_ENABLED") and values.get("AUTH_ENABLED") is False:
        yield "METRICS_AUTH_ENABLED=true contradicts AUTH_ENABLED=false: there would be no key to ask for"
    wedge_s, health_s = values.get("WEDGE_TIMEOUT", YEAR_S), values.get("HEALTH_TIMEOUT", 0)
    if wedge_s <= health_s:
        both = f"WEDGE_TIMEOUT ({wedge_s:.15g} s) must be longer than HEALTH_TIMEOUT ({health_s:.15g} s)"
        yield f"{both}: one slow probe would count as wedged"


def _port_clashes(values: Mapping[str, Any]) -> Iterator[str]:
    ports = {name: values.get(name) or None for name in ("PORT", "PORT_HEALTH", "PORT_BACKEND")}
    host, backend_host = values.get("HOST", "?"), values.get("BACKEND_HOST", "")
    if ports["PORT"] and ports["PORT"] == ports["PORT_HEALTH"]:
        yield f"PORT and PORT_HEALTH are both {ports['PORT']}; each needs one of its own"
    reaches_loopback = host in EVERYWHERE or accept.is_loopback(host)
    if host == backend_host or (reaches_loopback and accept.is_loopback(backend_host)):
        for name in ("PORT", "PORT_HEALTH"):
            if ports[name] and ports[name] == ports["PORT_BACKEND"]:
                yield f"{name} and PORT_BACKEND are both {ports[name]} on one machine; each needs one of its own"


def _doubts(values: Mapping[str, Any]) -> Iterator[str]:
    """What works but is rarely meant."""
    if values.get("AUTH_ENABLED") is False:
        yield "AUTH_ENABLED=false: whoever reaches the port is served"
        if values.get("ADMIN_ROUTES"):
            yield "ADMIN_ROUTES=true: whoever reaches the port may drain the gateway and change the backend's model"
    if everything := [path for path in values.get("ALLOW_PATHS", ()) if re.fullmatch(r"/?\*+", path)]:
        opened = "every path of the backend's that is not listed, also those that its next version brings,"
        yield f"ALLOW_PATHS={everything[0]}: {opened} is open to every key"
    if values.get("MAX_REQUEST_BODY_SIZE", 0) > values.get("MAX_BUFFERED_BYTES", 1 << 60):
        yield "MAX_REQUEST_BODY_SIZE is above MAX_BUFFERED_BYTES: the largest bodies are always refused"
    if values.get("ON_IDLE") and values.get("IDLE_STOP_SECONDS") == 0:
        yield "ON_IDLE never runs: IDLE_STOP_SECONDS is 0"


def load_config(environ: Mapping[str, str], *, probe: accept.Probe = accept.probe_dir) -> Config:
    """Read and check all settings; raises ConfigError with every complaint. `probe` looks for platform volumes."""
    reading = Reading(environ, probe)
    if reading.complaints:
        raise ConfigError(tuple(reading.complaints))
    parts: dict[str, Any] = {}
    slices: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        part, _, attribute = setting.path.rpartition(".")
        (slices.setdefault(part, {}) if part else parts)[attribute] = reading.values[setting.name]
    parts |= {name: Config.__annotations__[name](**values) for name, values in slices.items()}
    return Config(**parts, warnings=tuple(reading.warnings))


def check_config(environ: Mapping[str, str], out: TextIO, *, probe: accept.Probe = accept.probe_dir) -> int:
    """Print each setting with its value (secrets masked) and source, then what is wrong; 0, or 2 if something is."""
    reading = Reading(environ, probe)
    for name, (text, source) in reading.shown.items():
        value = "(none)" if text is None else ascii(text)[1:-1] or "(empty)"
        out.write(f"{name} = {value}  [{'environment' if source == name else source}]\n")
    out.writelines(f"warning: {line}\n" for line in reading.warnings)
    out.writelines(f"error: {line}\n" for line in reading.complaints)
    out.write("The settings cannot be used.\n" if reading.complaints else "The settings are good.\n")
    return 2 if reading.complaints else 0


def markdown_table() -> str:
    """SETTINGS as the table of docs/CONFIGURATION.md."""
    lines = ["| Setting | Default | Unit | Accepted | Meaning |", "| --- | --- | --- | --- | --- |"]
    for name, _, converter, default, unit, text, secret in SETTINGS:
        shown = f"`{name}`, `{name}_FILE`" if secret else f"`{name}`"
        cells = (shown, f"`{default}`" if default else "–", unit or "–", converter.accepts, text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
