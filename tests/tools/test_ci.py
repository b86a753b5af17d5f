"""The workflows and hooks name parts of .ci/run, targets of make, and steps of tools/release.py that exist."""

import re
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT
from support.together import ENVIRON

RUN = (ROOT / ".ci" / "run").read_text()
PARTS = set(re.findall(r"(?m)^part_(\w+)\(\)", RUN))
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))


def words(name: str) -> set[str]:
    """The words of an array of .ci/run."""
    return set(re.findall(rf"(?m)^{name}=\((.*)\)$", RUN)[0].split())


def test_every_part_that_is_named_exists() -> None:
    named = {part for line in re.findall(r"\.ci/run ([a-z0-9 ]+)$", CI, re.MULTILINE) for part in line.split()}
    named |= {part.strip() for part in re.findall(r"part: \[(.*)\]", CI)[0].split(",")}
    assert named <= PARTS
    assert words("everything") | words("without_root") <= PARTS


def test_a_run_of_everything_has_every_part_of_the_workflow() -> None:
    """`coverage` runs the test suite, and `pythons` runs it on the other Pythons, so `test` is in neither list."""
    assert words("everything") | words("without_root") | {"test"} == PARTS


def test_the_matrix_begins_with_the_oldest_python() -> None:
    versions = re.findall(r'python: \["(.*)"\]', CI)[0].split('", "')
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_pins_its_actions_and_limits_its_jobs(path: Path) -> None:
    text = path.read_text()
    uses = re.findall(r"uses: (\S+)(.*)", text)
    assert all(re.fullmatch(r"[\w-]+(/[\w-]+)+@[0-9a-f]{40}", action) for action, _ in uses)
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", comment) for _, comment in uses)
    assert text.count("timeout-minutes:") == text.count("runs-on:")
    assert text.count("persist-credentials: false") == text.count("uses: actions/checkout@")
    assert "permissions: {}" in text


def test_hooks_run_targets_of_make() -> None:
    hooks = re.findall(r"entry: make ([a-z-]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {"lint-format", "lint-rules", "lint-types", "lint-files"} <= set(hooks)
    assert set(hooks) <= TARGETS


def test_the_parts_run_targets_of_make() -> None:
    targets = set(re.findall(r'step "[^"]+" [0-9]+ make ([a-z0-9-]+)', RUN))
    assert {"test", "lint", "e2e"} <= targets
    assert targets <= TARGETS


def test_an_unknown_part_is_an_error() -> None:
    done = subprocess.run([ROOT / ".ci" / "run", "nope"], env=ENVIRON, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, ".ci/run: there is no part nope\n")
