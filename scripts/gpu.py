"""What GPUs the machine has and what is free on them, asked of the vendor's own tool.

python3 gpu.py     one log line about them; start.sh runs it beside the boot, since the tools may take seconds
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import logs
from config import ConfigError, load_config

TOOL_TIMEOUT_S = 10
MIB = 1 << 20
Run = Callable[[Sequence[str]], str]

log = logging.getLogger(__name__)


def run_tool(argv: Sequence[str]) -> str:
    """Run a tool and return what it prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(argv, capture_output=True, check=True, timeout=TOOL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def free_vram_bytes(run: Run = run_tool) -> int | None:
    """Memory that is free on all GPUs together; None where no tool tells."""
    free = _nvidia(run(["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]))
    return _rocm(run(["rocm-smi", "--showmeminfo", "vram", "--json"])) if free is None else free


def _nvidia(text: str) -> int | None:
    """Sum the cards' free MiB, one number a line; a card that does not tell ([N/A]) counts nothing."""
    numbers = [int(line) for line in map(str.strip, text.splitlines()) if line.isascii() and line.isdigit()]
    return sum(numbers) * MIB if numbers else None


def _rocm(text: str) -> int | None:
    """Sum total minus used over rocm-smi's cards."""
    try:
        cards = [
            int(card["VRAM Total Memory (B)"]) - int(card["VRAM Total Used Memory (B)"])
            for card in json.loads(text).values()
            if "VRAM Total Memory (B)" in card
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return sum(cards) if cards else None


def report(run: Run = run_tool) -> str:
    """Name the GPUs in one line."""
    if shutil.which("nvidia-smi"):
        cards = run(["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]).splitlines()
        return "GPU: " + ("; ".join(cards) or "nvidia-smi is there but reports none")
    if shutil.which("rocm-smi"):
        cards = run(["rocm-smi", "--showproductname", "--csv"]).split()[1:]
        return "GPU: " + ("; ".join(cards) or "rocm-smi is there but reports none")
    return "GPU: none found (neither nvidia-smi nor rocm-smi), llama-server runs on the CPU"


def main() -> int:
    try:
        config = load_config(os.environ)
    except ConfigError:
        # The supervisor complains.
        return 0
    logs.setup("start", config.log.level, config.log.format)
    log.info("%s", report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
