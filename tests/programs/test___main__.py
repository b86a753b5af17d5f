"""Every program under one name: `python3 scripts COMMAND`, and the same from one .pyz file."""

import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

from core.installation import COMMANDS
from support.boot import PATIENCE_S
from support.paths import ROOT, SCRIPTS
from support.together import ENVIRON, aside

VERSION = (ROOT / "VERSION").read_text().strip()
PROGRAMS = sorted(f"{name}.py" for name in COMMANDS.values())


def run(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(
        command, env={**ENVIRON, **environ}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("program", PROGRAMS)
@aside
def test_every_program_has_the_option_version(tmp_path: Path, program: str) -> None:
    done = run(SCRIPTS / program, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{program} (llama-gguf-inference) {VERSION}"


@aside
def test_start_sh_has_the_option_version(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPTS / "start.sh", "--version"], capture_output=True, text=True, env=ENVIRON, check=False)
    assert (done.returncode, done.stdout) == (0, f"start.sh (llama-gguf-inference) {VERSION}\n")


@aside
def test_help_names_every_command(tmp_path: Path) -> None:
    done = run(SCRIPTS, "--help")
    assert done.returncode == 0
    for name in (*COMMANDS, "check", "version"):
        assert f"\n    {name} " in done.stdout


@aside
def test_a_command_that_is_missing_or_unknown_is_an_error(tmp_path: Path) -> None:
    assert run(SCRIPTS).returncode == 2
    done = run(SCRIPTS, "serv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: unknown command: serv\n")


@aside
def test_the_debug_shell_belongs_to_start_sh(tmp_path: Path) -> None:
    done = run(SCRIPTS, "serve", DEBUG_SHELL="true")
    assert done.returncode == 2
    assert "DEBUG_SHELL" in done.stderr


@aside
def test_one_file_runs_every_program(tmp_path: Path) -> None:
    folder = shutil.copytree(SCRIPTS, tmp_path / "all", ignore=shutil.ignore_patterns("__pycache__", "*.sh"))
    shutil.copy(ROOT / "VERSION", folder)
    one_file = tmp_path / "x.pyz"
    zipapp.create_archive(folder, one_file)
    assert run(one_file, "version").stdout == f"{VERSION}\n"
    for name in COMMANDS:
        last = run(one_file, name, "--version").stdout.splitlines()[-1]
        assert last == f"x.pyz {name} (llama-gguf-inference) {VERSION}"
    keys_help = run(one_file, "keys", "--help").stdout
    assert "python3 x.pyz keys generate --name alice" in keys_help
    assert "key_mgmt.py" not in keys_help
    check = run(one_file, "check", DATA_DIR=str(tmp_path), HOST="127.0.0.1", MOCK_BACKEND="true")
    assert "DATA_DIR" in check.stdout
