"""The supervisor's exit statuses, and the exceptions that end it with one of them."""

import re
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import NoReturn

from core import signals
from core.installation import check_command

EXIT_STOPPED, EXIT_SETTINGS, EXIT_NO_MODEL, EXIT_BACKEND, EXIT_SERVICE, EXIT_MODEL_UNAVAILABLE = 0, 2, 3, 4, 5, 6
# What to do about each failure. The log line before it has the reason; docs/DEPLOYMENT.md has the same table.
REMEDIES = {
    EXIT_SETTINGS: f"correct the setting that the error names; {check_command()} shows all of them",
    EXIT_NO_MODEL: "check the model's setting (MODEL_PATH …, MODELS_DIR, MODELS_PRESET), the free space, and the file",
    EXIT_BACKEND: "llama-server's lines in the log and in LOG_DIR say more; check EXTRA_ARGS, NGL, CTX and the model",
    EXIT_SERVICE: "free the port or set another one (PORT, PORT_HEALTH, PORT_BACKEND); check that no script is missing",
    EXIT_MODEL_UNAVAILABLE: "start again once the network, hub or volume is there, or raise MODEL_FETCH_TIMEOUT",
}

_UNKNOWN_ARGUMENT = re.compile(r"error: invalid argument: (\S+)", re.IGNORECASE)
_MAX_QUOTED = 200
# What llama-server prints if each further start would end in the same way: the status says what is to be changed.
_LASTING = (
    ("invalid argument: |error while handling argument|failed to initialize router models", EXIT_SETTINGS),
    ("HTTPS is not supported", EXIT_SETTINGS),
    ("failed to resolve commit for ", EXIT_MODEL_UNAVAILABLE),
    ("unknown model architecture: |invalid magic|failed to open GGUF file", EXIT_NO_MODEL),
    ("tensor '.*' (?:not found|data is not within)|unexpected end of file|corrupted or incomplete", EXIT_NO_MODEL),
)


def status_after(last_lines: Iterable[str]) -> int:
    """Return the exit status after llama-server's last crash: EXIT_BACKEND, or another if another start cannot help."""
    text = "\n".join(last_lines)
    return next((status for pattern, status in _LASTING if re.search(pattern, text, re.IGNORECASE)), EXIT_BACKEND)


def hopeless_argument(last_lines: Iterable[str], extra_args: Sequence[str]) -> str:
    """Return the error of a llama-server that does not know one of its arguments, "" if it says no such thing.

    No further start can help.
    """
    found = _UNKNOWN_ARGUMENT.search("\n".join(last_lines))
    if found is None:
        return ""
    argument = found[1][:_MAX_QUOTED]
    if argument in extra_args:
        return f"EXTRA_ARGS: llama-server does not know the argument {argument}"
    return f"llama-server does not know {argument}: it is too old, see docs/UPGRADE.md; EXTRA_ARGS does not have it"


def describe_remedy(status: int) -> str:
    """Return the last line of a process that ends with this status, without its subject."""
    return f"exit status {status}: {REMEDIES.get(status, 'this is a bug: please report it with the log')}"


class Shutdown(Exception):
    """Everything must stop, with this exit status. The message is the one log line that gives the reason, or empty."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


class StartupError(Shutdown):
    """Raised before anything runs: this configuration or machine cannot start."""


def exit_on_stop_signals() -> None:
    """End with EXIT_STOPPED at the first stop signal, as long as nothing runs that must be stopped first.

    At Ctrl-C a program gets the terminal's signal and the supervisor's.
    """
    signal.signal(signal.SIGTERM, _exit_at_once)
    signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    signals.ignore(*signals.STOP)
    sys.exit(EXIT_STOPPED)
