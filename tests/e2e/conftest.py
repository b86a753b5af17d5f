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


@pytest.fixture
def url(gateway: Gateway) -> str:
    """The address that a client is given."""
    return gateway.url
