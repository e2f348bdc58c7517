"""The comparison of n_loops="auto" with the same mean N, in its smallest form."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import auto


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "names", [("rule110",), pytest.param(("rule110", "hops"), marks=pytest.mark.slow)], ids=["one task", "both"]
)
def test_the_benchmark_runs_once_and_compares_at_equal_mean(names, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(auto, "MODELS", tmp_path / "models")
    monkeypatch.setattr(auto, "SETTINGS", [each for each in auto.SETTINGS if each.name in names])
    page = tmp_path / "auto.md"
    words = ["--tiny", "--repeats", "1", "--output", str(page)]
    with torch.random.fork_rng():
        parts = auto.main(words)
    assert "python -m benchmarks.auto" in page.read_text(encoding="utf-8") and len(parts) == 2 * len(names)
    for part in parts:
        assert {len(row) for row in part.rows} == {len(part.head)}
    assert [len(gain.rows) for gain in parts[::2]] == [len(auto.MEANS)] * len(names)
    for name in names:
        found = json.loads((tmp_path / "runs" / "auto" / f"{name}_seed0.json").read_text(encoding="utf-8"))
        assert {each["how"] for each in found} >= {"N = 1", "N = 6", "auto, asked for 4", "at random"}

    monkeypatch.setattr(auto, "measure", None)
    written = page.read_text(encoding="utf-8")
    auto.main(words)
    assert page.read_text(encoding="utf-8") == written


def test_one_number_for_all_has_the_mean_asked() -> None:
    for mean in (3.0, 3.25, 4.5, 6.0):
        dealt = auto.between(mean, 40)
        assert sum(dealt) / 40 == mean and max(dealt) - min(dealt) <= 1
