"""Train a model on Rule 110 and test it by the number of steps (the paper's sections 4 and 6.1).

accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/rule110.py recipes/configs/rule110_small.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Result, run

from sleepify.tasks import Rule110


@dataclass
class Rule110Arguments:
    """The task; see `sleepify.tasks.Rule110`."""

    task_seed: int = field(default=0, metadata={"help": "Another seed, other rows."})
    width: int = field(default=24, metadata={"help": "Cells in a string, which is the window of the paper."})
    n_strings: int = field(default=4, metadata={"help": "Strings in a row."})
    steps: list[int] = field(default_factory=lambda: [32], metadata={"help": "t; several with form=queries."})
    form: str = field(default="paper", metadata={"help": "paper, or queries: each t asked after a token 't'."})

    def build(self, test: bool = False, tokenizer: Any = None) -> Rule110:
        """The task, the same for the test."""
        steps = self.steps[0] if self.form == "paper" and len(self.steps) == 1 else self.steps
        return Rule110(seed=self.task_seed, width=self.width, n_strings=self.n_strings, steps=steps, form=self.form)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the recipe; ``argv`` for a caller in the same process."""
    return run("rule110", Rule110Arguments, argv, __doc__)


if __name__ == "__main__":
    main()
