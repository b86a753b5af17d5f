"""The build of llama-server, by `llama-server --version`, and whether it is at least the one that is tested."""

import logging
import os
import re
from collections.abc import Mapping

from boot.processes import Children

# The gateway follows llama-server's routes, errors and timing of this build. The Dockerfile and the tests use it.
TESTED_BUILD = 11434
TIMEOUT_S = 15.0  # some programs look for GPUs first
MAX_OUTPUT_BYTES = 1 << 16  # what the pipe holds: nothing reads while the program runs
# b11434 prints `version: 0.6.0 (build 11434, commit 5d1f1d2)`, older ones `version: 6000 (5d1f1d2)`.
_BUILD = re.compile(r"^version:[^\n]*\(build ([0-9]{1,9})\b|^version: ([0-9]{1,9}) \(", re.MULTILINE)

log = logging.getLogger(__name__)


def parse_build(output: str) -> int | None:
    """Return the build number that `llama-server --version` reports; None if there is none."""
    match = _BUILD.search(output)
    return int(match[1] or match[2]) or None if match else None


async def check_version(children: Children, binary: str, env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
    """Log which build of llama-server this is, as a warning if it is older than the tested one or not known."""
    build = parse_build(await _version_output(children, binary, env, timeout_s))
    if build is None:
        log.warning("the version of llama-server cannot be read (%s --version): b%d is tested", binary, TESTED_BUILD)
    elif build < TESTED_BUILD:
        log.warning("llama-server is b%d, which is older than the tested b%d: update it", build, TESTED_BUILD)
    else:
        log.info("llama-server is b%d", build)


async def _version_output(children: Children, binary: str, env: Mapping[str, str], timeout_s: float) -> str:
    """Return what the program prints; nothing if it cannot be executed or does not end in time."""
    read_fd, write_fd = os.pipe()
    try:
        os.set_blocking(read_fd, False)
        child = children.spawn("llama-server --version", [binary, "--version"], env, output=write_fd)
        if not await child.exits_within(timeout_s):
            child.kill()
            return ""
        return os.read(read_fd, MAX_OUTPUT_BYTES).decode("utf-8", "replace")
    except OSError:  # not executable, or it has printed nothing
        return ""
    finally:
        os.close(read_fd)
        os.close(write_fd)
