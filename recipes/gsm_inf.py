"""Train a model on GSM-Infinite and test it by the number of operations (the paper's sections 6.3 and 6.4).

accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/gsm_inf.py recipes/configs/ouro_1.4b_hard.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Result, run

from sleepify.tasks.gsm_infinite import PETS, THEMES, GsmInfinite, read_rows, read_vocabulary


@dataclass
class GsmInfiniteArguments:
    """The task; see `sleepify.tasks.gsm_infinite.GsmInfinite`."""

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
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "Names to write with: 'pets' for few, or published rows (a file, or a name on the Hub)."},
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
        return GsmInfinite(
            seed=self.task_seed,
            operations=self.operations,
            depth=self.depth,
            modes=self.modes,
            themes=self.themes,
            target_tokens=None if self.target_tokens is None else tuple(self.target_tokens),
            question_first=self.question_first,
            chain_of_thought=self.chain_of_thought,
            vocabulary=self._vocabulary(),
            max_tokens=self.max_tokens,
            tokenizer=tokenizer,
            size=tuple(self.size),
        )

    def _vocabulary(self) -> Sequence[Any]:
        if self.vocabulary is None:
            return THEMES
        return [PETS] if self.vocabulary == "pets" else read_vocabulary(read_rows(self.vocabulary))


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the recipe; ``argv`` for a caller in the same process."""
    return run("gsm_inf", GsmInfiniteArguments, argv, __doc__)


if __name__ == "__main__":
    main()
