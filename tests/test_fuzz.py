"""The checks of fuzz.py for a few rounds; `make fuzz` runs more. If Hypothesis is installed, it is used too."""

import random
from collections.abc import Callable

import pytest

import fuzz


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_bytes(first: int) -> None:
    for seed in range(first, first + 50):
        fuzz.run_round(seed)


@pytest.mark.parametrize("check", fuzz.CHECKS)
def test_any_bytes(check: Callable[[random.Random, bytes], None]) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    some_bytes, some_seed = hypothesis.strategies.binary(max_size=200), hypothesis.strategies.integers(0, 1 << 32)

    def run(raw: bytes, seed: int) -> None:
        check(random.Random(seed), raw)

    settings = hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
    settings(hypothesis.given(some_bytes, some_seed)(run))()


def test_a_run_prints_what_it_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--rounds", "1", "--seed", "7"]) == 0
    assert capsys.readouterr().out == "1 rounds of 6 inputs and 7 checks: nothing found\n"
