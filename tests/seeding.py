"""What every task's tests ask of its seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).resolve().parent.parent / "sleepify")
# Without the package's own __init__, which loads torch for its models: tasks themselves need none.
PURE = f"""
import sys, types
sys.modules["sleepify"] = types.ModuleType("sleepify")
sys.modules["sleepify"].__path__ = [{PACKAGE!r}]
"""


def said_whatever_the_hash_seed(code: str) -> str:
    """What code about tasks prints in processes with other hash seeds, in which there is no torch."""
    code = PURE + code + '\nassert "torch" not in sys.modules\n'
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    (same,) = said
    return same


def assert_seeded(task: type, **settings: Any) -> None:
    """An example depends on seed, split and index alone, whatever Python's hash seed and the order of the calls."""
    code = f"from {task.__module__} import {task.__name__} as Task; settings = {settings!r}"
    code += "; print([Task(seed=3, **settings).example(i, 'test') for i in (5, 0, 5)])"
    again = said_whatever_the_hash_seed(code)
    seeded = task(seed=3, **settings)
    assert again == str([seeded.example(i, "test") for i in (5, 0, 5)])
    rows = [task(seed=seed).example(i).input_ids for seed in (0, 3) for i in range(20)]
    assert len(set(map(tuple, rows))) == 40
