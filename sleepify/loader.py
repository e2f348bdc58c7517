"""The file in a checkpoint by which tools that know nothing of sleepify load it, if their user trusts it to."""

from __future__ import annotations

from pathlib import Path

_NAME = "modeling_sleepify"
LOADER = f"{_NAME}.py"
# Which of transformers' Auto classes finds what in it.
AUTO_MAP = {"AutoConfig": f"{_NAME}.SleepConfig", "AutoModelForCausalLM": f"{_NAME}.SleepForCausalLM"}
_TEXT = '''"""Loads this checkpoint by the package sleepify (pip install sleepify). There is no model code in it."""

from sleepify import SleepConfig, SleepForCausalLM

__all__ = ["SleepConfig", "SleepForCausalLM"]
'''


def write_loader(folder: Path) -> None:
    """Write the file to ``folder``. It names the package and holds nothing that could age."""
    (folder / LOADER).write_text(_TEXT, encoding="utf-8")
