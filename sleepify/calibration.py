"""The threshold of ``n_loops="auto"``, from held-out text and how many passes it shall take on average."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sleepify.convergence import FEWEST, step_sizes, unrest
from sleepify.generation import left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.recording import recorded
from sleepify.rows import NO_COLUMNS
from sleepify.settings import check_positive


def calibrate(
    model: SleepForCausalLM,
    rows: Sequence[Sequence[int] | Tensor],
    *,
    mean_n_loops: float,
    batch_size: int = 8,
) -> float:
    """The threshold under which sleeps with ``n_loops="auto"`` take so many passes on average.

    Every row is read once, with all N passes of the model's configuration, and it is recorded how far each pass moves
    the state; which threshold gives which mean follows from that. In use every sleep begins from what earlier ones
    left after fewer passes, so the mean over other texts, and over long ones, is near the one asked for and not it.

    Args:
        model: which sleeps; nothing of it is changed. Put the result into ``model.config.auto_threshold``.
        rows: held-out texts as ids [T], each longer than a window.
        mean_n_loops: passes per sleep, from 3 (two changes of the step take so many) to the model's N.
        batch_size: rows that are read at a time.

    Returns:
        The threshold whose mean over these texts is nearest.

    Raises:
        TypeError: for a model that does not sleep.
        ValueError: for a mean that cannot be, a model of N = 3 or less, or texts in which nothing sleeps.

    Example:
        >>> model.config.auto_threshold = sleepify.calibrate(model, held_out, mean_n_loops=3.5)
        >>> model(input_ids, n_loops="auto")
    """
    if not isinstance(model, SleepForCausalLM):
        raise TypeError(f"expected a model that sleeps, got {type(model).__name__}; sleepify(model) makes one")
    n_loops = model.options().n_loops
    if n_loops <= FEWEST:
        raise ValueError(f"expected a model of N = {FEWEST + 1} or more, got N = {n_loops}: there is nothing to choose")
    known = isinstance(mean_n_loops, (int, float)) and not isinstance(mean_n_loops, bool)
    if not known or not FEWEST <= mean_n_loops <= n_loops:
        raise ValueError(f"expected mean_n_loops from {FEWEST} to the model's N = {n_loops}, got {mean_n_loops!r}")
    check_positive("batch_size", batch_size)
    texts = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    if not texts or any(text.dim() != 1 or not len(text) for text in texts):
        raise ValueError("expected rows of ids, each of one dimension and not empty")
    recorded = _record(model, texts, batch_size)
    if not recorded:
        longest = max(map(len, texts))
        raise ValueError(f"expected texts longer than a window of {model.options().window_size} tokens, got {longest}")
    return _threshold(recorded, mean_n_loops, n_loops)


def mean_passes(recorded: Sequence[Sequence[float]], threshold: float, n_loops: int) -> float:
    """The mean number of passes of sleeps whose passes moved the state by these [r_1, r_2, ...]."""
    return sum(_passes(_lowest(steps), threshold, n_loops) for steps in recorded) / len(recorded)


def _lowest(steps: Sequence[float]) -> list[float]:
    return [unrest(steps[:made]) for made in range(FEWEST, len(steps) + 1)]


def _passes(levels: Sequence[float], threshold: float, n_loops: int) -> int:
    return next((FEWEST + place for place, level in enumerate(levels) if level < threshold), n_loops)


def _threshold(recorded: Sequence[Sequence[float]], wanted: float, n_loops: int) -> float:
    """Between two levels at which some row stops earlier: the fewer, the higher the threshold."""
    levels = sorted({level for steps in recorded for level in _lowest(steps) if level > 0})
    if not levels:
        return torch.finfo(torch.float32).tiny
    between = [(low + high) / 2 for low, high in zip(levels, levels[1:], strict=False)]
    candidates = [levels[0] / 2, *between, levels[-1] * 2]
    place = bisect_left(candidates, -wanted, key=lambda threshold: -mean_passes(recorded, threshold, n_loops))
    near = candidates[max(0, place - 1) : place + 1]
    return min(near, key=lambda threshold: abs(mean_passes(recorded, threshold, n_loops) - wanted))


def _record(model: SleepForCausalLM, texts: Sequence[Tensor], batch_size: int) -> list[list[float]]:
    """r_1 ... r_(N-1) of every sleep that reading these texts takes."""
    steps, loop_range = [], model.options().loop_range
    for first in range(0, len(texts), batch_size):
        ids, mask = left_padded([text.to(model.device) for text in texts[first : first + batch_size]])
        with recorded(model) as slept:
            model(ids, attention_mask=mask, use_cache=True, logits_to_keep=NO_COLUMNS)
        for each in slept:
            pairs = pairwise(each.memories[:-1])
            steps.append([float(step_sizes(had, now, loop_range)) for had, now in pairs])
    return steps
