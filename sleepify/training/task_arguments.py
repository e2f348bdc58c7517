"""What each recipe's task takes from a file or a command line; `RECIPES` finds it by the recipe's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from sleepify.tasks import Depo, Hops, Rule110
from sleepify.tasks.gsm_infinite import PETS, THEMES, TREES, GsmInfinite, read_rows, read_vocabulary
from sleepify.training.data import Task
from sleepify.training.settings import suggest


class TaskArguments(Protocol):
    """What a recipe's own dataclass gives: its task, from its fields; and whether its rows are text for a tokenizer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    reads_text: ClassVar[bool]

    def build(self, test: bool = False, tokenizer: Any = None) -> Task:
        """The task to train on, or to test on where that differs."""


@dataclass
class Rule110Arguments:
    """The task; see `sleepify.tasks.Rule110`."""

    reads_text: ClassVar[bool] = False

    task_seed: int = field(default=0, metadata={"help": "Another seed, other rows."})
    width: int = field(default=24, metadata={"help": "Cells in a string, which is the window of the paper."})
    n_strings: int = field(default=4, metadata={"help": "Strings in a row."})
    steps: list[int] = field(default_factory=lambda: [32], metadata={"help": "t; several with form=queries."})
    form: Literal["paper", "queries"] = field(
        default="paper", metadata={"help": "paper, or queries: each t asked after a token 't'."}
    )
    curriculum: int = field(
        default=0, metadata={"help": "(queries) Rows in training until one t more is labelled; 0: all at once."}
    )

    def build(self, test: bool = False, tokenizer: Any = None) -> Rule110:
        """The task, the same for the test."""
        steps = self.steps[0] if self.form == "paper" and len(self.steps) == 1 else self.steps
        return Rule110(
            seed=self.task_seed,
            width=self.width,
            n_strings=self.n_strings,
            steps=steps,
            form=self.form,
            curriculum=self.curriculum,
        )


@dataclass
class DepoArguments:
    """The task; see `sleepify.tasks.Depo`."""

    reads_text: ClassVar[bool] = False

    task_seed: int = field(default=0, metadata={"help": "Another seed, other rows."})
    n_nodes: int = field(default=75, metadata={"help": "Nodes of the largest cycle, and of every one in the test."})
    n_queries: int = field(default=10, metadata={"help": "Queries in a row."})
    max_hops: int = field(default=16, metadata={"help": "The largest k; trained on 1 to this, tested on powers of 2."})
    names: Literal["single", "words"] = field(
        default="single", metadata={"help": "single: a token a node; words: several."}
    )
    arrows: bool = field(default=True, metadata={"help": "Write edges as x -> y , instead of x y."})
    curriculum: int = field(default=0, metadata={"help": "Rows in training until one k more is asked; 0: all at once."})

    def build(self, test: bool = False, tokenizer: Any = None) -> Depo:
        """The task; the test has full cycles and powers of two."""
        return Depo(
            seed=self.task_seed,
            n_nodes=self.n_nodes,
            n_queries=self.n_queries,
            max_hops=self.max_hops,
            mode="qa" if test else "train",
            names=self.names,
            arrows=self.arrows,
            curriculum=self.curriculum,
        )


@dataclass
class GsmInfiniteArguments:
    """The task; see `sleepify.tasks.gsm_infinite.GsmInfinite`."""

    reads_text: ClassVar[bool] = True

    task_seed: int = field(default=0, metadata={"help": "Another seed, other problems."})
    operations: list[int] = field(
        default_factory=lambda: list(range(1, 9)), metadata={"help": "Operation counts, drawn uniformly."}
    )
    depth: list[int] = field(
        default_factory=lambda: [2, 3], metadata={"help": "2: counts and totals; 3: averages too; or both."}
    )
    modes: list[str] = field(
        default_factory=lambda: ["forward", "reverse"], metadata={"help": "forward, reverse or both."}
    )
    themes: list[str] | None = field(default=None, metadata={"help": "Names of themes; by default all."})
    target_tokens: list[int] | None = field(
        default=None, metadata={"help": "Shortest and longest row in tokens, filled up with distractors."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "Draw again where a row would be longer."})
    question_first: bool = field(default=True, metadata={"help": "The question before the text."})
    chain_of_thought: bool = field(default=False, metadata={"help": "Train on the worked solution."})
    size: list[int] = field(default_factory=lambda: [5, 5], metadata={"help": "Most places and things of a problem."})
    curriculum: int = field(
        default=0, metadata={"help": "Rows in training until one operation count more is drawn; 0: all at once."}
    )
    retrieve_tokens: int | None = field(
        default=None, metadata={"help": "Read only the sentences that BM25 finds for the question, so many tokens."}
    )
    summary_tokens: int | None = field(
        default=None, metadata={"help": "Read only a running summary of so many tokens, made before the question."}
    )
    n_questions: int = field(
        default=1, metadata={"help": "Questions in a row: further ones about quantities on the way to the answer."}
    )
    questions_about: Literal["path", "text"] = field(
        default="path", metadata={"help": "Further questions: of the way to the answer, or of all the text defines."}
    )
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "Names: 'pets' or 'trees' for few, or published rows (a file, or a name on the Hub)."},
    )

    def build(self, test: bool = False, tokenizer: Any = None) -> GsmInfinite:
        """The task, the same for the test.

        Raises:
            ValueError: without a tokenizer.
        """
        if tokenizer is None:
            raise ValueError("expected a tokenizer, got none; give --tokenizer a name, or 'words' for a small model")
        if self.target_tokens is not None and len(self.target_tokens) != 2:
            raise ValueError(f"expected target_tokens as lowest and highest, got {self.target_tokens}")
        # A command line has lists of words and numbers; the task looks at what is in them.
        modes: Any = self.modes
        size: Any = tuple(self.size)
        tokens: Any = None if self.target_tokens is None else tuple(self.target_tokens)
        return GsmInfinite(
            seed=self.task_seed,
            operations=self.operations,
            depth=self.depth,
            modes=modes,
            themes=self.themes,
            target_tokens=tokens,
            question_first=self.question_first,
            chain_of_thought=self.chain_of_thought,
            vocabulary=self._vocabulary(),
            max_tokens=self.max_tokens,
            tokenizer=tokenizer,
            size=size,
            curriculum=self.curriculum,
            retrieve_tokens=self.retrieve_tokens,
            summary_tokens=self.summary_tokens,
            n_questions=self.n_questions,
            questions_about=self.questions_about,
        )

    def _vocabulary(self) -> Sequence[Any]:
        if self.vocabulary is None:
            return THEMES
        small = {theme.name: theme for theme in (PETS, TREES)}
        if self.vocabulary in small:
            return [small[self.vocabulary]]
        # A bare word is a misspelt theme: data sets on the Hub have an owner.
        if not Path(self.vocabulary).suffix and "/" not in self.vocabulary:
            raise ValueError(
                f"expected vocabulary to be {' or '.join(map(repr, small))}, a file, or owner/name on the Hub, got "
                f"{self.vocabulary!r}{suggest(self.vocabulary, small)}"
            )
        return read_vocabulary(read_rows(self.vocabulary))


@dataclass
class HopsArguments:
    """The task; see `sleepify.tasks.Hops`."""

    reads_text: ClassVar[bool] = False

    task_seed: int = field(default=0, metadata={"help": "Another seed, other rows."})
    n_nodes: int = field(default=8, metadata={"help": "Nodes of the cycle."})
    n_queries: int = field(default=8, metadata={"help": "Queries in a row."})
    max_hops: int = field(default=8, metadata={"help": "The largest k that has a token."})
    hops: list[int] | None = field(
        default=None, metadata={"help": "The k that are asked; by default 1 to the largest."}
    )
    n_reads: int = field(default=1, metadata={"help": "How often the pairs are written before the queries."})
    n_windows: int = field(default=1, metadata={"help": "Windows over which the pairs are spread."})
    pair_ends: bool = field(default=False, metadata={"help": "End each pair with a token."})
    curriculum: int = field(default=0, metadata={"help": "Rows in training until one k more is asked; 0: all at once."})

    def build(self, test: bool = False, tokenizer: Any = None) -> Hops:
        """The task, the same for the test."""
        return Hops(
            seed=self.task_seed,
            n_nodes=self.n_nodes,
            n_queries=self.n_queries,
            max_hops=self.max_hops,
            hops=self.hops,
            n_reads=self.n_reads,
            n_windows=self.n_windows,
            pair_ends=self.pair_ends,
            curriculum=self.curriculum,
        )


RECIPES: dict[str, type[TaskArguments]] = {
    "rule110": Rule110Arguments,
    "depo": DepoArguments,
    "hops": HopsArguments,
    "gsm_inf": GsmInfiniteArguments,
}
