"""What every task's tests ask of its seed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def assert_seeded(task: type, **settings: Any) -> None:
    """An example depends on seed, split and index alone, whatever Python's hash seed and the order of the calls."""
    code = f"from sleepify.tasks import {task.__name__} as Task; settings = {settings!r}"
    code += "; print([Task(seed=3, **settings).example(i, 'test') for i in (5, 0, 5)])"
    again = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    seeded = task(seed=3, **settings)
    assert again == {str([seeded.example(i, "test") for i in (5, 0, 5)])}
    rows = [task(seed=seed).example(i).input_ids for seed in (0, 3) for i in range(20)]
    assert len(set(map(tuple, rows))) == 40
