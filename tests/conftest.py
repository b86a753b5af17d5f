"""Put the scripts, the test helpers and the tools of docs/ and tools/ on the import path."""

import gc
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

gc.disable()  # until the tests are collected
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS), str(TESTS.parent / "docs"), str(TESTS.parent / "tools")]

from support.together import errands, put_last  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_last(items)


def pytest_collection_finish() -> None:
    """What was collected lives as long as the session: the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


FOLDERS = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like pytest's own, without the link to the newest folder of each name: that takes longer than many a test."""
    path = tmp_path_factory.getbasetemp() / f"{request.node.name.partition('[')[0][:30]}-{next(FOLDERS)}"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(scope="session", autouse=True)
def _errands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with errands(request.session.items, tmp_path_factory):
        yield
