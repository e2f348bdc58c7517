"""Tables for docs/results: Markdown with the machine, the versions and the date, written beside and renamed."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import sleepify


def machine() -> str:
    """One line: processor or GPU, threads, versions, date."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        device = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, sleepify {sleepify.__version__}; {datetime.date.today().isoformat()}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_table(
    path: Path,
    *,
    title: str,
    command: str,
    intro: str,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> None:
    """Write a page of tables (head, rows)."""
    lines = [f"# {title}", "", f"Made by `{command}`. {intro}", ""]
    for head, rows in tables:
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text("\n".join(lines), encoding="utf-8")
    os.replace(draft, path)
