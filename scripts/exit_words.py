"""Why llama-server ended, in words an operator can act upon: from its exit status and its last lines."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path

OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))

# The first that fits any of the last lines is told; the more telling cause stands first.
CAUSES: tuple[tuple[str, str], ...] = (
    (r"error while loading shared libraries: (?P<what>lib(?:cuda|nvidia|cublas)[^: ]*)",
     "CUDA is missing ({what}): run the container with --gpus all, or take an image without CUDA"),
    (r"error while loading shared libraries: (?P<what>[^: ]+)", "a shared library is missing: {what}"),
    (r"no CUDA-capable device|CUDA driver version is insufficient|failed to initialize CUDA",
     "CUDA finds no usable GPU: check the driver and --gpus all, or set NGL=0"),
    (r"cudaMalloc failed|(?:CUDA|ROCm) error: out of memory|failed to allocate (?:CUDA|ROCm|Vulkan)[0-9]* buffer",
     "the GPU's memory is too small: lower NGL or CTX, or take a smaller quantization"),
    (r"unknown model architecture: (?P<what>\S+)", "this llama-server is too old for the model (architecture {what})"),
    (r"(?:error: )?invalid argument: (?P<what>\S+)", "it does not know the argument {what}: check EXTRA_ARGS"),
    (r"couldn't bind|bind: address already in use", "its port is taken: set PORT_BACKEND"),
    (r"failed to (?:allocate|reserve)|std::bad_alloc",
     "it found too little memory: lower CTX or PARALLEL, or take a smaller model"),
    (r"(?:failed|error|unable) (?:to )?load(?:ing)? model|invalid magic|tensor .* not found",
     "bad model: the file is damaged, incomplete or not a model that it can load"),
)  # fmt: skip
SIGNALS: dict[int, str] = {
    signal.SIGILL: "illegal instruction: it was built for a newer CPU than this one",
    signal.SIGSEGV: "segmentation fault, a bug in it or in a driver",
    signal.SIGBUS: "bus error: the model's file was cut or its volume is gone while it was mapped",
    signal.SIGABRT: "it aborted itself",
    signal.SIGFPE: "arithmetic error, a bug in it",
}


def plainly(status: int) -> str:
    """Put an exit status (negative: a signal) into a sentence without its subject."""
    if status >= 0:
        return f"ended with exit status {status}"
    return "was killed (SIGKILL)" if -status == signal.SIGKILL else f"died of {_signal_name(-status)}"


def describe(status: int, last_lines: Sequence[str], oom_killed: bool = False) -> str:
    """Put llama-server's exit status and last lines of output into one sentence without its subject."""
    cause = _cause(last_lines)
    return f"{_how(status, oom_killed)}{'; ' + cause if cause else ''}"


def _how(status: int, oom_killed: bool) -> str:
    if -status == signal.SIGKILL:
        by = "by the kernel, out of memory" if oom_killed else "from outside, most often by the kernel, out of memory"
        return f"was killed (SIGKILL) {by}: lower CTX or NGL, take a smaller model or more memory"
    words = SIGNALS.get(-status)
    return f"{plainly(status)} ({words})" if words else plainly(status)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _cause(last_lines: Sequence[str]) -> str:
    for pattern, words in CAUSES:
        for line in last_lines:
            if match := re.search(pattern, line, re.IGNORECASE):
                return words.format(**match.groupdict())
    return ""


def oom_kills(counters: Sequence[Path] = OOM_COUNTERS) -> int:
    """How often the kernel has killed in this container for want of memory; 0 where it does not tell."""
    for path in counters:
        try:
            match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        return int(match[1]) if match else 0
    return 0
