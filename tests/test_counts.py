"""Full-size models on fake CUDA tensors: nothing waits for the card that need not, and nothing became more.

Anything that needs a value from the card raises by itself. The bounds are what was counted, and two parts in a hundred:
who makes something cheaper lowers them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SLACK = 1.02
SLEEP = {"ouro_1.4b": "sleep, N = 4", "jet_nemotron_2b": "sleep, N = 6"}
TOKEN, WINDOW = "decoded token", "window of a prompt, N = 1"
STEP = 'training step, one window and a rest, N = 1, "none"'


def counted(model: str, *parts: str) -> dict[str, dict]:
    """By what is done, see benchmarks/counts.py; in a process of its own, in which there is a CUDA device on paper."""
    command = [sys.executable, "-m", "benchmarks.counts", "--json", "--models", model, "--parts", *parts]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return json.loads(child.stdout.splitlines()[-1])[model]


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
