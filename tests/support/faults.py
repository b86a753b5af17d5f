"""Faults of a volume, for programs under test: calls that take long, fail, or report what is wrong.

A library for LD_PRELOAD (faults.c) delays or fails chosen calls for chosen paths. Faults can begin and end while the
programs run. Without a C compiler the tests that need the library are skipped.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep

import pytest

from support.boot import PATIENCE_S

SOURCE = Path(__file__).with_name("faults.c")
# open includes opendir; read; write includes pwrite and writev; stat includes lstat; the others are as they are called.
CALLS = (
    *("open", "read", "write", "stat", "fstat", "statvfs", "fsync", "flock", "fcntl", "rename", "link", "symlink"),
    *("unlink", "mkdir", "truncate"),
)


@dataclass(frozen=True)
class Fault:
    """What happens to a call for the paths that match a pattern (of fnmatch, where * matches / as well).

    A call for a descriptor matches by the path of its file (`pipe:[123]` for a pipe) or by `fd:NUMBER`. It waits
    `wait_s` (inf: until the fault is lifted), and then fails with `errno`, or is made if that is 0. `wrong`: stat
    and fstat report another inode each time, statvfs reports no space, not even in total.
    """

    call: str
    pattern: str = "*"
    wait_s: float = 0.0
    errno: int = 0
    wrong: bool = False

    def __post_init__(self) -> None:
        assert self.call in CALLS, self.call

    def __str__(self) -> str:
        wait_ms = -1 if self.wait_s == inf else round(self.wait_s * 1000)
        return f"{self.call} {wait_ms} {self.errno} {int(self.wrong)} {self.pattern}\n"


class NoCompiler(Exception):
    """There is no C compiler, or the library cannot be built with it on this system."""


@functools.lru_cache(maxsize=1)
def build() -> Path:
    """Build the library, once per process. Raises NoCompiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompiler("no C compiler (cc) to build tests/support/faults.c")
    library = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    if built.returncode:
        raise NoCompiler(f"tests/support/faults.c cannot be built here: {built.stderr[:200]}")
    return library


class Faults:
    """The faults that are in force for the programs that run with `env`, except those whose command has `spare` in it.

    `folder` holds its files.
    """

    def __init__(self, folder: Path, spare: str = "") -> None:
        self._rules = folder / "faults"
        self._log = folder / "faults.log"
        self.env = {"LD_PRELOAD": str(build()), "FAULTS": str(self._rules), "FAULTS_SPARE": spare}
        self.set()

    def set(self, *faults: Fault) -> None:
        """Put these faults in force in place of all others; the first that matches a call applies."""
        new = self._rules.with_name("faults.new")
        new.write_text("".join(map(str, faults)))
        new.replace(self._rules)

    @contextmanager
    def during(self, *faults: Fault) -> Iterator[None]:
        """Put these faults in force within the block."""
        self.set(*faults)
        try:
            yield
        finally:
            self.set()

    def stalled(self, call: str = "", part: str = "", pid: int = 0) -> int:
        """Count the calls that wait now: of this name, for paths that contain `part`, in this process."""
        count = 0
        for line in self._log.read_text(errors="replace").splitlines() if self._log.exists() else []:
            sign, caller, name, path = f"{line} ".split(" ", 3)
            if name.startswith(call) and part in path and pid in (0, int(caller)):
                count += 1 if sign == "+" else -1
        return count

    def await_stalled(self, call: str = "", part: str = "", pid: int = 0) -> None:
        """Wait until such a call waits."""
        end_s = monotonic() + PATIENCE_S
        while not self.stalled(call, part, pid):
            assert monotonic() < end_s, f"no {call} of {part!r} waits, but:\n{self._log.read_text()}"
            sleep(0.005)


def make_faults(folder: Path, spare: str = "") -> Faults:
    """Make faults for a test, which is skipped if the library cannot be built."""
    try:
        return Faults(folder, spare)
    except NoCompiler as reason:
        pytest.skip(str(reason))


def seen_by_program(faults: Faults, cases: Mapping[str, Sequence[Fault]], *command: str) -> dict[str, list[str]]:
    """Run a program through cases; return the lines that it prints in each.

    In each case its faults are in force; the program gets the case's name, a line, and ends what it prints with `end`.
    """
    seen = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(faults)
    ) as program:
        assert program.stdin
        assert program.stdout
        for name, lacking in cases.items():
            faults.set(*lacking)
            print(name, file=program.stdin, flush=True)
            seen[name] = [line.strip() for line in iter(program.stdout.readline, "end\n")]
        program.stdin.close()
    return seen


def environment(faults: Faults) -> dict[str, str]:
    """The environment of this process, with the faults."""
    return {**os.environ, **faults.env}
