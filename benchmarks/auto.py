"""As many passes as the state needs, against as many for every row, at equal mean: two tasks on a CPU, over seeds.

    python -m benchmarks.auto [--repeats 2] [--output docs/results/auto.md]

Per task and seed one model, N drawn anew in every step from 1 to 6, trained unless its checkpoint is in outputs/auto.
Its threshold is calibrated on 500 rows for a mean N, and tested on 2,000 others: "auto"; the same numbers of passes
dealt out to the rows at random; and one number for all (a mean between two numbers: for so many rows one, for the rest
the other). All answer the same questions, so that differences are taken row by row. A finished run leaves one JSON file
in runs/auto beside the page and is not made again; several processes share the runs out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Part, page_arguments, publish
from benchmarks.worth_runs import claimed
from sleepify import SleepCache, SleepForCausalLM, calibrate
from sleepify.convergence import FEWEST
from sleepify.files import written_beside
from sleepify.tasks.base import Example
from sleepify.training import recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs"
MODELS = ROOT / "outputs" / "auto"
N, SCHEDULE = 6, (1, 6, 2, 6, 3, 6, 4, 6)
MEANS = (3.5, 4.0, 5.0)
_BATCH = 250


@dataclass(frozen=True)
class Setting:
    """A task and how its model is trained.

    Args:
        name: of the task's recipe.
        intro: task and model in words.
        config: YAML file of the training.
        steps: optimiser steps.
        changes: of the YAML file's fields.
        base: YAML file of the base that is pretrained first, if it is one.
    """

    name: str
    intro: str
    config: str
    steps: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


SETTINGS = (
    Setting(
        "rule110",
        "Rule 110 run ahead by t: one layer of Qwen3 with a Gated DeltaNet layer after it, from scratch, 1,000 steps.",
        "rule110_small.yaml",
        1000,
    ),
    Setting(
        "hops",
        "k hops along a cycle of 8 nodes, k = 1 to 4: a base of two layers, pretrained on k = 1, with a Gated DeltaNet "
        "layer after each, 1,500 steps.",
        "hops_small.yaml",
        1500,
        {"hops": (1, 2, 3, 4)},
        "hops_base.yaml",
    ),
)


class Rows:
    """Test rows: ids [R, T], columns that make predictions [R, Q], the answers and their difficulties, [R, Q] both."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.ids = torch.tensor([example.input_ids for example in examples])
        places = torch.tensor([[query.start for query in example.queries] for example in examples])
        self.columns, self.answers = places - 1, self.ids.gather(1, places)
        self.difficulties = torch.tensor([[query.difficulty for query in example.queries] for example in examples])

    @torch.no_grad()
    def read(self, model: SleepForCausalLM, n_loops: Any) -> tuple[Tensor, list[int]]:
        """Which questions are answered, [R, Q] of 0 and 1, and passes per row. A row sleeps once, on its text."""
        right, passes = [], []
        for ids, columns, answers in zip(*(each.split(_BATCH) for each in (self.ids, self.columns, self.answers)),
                                         strict=True):  # fmt: skip
            cache = SleepCache()
            logits = model(ids, past_key_values=cache, n_loops=n_loops).logits
            chosen = logits.argmax(-1).gather(1, columns)
            right.append((chosen == answers).double())
            passes += cache.passes
            assert cache.windows == [1] * len(ids)
        return torch.cat(right), passes

    def by_difficulty(self, right: Tensor) -> dict[int, float]:
        """The share of `right` [R, Q] among the questions of each difficulty."""
        return {t: float(right[self.difficulties == t].mean()) for t in self.difficulties.unique().tolist()}


def trained(name: str, config: str, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The command line of a recipe's run into ``folder``, which has been made unless its report was there."""
    words = [str(CONFIGS / config)]
    for option, value in {**options, "output_dir": folder}.items():
        words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    if not (folder / "report.json").exists():
        recipe.run(name, words)
    return words


def model_of(setting: Setting, seed: int, steps: int | None, examples: int) -> tuple[SleepForCausalLM, Any]:
    """The model of a seed, trained if it is not there, and its task; with ``steps`` instead of the setting's."""
    folder = MODELS / f"{setting.name}_seed{seed}_{steps or setting.steps}steps"
    shared = {"seed": seed, "task_seed": seed, "test_examples": examples}
    options = {**shared, **setting.changes, "n_loops": N, "loops_schedule": SCHEDULE,
               "max_steps": steps or setting.steps}  # fmt: skip
    if setting.base is not None:
        base = folder.with_name(f"{folder.name}_base")
        trained(setting.name, setting.base, base, shared if steps is None else {**shared, "max_steps": steps})
        options["model"] = base
    words = trained(setting.name, setting.config, folder, options)
    return SleepForCausalLM.from_pretrained(folder).eval(), recipe.parse(setting.name, words).task.build(test=True)


def dealt(right: dict[int, Tensor], passes: Sequence[int]) -> Tensor:
    """What rows answer after so many passes each, [R, Q]."""
    return torch.stack([right[n][row] for row, n in enumerate(passes)])


def between(mean: float, n_rows: int) -> list[int]:
    """One number for all, or two next to each other in the shares that give the mean."""
    low = math.floor(mean)
    n_high = round((mean - low) * n_rows)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(1)).tolist()
    return [low + (order[row] < n_high) for row in range(n_rows)]


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean over rows of what more is answered, in per cent of the questions, and half of its 95% interval."""
    rows = (one - other).mean(1) * 100
    return float(rows.mean()), 1.96 * float(rows.std()) / math.sqrt(len(rows))


def measure(setting: Setting, seed: int, steps: int | None, n_calibrate: int, n_test: int) -> list[dict[str, Any]]:
    """What one seed answers: at every N, and for every mean."""
    model, task = model_of(setting, seed, steps, n_test // 20)
    held_out = [list(task.example(index, "test").input_ids) for index in range(n_calibrate)]
    rows = Rows([task.example(index, "test") for index in range(n_calibrate, n_calibrate + n_test)])
    right = {n: rows.read(model, n)[0] for n in range(1, N + 1)}

    def line(how: str, mean: float, answered: Tensor, **more: Any) -> dict[str, Any]:
        return {"seed": seed, "how": how, "mean": mean, "all": float(answered.mean()),
                "by": rows.by_difficulty(answered), **more}  # fmt: skip

    found = [line(f"N = {n}", n, right[n]) for n in right]
    for asked in MEANS:
        threshold = model.config.auto_threshold = calibrate(model, held_out, mean_n_loops=asked, batch_size=_BATCH)
        adaptive, passes = rows.read(model, "auto")
        # A row answers what it answers after so many passes anyway (up to rounding, where two answers are as likely).
        assert float((adaptive != dealt(right, passes)).double().mean()) < 1e-3
        order = torch.randperm(len(passes), generator=torch.Generator().manual_seed(0)).tolist()
        mean = statistics.mean(passes)
        others = {"at random": dealt(right, [passes[row] for row in order]),
                  "the same for all": dealt(right, between(mean, len(passes)))}  # fmt: skip
        more = {name: difference(adaptive, other) for name, other in others.items()}
        spread = {n: passes.count(n) for n in range(FEWEST, N + 1)}
        found.append(line(f"auto, asked for {asked:g}", mean, adaptive, threshold=threshold, more=more, spread=spread))
        found += [line(name, mean, other) for name, other in others.items()]
    return found


def parts_of(setting: Setting, found: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The tables of all seeds of a task."""
    difficulties = list(found[0]["by"])
    gain = Part(
        f"{setting.intro.partition(':')[0]}: auto against the same mean",
        "How many per cent of the questions more are answered, row by row, with a 95% interval over rows; and how the "
        "passes spread.",
        ["seed", "asked for", "threshold", "mean N", "over random", "over the same for all", "rows by passes"],
    )
    accuracy = Part(
        f"{setting.intro.partition(':')[0]}: accuracy",
        "Per cent of the questions answered, all and by difficulty. *At random*: the numbers of passes of the row "
        "above, dealt out to other rows. *The same for all*: one number for every row, or two next to each other.",
        ["seed", "passes", "mean N", "all", *map(str, difficulties)],
    )
    for each in found:
        cells = [f"{100 * value:.1f}" for value in each["by"].values()]
        accuracy.rows.append(
            [str(each["seed"]), each["how"], f"{each['mean']:.2f}", f"{100 * each['all']:.2f}", *cells]
        )
        if "more" in each:
            spread = ", ".join(f"{n}: {rows}" for n, rows in each["spread"].items())
            more = [f"{middle:+.2f} ± {half:.2f}" for middle, half in each["more"].values()]
            asked = each["how"].rpartition(" ")[2]
            gain.rows.append(
                [str(each["seed"]), asked, f"{each['threshold']:.4g}", f"{each['mean']:.2f}", *more, spread]
            )
    return [gain, accuracy]


def main(argv: Sequence[str] | None = None) -> list[Part]:
    """Train, calibrate, test what is missing; write the page of what is there."""
    arguments = page_arguments(argv, __doc__, "auto", repeats=2, unit="seeds")
    steps, n_calibrate, n_test = (2, 40, 40) if arguments.tiny else (None, 500, 2000)
    parts, said = [], []
    for setting in SETTINGS:
        found = []
        for seed in range(arguments.repeats):
            path = arguments.output.parent / "runs" / "auto" / f"{setting.name}_seed{seed}.json"
            with claimed(MODELS / f"{setting.name}_seed{seed}.lock") as mine:
                if mine and not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lines = measure(setting, seed, steps, n_calibrate, n_test)
                    with written_beside(path) as draft:
                        draft.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
            # What another process is at is missing from this page.
            found += json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if found:
            parts += parts_of(setting, found)
            said.append(setting.intro)
    intro = (
        f"{' '.join(said)} N is drawn in every step from {', '.join(map(str, SCHEDULE))}; what is asked about is one "
        f"window, slept on once. Calibrated on {n_calibrate:,} held-out rows, tested on {n_test:,} others."
    )
    return publish(arguments, "As many passes as the state needs", intro, parts)


if __name__ == "__main__":
    main()
