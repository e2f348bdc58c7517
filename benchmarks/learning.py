"""Does more sleep help, at equal steps and at equal compute? Rule 110 on a CPU, over seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.learning                 # everything, one run after the other
    OMP_NUM_THREADS=1 python -m benchmarks.learning --seeds 0 &     # or shared out over cores by seed,
    OMP_NUM_THREADS=1 python -m benchmarks.learning --seeds 1 2     # each writing the table when it ends

Per seed: N = 1, 2 and 4 with the same rows in the same order for the same number of steps; N = 1 again for as many
steps as take the processor time of N = 4; and with the first seed one model whose N is drawn anew in every step, tested
at every N. A finished run leaves one JSON file and is not run again. Then a table and a plot are written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.statistic import over_seeds, spread
from sleepify.training import recipe
from sleepify.training.evaluate import Report, Score

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "recipes" / "configs" / "rule110_small.yaml"
LOOPS = (1, 2, 4)
SCHEDULE = (1, 4, 2, 4, 3, 4)
TESTED = (1, 2, 3, 4, 6, 8)
EQUAL_COMPUTE = "n1_equal_compute"
DRAWN = "drawn"
FRONTIER = 0.9


@dataclass(frozen=True)
class Run:
    """A finished run, as its file has it."""

    variant: str
    seed: int
    steps: int
    seconds: float
    cpu_seconds: float
    report: Report


class Runs:
    """Runs of one number of steps, each in its own file.

    Args:
        folder: of the files.
        steps: of the runs at equal steps.
        test_examples: rows per test.
    """

    def __init__(self, folder: Path, steps: int, test_examples: int) -> None:
        self.folder, self.steps, self.test_examples = folder, steps, test_examples

    def path(self, variant: str, seed: int) -> Path:
        """Of a run's file."""
        return self.folder / f"{variant}_seed{seed}_{self.steps}steps.json"

    def get(self, variant: str, seed: int) -> Run | None:
        """A run, if it is finished."""
        path = self.path(variant, seed)
        if not path.exists():
            return None
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Run(**{**fields, "report": Report.from_json(json.dumps(fields["report"]))})

    def of(self, variant: str) -> list[Run]:
        """All finished runs of a variant, by seed."""
        names = (path.name for path in self.folder.glob(f"{variant}_seed*_{self.steps}steps.json"))
        seeds = sorted(int(name.removeprefix(f"{variant}_seed").split("_")[0]) for name in names)
        return [run for seed in seeds if (run := self.get(variant, seed)) is not None]

    def make(self, variant: str, seed: int, steps: int, *overrides: object) -> Run:
        """Train and test, unless that is done already."""
        if (run := self.get(variant, seed)) is not None:
            return run
        print(f"--- {variant}, seed {seed}, {steps} steps", flush=True)
        options: dict[str, object] = {
            "max_steps": steps,
            "seed": seed,
            "task_seed": seed,
            "test_examples": self.test_examples,
            "output_dir": self.path(variant, seed).with_suffix(""),
        }
        argv = [str(CONFIG), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        result = recipe.run("rule110", [*argv, *map(str, overrides)])
        fields = {
            "variant": variant,
            "seed": seed,
            "steps": result.spent.train_steps,
            "seconds": result.spent.train_seconds,
            "cpu_seconds": result.spent.cpu_seconds,
            "report": json.loads(result.report.to_json()),
        }
        # Under another name until it is whole, so that a run that was stopped is run again.
        draft = self.path(variant, seed).with_suffix(".draft")
        draft.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.path(variant, seed))
        finished = self.get(variant, seed)
        assert finished is not None
        return finished


def train_all(runs: Runs, seeds: list[int]) -> None:
    """Every run of these seeds that is not done."""
    for seed in seeds:
        equal_steps = {n: runs.make(f"n{n}", seed, runs.steps, "--n_loops", n) for n in LOOPS}
        # Processor time, since other programs make wall time longer on a shared machine.
        ratio = equal_steps[max(LOOPS)].cpu_seconds / equal_steps[1].cpu_seconds
        runs.make(EQUAL_COMPUTE, seed, round(runs.steps * ratio), "--n_loops", 1)
    if 0 in seeds:
        drawn = ("--loops_schedule", *SCHEDULE, "--test_n_loops", *TESTED)
        runs.make(DRAWN, 0, runs.steps, "--n_loops", max(LOOPS), *drawn)


def accuracies(runs: list[Run], difficulty: int) -> list[float]:
    """Of one difficulty, by seed."""
    return [run.report.of(*run.report.settings[0])[difficulty].accuracy for run in runs]


def frontier(runs: list[Run]) -> int:
    """The largest t with a mean accuracy of at least `FRONTIER` (0 if there is none)."""
    return max((t for t in runs[0].report.difficulties if over_seeds(accuracies(runs, t))[0] >= FRONTIER), default=0)


def pooled(runs: list[Run], difficulty: int) -> Score:
    """The queries of all seeds together."""
    scores = [run.report.of(*run.report.settings[0])[difficulty] for run in runs]
    first = scores[0]
    correct, total = sum(s.correct for s in scores), sum(s.total for s in scores)
    return Score(first.n_loops, first.window_size, difficulty, correct, total)


def constant_guess(test_examples: int) -> dict[int, float]:
    """Accuracy of always giving the commoner answer, per t, on the test rows of seed 0."""
    task = recipe.parse("rule110", [str(CONFIG)]).task.build()
    answers: dict[int, list[int]] = {}
    for index in range(test_examples):
        example = task.example(index, "test")
        for query in example.queries:
            answers.setdefault(query.difficulty, []).append(example.input_ids[query.start])
    ones = {t: statistics.mean(bits) for t, bits in sorted(answers.items())}
    return {t: max(share, 1 - share) for t, share in ones.items()}


# --- results ----------------------------------------------------------------------------------------------------------


def label(variant: str, runs: list[Run]) -> str:
    """A variant for people."""
    steps = round(statistics.mean(run.steps for run in runs))
    return (
        f"N = 1, {steps:,} steps (compute of N = {max(LOOPS)})"
        if variant == EQUAL_COMPUTE
        else (f"N = {variant[1:]}, {steps:,} steps")
    )


def write_results(runs: Runs, docs: Path) -> None:
    """The table and the plot, of whatever is finished."""
    found = {variant: done for variant in (*(f"n{n}" for n in LOOPS), EQUAL_COMPUTE) if (done := runs.of(variant))}
    difficulties = next(iter(found.values()))[0].report.difficulties
    n_seeds = {len(done) for done in found.values()}
    guess = constant_guess(runs.test_examples)
    columns = [f"t = {t}" for t in difficulties]

    means = [["accuracy, % (95% over seeds)", "CPU seconds", "frontier", *columns]]
    counted = [["all seeds together, % (Wilson 95%)", *columns]]
    for variant, done in found.items():
        seconds = statistics.mean(run.cpu_seconds for run in done)
        cells = [spread(accuracies(done, t)) for t in difficulties]
        means.append([label(variant, done), f"{seconds:.0f}", f"t = {frontier(done)}", *cells])
        counted.append([label(variant, done), *(_interval(pooled(done, t)) for t in difficulties)])
    means.append(["the commoner answer always", "", "", *(f"{100 * guess[t]:.1f}" for t in difficulties)])
    sections = [_table(means), _table(counted)]
    if drawn := runs.get(DRAWN, 0):
        rows = [["tested with, % (Wilson 95%)", *columns]]
        for n_loops, window in drawn.report.settings:
            rows.append([f"N = {n_loops}", *(_interval(drawn.report.of(n_loops, window)[t]) for t in difficulties)])
        sections.append(
            f"One model, N drawn in every step from {', '.join(map(str, SCHEDULE))} ({drawn.steps:,} steps, seed 0):"
            f"\n\n{_table(rows)}"
        )
    docs.mkdir(parents=True, exist_ok=True)
    text = INTRODUCTION.format(
        steps=runs.steps,
        seeds=" or ".join(map(str, sorted(n_seeds))),
        rows=runs.test_examples,
        torch=torch.__version__,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        date=datetime.date.today().isoformat(),
    )
    (docs / "rule110_small.md").write_text(text + "\n\n".join(sections) + "\n", encoding="utf-8")
    _plot(found, difficulties, guess, docs / "rule110_small.png")
    print(_table(means))


INTRODUCTION = """# Rule 110, small: does sleeping longer help?

A string of 20 cells fills the window and is evicted; then its first cell after t = 1..10 steps is asked, in random
order. Qwen3 of one layer from scratch with a Gated DeltaNet layer after it, both looped; {steps:,} steps at batch 128
for every N, the same rows in the same order; then N = 1 again for as many steps as take the processor time of N = 4.
The frontier is the largest t that is answered in at least 90%. Exact match on {rows:,} held-out rows; seeds (runs per
row of the table: {seeds}) change the weights' start and the rows. Settings: `recipes/configs/rule110_small.yaml`. Made
by `python -m benchmarks.learning` ({date}, torch {torch}, {machine}, {threads} thread per run).

![accuracy by t](rule110_small.png)

"""


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def _plot(found: dict[str, list[Run]], difficulties: list[int], guess: dict[int, float], path: Path) -> None:
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for variant, done in found.items():
        spreads = [over_seeds(accuracies(done, t)) for t in difficulties]
        means, halves = [mean for mean, _ in spreads], [half or 0.0 for _, half in spreads]
        axes.errorbar(difficulties, means, yerr=halves, marker="o", capsize=3, label=label(variant, done))
    axes.plot(difficulties, [guess[t] for t in difficulties], "k:", label="the commoner answer always")
    axes.set(xlabel="t, steps of the automaton", ylabel="exact match", ylim=(0.45, 1.02), xticks=difficulties)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of every N")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds to run; none: write results only"
    )
    parser.add_argument("--test_examples", type=int, default=2000, help="held-out rows per test")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "learning", help="of the runs' files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results", help="where table and plot go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.folder, arguments.steps, arguments.test_examples)
    train_all(runs, arguments.seeds)
    write_results(runs, arguments.docs)


if __name__ == "__main__":
    main()
