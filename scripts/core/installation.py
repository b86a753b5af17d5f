"""How this product is installed (as a folder of programs, or as one .pyz file), its version, how its programs start."""

import argparse
import sys
from pathlib import Path
from typing import cast

PRODUCT = "llama-gguf-inference"
# The folder scripts/, or the .pyz file, which has the same contents and VERSION.
ROOT = Path(__file__).resolve().parent.parent
# The commands of `python3 X.pyz` and of `python3 scripts`, and the program of each.
COMMANDS = {
    "serve": "supervisor",
    "run": "quickstart",
    "gateway": "gateway",
    "health": "health_server",
    "keys": "key_mgmt",
    "bench": "benchmark",
    "top": "top",
    "mock": "mock_backend",
}


def is_one_file(root: Path = ROOT) -> bool:
    """Return whether the product runs from a .pyz file."""
    return root.is_file()


def version(root: Path = ROOT) -> str:
    """Return the contents of the file VERSION; "unknown" if there is none."""
    path = (root if is_one_file(root) else root.parent) / "VERSION"
    try:
        # The loader of this module reads from a folder as well as from a .pyz file.
        return cast(bytes, __spec__.loader.get_data(str(path))).decode().strip()  # type: ignore[union-attr]
    except OSError:
        return "unknown"


def page(name: str, root: Path = ROOT) -> bytes:
    """Return a page of scripts/pages/. Raises OSError if the installation is not whole."""
    return cast(bytes, __spec__.loader.get_data(str(root / "pages" / name)))  # type: ignore[union-attr]


def command(program: str, root: Path = ROOT) -> list[str]:
    """Return the command line that starts a program, such as `gateway`, with this Python."""
    if not is_one_file(root):
        return [sys.executable, str(root / f"{program}.py")]
    return [sys.executable, str(root), _command_name(program)]


def shown(program: str, root: Path = ROOT) -> str:
    """Return how a message names a program: by its file, or by the .pyz file and the command."""
    return f"{root.name} {_command_name(program)}" if is_one_file(root) else f"{program}.py"


def check_command(root: Path = ROOT) -> str:
    """Return how a message names the check of the settings."""
    return f"{root.name} check" if is_one_file(root) else "start.sh --check"


def _command_name(program: str) -> str:
    (name,) = (name for name, each in COMMANDS.items() if each == program)
    return name


def version_line(program: str) -> str:
    """Return what `program --version` prints."""
    return f"{program} ({PRODUCT}) {version()}"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option --version to a program."""
    parser.add_argument(
        "--version", action="version", help="show the version and exit", version=version_line("%(prog)s")
    )
