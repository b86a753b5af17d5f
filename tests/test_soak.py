"""A few seconds of `make soak`: nothing is lost and nothing leaks. Targets are not checked."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from support.boot import PATIENCE_S
from support.soaking import Finding
from support.together import ENVIRON, aside


@aside
def test_no_request_is_lost_and_nothing_leaks(tmp_path: Path) -> None:
    plan = soak.Plan(tmp_path, seconds=4.0, seed=7)

    async def play() -> list[Finding]:
        return list(await asyncio.gather(*(soak.run_part(plan, name) for name in soak.PARTS)))

    findings = asyncio.run(asyncio.wait_for(play(), PATIENCE_S))
    assert soak.verdict(findings) == ("lost: nothing\nleaked: nothing\nmissed: nothing", 0)
    assert all(finding.figures for finding in findings)


@aside
def test_the_program_starts_by_itself() -> None:
    """It finds its modules without pytest's paths."""
    command = [sys.executable, soak.__file__, "--help"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_failures_are_listed_and_determine_the_exit_status() -> None:
    findings = [Finding("a", lost=["a: request 1"]), Finding("b", leaked=["b: 1 slots"]), Finding("c")]
    assert soak.verdict(findings) == ("lost: 1\n  a: request 1\nleaked: 1\n  b: 1 slots\nmissed: nothing", 1)


@pytest.mark.parametrize(("shares", "index"), [([3, 3, 3], 1.0), ([5, 0], 0.5), ([0, 0], 0.0)])
def test_jain_index(shares: list[float], index: float) -> None:
    assert soak.jain_index(shares) == index
