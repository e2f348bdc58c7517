"""Exact match by difficulty, at any N and window, from one checkpoint; and perplexity, to see side effects.

A query counts as answered if every token of its answer is the model's first choice given the tokens before it, in one
wake pass: the same as greedy decoding giving exactly this answer. Intervals are Wilson's, at 95%.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sleepify.config import SleepConfig
from sleepify.defaults import resolve
from sleepify.modeling import SleepForCausalLM
from sleepify.rows import NO_COLUMNS
from sleepify.settings import check_positive
from sleepify.tasks.base import IGNORE, Example, Split, score
from sleepify.training.data import SleepCollator, Task
from sleepify.training.rounds import equalise

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95% interval."""


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: (lowest, highest).

    Raises:
        ValueError: unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"expected 0 <= correct <= total and total >= 1, got {correct} of {total}")
    share, weight = correct / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Score:
    """How many queries of one difficulty were answered at one N and window.

    Args:
        n_loops: N; 1 for a model that does not sleep.
        window_size: L; None for a model that does not sleep.
        difficulty: of the queries.
        correct: queries answered.
        total: queries asked.
    """

    n_loops: int
    window_size: int | None
    difficulty: int
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the queries answered."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.total)


@dataclass(frozen=True)
class Report:
    """Result of `evaluate`.

    Args:
        task: the task's class.
        difficulty_name: what makes its queries hard ("steps", "hops", "operations").
        split: of the examples.
        n_examples: rows read per setting.
        scores: one per setting and difficulty, settings in the order asked, difficulties ascending.
        answered: per setting, a digit for every query in the order of the rows: 1 where it was answered. For tests that
            compare two models query by query.
    """

    task: str
    difficulty_name: str
    split: str
    n_examples: int
    scores: list[Score]
    answered: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[tuple[int, int | None]]:
        """(N, window) in the order asked."""
        return list(dict.fromkeys((s.n_loops, s.window_size) for s in self.scores))

    @property
    def difficulties(self) -> list[int]:
        """All difficulties that were asked, ascending."""
        return sorted({s.difficulty for s in self.scores})

    def of(self, n_loops: int, window_size: int | None) -> dict[int, Score]:
        """Scores of one setting by difficulty."""
        return {s.difficulty: s for s in self.scores if (s.n_loops, s.window_size) == (n_loops, window_size)}

    def to_json(self) -> str:
        """With accuracy and interval beside the counts, for readers; `from_json` takes the counts."""
        fields = asdict(self)
        fields["scores"] = [asdict(s) | {"accuracy": s.accuracy, "interval": list(s.interval)} for s in self.scores]
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote."""
        fields = json.loads(text)
        names = ("n_loops", "window_size", "difficulty", "correct", "total")
        fields["scores"] = [Score(**{name: row[name] for name in names}) for row in fields["scores"]]
        return cls(**fields)

    def table(self) -> str:
        """Markdown: a row per setting, a column per difficulty; accuracy and its interval in per cent."""
        head = [f"{self.difficulty_name} =", *map(str, self.difficulties)]
        lines = [head, ["---"] * len(head)]
        for setting in self.settings:
            scores = self.of(*setting)
            lines.append([_label(*setting), *(_cell(scores.get(d)) for d in self.difficulties)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _label(n_loops: int, window_size: int | None) -> str:
    return f"N = {n_loops}" + ("" if window_size is None else f", L = {window_size}")


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    n_examples: int,
    split: Split = "test",
    n_loops: Sequence[int] | None = None,
    window_sizes: Sequence[int] | None = None,
    batch_size: int = 32,
    pad_id: int = 0,
) -> Report:
    """Exact match by difficulty, for every N with every window.

    In a distributed run every rank must call this; rows are shared out, and all ranks get the whole report.

    Args:
        model: a sleeping model, or any causal LM of transformers (also wrapped by peft or Accelerate).
        task: of `sleepify.tasks`, or another whose examples have queries.
        n_examples: rows to read, the first of the split.
        split: "train" or "test".
        n_loops: numbers of loops; None for the model's own.
        window_sizes: windows; None for the model's own.
        batch_size: rows at a time on each rank.
        pad_id: to pad rows of different length with.

    Raises:
        ValueError: for a count below 1, a window that the base does not support, or N and windows of a model that
            does not sleep.
    """
    check_positive("n_examples", n_examples)
    check_positive("batch_size", batch_size)
    settings = settings_of(model, n_loops, window_sizes)
    # Per setting: row, difficulty, answered.
    found: list[list[tuple[int, int, bool]]] = [[] for _ in settings]
    rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Every rank reads as many batches: forward passes of sharded models wait for each other.
    share = range(rank, math.ceil(n_examples / n_ranks) * n_ranks, n_ranks)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(share), batch_size):
            indices = share[first : first + batch_size]
            examples = [task.example(index, split) for index in indices]
            for (loops, window), answers in zip(settings, found, strict=True):
                predicted = _predict(model, examples, pad_id, loops, window)
                for index, example, choices in zip(indices, examples, predicted, strict=True):
                    answers += [(index, *scored) for scored in score(example, choices) if index < n_examples]
    finally:
        model.train(was_training)
    scores, answered = [], []
    for (loops, window), *parts in zip(settings, *of_all_ranks(found, n_ranks), strict=True):
        # Stable: queries of one row stay in their order.
        answers = sorted((answer for part in parts for answer in part), key=operator.itemgetter(0))
        answered.append("".join(str(int(correct)) for _, _, correct in answers))
        for difficulty in sorted({asked for _, asked, _ in answers}):
            correct = [right for _, asked, right in answers if asked == difficulty]
            scores.append(Score(loops or 1, window, difficulty, sum(correct), len(correct)))
    name = getattr(task, "difficulty_name", "difficulty")
    return Report(type(task).__name__, name, split, n_examples, scores, answered)


def of_all_ranks(found: Any, n_ranks: int) -> list[Any]:
    """What each rank found, by rank."""
    gathered: list[Any] = [found]
    if n_ranks > 1:
        gathered = [None] * n_ranks
        dist.all_gather_object(gathered, found)
    return gathered


def settings_of(
    model: nn.Module, n_loops: Sequence[int] | None, window_sizes: Sequence[int] | None
) -> list[tuple[int | None, int | None]]:
    """(N, L) to evaluate at; (None, None) for a model that does not sleep.

    Raises:
        ValueError: for numbers that the model cannot have, or any of a model that does not sleep.
    """
    sleeping = _unwrap(model)
    if not isinstance(sleeping, SleepForCausalLM):
        if n_loops is not None or window_sizes is not None:
            raise ValueError(
                f"expected a sleeping model to choose n_loops and window_sizes of, got {type(sleeping).__name__}, "
                "which has neither; leave them out"
            )
        return [(None, None)]
    n_loops = [sleeping.config.n_loops] if n_loops is None else list(n_loops)
    window_sizes = [sleeping.config.window_size] if window_sizes is None else list(window_sizes)
    for name, values in (("n_loops", n_loops), ("window_sizes", window_sizes)):
        if not values:
            raise ValueError(f"expected at least one number in {name}, got none; leave it out for the model's own")
        for value in values:
            check_positive(name, value)
    for window in window_sizes:
        with at_window(sleeping, window):
            pass
    return [(loops, window) for window in window_sizes for loops in n_loops]


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch, Accelerate, DeepSpeed and peft."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@contextmanager
def at_window(model: SleepForCausalLM, window_size: int) -> Iterator[None]:
    """The model with another window, checked against its base."""
    config = cast(SleepConfig, model.config)
    own, config.window_size = config.window_size, window_size
    try:
        resolve(config)
        yield
    finally:
        config.window_size = own


@torch.no_grad()
def _predict(
    model: nn.Module, examples: Sequence[Example], pad_id: int, n_loops: int | None, window_size: int | None
) -> list[list[int]]:
    """The model's choice for every position of an answer, -1 at all others; one list of T per example."""
    device = next(model.parameters()).device
    answers = [[t for query in example.queries for t in range(query.start, query.stop)] for example in examples]
    rows = [
        {
            "input_ids": example.input_ids,
            "labels": [t if i in places else IGNORE for i, t in enumerate(example.input_ids)],
        }
        for example, places in zip(examples, map(set, answers), strict=True)
    ]
    # Padded on the right, a token is in the column of its place, and what predicts it in the one before.
    batch = {name: tensor.to(device) for name, tensor in SleepCollator(pad_id, "right")(rows).items()}
    columns = {t - 1 for places in answers for t in places}
    arguments: dict[str, Any] = {"use_cache": False}
    context: AbstractContextManager[None] = nullcontext()
    if n_loops is not None and window_size is not None:
        sleeping = _unwrap(model)
        assert isinstance(sleeping, SleepForCausalLM)
        arguments["n_loops"], context = n_loops, at_window(sleeping, window_size)
        if dist.is_initialized() and dist.get_world_size() > 1:
            batch = equalise(batch, window_size, apart=False)
            columns |= set(batch.pop("logits_to_keep", torch.zeros(0)).tolist())
    del batch["labels"]
    order = sorted(columns)
    with context:
        logits: Tensor = model(**batch, **arguments, logits_to_keep=torch.tensor(order, device=device)).logits
    choices = dict(zip(order, logits.argmax(-1).T.tolist(), strict=True))
    return [
        [choices[t - 1][row] if t in places else -1 for t in range(len(example.input_ids))]
        for row, (example, places) in enumerate(zip(examples, map(set, answers), strict=True))
    ]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Sequence[int], *, context: int, n_loops: int | None = None) -> float:
    """exp of the mean negative log-likelihood per token of a text, each piece of it read afresh.

    Args:
        model: as in `evaluate`.
        ids: the text's tokens.
        context: tokens per piece; a sleeping model sleeps within a piece as its windows fill. The first token of a
            piece is not predicted.
        n_loops: another N.

    Raises:
        ValueError: for a text of fewer than two tokens, or pieces of fewer than two.
    """
    if context < 2 or len(ids) < 2:
        raise ValueError(f"expected a text and pieces of at least two tokens, got {len(ids)} and context={context}")
    device = next(model.parameters()).device
    options: dict[str, Any] = {} if n_loops is None else {"n_loops": n_loops}
    if isinstance(_unwrap(model), SleepForCausalLM):
        options["logits_to_keep"] = NO_COLUMNS
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(ids) - 1, context):
            piece = torch.tensor([list(ids[first : first + context])], device=device)
            if "logits_to_keep" in options and dist.is_initialized() and dist.get_world_size() > 1:
                # All ranks read the same.
                options["awake"] = torch.zeros_like(piece, dtype=torch.bool)
            loss = model(input_ids=piece, labels=piece, use_cache=False, **options).loss
            total += float(loss) * (piece.shape[1] - 1)
            count += piece.shape[1] - 1
    finally:
        model.train(was_training)
    return exp_of(total / count)


def exp_of(cost: float) -> float:
    """The perplexity at a mean cost; infinity where it is no number that there is."""
    try:
        return math.exp(cost)
    except OverflowError:
        return math.inf


def check_image(path: str | os.PathLike) -> None:
    """See that matplotlib can write an image of this name.

    Raises:
        ValueError: if not, naming the endings that there are.
        ImportError: without matplotlib, which the extra ``train`` brings.
    """
    known = _figure().canvas.get_supported_filetypes()
    if (ending := Path(path).suffix.removeprefix(".").lower()) not in known:
        raise ValueError(f"expected an image's name that ends in one of {', '.join(sorted(known))}, got {ending!r}")


def plot(report: Report, path: str | os.PathLike) -> None:
    """Accuracy against difficulty, a line per setting with its intervals; the ending of ``path`` chooses the format.

    Raises:
        ImportError: without matplotlib, which the extra ``train`` brings.
    """
    figure = _figure()
    axes = figure.subplots()
    for setting in report.settings:
        scores = list(report.of(*setting).values())
        accuracy = [s.accuracy for s in scores]
        below = [max(0.0, s.accuracy - s.interval[0]) for s in scores]
        above = [max(0.0, s.interval[1] - s.accuracy) for s in scores]
        steps = [s.difficulty for s in scores]
        axes.errorbar(steps, accuracy, yerr=[below, above], marker="o", capsize=3, label=_label(*setting))
    axes.set(xlabel=report.difficulty_name, ylabel="exact match", ylim=(-0.02, 1.02), title=report.task)
    axes.set_xticks(report.difficulties)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sleepify[train]'") from error
    return Figure(figsize=(6.4, 4.0), layout="constrained")
