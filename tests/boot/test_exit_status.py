"""Exit statuses as sentences, from lines that llama-server prints and statuses that the kernel reports."""

import signal
from pathlib import Path

import pytest

from boot import exit_status
from boot.exit_status import describe, explain

LINES = {
    "bad model": "0.00.004.710 E srv    load_model: failed to load model, '/etc/passwd'",
    "CUDA is missing (libcuda.so.1)": "/app/llama-server: error while loading shared libraries: libcuda.so.1: cannot",
    "a shared library is missing: libgomp.so.1": "llama-server: error while loading shared libraries: libgomp.so.1: no",
    "check EXTRA_ARGS": "error: invalid argument: --nonsense",
    "CUDA finds no usable GPU": "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
    "lower NGL or CTX": "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9 MiB on device 0: cudaMalloc failed",
    "architecture 'foo'": "llama_model_load: error loading model: unknown model architecture: 'foo'",
    "set PORT_BACKEND": "srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080",
    "lower CTX or PARALLEL": "terminate called after throwing an instance of 'std::bad_alloc'",
}


@pytest.mark.parametrize("message", LINES)
def test_the_cause_is_found_in_the_last_lines(message: str) -> None:
    explanation = explain(1, ["load_backend: loaded CPU backend", LINES[message], "exiting"])
    assert explanation.startswith("ended with exit status 1; ")
    assert message in explanation


def test_the_more_specific_cause_wins() -> None:
    lines = [LINES["bad model"], LINES["architecture 'foo'"]]
    assert "too old for the model" in explain(1, lines)


# What llama-server b11434 prints, and what is made of it.
FAILED_TO_OPEN = "0.00.1 E gguf_init_from_file: failed to open GGUF file 'x.gguf' (No such file or directory)"
OUTSIDE = "E llama_model_load: error loading model: tensor 'a' data is not within the file bounds, model is corrupted"
QUOTED = [
    (
        ["E srv  llama_server: failed to initialize router models: option 'x' not recognized in preset 'chat'"],
        "it cannot use the models: option 'x' not recognized in preset 'chat' (check MODELS_DIR and MODELS_PRESET)",
    ),
    (
        [
            'error while handling argument "--temp": expected value for argument',
            "",
            "usage:",
            "--temp N   (default: 0.8)",
        ],
        "it does not accept the argument --temp (expected value for argument): check EXTRA_ARGS",
    ),
    (
        ["error while handling argument \"--chat-template-file\": error: failed to open file 'none.jinja'", "usage:"],
        "it does not accept the argument --chat-template-file (failed to open file 'none.jinja'): check EXTRA_ARGS",
    ),
    (
        ["error: the supplied chat template is not supported: {{ broken", "failed to apply template: std::exception"],
        "it cannot use the chat template ({{ broken): check --chat-template and --chat-template-file",
    ),
    (
        ["E common_chat_templates_init: error: parser: Parser Error", "E failed to initialize chat template"],
        "it cannot use the chat template (parser: Parser Error): check",
    ),
    (
        [
            FAILED_TO_OPEN,
            "clip_init: failed to load model 'x.gguf'",
            "load_model: failed to load multimodal model, 'x.gguf'",
        ],
        "it cannot load the projector x.gguf (--mmproj in EXTRA_ARGS): No such file or directory",
    ),
    (
        [
            "E clip_init: failed to load model 'x.gguf': no vision",
            "load_model: failed to load multimodal model, 'x.gguf'",
        ],
        "it cannot load the projector x.gguf (--mmproj in EXTRA_ARGS): no vision",
    ),
    (
        [
            "E mtmd: error: Failed to load CLIP model from x.gguf",
            "load_model: failed to load multimodal model, 'x.gguf'",
        ],
        "it cannot load the projector x.gguf (--mmproj in EXTRA_ARGS): llama-server says no more than that",
    ),
    (
        [FAILED_TO_OPEN, "E srv load_model: failed to load draft model, 'x.gguf'"],
        "it cannot load the draft model x.gguf (-md in EXTRA_ARGS): No such file or directory",
    ),
    (
        [OUTSIDE, "E srv load_model: failed to load draft model, 'x.gguf'"],
        "it cannot load the draft model x.gguf (-md in EXTRA_ARGS): the file is damaged, incomplete or no model:",
    ),
    (
        ["E llama_adapter_lora_init: failed to open 'l.gguf': No such file", "E failed to load lora adapter 'l.gguf'"],
        "it cannot load the LoRA adapter l.gguf (No such file): check --lora in EXTRA_ARGS",
    ),
    ([FAILED_TO_OPEN, "E load_model: failed to load model, 'x.gguf'"], "bad model: No such file or directory"),
    (
        [OUTSIDE, "E load_model: failed to load model, 'x'"],
        "bad model: the file is damaged, incomplete or no model: te",
    ),
    (
        ["E gguf_init: invalid magic characters: 'a', expected 'GGUF'", "E error loading model: failed to load from x"],
        "bad model: the file is damaged, incomplete or no model: invalid magic characters: 'a', expected 'GGUF'",
    ),
    (["E error loading model: unknown model architecture: ''"], "bad model: the file is damaged or no model"),
    (["E error loading model: vocab is too large"], "bad model: vocab is too large"),
    (["E srv init: the server is built without SSL support"], "it was built without TLS"),
    (
        [
            "E get_repo_commit: error: HTTPS is not supported. Please rebuild with one of:",
            "W get_repo_files: failed to resolve commit for user/repository",
            "E srv load_model: failed to load model, ''",
        ],
        "it was built without HTTPS and cannot download: set MODEL_URL or MODEL_PATH in place of MODEL_HF",
    ),
    (
        [
            "W get_repo_files: failed to resolve commit for user/repository",
            "E srv load_model: failed to load model, ''",
        ],
        "it cannot download user/repository: there is no such repository, HF_TOKEN may not read it, or the hub",
    ),
]


@pytest.mark.parametrize(("lines", "cause"), QUOTED)
def test_llama_servers_own_reason_is_quoted(lines: list[str], cause: str) -> None:
    last = [
        *lines,
        "I srv operator(): cleaning up before exit...",
        "E srv llama_server: exiting due to model loading error",
    ]
    assert explain(1, ["I loading", *last]).startswith(f"ended with exit status 1; {cause}")


def test_only_a_damaged_file_is_called_damaged() -> None:
    for lines, cause in QUOTED:
        assert ("damaged" in explain(1, lines)) == ("damaged" in cause)


def test_a_long_reason_is_shortened() -> None:
    assert len(explain(1, [f"error loading model: {'x' * 5000}"])) < 300


def test_without_a_known_cause_only_the_status_is_reported() -> None:
    assert explain(0, []) == "ended with exit status 0"
    assert explain(127, ["hello"]) == "ended with exit status 127"


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (signal.SIGILL, "died of SIGILL (illegal instruction: it was built for a newer CPU than this one)"),
        (signal.SIGSEGV, "died of SIGSEGV (segmentation fault"),
        (signal.SIGBUS, "died of SIGBUS (bus error"),
        (signal.SIGTERM, "died of SIGTERM"),
        (60, "died of signal 60"),
    ],
)
def test_a_signal_is_reported_by_name(number: int, start: str) -> None:
    assert explain(-number, []).startswith(start)


def test_a_description_has_no_advice() -> None:
    assert describe(3) == "ended with exit status 3"
    assert describe(-9) == "was killed (SIGKILL)"
    assert describe(-15) == "died of SIGTERM"


def test_sigkill_is_probably_the_kernel_and_certainly_if_its_counter_has_moved() -> None:
    assert "most often by the kernel, out of memory" in explain(-9, [])
    assert "was killed (SIGKILL) by the kernel, out of memory" in explain(-9, [], oom_killed=True)


def test_the_kernels_counter_is_0_unless_there_is_one(tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    assert exit_status.oom_kills([counter]) == 0
    counter.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert exit_status.oom_kills([tmp_path / "none", counter]) == 2
    counter.write_text("nothing\n")
    assert exit_status.oom_kills([counter]) == 0
