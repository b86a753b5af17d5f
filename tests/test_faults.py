"""support.faults: a program meets the faults of its volume, and they begin and end while it runs."""

import errno
import subprocess
import sys
import textwrap
from math import inf
from pathlib import Path

import pytest

from support.faults import Fault, Faults, environment, make_faults

PROGRAM = """
import errno, fcntl, os, sys

def attempt(name, call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return f"{name} {errno.errorcode[error.errno]}"
    return f"{name} done"

path, other = sys.argv[1:]
for _ in sys.stdin:
    fd = os.open(path, os.O_RDWR)
    seen = [
        attempt("write", os.write, fd, b"x"),
        attempt("fsync", os.fsync, fd),
        attempt("flock", fcntl.flock, fd, fcntl.LOCK_EX),
        attempt("stat", os.stat, path),
        attempt("open", open, path, "a"),
        attempt("rename", os.replace, path, other),
        attempt("rename", os.replace, other, path),
        attempt("unlink", os.unlink, other + ".none"),
        "space %s" % (os.statvfs(path).f_blocks > 0),
        "inode %s" % (os.fstat(fd).st_ino == os.stat(path).st_ino),
    ]
    os.close(fd)
    print(*seen, sep=", ", flush=True)
"""


class Program:
    """The program above, which tries all calls once for each line of its input."""

    def __init__(self, faults: Faults, folder: Path) -> None:
        (folder / "file").write_text("")
        argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder / "file"), str(folder / "other")]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(faults)
        )

    def begin(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> list[str]:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n").split(", ")

    def attempt(self) -> list[str]:
        self.begin()
        return self.result()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


WHOLE = [*["write done", "fsync done", "flock done", "stat done", "open done", "rename done", "rename done"]]
WHOLE += ["unlink ENOENT", "space True", "inode True"]


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return make_faults(tmp_path)


def test_calls_fail_while_a_fault_is_in_force(faults: Faults, tmp_path: Path) -> None:
    with Program(faults, tmp_path) as program:
        assert program.attempt() == WHOLE
        with faults.during(
            Fault("write", "*/file", errno=errno.ENOSPC),
            Fault("fsync", errno=errno.EINVAL),
            Fault("flock", errno=errno.ENOLCK),
            Fault("stat", "*/other", errno=errno.EIO),
            Fault("rename", "*/other", errno=errno.EXDEV),
            Fault("unlink", errno=errno.EROFS),
        ):
            assert program.attempt() == [
                *["write ENOSPC", "fsync EINVAL", "flock ENOLCK", "stat done", "open done"],
                *["rename EXDEV", "rename ENOENT", "unlink EROFS", "space True", "inode True"],
            ]
        assert program.attempt() == WHOLE


def test_a_volume_may_report_what_is_wrong(faults: Faults, tmp_path: Path) -> None:
    with Program(faults, tmp_path) as program, faults.during(Fault("fstat", wrong=True), Fault("statvfs", wrong=True)):
        assert program.attempt()[-2:] == ["space False", "inode False"]


def test_a_call_waits_until_its_fault_is_lifted(faults: Faults, tmp_path: Path) -> None:
    with Program(faults, tmp_path) as program:
        with faults.during(Fault("write", "*/file", wait_s=inf)):
            program.begin()
            faults.await_stalled("write", "/file", program.process.pid)
            assert faults.stalled() == 1
            assert faults.stalled("stat") == 0
        assert program.result() == WHOLE
        assert faults.stalled() == 0


def test_a_call_that_has_waited_may_fail(faults: Faults, tmp_path: Path) -> None:
    with Program(faults, tmp_path) as program, faults.during(Fault("flock", wait_s=0.01, errno=errno.ENOSYS)):
        assert "flock ENOSYS" in program.attempt()
