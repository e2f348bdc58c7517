"""What is sleep worth? Everything that a user would do instead, on the same rows, over seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.worth                   # all runs that are missing, one after the other
    OMP_NUM_THREADS=1 python -m benchmarks.worth --settings hops8 --seeds 0 --arms n4 n1
    python -m benchmarks.worth --page                              # the page alone, of whatever is finished

Start it several times to use several cores: runs are claimed by a lock, so no two processes take the same. A run that
was stopped goes on from its last checkpoint; a finished one leaves one JSON file under docs/results/runs/worth and is
not run again. At the end docs/results/worth.md and its figures are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import worth_page
from benchmarks.arms import ARMS
from benchmarks.report import RESULTS
from benchmarks.worth_runs import train_arm
from benchmarks.worth_settings import SETTINGS


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), help="of those of a setting")
    parser.add_argument("--seeds", type=int, nargs="*", help="by default those of a setting")
    parser.add_argument("--page", action="store_true", help="train nothing, write the page")
    parser.add_argument("--docs", type=Path, default=RESULTS, help="where page and figures go")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in [] if arguments.page else arguments.settings:
        setting = SETTINGS[name]
        for arm in (ARMS[arm] for arm in setting.arms if arm in arguments.arms):
            for seed in setting.seeds if arguments.seeds is None else arguments.seeds:
                train_arm(setting, arm, seed)
    worth_page.write(arguments.docs)


if __name__ == "__main__":
    main()
