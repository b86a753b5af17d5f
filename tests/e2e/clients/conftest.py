"""Fixtures of the matrix: what is installed, the scripted backends' loop, and the cells, run a few at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cells import BY_NAME, Cell, Name, markdown, page, run_cell  # noqa: E402
from client_table import Tools, make_tools, versions  # noqa: E402
from scripted import LoopThread  # noqa: E402
from situations import Setup  # noqa: E402
from stack import LlamaServer  # noqa: E402

WORKERS = 4  # most cells wait most of their time
STAGGER_S = 3.0  # between the starts of those that wait beside the others
CANNOT = 3
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-gguf-inference"
PAGE = Path(os.environ["CLIENTS_PAGE"]) if os.environ.get("CLIENTS_PAGE") else None  # written by a run of all cells
TABLE = Path(os.environ.get("CLIENTS_TABLE") or CACHE / "clients-table.md")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tools, dict[str, str]]:
    """What is installed, and why what is missing is missing. In CI nothing may be missing."""
    done = subprocess.run([HERE / "get_clients.sh"], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (0, CANNOT)
    packages = None if done.returncode == CANNOT else Path(done.stdout.strip())
    tools, missing = make_tools(packages, tmp_path_factory.mktemp("js"))
    assert not (missing and os.environ.get("CI")), missing
    return tools, missing


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def cell(
    request: pytest.FixtureRequest,
    installed: tuple[Tools, dict[str, str]],
    loop: LoopThread,
    backend: LlamaServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Name], Cell]]:
    """Run all selected cells, and return what awaits one by its name; write the table in the end."""
    tools, missing = installed

    def job(name: Name, delay_s: float) -> Cell:
        client, situation = BY_NAME[name]
        time.sleep(delay_s)
        return run_cell(client, situation, Setup(backend, loop, folders[name], client.is_agent), tools)

    items = [item for item in request.session.items if hasattr(item, "callspec")]
    selected = [item.callspec.params["name"] for item in items if item.callspec.params.get("name") in BY_NAME]
    names = [name for name in selected if BY_NAME[name][0].program not in missing]
    folders = {name: tmp_path_factory.mktemp("-".join(name)) for name in names}
    slow = [name for name in names if BY_NAME[name][1].is_slow]
    with ExitStack() as stack:
        waiting = stack.enter_context(ThreadPoolExecutor(max(1, len(slow))))
        working = stack.enter_context(ThreadPoolExecutor(WORKERS))
        futures = {name: waiting.submit(job, name, order * STAGGER_S) for order, name in enumerate(slow)}
        futures |= {name: working.submit(job, name, 0) for name in names if name not in futures}
        try:
            yield lambda name: futures[name].result()
        finally:
            for future in futures.values():
                future.cancel()
    done = results({name: futures[name] for name in names})
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(markdown(done, versions()))
    if PAGE is not None and set(done) == set(BY_NAME):
        PAGE.write_text(page(done, versions()))


def results(futures: "dict[Name, Future[Cell]]") -> dict[Name, Cell]:
    done = {name: each for name, each in futures.items() if not each.cancelled() and each.exception() is None}
    return {name: each.result() for name, each in done.items()}
