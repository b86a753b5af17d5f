"""Converters from a setting's text to its value: numbers, durations, sizes, choices, addresses, lists and arguments.

A converter reads neither the environment nor other settings, and accepts ASCII digits only. The ValueError that it
raises says what is wrong; its `accepts` says what is right. The default data folder is also found here.
"""

import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import keyfile
from config import member_rules
from core.listener import MAX_PATH_BYTES, is_socket_path

FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}
SECRET_FILE_CHARS = 65536
VOLUMES = ("/runpod-volume", "/workspace", "/data")
# Arguments that EXTRA_ARGS must not contain, and what to set instead. llama-server has two spellings for some of them,
# and reads _ as - in long names.
REFUSED_ARGS = dict.fromkeys(("--host", "--port", "--reuse-port"), "PORT_BACKEND and BACKEND_HOST")
REFUSED_ARGS |= dict.fromkeys(("--api-key", "--api-key-file"), "BACKEND_API_KEY")
REFUSED_ARGS |= dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), "TLS_CERT_FILE and TLS_KEY_FILE")
REFUSED_ARGS |= dict.fromkeys(("-m", "--model"), "MODEL_PATH")
REFUSED_ARGS |= dict.fromkeys(("-mu", "--model-url"), "MODEL_URL")
REFUSED_ARGS |= dict.fromkeys(("-hf", "-hfr", "--hf-repo"), "MODEL_HF")
REFUSED_ARGS |= dict.fromkeys(("-hft", "--hf-token"), "HF_TOKEN in the environment")
REFUSED_ARGS |= {"--api-prefix": "no prefix: the gateway's routes have none"}

N = TypeVar("N", int, float)
Probe = Callable[[str], tuple[bool, bool]]


class Converter(NamedTuple):
    """A description of what a setting accepts, and the function that parses it (ValueError says what is wrong)."""

    accepts: str
    parse: Callable[[str], Any]


def whole(low: int, high: int) -> Converter:
    """ASCII digits only: int() alone would also accept `+5`, `5_0` and the digits of other scripts."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text):
            raise ValueError("is not a whole number")
        return _bounded(int(text), low, high)

    return Converter(f"a whole number from {low} to {high}", parse)


def decimal(low: float, high: float, noun: str = "seconds") -> Converter:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,19}(\.[0-9]{1,19})?", text):
            raise ValueError("is not a decimal number")
        return _bounded(float(text), low, high)

    return Converter(f"{noun} from {low:g} to {high:.9g}, with or without a decimal fraction", parse)


def size(low: int, high: int) -> Converter:
    def parse(text: str) -> int:
        match = re.fullmatch("([0-9]{1,19})([KMG]iB)?", text)
        if match is None:
            raise ValueError("is not a size")
        return _bounded(int(match[1]) << UNITS[match[2] or ""], low, high)

    return Converter(f"bytes from {low} to {high}, or a whole number of KiB, MiB or GiB", parse)


def _bounded(number: N, low: float, high: float) -> N:
    if not low <= number <= high:
        raise ValueError(f"is below {low:.15g}" if number < low else f"is above {high:.15g}")
    return number


def auto(converter: Converter) -> Converter:
    def parse(text: str) -> Any:
        return None if text.lower() == "auto" else converter.parse(text)

    return Converter(f"auto, or {converter.accepts}", parse)


def choice(values: Mapping[str, object]) -> Converter:
    def parse(text: str) -> object:
        if text.lower() not in values:
            raise ValueError("is not one of the choices")
        return values[text.lower()]

    return Converter(f"one of {', '.join(values)}", parse)


def matching(pattern: str, accepts: str) -> Converter:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError("does not have the right form")
        return text

    return Converter(accepts, parse)


def comma_list(pattern: str, accepts: str) -> Converter:
    def parse(text: str) -> tuple[str, ...]:
        entries = [entry.strip(" ") for entry in text.split(",") if entry.strip(" ")]
        for entry in entries:
            if not re.fullmatch(pattern, entry):
                raise ValueError(f"has an entry of the wrong form ({quoted(entry)})")
        return tuple(dict.fromkeys(entries))

    return Converter(accepts, parse)


def read_secret(path: str) -> str:
    """Read a secret from a file, without a byte order mark and without blanks and line ends around it.

    Raises ValueError, whose text does not contain the path: if NAME and NAME_FILE are mixed up, the path is the secret.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read(SECRET_FILE_CHARS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"the file cannot be read: {reason}") from None
    if len(text) > SECRET_FILE_CHARS:
        raise ValueError(f"the file is longer than {SECRET_FILE_CHARS} characters")
    return text.strip(" \t\r\n")


def is_service_link(text: str) -> bool:
    """Return whether a variable comes from Kubernetes or a container link: a Service named x sets X_PORT=tcp://…."""
    return re.match("(tcp|udp|sctp)://", text) is not None


def _parse_host(text: str) -> str:
    address = re.sub("%[A-Za-z0-9._-]+$", "", text)
    if is_address(socket.AF_INET6, address) or is_address(socket.AF_INET, text):
        return text
    if not re.fullmatch("(?![.-])(?![0-9.]+$)[A-Za-z0-9._-]{1,253}", text):
        raise ValueError("is neither an address nor a host name")
    return text


def _parse_backend_host(text: str) -> str:
    if not is_socket_path(text):
        return _parse_host(text)
    if not os.path.isabs(text) or len(os.fsencode(FILE.parse(text))) > MAX_PATH_BYTES:
        raise ValueError(f"is not an absolute path of at most {MAX_PATH_BYTES} bytes")
    return text


def quoted(text: str) -> str:
    """Quote a value in one short printable line."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def is_address(family: int, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError):
        return False
    return True


def _parse_url(text: str) -> str:
    if not re.fullmatch(r"(?i:https?)://[!-~]+", text) or not url_host(text):
        raise ValueError("is not an http or https URL")
    return text


def url_host(url: str) -> str:
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([A-Za-z0-9._-]+)(?::[0-9]+)?", authority)
    return (match[1] or match[2]).lower() if match else ""


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or (host.startswith("127.") and is_address(socket.AF_INET, host))


def _parse_args(text: str) -> tuple[str, ...]:
    try:
        arguments = tuple(shlex.split(text))
    except ValueError:
        raise ValueError("has an unclosed quote or a backslash at its end") from None
    for argument in arguments:
        name = argument.partition("=")[0]
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in REFUSED_ARGS:
            raise ValueError(f"sets {name}, which is not allowed here (use {REFUSED_ARGS[name]})")
    return arguments


def _parse_origins(text: str) -> tuple[str, ...]:
    origins = ORIGIN_LIST.parse(text.lower())
    if "*" in origins and origins != ("*",):
        raise ValueError("has * together with other origins")
    # Browsers omit the default port.
    return tuple(dict.fromkeys(re.sub("^(https:.*):443$|^(http:.*):80$", r"\1\2", origin) for origin in origins))


def _parse_networks(text: str) -> tuple[keyfile.Network, ...]:
    try:
        return keyfile.parse_networks(text.replace(" ", "")) if text else ()
    except keyfile.KeyFileError as error:
        raise ValueError(f"is not a list of networks: {error}") from None


def _parse_keys(text: str) -> tuple[keyfile.Entry, ...]:
    parsed = keyfile.parse_list(text)
    if parsed.complaints:
        raise ValueError(f"is wrong: {'; '.join(parsed.complaints)}")
    if parsed.error or not parsed.entries:
        raise ValueError(f"is wrong: {parsed.error or 'it contains no key'}")
    return parsed.entries


def _parse_aliases(text: str) -> Mapping[str, str]:
    """Parse alias=model, comma-separated. An alias stands for a model, so it never stands for another alias."""
    aliases: dict[str, str] = {}
    for alias, _, name in (entry.partition("=") for entry in _ALIAS_LIST.parse(text)):
        if alias in aliases:
            raise ValueError(f"has the alias {quoted(alias)} twice")
        aliases[alias] = name
    for alias, name in aliases.items():
        if name in aliases:
            other = "itself" if name == alias else f"the alias {quoted(name)}"
            raise ValueError(f"has the alias {quoted(alias)} for {other}; an alias stands for a model")
    return MappingProxyType(aliases)


FLAG = choice(FLAGS)
PRICE = decimal(0, 10**6, "an amount")
FILE = matching(r"[^\x00-\x1f\x7f]+", "a path without control characters")
PATH = Converter(FILE.accepts, lambda text: Path(FILE.parse(text)))
TEXT = matching(r"(?s:.*)", "any text")
NAME = matching(
    r"(?!\.)[A-Za-z0-9._-]{0,100}", "a name of letters, digits, dot, - and _ that does not begin with a dot"
)
MODEL_FILE = matching(r"(?!/)(?!(.*/)?\.\.(/|$))[^\x00-\x1f\x7f]+", "a file's path inside MODELS_DIR")
HF_NAME = matching(
    "[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+(:[A-Za-z0-9._-]+)?", "user/repository, or user/repository:quantization"
)
DIGEST = matching("[0-9A-Fa-f]{64}", "64 hexadecimal digits")
SHA256 = Converter(DIGEST.accepts, lambda text: DIGEST.parse(text).lower())
TOKEN = matching("[!-~]{1,1000}", "up to 1000 visible ASCII characters")
HF_TOKEN = Converter(TOKEN.accepts, lambda text: TOKEN.parse(text.strip()))
SECRET = matching("gateway-[A-Za-z0-9_-]{43}", "`gateway-` and 43 base64url characters")
HOST_NAME = Converter("an IPv4 address, an IPv6 address without brackets, or a host name", _parse_host)
BACKEND_HOST = Converter(
    f"{HOST_NAME.accepts}, or a Unix socket's absolute path that ends in .sock", _parse_backend_host
)
URL = Converter("an https URL, or an http URL if MODEL_SHA256 is set or the host is loopback", _parse_url)
ARGS = Converter("arguments quoted as for a shell, except llama-server's address, keys and model", _parse_args)
ROUTES = comma_list(r"\*|/((?![?#])[!-~])*", "paths that begin with / (`*` matches anything), or `*`, comma-separated")
ORIGIN_LIST = comma_list(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", "")
ORIGINS = Converter("origins such as https://app.example (no path), comma-separated, or `*` alone", _parse_origins)
NETWORKS = Converter("addresses and networks such as 10.0.0.0/8, comma-separated", _parse_networks)
KEYS = Converter("lines of a keys file, separated by `;` or newlines", _parse_keys)
MEMBER_RULES = Converter(member_rules.accepted(), member_rules.parse_rules)
_MODEL_NAME = r"[^\x00-\x20\x7f,=](?:[^\x00-\x1f\x7f,=]{0,253}[^\x00-\x20\x7f,=])?"
_ALIAS_LIST = comma_list(f"{_MODEL_NAME}={_MODEL_NAME}", "")
MODELS = choice({"single": False, "router": True})
MODEL = matching(_MODEL_NAME, "a model's name as llama-server lists it, without a comma and =")
MODEL_NAMES = comma_list(_MODEL_NAME, "names of models as llama-server lists them, comma-separated")
MODEL_ALIASES = Converter("alias=model, comma-separated, such as gpt-4o=qwen3-8b", _parse_aliases)
PROMPT_CACHE = choice({"shared": "shared", "private": "private"})
LOG_FORMAT = choice({"text": "text", "json": "json"})
LEVELS = {level: level for level in ("debug", "info", "warning", "error", "critical")}
# logging has these aliases too, and other programs' settings have no other spelling.
LEVEL = choice({**LEVELS, "warn": "warning", "fatal": "critical"})


def probe_dir(path: str) -> tuple[bool, bool]:
    """Return whether a folder is a mount point, and whether it is writable."""
    return os.path.ismount(path), os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def find_data_dir(probe: Probe) -> str:
    """Choose the data folder. A mounted volume takes precedence over a /data folder that is part of the image."""
    for volume in VOLUMES:
        if all(probe(volume)):
            return volume
    return "/data" if probe("/data")[1] else "./data"
