"""Runs that are killed: each in a process of its own, forked from one that has loaded everything and computed nothing.

    python training_runs.py DIRECTORY [all]

Trains six steps without a stop, then for some ways to die (or all): dies, resumes, and notes losses and weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import tiny_base
from forked import in_a_fork
from transformers import PreTrainedModel, TrainerCallback

from sleepify import sleepify
from sleepify.tasks import Rule110
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, TaskDataset

STEPS = 6
SAVE_STEPS = 2


class Die(TrainerCallback):
    """Send this process a signal at a place in the run."""

    def __init__(self, event: str, step: int, number: int) -> None:
        self.step, self.number = step, number
        setattr(self, event, self.at)

    def at(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def build_trainer(directory: Path, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> SleepTrainer:
    """A run with all that must come back: dropout, N drawn per step, accumulation, a schedule, both optimisers."""
    torch.manual_seed(5)
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=2, attention_dropout=0.1)
    model = sleepify(base, n_loops=2, window_size=8)
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "loops_schedule": [1, 2, 3],
        "muon_learning_rate": 0.02,
        "adamw_learning_rate": 0.01,
        "logging_steps": 3,
        "save_steps": SAVE_STEPS,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SleepTrainer(
        model,
        SleepTrainingArguments(**(settings | changes)),
        train_dataset=TaskDataset(Rule110(width=8, n_strings=2, steps=2)),
        data_collator=SleepCollator(0),
        callbacks=callbacks,
    )


def outcome(trainer: SleepTrainer) -> dict[str, Any]:
    """Logged losses, norms and rates, and a fingerprint of the weights: all must be equal to the last bit."""
    names = ("step", "loss", "grad_norm", "learning_rate", "n_loops")
    logs = [{name: line[name] for name in names} for line in trainer.state.log_history if "loss" in line]
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {"logs": logs, "weights": digest.hexdigest()}


def train_and_die(directory: Path, death: Die) -> None:
    build_trainer(directory, [death]).train()


def die_within_a_save(directory: Path, step: int) -> None:
    trainer = build_trainer(directory)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = killed  # type: ignore[method-assign]
    trainer.train()


def die_within_the_final_save(directory: Path) -> None:
    """Train a step, and die when the model's files are written but not yet where they belong."""
    trainer = build_trainer(directory, max_steps=1, save_strategy="no")
    trainer.train()
    write = PreTrainedModel.save_pretrained

    def killed(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    PreTrainedModel.save_pretrained = killed
    trainer.save_model()


def main() -> None:
    root = Path(sys.argv[1])
    results: dict[str, Any] = {}

    def note(name: str, directory: Path, resume: bool) -> None:
        def work() -> None:
            trainer = build_trainer(directory)
            trainer.train(resume_from_checkpoint=resume or None)
            (root / f"{name}.json").write_text(json.dumps(outcome(trainer)))

        assert in_a_fork(work) == 0, name
        results[name] = json.loads((root / f"{name}.json").read_text())

    note("whole", root / "whole", resume=False)
    steps = range(SAVE_STEPS, STEPS) if sys.argv[2:] == ["all"] else [SAVE_STEPS + 1]
    deaths = {f"killed in step {step + 1}": ("on_step_begin", step, signal.SIGKILL) for step in steps}
    deaths |= {f"killed after step {step}": ("on_step_end", step, signal.SIGKILL) for step in steps[1:]}
    deaths["terminated in step 3"] = ("on_step_begin", 2, signal.SIGTERM)
    for name, (event, step, number) in deaths.items():
        directory = root / name.replace(" ", "-")
        code = in_a_fork(partial(train_and_die, directory, Die(event, step, number)))
        saved = sorted(path.name for path in directory.iterdir())
        note(name, directory, resume=True)
        results[name] |= {"code": code, "saved": saved}
        shutil.rmtree(directory)
    directory = root / "within-a-save"
    code = in_a_fork(partial(die_within_a_save, directory, 4))
    saved = sorted(path.name for path in directory.iterdir())
    note("killed within a save", directory, resume=True)
    results["killed within a save"] |= {"code": code, "saved": saved, "left": sorted(os.listdir(directory))}
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
