"""Each artefact of a release in a bare Debian or Ubuntu: the commands of docs/DEPLOYMENT.md, and a chat as a stream.

Needs root, and the base that deploy/image-test.sh has made. The tree has no Python until apt-get installs one.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from support.boot import PATIENCE_S
from support.paths import ROOT
from support.ports import free_ports

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-gguf-inference"
BASES = sorted(CACHE.glob("image-base-*.tar"))
if os.geteuid() != 0 or not BASES:
    pytest.skip("needs root, and the base that deploy/image-test.sh makes", allow_module_level=True)

VERSION = (ROOT / "VERSION").read_text().strip()
PAGE = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
ENTER = """
set -e
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
tree=$1
shift
exec chroot "$tree" setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs sh -c 'cd /srv && exec "$@"' sh "$@"
"""


def commands(name: str) -> list[str]:
    """The lines of the block in the page that names the artefact, at most three."""
    blocks = re.findall(r"(?m)(?:^    \S.*\n)+", PAGE)
    (block,) = [block for block in blocks if name in block]
    lines = [line.strip().replace("VERSION", VERSION) for line in block.splitlines()]
    assert len(lines) <= 3
    return lines


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bare tree with Python and curl from its distribution, and the artefacts in /srv."""
    root = tmp_path_factory.mktemp("bare")
    subprocess.run(["tar", "-xf", BASES[-1], "-C", root], check=True)
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    install = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends"
    subprocess.run(["chroot", root, "sh", "-c", f"{install} python3 curl >/tmp/apt.log 2>&1"], check=True)
    subprocess.run([sys.executable, ROOT / "tools" / "dist.py", "--out", root / "srv"], check=True)
    os.chown(root / "srv", 1000, 1000)
    yield root
    shutil.rmtree(root)


def inside(tree: Path, *argv: str) -> list[str]:
    """The command line that runs a command in the tree, in /srv, as a user without rights."""
    unshare = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return [*unshare, "sh", "-c", ENTER, "sh", str(tree), *argv]


@contextmanager
def served(tree: Path, lines: list[str]) -> Iterator[list[str]]:
    """Type the commands of a page in the tree; the last one serves. Yield its output up to the curl command."""
    ports = dict(zip(("PORT", "PORT_HEALTH", "PORT_BACKEND"), map(str, free_ports(3)), strict=True))
    environ = ["env", "-i", "PATH=/usr/bin:/bin", *(f"{name}={port}" for name, port in ports.items())]
    argv = inside(tree, "timeout", str(PATIENCE_S), *environ, "sh", "-c", " && ".join(lines))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output: list[str] = []
            while not (output and output[-1].startswith("  curl ")):
                assert process.stdout
                line = process.stdout.readline()
                assert line, "".join(output)
                output.append(line)
            yield output
        finally:
            # All processes of a PID namespace end with its first one. unshare could not end that, because setpriv has
            # changed its user.
            for first in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(first), signal.SIGKILL)


@pytest.mark.parametrize("name", ["llama-gguf-inference-VERSION.tar.gz", "llama-gguf-inference-VERSION.pyz"])
def test_a_chat_streams_after_three_commands_at_most(tree: Path, name: str) -> None:
    run = partial(subprocess.run, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    run(inside(tree, "sha256sum", "--quiet", "-c", "SHA256SUMS"))
    with served(tree, commands(name)) as output:
        curl = output[-1].strip()
        assert '"content":"' in run(inside(tree, "sh", "-c", curl)).stdout
        streamed = run(inside(tree, "sh", "-c", curl.replace('"messages"', '"stream": true, "messages"'))).stdout
    assert streamed.count("data: {") > 2
    assert streamed.rstrip().endswith("data: [DONE]")
    assert "Traceback" not in "".join(output)
