"""Put the scripts and the test helpers on the import path, as an operator's `python3 scripts/x.py` would."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS)]

from support.together import errands, in_background  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    in_background(items)


@pytest.fixture(scope="session", autouse=True)
def _errands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with errands(request.session.items, tmp_path_factory):
        yield
