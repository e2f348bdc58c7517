"""The learning curve of a recipe: held-out accuracy by difficulty while it trains, to see whether it has converged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sleepify.files import written_beside
from sleepify.training.evaluate import Report

CURVE = "curve.json"


@dataclass(frozen=True)
class Point:
    """One test on the way.

    Args:
        step: optimiser steps so far.
        cpu_seconds: processor time of the training so far, without the tests.
        accuracy: per setting (N and window in the order asked), by difficulty ascending.
    """

    step: int
    cpu_seconds: float
    accuracy: list[list[float]]


class Curve(TrainerCallback):
    """Tests every ``every`` steps and keeps the points in a file, which a resumed run goes on with.

    Args:
        test: tests the model as it is; every rank calls it.
        every: steps between two tests.
        path: of the JSON file.
    """

    def __init__(self, test: Callable[[], Report], every: int, path: Path) -> None:
        self.test, self.every, self.path = test, every, path
        self.points: list[Point] = []
        self._spent, self._since = 0.0, time.process_time()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Go on with the points before the step that is resumed from, if there is one."""
        if state.global_step and self.path.exists():
            points = [Point(**fields) for fields in json.loads(self.path.read_text(encoding="utf-8"))]
            self.points = [point for point in points if point.step <= state.global_step]
        self._spent = self.points[-1].cpu_seconds if self.points else 0.0
        self._since = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Test, if it is time."""
        if state.global_step % self.every:
            return
        self._spent += time.process_time() - self._since
        report = self.test()
        accuracy = [[score.accuracy for score in report.of(*setting).values()] for setting in report.settings]
        self.points.append(Point(state.global_step, self._spent, accuracy))
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(self.path) as draft:
                draft.write_text(json.dumps([asdict(point) for point in self.points]) + "\n", encoding="utf-8")
        self._since = time.process_time()
