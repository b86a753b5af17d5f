"""README.md: its commands work as they are printed. `make run` itself: programs/test_quickstart.py."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import diagram
from config.loader import load_config
from support.pages import Step, shell, type_into_shell
from support.paths import ROOT
from support.together import aside

README = (ROOT / "README.md").read_text(encoding="utf-8")
KEY = "sk-readme-0123456789abcdef"


def commands() -> list[str]:
    """The indented commands, each in one line."""
    lines = re.sub(r"\\\n\s*", "", README).splitlines()
    return [line.strip().partition("  #")[0].rstrip() for line in lines if line.startswith("    ")]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {command.split()[0] for command in commands()} == {"make", "curl", "docker"}


def test_its_first_page_fits_a_screen_or_two() -> None:
    assert len(README.splitlines()) < 80


@pytest.mark.skipif(not shutil.which("curl"), reason="the command is curl's")
@aside
def test_the_curl_command_streams_a_chat(tmp_path: Path) -> None:
    (command,) = [command for command in commands() if command.startswith("curl ")]
    with shell(tmp_path, f"alice:{KEY}\n") as environ:
        typed = command.replace("curl ", "curl -s ", 1).replace("http://127.0.0.1:8000", environ["URL"])
        (printed,) = type_into_shell([Step(typed, None)], {**environ, "KEY": KEY})
    assert printed.startswith("data: {")
    assert printed.endswith("data: [DONE]")


def test_the_settings_in_its_commands_are_accepted() -> None:
    found = [
        word.partition("=") for command in commands() for word in shlex.split(command) if re.match("[A-Z_]+=", word)
    ]
    assert {name for name, _, _ in found} == {"MODEL_PATH", "MODEL_HF", "LLAMA_BIN"}
    for name, _, value in found:
        load_config({name: value})


def test_the_docker_lines_build_what_they_run() -> None:
    build, run = [shlex.split(command) for command in commands() if command.startswith("docker ")]
    assert build[2:] == ["-t", run[-1], "."]
    assert "127.0.0.1:8000:8000" in run
    assert re.search(r"^EXPOSE .*\b8000\b", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)


def test_twelve_features() -> None:
    features = README.partition("## What it does")[2].partition("\n## ")[0]
    assert len(re.findall("^- ", features, re.MULTILINE)) == 12


def test_a_line_that_is_none_of_a_diagram_is_refused() -> None:
    with pytest.raises(ValueError, match="circle 1 2"):
        diagram.draw("size 10 10\ncircle 1 2")
