"""The demo runs to its end with two steps, offline and in a new home; interrupted, it leaves nothing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleepify import SleepForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", ["tests/quick_demo.py", pytest.param("examples/demo.py", marks=pytest.mark.slow)])
def test_quick_demo_trains_tests_saves_answers_and_measures(script: str, tmp_path: Path) -> None:
    output = tmp_path / "out" / "demo"
    home = tmp_path / "home"
    home.mkdir()
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    told = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    run = subprocess.run(
        [sys.executable, str(ROOT / script), "--quick", "--output", str(output)],
        cwd=tmp_path,
        env=told | {"HOME": str(home), "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for said in ("accelerate launch", "bit for bit: True", "slept on, then gone", "a guess", "not shown"):
        assert said in run.stdout
    assert "Warning" not in run.stdout + run.stderr
    assert "in short" in run.stdout[-4000:]

    arms = {"n4", "n1", "reread", "full"}
    assert [path.name for path in output.parent.iterdir()] == ["demo"]
    logs = {f"{name}.log" for name in ("base", *arms)}
    assert {path.name for path in output.iterdir()} == {"base", *arms, *logs, "accuracy.png", "demo.json"}
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    model = SleepForCausalLM.from_pretrained(output / "n4")
    assert (model.config.n_loops, model.config.base_model_name_or_path) == (4, "base")

    numbers = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert len(numbers["reports"]) == len(arms) + 1
    for name, report in numbers["reports"].items():
        # Sixteen rows of five questions, the same for all.
        assert sum(score["total"] for score in report["scores"]) == 16 * 5, name
        assert [score["difficulty"] for score in report["scores"]] == [1, 2]
    first, first_slept, base, late, late_slept, base_late = numbers["costs"]
    assert first["kv_bytes"] == late["kv_bytes"] > 0 == first_slept["kv_bytes"] == late_slept["kv_bytes"]
    assert first["state_bytes"] == late["state_bytes"] == late_slept["state_bytes"] > 0
    assert base_late["tokens"] > base["tokens"] and base_late["kv_bytes"] > base["kv_bytes"] > 0


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which sets variables for the processes that it starts."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    module = importlib.import_module("demo")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def test_interrupted_demo_keeps_nothing_and_what_was_there(
    demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes: list[subprocess.Popen[str]] = []

    def interrupted(draft: Path, *_: Any) -> None:
        with demo.recipe(["--help"], draft, draft / "run.log") as process:
            processes.append(process)
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    earlier = tmp_path / "demo"
    earlier.mkdir()
    (earlier / "demo.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--quick", "--output", str(earlier)])
    assert stopped.value.code == 130
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["demo", "demo/demo.json"]


def test_demo_refuses_a_folder_that_is_not_its_own(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit):
        demo.main(["--quick", "--output", str(tmp_path)])
    assert "expected --output to be new" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
