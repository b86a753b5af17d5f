"""tenants.py: when keys are warned that they share a cache."""

import pytest

from config.loader import load_config
from config.tenants import shared_cache_warning


@pytest.mark.parametrize(
    ("settings", "names", "remedy"),
    [
        ({}, {"alice", "bob"}, "; set PROMPT_CACHE=private if"),
        ({"MODELS": "router"}, {"alice", "bob"}, "; start one llama-server for each of them if"),
        ({}, {"alice"}, None),
        ({}, set(), None),
        ({"PROMPT_CACHE": "shared"}, {"alice", "bob"}, None),
        ({"PROMPT_CACHE": "private"}, {"alice", "bob"}, None),
        ({"AUTH_ENABLED": "false"}, {"alice", "bob"}, None),
    ],
)
def test_a_warning_names_what_helps(settings: dict[str, str], names: set[str], remedy: str | None) -> None:
    warning = shared_cache_warning(load_config({"DATA_DIR": "/d", **settings}), names)
    assert (warning is None) == (remedy is None)
    assert (remedy or "") in (warning or "")
