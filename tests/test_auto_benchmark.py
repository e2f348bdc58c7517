"""The comparison of n_loops=\"auto\" with the same mean N, in its smallest form."""

from __future__ import annotations

import torch

from benchmarks import auto


def test_the_benchmark_runs_and_compares_at_equal_mean(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(auto, "RUNS", tmp_path / "runs")
    page = tmp_path / "auto.md"
    with torch.random.fork_rng():
        gain, accuracy = auto.main(["--tiny", "--repeats", "1", "--output", str(page)])
    assert "python -m benchmarks.auto" in page.read_text(encoding="utf-8")
    for part in (gain, accuracy):
        assert part.figures and {len(row) for row in part.rows} == {len(part.head)}
    assert len(gain.rows) == len(auto.MEANS)
    for mean in (3.0, 3.25, 4.5, 6.0):
        dealt = auto.between(mean, 40)
        assert sum(dealt) / 40 == mean and max(dealt) - min(dealt) <= 1
