"""Full-size models on fake CUDA tensors: nothing waits for the card that need not, and nothing became more.

Anything that needs a value from the card raises by itself. The bounds are what was counted, and two parts in a hundred:
who makes something cheaper lowers them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.on_paper import environment

pytest.importorskip("triton", reason="pip install triton (Linux): the kernels that are counted on a card are its")
pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None and shutil.which("g++") is None,
        reason="g++ makes the CUDA device that a build of PyTorch without CUDA lacks",
    ),
    pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(),
        reason="a build of PyTorch with CUDA asks the driver whatever it counts",
    ),
]

ROOT = Path(__file__).resolve().parent.parent
SLACK = 1.02
SLEEP = {"ouro_1.4b": "sleep, N = 4", "jet_nemotron_2b": "sleep, N = 6"}
TOKEN, WINDOW = "decoded token", "window of a prompt, N = 1"
STEP = 'training step, one window and a rest, N = {}, "{}"'
FURTHER, UPDATE = 'further window of it, N = 2, "loop"', "optimiser's step, Muon"


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, str]:
    """Of a process in which there is a CUDA device on paper."""
    return environment(tmp_path_factory.mktemp("card"))


def said(variables: dict[str, str], code: str) -> str:
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def counting(model: str, *parts: str) -> str:
    """Code that prints what is counted; see benchmarks/counts.py."""
    return f"from benchmarks.counts import main; main({['--json', '--models', model, '--parts', *parts]!r})"


def read_counts(printed: str, model: str) -> dict[str, dict]:
    """By what is done."""
    return json.loads(printed.splitlines()[-1])[model]


def check(model: str, found: dict[str, dict]) -> None:
    for what, figures in found.items():
        launches, moved, syncs = BOUNDS[model][what]
        line = f"{model}, {what}: {figures['launches']:,} kernels, {figures['moved'] / 1e9:.1f} GB, {figures['syncs']}"
        print(line)
        assert figures["launches"] <= SLACK * launches, line
        assert figures["moved"] <= SLACK * moved * 1e9, line
        assert figures["syncs"].keys() <= syncs.keys(), f"a new sync: {line}"
        for place, count in figures["syncs"].items():
            assert count <= syncs[place], line


# Kernels, GB moved, and how often the host may wait where.
LABELS = {"sleepify/rows.py: _fetch": 1}  # where the labels are decides which windows are read awake
BOUNDS = {
    "ouro_1.4b": {
        WINDOW: (996, 21.5, {}),
        SLEEP["ouro_1.4b"]: (3989, 88.4, {}),
        TOKEN: (1133, 3.56, {}),
        STEP.format(1, "none"): (5857, 86.2, LABELS),
        STEP.format(2, "none"): (8990, 160.7, LABELS),
        STEP.format(2, "selective"): (11213, 189.9, LABELS),
        STEP.format(2, "loop"): (11943, 208.8, LABELS),
        STEP.format(2, "window"): (11969, 208.8, LABELS),
        FURTHER: (8123, 190.4, {}),
        UPDATE: (6351, 170.1, {}),
    },
    "jet_nemotron_2b": {
        WINDOW: (1232, 28.7, {}),
        SLEEP["jet_nemotron_2b"]: (4032, 98.0, {}),
        TOKEN: (1724, 4.31, {}),
        STEP.format(1, "none"): (6815, 112.3, LABELS),
        STEP.format(2, "none"): (8558, 157.5, LABELS),
        STEP.format(2, "selective"): (10731, 184.9, LABELS),
        STEP.format(2, "loop"): (11522, 204.5, LABELS),
        STEP.format(2, "window"): (11562, 204.8, LABELS),
        FURTHER: (7293, 181.5, {}),
        UPDATE: (8626, 196.0, {}),
    },
}

ON_PAPER = """
import torch
from benchmarks.on_paper import Count, HostSyncError, card

def asks(question):
    try:
        question()
    except HostSyncError:
        return
    raise AssertionError("nobody asked")

with card() as paper:
    real = torch.arange(6).reshape(2, 3)
    there, product = paper.give(real), torch.ones(4, 4, device="cuda") @ torch.ones(4, 4, device="cuda")
    asks(lambda: product.sum().item())
    asks(lambda: bool(product.isfinite().all()))
    asks(lambda: product.nonzero())
    asks(lambda: product.cpu())
    assert not paper.count.syncs, paper.count
    # Whole numbers are known, and asking for them is counted.
    assert (there + 1)[:, 1:].sum().item() == 2 + 3 + 5 + 6 and paper.count.n_syncs == 1
    assert torch.equal((there > 2).nonzero().cpu(), (real > 2).nonzero()) and paper.count.n_syncs == 3
    changed = there.clone()
    changed[:, 0] = there[:, 2]
    assert changed.tolist() == [[2, 1, 2], [5, 4, 5]]
    assert torch.tensor([7]).to("cuda", non_blocking=True).is_cuda and sum(paper.count.copies.values()) == 1
    paper.count = Count()
    a = torch.ones(8, 16, device="cuda", requires_grad=True)
    (a @ torch.ones(16, 4, device="cuda")).sum().backward()
    assert a.grad.is_cuda and paper.count.flops == 2 * (2 * 8 * 16 * 4)
    assert paper.count.peak >= 4 * (8 * 16 + 16 * 4 + 8 * 4)
print("well counted")
"""


@pytest.fixture(scope="module")
def printed(variables) -> str:
    """By one process, which takes as long to start as to count."""
    return said(variables, ON_PAPER + counting("ouro_1.4b", "read", "decode"))


def test_what_is_asked_of_a_card_on_paper(printed):
    assert printed.splitlines()[0] == "well counted"


def test_a_prompt_and_a_token_of_ouro_at_full_size(printed):
    found = read_counts(printed, "ouro_1.4b")
    assert found.keys() == {WINDOW, TOKEN}
    check("ouro_1.4b", found)


@pytest.mark.slow
@pytest.mark.parametrize("model", BOUNDS)
def test_sleep_and_training_at_full_size(model, variables):
    printed = said(variables, counting(model, "read", "sleep", "decode", "step", "train", "optimise"))
    found = read_counts(printed, model)
    assert found.keys() == BOUNDS[model].keys()
    check(model, found)


def test_every_sync_has_a_reason():
    """One per step of training; none while a text is read and slept on, for a token, a further window, an update."""
    for bounds in BOUNDS.values():
        for what, (_, _, syncs) in bounds.items():
            assert sum(syncs.values()) <= what.startswith("training step"), what
