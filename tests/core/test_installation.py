"""Where the product is, its version, and how its programs are started from a folder and from one file."""

import argparse
import sys
import zipfile
from pathlib import Path

import pytest

from core import installation
from support.paths import ROOT, SCRIPTS


def test_it_is_a_folder_with_version_beside_it() -> None:
    assert installation.ROOT == SCRIPTS
    assert not installation.is_one_file()
    assert installation.version() == (ROOT / "VERSION").read_text().strip()


def test_without_the_file_the_version_is_unknown(tmp_path: Path) -> None:
    assert installation.version(tmp_path / "scripts") == "unknown"


def test_a_program_is_started_by_its_file() -> None:
    assert installation.command("gateway") == [sys.executable, str(SCRIPTS / "gateway.py")]
    assert installation.shown("gateway") == "gateway.py"
    assert installation.check_command() == "start.sh --check"


def test_in_one_file_a_program_is_a_command(tmp_path: Path) -> None:
    one_file = tmp_path / "x.pyz"
    with zipfile.ZipFile(one_file, "w") as archive:
        archive.writestr("VERSION", "1.2.3\n")
    assert installation.is_one_file(one_file)
    assert installation.command("key_mgmt", one_file) == [sys.executable, str(one_file), "keys"]
    assert installation.shown("key_mgmt", one_file) == "x.pyz keys"
    assert installation.check_command(one_file) == "x.pyz check"


def test_a_page_is_a_file_of_the_installation() -> None:
    assert installation.page("chat.html") == (SCRIPTS / "pages" / "chat.html").read_bytes()
    with pytest.raises(OSError, match="none"):
        installation.page("none.html")


def test_every_command_is_a_program() -> None:
    for program in installation.COMMANDS.values():
        assert (SCRIPTS / f"{program}.py").is_file()


def test_version_is_an_option_that_exits(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="some.py")
    installation.add_version(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"some.py (llama-gguf-inference) {installation.version()}\n"
