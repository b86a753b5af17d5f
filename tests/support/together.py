"""What mostly waits for processes runs beside the other tests, a few at a time; each test awaits its own and fails by
its own assertions.

`in_background` orders the session so that one test of each kind begins the boots, and what became of them is looked at
once all other tests are done. `aside` is for single tests.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
# For processes that are started aside. pytest changes this process's own environment at each test, and a child that
# takes that over in this moment finds it gone (EFAULT).
ENVIRON = dict(os.environ)
WORKERS = 2
FIXTURES = ("failures", "successes", "outcome")  # that run their jobs together
PATIENCE_S = 300.0


@contextmanager
def together(request: pytest.FixtureRequest, jobs: Mapping[str, Callable[[], T]]) -> Iterator[Callable[[str], T]]:
    """Run the jobs whose tests were selected; yields what awaits one by name. Tests have the name as a parameter."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {params["name"] for params in parameters if params.get("name") in jobs}
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items() if name in selected}
        try:
            yield lambda name: futures[name].result(PATIENCE_S)
        finally:
            for future in futures.values():
                future.cancel()


def in_background(items: list[pytest.Item]) -> None:
    """Sort a session's tests."""
    first: list[pytest.Item] = []
    last: list[pytest.Item] = []
    for name in FIXTURES:
        group = [item for item in items if name in getattr(item, "fixturenames", ())]
        first += group[:1]
        last += group[1:]
    last += [item for item in items if hasattr(getattr(item, "function", None), "errand")]
    sorted_out = {*first, *last}
    items[:] = [*first, *(item for item in items if item not in sorted_out), *last]


ERRANDS: dict[str, "Future[None]"] = {}


def aside(errand: Callable[..., None]) -> Callable[..., None]:
    """Let a test that needs no fixture but `tmp_path` run beside the others, from the session's beginning on."""

    @functools.wraps(errand)
    def test(request: pytest.FixtureRequest, **names: Any) -> None:
        ERRANDS[request.node.nodeid].result(PATIENCE_S)

    own = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = [each for each in inspect.signature(errand).parameters.values() if each.name != "tmp_path"]
    test.__signature__ = inspect.Signature([own, *others])  # type: ignore[attr-defined]
    test.errand = errand  # type: ignore[attr-defined]
    return test


@contextmanager
def errands(items: list[pytest.Item], folders: pytest.TempPathFactory) -> Iterator[None]:
    """Begin all tests that run aside."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for item in items:
            errand = getattr(getattr(item, "function", None), "errand", None)
            if errand is not None:
                names = dict(item.callspec.params) if hasattr(item, "callspec") else {}
                if "tmp_path" in inspect.signature(errand).parameters:
                    names["tmp_path"] = folders.mktemp("aside")
                ERRANDS[item.nodeid] = pool.submit(errand, **names)
        try:
            yield
        finally:
            for future in ERRANDS.values():
                future.cancel()
