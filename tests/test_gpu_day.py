"""The script for the day there is a GPU: on the CPU, tiny."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_day.sh"
STEPS = re.search(r"^ORDER=\((.*)\)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)[1].split()


def gpu_day(out: Path, *steps: str, limit: int = 600) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "SLEEPIFY_GPU_DAY": "tiny"}
    environment |= {"LIMIT": str(limit), "WHEELS": ""}
    return subprocess.run([str(SCRIPT), *steps], env=environment, capture_output=True, text=True)


def test_a_step_that_fails_or_takes_too_long_takes_no_other_along(tmp_path):
    result = gpu_day(tmp_path, "no_such_step", "doctor")
    assert result.returncode == 1
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert "no_such_step: failed with 2" in summary[0] and "doctor: done" in summary[1]
    assert "expected one of: doctor" in (tmp_path / "no_such_step.log").read_text(encoding="utf-8")
    assert "operations on this device" in (tmp_path / "doctor.log").read_text(encoding="utf-8")
    again = gpu_day(tmp_path, "doctor")
    assert again.returncode == 0 and "done before" in again.stdout
    slow = gpu_day(tmp_path, "full_size", limit=1)
    assert slow.returncode == 1 and "stopped after 1 s" in slow.stdout


@pytest.mark.slow
def test_the_whole_day_runs(tmp_path):
    result = gpu_day(tmp_path)
    logs = {step: (tmp_path / f"{step}.log").read_text(encoding="utf-8")[-1500:] for step in STEPS}
    assert result.returncode == 0, f"{result.stdout}\n{logs}"
    assert {path.stem for path in tmp_path.glob("*.done")} == set(STEPS)
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for title in ("Training", "Decoding", "Jet-Nemotron 2B", "Peak of a step", "The pause of a sleep"):
        assert f"## {title}" in page
    assert "failed" not in page and "no time" not in page
