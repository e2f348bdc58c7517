"""Hops: Depo's question in its barest form, k steps along a cycle that was read as pairs some windows ago.

>>> task = Hops(n_nodes=6, n_queries=2, max_hops=4)
>>> task.decode(task.example(0).input_ids)
'n6->n1 n3->n6 n5->n2 n2->n3 n4->n5 n1->n4 | +4 from n3? n5, +2 from n6? n4'

The pairs (a, f(a)) of a random cycle come in random order, a token a node; then queries: k, a, and f^k(a), which is to
be answered. The difficulty is k. On n nodes k = n - 1 is one step back, so no answer is further than n / 2 steps away
for a model that walks both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from sleepify.tasks.base import IGNORE, Example, Query, Split, check_curriculum, open_levels, random_stream
from sleepify.tasks.split import cycle_key, in_split

PAD = 0
"""Fills up a window that has no room for another whole query, and ends a pair where pairs have ends; text to be read
like any other."""
_QUERY = 3
"""Tokens of a query: k, the node to start from, the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hops:
    """k-hop questions on a cycle through all n nodes. The defaults: 16 tokens of pairs in one window, then 8 queries.

    The pairs fill ``n_windows`` windows of ``window_size`` = 2 ``n_nodes`` / ``n_windows`` tokens (3 ``n_nodes`` /
    ``n_windows`` with ``pair_ends``). The queries follow, from different nodes, k uniform in 1..``max_hops``; only
    their answers are labelled. No query lies in two windows: what is left of a window that has no room for one is
    padded.

    Ids: 0 padding, k for k in 1..``max_hops``, then the nodes. A cycle belongs to the train or to the test split
    whatever the seed; 1 in 8 is a test cycle.

    Args:
        seed: another seed, another sequence of examples (of the same cycles).
        n_nodes: n, at least 6.
        n_queries: queries in a row, at most n.
        max_hops: the largest k that has a token; k = n is the node itself.
        hops: the k that are asked, ascending; None for 1..``max_hops``. Fewer are for a model to begin with, whose
            vocabulary goes further.
        n_reads: how often the pairs are written, in the same order, before the queries: a text that is read again.
        n_windows: windows over which the pairs are spread, each of the same number of whole pairs, 2 at least.
        pair_ends: whether each pair is followed by a token that ends it. Without, every node but the first and the last
            stands before two others, and which of these is f of it is told only by whether its place is odd.
        curriculum: rows a level in training: the first k alone, and one more every so many rows. 0: all from the
            start.

    Raises:
        ValueError: an argument is out of its range, or the pairs do not fill the windows.
    """

    difficulty_name: ClassVar[str] = "hops"

    seed: int = 0
    n_nodes: int = 8
    n_queries: int = 8
    max_hops: int = 8
    hops: Sequence[int] | None = None
    n_reads: int = 1
    n_windows: int = 1
    pair_ends: bool = False
    curriculum: int = 0

    def __post_init__(self) -> None:
        # Fewer nodes leave a handful of cycles for the test: three of five nodes.
        for field, least in {"n_nodes": 6, "n_queries": 1, "max_hops": 1, "n_reads": 1, "n_windows": 1}.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field}: expected a whole number, at least {least}, got {value!r}")
        if not isinstance(self.pair_ends, bool):
            raise ValueError(f"pair_ends: expected True or False, got {self.pair_ends!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        if self.n_queries > self.n_nodes:
            raise ValueError(f"n_queries: expected at most one a node ({self.n_nodes}), got {self.n_queries}")
        if self.n_nodes % self.n_windows or self.n_nodes < 2 * self.n_windows:
            raise ValueError(
                f"n_windows: expected windows of two whole pairs or more, all alike, got {self.n_nodes} pairs in "
                f"{self.n_windows} windows"
            )
        if self.hops is not None and not (
            list(self.hops) == sorted(set(self.hops)) and set(self.hops) <= set(range(1, self.max_hops + 1))
        ):
            raise ValueError(f"hops: expected some of 1 to {self.max_hops}, ascending, got {self.hops!r}")
        if self.hops is not None and not self.hops:
            raise ValueError("hops: expected at least one k, got none; leave it out for all")
        check_curriculum(self.curriculum)

    def __repr__(self) -> str:
        """What tells one task from another (a checkpoint's manifest holds it)."""
        # Absent from checkpoints of before there was a choice.
        names = [field.name for field in fields(self) if field.name != "pair_ends" or self.pair_ends]
        return f"Hops({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids: padding, every k, every node."""
        return 1 + self.max_hops + self.n_nodes

    @property
    def pair_length(self) -> int:
        """Tokens of a pair."""
        return 2 + self.pair_ends

    @property
    def window_size(self) -> int:
        """Tokens of the pairs in each window."""
        return self.pair_length * self.n_nodes // self.n_windows

    @property
    def text_length(self) -> int:
        """Tokens of all pairs, as often as they are written: what comes before the first query."""
        return self.pair_length * self.n_nodes * self.n_reads

    @property
    def length(self) -> int:
        """T, the number of tokens of every example."""
        full, rest = divmod(self.n_queries, self.window_size // _QUERY)
        if not rest:
            full, rest = full - 1, self.window_size // _QUERY
        return self.text_length + full * self.window_size + rest * _QUERY

    def example(self, index: int, split: Split = "train") -> Example:
        """The row number ``index`` of ``split``; T = ``length`` tokens.

        Raises:
            ValueError: ``index`` is negative or ``split`` unknown.
        """
        rng = random_stream("hops", self.seed, split, index)
        n, first_node = self.n_nodes, 1 + self.max_hops
        cycle = rng.sample(range(n), n)
        while not in_split(cycle_key(cycle), split):
            cycle = rng.sample(range(n), n)
        nodes = [first_node + node for node in cycle]

        end = (PAD,) * self.pair_ends
        pairs = [token for i in rng.sample(range(n), n) for token in (nodes[i], nodes[(i + 1) % n], *end)]
        input_ids = pairs * self.n_reads
        labels = [IGNORE] * len(input_ids)
        hops = open_levels(self.hops or range(1, self.max_hops + 1), self.curriculum, split, index)
        queries = []
        for i in rng.sample(range(n), self.n_queries):
            room = self.window_size - len(input_ids) % self.window_size
            if room < _QUERY:
                input_ids += [PAD] * room
                labels += [IGNORE] * room
            k = rng.choice(hops)
            answer = nodes[(i + k) % n]
            input_ids += [k, nodes[i], answer]
            labels += [IGNORE, IGNORE, answer]
            queries.append(Query(difficulty=k, start=len(input_ids) - 1, stop=len(input_ids)))
        return Example(input_ids=input_ids, labels=labels, queries=queries)

    def decode(self, ids: Sequence[int]) -> str:
        """The row ``ids`` (T token ids) for people: the pairs, a bar, then the queries; padding left out.

        Raises:
            ValueError: not T ids of this task's vocabulary.
        """
        if len(ids) != self.length or not all(0 <= token < self.vocab_size for token in ids):
            raise ValueError(f"expected {self.length} ids from 0 to {self.vocab_size - 1}, got {list(ids)}")
        names = [
            f"+{token}" if token <= self.max_hops else f"n{token - self.max_hops}" for token in ids if token != PAD
        ]
        end = 2 * self.n_nodes * self.n_reads
        pairs = [f"{source}->{target}" for source, target in zip(names[:end:2], names[1:end:2], strict=True)]
        asked = [
            f"{k} from {start}? {answer}"
            for k, start, answer in zip(*(names[end + i :: 3] for i in range(3)), strict=True)
        ]
        return f"{' '.join(pairs)} | {', '.join(asked)}"
