"""Train from a recipe's YAML file: a path, or a name that `sleepify recipes list` shows.

    sleepify train rule110_tiny
    sleepify train mine.yaml --n_loops 2 --output_dir outputs/n2
    sleepify train ouro_1.4b_hard --accelerate ddp --num_processes 4

Every field of the file, or any other, can be changed after it; `sleepify train RECIPE --help` explains them by topic.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sleepify.cli.recipes import LAUNCH, find
from sleepify.errors import SleepifyError
from sleepify.training.recipe import check, parse, run

LAUNCHED = "SLEEPIFY_LAUNCHED"
"""Environment variable of the processes that `accelerate launch` starts for us."""


def main(argv: Sequence[str]) -> int:
    """Train; the exit code, which is that of the launcher if there is one."""
    if os.environ.pop(LAUNCHED, None):
        # `_launch` holds Ctrl-C off its launcher, and what that starts inherits it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        prog="sleepify train",
        usage="%(prog)s RECIPE [--accelerate FILE [--num_processes P]] [--field value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not argv or argv[0].startswith("-"),
    )
    parser.add_argument("recipe", metavar="RECIPE", help="file, or name of one of ours")
    parser.add_argument(
        "--accelerate", metavar="FILE", help="run by `accelerate launch` with this launch file, or one of ours by name"
    )
    parser.add_argument("--num_processes", type=int, metavar="P", help="instead of what the launch file says")
    arguments, fields = parser.parse_known_args(argv)
    try:
        recipe = find(arguments.recipe)
        words = ["--config", str(recipe), *fields]
        if arguments.accelerate is not None:
            launch_file = find(arguments.accelerate, LAUNCH)
            check(words)
            return _launch(recipe, launch_file, arguments.num_processes, fields)
        if arguments.num_processes is not None:
            raise ValueError("expected --num_processes beside --accelerate FILE only; give both, or neither")
        # What is wrong with the fields is one line, and what we foresaw of the run; a fault keeps its traceback.
        parse(None, words, description=__doc__, prog=parser.prog)
    except ValueError as error:
        print(f"sleepify train: {error}", file=sys.stderr)
        return 2
    try:
        run(None, words, description=__doc__, prog=parser.prog)
    except SleepifyError as error:
        print(f"sleepify train: {error}", file=sys.stderr)
        return 2
    return 0


def _launch(recipe: Path, launch_file: Path, processes: int | None, fields: Sequence[str]) -> int:
    """Run `sleepify train` in the processes that `accelerate launch` makes, and wait for them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file), "--quiet"]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    command += ["--module", "sleepify", "train", str(recipe), *fields]
    # The terminal sends Ctrl-C to everyone. Only the training is to act on it; the others wait while it saves.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, env=os.environ | {LAUNCHED: "1"}, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
