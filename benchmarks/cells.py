"""Cells of a table, each measured by itself: kept as soon as it is, skipped the next time, said where it fails."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import build
from benchmarks.models import wake_up
from sleepify import SleepForCausalLM

Measured = dict[str, Any]


@dataclass
class Plan:
    """Sizes of everything, and what was measured before.

    Attributes:
        seconds: of each part; it begins no further cell after them.
        kept: the file that holds every cell measured so far.
    """

    device: str
    tiny: bool
    repeats: int
    seconds: float
    batches: Sequence[int]
    kept: Path
    cells: dict[str, Measured] = field(default_factory=dict)
    deadline: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def ouro(self, device: str | None = None) -> SleepForCausalLM:
        """Ouro 1.4B with its six Jet layers; one step of its own recurrence, as it runs when it sleeps."""
        model = build("ouro_1.4b", device or self.device, self.dtype, self.tiny)
        model.config.text_config.total_ut_steps = 1
        return wake_up(model).train()

    def cell(self, name: str, measure: Callable[[], Measured]) -> Measured | None:
        """A cell's figures: kept ones, or measured now; what went wrong, under "failed"; None if there is no time."""
        if name in self.cells:
            return self.cells[name]
        if time.perf_counter() > self.deadline:
            return None
        try:
            figures = measure()
        except torch.OutOfMemoryError:
            figures = {"failed": "out of memory"}
        except Exception as error:  # whatever it is, the other cells are worth having
            figures = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        free(self.device)
        print(f"  {name}: {figures}", flush=True)
        self.cells[name] = figures
        draft = self.kept.with_name(f".{self.kept.name}.new")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(self.cells, indent=1, default=vars), encoding="utf-8")
        draft.replace(self.kept)
        return figures


def free(device: str) -> None:
    """Give back what a part left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def works(cell: Measured | None) -> bool:
    return cell is not None and "failed" not in cell


def said(cell: Measured | None) -> str:
    """Of a cell without figures: why."""
    return "no time" if cell is None else str(cell["failed"])
