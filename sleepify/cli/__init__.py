"""The ``sleepify`` command. `COMMANDS` is all that knows which subcommands there are."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sleepify.version import __version__

# Name: what it does, in one line. Each is the module of that name in this folder, whose ``main(argv) -> int`` takes the
# words after the name and returns the exit code; it is loaded when it is called, since each needs other packages.
COMMANDS = {
    "train": "train from a recipe's YAML file, on one device or through accelerate launch",
    "evaluate": "test a checkpoint at any N and windows, or measure its perplexity on a text",
    "calibrate": "find the threshold of n_loops=auto on a text, for a mean number of passes",
    "generate": "continue a prompt, sleeping whenever a window is full",
    "chat": "talk in the terminal with a model that sleeps",
    "serve": "answer over HTTP in OpenAI's form, with sessions that sleep",
    "recipes": "list the recipes that came with sleepify, or copy some to change them",
    "doctor": "what is installed, which code runs on this machine, what slows it down",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    Args:
        argv: without the program's name; None for that of the process.

    Raises:
        SystemExit: for a command or an argument that does not exist, with status 2; after ``--help``, with 0.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="sleepify",
        description="Sleep for pretrained language models.",
        epilog="sleepify COMMAND --help says more of each.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    # Only the first word is this parser's; what follows is for the command.
    name = parser.parse_args(words[:1]).command
    return int(importlib.import_module(f"{__name__}.{name}").main(words[1:]))
