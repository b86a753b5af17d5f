"""tenants.py: when keys are warned that they share a cache."""

from pathlib import Path

import pytest

from config.loader import load_config
from config.tenants import configured_key_ids, shared_cache_warning


@pytest.mark.parametrize(
    ("settings", "names", "warned"),
    [
        ({}, {"alice", "bob"}, True),
        ({}, {"alice"}, False),
        ({}, set(), False),
        ({"PROMPT_CACHE": "private"}, {"alice", "bob"}, False),
        ({"AUTH_ENABLED": "false"}, {"alice", "bob"}, False),
    ],
)
def test_a_warning_names_the_setting(settings: dict[str, str], names: set[str], warned: bool) -> None:
    warning = shared_cache_warning(load_config({"DATA_DIR": "/d", **settings}), names)
    assert (warning is not None and "PROMPT_CACHE=private" in warning) == warned


def test_names_come_from_the_file_and_from_api_keys(tmp_path: Path) -> None:
    environ = {"DATA_DIR": str(tmp_path), "API_KEYS": "bob:sk-bob-0123456789abcdef"}
    assert configured_key_ids(load_config(environ)) == {"bob"}
    (tmp_path / "api_keys.txt").write_text("alice:sk-alice-0123456789abcdef\n")
    assert configured_key_ids(load_config(environ)) == {"alice", "bob"}
