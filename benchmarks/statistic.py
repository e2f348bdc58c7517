"""Intervals over seeds and tests of pairs, for the tables of experiments."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Quantile 0.975 of Student's t for 1, 2, 3 ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of Student's 95% interval over seeds (None for fewer than three: of two it says nothing)."""
    if len(values) < 3:
        return statistics.mean(values), None
    student = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return statistics.mean(values), student * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """Of seeds for a table, in per cent: "98.4" of one, "98.4 / 97.0" of two, "98.4 ± 0.7" of more."""
    mean, half = over_seeds(values)
    if half is None:
        return " / ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def mcnemar(ours: str, theirs: str) -> tuple[int, int, float]:
    """The exact test of McNemar on answers to the same queries.

    Args:
        ours: a digit per query, 1 where it was answered.
        theirs: the same of another model.

    Returns:
        Queries that only we answered, those that only they did, and the two-sided p of so unequal a split.

    Raises:
        ValueError: for unequal numbers of queries.
    """
    pairs = list(zip(ours, theirs, strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    total = won + lost
    tail = sum(math.comb(total, i) for i in range(min(won, lost) + 1))
    return won, lost, min(1.0, 2 * tail / 2**total)
