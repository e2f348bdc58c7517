"""What sleep does inside a model that `benchmarks.worth` or the recipe has trained on Hops.

    OMP_NUM_THREADS=1 python -m benchmarks.probes outputs/worth/hops8/n4_seed0

Reads the model and the task that lies beside it, on held-out rows; writes docs/results/probes.md and its figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import RESULTS, Part, write_page
from sleepify import SleepForCausalLM, probes
from sleepify.probes import Panel
from sleepify.tasks.base import Example
from sleepify.tasks.hops import PAD, Hops
from sleepify.training.runs import TASK
from sleepify.training.task_arguments import RECIPES

FURTHER = 4
INTRODUCTION = """One model of Hops, `{name}`, trained with N = {n} and windows of {size} tokens; {rows:,} held-out rows
of {queries} queries. The pairs of a row fill {windows} window(s), which are slept on and evicted before
the first query. m is the number of passes of the last sleep, also beyond the N of training; S_m is the state that pass
m leaves, which is that of a sleep with N = m. All of it describes this one model, trained with one seed."""


class Probed:
    """A model, its task and the rows that are read.

    Args:
        folder: of the model, with the task beside it.
        n_rows: held-out rows.

    Raises:
        ValueError: for a model of another task, or one that does not sleep.
    """

    def __init__(self, folder: Path, n_rows: int) -> None:
        noted: dict[str, Any] = json.loads((folder / TASK).read_text(encoding="utf-8"))
        if noted["recipe"] != "hops":
            raise ValueError(f"expected a model trained on hops, got one of {noted['recipe']}")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        if not isinstance(loaded, SleepForCausalLM):
            raise ValueError(f"expected a model that sleeps, got {type(loaded).__name__} in {folder}")
        task = RECIPES["hops"](**noted["task"]).build(test=True)
        assert isinstance(task, Hops)
        self.folder, self.model, self.task = folder, loaded.eval(), task
        options = self.model.options()
        self.n_loops, self.window_size = options.n_loops, options.window_size
        self.passes = range(1, 2 * self.n_loops + 1)
        self.rows = [task.example(index, "test") for index in range(n_rows)]
        self.text = task.text_length

    def others(self, count: int) -> list[list[int]]:
        """For each row the text of ``count`` other held-out rows, in which the same nodes lie on other cycles."""
        texts = [row.input_ids[: self.text] for row in self.rows]
        return [
            [token for other in range(1, count + 1) for token in texts[(row + other) % len(texts)]]
            for row in range(len(texts))
        ]


def steps(probed: Probed) -> tuple[Part, Panel]:
    """How far each pass moves the state."""
    found = probes.pass_steps(
        probed.model, [row.input_ids[: probed.text + 1] for row in probed.rows], n_loops=max(probed.passes)
    )
    means = found.sizes[:, :, found.window == found.window.max()].double().mean(2)
    part = Part(
        "How far each pass moves the state",
        "||S_n - S_(n-1)|| / ||S_n|| of each looped layer, mean over rows.",
        ["layer", *(f"n = {n}" for n in probed.passes)],
    )
    lines = {}
    for (index, _), values in zip(found.layers, means.T.tolist(), strict=True):
        part.rows.append([f"inserted after {index}", *(f"{value:.3f}" for value in values)])
        lines[f"inserted after layer {index}"] = values
    return part, Panel("How far a pass moves the state", "pass n", "||S_n - S_(n-1)|| / ||S_n||", probed.passes, lines)


def answers(probed: Probed) -> tuple[Part, list[Panel]]:
    """Accuracy and entropy after every pass."""
    found = probes.answer_by_pass(probed.model, probed.rows, probed.passes, batch_size=250)
    hops = sorted(set(found[0].difficulty.tolist()))
    part = Part(
        "The answer after each pass",
        "Queries answered in per cent, by hops, and the mean entropy of the answer in nats, woken from S_m.",
        ["m", *(f"{k} hops" for k in hops), "entropy"],
    )
    for m, each in zip(probed.passes, found, strict=True):
        accuracy = [f"{100 * each.of(k).accuracy:.1f}" for k in hops]
        part.rows.append([str(m), *accuracy, f"{float(each.entropy.mean()):.3f}"])
    right = {f"{k} hops": [each.of(k).accuracy for each in found] for k in hops}
    unsure = {f"{k} hops": [float(each.of(k).entropy.mean()) for each in found] for k in hops}
    return part, [
        Panel("The answer after each pass", "passes m", "answered", probed.passes, right),
        Panel("Entropy of the answer", "passes m", "nats", probed.passes, unsure),
    ]


def stored(probed: Probed, n_fitted: int) -> tuple[Part, Panel]:
    """What a linear map reads off the state after every pass."""
    task, n_held = probed.task, len(probed.rows)
    # Late rows of the training, in which the curriculum has every level open; their pairs are what is read.
    rows = [*(task.example(index, "train") for index in range(n_fitted)), *probed.rows]
    features = probes.state_features(probed.model, [row.input_ids[: probed.text + 1] for row in rows])
    hops = range(1, task.n_nodes)
    first_node = 1 + task.max_hops
    nodes = range(first_node, first_node + task.n_nodes)
    ways = [[probes.walk(probes.successors(task, row), node, max(hops)) for node in nodes] for row in rows]
    targets = torch.tensor([[way[k] for way in row for k in hops] for row in ways])
    found = [probes.linear_probe(each, targets, held_out=n_held).unflatten(0, (task.n_nodes, -1)) for each in features]
    part = Part(
        "What the state holds, read linearly",
        f"f^k(a) of every node a by ridge regression from the matrix states S_m ({features.shape[-1]:,} numbers), "
        f"fitted on {n_fitted:,} rows of the training split and tested on the held-out ones, in per cent, mean over a. "
        f"Chance is {100 / (task.n_nodes - 1):.1f}. What a linear map does not find may still be there.",
        ["m", *(f"k = {k}" for k in hops)],
    )
    means = torch.stack(found).mean(1)
    for m, values in enumerate(means.tolist(), 1):
        part.rows.append([str(m), *(f"{100 * value:.1f}" for value in values)])
    lines = {f"k = {k}": means[:, k - 1].tolist() for k in hops}
    return part, Panel("f^k(a) read linearly off S_m", "passes m", "accuracy", range(1, len(found) + 1), lines)


def recalled(probed: Probed) -> Part:
    """Whether the model itself predicts what it has slept on."""
    rows = [row.input_ids[: probed.text] + more for row, more in zip(probed.rows, probed.others(2), strict=True)]
    found = probes.recall(probed.model, rows, probed.passes, batch_size=250)
    ages = range(found.accuracy.shape[1])
    part = Part(
        "Recall of evicted tokens",
        "The texts of three cycles are read, slept on and evicted; then each window is read again, and every token "
        "predicted from those of the window before it, in per cent of the first choices, by age in windows (0: the "
        "latest). The last row has no state. The model was not trained to do this.",
        ["m", *(f"age {age}" for age in ages)],
    )
    for m, values in zip(found.passes, found.accuracy.tolist(), strict=True):
        part.rows.append([str(m), *(f"{100 * value:.1f}" for value in values)])
    part.rows.append(["no state", *(f"{100 * value:.1f}" for value in found.without.tolist())])
    return part


def interfered(probed: Probed) -> tuple[Part, Panel]:
    """What further windows do to the first."""
    n_loops = sorted({1, 2, probed.n_loops, 2 * probed.n_loops})
    n_windows = FURTHER * probed.window_size // probed.text * probed.text // probed.window_size
    kinds = {
        "padding": [[PAD] * (n_windows * probed.window_size)] * len(probed.rows),
        "other cycles": probed.others(n_windows * probed.window_size // probed.text),
    }
    counts = range(n_windows + 1)
    part = Part(
        "Interference",
        "Answered in per cent, all hops (in brackets: one hop), when further windows are read and slept on between the "
        "row's text and its queries, all windows with N passes. Padding says nothing; texts of other cycles contradict "
        "the row's, since they have the same nodes. The model has never seen more than its own text before a query. "
        "*Decay ^ 1/N*: in every pass of a sleep but the first the looped layers forget by the N-th root of what they "
        "would, which the model was not trained with either.",
        ["read between", "N", *(f"{count} windows" for count in counts)],
    )
    lines = {}
    for kind, further in kinds.items():
        for n in n_loops:
            for less in (False, True) if n > 1 else (False,):
                with probes.later_decay(probed.model, 1 / n) if less else nullcontext():
                    found = probes.interference(probed.model, probed.rows, further, [n], batch_size=250)
                (answers,) = found.answers
                cells = [f"{100 * each.accuracy:.1f} ({100 * each.of(1).accuracy:.1f})" for each in answers]
                part.rows.append([f"{kind}, decay ^ 1/{n}" if less else kind, str(n), *cells])
                if not less:
                    lines[f"{kind}, N = {n}"] = [each.accuracy for each in answers]
    return part, Panel("Further windows before the queries", "windows", "answered", counts, lines)


def wrong(probed: Probed) -> tuple[Part, Part]:
    """Why answers are wrong."""
    part = Part(
        "Why answers are wrong",
        "Queries of two hops and more, in per cent of them. *Not retrieved*: some pair on the way is not told rightly "
        "when it is asked for by itself, as one hop, from the same state. *Not computed*: all of them are. *Too few "
        "hops*: wrong answers that name a node before the right one, in per cent of the wrong, and what would be "
        "expected if wrong answers were any other node.",
        ["m", "wrong", "not retrieved", "not computed", "too few hops", "by chance"],
    )
    n = probed.task.n_nodes
    distances = Part(
        "How far wrong answers lie, after one pass",
        f"Woken from S_1: hops asked for in rows, and how many hops lead to the answer, in per cent; {n} is the node "
        "itself. 0: no node.",
        ["asked", *map(str, range(n + 1))],
    )
    for m in probed.passes:
        found = probes.split_wrong(probed.model, probed.task, probed.rows, last_n_loops=m, batch_size=1000)
        far = probes.hops_answered(probed.task, probed.rows, found.answers)
        if m == 1:
            for k in sorted(set(far.path.tolist())):
                made = far.hops[far.path == k].bincount(minlength=n + 1).double()
                distances.rows.append([str(k), *(f"{100 * float(share):.1f}" for share in made / made.sum())])
        those = found.answers.difficulty > 1
        missed = those & ~found.answers.correct
        shares = [float(kind[those].double().mean()) for kind in (missed, found.not_retrieved, found.not_computed)]
        earlier, chance = "", ""
        if missed.any():
            earlier = f"{100 * float(far.earlier[missed].double().mean()):.1f}"
            chance = f"{100 * float((far.path[missed] - 1).double().mean()) / (n - 1):.1f}"
        part.rows.append([str(m), *(f"{100 * share:.2f}" for share in shares), earlier, chance])
    return part, distances


def attributed(probed: Probed) -> Part:
    """What each window adds to the answers."""
    others = probed.others(2)
    each = probed.text // probed.window_size
    part = Part(
        "Attribution by leaving a text out",
        "Three texts are read: the row's own, and two of other cycles, which contradict it. What the log-probability "
        "of the right answer loses when a text's windows are never read, in nats (the sum over them), mean over "
        "queries; below 0, the answer is better without.",
        ["own text", "text 1", "text 2", "text 3", "answered with all"],
    )
    for place in range(3):
        rows: list[Example] = []
        for row, more in zip(probed.rows, others, strict=True):
            behind = probes.spliced(row, probed.text, 0, more[place * probed.text :])
            rows.append(probes.spliced(behind, 0, 0, more[: place * probed.text]))
        found = probes.attribution(probed.model, rows, batch_size=250)
        losses = found.change.mean(1).unflatten(0, (3, each)).sum(1).tolist()
        part.rows.append([str(place + 1), *(f"{loss:+.2f}" for loss in losses), f"{100 * found.whole.accuracy:.1f}"])
    return part


def main(argv: Sequence[str] | None = None) -> None:
    """Probe, then write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model of hops")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows to read")
    parser.add_argument("--fitted", type=int, default=600, help="rows of training that linear probes are fitted on")
    parser.add_argument("--output", type=Path, default=RESULTS / "probes.md", help="where the page goes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    probed = Probed(arguments.model, arguments.rows)
    moved, moves = steps(probed)
    answered, curves = answers(probed)
    held, read = stored(probed, arguments.fitted)
    between, forgets = interfered(probed)
    parts = [moved, answered, held, recalled(probed), between, *wrong(probed), attributed(probed)]
    figure = arguments.output.with_suffix(".png")
    probes.plot([moves, *curves, read, forgets], figure)
    name = "/".join(arguments.model.resolve().parts[-2:])
    intro = INTRODUCTION.format(
        name=name,
        n=probed.n_loops,
        size=probed.window_size,
        rows=arguments.rows,
        queries=probed.task.n_queries,
        windows=probed.text // probed.window_size,
    )
    command = f"python -m benchmarks.probes outputs/worth/{name} --rows {arguments.rows} --fitted {arguments.fitted}"
    if arguments.output.name != "probes.md":
        command += f" --output docs/results/{arguments.output.name}"
    pictures = f"{intro}\n\n![steps, answers, what is read off the state, interference]({figure.name})"
    write_page(arguments.output, title="Probes: inside a sleep", command=command, intro=pictures, parts=parts)
    print(arguments.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
