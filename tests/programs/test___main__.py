"""Every program under one name: `python3 scripts COMMAND`, and the same from one .pyz file."""

import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

from core.installation import COMMANDS
from support.boot import PATIENCE_S
from support.paths import ROOT, SCRIPTS
from support.ports import free_port
from support.together import ENVIRON, aside

VERSION = (ROOT / "VERSION").read_text().strip()
PROGRAMS = sorted(f"{name}.py" for name in COMMANDS.values())


def run(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(
        command, env={**ENVIRON, **environ}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


# In one process, since Python and the modules take time to start. test_safe_path.py starts each by itself.
IN_TURN = """
import runpy, sys
for line in sys.stdin:
    sys.argv = line.rstrip("\\n").split("\\t")
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    print(f"\\0{status}", end="\\0")
"""


def run_in_turn(commands: list[list[str]], **environ: str) -> list[str]:
    """Run programs with their arguments; return what each printed. Asserts that each ends with 0."""
    lines = "\n".join(map("\t".join, commands))
    env = {**ENVIRON, **environ}
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        input=lines,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    parts = done.stdout.split("\0")
    assert (done.returncode, done.stderr, {*parts[1::2]}) == (0, "", {"0"})
    return parts[:-1:2]


@aside
def test_every_program_has_the_option_version(tmp_path: Path) -> None:
    all_printed = run_in_turn([[str(SCRIPTS / program), "--version"] for program in PROGRAMS])
    for program, printed in zip(PROGRAMS, all_printed, strict=True):
        assert printed.splitlines()[-1] == f"{program} (llama-gguf-inference) {VERSION}"


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
    commands = [*([name, "--version"] for name in COMMANDS), ["keys", "--help"], ["check"]]
    ports = {"PORT": "0", "PORT_HEALTH": "0", "PORT_BACKEND": str(free_port())}
    settings = {"DATA_DIR": str(tmp_path), "HOST": "127.0.0.1", "MOCK_BACKEND": "true", **ports}
    *versions, keys_help, check = run_in_turn([[str(one_file), *each] for each in commands], **settings)
    for name, printed in zip(COMMANDS, versions, strict=True):
        assert printed.splitlines()[-1] == f"x.pyz {name} (llama-gguf-inference) {VERSION}"
    assert "python3 x.pyz keys generate --name alice" in keys_help
    assert "key_mgmt.py" not in keys_help
    assert "DATA_DIR" in check
