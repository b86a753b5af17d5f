"""The shell commands of a page, typed line by line into one shell, with a gateway and the mock backend.

A block ```sh is typed. A comment after two spaces, `command   # output`, is what the command prints; a block that
follows a paragraph which begins with "It prints" is what the last command prints. `…` stands for any text. Blocks
```console are only shown: they need another machine, root, or an hour.
"""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.boot import FOR_COVERAGE, PATIENCE_S
from support.paths import ROOT, SCRIPTS
from support.together import ENVIRON

SEPARATOR = "\x1e"
BLOCK = re.compile(
    r"^```sh\n(?P<typed>.*?)^```\n(?:\n^It prints[^\n]*:\n\n^```\w*\n(?P<printed>.*?)^```$)?", re.M | re.S
)


class Step(NamedTuple):
    """A command, and what it prints; None if the page does not show it."""

    command: str
    printed: str | None


def steps(page: str) -> list[Step]:
    """Return the commands of a page. Of a block whose output is shown as a block, the last command has the output."""
    found = []
    for block in BLOCK.finditer(page):
        commands = re.sub(r"\\\n\s*", "", block["typed"]).splitlines()
        parts = [re.sub(r"\s{2,}# ", "\0", command).partition("\0") for command in commands if command]
        of_block = [Step(command, printed or None) for command, _, printed in parts]
        if block["printed"] is not None:
            of_block[-1] = Step(of_block[-1].command, block["printed"].rstrip("\n"))
        found += of_block
    return found


def matches(printed: str, expected: str) -> bool:
    """Return whether an output is what a page shows; `…` there stands for any text."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), printed, re.DOTALL) is not None


@contextmanager
def running(announcement: str, environ: Mapping[str, str], script: str, *options: str) -> Iterator[int]:
    """Run a script until the block ends. Yields the port, which the regular expression finds in its output."""
    command = [sys.executable, str(SCRIPTS / script), *options]
    process = subprocess.Popen(
        command,
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield next(int(found[1]) for line in process.stdout if (found := re.search(announcement, line)))
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


@contextmanager
def shell(folder: Path, keys: str = "") -> Iterator[dict[str, str]]:
    """Run a gateway in front of the mock. Yields the environment of a shell that uses the same keys file."""
    keys_file = folder / "keys"
    keys_file.write_text(keys)
    environ = {
        **FOR_COVERAGE,
        "PATH": f"{Path(sys.executable).parent}:{ENVIRON['PATH']}",
        "AUTH_KEYS_FILE": str(keys_file),
        "ACCESS_LOG": str(folder / "access.log"),
        "DATA_DIR": str(folder),
        "KEYS_WATCH_SECONDS": "0.1",
        "HOST": "127.0.0.1",
        "PORT": "0",
        "MOCK_PROMPT_MS": "0",
        "MOCK_TOKENS_PER_SECOND": "0",
    }
    with running(r"listening on http://\S+:(\d+)", environ, "mock_backend.py", "--port", "0") as backend:
        environ["PORT_BACKEND"] = str(backend)
        with running(r"listens on .* port (\d+)", environ, "gateway.py") as port:
            url = f"http://127.0.0.1:{port}"
            await_ready(url)
            yield {**environ, "URL": url}


def await_ready(url: str) -> None:
    """Wait until the gateway has found its backend ready. Asserts that it does."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE_S):
                return
        except urllib.error.HTTPError as error:
            error.close()
        assert time.monotonic() < give_up_s, "the gateway is not ready"
        time.sleep(0.05)


def type_into_shell(walk: list[Step], environ: Mapping[str, str]) -> list[str]:
    """Run the commands in one shell; return what each printed. Asserts that nothing went to stderr."""
    script = "".join(f"{step.command}\nprintf '{SEPARATOR}'\n" for step in walk)
    done = subprocess.run(
        ["bash", "-s"],
        input=script,
        cwd=ROOT,
        env=dict(environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.stderr == "", done.stderr
    return [text.strip("\n") for text in done.stdout.split(SEPARATOR)[:-1]]
