"""The machine's GPUs and their memory, as the vendor's own tool reports them."""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from boot.transfer import format_size
from config.loader import load_config
from config.settings import ConfigError
from core import logs

TOOLS = ("nvidia-smi", "rocm-smi")
NONE = "GPU: none found (neither nvidia-smi nor rocm-smi), llama-server runs on the CPU"
TOOL_TIMEOUT_S = 10
MIB = 1 << 20
RunTool = Callable[[Sequence[str]], str]

log = logging.getLogger(__name__)


def has_tool() -> bool:
    """Return whether a tool is installed that can report GPUs."""
    return any(map(shutil.which, TOOLS))


def run_tool(argv: Sequence[str]) -> str:
    """Run a tool and return its output; an empty string if the tool is missing, fails or hangs."""
    try:
        done = subprocess.run(argv, capture_output=True, check=True, timeout=TOOL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def total_vram_bytes(run: RunTool = run_tool) -> int | None:
    """Return the memory of all GPUs together; None if no tool reports it.

    Not the free memory: by the time that a tool has answered, llama-server may have taken it.
    """
    total = _nvidia_total_bytes(run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]))
    if total is None:
        total = _rocm_total_bytes(run(["rocm-smi", "--showmeminfo", "vram", "--json"]))
    return total


def _nvidia_total_bytes(text: str) -> int | None:
    """Sum the cards' MiB, one number per line. A card that reports no number ([N/A]) counts as 0."""
    numbers = [int(line) for line in map(str.strip, text.splitlines()) if line.isascii() and line.isdigit()]
    return sum(numbers) * MIB if numbers else None


def _rocm_total_bytes(text: str) -> int | None:
    """Sum the memory of rocm-smi's cards."""
    try:
        cards = [card["VRAM Total Memory (B)"] for card in json.loads(text).values() if "VRAM Total Memory (B)" in card]
        return sum(map(int, cards)) if cards else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def warn_if_short(model_bytes: int, vram_bytes: int | None, max_loaded: int = 1) -> None:
    """Warn if the models are larger than the GPUs' memory: they may still run, slowly or with fewer layers.

    `max_loaded` is how many models these are.
    """
    if vram_bytes is not None and model_bytes > vram_bytes:
        size, vram = format_size(model_bytes), format_size(vram_bytes)
        subject = "the model has" if max_loaded == 1 else f"the largest {max_loaded} models (MODELS_MAX) have"
        lower = "NGL or CTX" if max_loaded == 1 else "MODELS_MAX, NGL or CTX"
        log.warning("%s %s, the GPU %s: llama-server may fail or be slow; lower %s", subject, size, vram, lower)


def report(run: RunTool = run_tool) -> str:
    """Return one line that names the GPUs."""
    if shutil.which("nvidia-smi"):
        cards = run(["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]).splitlines()
        return "GPU: " + ("; ".join(cards) or "nvidia-smi is installed but reports none")
    if shutil.which("rocm-smi"):
        cards = run(["rocm-smi", "--showproductname", "--csv"]).split()[1:]
        return "GPU: " + ("; ".join(cards) or "rocm-smi is installed but reports none")
    return NONE


def main(model_bytes: int | None = None) -> int:
    """Log one line about the GPUs, or with `model_bytes` a warning if they are too small; return the exit status.

    These are supervisor.py --report-gpu and --check-vram, processes of their own: a tool may take any time.
    """
    try:
        config = load_config(os.environ)
    except ConfigError:
        # The supervisor reports wrong settings.
        return 0
    logs.setup("supervisor", config.log.level, config.log.format)
    if model_bytes is None:
        log.info("%s", report())
    else:
        warn_if_short(model_bytes, total_vram_bytes(), config.router.max_loaded if config.router.enabled else 1)
    return 0
