"""The wheel, built and installed into an environment of its own: trains, evaluates, generates, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "sleepify", "recipes")
TINY = ["--max_steps", "1", "--test_examples", "2", "--use_cpu"]


@pytest.mark.slow
def test_the_wheel_trains_evaluates_and_generates_without_the_checkout(tmp_path: Path) -> None:
    # A build writes beside its sources.
    source, built, home = tmp_path / "source", tmp_path / "built", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    for name in SOURCES:
        here, there = ROOT / name, source / name
        shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
    # Its own site-packages, and those of this environment behind them; an editable sleepify there is not looked up.
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    own = sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "env")})
    (Path(own) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> str:
        done = subprocess.run([*map(str, words)], cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", built, source)
    (wheel,) = built.glob("sleepify-*.whl")
    shutil.rmtree(source)
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)

    command = python.with_name("sleepify")
    assert str(tmp_path) in run(python, "-c", "import sleepify; print(sleepify.__file__)")
    assert "rule110_tiny" in run(command, "recipes", "list")
    run(command, "recipes", "copy", "rule110_tiny")
    run(command, "train", "rule110_tiny.yaml", "--accelerate", "cpu", "--output_dir", "out", *TINY)
    assert "N = 3" in run(command, "evaluate", "out", "--n_examples", "2", "--n_loops", "3")
    assert len(run(command, "generate", "out", "--ids", "1", "0", "1", "--max_new_tokens", "9").split()) == 9
    assert "versions" in run(command, "doctor")
