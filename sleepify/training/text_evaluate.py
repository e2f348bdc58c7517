"""Perplexity of held-out text by distance, and exact match of answers by distance.

The distance of a token is how many tokens ago the window ended in which the same pair, it and the token before it, was
last read: 0 if its keys are still there ("hard" eviction: that window is open; "sliding": it was read in the last L
tokens); "new" if the pair never was. What is further away than 0 can come back only out of fast weights. An answer's
distance is that of the last place where it stood whole. An answer is right if each of its tokens is the model's first
choice given those before it, which is what greedy decoding would find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sleepify.loss import PIECE, Asked
from sleepify.modeling import SleepForCausalLM
from sleepify.settings import check_positive
from sleepify.tasks.base import IGNORE
from sleepify.training.data import SleepCollator
from sleepify.training.evaluate import exp_of, of_all_ranks, wilson
from sleepify.training.rounds import equalise
from sleepify.training.text_data import TextRows

NEW = "new"


@dataclass
class Tally:
    """Sums over places of one distance: tokens and their negative log-likelihood; answers and how many were right."""

    tokens: int = 0
    cost: float = 0.0
    answers: int = 0
    right: int = 0

    def add(self, other: Tally) -> None:
        """Count another's in."""
        self.tokens, self.cost = self.tokens + other.tokens, self.cost + other.cost
        self.answers, self.right = self.answers + other.answers, self.right + other.right


@dataclass
class Costs:
    """Of the places of a batch that have a target: row and column, cost, whether it was the first choice."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def distances(ids: Sequence[int], window_size: int, sliding: bool = False) -> list[int | None]:
    """The distance of every token of a row; None where its pair was not read before (and for the first)."""
    found: list[int | None] = [None]
    last: dict[tuple[int, int], int] = {}
    for column in range(1, len(ids)):
        pair = (ids[column - 1], ids[column])
        found.append(_since(last.get(pair), column, window_size, sliding))
        last[pair] = column
    return found[: len(ids)]


def answer_distance(ids: Sequence[int], start: int, stop: int, window_size: int, sliding: bool = False) -> int | None:
    """The distance of an answer ids[start:stop] from the last place where it stands before; None if it does not."""
    length = stop - start
    wanted = list(ids[start:stop])
    for place in range(start - length, -1, -1):
        if list(ids[place : place + length]) == wanted:
            return _since(place + length - 1, start, window_size, sliding)
    return None


def _since(last: int | None, column: int, window_size: int, sliding: bool) -> int | None:
    """Tokens since the window of ``last`` ended, when the token before ``column`` is read."""
    if last is None:
        return None
    reading = column - 1
    is_there = reading - last < window_size if sliding else last // window_size == reading // window_size
    return 0 if is_there else reading - (last // window_size + 1) * window_size + 1


def bucket(distance: int | None, window_size: int) -> str:
    """The name of a range of distances: "new", "0", "1-L", then up to 2L, 4L, 8L ..."""
    if not distance:
        return NEW if distance is None else "0"
    low, high = 1, window_size
    while distance > high:
        low, high = high + 1, 2 * high
    return f"{low}-{high}"


def evaluate_text(
    model: nn.Module,
    rows: TextRows,
    *,
    window_size: int,
    n_loops: int | None = None,
    n_examples: int | None = None,
    batch_size: int = 1,
    pad_id: int = 0,
) -> dict[str, Any]:
    """Perplexity and exact match, together and by distance.

    In a distributed run every rank must call this; rows are shared out, and all ranks get all results.

    Args:
        model: a sleeping model, or any causal LM of transformers (also wrapped by peft or Accelerate).
        rows: held-out rows.
        window_size: L, by which distances are told; for a sleeping model its own.
        n_loops: another N; for a sleeping model only.
        n_examples: at most so many rows; None for all.
        batch_size: rows at a time on each rank.
        pad_id: to pad rows of different length with.

    Returns:
        ``perplexity``, ``perplexity_by_distance`` and, where there are answers, ``exact_match`` and
        ``exact_match_by_distance``; ready for JSON.

    Raises:
        ValueError: for a count below 1.
    """
    check_positive("batch_size", batch_size)
    if n_examples is not None:
        check_positive("n_examples", n_examples)
    rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = len(rows) if n_examples is None else min(n_examples, len(rows))
    order = sorted(range(total), key=lambda index: rows.lengths[index])
    # Every rank reads as many batches: forward passes of sharded models wait for each other.
    places = range(rank, math.ceil(total / n_ranks) * n_ranks, n_ranks)
    sleeping = _sleeping(model)
    sliding = sleeping is not None and sleeping.options().sliding
    tallies: dict[str, Tally] = {}
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(places), batch_size):
            numbers = places[first : first + batch_size]
            picked = [order[min(number, total - 1)] for number in numbers]
            costs = _costs(model, [rows[index] for index in picked], pad_id, n_loops, window_size)
            counted = [number < total for number in numbers]
            for name, tally in _tally(costs, rows, picked, counted, window_size, sliding):
                tallies.setdefault(name, Tally()).add(tally)
    finally:
        model.train(was_training)
    merged: dict[str, Tally] = {}
    for part in of_all_ranks(tallies, n_ranks):
        for name, tally in part.items():
            merged.setdefault(name, Tally()).add(tally)
    return _results(merged)


def _tally(
    costs: Costs, rows: TextRows, picked: Sequence[int], counted: Sequence[bool], window_size: int, sliding: bool
) -> Iterator[tuple[str, Tally]]:
    ids = [rows[index]["input_ids"] for index in picked]
    known = [distances(row, window_size, sliding) for row in ids]
    right: dict[tuple[int, int], bool] = {}
    for row, column, cost, hit in zip(costs.rows, costs.columns, costs.costs, costs.right, strict=True):
        right[row, column] = hit
        if row < len(picked) and counted[row]:
            yield bucket(known[row][column], window_size), Tally(1, cost)
    for row, index in enumerate(picked):
        span = rows.answer(index)
        if span and counted[row]:
            hit = all(right[row, column] for column in range(*span))
            distance = answer_distance(ids[row], span[0], span[1], window_size, sliding)
            yield bucket(distance, window_size), Tally(0, 0.0, 1, hit)


def _results(tallies: dict[str, Tally]) -> dict[str, Any]:
    def place(name: str) -> float:
        return math.inf if name == NEW else int(name.split("-")[0])

    whole = Tally()
    for tally in tallies.values():
        whole.add(tally)
    by_distance = [(name, tallies[name]) for name in sorted(tallies, key=place)]
    results: dict[str, Any] = {
        "perplexity": exp_of(whole.cost / max(1, whole.tokens)),
        "perplexity_by_distance": {
            name: {"perplexity": exp_of(each.cost / each.tokens), "tokens": each.tokens}
            for name, each in by_distance
            if each.tokens
        },
    }
    if whole.answers:
        results["exact_match"] = _share(whole)
        results["exact_match_by_distance"] = {name: _share(each) for name, each in by_distance if each.answers}
    return results


def table(results: dict[str, Any]) -> str:
    """What `evaluate_text` returns as Markdown: perplexity by distance, and exact match where there are answers."""
    if "perplexity" not in results:
        return "no held-out rows, so that nothing was tested"
    matches = results.get("exact_match_by_distance", {})
    lines = ["| tokens since the window was read | perplexity | tokens |", "|---|---|---|"]
    for name, each in results["perplexity_by_distance"].items():
        lines.append(f"| {name} | {each['perplexity']:.2f} | {each['tokens']} |")
    lines.append(f"| all | {results['perplexity']:.2f} | |")
    if "exact_match" in results:
        whole = results["exact_match"]
        parts = [f"{name}: {each['correct']} of {each['total']}" for name, each in matches.items()]
        lines.append(f"\nexact match {whole['correct']} of {whole['total']} ({'; '.join(parts)})")
    return "\n".join(lines)


def _share(tally: Tally) -> dict[str, Any]:
    accuracy, interval = tally.right / tally.answers, list(wilson(tally.right, tally.answers))
    return {"accuracy": accuracy, "correct": int(tally.right), "total": tally.answers, "interval": interval}


def _sleeping(model: nn.Module) -> SleepForCausalLM | None:
    return next((module for module in model.modules() if isinstance(module, SleepForCausalLM)), None)


@torch.no_grad()
def _costs(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], pad_id: int, n_loops: int | None, window_size: int
) -> Costs:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in SleepCollator(pad_id, "right")(rows).items()}
    sleeping = _sleeping(model)
    costs = Costs()
    if sleeping is None:
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        row, column = (batch["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)
        _note(costs, row, column, batch["labels"][row, column + 1], lambda at: logits[row[at], column[at]])
        return costs
    if dist.is_initialized() and dist.get_world_size() > 1:
        batch = equalise(batch, window_size, apart=False)
    options = {} if n_loops is None else {"n_loops": n_loops}
    with _noting(sleeping, costs):
        model(**batch, **options, use_cache=False)
    return costs


@contextmanager
def _noting(model: SleepForCausalLM, costs: Costs) -> Iterator[None]:
    """Note what every label costs, in the place of the loss. Rows are padded on the right: columns are theirs."""
    own = model.objective

    def note(asked: Asked) -> Tensor:
        there = (asked.targets != IGNORE).nonzero()[:, 0]
        row, column = (torch.from_numpy(each).to(there.device)[there] for each in (asked.rows, asked.columns))
        hidden = asked.hidden[there.to(asked.hidden.device)]
        _note(costs, row, column, asked.targets[there], lambda at: asked.blocks.logits(hidden[at]), asked.whole)
        return hidden.new_zeros(())

    model.objective = note
    try:
        yield
    finally:
        model.objective = own


def _note(
    costs: Costs,
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    logits: Callable[[slice], Tensor],
    whole: bool = False,
) -> None:
    """What targets [m] cost, by logits of some places at a time."""
    n_places = targets.shape[0]
    step = max(1, n_places) if whole else PIECE
    for first in range(0, max(1, n_places) if whole else n_places, step):
        at = slice(first, first + step)
        scores = logits(at)
        wanted = targets[at].to(scores.device)
        each = nn.functional.cross_entropy(scores.float(), wanted, reduction="none")
        costs.costs += each.tolist()
        costs.right += (scores.argmax(-1) == wanted).tolist()
    costs.rows += rows.tolist()
    costs.columns += (columns + 1).tolist()
