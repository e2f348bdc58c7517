"""docs/results/worth.md and its figures, of whatever runs of `benchmarks.worth` are finished."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from math import inf
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import worth_costs
from benchmarks.arms import ARMS, Arm
from benchmarks.report import Part, write_page
from benchmarks.statistic import mcnemar, over_seeds, spread
from benchmarks.worth_costs import Cost
from benchmarks.worth_runs import FINISHED, MODELS, Run, finished, words_of
from benchmarks.worth_settings import CONFIGS, SETTINGS, Setting
from sleepify.files import written_beside
from sleepify.tasks.gsm_infinite import GsmInfinite, Problem, solve
from sleepify.training import recipe
from sleepify.training.data import Task
from sleepify.training.model_arguments import load_tokenizer
from sleepify.training.runs import MERGED

OURS = "n4"
ALONE = ("n1", "n2", "n4")
"""Arms trained for one N."""
FRONTIER = 0.9
Group = tuple[Any, ...]
"""Of queries: what puts it in order, then its heading."""
READING = {"n_reads", "n_windows", "window_size", "retrieve_tokens", "summary_tokens"}
"""Fields by which an arm changes what is read before the question."""
_DRAWN: dict[tuple[str, int], list[Problem]] = {}
INTRODUCTION = """All arms of a setting begin with one base, which the same recipe has pretrained with full attention on
the easy part of the task, and are trained on the same rows in the same order; "compute of N = 4" is N = 1 trained on
until it has taken the processor time of N = 4. Exact match on held-out rows in per cent; of two seeds both, of more
their mean with Student's 95% interval. *Frontier*: up to where at least 90% are answered. A p is McNemar's, exact and
two-sided, on the answers to the same queries, N = 4 against that arm, the largest over seeds. CPU seconds are of one
thread of a machine that did other work too, up to the last test on the way and carried on by the steps after it.
Learning rates are those of the YAML files (hops: Muon 0.01, AdamW 0.002), tuned for no arm; rows that say so show what
half and twice of them do, and are not drawn. Runs: `docs/results/runs/worth`."""


def arms_of(setting: Setting) -> dict[str, list[Run]]:
    """The finished runs of each arm that has any, as far as they are reported."""
    found = {name: runs for name in setting.arms if (runs := finished(setting.name, name))}
    return found if setting.asked == inf else {name: [_cut(setting, run) for run in found[name]] for name in found}


def _cut(setting: Setting, run: Run) -> Run:
    """A run without the difficulties that its training never got to."""
    counted = _counted(setting, run)
    report = replace(
        run.report,
        scores=[score for score in run.report.scores if score.difficulty <= setting.asked],
        answered=["".join(compress(digits, counted)) for digits in run.report.answered],
    )
    levels = len(report.difficulties)
    curve = [replace(point, accuracy=[row[:levels] for row in point.accuracy]) for point in run.curve]
    return replace(run, report=report, curve=curve)


def _counted(setting: Setting, run: Run) -> list[bool]:
    """Of each query of a run's test, whether it is reported."""
    task, _ = task_of(setting, ARMS[OURS], run.seed)
    rows = (task.example(index, "test").queries for index in range(run.report.n_examples))
    return [query.difficulty <= setting.asked for queries in rows for query in queries]


def accuracies(runs: list[Run], difficulty: int) -> list[float]:
    """Of one difficulty, by seed."""
    return [run.report.of(*run.report.settings[0])[difficulty].accuracy for run in runs]


def frontier(difficulties: Sequence[int], accuracy: Sequence[Sequence[float]]) -> int:
    """The largest difficulty up to which every one is answered in at least `FRONTIER` of the queries.

    Args:
        difficulties: ascending.
        accuracy: of each, by seed.
    """
    reached = 0
    for difficulty, by_seed in zip(difficulties, accuracy, strict=True):
        if over_seeds(by_seed)[0] < FRONTIER:
            break
        reached = difficulty
    return reached


def paired(ours: list[Run], theirs: list[Run]) -> str:
    """Queries that only N = 4 and only the other answered, and the largest p over the seeds that both have.

    Where another is ahead in one seed and N = 4 in another, each seed's counts stand for themselves.
    """
    by_seed = {run.seed: run for run in theirs}
    tests = [
        mcnemar(run.report.answered[0], other.report.answered[0])
        for run in ours
        if (other := by_seed.get(run.seed)) is not None
    ]
    if not tests:
        return ""
    p = max(test[2] for test in tests)
    if len({won > lost for won, lost, _ in tests if won != lost}) > 1:
        counts = ", ".join(f"{won:,} : {lost:,}" for won, lost, _ in tests)
        return f"seeds differ: {counts}, p {_p(p)}"
    won, lost = (sum(test[place] for test in tests) for place in (0, 1))
    return f"{won:,} : {lost:,}, p {_p(p)}"


def _p(p: float) -> str:
    return "< 1e-6" if p < 1e-6 else f"= {p:.2g}"


def result_part(setting: Setting) -> Part:
    """Accuracy by difficulty, a row per arm."""
    found = arms_of(setting)
    difficulties = next(iter(found.values()))[0].report.difficulties
    part = Part(
        setting.title,
        f"{setting.intro}\n\n![accuracy by difficulty, and over training](worth_{setting.name}.png)",
        ["arm", "seeds", "steps", "CPU s", "frontier", *map(str, difficulties), "N = 4 only : it only"],
    )
    for name, runs in found.items():
        reached = [accuracies(runs, difficulty) for difficulty in difficulties]
        cells = [spread(values) for values in reached]
        steps, seconds = runs[0].steps, statistics.mean(run.cpu_seconds for run in runs)
        against = "" if name == OURS or OURS not in found else paired(found[OURS], runs)
        part.rows.append(
            [
                ARMS[name].label,
                str(len(runs)),
                f"{steps:,}",
                f"{seconds:,.0f}",
                str(frontier(difficulties, reached)),
                *cells,
                against,
            ]
        )
    return part


def any_n_part(setting: Setting) -> Part | None:
    """One checkpoint for every N, a row per model and N it was tested with, beside the models trained for one N."""
    found = arms_of(setting)
    several = {name: runs for name, runs in found.items() if len(runs[0].report.settings) > 1}
    if not several:
        return None
    difficulties = next(iter(found.values()))[0].report.difficulties
    part = Part(
        f"{setting.title}: one checkpoint for every N",
        "Models that were trained to be woken after any pass, tested with other N, beside models that were trained for "
        "one N alone.",
        ["trained", "seeds", "tested with", "frontier", *map(str, difficulties)],
    )
    alone = {name: found[name] for name in ALONE if name in found}
    for name, runs in (alone | several).items():
        for setting_of_test in sorted(runs[0].report.settings):
            reached = [[run.report.of(*setting_of_test)[each].accuracy for run in runs] for each in difficulties]
            cells = [spread(values) for values in reached]
            part.rows.append(
                [
                    ARMS[name].label,
                    str(len(runs)),
                    f"N = {setting_of_test[0]}",
                    str(frontier(difficulties, reached)),
                    *cells,
                ]
            )
    return part


def cost_part(setting: Setting) -> Part:
    """What each arm costs when the question comes; measured again where models of the first seed are at hand."""
    path = FINISHED / setting.name / "costs.json"
    costs = worth_costs.read(path)
    seed = setting.seeds[0]
    at_hand = {
        name: folder
        for name in arms_of(setting)
        if (folder := MODELS / setting.name / f"{name}_seed{seed}").exists() and name not in costs
    }
    for name, folder in at_hand.items():
        # What LoRA has trained lies folded in beside its adapters.
        whole = folder / MERGED if (folder / MERGED).exists() else folder
        costs[name] = worth_costs.measure(whole, text_of(setting, ARMS[name], seed))
    if at_hand:
        worth_costs.write(costs, path)
    part = Part(
        f"{setting.title}: what it costs",
        "One row, when its text has been read and the question comes: operations of matrix products to read it (sleep "
        "included), bytes held in float32, and processor time of one more token.",
        ["arm", "tokens read", "million operations", "bytes of keys and values", "bytes of state", "ms per token"],
    )
    for name in (name for name in setting.arms if name in costs):
        cost: Cost = costs[name]
        part.rows.append(
            [
                ARMS[name].label,
                str(cost.tokens),
                f"{cost.operations / 1e6:.1f}",
                f"{cost.cache_bytes:,}",
                f"{cost.state_bytes:,}",
                f"{cost.token_seconds * 1e3:.2f}",
            ]
        )
    return part


def task_of(setting: Setting, arm: Arm, seed: int) -> tuple[Task, int]:
    """The test of an arm, and the window in which its rows are read."""
    reads = {name: value for name, value in arm.changes.items() if name in READING}
    changes = {"task_seed": seed, **setting.changes, **setting.tuned_changes, **reads}
    parsed = recipe.parse(None, [str(CONFIGS / setting.config), *words_of(changes)])
    assert not isinstance(parsed.task, recipe.DatasetArguments)
    tokenizer = load_tokenizer(parsed.model) if parsed.task.reads_text else None
    return parsed.task.build(test=True, tokenizer=tokenizer), parsed.sleep.settings()["window_size"]


def text_of(setting: Setting, arm: Arm, seed: int) -> list[int]:
    """What an arm reads before the first question: whole windows."""
    task, window = task_of(setting, arm, seed)
    example = task.example(0, "test")
    return example.input_ids[: (example.queries[0].start - 1) // window * window]


def _problems(task: GsmInfinite, index: int) -> list[Problem]:
    """Of a test row; drawn once, since most draws belong to the other split and are thrown away."""
    if (key := (repr(task), index)) not in _DRAWN:
        _DRAWN[key] = task.problems(index, "test")
    return _DRAWN[key]


def evictions_part(setting: Setting) -> Part | None:
    """Accuracy by how many windows a sleeping model has evicted when it answers; None where that is one number."""

    def evicted(task: Task, index: int, window: int) -> list[Group]:
        if isinstance(task, GsmInfinite):
            assert task.prompt is not None
            first, *further = _problems(task, index)
            example = task.prompt.example(first, further)
        else:
            example = task.example(index, "test")
        counts = [(query.start - 1) // window for query in example.queries]
        return [(count, f"{count} evicted") for count in counts]

    return _grouped_part(
        setting,
        "by evictions",
        "The same answers by the number of windows that the sleeping model has evicted when it gives them (its rows; "
        "the other arms answer the same queries), all difficulties together.",
        evicted,
    )


def chains_part(setting: Setting) -> Part | None:
    """Accuracy by how many sentences of a problem must be gone through one after the other; None for other tasks."""

    def chain(task: Task, index: int, _: int) -> list[Group]:
        if not isinstance(task, GsmInfinite):
            return [(0, "")]
        asked = _problems(task, index)
        chains = [solve(each.problem, each.question).chain for each in asked]
        if task.n_questions == 1:
            return [(chain, f"chain of {chain}") for chain in chains]
        return [(n > 0, chain, f"{'other' if n else 'own'}, chain of {chain}") for n, chain in enumerate(chains)]

    several = task_of(setting, ARMS[OURS], setting.seeds[0])[0]
    own = (
        " *Own*: what the problem was made to ask; all of it but the distractors leads there. *Other*: a quantity on "
        "the way, for which the model must tell what leads there from what does not."
    )
    return _grouped_part(
        setting,
        "by chain",
        "The same answers by the longest chain of sentences, each of which needs the one before, that an answer ends: "
        "what a model with few layers cannot look up all at once."
        + (own if isinstance(several, GsmInfinite) and several.n_questions > 1 else ""),
        chain,
    )


def _grouped_part(
    setting: Setting, title: str, text: str, groups_of: Callable[[Task, int, int], list[Group]]
) -> Part | None:
    """Accuracy by a property of the queries; None where all have the same.

    Args:
        setting: whose arms.
        title, text: of the part.
        groups_of: the groups of a row's queries, of the task, the row's number and the window.
    """
    found = arms_of(setting)
    by_seed: dict[int, list[Group]] = {}
    for run in (run for runs in found.values() for run in runs if run.seed not in by_seed):
        task, window = task_of(setting, ARMS[OURS], run.seed)
        rows = range(run.report.n_examples)
        groups = (group for index in rows for group in groups_of(task, index, window))
        by_seed[run.seed] = list(groups if setting.asked == inf else compress(groups, _counted(setting, run)))
    counts = Counter(group for groups in by_seed.values() for group in groups)
    columns = sorted(counts)
    if len(columns) < 2:
        return None
    headings = [f"{column[-1]} ({counts[column]:,})" for column in columns]
    part = Part(f"{setting.title}: {title}", f"{text} In brackets: queries, of all seeds.", ["arm", "seeds", *headings])
    for name, runs in found.items():
        cells = []
        for column in columns:
            answered = [
                [int(digit) for digit, group in zip(run.report.answered[0], by_seed[run.seed], strict=True)
                 if group == column] for run in runs
            ]  # fmt: skip
            cells.append(spread([statistics.mean(digits) for digits in answered]))
        part.rows.append([ARMS[name].label, str(len(runs)), *cells])
    return part


def plot(setting: Setting, path: Path) -> None:
    """Accuracy by difficulty with the range of its seeds, and the mean over all against processor time."""
    found = {name: runs for name, runs in arms_of(setting).items() if ARMS[name].drawn}
    palette = colormaps["tab10" if len(found) <= 10 else "tab20"]
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    by_difficulty, over_time = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(found.items()):
        difficulties = runs[0].report.difficulties
        seeds = [accuracies(runs, difficulty) for difficulty in difficulties]
        means = [statistics.mean(each) for each in seeds]
        # From the lowest seed to the highest: an interval of three that differ is wider than the figure.
        reach = [[mean - min(each) for mean, each in zip(means, seeds, strict=True)],
                 [max(each) - mean for mean, each in zip(means, seeds, strict=True)]]  # fmt: skip
        # Ours above the others, where they meet.
        style = {"linewidth": 2.2, "zorder": 4} if name == OURS else {"linewidth": 1.2, "zorder": 3}
        style |= {"marker": "o", "capsize": 2, "color": palette(number)}
        by_difficulty.errorbar(difficulties, means, yerr=reach, label=ARMS[name].label, **style)
        for run in runs:
            _curve(over_time, run, palette(number))
    name = next(iter(found.values()))[0].report.difficulty_name
    by_difficulty.set(
        xlabel=name, ylabel="exact match, mean and range of seeds", ylim=(-0.02, 1.02), xticks=difficulties
    )
    over_time.set(xlabel="CPU seconds of training", ylabel="exact match, mean over all", ylim=(-0.02, 1.02))
    # Below both, where it hides no curve.
    figure.legend(*by_difficulty.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    for axes in (by_difficulty, over_time):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as draft:
        figure.savefig(draft, dpi=110, format="png")


def _curve(axes: Axes, run: Run, colour: tuple[float, ...]) -> None:
    points = [(point.cpu_seconds, statistics.mean(point.accuracy[0])) for point in run.curve]
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.0, alpha=0.8)


def write(docs: Path) -> None:
    """The page and a figure per setting."""
    parts = []
    for setting in SETTINGS.values():
        if arms_of(setting):
            plot(setting, docs / f"worth_{setting.name}.png")
            made = (result_part, evictions_part, chains_part, any_n_part, cost_part)
            parts += [part for make in made if (part := make(setting)) is not None]
    page = docs / "worth.md"
    write_page(page, title="What sleep is worth", command="python -m benchmarks.worth", intro=INTRODUCTION, parts=parts)
    print(page.read_text(encoding="utf-8"))
