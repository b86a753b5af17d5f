"""Boots mostly wait, so a few of them run at a time; each test awaits its own and fails by its own assertions."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

T = TypeVar("T")
WORKERS = 8
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
