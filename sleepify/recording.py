"""What every pass of every sleep leaves, row by row, recorded while a model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sleepify.memory import Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.schedule import Sleep


@dataclass(frozen=True)
class Slept:
    """One sleep of one row.

    Attributes:
        row: of the batch.
        window: which of the row's windows, from 0.
        memories: of one row each: before the window, then what each of the N passes left; what follows the loop has run
            for each of them.
    """

    row: int
    window: int
    memories: tuple[Memory, ...]


@contextmanager
def recorded(model: SleepForCausalLM) -> Iterator[list[Slept]]:
    """The sleeps of one call that begins without a session, in their order: the list fills as the model reads.

    Nothing is trained and no gradient kept meanwhile, and the model is in evaluation mode; afterwards it is as before.

    Raises:
        TypeError: for what is not a sleeping model itself, like one in an adapter's wrapper.
    """
    if not isinstance(model, SleepForCausalLM):
        raise TypeError(
            f"expected a SleepForCausalLM, got {type(model).__name__}; of an adapter's wrapper give get_base_model()"
        )
    slept: list[Slept] = []
    latest: dict[int, Slept] = {}
    left = Memory(0)

    def watch(each: Sleep, after: Memory) -> None:
        # `branch` is called next, with what the passes before the last have left.
        nonlocal left
        left = after

    def branch(each: Sleep, earlier: Sequence[Memory]) -> None:
        for place, row in enumerate(each.rows):
            before = latest.get(row)
            begin = Memory(1) if before is None else before.memories[-1]
            passes = (memory.select([place]) for memory in (*earlier, left))
            latest[row] = Slept(row, 0 if before is None else before.window + 1, (begin, *passes))
            slept.append(latest[row])

    own = (model.watch, model.branch, model.training)
    model.eval()
    model.watch, model.branch = watch, branch
    try:
        with torch.no_grad():
            yield slept
    finally:
        model.watch, model.branch = own[:2]
        model.train(own[2])
