"""The recipes of docs/CLIENTS.md, run as they are printed, except for the address and the key."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from client_table import Run, Tools, environment
from stack import TEAM_KEY, Gateway

from support.paths import ROOT

PAGE = (ROOT / "docs" / "CLIENTS.md").read_text(encoding="utf-8")
MARK = "Run by `make e2e-clients`"
RECIPES = {
    section.partition("\n")[0]: section
    for section in PAGE.split("\n## ")[1:]
    if section.partition("\n")[2].strip().startswith(MARK)
}
PROGRAMS = {"Codex CLI": "codex", "Claude Code": "claude", "opencode": "opencode"}
TOO_LONG = "exceeds the available context size"
RECIPE_S = 120.0


def block(section: str, language: str) -> str | None:
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def run_recipe(section: str, program: str | None, tools: Tools, run: Run) -> "subprocess.CompletedProcess[str]":
    """Write the recipe's files, and run its program or its last shown command."""
    environ = environment(run, GATEWAY_URL=run.url, GATEWAY_KEY=run.key, LITELLM_LOCAL_MODEL_COST_MAP="True")
    if (code := block(section, "python")) is not None:
        command = [*tools.programs["python"], "-c", code]
    elif (code := block(section, "js")) is not None:
        script = tools.scripts / "recipe.mjs"
        script.write_text(code)
        command = [*tools.programs["node"], str(script)]
    else:
        assert program is not None
        environ |= {"CODEX_HOME": str(run.folder), "CLAUDE_CONFIG_DIR": str(run.folder)}
        command = agent_command(section, program, tools, run, environ)
    return subprocess.run(
        command,
        env=environ,
        cwd=run.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=RECIPE_S,
    )


def agent_command(section: str, program: str, tools: Tools, run: Run, environ: dict[str, str]) -> list[str]:
    for language, name in (("toml", "config.toml"), ("json", "opencode.json")):
        if (config := block(section, language)) is not None:
            (run.folder / name).write_text(config.replace("http://127.0.0.1:8000", run.url))
    shown = [line.removeprefix("$ ") for line in (block(section, "console") or "").splitlines()]
    for line in shown[:-1]:
        pairs = [pair.partition("=") for pair in line.removeprefix("export ").split()]
        environ |= {name: environ[value.removeprefix("$")] for name, _, value in pairs}
    extra = ["--skip-git-repo-check"] if program == "codex" else []
    return [*tools.programs[program], *shlex.split(shown[-1])[1:], *extra]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_printed(
    name: str, installed: tuple[Tools, dict[str, str]], gateway: Gateway, tmp_path: Path
) -> None:
    tools, missing = installed
    section, program = RECIPES[name], PROGRAMS.get(name)
    needed = program or ("python" if block(section, "python") else "node")
    if needed in missing:
        pytest.skip(f"{needed}: {missing[needed]}")
    done = run_recipe(section, program, tools, Run(gateway.url, TEAM_KEY, tmp_path, "stream", "Hello"))
    if program is not None:  # an agent's own prompt is longer than the tiny model's context: the error must be that one
        assert TOO_LONG in done.stdout + done.stderr, done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), done.stderr[-2000:]


def test_the_page_says_of_every_recipe_if_it_is_run() -> None:
    sections = [section for section in PAGE.split("\n## ")[1:] if "```" in section]
    known = re.compile(r"\n\n(?:Run by `make (?:test|e2e|e2e-clients)`|Tried by hand|Not run here)")
    assert [section.partition("\n")[0] for section in sections if not known.search(section)] == []
    assert len(RECIPES) >= 8
