"""What a task gives: token rows with labels, and the queries by which they are scored.

Every task is a pure function of ``(seed, split, index)``: the same three give the same example on every machine,
whatever was drawn before. Tasks import no torch and know nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]
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
    """A generator that depends on these four alone (seeded from their text by SHA-512, the same everywhere)."""
    return Random(f"{name}/{seed}/{split}/{index}")


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
