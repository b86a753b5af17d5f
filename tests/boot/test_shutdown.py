"""The exceptions that end the supervisor: each carries an exit status and the reason."""

import signal

import pytest

from boot import shutdown
from boot.shutdown import (
    EXIT_BACKEND,
    EXIT_MODEL_UNAVAILABLE,
    EXIT_NO_MODEL,
    EXIT_SERVICE,
    EXIT_SETTINGS,
    REMEDIES,
    Shutdown,
    StartupError,
    describe_remedy,
)
from support.paths import ROOT


def test_the_exit_statuses_are_the_documented_ones() -> None:
    names = ("STOPPED", "SETTINGS", "NO_MODEL", "BACKEND", "SERVICE", "MODEL_UNAVAILABLE")
    assert [getattr(shutdown, f"EXIT_{name}") for name in names] == [0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("error: invalid argument: --no", 2), ("error loading model: unknown model architecture: 'x'", 3),
        ("gguf_init_from_file: invalid magic characters: '<htm'", 3), ("CUDA error: out of memory", 4), ("", 4),
        ("E error loading model: tensor 'blk.0' data is not within the file bounds, model is …", 3),
        ("E get_repo_commit: error: HTTPS is not supported. Please rebuild with one of:", 2),
        ("W get_repo_files: failed to resolve commit for user/repository", 6),
    ],
)  # fmt: skip
def test_a_crash_that_another_start_cannot_help_has_the_status_of_its_cause(line: str, status: int) -> None:
    assert shutdown.status_after(["loading", line, "exiting"]) == status


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("error: invalid argument: --no", "EXTRA_ARGS: llama-server does not know the argument --no"),
        ("error: invalid argument: --slots", "llama-server does not know --slots: it is too old"),
        ('error while handling argument "--no": no such file', ""),
    ],
)
def test_an_unknown_argument_is_hopeless_and_its_setting_is_named(line: str, error: str) -> None:
    found = shutdown.hopeless_argument(["loading", line, "exiting"], ("--no", "1"))
    assert found.startswith(error)
    assert bool(found) == bool(error)


@pytest.mark.parametrize("kind", [Shutdown, StartupError])
def test_a_shutdown_has_a_status_and_a_message(kind: type[Shutdown]) -> None:
    with pytest.raises(Shutdown, match=r"^PORT: in use$") as caught:
        raise kind(EXIT_SERVICE, "PORT: in use")
    assert caught.value.status == 5
    assert str(kind(EXIT_NO_MODEL)) == ""


def test_each_failure_has_a_remedy_in_the_log_and_in_the_docs() -> None:
    page = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    assert set(REMEDIES) == {EXIT_SETTINGS, EXIT_NO_MODEL, EXIT_BACKEND, EXIT_SERVICE, EXIT_MODEL_UNAVAILABLE}
    for status, remedy in REMEDIES.items():
        assert describe_remedy(status) == f"exit status {status}: {remedy}"
        row = next(line for line in page.splitlines() if line.startswith(f"| {status} |"))
        assert row.count("|") == 4, "docs/DEPLOYMENT.md: each exit status has a reason and a remedy"
    assert describe_remedy(1).startswith("exit status 1: this is a bug")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_a_program_that_has_begun_nothing(number: int) -> None:
    before = [(each, signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        shutdown.exit_on_stop_signals()
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(number)
        for each, _ in before:  # a second one does not break into the end
            signal.raise_signal(each)
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    assert caught.value.code == shutdown.EXIT_STOPPED
