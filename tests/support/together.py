"""Tests that mostly wait for processes run in the background of the others, a few at a time: `aside`."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

# For processes that are started from other threads. pytest changes the environment of this process at each test, and a
# child that inherits it at that moment fails (EFAULT).
ENVIRON = dict(os.environ)
WORKERS = 8  # they sleep most of the time
PATIENCE_S = 1800.0  # for all errands
ERRANDS: dict[str, "Future[None]"] = {}


def aside(errand: Callable[..., None]) -> Callable[..., None]:
    """Run a test at the same time as the others, from the start of the session. Its only fixture may be `tmp_path`.

    The test itself comes after those in the foreground, waits for the end of its errand, and fails as that did.
    """

    @functools.wraps(errand)
    def test(request: pytest.FixtureRequest, **names: Any) -> None:
        ERRANDS[request.node.nodeid].result(PATIENCE_S)

    own = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = [each for each in inspect.signature(errand).parameters.values() if each.name != "tmp_path"]
    test.__signature__ = inspect.Signature([own, *others])  # type: ignore[attr-defined]
    test.errand = errand  # type: ignore[attr-defined]
    return test


def errand_of(item: pytest.Item) -> Callable[..., None] | None:
    return getattr(getattr(item, "function", None), "errand", None)


def put_last(items: list[pytest.Item]) -> None:
    """Put the tests that run aside behind all others."""
    items.sort(key=lambda item: errand_of(item) is not None)


@contextmanager
def errands(items: list[pytest.Item], folders: pytest.TempPathFactory) -> Iterator[None]:
    """Run all tests that are marked with `aside`."""
    pool = ThreadPoolExecutor(WORKERS)
    for item in items:
        errand = errand_of(item)
        if errand is not None:
            names = dict(item.callspec.params) if hasattr(item, "callspec") else {}
            if "tmp_path" in inspect.signature(errand).parameters:
                names["tmp_path"] = folders.mktemp("aside")
            ERRANDS[item.nodeid] = pool.submit(errand, **names)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)  # those that have begun end by themselves
