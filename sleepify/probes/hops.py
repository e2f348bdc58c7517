"""Wrong answers of Hops: which other node they name, and whether the facts that they need could be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleepify.modeling import SleepForCausalLM
from sleepify.probes.answers import Answers, answer
from sleepify.tasks.base import IGNORE, Example, Query
from sleepify.tasks.hops import Hops


@dataclass(frozen=True)
class HopsAnswered:
    """How far along the cycle the answers lie.

    Attributes:
        hops: how many were made, [Q]: from 1 to n, n being the node itself; 0 if no node was named.
        path: hops that were to be made, [Q].
        earlier: whether a wrong answer is a node that comes before the right one, [Q] bool: too few hops were made.
            Of the n - 1 wrong nodes, ``path`` - 1 come before.
    """

    hops: Tensor
    path: Tensor
    earlier: Tensor


@dataclass(frozen=True)
class WrongAnswers:
    """Answers, and whether what they need could be told.

    Attributes:
        answers: of the Q queries.
        retrieved: whether every single hop on the way is answered rightly when it is asked for by itself, from the same
            state, [Q] bool.
    """

    answers: Answers
    retrieved: Tensor

    @property
    def not_retrieved(self) -> Tensor:
        """Wrong, and a fact on the way is not there either, [Q] bool."""
        return ~self.answers.correct & ~self.retrieved

    @property
    def not_computed(self) -> Tensor:
        """Wrong, although every fact on the way is there, [Q] bool."""
        return ~self.answers.correct & self.retrieved


def successors(task: Hops, example: Example) -> dict[int, int]:
    """f of a row: the token of every node to that of the next."""
    size = task.pair_length
    pairs = example.input_ids[: size * task.n_nodes]
    return dict(zip(pairs[::size], pairs[1::size], strict=True))


def walk(follows: dict[int, int], start: int, hops: int) -> list[int]:
    """The nodes passed through in so many hops, that at the start first: ``hops`` + 1 of them."""
    nodes = [start]
    for _ in range(hops):
        nodes.append(follows[nodes[-1]])
    return nodes


def hops_answered(task: Hops, examples: Sequence[Example], answers: Answers) -> HopsAnswered:
    """How far along the cycle the first choices lie.

    Args:
        task: whose rows they are.
        examples: the rows.
        answers: what `answer` found for them.
    """
    made, wanted = [], []
    queries = [(example, query) for example in examples for query in example.queries]
    for (example, query), chosen in zip(queries, answers.first.tolist(), strict=True):
        way = walk(successors(task, example), example.input_ids[query.start - 1], task.n_nodes)
        made.append(way.index(chosen, 1) if chosen in way else 0)
        wanted.append((query.difficulty - 1) % task.n_nodes + 1)
    hops, path = torch.tensor(made), torch.tensor(wanted)
    return HopsAnswered(hops, path, (hops > 0) & (hops < path))


def split_wrong(
    model: SleepForCausalLM,
    task: Hops,
    examples: Sequence[Example],
    *,
    last_n_loops: int | None = None,
    batch_size: int = 256,
) -> WrongAnswers:
    """Which wrong answers lack a fact, and which were not computed from facts that are there.

    Each pair of a row is asked for by itself, as one hop from its node, after the same text.

    Args:
        model: which sleeps.
        task: whose rows they are.
        examples: the rows.
        last_n_loops: see `answer`.
        batch_size: rows at a time.
    """
    answers = answer(model, examples, last_n_loops=last_n_loops, batch_size=batch_size)
    known = [successors(task, example) for example in examples]
    single = [
        _one_hop(example.input_ids[: task.text_length], node, follows[node])
        for example, follows in zip(examples, known, strict=True)
        for node in sorted(follows)
    ]
    told = answer(model, single, last_n_loops=last_n_loops, batch_size=batch_size).correct
    facts = [
        dict(zip(sorted(follows), row.tolist(), strict=True))
        for follows, row in zip(known, told.unflatten(0, (len(examples), task.n_nodes)), strict=True)
    ]
    retrieved = [
        all(fact[node] for node in walk(follows, example.input_ids[query.start - 1], query.difficulty)[:-1])
        for example, follows, fact in zip(examples, known, facts, strict=True)
        for query in example.queries
    ]
    return WrongAnswers(answers, torch.tensor(retrieved))


def _one_hop(text: Sequence[int], node: int, follows: int) -> Example:
    """The text with one query: what comes after a node."""
    ids = [*text, 1, node, follows]
    return Example(ids, [IGNORE] * (len(ids) - 1) + [follows], [Query(1, len(ids) - 1, len(ids))])
