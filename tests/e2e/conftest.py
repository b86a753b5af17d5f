"""Fixtures of the end-to-end tests: one llama-server and one gateway for all of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from stack import Gateway, LlamaServer, running  # noqa: E402
from tiny_gguf import write_model  # noqa: E402

SLOTS = 4
CANNOT = 3  # the exit status of a script whose tools are missing


@pytest.fixture(scope="session")
def llama_bin() -> str:
    found = os.environ.get("LLAMA_BIN")
    if found:
        return found
    done = subprocess.run([HERE / "get_llama_server.sh"], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path)
    return path


@pytest.fixture(scope="session")
def backend(llama_bin: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    yield from running(LlamaServer(tmp_path_factory.mktemp("backend"), llama_bin, model, SLOTS))


@pytest.fixture(scope="session")
def gateway(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from running(Gateway(tmp_path_factory.mktemp("gateway"), backend))


def obtained(request: pytest.FixtureRequest, script: str, what: str) -> list[str]:
    """Return the lines that a script of this folder prints. What it is for may be missing, except in CI."""
    done = subprocess.run([HERE / script], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == CANNOT and not os.environ.get("CI"):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n*** NOT TESTED IN A BROWSER: {what} ***")
        pytest.skip(what)
    assert done.returncode == 0
    return done.stdout.split()


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Chromium's path, and the folder that contains node_modules."""
    chromium, packages = obtained(request, "get_browser.sh", "npm or Chromium is not available")
    return chromium, Path(packages)


@pytest.fixture(scope="session")
def page_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of llama-server's page."""
    (folder,) = obtained(request, "get_page.sh", "npm is not available to build llama-server's page")
    return Path(folder)


@pytest.fixture
def url(gateway: Gateway) -> str:
    """The gateway's address."""
    return gateway.url
