"""Each program finds its modules also if Python leaves a script's folder out of the path (`-P`, PYTHONSAFEPATH)."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.boot import PATIENCE_S
from support.paths import SCRIPTS
from support.together import ENVIRON, aside

PROGRAMS = (
    "__main__",
    "benchmark",
    "gateway",
    "health_server",
    "key_mgmt",
    "mock_backend",
    "quickstart",
    "supervisor",
    "top",
)


def test_every_program_is_tested_here() -> None:
    mains = [path.stem for path in SCRIPTS.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
    assert sorted(mains) == list(PROGRAMS)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has neither")
def help_of(program: str, folder: Path, *options: str, **variables: str) -> str:
    """Return what a program's --help prints. Asserts that there is no error."""
    done = subprocess.run(
        [sys.executable, *options, str(SCRIPTS / f"{program}.py"), "--help"],
        env={**ENVIRON, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
@aside
def test_help_works_with_a_safe_path(tmp_path: Path, program: str) -> None:
    """Python 3.10 ignores the variable."""
    shown = "python3 scripts COMMAND" if program == "__main__" else f"{program}.py"
    assert shown in help_of(program, tmp_path, PYTHONSAFEPATH="1")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no such option")
@aside
def test_the_option_is_as_good_as_the_variable(tmp_path: Path) -> None:
    assert "supervisor.py" in help_of("supervisor", tmp_path, "-P")
