"""llama-server's exit in words, from what it really prints and from what the kernel really sends."""

import signal
from pathlib import Path

import pytest

import exit_words
from exit_words import describe

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


@pytest.mark.parametrize("words", LINES)
def test_the_cause_is_read_from_the_last_lines(words: str) -> None:
    told = describe(1, ["load_backend: loaded CPU backend", LINES[words], "exiting"])
    assert told.startswith("ended with exit status 1; ")
    assert words in told


def test_the_more_telling_line_wins() -> None:
    lines = [LINES["bad model"], LINES["architecture 'foo'"]]
    assert "too old for the model" in describe(1, lines)


def test_an_exit_without_a_known_cause_is_told_plainly() -> None:
    assert describe(0, []) == "ended with exit status 0"
    assert describe(127, ["hello"]) == "ended with exit status 127"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGILL, "died of SIGILL (illegal instruction: it was built for a newer CPU than this one)"),
        (signal.SIGSEGV, "died of SIGSEGV (segmentation fault"),
        (signal.SIGBUS, "died of SIGBUS (bus error"),
        (signal.SIGTERM, "died of SIGTERM"),
        (60, "died of signal 60"),
    ],
)
def test_a_signal_is_told_by_name(number: int, words: str) -> None:
    assert describe(-number, []).startswith(words)


def test_other_processes_are_told_of_without_advice() -> None:
    assert exit_words.plainly(3) == "ended with exit status 3"
    assert exit_words.plainly(-9) == "was killed (SIGKILL)"
    assert exit_words.plainly(-15) == "died of SIGTERM"


def test_sigkill_is_most_often_the_kernel_and_certainly_when_it_counted() -> None:
    assert "most often by the kernel, out of memory" in describe(-9, [])
    assert "was killed (SIGKILL) by the kernel, out of memory" in describe(-9, [], oom_killed=True)


def test_the_kernels_counter_is_read_where_there_is_one(tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    assert exit_words.oom_kills([counter]) == 0
    counter.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert exit_words.oom_kills([tmp_path / "none", counter]) == 2
    counter.write_text("nothing\n")
    assert exit_words.oom_kills([counter]) == 0
