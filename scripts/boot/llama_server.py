"""How llama-server is started: its binary, its arguments, and the environment that is passed to it."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from boot.shutdown import EXIT_BACKEND, EXIT_SETTINGS
from config.settings import PRIVATE, SETTINGS, Config, ModelSettings
from core.installation import command as command_of
from core.listener import is_socket_path

_THREADS = frozenset(("-t", "--threads", "-tb", "--threads-batch"))
_DEVICES = Path("/dev")
_GPUS = ("nvidia[0-9]*", "nvidiactl", "kfd", "dri/renderD*", "dxg")
_TOPOLOGY = Path("/sys/devices/system/cpu")
IMAGE_BINARY = "/app/llama-server"
_AUTOMATIC_SLOTS = "4"  # as many as llama-server chooses
SCRUBBED_PREFIXES = ("AIP_", "LLAMA_ARG_", "LLAMA_SERVER_")
CACHE_SETTINGS = ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")


class BinaryNotFound(Exception):
    """There is no llama-server to start. The message names the places that were searched."""


def has_model(model: ModelSettings) -> bool:
    """Return whether any setting names a model."""
    return bool(model.path or model.name or model.url or model.hf)


def models_folder(config: Config) -> Path | None:
    """Return the folder whose models a router serves. With a preset that is MODELS_DIR only if it is set."""
    return None if config.router.preset and "MODELS_DIR" in config.at_default else config.model.dir


def find_binary(model: ModelSettings, path: str | None = None) -> str:
    """Return LLAMA_BIN, else the image's binary, else the first on the PATH (or on `path`). Raises BinaryNotFound."""
    if model.llama_bin:
        found = shutil.which(model.llama_bin, path=path)
        if not found:
            raise BinaryNotFound(f"LLAMA_BIN: {model.llama_bin} is not an executable file")
        return found
    found = shutil.which(IMAGE_BINARY) or shutil.which("llama-server", path=path)
    if not found:
        raise BinaryNotFound(
            f"llama-server is neither {IMAGE_BINARY} nor on the PATH: set LLAMA_BIN (or MOCK_BACKEND=true)"
        )
    return found


def describe_exec_error(binary: str, error: OSError) -> str:
    """Say why a binary that was found cannot be executed."""
    wrong_machine = error.errno == errno.ENOEXEC
    reason = "it is not a program for this machine" if wrong_machine else str(error.strerror)
    return f"llama-server cannot be executed ({binary}): {reason}"


def exec_error_status(error: OSError) -> int:
    """Return the exit status: that of a wrong setting if another start would end in the same way."""
    lasting = error.errno in (errno.ENOEXEC, errno.ENOENT, errno.EACCES, errno.EPERM)
    return EXIT_SETTINGS if lasting else EXIT_BACKEND


def command(config: Config, model_path: str | None, key_file: Path, slots_folder: Path) -> list[str]:
    """Return the whole command line, which contains no secret. Raises BinaryNotFound.

    `model_path` is None if llama-server loads MODEL_HF itself, and for the mock, which loads nothing.
    """
    mock = config.supervision.mock_backend
    start = command_of("mock_backend") if mock else [find_binary(config.model)]
    backend = config.backend
    address = ["--host", backend.host, *([] if is_socket_path(backend.host) else ["--port", str(backend.port)])]
    key = ["--api-key-file", str(key_file)]
    return [
        *start,
        *address,
        *key,
        *_router_args(config),
        *_model_args(config, model_path),
        *_metrics_args(config),
        *_cache_args(config, slots_folder),
        *config.model.extra_args,
    ]


def _router_args(config: Config) -> list[str]:
    """Return what makes llama-server a router that loads a model only when it is told to."""
    if not config.router.enabled:
        return []
    folder, preset = models_folder(config), config.router.preset
    args = ["--models-dir", str(folder)] if folder else []
    args += ["--models-preset", str(preset)] if preset else []
    return [*args, "--models-max", str(config.router.max_loaded), "--no-models-autoload"]


def _model_args(config: Config, model_path: str | None) -> list[str]:
    """Return the arguments of a model. A router hands them on to all of its models, in place of their presets' own.

    So with a preset NGL and CTX are passed on only if they are set.
    """
    model = config.model
    defaults = {"NGL", "CTX"} & config.at_default if config.router.preset else set[str]()
    args = ["-m", model_path] if model_path else ["-hf", model.hf] if model.hf else []
    args += [] if "NGL" in defaults else ["-ngl", str(model.ngl)]
    args += [] if "CTX" in defaults else ["-c", str(model.ctx)]
    args += ["-t", str(model.threads)] if model.threads else []
    return args + (["-np", str(model.parallel)] if model.parallel else [])


def works_in_one_thread(model: ModelSettings, topology: Path = _TOPOLOGY) -> bool:
    """Return whether llama-server computes in a single thread; its default is one for each core of the processor."""
    arguments = [part for argument in model.extra_args for part in argument.split("=", 1)]
    given = [arguments[number + 1] for number, name in enumerate(arguments[:-1]) if name in _THREADS]
    if given or model.threads:
        return "1" in (*given, str(model.threads))
    cores = {path.read_text() for path in topology.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(cores) == 1 or (os.cpu_count() or 1) == 1


def may_use_gpu(model: ModelSettings, devices: Path = _DEVICES) -> bool:
    """Return whether llama-server may compute on a GPU."""
    return model.ngl > 0 and any(found for name in _GPUS for found in devices.glob(name))


def _metrics_args(config: Config) -> list[str]:
    return ["--metrics"] if config.usage.metrics_backend_s else []


def _cache_args(config: Config, slots_folder: Path) -> list[str]:
    """Return what lets the gateway empty slots, and keeps prompts from moving between them.

    If llama-server chooses the number of slots, they share their memory, whatever else it is told.
    """
    if config.backend.prompt_cache != PRIVATE:
        return []
    slots = [] if config.model.parallel else ["-np", _AUTOMATIC_SLOTS]
    return ["--slots", "--slot-save-path", str(slots_folder), "--cache-ram", "0", "--no-kv-unified", *slots]


def environment(environ: Mapping[str, str], model: ModelSettings) -> dict[str, str]:
    """Return llama-server's environment: without our secrets, and without variables that set its options.

    Such variables bypass the check of EXTRA_ARGS. AIP_* adds a second inference route, LLAMA_API_KEY a second key.
    """
    secret = {name for setting in SETTINGS if setting.secret for name in (setting.name, setting.name + "_FILE")}
    secret = secret - {"HF_TOKEN"} | {"LLAMA_API_KEY"}
    kept = {
        name: value for name, value in environ.items() if name not in secret and not name.startswith(SCRUBBED_PREFIXES)
    }
    if model.hf_token:
        kept["HF_TOKEN"] = model.hf_token  # MODEL_HF, and models that EXTRA_ARGS names
    if model.hf and not any(kept.get(name) for name in CACHE_SETTINGS):
        kept["LLAMA_CACHE"] = os.fspath(model.dir)
    return kept


def router_environment(env: Mapping[str, str], config: Config, key: str) -> dict[str, str]:
    """Return llama-server's environment as a router: its children get the key, which it does not hand on to them.

    Each child listens on a port of its own, where any user of the machine could ask it. It lists what it has downloaded
    before: by default that is in MODELS_DIR, and not what other programs have in their cache.
    """
    cache = {} if any(env.get(name) for name in CACHE_SETTINGS) else {"LLAMA_CACHE": os.fspath(config.model.dir)}
    return {**env, **cache, "LLAMA_API_KEY": key}
