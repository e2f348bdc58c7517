"""As many passes as the state needs, against as many for every row, at equal mean: Rule 110 on a CPU, over seeds.

    python -m benchmarks.auto [--repeats 1] [--output docs/results/auto.md]

Per seed one model, N drawn anew in every step from 1 to 6, trained unless its checkpoint is in outputs/auto. Its
threshold is calibrated on 500 rows for a mean N, and tested on 2,000 others: "auto"; the same numbers of passes dealt
out to the rows at random; and one number for all (a mean between two numbers: for so many rows one, for the rest the
other). All answer the same questions, so that differences are taken row by row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Part, page_arguments, publish
from sleepify import SleepCache, SleepForCausalLM, calibrate
from sleepify.convergence import FEWEST
from sleepify.tasks.base import Example
from sleepify.training import recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "recipes" / "configs" / "rule110_small.yaml"
RUNS = ROOT / "outputs" / "auto"
N, SCHEDULE = 6, (1, 6, 2, 6, 3, 6, 4, 6)
MEANS = (3.5, 4.0, 5.0)
_BATCH = 250


class Rows:
    """Test rows: ids [R, T], columns that make predictions [R, Q], and the answers [R, Q] by ascending difficulty."""

    def __init__(self, examples: Sequence[Example]) -> None:
        ordered = [sorted(example.queries, key=lambda query: query.difficulty) for example in examples]
        self.difficulties = [query.difficulty for query in ordered[0]]
        self.ids = torch.tensor([example.input_ids for example in examples])
        places = torch.tensor([[query.start for query in queries] for queries in ordered])
        self.columns, self.answers = places - 1, self.ids.gather(1, places)

    @torch.no_grad()
    def read(self, model: SleepForCausalLM, n_loops: Any) -> tuple[Tensor, list[int]]:
        """Which questions are answered, [R, Q] of 0 and 1, and passes per row. A row sleeps once, on its string."""
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


def model_of(seed: int, steps: int, examples: int) -> tuple[SleepForCausalLM, Any]:
    """The model of a seed, trained if it is not there, and its task."""
    folder = RUNS / f"seed{seed}_{steps}steps"
    options = {"n_loops": N, "max_steps": steps, "seed": seed, "task_seed": seed, "test_examples": examples,
               "output_dir": folder}  # fmt: skip
    words = [str(CONFIG), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    words += ["--loops_schedule", *map(str, SCHEDULE)]
    if not (folder / "report.json").exists():
        recipe.run("rule110", words)
    return SleepForCausalLM.from_pretrained(folder).eval(), recipe.parse("rule110", words).task.build(test=True)


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


def measure(seed: int, steps: int, n_calibrate: int, n_test: int) -> list[dict[str, Any]]:
    """Accuracies of one seed: for N = 3 to 6, and for every mean."""
    model, task = model_of(seed, steps, n_test // 20)
    held_out = [list(task.example(index, "test").input_ids) for index in range(n_calibrate)]
    rows = Rows([task.example(index, "test") for index in range(n_calibrate, n_calibrate + n_test)])
    right = {n: rows.read(model, n)[0] for n in range(FEWEST, N + 1)}
    found = [{"how": f"N = {n}", "mean": float(n), "right": right[n]} for n in right]
    for mean in MEANS:
        model.config.auto_threshold = calibrate(model, held_out, mean_n_loops=mean, batch_size=_BATCH)
        adaptive, passes = rows.read(model, "auto")
        # A row answers what it answers after so many passes anyway (up to rounding, where two answers are as likely).
        assert float((adaptive != dealt(right, passes)).double().mean()) < 1e-3
        order = torch.randperm(len(passes), generator=torch.Generator().manual_seed(0)).tolist()
        actual = statistics.mean(passes)
        others = {"at random": dealt(right, [passes[row] for row in order]),
                  "the same for all": dealt(right, between(actual, len(passes)))}  # fmt: skip
        found.append({"how": f"auto, asked for {mean:g}", "mean": actual, "right": adaptive, "passes": passes,
                      "threshold": model.config.auto_threshold,
                      "more": {name: difference(adaptive, other) for name, other in others.items()}})  # fmt: skip
        found += [{"how": f"{name}", "mean": actual, "right": other} for name, other in others.items()]
    for each in found:
        each |= {"seed": seed, "by": {t: float(each["right"][:, q].mean()) for q, t in enumerate(rows.difficulties)}}
    return found


def parts_of(found: Sequence[dict[str, Any]]) -> list[Part]:
    """The tables of all seeds."""
    difficulties = list(found[0]["by"])
    accuracy = Part(
        "Accuracy",
        "Per cent of the questions answered, all and by t. *At random*: the numbers of passes of the row above, dealt "
        "out to other rows. *The same for all*: one number for every row, or two next to each other.",
        ["seed", "passes", "mean N", "all", *(f"t = {t}" for t in difficulties)],
    )
    gain = Part(
        "Auto against the same mean",
        "How many per cent of the questions more are answered, row by row, with a 95% interval over rows; and how the "
        "passes spread.",
        ["seed", "asked for", "threshold", "mean N", "over random", "over the same for all", "rows by passes"],
    )
    for each in found:
        cells = [f"{100 * each['by'][t]:.1f}" for t in difficulties]
        whole = 100 * float(each["right"].mean())
        accuracy.rows.append([str(each["seed"]), each["how"], f"{each['mean']:.2f}", f"{whole:.2f}", *cells])
        if "more" in each:
            spread = ", ".join(f"{n}: {each['passes'].count(n)}" for n in range(FEWEST, N + 1))
            more = [f"{middle:+.2f} ± {half:.2f}" for middle, half in each["more"].values()]
            asked = each["how"].rpartition(" ")[2]
            gain.rows.append(
                [str(each["seed"]), asked, f"{each['threshold']:.4g}", f"{each['mean']:.2f}", *more, spread]
            )
    accuracy.figures = {"all": [[each["seed"], each["how"], float(each["right"].mean())] for each in found]}
    gain.figures = {"more": [[each["seed"], each["how"], each["more"]] for each in found if "more" in each]}
    return [gain, accuracy]


def main(argv: Sequence[str] | None = None) -> list[Part]:
    """Train, calibrate, test, write the page."""
    arguments = page_arguments(argv, __doc__, "auto", repeats=1, unit="seeds")
    sizes = (2, 40, 40) if arguments.tiny else (1000, 500, 2000)
    found = [each for seed in range(arguments.repeats) for each in measure(seed, *sizes)]
    intro = (
        f"One layer of Qwen3 with a Gated DeltaNet layer after it, `recipes/configs/rule110_small.yaml`, {sizes[0]:,} "
        f"steps, N drawn in every step from {', '.join(map(str, SCHEDULE))}; a row's string is one window, slept on "
        f"once. Calibrated on {sizes[1]:,} held-out rows, tested on {sizes[2]:,} others; seeds: {arguments.repeats}."
    )
    return publish(arguments, "As many passes as the state needs", intro, parts_of(found))


if __name__ == "__main__":
    main()
