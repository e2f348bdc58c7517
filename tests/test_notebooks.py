"""The notebooks of the documentation run, cell by cell in one namespace, and are kept without what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[tuple[int, str]]:
    """Place and text of the cells of code."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return [(n, "".join(cell["source"])) for n, cell in enumerate(book["cells"]) if cell["cell_type"] == "code"]


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["retrofit", "session"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_from_first_to_last(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict = {"__name__": "notebook"}
    for place, code in cells(path):
        exec(compile(code, f"{path.name}, cell {place}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_they_print_is_kept(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        assert cell["metadata"] == {} and not cell.get("outputs") and cell.get("execution_count") is None
    assert book["metadata"].keys() <= {"kernelspec", "language_info"}
