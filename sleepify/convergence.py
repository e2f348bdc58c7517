"""After which pass a row stops: after the last that is planned, or once its state has settled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sleepify.memory import LayerKey, Memory
from sleepify.schedule import Passes, passes
from sleepify.settings import Adaptive, Settings

FEWEST = 3
"""Passes that are made in any case, as far as N allows: two changes of the step take three of them."""


def step_sizes(before: Memory, after: Memory, loop_range: tuple[int, int]) -> Tensor:
    """r_n = ||S_n - S_(n-1)|| / ||S_n||: how far a pass has moved the state of each row.

    Args:
        before, after: memories of the same rows, before and after the pass.
        loop_range: layers [start, stop) that are looped; the matrix states of all of them count as one vector.

    Returns:
        [B], in the dtype of the state; 0 where there is no state.
    """
    squares = list(_squares(before, after, loop_range).values())
    if not squares:
        return torch.zeros(after.batch_size)
    # Of a base that is spread over devices, each layer's lie beside it.
    home = squares[0][0].device
    moved, whole = (torch.stack([x.to(home) for x in each]).sum(0) for each in zip(*squares, strict=True))
    return _share(moved, whole)


def layer_step_sizes(before: Memory, after: Memory, loop_range: tuple[int, int]) -> dict[LayerKey, Tensor]:
    """`step_sizes` of the state of each looped layer by itself, [B] each."""
    return {key: _share(*squares) for key, squares in _squares(before, after, loop_range).items()}


def _squares(before: Memory, after: Memory, loop_range: tuple[int, int]) -> dict[LayerKey, tuple[Tensor, Tensor]]:
    """||S_n - S_(n-1)||^2 and ||S_n||^2 [B] of each looped layer."""
    start, stop = loop_range
    squares = {}
    for key, layer in after.state.items():
        if layer.recurrent is None or not start <= key[0] < stop:
            continue
        now = layer.recurrent.detach().flatten(1)
        had = before.state[key].recurrent if key in before.state else None
        moved = now if had is None else now - had.detach().flatten(1).to(now)
        squares[key] = (moved.square().sum(1), now.square().sum(1))
    return squares


def _share(moved: Tensor, whole: Tensor) -> Tensor:
    return (moved / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()


def unrest(steps: Sequence[float]) -> float:
    """How little a row's state has settled after passes that moved it by r_1 ... r_n, for n of at least 3.

    max(|r_n - r_(n-1)|, |r_(n-1) - r_(n-2)|): the change of the step, the larger one of two passes running. A row
    stops once it is under the threshold.
    """
    last, before, first = steps[-1], steps[-2], steps[-3]
    return max(abs(last - before), abs(before - first))


class Course:
    """One sleep of some rows: its passes, and after which of them each row stops.

    What was decided stands: made again in the backward pass, a sleep takes the same course.

    Args:
        settings: N and, in those of an adaptive call, the threshold.
        loop_range: layers [start, stop) that are looped.
        last_writer: see `passes`.
        rows: those that sleep together.
        every: whether it is asked what each pass leaves.

    Attributes:
        plan: prelude, N passes, coda.
        passes: how many each row has made; 0 while it has not stopped.
    """

    def __init__(
        self, settings: Settings, loop_range: tuple[int, int], last_writer: int, rows: Sequence[int], every: bool
    ) -> None:
        self.plan: Passes = passes(settings.n_loops, loop_range, last_writer, settings.backprop_loops, every)
        self.passes = [0] * len(rows)
        self._loop_range = loop_range
        self._threshold = settings.auto_threshold if isinstance(settings, Adaptive) else None
        self._before: Memory | None = None
        self._steps: list[list[float]] = [[] for _ in rows]
        self._asked: list[bool] = []

    def asks(self, loop: int, at_start: Memory, now: Memory) -> bool:
        """Whether what this pass (from 0) leaves is asked for; in an adaptive call, looking waits for the device.

        Args:
            loop: the pass.
            at_start: the memory before the first one.
            now: that after this one.
        """
        if loop < len(self._asked):
            return self._asked[loop]
        each = self.plan.loops[loop]
        stopping = [row for row, made in enumerate(self.passes) if not made and each.is_last]
        if self._threshold is not None and not each.is_last:
            sizes = step_sizes(self._before or at_start, now, self._loop_range).tolist()
            for row, size in enumerate(sizes):
                self._steps[row].append(size)
                if not self.passes[row] and loop + 1 >= FEWEST and unrest(self._steps[row]) < self._threshold:
                    stopping.append(row)
            self._before = now.map(Tensor.detach)
        for row in stopping:
            self.passes[row] = loop + 1
        self._asked.append(each.ends or bool(stopping))
        if self.is_over(loop):
            self._before = None
        return self._asked[loop]

    def is_over(self, loop: int) -> bool:
        """Whether no row makes a pass after this one."""
        return 0 < min(self.passes) and max(self.passes) <= loop + 1

    def left(self, ends: Sequence[Memory]) -> list[Memory]:
        """What a sleep leaves whose passes left ``ends``, of those that were asked for: each row that of its last."""
        if self._threshold is None:
            return list(ends)
        asked = [loop + 1 for loop, is_asked in enumerate(self._asked) if is_asked]
        left = ends[0]
        for number, end in zip(asked[1:], ends[1:], strict=True):
            rows = [row for row, made in enumerate(self.passes) if made >= number]
            left = left.put(rows, end.select(rows))
        return [left]
