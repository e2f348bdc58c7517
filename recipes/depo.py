"""Train a model on Depo, walks along a cycle, and test it by the number of hops (the paper's section 6.2).

accelerate launch --config_file recipes/accelerate/single_gpu.yaml recipes/depo.py recipes/configs/depo_k16.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Result, run

from sleepify.tasks import Depo


@dataclass
class DepoArguments:
    """The task; see `sleepify.tasks.Depo`."""

    task_seed: int = field(default=0, metadata={"help": "Another seed, other rows."})
    n_nodes: int = field(default=75, metadata={"help": "Nodes of the largest cycle, and of every one in the test."})
    n_queries: int = field(default=10, metadata={"help": "Queries in a row."})
    max_hops: int = field(default=16, metadata={"help": "The largest k; trained on 1 to this, tested on powers of 2."})
    names: str = field(default="single", metadata={"help": "single: a token a node; words: several."})
    arrows: bool = field(default=True, metadata={"help": "Write edges as x -> y , instead of x y."})

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
        )


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the recipe; ``argv`` for a caller in the same process."""
    return run("depo", DepoArguments, argv, __doc__)


if __name__ == "__main__":
    main()
