"""`examples/demo.py --quick`, of whose runs the first one alone is behind the launcher: the others are forked from it.

What they are given and leave is the same. A launcher and a Python of its own for each would take longer than they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import demo
from forked import Program

launched = demo.recipe


@contextmanager
def recipe(arguments: list[str], folder: Path, log: Path) -> Iterator[Any]:
    """In the place of the demo's own."""
    if log.stem == demo.BASE.name:
        with launched(arguments, folder, log) as process:
            yield process
        return
    _, _, script, *words = arguments
    program = Program.script(Path(script), words, log, folder)
    try:
        yield program
    finally:
        program.kill()


if __name__ == "__main__":
    demo.recipe = recipe
    demo.main()
