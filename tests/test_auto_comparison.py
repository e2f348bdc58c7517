"""The comparison of n_loops="auto" with other ways to choose N: it runs, and what is finished is not made again."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import auto as comparison


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_comparison_with_other_ways_runs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "MODELS", tmp_path / "models")
    page = tmp_path / "auto.md"
    parts = comparison.main(["--tiny", "--repeats", "1", "--output", str(page)])
    assert len(parts) == 2 * len(comparison.SETTINGS) and all(part.rows for part in parts)
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    monkeypatch.setattr(comparison, "measure", None)
    comparison.main(["--tiny", "--repeats", "1", "--output", str(page)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == runs
    for setting in comparison.SETTINGS:
        found = json.loads((tmp_path / "runs" / "auto" / f"{setting.name}_seed0.json").read_text(encoding="utf-8"))
        assert {each["how"] for each in found} >= {
            "N = 1",
            "N = 6",
            "auto, asked for 4",
            "at random",
            "the same for all",
        }
