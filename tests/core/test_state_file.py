"""The state file: what the writer writes and when, what the reader makes of any content, and both together."""

import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from core.listener import UNREPORTED
from core.state_file import DEAD, DRAINING, LOADING, READY, STATES, StateEntry, StateReader, StateWriter

both_readers = pytest.mark.parametrize("when_removed", [None, DEAD])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def seconds() -> Iterator[datetime]:
    return (datetime(2026, 1, 2, 3, 4, second, 5000, timezone.utc) for second in range(60))


def writer(path: Path) -> StateWriter:
    """A writer whose clock is one second later at each look."""
    at = seconds()
    return StateWriter(path, lambda: next(at))


# The reader


@both_readers
def test_the_state_is_the_one_in_the_file(path: Path, when_removed: str | None) -> None:
    reader, write = StateReader(path, when_removed=when_removed), writer(path).write
    assert reader.read() == LOADING
    for state in (LOADING, READY, DRAINING, DEAD, READY):
        write(StateEntry(state, ""))
        assert reader.read() == state
        assert reader.read() == state


def test_the_listener_is_the_one_in_the_file_and_none_until_there_is_one(path: Path) -> None:
    reader, write = StateReader(path), writer(path).write
    for listener in (None, 7, None, UNREPORTED, 8):
        write(StateEntry(READY, "", 1, listener))
        reader.read()
        assert reader.listener == listener
    path.write_text('{"state": "ready"}')
    reader.read()
    assert reader.listener == UNREPORTED
    for odd in ('"7"', "true", "1.5", "[]"):
        path.write_text(f'{{"state": "ready", "backend_listener": {odd}}}')
        reader.read()
        assert reader.listener is None


def test_failures_of_models_are_those_in_the_file(path: Path) -> None:
    reader, write = StateReader(path), writer(path).write
    write(StateEntry(READY, "", 1, 2, (("chat", "ended"),)))
    reader.read()
    assert reader.model_failures == {"chat": "ended"}
    write(StateEntry(READY, "", 1, 2))
    assert "model_failures" not in path.read_text()
    reader.read()
    assert reader.model_failures == {}
    path.write_text('{"state": "ready", "model_failures": ["chat"]}')
    reader.read()
    assert reader.model_failures == {}


def test_the_states_are_these_four() -> None:
    assert sorted(STATES) == ["dead", "draining", "loading", "ready"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": 1}', '{"state": []}', '{"state": "fine"}', "\xff"])
@both_readers
def test_a_file_that_cannot_be_understood_changes_nothing(path: Path, when_removed: str | None, text: str) -> None:
    reader = StateReader(path, when_removed=when_removed)
    path.write_text(text, encoding="latin-1")
    assert reader.read() == LOADING
    writer(path).write(StateEntry(READY, ""))
    assert reader.read() == READY
    path.write_text(text, encoding="latin-1")
    assert reader.read() == READY


@both_readers
def test_a_file_that_cannot_be_read_changes_nothing(
    path: Path, when_removed: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reader = StateReader(path, when_removed=when_removed)
    writer(path).write(StateEntry(READY, ""))
    assert reader.read() == READY
    path.unlink()
    path.mkdir()
    assert reader.read() == READY
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "the state file cannot be read: IsADirectoryError" in caplog.text


@pytest.mark.parametrize(("when_removed", "state"), [(None, READY), (DEAD, DEAD)])
def test_a_file_that_was_removed_has_the_state_that_the_reader_was_given(
    path: Path, when_removed: str | None, state: str
) -> None:
    reader, moved = StateReader(path, when_removed=when_removed), path.with_name("moved")
    assert reader.read() == LOADING
    writer(path).write(StateEntry(READY, ""))
    assert reader.read() == READY
    path.rename(moved)
    assert reader.read() == state
    assert reader.read() == state
    moved.rename(path)
    assert reader.read() == READY


def test_a_removed_file_that_comes_back_unreadable_does_not_end_the_removal(path: Path) -> None:
    reader = StateReader(path, when_removed=DEAD)
    writer(path).write(StateEntry(READY, ""))
    assert reader.read() == READY
    path.unlink()
    assert reader.read() == DEAD
    path.write_text("{")
    assert reader.read() == DEAD


def test_a_reader_knows_whether_the_file_has_changed_since_it_was_read(path: Path) -> None:
    reader, write = StateReader(path), writer(path).write
    assert not reader.has_changed()
    for state in (LOADING, READY):
        write(StateEntry(state, ""))
        assert reader.has_changed()
        assert reader.read() == state
        assert not reader.has_changed()
    path.unlink()
    assert not reader.has_changed()
    assert not StateReader(None).has_changed()


def test_without_a_path_the_state_is_loading() -> None:
    assert StateReader(None, when_removed=DEAD).read() == LOADING


# The writer


def test_the_state_is_written_whole_and_only_when_it_changes(path: Path) -> None:
    state_file = writer(path)
    state_file.write(StateEntry(LOADING, "starting"))
    expected = {"state": "loading", "since": "2026-01-02T03:04:00.005Z", "detail": "starting"}
    expected |= {"backend_pid": None, "backend_listener": None}
    assert json.loads(path.read_text()) == expected
    with path.open() as old:
        state_file.write(StateEntry(LOADING, "starting"))
        assert os.path.samestat(os.fstat(old.fileno()), path.stat())
        state_file.write(StateEntry(LOADING, "starting", 7))
        assert not os.path.samestat(os.fstat(old.fileno()), path.stat())
        assert json.load(old) == expected
    assert json.loads(path.read_text()) == {**expected, "backend_pid": 7}
    state_file.write(StateEntry(READY, "serving", 7))
    assert json.loads(path.read_text())["since"] == "2026-01-02T03:04:01.005Z"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_a_file_that_is_missing_is_written_again(path: Path) -> None:
    state_file = writer(path)
    state_file.write(StateEntry(READY, "serving"))
    path.unlink()
    state_file.write(StateEntry(READY, "serving"))
    assert json.loads(path.read_text())["since"] == "2026-01-02T03:04:00.005Z"


def test_a_removed_file_stays_removed(path: Path) -> None:
    state_file = writer(path)
    state_file.write(StateEntry(LOADING, "starting"))
    state_file.remove()
    state_file.remove()
    state_file.write(StateEntry(READY, "serving"))
    assert not path.exists()


def test_a_write_that_failed_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    state_file = writer(folder / "state.json")
    for state in (LOADING, READY):
        with pytest.raises(FileNotFoundError):
            state_file.write(StateEntry(state, ""))
    folder.mkdir()
    state_file.write(StateEntry(READY, ""))
    assert StateReader(folder / "state.json").read() == READY
