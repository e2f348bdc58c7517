"""Rule 110: a cellular automaton to run ahead, on strings that were read some windows ago.

>>> task = Rule110(width=8, n_strings=2, steps=3)
>>> task.decode(task.example(0).input_ids)
'00001111 01110111 | 0 1'
>>> task = Rule110(width=8, n_strings=1, steps=(1, 2, 3), form="queries")
>>> task.decode(task.example(7).input_ids)
'11010000 | t=2: 0, t=3: 0, t=1: 1'

A string is a ring of cells; a cell's next value depends on its left neighbour, itself and its right neighbour:

    111 110 101 100 011 010 001 000
     0   1   1   0   1   1   1   0

Asked is the *first* cell of a string after t steps. No shortcut is known (the automaton is Turing-complete), so t is
how much computing the answer takes: the difficulty. Source: the first task of the sleep paper (its sections 4 and 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sleepify.tasks.base import IGNORE, Example, Query, Split, check_curriculum, open_levels, random_stream
from sleepify.tasks.split import in_split


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule110:
    """Rule 110 in two forms. The defaults are the paper's: T = 100 tokens, windows of 24.

    - ``form="paper"``: the strings back to back, then the first cell of each after ``steps`` steps. One query per
      row, right if all ``n_strings`` cells are.
    - ``form="queries"``: the strings back to back, then for each t of ``steps``, in random order, the token "t"
      followed by the first cell of each string after t steps. One query per t; small t is learned first, so the
      mixture is its own curriculum.

    Tokens: 0 and 1 are the cells' values; in the query form 1 + t is the token "t". Labels are at the answers only.
    A string belongs to the train or to the test split whatever the seed; 1 in 8 is a test string.

    Args:
        seed: another seed, another sequence of examples (of the same strings).
        width: cells in a string, at least 5.
        n_strings: strings in a row.
        steps: t, at least 1; in the query form one or several, each asked once a row.
        form: "paper" or "queries".
        curriculum: (queries) rows a level in training: the smallest t alone is labelled at first, and one more every so
            many rows. Rows hold all t all the same, so that they stay equally long. 0: all from the start.

    Raises:
        ValueError: an argument is out of its range.
    """

    difficulty_name: ClassVar[str] = "steps"

    seed: int = 0
    width: int = 24
    n_strings: int = 4
    steps: int | Sequence[int] = 32
    form: Literal["paper", "queries"] = "paper"
    curriculum: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("paper", "queries"):
            raise ValueError(f"form: expected 'paper' or 'queries', got {self.form!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        # On rings of fewer cells a split would be empty: no string of 3 cells is a test string.
        if not isinstance(self.width, int) or self.width < 5:
            raise ValueError(f"width: expected a whole number of cells, at least 5, got {self.width!r}")
        if not isinstance(self.n_strings, int) or self.n_strings < 1:
            raise ValueError(f"n_strings: expected a whole number, at least 1, got {self.n_strings!r}")
        if not isinstance(self.steps, int):
            if self.form == "paper":
                raise ValueError(f"steps: form='paper' asks one number, got {self.steps!r}; see form='queries'")
            # A tuple, so that the task stays hashable when the steps come as a list.
            object.__setattr__(self, "steps", tuple(self.steps))
        check_curriculum(self.curriculum)
        if self.curriculum and self.form == "paper":
            raise ValueError("curriculum: form='paper' asks one number of steps; see form='queries'")
        steps = self._steps
        if not steps or len(set(steps)) < len(steps) or not all(isinstance(t, int) and t >= 1 for t in steps):
            raise ValueError(f"steps: expected distinct whole numbers, each at least 1, got {self.steps!r}")

    @property
    def _steps(self) -> tuple[int, ...]:
        return (self.steps,) if isinstance(self.steps, int) else tuple(self.steps)

    @property
    def vocab_size(self) -> int:
        """Number of token ids: 2, and in the query form one for every t up to the largest."""
        return 2 if self.form == "paper" else 2 + max(self._steps)

    @property
    def length(self) -> int:
        """T, the number of tokens of every example."""
        per_query = self.n_strings + (self.form == "queries")
        return self.n_strings * self.width + len(self._steps) * per_query

    @property
    def window_size(self) -> int:
        """The window of the paper: one string."""
        return self.width

    def example(self, index: int, split: Split = "train") -> Example:
        """The row number ``index`` of ``split``; T = ``length`` tokens.

        Raises:
            ValueError: ``index`` is negative or ``split`` unknown.
        """
        rng = random_stream("rule110", self.seed, split, index)
        # All strings side by side in one integer, so that one step moves them all.
        cells = 0
        for i in range(self.n_strings):
            string = rng.getrandbits(self.width)
            while not in_split(f"{string:0{self.width}b}", split):
                string = rng.getrandbits(self.width)
            cells |= string << (i * self.width)
        asked = list(self._steps)
        rng.shuffle(asked)

        input_ids = [(cells >> i) & 1 for i in range(self.n_strings * self.width)]
        labels = [IGNORE] * len(input_ids)
        answers = self._answers(cells)
        learned = open_levels(sorted(self._steps), self.curriculum, split, index)
        queries = []
        for t in asked:
            if self.form == "queries":
                input_ids.append(1 + t)
                labels.append(IGNORE)
            if t in learned:
                queries.append(Query(difficulty=t, start=len(input_ids), stop=len(input_ids) + self.n_strings))
            input_ids += answers[t]
            labels += answers[t] if t in learned else [IGNORE] * self.n_strings
        return Example(input_ids=input_ids, labels=labels, queries=queries)

    def _answers(self, cells: int) -> dict[int, list[int]]:
        """For each t asked, the first cell of every string after t steps."""
        firsts = sum(1 << (i * self.width) for i in range(self.n_strings))
        answers = {}
        for t in range(1, max(self._steps) + 1):
            cells = advance(cells, self.width, firsts)
            answers[t] = [(cells >> (i * self.width)) & 1 for i in range(self.n_strings)] if t in self._steps else []
        return answers

    def decode(self, ids: Sequence[int]) -> str:
        """The row ``ids`` (T token ids) for people: strings, a bar, then the answers.

        Raises:
            ValueError: not T ids of this task's vocabulary.
        """
        if len(ids) != self.length or not all(0 <= token < self.vocab_size for token in ids):
            raise ValueError(f"expected {self.length} ids from 0 to {self.vocab_size - 1}, got {list(ids)}")
        end = self.n_strings * self.width
        strings = ["".join(map(str, ids[i : i + self.width])) for i in range(0, end, self.width)]
        if self.form == "paper":
            answers = " ".join(map(str, ids[end:]))
        else:
            rows = [ids[i : i + 1 + self.n_strings] for i in range(end, len(ids), 1 + self.n_strings)]
            answers = ", ".join(f"t={row[0] - 1}: {' '.join(map(str, row[1:]))}" for row in rows)
        return f"{' '.join(strings)} | {answers}"


def advance(cells: int, width: int, firsts: int) -> int:
    """One step of all strings in ``cells``; bit i of a string is its cell i.

    Args:
        cells: strings of ``width`` bits side by side, the first one lowest.
        width: cells in a string.
        firsts: the bits that are some string's cell 0.
    """
    lasts = firsts << (width - 1)
    left = ((cells & ~lasts) << 1) | ((cells & lasts) >> (width - 1))
    right = ((cells & ~firsts) >> 1) | ((cells & firsts) << (width - 1))
    return (cells | right) & ~(left & cells & right)
