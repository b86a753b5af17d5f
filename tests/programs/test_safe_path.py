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
@pytest.mark.parametrize(("option", "variable"), [(["-P"], {}), ([], {"PYTHONSAFEPATH": "1"})], ids=["-P", "variable"])
@pytest.mark.parametrize("program", PROGRAMS)
@aside
def test_help_works_with_a_safe_path(tmp_path: Path, program: str, option: list[str], variable: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *option, str(SCRIPTS / f"{program}.py"), "--help"],
        env={**ENVIRON, **variable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("python3 scripts COMMAND" if program == "__main__" else f"{program}.py") in done.stdout
