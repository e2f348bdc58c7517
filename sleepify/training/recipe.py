"""Recipes: a run from a YAML file to the report. Each trains a model on one task, saves it and tests it by difficulty;
`sft` does so on data of one's own.

A recipe is started with a YAML file, and every field of it, or any other, can be changed on the command line:

    accelerate launch recipes/rule110.py recipes/configs/rule110_t32.yaml --n_loops 2
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from sleepify.files import written_beside
from sleepify.settings import check_positive
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.curve import CURVE, Curve, Point
from sleepify.training.data import TaskDataset
from sleepify.training.evaluate import Report, evaluate, plot, settings_of
from sleepify.training.fitting import Spent, fit, setting_up, trainer_of, write_notes
from sleepify.training.model_arguments import ModelArguments, build_model, load_tokenizer, pad_token
from sleepify.training.runs import TASK
from sleepify.training.settings import check_fields, parse_dataclasses, peek, suggest
from sleepify.training.sft import run as run_sft
from sleepify.training.sleep_arguments import SleepArguments
from sleepify.training.task_arguments import RECIPES, TaskArguments
from sleepify.training.text_data import DatasetArguments

logger = logging.getLogger(__name__)

REPORT = "report.json"
KINDS: dict[str, type[TaskArguments] | type[DatasetArguments]] = {**RECIPES, "sft": DatasetArguments}
"""Every recipe: those of tasks, and the one for data of one's own."""


@dataclass
class RecipeArguments:
    """Which recipe it is."""

    recipe: str | None = field(
        default=None, metadata={"help": f"Its name: {', '.join(KINDS)}. A file says it, or is for the script's own."}
    )


@dataclass
class TestArguments:
    """The test after training."""

    test_examples: int = field(default=1600, metadata={"help": "Held-out rows to test on (the paper: 1,600)."})
    test_n_loops: list[int] | None = field(default=None, metadata={"help": "Numbers of loops to test; default: N."})
    test_window_sizes: list[int] | None = field(default=None, metadata={"help": "Windows to test; default: L."})
    curve_steps: int = field(
        default=0, metadata={"help": "Test every so many steps too, for the learning curve; 0: no."}
    )
    curve_examples: int = field(default=200, metadata={"help": "Held-out rows of each such test."})

    def __post_init__(self) -> None:
        for name in ("test_examples", "curve_examples"):
            check_positive(name, getattr(self, name))
        if self.curve_steps < 0:
            raise ValueError(f"expected curve_steps to be 0 or more, got {self.curve_steps!r}")


@dataclass
class Recipe:
    """A parsed command line: the recipe's name, its task's own arguments, and those of every recipe."""

    name: str
    task: TaskArguments | DatasetArguments
    model: ModelArguments
    sleep: SleepArguments
    test: TestArguments
    training: SleepTrainingArguments


@dataclass(frozen=True)
class Result:
    """What a run returns to a caller in the same process.

    Args:
        report: of the test by difficulty; None for one's own data.
        spent: on the training.
        results: of the test on one's own data.
        curve: of the tests on the way.
    """

    report: Report | None
    spent: Spent
    results: dict[str, Any] | None = None
    curve: Sequence[Point] = ()


def parse(
    name: str | None = None,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> Recipe:
    """Command line to arguments.

    Args:
        name: of the recipe, which the file may name too; None to go by the file.
        argv: without the program's name; None for that of the process.
        description, prog: for ``--help``.

    Raises:
        ValueError: for a recipe or a field that does not exist, or a file of another recipe.
    """
    name = _name(name, argv)
    *parsed, _ = parse_dataclasses(_fields_of(name), argv, description, SleepTrainingArguments, prog)
    return Recipe(name, *parsed)


def check(argv: Sequence[str]) -> None:
    """See that a command line names a recipe and only fields that it has, before processes are started for it.

    Raises:
        ValueError: as `parse`.
    """
    check_fields(_fields_of(_name(None, argv)), argv)


def _fields_of(name: str) -> list[type]:
    return [KINDS[name], ModelArguments, SleepArguments, TestArguments, SleepTrainingArguments, RecipeArguments]


def _name(expected: str | None, argv: Sequence[str] | None) -> str:
    """The recipe to run: the one that the file or the command line names, which must be the expected one."""
    named, where = peek("recipe", argv)
    name = expected if named is None else named
    if name is None:
        raise ValueError(f"expected a recipe, got none: write `recipe: NAME` into the YAML file, of {', '.join(KINDS)}")
    if not isinstance(name, str) or name not in KINDS:
        hint = suggest(str(name), KINDS)
        raise ValueError(f"expected recipe to be one of {', '.join(KINDS)}, got {name!r}{hint} ({where})")
    if expected not in (None, name):
        raise ValueError(
            f"expected a file for the recipe {expected}, got `recipe: {name}` ({where}); it is for recipes/{name}.py"
        )
    return name


def run(
    name: str | None = None,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> Result:
    """A whole recipe: build the model, train, save, test by difficulty; the report goes beside the checkpoint.

    Args:
        name: as in `parse`.
        argv: the command line without the program's name; None for that of the process.
        description, prog: for ``--help``.

    Raises:
        ValueError: as `parse`.
        SetupError: for a model or a task that cannot be.
    """
    recipe = parse(name, argv, description, prog)
    if isinstance(recipe.task, DatasetArguments):
        spent, results = run_sft(recipe, recipe.task)
        return Result(None, spent, results=results)
    training = recipe.training
    output = Path(str(training.output_dir))
    with setting_up():
        set_seed(training.seed)
        # Tasks that write in ids of their own take bases that never had a tokenizer.
        tokenizer: Any = load_tokenizer(recipe.model) if recipe.task.reads_text else None
        task, test_task = (recipe.task.build(test, tokenizer) for test in (False, True))
        model: Any = build_model(recipe.model, recipe.sleep, getattr(task, "vocab_size", None) or len(tokenizer))
        # What cannot be tested is refused now, not after the training.
        settings_of(model, recipe.test.test_n_loops, recipe.test.test_window_sizes)
        trainer = trainer_of(model, training, tokenizer, train_dataset=TaskDataset(task))
    if trainer.is_world_process_zero():
        note_other_windows(getattr(task, "window_size", None), settings_of(model, None, None)[0][1])

    def test(n_examples: int) -> Report:
        return evaluate(
            trainer.model_wrapped,
            test_task,
            n_examples=n_examples,
            n_loops=recipe.test.test_n_loops,
            window_sizes=recipe.test.test_window_sizes,
            batch_size=training.per_device_eval_batch_size,
            pad_id=pad_token(tokenizer),
        )

    curve = Curve(lambda: test(recipe.test.curve_examples), recipe.test.curve_steps, output / CURVE)
    if recipe.test.curve_steps:
        trainer.add_callback(curve)
    spent = fit(trainer)
    report = test(recipe.test.test_examples)
    if trainer.is_world_process_zero():
        write_report(report, output / REPORT)
    described = {"recipe": recipe.name, "task": asdict(recipe.task), "tokenizer": recipe.model.tokenizer}
    write_notes(trainer, tokenizer, bool(recipe.model.lora_r), {TASK: described})
    return Result(report, spent, curve=curve.points)


def note_other_windows(filled: int | None, window_size: int | None) -> None:
    """Say that a text does not fill the model's windows, as after a change of the task alone: some of it may still be
    at hand when it is asked about, or a question lie in two windows.

    Args:
        filled: tokens of the windows that the task's text fills; None for a task of no such windows.
        window_size: L of the model; None for one that does not sleep.
    """
    if None not in (filled, window_size) and filled != window_size:
        logger.warning(
            "the task's text fills windows of %d tokens, and the model's have %d: some of it may still be at hand when "
            "it is asked about, or a question lie in two windows; give window_size: %d unless you mean that",
            filled,
            window_size,
            filled,
        )


def write_report(report: Report, path: Path) -> None:
    """The JSON, a plot of the same name, and the table on the screen."""
    with written_beside(path) as draft:
        draft.write_text(report.to_json() + "\n", encoding="utf-8")
    with written_beside(path.with_suffix(".png")) as draft:
        plot(report, draft)
    print(report.table())
