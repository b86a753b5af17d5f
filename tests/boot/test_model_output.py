"""model_output.py: what the lines of llama-server b11434 as a router say of its models."""

import pytest

from boot.model_output import MAX_PROCESSES, TAIL_LINES, ModelOutput

BEGUN = "0.00.183.275 I srv          load: spawning server instance with name={} on port {}"
ENDED = "0.00.197.971 I srv           run: instance name={} exited with status {}"
BAD = "[51777] 0.00.008.074 E llama_model_load: error loading model: llama_model_loader: failed to load model from /m"


class Failures(dict[str, str]):
    """The failures that were reported, and what reads the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.output = ModelOutput(self.__setitem__)

    def read(self, *lines: str) -> "Failures":
        for line in lines:
            self.output.read_line(line)
        return self


def test_a_load_that_fails_has_llama_servers_own_reason() -> None:
    lines = [BEGUN.format("my model", 51777), "[51777] gguf_init: invalid magic characters: 'nons'", BAD]
    failures = Failures().read(*lines, "[ 1234] failed to load model of another", "a line of the router")
    assert failures == {}
    failures.read(ENDED.format("my model", 1))
    (reason,) = failures.values()
    assert reason.startswith("ended with exit status 1; bad model: ")
    assert "invalid magic characters" in reason


def test_the_lines_of_a_process_before_do_not_count() -> None:
    failures = Failures().read(BEGUN.format("a", 51777), BAD, BEGUN.format("a", 51777), ENDED.format("a", 1))
    assert failures == {"a": "ended with exit status 1"}


@pytest.mark.parametrize(
    "line",
    [
        "0.04.105.210 I srv        unload: stopping model instance name=a",
        "0.00.1 I srv          tick: evicting idle LRU name=a for a queued request",
    ],
)
def test_an_end_that_was_asked_for_is_no_failure(line: str) -> None:
    failures = Failures().read(BEGUN.format("a", 1), line, ENDED.format("a", 1))
    assert failures == {}
    assert failures.read(BEGUN.format("a", 2), ENDED.format("a", 0)) == {}
    assert failures.read(BEGUN.format("a", 3), ENDED.format("a", 1)) == {"a": "ended with exit status 1"}


def test_an_end_that_is_expected_has_its_reason() -> None:
    failures = Failures()
    failures.output.expect_end("a", "was wedged")
    assert failures.read(BEGUN.format("a", 1), ENDED.format("a", 1)) == {"a": "was wedged"}
    assert failures.read(BEGUN.format("a", 1), ENDED.format("a", 1)) == {"a": "ended with exit status 1"}


def test_what_is_kept_is_bounded() -> None:
    failures = Failures().read(BEGUN.format("a", 1), "[    1] bind: address already in use")
    failures.read(*["[    1] more"] * TAIL_LINES, ENDED.format("a", 1))
    assert failures == {"a": "ended with exit status 1"}
    failures.read(BEGUN.format("b", 2), "[    2] bind: address already in use")
    failures.read(*(BEGUN.format("c", port) for port in range(3, MAX_PROCESSES + 3)), ENDED.format("b", 1))
    assert failures["b"] == "ended with exit status 1"
