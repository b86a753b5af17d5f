"""A program that runs once for each of several environments, in one process that forks: Python takes time to start."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from support.boot import FOR_COVERAGE, PATIENCE_S
from support.paths import SCRIPTS
from support.together import ENVIRON

FORKING = """
import json, os, sys, tempfile
sys.path.insert(0, sys.argv[1])
exec(sys.argv[2])
for line in sys.stdin:
    folder, environ, arguments = json.loads(line)
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environ)
            exec(sys.argv[3])
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        print(json.dumps([status, output.read().decode(errors="replace")]), flush=True)
"""


class Case(NamedTuple):
    """Where and with what the program runs: its current folder, all of its environment, its arguments."""

    folder: Path
    environ: Mapping[str, str]
    arguments: Sequence[str] = ()


class Outcome(NamedTuple):
    """How it ended: the exit status, and what it printed, to whichever stream."""

    status: int
    lines: list[str]


def run_in_turn(imports: str, code: str, cases: Sequence[Case]) -> list[Outcome]:
    """Run the code for each case, with the list `arguments`; the imports run before, once."""
    lines = [json.dumps([str(case.folder), {**FOR_COVERAGE, **case.environ}, list(case.arguments)]) for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(SCRIPTS), imports, code],
        input="\n".join(lines),
        env={**FOR_COVERAGE, "PATH": ENVIRON["PATH"]},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ended) == len(cases)
    return [Outcome(status, text.splitlines()) for status, text in ended]
