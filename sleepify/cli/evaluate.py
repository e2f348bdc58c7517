"""Test one checkpoint at any N and windows, on the task or data that it was trained on or others; perplexity of a text.

sleepify evaluate outputs/rule110_small --n_loops 1 2 4 8 --plot accuracy.png
sleepify evaluate outputs/notes --dataset other.jsonl --n_loops 1 4
sleepify evaluate outputs/ouro --n_loops 1 4 --text_file notes.txt --context 8192
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sleepify.training.evaluate_checkpoint import run


def main(argv: Sequence[str]) -> int:
    """Evaluate; the exit code."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    try:
        run(words, description=__doc__, prog="sleepify evaluate")
    except (ValueError, OSError) as error:
        print(f"sleepify evaluate: {error}", file=sys.stderr)
        return 2
    return 0
