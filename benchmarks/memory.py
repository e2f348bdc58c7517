"""What a step of training holds at its peak, against T, N and what is recomputed.

    python -m benchmarks.memory [--output docs/results/memory.md]

On a CPU every tensor that an operation makes is counted from its making until nothing refers to its storage, in forward
and backward pass. That is exact and the same on every run, which the size of the process is not: allocators keep and
round. On a GPU its own allocator's peak is read.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import SUPERVISED, Setting, small_ouro, text, windowed_step
from benchmarks.report import Claim, Part, page_arguments, publish
from sleepify import SleepCache, SleepForCausalLM

MODES = ("none", "selective", "loop", "window")


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors made while it is on, and their peak. Views share their storage and count once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {storage._cdata for storage in given}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in before:
                    before.add(storage._cdata)
                    self._count(storage)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        n_bytes = storage.nbytes()
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, n_bytes)

    def _forget(self, n_bytes: int) -> None:
        self.live -= n_bytes


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """What a step holds at its peak, beyond what was there before it; gradients of weights included.

    Without Python's cycle collector, which runs when it pleases: memory that only it would free counts as held.
    """
    gc.collect()
    gc.disable()
    try:
        return _peak_bytes(step, device)
    finally:
        gc.enable()


def _peak_bytes(step: Callable[[], None], device: str) -> int:
    if device == "cpu":
        with LiveBytes() as counter:
            step()
        return counter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def boundary_bytes(model: SleepForCausalLM, window: int, batch_size: int = 1) -> int:
    """The fast-weight state that one window hands to the next."""
    model.config.window_size, model.config.eviction = window, "hard"
    cache = SleepCache()
    ids, _ = text(model, window + 1, batch_size)
    model(ids, past_key_values=cache, n_loops=1, logits_to_keep=1)
    return cache.state_bytes


def measure(
    model: SleepForCausalLM, window: int, n_windows: Sequence[int], n_loops: Sequence[int], batch_size: int, device: str
) -> Part:
    """A table of peaks, and how they grow with every further window."""
    state = boundary_bytes(model, window, batch_size)
    ids = batch_size * window * 8
    part = Part(
        "Peak of a step",
        f"Windows of {window:,} tokens, batch {batch_size}. MiB held at the peak beyond weights. At a boundary the "
        f"state of all fast-weight layers has {state:,} bytes; the ids of a window, copied for the replay, {ids:,}.",
        ["checkpoint", "N", *(f"T = {n} windows" for n in n_windows), "bytes per further window", "in boundary states"],
    )
    for mode in MODES:
        for n in n_loops:
            peaks = []
            for count in n_windows:
                tokens = count * window + window // 2
                step = partial(
                    windowed_step, model, text(model, tokens, batch_size), window, n, Setting(batch_size, mode)
                )
                model.zero_grad(set_to_none=True)
                peaks.append(peak_bytes(step, device))
            growth = (peaks[-1] - peaks[-2]) / (n_windows[-1] - n_windows[-2])
            cells = [f'"{mode}"', str(n), *(f"{peak / 2**20:,.2f}" for peak in peaks)]
            part.rows.append([*cells, f"{growth:,.0f}", f"{growth / state:,.3f}"])
            part.figures[f"{mode} N={n}"] = {"peaks": peaks, "growth": growth, "state": state, "ids": ids}
            if mode == "window":
                what = f'growth per window / boundary state, checkpoint="window", N = {n} (ids apart)'
                part.claims.append(Claim(what, (growth - ids) / state, at_most=1.0))
    model.zero_grad(set_to_none=True)
    return part


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "memory", repeats=None)
    model = small_ouro(arguments.tiny)
    window = 2 * SUPERVISED + 2 if arguments.tiny else 128
    counts, loops = ((1, 2), (2,)) if arguments.tiny else ((2, 4, 8), (1, 4))
    parts = [measure(model, window, counts, loops, batch_size=1, device="cpu")]
    intro = (
        "Every tensor that an operation makes counts from its making until nothing refers to its storage, forward and "
        "backward, gradients of the weights included, with Python's cycle collector off, so that what only it would "
        "free counts as held; exact and the same on every run, unlike the size of the process. "
        'Ouro with 4 layers of 256 channels and two Jet layers, float32. "none" keeps all activations; "selective" '
        'keeps what projections and attention give, and runs norms, gates, convolutions and rules again; "loop" keeps '
        'what enters a pass and runs it again; "window" keeps what enters a window, that is the state, and runs all N '
        "passes again, so that its peak is one window's, whatever T."
    )
    return publish(arguments, "Memory of training", intro, parts)


if __name__ == "__main__":
    main()
