"""What one setting accepts: numbers, durations, sizes, words, addresses, lists and arguments, from text to value.

A converter knows nothing of the environment or of other settings. It takes ASCII digits only, and whatever it does not
know is a ValueError that says what is wrong; what would be right stands in `accepts`. Where the data lie unless a
setting says so is found here too.
"""

import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}
SECRET_FILE_CHARS = 65536
VOLUMES = ("/runpod-volume", "/workspace", "/data")
# llama-server spells some of these twice and reads _ as - in long names; the second half says which setting to use.
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
    """What a setting accepts, in words, and the function that reads it (ValueError tells what is wrong)."""

    accepts: str
    parse: Callable[[str], Any]


def whole(low: int, high: int) -> Converter:
    """Plain ASCII digits: int() alone would read `+5`, `5_0` and other scripts' digits too."""

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

    return Converter(f"octets from {low} to {high}, or a whole number of KiB, MiB or GiB", parse)


def _bounded(number: N, low: float, high: float) -> N:
    if not low <= number <= high:
        raise ValueError(f"is below {low:.15g}" if number < low else f"is above {high:.15g}")
    return number


def auto(converter: Converter) -> Converter:
    def parse(text: str) -> Any:
        return None if text.lower() == "auto" else converter.parse(text)

    return Converter(f"auto, or {converter.accepts}", parse)


def choice(words: Mapping[str, object]) -> Converter:
    def parse(text: str) -> object:
        if text.lower() not in words:
            raise ValueError("is not a word that this setting knows")
        return words[text.lower()]

    return Converter(f"one of {', '.join(words)}", parse)


def matching(pattern: str, accepts: str) -> Converter:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError("does not have the right form")
        return text

    return Converter(accepts, parse)


def comma_list(pattern: str, accepts: str) -> Converter:
    def parse(text: str) -> tuple[str, ...]:
        words = [word.strip(" ") for word in text.split(",") if word.strip(" ")]
        for word in words:
            if not re.fullmatch(pattern, word):
                raise ValueError(f"has an entry of the wrong form ({quoted(word)})")
        return tuple(dict.fromkeys(words))

    return Converter(accepts, parse)


def read_secret(path: str) -> str:
    """Read a secret's file without its line end.

    Raises ValueError with the reason alone: whoever mixes up NAME and NAME_FILE has the secret in place of the path.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read(SECRET_FILE_CHARS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"the file cannot be read: {reason}") from None
    if len(text) > SECRET_FILE_CHARS:
        raise ValueError(f"the file is longer than {SECRET_FILE_CHARS} characters")
    return text.removesuffix("\n").removesuffix("\r")


def _parse_host(text: str) -> str:
    address = re.sub("%[A-Za-z0-9._-]+$", "", text)
    if is_address(socket.AF_INET6, address) or is_address(socket.AF_INET, text):
        return text
    if not re.fullmatch("(?![.-])(?![0-9.]+$)[A-Za-z0-9._-]{1,253}", text):
        raise ValueError("is neither an address nor a host name")
    return text


def quoted(text: str) -> str:
    """Show a value in one short printable line."""
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
        words = tuple(shlex.split(text))
    except ValueError:
        raise ValueError("has a quote or a backslash without its counterpart") from None
    for word in words:
        name = word.partition("=")[0]
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in REFUSED_ARGS:
            raise ValueError(f"sets {name}, which is not its to set (use {REFUSED_ARGS[name]})")
    return words


def _parse_origins(text: str) -> tuple[str, ...]:
    origins = ORIGIN_LIST.parse(text.lower())
    if "*" in origins and origins != ("*",):
        raise ValueError("has * beside other origins")
    # A browser leaves out the default port.
    return tuple(dict.fromkeys(re.sub("^(https:.*):443$|^(http:.*):80$", r"\1\2", origin) for origin in origins))


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
SECRET = matching("gateway-[A-Za-z0-9_-]{43}", "`gateway-` and 43 base64url characters")
HOST_NAME = Converter("an IPv4 address, an IPv6 address without brackets, or a host name", _parse_host)
URL = Converter("an https URL, or an http URL if MODEL_SHA256 is set or the host is loopback", _parse_url)
ARGS = Converter("words quoted as for a shell, without llama-server's address, keys and model", _parse_args)
ROUTES = comma_list(
    r"\*|/((?![?#])[!-~])*", "paths that begin with / (`*` stands for anything), or `*`, comma-separated"
)
ORIGIN_LIST = comma_list(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", "")
ORIGINS = Converter("origins such as https://app.example (no path), comma-separated, or `*` alone", _parse_origins)
LOG_FORMAT = choice({"text": "text", "json": "json"})
LEVEL = choice({word: word for word in ("debug", "info", "warning", "error", "critical")})


def probe_dir(path: str) -> tuple[bool, bool]:
    """Tell whether a folder is a mount point and whether it can be written to."""
    return os.path.ismount(path), os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def find_data_dir(probe: Probe) -> str:
    """Choose a folder: the platform's volume even where the image has made /data itself."""
    for volume in VOLUMES:
        if all(probe(volume)):
            return volume
    return "/data" if probe("/data")[1] else "./data"
