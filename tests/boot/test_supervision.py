"""What is there before anything runs: all of it, or a reason to end, and then nothing is left of what was begun."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from boot.run_dir import PREFIX
from boot.shutdown import EXIT_NO_MODEL, EXIT_SERVICE, StartupError
from boot.supervision import prepare
from support.ports import free_ports


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Settings that suffice for a start. What they make of the log is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    ports = dict(zip(("PORT", "PORT_HEALTH", "PORT_BACKEND"), map(str, free_ports(3)), strict=True))
    yield {"HOST": "127.0.0.1", "DATA_DIR": str(tmp_path), "MOCK_BACKEND": "true", **ports}
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def held_run_dirs() -> list[str]:
    """The locks of run directories that this process holds."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it may be gone
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(link for link in links if PREFIX in link)


def test_everything_is_there_until_it_is_closed(settings: dict[str, str]) -> None:
    before = held_run_dirs()
    prepared = prepare({**settings, "PORT": "0"})
    assert prepared.ports["PORT"] != "0"
    assert prepared.ports["PORT_BACKEND"] == str(prepared.config.backend.port) == settings["PORT_BACKEND"]
    assert prepared.run_dir.key_file.read_text().startswith("gateway-")
    assert held_run_dirs() == sorted([*before, f"{prepared.run_dir.path}/lock"])
    prepared.close()
    assert not prepared.run_dir.path.exists()
    assert held_run_dirs() == before


def test_a_port_in_use_ends_the_start_and_leaves_nothing(settings: dict[str, str]) -> None:
    before = held_run_dirs()
    with (
        socket.create_server(("127.0.0.1", int(settings["PORT"]))),
        pytest.raises(StartupError, match=r"PORT: cannot listen on 127\.0\.0\.1 port ") as caught,
    ):
        prepare(settings)
    assert caught.value.status == EXIT_SERVICE
    assert held_run_dirs() == before


def test_no_model_is_found_out_before_anything_is_made(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no model is set") as caught:
        prepare({**settings, "MOCK_BACKEND": "false"})
    assert caught.value.status == EXIT_NO_MODEL
    assert list(tmp_path.iterdir()) == []
