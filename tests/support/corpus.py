"""The files of tests/corpus: messages as bytes, each with what is to be parsed from it.

The first line of a file is `# RESULT -- SOURCE -- RULE`: the reader's summary or the error's code, the section of the
RFC (or "own limit", "own decision"), and the rule in words. The message follows. Files whose name begins with `head_`
answer a HEAD request.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.paths import TESTS

CORPUS = TESTS / "corpus"


class Case(NamedTuple):
    """One file."""

    name: str
    expected: str
    source: str
    rule: str
    raw: bytes


def load(path: Path) -> Case:
    first, _, raw = path.read_bytes().partition(b"\n")
    expected, source, rule = first.decode().removeprefix("# ").split(" -- ")
    return Case(path.stem, expected, source, rule, raw)


def cases(folder: str) -> list[Any]:
    """The cases of a folder, as parameters for pytest."""
    return [pytest.param(load(path), id=path.stem) for path in sorted((CORPUS / folder).glob("*.http"))]
