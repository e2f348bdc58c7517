"""The runs of `benchmarks.worth`: bases and arms, trained by the recipes; one JSON file each when they are finished."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm
from benchmarks.report import machine
from benchmarks.worth_settings import CONFIGS, SETTINGS, Setting
from sleepify.files import written_beside
from sleepify.training import recipe
from sleepify.training.curve import Point
from sleepify.training.evaluate import Report
from sleepify.training.settings import load_config

ROOT = Path(__file__).resolve().parent.parent
FINISHED = ROOT / "docs" / "results" / "runs" / "worth"
MODELS = ROOT / "outputs" / "worth"
BASE = "base"
CURVE_STEPS = 250


@dataclass(frozen=True)
class Run:
    """A finished run, as its file has it.

    Args:
        setting: its name.
        arm: its name, or `BASE` and a number of layers.
        seed: of weights and rows.
        steps: optimiser steps.
        cpu_seconds: processor time of the training, without tests; with that of an arm that it went on from. Measured
            up to the last test on the way, and carried on by the steps after it.
        report: of the test at the end.
        curve: of the tests on the way.
        machine: and versions, and date.
    """

    setting: str
    arm: str
    seed: int
    steps: int
    cpu_seconds: float
    report: Report
    curve: list[Point]
    machine: str


def file_of(setting: str, arm: str, seed: int) -> Path:
    """Where a finished run lies."""
    return FINISHED / setting / f"{arm}_seed{seed}.json"


def read(setting: str, arm: str, seed: int) -> Run | None:
    """A run, if it is finished."""
    path = file_of(setting, arm, seed)
    if not path.exists():
        return None
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    report = Report.from_json(json.dumps(fields["report"]))
    return Run(**{**fields, "report": report, "curve": [Point(**point) for point in fields["curve"]]})


def finished(setting: str, arm: str) -> list[Run]:
    """All finished runs of an arm, by seed."""
    runs = (read(setting, arm, seed) for seed in SETTINGS[setting].seeds)
    return [run for run in runs if run is not None]


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process got the run; the lock goes with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train(setting: Setting, name: str, seed: int, config: str, changes: dict[str, Any], goes_on: Path | None) -> None:
    """Train and test one model, unless that is done or another process is at it."""
    folder = MODELS / setting.name / f"{name}_seed{seed}"
    if is_done(setting, name, seed):
        return
    with claimed(folder.with_suffix(".lock")) as mine:
        if not mine or is_done(setting, name, seed):
            return
        print(f"--- {setting.name}: {name}, seed {seed}", flush=True)
        if goes_on is not None and not folder.exists():
            draft = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(goes_on, draft)
            draft.rename(folder)
        options = {
            "seed": seed,
            "task_seed": seed,
            "output_dir": str(folder),
            "save_strategy": "steps",
            "save_steps": CURVE_STEPS,
            "save_total_limit": 1,
            "curve_steps": CURVE_STEPS,
            **changes,
        }
        if any(folder.glob("checkpoint-*")):
            options["resume_from_checkpoint"] = "latest"
        result = recipe.run(None, [str(CONFIGS / config), *words_of(options)])
        assert result.report is not None and result.curve
        run = Run(
            setting=setting.name,
            arm=name,
            seed=seed,
            steps=result.spent.train_steps,
            cpu_seconds=result.curve[-1].cpu_seconds * result.spent.train_steps / result.curve[-1].step,
            report=result.report,
            curve=list(result.curve),
            machine=machine(),
        )
        path = file_of(setting.name, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(json.dumps(asdict(run)) + "\n", encoding="utf-8")


def is_done(setting: Setting, name: str, seed: int) -> bool:
    """Whether nothing is left to train. Figures come with the repository, weights do not: a base needs both."""
    weights = MODELS / setting.name / f"{name}_seed{seed}" / "config.json"
    return file_of(setting.name, name, seed).exists() and (not name.startswith(BASE) or weights.exists())


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Fields as a command line has them; None for one that a setting leaves to the file after all."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        text = json.dumps(value) if isinstance(value, dict) else value
        words += [f"--{name}", *map(str, text if isinstance(text, list | tuple) else [text])]
    return words


def base_name(layers: int) -> str:
    """Of the base with so many times the setting's layers, as an arm."""
    return BASE if layers == 1 else f"{BASE}_{layers}x"


def train_base(setting: Setting, layers: int, seed: int) -> Path:
    """The pretrained base of an arm; where it lies."""
    architecture = {**load_config(CONFIGS / setting.base)["architecture"], **setting.architecture}
    architecture["num_hidden_layers"] *= layers
    changes = {"architecture": architecture, **setting.changes, **setting.base_changes}
    name = base_name(layers)
    train(setting, name, seed, setting.base, changes, None)
    return MODELS / setting.name / f"{name}_seed{seed}"


def train_arm(setting: Setting, arm: Arm, seed: int) -> None:
    """One arm with one seed, after its base and the arm that it goes on from."""
    if file_of(setting.name, arm.name, seed).exists():
        return
    base = train_base(setting, arm.layers, seed)
    if not is_done(setting, base_name(arm.layers), seed):
        # Another process trains it.
        return
    before = None
    if arm.goes_on is not None:
        if not file_of(setting.name, arm.goes_on, seed).exists():
            # Another process trains it, or it is not wanted.
            return
        before = MODELS / setting.name / f"{arm.goes_on}_seed{seed}"
        if not before.exists():
            # Its figures came with the repository, its weights did not: the same steps are taken again.
            before = None
    tuned = load_config(CONFIGS / setting.config) | dict(setting.tuned_changes)
    own = dict(arm.changes)
    depth = tuned_depth(base)
    if own.get("model_config") == "sliding":
        kinds = ["sliding_attention"] * depth
        own["model_config"] = {
            "use_sliding_window": True, "sliding_window": tuned["window_size"], "max_window_layers": 0,
            "layer_types": kinds,
        }  # fmt: skip
    if arm.layers > 1 and own.get("sleep", True):
        own |= {"loop_range": [0, depth], "fast_weights_layers": list(range(depth))}
    steps = round(tuned["max_steps"] * arm.steps)
    changes = {**setting.changes, **setting.tuned_changes, "model": str(base), "max_steps": steps, **own}
    train(setting, arm.name, seed, setting.config, changes, before)


def tuned_depth(base: Path) -> int:
    """Layers of a base."""
    return int(json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
