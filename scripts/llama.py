"""How llama-server is called: which binary, which arguments, and the environment it may see."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from config import SETTINGS, Config, Model

IMAGE_BINARY = "/app/llama-server"
SCRUBBED_PREFIXES = ("AIP_", "LLAMA_ARG_", "LLAMA_SERVER_")
NO_MODEL = "no model is set: set MODEL_PATH, MODEL_NAME, MODEL_URL or MODEL_HF (or MOCK_BACKEND=true)"
CACHE_SETTINGS = ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")
HERE = Path(__file__).resolve().parent


class NoBinary(Exception):
    """There is no llama-server to start; the text says where it was looked for."""


def is_set(model: Model) -> bool:
    return bool(model.path or model.name or model.url or model.hf)


def find_binary(model: Model, path: str | None = None) -> str:
    """LLAMA_BIN, else the image's, else the first on the PATH. Raises NoBinary."""
    if model.llama_bin:
        found = shutil.which(model.llama_bin, path=path)
        if not found:
            raise NoBinary(f"LLAMA_BIN: {model.llama_bin} is not an executable file")
        return found
    found = shutil.which(IMAGE_BINARY) or shutil.which("llama-server", path=path)
    if not found:
        raise NoBinary(f"llama-server is neither {IMAGE_BINARY} nor on the PATH: set LLAMA_BIN (or MOCK_BACKEND=true)")
    return found


def command(config: Config, model_path: str | None, key_file: Path) -> list[str]:
    """The whole command line; no secret is on it. `model_path` None means MODEL_HF (or no model, for the mock)."""
    mock = config.supervision.mock_backend
    start = [sys.executable, str(HERE / "mock_backend.py")] if mock else [find_binary(config.model)]
    address = ["--host", config.backend.host, "--port", str(config.backend.port), "--api-key-file", str(key_file)]
    return [*start, *address, *_model_args(config.model, model_path), *_metrics(config), *config.model.extra_args]


def _model_args(model: Model, model_path: str | None) -> list[str]:
    args = ["-m", model_path] if model_path else ["-hf", model.hf] if model.hf else []
    args += ["-ngl", str(model.ngl), "-c", str(model.ctx)]
    args += ["-t", str(model.threads)] if model.threads else []
    return args + (["-np", str(model.parallel)] if model.parallel else [])


def _metrics(config: Config) -> list[str]:
    return ["--metrics"] if config.usage.metrics_backend_s else []


def environment(environ: Mapping[str, str], model: Model) -> dict[str, str]:
    """What llama-server may see: not our secrets, nor what would change its arguments behind EXTRA_ARGS' back.

    AIP_* would open a second inference route, LLAMA_API_KEY a second key.
    """
    secret = {name for setting in SETTINGS if setting.secret for name in (setting.name, setting.name + "_FILE")}
    secret.add("LLAMA_API_KEY")
    kept = {
        name: value for name, value in environ.items() if name not in secret and not name.startswith(SCRUBBED_PREFIXES)
    }
    if model.hf and not any(kept.get(name) for name in CACHE_SETTINGS):
        kept["LLAMA_CACHE"] = os.fspath(model.dir)
    return kept
