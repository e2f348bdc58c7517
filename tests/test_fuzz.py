"""Random programs of calls over all families against each row alone, and random calls that must be refused.

A few of each run with every other test. Many are asked for by the environment, in pieces by seed:

    SLEEPIFY_FUZZ_CALLS=10000 SLEEPIFY_FUZZ_INVALID=2000 SLEEPIFY_FUZZ_SEED=0 pytest -m slow tests/test_fuzz.py

A failure names its seed and lists every call of the program; ``Program(seed).run()`` is that program again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from families import FAMILIES, true_float64
from fuzz import Program
from fuzz_invalid import refusals

CALLS = int(os.environ.get("SLEEPIFY_FUZZ_CALLS", 1000))
INVALID = int(os.environ.get("SLEEPIFY_FUZZ_INVALID", 400))
SEED = int(os.environ.get("SLEEPIFY_FUZZ_SEED", 0))


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    """Rows alone and rows of a batch sum in another order: float32 inside would round them apart."""
    with true_float64():
        yield


def many(program: Callable[[int], int], n_calls: int, what: str) -> None:
    done = 0
    for seed in itertools.count(SEED):
        if done >= n_calls:
            break
        done += program(seed)
    print(f"{done} {what}, seeds {SEED} to {seed - 1}")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "falcon_h1"])
def test_a_few_programs_give_what_each_row_gives_alone(family):
    assert Program(1, family).run(12) == 12


def test_a_few_calls_are_refused_and_change_nothing():
    for seed, family in enumerate(["qwen3", "jet_nemotron"]):
        assert refusals(seed, 25, family) == 25


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_of_every_family(family):
    Program(SEED, family).run()


@pytest.mark.slow
def test_programs_give_what_each_row_gives_alone():
    many(lambda seed: Program(seed).run(), CALLS, "calls, none wrong")


@pytest.mark.slow
def test_invalid_calls_are_refused_and_change_nothing():
    many(refusals, INVALID, "invalid calls, each refused, no session changed")
