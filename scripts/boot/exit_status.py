"""Why a process ended, in a sentence that an operator can act on: from its exit status and its last lines of output."""

import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))

# The first pattern that matches any of the last lines is reported, so the more specific causes come first. What
# llama-server says itself is quoted.
CAUSES: tuple[tuple[str, str], ...] = (
    (r"error while loading shared libraries: (?P<what>lib(?:cuda|nvidia|cublas)[^: ]*)",
     "CUDA is missing ({what}): run the container with --gpus all, or use an image without CUDA"),
    (r"error while loading shared libraries: (?P<what>[^: ]+)", "a shared library is missing: {what}"),
    (r"no CUDA-capable device|CUDA driver version is insufficient|failed to initialize CUDA",
     "CUDA finds no usable GPU: check the driver and --gpus all, or set NGL=0"),
    (r"cudaMalloc failed|(?:CUDA|ROCm) error: out of memory|failed to allocate (?:CUDA|ROCm|Vulkan)[0-9]* buffer",
     "the GPU's memory is too small: lower NGL or CTX, or use a smaller quantization"),
    (r"error while handling argument \"(?P<what>[^\"]+)\": (?:error: )?(?P<reason>.+)",
     "it does not accept the argument {what} ({reason}): check EXTRA_ARGS, and the setting that it comes from"),
    (r"(?:error: )?invalid argument: (?P<what>\S+)", "it does not know the argument {what}: check EXTRA_ARGS"),
    (r"failed to initialize router models: (?P<reason>.+)",
     "it cannot use the models: {reason} (check MODELS_DIR and MODELS_PRESET)"),
    (r"the supplied chat template is not supported: (?P<reason>.+)|chat_templates_init: error: (?P<other>.+)",
     "it cannot use the chat template ({reason}): check --chat-template and --chat-template-file in EXTRA_ARGS"),
    (r"lora_init: failed to open '(?P<what>[^']+)': (?P<reason>.+)|failed to load lora adapter '(?P<other>[^']+)'",
     "it cannot load the LoRA adapter {what} ({reason}): check --lora in EXTRA_ARGS"),
    (r"couldn't bind|bind: address already in use", "its port is already in use: set PORT_BACKEND"),
    (r"HTTPS is not supported",
     "it was built without HTTPS and cannot download: set MODEL_URL or MODEL_PATH in place of MODEL_HF"),
    (r"failed to resolve commit for (?P<what>\S+)",
     "it cannot download {what}: there is no such repository, HF_TOKEN may not read it, or the hub cannot be reached"),
    (r"built without SSL support", "it was built without TLS: take its options out of EXTRA_ARGS"),
    (r"failed to (?:allocate|reserve)|std::bad_alloc",
     "not enough memory: lower CTX or PARALLEL, or use a smaller model"),
)  # fmt: skip
# Why it cannot load a file. The last line that matches is about the file at which it stopped.
FILE_REASONS = (
    (r"failed to open GGUF file '[^']+' \((?P<reason>.+)\)$", "{reason}"),
    (r"unknown model architecture: ''", "the file is damaged or no model"),
    (r"unknown model architecture: (?P<reason>\S+)",
     "this llama-server is too old for the model (architecture {reason})"),
    (r"(?P<reason>invalid magic.*|tensor '.*' (?:data is not within|not found|has (?:wrong|invalid)).*"
     r"|.*(?:unexpected end of file|corrupted or incomplete|failed to read (?:key|tensor|header)).*)",
     "the file is damaged, incomplete or no model: {reason}"),
    (r"error loading model: (?P<reason>.+)", "{reason}"),
    (r"clip_(?:init|model_loader).*: (?P<reason>.+)", "{reason}"),
)  # fmt: skip
# Which file it cannot load: an additional one, or the model.
FILES = (
    (r"failed to load multimodal model, '(?P<file>[^']+)'",
     "it cannot load the projector {file} (--mmproj in EXTRA_ARGS)"),
    (r"failed to load draft model, '(?P<file>[^']+)'", "it cannot load the draft model {file} (-md in EXTRA_ARGS)"),
    (r"(?:failed|error|unable) (?:to )?load(?:ing)? model|invalid magic|tensor .* not found", "bad model"),
)  # fmt: skip
MAX_QUOTED = 200
SIGNALS: dict[int, str] = {
    signal.SIGILL: "illegal instruction: it was built for a newer CPU than this one",
    signal.SIGSEGV: "segmentation fault: a bug in it or in a driver",
    signal.SIGBUS: "bus error: the mapped model file was truncated or its volume was unmounted",
    signal.SIGABRT: "it aborted itself",
    signal.SIGFPE: "arithmetic error: a bug in it",
}


def describe(status: int) -> str:
    """Describe an exit status (negative: a signal) as a sentence without its subject."""
    if status >= 0:
        return f"ended with exit status {status}"
    return "was killed (SIGKILL)" if -status == signal.SIGKILL else f"died of {_signal_name(-status)}"


def explain(status: int, last_lines: Sequence[str], oom_killed: bool = False) -> str:
    """Explain llama-server's end as a sentence without its subject: exit status, likely cause and remedy.

    `oom_killed` says that the kernel has killed a process of this container for lack of memory in the meantime.
    """
    cause = _cause(last_lines)
    return f"{_describe_end(status, oom_killed)}{'; ' + cause if cause else ''}"


def _describe_end(status: int, oom_killed: bool) -> str:
    if -status == signal.SIGKILL:
        by = "by the kernel, out of memory" if oom_killed else "from outside, most often by the kernel, out of memory"
        return f"was killed (SIGKILL) {by}: lower CTX or NGL, use a smaller model or add memory"
    meaning = SIGNALS.get(-status)
    return f"{describe(status)} ({meaning})" if meaning else describe(status)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _cause(last_lines: Sequence[str]) -> str:
    for pattern, message in CAUSES:
        if found := _find(pattern, last_lines):
            return message.format(**found)
    for pattern, message in FILES:
        if found := _find(pattern, last_lines):
            return f"{message.format(**found)}: {_file_reason(last_lines)}"
    return ""


def _find(pattern: str, lines: Iterable[str]) -> dict[str, str] | None:
    """Return the groups of the first line that matches, shortened; the group `other` counts as `reason` and `what`."""
    for line in lines:
        if match := re.search(pattern, line, re.IGNORECASE):
            groups = {name: value.strip()[:MAX_QUOTED] for name, value in match.groupdict().items() if value}
            other = groups.pop("other", "see its log")
            return {"what": other, "reason": other, "file": "", **groups}
    return None


def _file_reason(last_lines: Sequence[str]) -> str:
    """Return llama-server's own reason, of the file that it tried last."""
    for pattern, message in FILE_REASONS:
        if found := _find(pattern, reversed(last_lines)):
            return message.format(**found)
    return "llama-server says no more than that; its log may"


def oom_kills(counters: Sequence[Path] = OOM_COUNTERS) -> int:
    """Return how many processes the kernel has killed in this container for lack of memory; 0 if it does not count."""
    for path in counters:
        try:
            match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        return int(match[1]) if match else 0
    return 0
