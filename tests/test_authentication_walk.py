"""The walk of docs/AUTHENTICATION.md, typed line by line into one shell, before a gateway on the mock backend."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.together import aside

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "AUTHENTICATION.md"
START_S = 20.0


def commands() -> list[tuple[str, str]]:
    """Every line of the page's shell blocks, and what it shall print."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s{2,}# ", "\0", line).partition("\0") for line in "".join(blocks).splitlines()]
    return [(command, expected) for command, _, expected in lines]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(script: str, *words: str, environment: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(url: str) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
            if answer.status == 200:
                return
        time.sleep(0.02)
    raise TimeoutError


@contextmanager
def shell(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of an operator's shell, with a gateway that reads the same keys file."""
    port, backend = free_port(), free_port()
    keys = tmp_path / "keys"
    keys.touch()
    environment = {
        **{name: os.environ[name] for name in os.environ if name.startswith("COVERAGE")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AUTH_KEYS_FILE": str(keys),
        "DATA_DIR": str(tmp_path),
        "KEYS_WATCH_SECONDS": "0.1",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "PORT_BACKEND": str(backend),
        "URL": f"http://127.0.0.1:{port}",
    }
    mock = running("mock_backend.py", "--host", "127.0.0.1", "--port", str(backend), environment=environment)
    with mock, running("gateway.py", environment=environment):
        wait_until_ready(environment["URL"])
        yield environment


@pytest.mark.skipif(not shutil.which("curl"), reason="the walk is made with curl")
@aside
def test_the_walk_goes_as_the_page_says(tmp_path: Path) -> None:
    walk = commands()
    assert len(walk) > 40
    mark = "\x1e"
    script = "".join(f"{command}\nprintf '{mark}'\n" for command, _ in walk)
    with shell(tmp_path) as environment:
        done = subprocess.run(
            ["bash", "-s"],
            input=script,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.stderr == ""
    printed = [text.rstrip("\n") for text in done.stdout.split(mark)[:-1]]
    assert list(zip([command for command, _ in walk], printed, strict=True)) == walk
