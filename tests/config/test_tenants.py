"""tenants.py: when keys are warned that they share a cache."""

from pathlib import Path

import pytest

from config.loader import load_config
from config.tenants import configured_key_ids, shared_cache_warning


@pytest.mark.parametrize(
    ("settings", "names", "remedy"),
    [
        ({}, {"alice", "bob"}, "; set PROMPT_CACHE=private if"),
        ({"MODELS": "router"}, {"alice", "bob"}, "; start one llama-server for each of them if"),
        ({}, {"alice"}, None),
        ({}, set(), None),
        ({"PROMPT_CACHE": "private"}, {"alice", "bob"}, None),
        ({"AUTH_ENABLED": "false"}, {"alice", "bob"}, None),
    ],
)
def test_a_warning_names_what_helps(settings: dict[str, str], names: set[str], remedy: str | None) -> None:
    warning = shared_cache_warning(load_config({"DATA_DIR": "/d", **settings}), names)
    assert (warning is None) == (remedy is None)
    assert (remedy or "") in (warning or "")


def test_names_come_from_the_file_and_from_api_keys(tmp_path: Path) -> None:
    environ = {"DATA_DIR": str(tmp_path), "API_KEYS": "bob:sk-bob-0123456789abcdef"}
    assert configured_key_ids(load_config(environ)) == {"bob"}
    (tmp_path / "api_keys.txt").write_text("alice:sk-alice-0123456789abcdef\n")
    assert configured_key_ids(load_config(environ)) == {"alice", "bob"}
