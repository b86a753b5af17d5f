"""Reads the environment once into a frozen and validated Config, and reports all errors at once.

Nothing here opens a socket, creates a folder or logs. What is valid but probably a mistake is in `Config.warnings`.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TextIO

from config import converters
from config.settings import ALIASES, OFF_WHEN_EMPTY, PRIVATE, SETTINGS, YEAR_S, Config, ConfigError, Setting
from core.listener import is_socket_path

_NAMES = frozenset(setting.name for setting in SETTINGS)
_JOINED = {name.replace("_", ""): name for name in _NAMES}
_LONG_WORDS = frozenset(name for name in _NAMES if "_" not in name and len(name) >= 7)
# With these llama-server's slots share what prompts leave behind, or cannot be told apart.
_SHARING_ARGS = frozenset(
    ("--no-slots", "--lookup-cache-dynamic", "-lcd", "--slot-save-path", "--models-dir", "--models-preset")
)
_SHARING_SPECULATION = ("ngram-mod", "ngram-cache")
# What llama-server is told as a router, by the setting that says it.
_ROUTER_ARGS = {
    "--models-dir": "MODELS_DIR",
    "--models-preset": "MODELS_PRESET",
    "--models-max": "MODELS_MAX",
    "--models-autoload": "nothing: the gateway loads models",
    "--no-models-autoload": "nothing: the gateway loads models",
}
_ONE_MODEL = ("MODEL_PATH", "MODEL_NAME", "MODEL_URL", "MODEL_SHA256", "MODEL_HF")
ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104 - a warning names them


class EnvironmentReader:
    """The settings in one environment: `values` and `shown` (text and source) by name, complaints and warnings.

    `probe` returns whether a folder is a mount point and whether it is writable.
    """

    def __init__(self, environ: Mapping[str, str], probe: converters.Probe) -> None:
        self.values: dict[str, Any] = {}
        self.shown: dict[str, tuple[str | None, str]] = {}
        self.complaints: list[str] = []
        self.warnings: list[str] = list(_misspelt_names(environ))
        self._environ = environ
        machine = environ.get("RUNPOD_POD_ID") or os.uname().nodename
        self._defaults = {"INSTANCE_ID": re.sub("[^A-Za-z0-9-]", "-", machine)[:100]}
        self._defaults["DATA_DIR"] = environ.get("DATA_DIR") or converters.find_data_dir(probe)
        if environ.get("WORKER_TYPE"):
            self._defaults["LOG_NAME"] = "llama-" + environ["WORKER_TYPE"]
        for setting in SETTINGS:
            self._read(setting)
        self._move_default_ports()
        self.complaints += _contradictions(self.values)
        self.warnings += [*_questionable(self.values), *self._without_effect()]

    def _read(self, setting: Setting) -> None:
        text, source = self._text(setting)
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
                return  # derived from a setting that has its own complaint
            value = (
                "value"
                if setting.secret or setting.converter is converters.ARGS
                else f"value {converters.quoted(text)}"
            )
            self.complaints.append(f"{setting.name}: the {value} {problem}; accepted: {setting.converter.accepts}")

    @property
    def at_default(self) -> frozenset[str]:
        """Return the names of the settings that the environment does not set."""
        return frozenset(name for name, (_, source) in self.shown.items() if source == "default")

    def _move_default_ports(self) -> None:
        """Replace the default of a port that equals another port: only ports that are given can be wrong."""
        for name in ("PORT_HEALTH", "PORT_BACKEND"):
            default = self.values[name] if name in self.at_default else None
            while default and any(name in clash for clash in _port_clashes(self.values)):
                self.values[name] += 1
            if default and self.values[name] != default:
                self.shown[name] = (str(self.values[name]), "default")
                self.warnings.append(f"{name} is not set, and {default} is another port: it is {self.values[name]}")

    def _without_effect(self) -> Iterator[str]:
        """Warn of settings that only MODELS=router reads."""
        for setting in SETTINGS:
            given = setting.path.startswith("router.") and setting.name not in self.at_default
            if given and setting.name != "MODELS" and self.values.get("MODELS") is False:
                yield f"{setting.name} has no effect: it needs MODELS=router"

    def _default(self, setting: Setting) -> str | None:
        text = self._defaults.get(setting.name, setting.default)
        return text and text.replace("$DATA_DIR", self._defaults["DATA_DIR"])

    def _text(self, setting: Setting) -> tuple[str | None, str]:
        """Return the text of a setting in the environment (None if unset), and the variable that contains it."""
        name = setting.name
        names = [name, *(alias for alias, real in ALIASES.items() if real == name), *[name + "_FILE"] * setting.secret]
        given = {source: self._environ[source] for source in names if self._environ.get(source)}
        for source in [alias for alias in given if alias in ALIASES and converters.is_service_link(given[alias])]:
            self.warnings.append(f"{source}={given.pop(source)[:60]!a} is a Service's address, not a setting: ignored")
        if not given:
            return ("" if name in OFF_WHEN_EMPTY and name in self._environ else None), name
        if len(given) > 1 and (setting.secret or len(set(given.values())) > 1):
            self.complaints.append(f"{' and '.join(given)} contradict each other: set one of them")
        self.warnings += [f"{alias} is an old name; set {name}" for alias in given if alias in ALIASES]
        source, text = next(iter(given.items()))
        if source != name + "_FILE":
            return text, source
        try:
            return converters.read_secret(text), source
        except ValueError as problem:
            self.complaints.append(f"{source}: {problem}")
            return None, source


def _misspelt_names(environ: Mapping[str, str]) -> Iterator[str]:
    """Warn of names that are nearly a setting's."""
    known = _NAMES | set(ALIASES) | {setting.name + "_FILE" for setting in SETTINGS if setting.secret}
    for name in sorted(name for name, value in environ.items() if value):
        if name.startswith("LLAMA_ARG_"):
            yield f"{converters.quoted(name)} does not reach llama-server; use EXTRA_ARGS"
        elif name not in known and (near := _nearly(name)) is not None:
            yield f"{converters.quoted(name)} is not a setting; did you mean {near}?"


def _nearly(name: str) -> str | None:
    """Return the setting that a name is meant to be: in capitals and with underscores, in another order, or mistyped.

    Other programs have settings, too. So the first word must be much like that of a setting. A short word is often so
    by chance, and LOGNAME is a name of its own.
    """
    if name != "LOGNAME" and (whole := _JOINED.get(name.replace("_", "").upper())) is not None:
        return whole
    parts = sorted(name.split("_"))
    if len(parts) > 1:
        for other in _NAMES:
            if sorted(other.split("_")) == parts:
                return other
    beginnings = {other.partition("_")[0] for other in _NAMES}
    if len(parts) > 1 and not difflib.get_close_matches(name.partition("_")[0], beginnings, 1, 0.8):
        return None
    candidates = _NAMES if len(parts) > 1 else _LONG_WORDS
    return next(iter(difflib.get_close_matches(name, candidates, 1, 0.85)), None)


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Complain about settings that exclude each other. `values` lacks settings that are invalid by themselves."""
    yield from _port_clashes(values)
    if (values.get("TLS_CERT_FILE", "?") is None) is not (values.get("TLS_KEY_FILE", "?") is None):
        yield "TLS_CERT_FILE and TLS_KEY_FILE must be set together"
    url = values.get("MODEL_URL")
    unsafe = url and url[:5].lower() == "http:" and not converters.is_loopback(converters.url_host(url))
    if unsafe and values.get("MODEL_SHA256", "?") is None:
        yield "MODEL_URL: plain http needs MODEL_SHA256, unless the host is loopback; use https or set the digest"
    if values.get("PROMPT_CACHE") == PRIVATE:
        yield from _shared_between_slots(values.get("EXTRA_ARGS", ()))
    if values.get("MODELS"):
        yield from _router_contradictions(values)
    others = [name for name in ("MODEL_PATH", "MODEL_NAME", "MODEL_URL") if values.get(name)]
    if values.get("MODEL_HF") and others:
        yield f"MODEL_HF excludes {' and '.join(others)}: set one or the other"
    if values.get("METRICS_AUTH_ENABLED") and values.get("AUTH_ENABLED") is False:
        yield "METRICS_AUTH_ENABLED=true needs AUTH_ENABLED=true: without authentication there are no keys"
    wedge_s, health_s = values.get("WEDGE_TIMEOUT", YEAR_S), values.get("HEALTH_TIMEOUT", 0)
    if wedge_s <= health_s:
        both = f"WEDGE_TIMEOUT ({wedge_s:.15g} s) must be longer than HEALTH_TIMEOUT ({health_s:.15g} s)"
        yield f"{both}: otherwise one slow probe counts as a hang"


def _router_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Complain about settings that exclude MODELS=router, or each other with it."""
    if one := [name for name in _ONE_MODEL if values.get(name)]:
        yield f"MODELS=router excludes {' and '.join(one)}: the models are those of MODELS_DIR and MODELS_PRESET"
    if values.get("PROMPT_CACHE") == PRIVATE:
        yield "PROMPT_CACHE=private excludes MODELS=router: the slots of models that come and go cannot be kept apart"
    for argument in values.get("EXTRA_ARGS", ()):
        name = argument.replace("_", "-").partition("=")[0]
        if name in _ROUTER_ARGS:
            yield f"MODELS=router excludes {name} in EXTRA_ARGS: set {_ROUTER_ARGS[name]}"
    preload, most, aliases = (
        values.get("MODELS_PRELOAD", ()),
        values.get("MODELS_MAX", 1000),
        values.get("MODEL_ALIASES"),
    )
    if len({(aliases or {}).get(name, name) for name in preload}) > most:
        yield f"MODELS_PRELOAD names {len(preload)} models, but MODELS_MAX={most} are loaded at once"


def _shared_between_slots(arguments: Sequence[str]) -> Iterator[str]:
    """Complain about arguments with which llama-server's slots share what prompts leave behind, or are not listed."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.replace("_", "-").partition("=")
        value = value if equals else following
        shares = name in _SHARING_ARGS or (name in ("--cache-ram", "-cram") and value != "0")
        if shares or (name == "--spec-type" and any(kind in value for kind in _SHARING_SPECULATION)):
            why = "llama-server would not list its slots" if name == "--no-slots" else "keys would share what it keeps"
            yield f"PROMPT_CACHE=private excludes {name} in EXTRA_ARGS: {why}"


def _port_clashes(values: Mapping[str, Any]) -> Iterator[str]:
    ports = {name: values.get(name) or None for name in ("PORT", "PORT_HEALTH", "PORT_BACKEND")}
    host, backend_host = values.get("HOST", "?"), values.get("BACKEND_HOST", "")
    if is_socket_path(backend_host):
        ports["PORT_BACKEND"] = None
    if ports["PORT"] and ports["PORT"] == ports["PORT_HEALTH"]:
        yield f"PORT and PORT_HEALTH are both {ports['PORT']}; they must differ"
    reaches_loopback = host in ALL_INTERFACES or converters.is_loopback(host)
    if host == backend_host or (reaches_loopback and converters.is_loopback(backend_host)):
        for name in ("PORT", "PORT_HEALTH"):
            if ports[name] and ports[name] == ports["PORT_BACKEND"]:
                yield f"{name} and PORT_BACKEND are both {ports[name]} on one machine; they must differ"


def _questionable(values: Mapping[str, Any]) -> Iterator[str]:
    """Warn of what is valid but probably a mistake."""
    if values.get("AUTH_ENABLED") is False:
        yield "AUTH_ENABLED=false: every client that reaches the port is served"
        if values.get("ADMIN_ROUTES"):
            yield "ADMIN_ROUTES=true: every client that reaches the port may drain the gateway and change the model"
    if any(network.prefixlen == 0 for network in values.get("TRUSTED_PROXIES", ())):
        yield "TRUSTED_PROXIES contains every address: each client can give any address as its own"
    if everything := [path for path in values.get("ALLOW_PATHS", ()) if re.fullmatch(r"/?\*+", path)]:
        opened = "every unlisted path of the backend, including those that its next version adds,"
        yield f"ALLOW_PATHS={everything[0]}: {opened} is open to every key"
    if values.get("MAX_REQUEST_BODY_SIZE", 0) > values.get("MAX_BUFFERED_BYTES", 1 << 60):
        yield "MAX_REQUEST_BODY_SIZE is above MAX_BUFFERED_BYTES: the largest bodies are always refused"
    head_bytes = values.get("MAX_REQUEST_HEADER_SIZE", 1 << 60)
    for name in ("MAX_REQUEST_LINE_SIZE", "MAX_HEADER_LINE_SIZE"):
        if values.get(name, 0) > head_bytes:
            yield f"{name} is above MAX_REQUEST_HEADER_SIZE: the longest lines are always refused"
    if values.get("ON_IDLE") and values.get("IDLE_STOP_SECONDS") == 0:
        yield "ON_IDLE never runs: IDLE_STOP_SECONDS is 0"


def load_config(environ: Mapping[str, str], *, probe: converters.Probe = converters.probe_dir) -> Config:
    """Read and check all settings. Raises ConfigError with every complaint.

    `probe` returns whether a folder is a mount point and whether it is writable.
    """
    reader = EnvironmentReader(environ, probe)
    if reader.complaints:
        raise ConfigError(tuple(reader.complaints))
    parts: dict[str, Any] = {}
    slices: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        part, _, attribute = setting.path.rpartition(".")
        (slices.setdefault(part, {}) if part else parts)[attribute] = reader.values[setting.name]
    parts |= {name: Config.__annotations__[name](**values) for name, values in slices.items()}
    return Config(**parts, warnings=tuple(reader.warnings), at_default=reader.at_default)


def check_config(environ: Mapping[str, str], out: TextIO, *, probe: converters.Probe = converters.probe_dir) -> int:
    """Print each setting with its value (secrets masked) and source, then warnings and errors.

    Returns the exit status: 0, or 2 if there are errors.
    """
    reader = EnvironmentReader(environ, probe)
    for name, (text, source) in reader.shown.items():
        value = "(none)" if text is None else ascii(text)[1:-1] or "(empty)"
        out.write(f"{name} = {value}  [{'environment' if source == name else source}]\n")
    out.writelines(f"warning: {line}\n" for line in reader.warnings)
    out.writelines(f"error: {line}\n" for line in reader.complaints)
    out.write("The settings are invalid.\n" if reader.complaints else "Every value has the right form.\n")
    return 2 if reader.complaints else 0
