"""What a task gives: token rows with labels, and the queries by which they are scored.

Every task is a pure function of ``(seed, split, index)``: the same three give the same example on every machine,
whatever was drawn before. Tasks import no torch and know nothing of models.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "test"]
Level = TypeVar("Level")
IGNORE = -100
"""Label of a token at which no prediction is asked for (the value transformers' losses skip)."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question inside an example: its difficulty and the answer's tokens ``input_ids[start:stop]``."""

    difficulty: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Example:
    """One row.

    Args:
        input_ids: T token ids.
        labels: T labels aligned with ``input_ids`` (transformers' convention: the model shifts); ``IGNORE`` elsewhere.
        queries: what is scored, in order.
    """

    input_ids: list[int]
    labels: list[int]
    queries: list[Query]


def random_stream(name: str, seed: int, split: Split, index: int) -> Random:
    """A generator that depends on these four alone (seeded from their text by SHA-512, the same everywhere).

    Raises:
        ValueError: ``index`` is negative.
    """
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
    return Random(f"{name}/{seed}/{split}/{operator.index(index)}")


def check_curriculum(rows_per_level: int) -> None:
    """Refuse what :func:`open_levels` cannot use.

    Raises:
        ValueError: not a whole number of rows.
    """
    if not isinstance(rows_per_level, int) or rows_per_level < 0:
        raise ValueError(f"curriculum: expected a whole number of rows a level, 0 for none, got {rows_per_level!r}")


def open_levels(levels: Sequence[Level], rows_per_level: int, split: Split, index: int) -> Sequence[Level]:
    """The curriculum of every task: the levels of difficulty that row ``index`` may ask for.

    In training one level is open at first and another every ``rows_per_level`` rows. The test, and a task without a
    curriculum, has them all.

    Args:
        levels: what the task calls difficult, easiest first.
        rows_per_level: the task's ``curriculum``; 0 for none. For a level every so many steps: these times the rows of
            a batch, over all ranks.
        split: of the row.
        index: of the row, 0 or more.
    """
    return levels[: 1 + index // rows_per_level] if rows_per_level and split == "train" else levels


def score(example: Example, predicted: list[int]) -> list[tuple[int, bool]]:
    """Exact match of every query: ``(difficulty, correct)``.

    Args:
        example: the row asked.
        predicted: T token ids; ``predicted[t]`` is the model's choice for position t given ``input_ids[:t]``. With
            teacher forcing, all tokens of an answer right is the same as greedy decoding giving that answer.
    """
    if len(predicted) != len(example.input_ids):
        raise ValueError(f"expected one prediction per token ({len(example.input_ids)}), got {len(predicted)}")
    return [
        (query.difficulty, predicted[query.start : query.stop] == example.input_ids[query.start : query.stop])
        for query in example.queries
    ]
