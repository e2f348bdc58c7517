"""Depo: walk k steps along a directed cycle whose edges were read in random order, some windows ago.

>>> task = Depo(n_nodes=6, n_queries=2)
>>> task.decode(task.example(3).input_ids)
'n6->n4, n2->n3, n3->n1, n4->n2, n1->n6, +3 hops from n1? n2 +2 hops from n2? n1'

The number of hops k is the difficulty: to answer in one pass, the edges must have been joined into paths while they
were stored. The graph is one cycle through n nodes, so each node is named twice, once as source and once as target.
Sources: the Depo task of "Physics of Language Models, part 4", and section 6.2 of the sleep paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import sqrt
from random import Random
from typing import ClassVar, Literal, NamedTuple

from sleepify.tasks.base import IGNORE, Example, Query, Split, check_curriculum, open_levels, random_stream
from sleepify.tasks.split import cycle_key, in_split

PAD = 0
"""The id of padding in every form; nothing else has it, so the mask of a row is ``id != PAD``."""


class _Vocabulary(NamedTuple):
    """Token ids; "k hops" is ``hop + k`` and the name token v (from 1) is ``name + v``."""

    question: int
    bos: int
    arrow: int
    comma: int
    hops: int
    of: int
    hop: int
    name: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Depo:
    """k-hop questions on a shuffled cycle. The defaults are the sleep paper's: T = 360 tokens, windows of 75.

    ``names="single"`` is the sleep paper's form. An edge is "x -> y ,", a query "k hops from x ? y" (without arrows:
    "x y" and "k x ? y"); the answer y is labelled. The edges are padded on the left to ``context_length``, so that
    windows end where the queries begin: the left padding is text to be read like any other (give no attention mask)
    if windows shall lie as in the paper. A cycle of fewer than ``n_queries`` nodes has one query a node, and the row
    is filled up with ``PAD`` on the right.

    ``names="words"`` is the form of the original task: a beginning-of-text token, then the same, with names of
    several tokens. The "?" is labelled as well, as it is there. With ``arrows=False, official_ids=True,
    context_length=0`` rows are token for token the original's.

    Compact ids: 0 padding, 1 "?", 2 beginning of text, 3 "->", 4 ",", 5 "hops", 6 "from", 6 + k for k in
    1..``max_hops``, then the tokens of names. Official ids: names from 1 on, 9000 + k, 9500 "?", 9999 beginning of
    text. A cycle belongs to the train or to the test split whatever the seed and the form; 1 in 8 is a test cycle.

    Args:
        seed: another seed, another sequence of examples (of the same cycles).
        n_nodes: the largest number of nodes n, at least 6.
        n_queries: queries in a row (at most n), from different nodes.
        max_hops: the largest k.
        mode: how n and k are drawn. "train": n from 3..``n_nodes`` with weight 1 / (n + sqrt(n_nodes)), k uniform in
            1..``max_hops``. "qa": n = ``n_nodes``, k uniform among the powers of two up to ``max_hops`` and
            ``max_hops`` itself (and 24 if that is 32).
        names: "single" or "words".
        arrows: write "->", ",", "hops" and "from".
        mini_vocab: (words) m: a name is tokens uniform in 1..m, the last with m added to it, which ends the name.
        min_name: (words) tokens in the shortest name; lengths are uniform.
        max_name: (words) tokens in the longest.
        official_ids: (words, no arrows) the ids of the original task.
        context_length: tokens before the queries, padding included. None: as many as the longest edge list, rounded
            up to four windows. 0: no padding at all, so that rows differ in length.
        curriculum: rows a level in training: k up to 1 at first, and one more (of those that ``mode`` asks) every so
            many rows. 0: all from the start.

    Raises:
        ValueError: an argument is out of its range, or arguments exclude each other.
    """

    difficulty_name: ClassVar[str] = "hops"

    seed: int = 0
    n_nodes: int = 75
    n_queries: int = 10
    max_hops: int = 16
    mode: Literal["train", "qa"] = "train"
    names: Literal["single", "words"] = "single"
    arrows: bool = True
    mini_vocab: int = 3
    min_name: int = 5
    max_name: int = 7
    official_ids: bool = False
    context_length: int | None = None
    curriculum: int = 0

    def __post_init__(self) -> None:
        # On fewer nodes a split would be empty: no cycle of 4 out of 5 nodes is a test cycle.
        least = {"n_nodes": 6, "n_queries": 1, "max_hops": 1, "mini_vocab": 1, "min_name": 1, "max_name": self.min_name}
        for field, low in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{field}: expected a whole number, at least {low}, got {value!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        check_curriculum(self.curriculum)
        if self.mode not in ("train", "qa"):
            raise ValueError(f"mode: expected 'train' or 'qa', got {self.mode!r}")
        if self.names not in ("single", "words"):
            raise ValueError(f"names: expected 'single' or 'words', got {self.names!r}")
        if self.names == "single" and (self.mini_vocab, self.min_name, self.max_name) != (3, 5, 7):
            raise ValueError("mini_vocab, min_name, max_name: only names='words' has them")
        if self._n_names < self.n_nodes:
            raise ValueError(
                f"n_nodes={self.n_nodes}: only {self._n_names} names of {self.min_name} to {self.max_name} tokens with "
                f"mini_vocab={self.mini_vocab}; allow longer names or a larger mini_vocab"
            )
        if self.official_ids and (self.names != "words" or self.arrows):
            raise ValueError("official_ids: the original task has ids for names='words', arrows=False only")
        if self.official_ids and (self.max_hops >= 500 or self.mini_vocab > 4500):
            raise ValueError("official_ids: expected max_hops below 500 and mini_vocab up to 4500, or ids collide")
        context, longest = self.context_length, self._longest_context
        if context is not None and not (isinstance(context, int) and (context == 0 or context >= longest)):
            raise ValueError(
                f"context_length: expected None, 0 or at least {longest} (the longest edge list), got {context!r}"
            )

    @property
    def _n_names(self) -> int:
        if self.names == "single":
            return self.n_nodes
        return sum(self.mini_vocab**length for length in range(self.min_name, self.max_name + 1))

    @property
    def _n_name_tokens(self) -> int:
        return self.n_nodes if self.names == "single" else 2 * self.mini_vocab

    @property
    def _longest_name(self) -> int:
        return 1 if self.names == "single" else self.max_name

    @property
    def _longest_context(self) -> int:
        return (self.names == "words") + self.n_nodes * (2 * self._longest_name + 2 * self.arrows)

    @property
    def _vocabulary(self) -> _Vocabulary:
        if self.official_ids:
            # Arrows have no official ids, and are refused with them.
            return _Vocabulary(question=9500, bos=9999, arrow=-1, comma=-1, hops=-1, of=-1, hop=9000, name=0)
        return _Vocabulary(question=1, bos=2, arrow=3, comma=4, hops=5, of=6, hop=6, name=6 + self.max_hops)

    @property
    def vocab_size(self) -> int:
        """Number of token ids (98 by default; 10000 with the official ones)."""
        return 10_000 if self.official_ids else 7 + self.max_hops + self._n_name_tokens

    @property
    def length(self) -> int:
        """T, the number of tokens of every example; with ``context_length=0`` that of the longest possible."""
        per_query = 2 + 2 * self._longest_name + 2 * self.arrows
        return (self._context or self._longest_context) + min(self.n_queries, self.n_nodes) * per_query

    @property
    def window_size(self) -> int:
        """A quarter of the context, as in the paper."""
        return -(-(self._context or self._longest_context) // 4)

    @property
    def _context(self) -> int:
        """Tokens before the queries; 0 if rows are not padded."""
        return 4 * -(-self._longest_context // 4) if self.context_length is None else self.context_length

    def example(self, index: int, split: Split = "train") -> Example:
        """The row number ``index`` of ``split``; T = ``length`` tokens (at most, with ``context_length=0``).

        Raises:
            ValueError: ``index`` is negative or ``split`` unknown.
        """
        rng = random_stream("depo", self.seed, split, index)
        n = self.n_nodes
        if self.mode == "train":
            n = rng.choices(range(3, n + 1), cum_weights=_size_weights(n))[0]
        cycle = self._draw_names(rng, n)
        while not in_split(cycle_key(cycle), split):
            cycle = self._draw_names(rng, n)
        edges = rng.sample(range(n), n)
        starts = rng.sample(range(n), min(n, self.n_queries))
        hops: Sequence[int] = range(1, self.max_hops + 1) if self.mode == "train" else _tested_hops(self.max_hops)
        hops = open_levels(hops, self.curriculum, split, index)
        queries = [(rng.choice(hops), start) for start in starts]
        return self.encode([self._spell(name) for name in cycle], edges, queries)

    def _draw_names(self, rng: Random, n: int) -> list[int]:
        """n distinct names, by number, in random order."""
        if self.names == "single":
            return rng.sample(range(self.n_nodes), n)
        names: set[int] = set()
        while len(names) < n:
            # Lengths are equally likely though there are many more long names than short ones.
            length = rng.randint(self.min_name, self.max_name)
            shorter = sum(self.mini_vocab**i for i in range(self.min_name, length))
            names.add(shorter + rng.randrange(self.mini_vocab**length))
        return rng.sample(sorted(names), n)

    def _spell(self, name: int) -> list[int]:
        """The tokens of the name with number ``name``, counted from 1."""
        if self.names == "single":
            return [1 + name]
        length = self.min_name
        while name >= self.mini_vocab**length:
            name -= self.mini_vocab**length
            length += 1
        word = [1 + name // self.mini_vocab**i % self.mini_vocab for i in range(length)]
        word[-1] += self.mini_vocab
        return word

    def encode(
        self, cycle: Sequence[Sequence[int]], edges: Sequence[int], queries: Sequence[tuple[int, int]]
    ) -> Example:
        """The row of a given cycle and given queries.

        Args:
            cycle: n names in the order of the cycle, each its tokens counted from 1 (for words as described above).
            edges: 0..n-1 in the order in which the edges are written; i is the edge from ``cycle[i]`` to the next.
            queries: (k, i): which node is k hops from ``cycle[i]``?

        Raises:
            ValueError: more nodes or queries than the task has room for, or a k outside 1..``max_hops``.
        """
        if len(cycle) > self.n_nodes or len(queries) > self.n_queries:
            raise ValueError(
                f"expected up to {self.n_nodes} nodes and {self.n_queries} queries, got {len(cycle)} and {len(queries)}"
            )
        if not all(1 <= k <= self.max_hops for k, _ in queries):
            raise ValueError(f"expected 1 to {self.max_hops} hops, got {[k for k, _ in queries]}")
        ids = self._vocabulary
        words = [[ids.name + token for token in word] for word in cycle]
        arrow, comma = ([ids.arrow], [ids.comma]) if self.arrows else ([], [])

        text = [ids.bos] if self.names == "words" else []
        for i in edges:
            text += words[i] + arrow + words[(i + 1) % len(words)] + comma
        input_ids = [PAD] * (self._context - len(text)) + text
        labels = [IGNORE] * len(input_ids)
        asked = []
        for k, i in queries:
            answer = words[(i + k) % len(words)]
            prompt = [ids.hop + k, *([ids.hops, ids.of] if self.arrows else []), *words[i]]
            input_ids += [*prompt, ids.question, *answer]
            labels += [IGNORE] * len(prompt) + [ids.question if self.names == "words" else IGNORE, *answer]
            asked.append(Query(difficulty=k, start=len(input_ids) - len(answer), stop=len(input_ids)))
        if self._context:
            missing = self.length - len(input_ids)
            input_ids += [PAD] * missing
            labels += [IGNORE] * missing
        return Example(input_ids=input_ids, labels=labels, queries=asked)

    def decode(self, ids: Sequence[int]) -> str:
        """Any of this task's ids for people, padding left out: nodes are n1, n2, ... or tokens like 3.1.2.2.5.

        Raises:
            ValueError: an id that this task never writes.
        """
        known = self._vocabulary
        pieces = {known.question: "?", known.bos: "<s>"}
        if self.arrows:
            pieces |= {known.arrow: "->", known.comma: ",", known.hops: "hops", known.of: "from"}
        pieces |= {known.hop + k: f"+{k}" for k in range(1, self.max_hops + 1)}
        for v in range(1, self._n_name_tokens + 1):
            pieces[known.name + v] = f"n{v}" if self.names == "single" else f"{v}." if v <= self.mini_vocab else str(v)
        if unknown := sorted({token for token in ids if token != PAD and token not in pieces}):
            raise ValueError(f"expected ids that this task writes, got {unknown}")
        text = " ".join(pieces[token] for token in ids if token != PAD)
        for spaced, joined in ((" -> ", "->"), (" ,", ","), (" ?", "?"), (". ", ".")):
            text = text.replace(spaced, joined)
        return text


@lru_cache(maxsize=32)
def _size_weights(n_nodes: int) -> list[float]:
    """Cumulative weights of n = 3..n_nodes in training."""
    return list(accumulate(1 / (n + sqrt(n_nodes)) for n in range(3, n_nodes + 1)))


@lru_cache(maxsize=32)
def _tested_hops(max_hops: int) -> list[int]:
    """The k that the "qa" mode asks."""
    powers = {2**i for i in range(max_hops.bit_length())}
    return sorted(powers | {max_hops} | ({24} if max_hops == 32 else set()))
