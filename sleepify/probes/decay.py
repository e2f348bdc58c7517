"""Whether N passes forget N times as fast: what later passes of a sleep do if they decay less than the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleepify.memory import Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.settings import Settings


@contextmanager
def later_decay(model: SleepForCausalLM, exponent: float) -> Iterator[None]:
    """Within it, every pass of a sleep but the first decays by a_t (Eq. 3) to the ``exponent`` in the inserted layers.

    Decay acts on what earlier windows left once per token and pass, N L times a window. With 1 / N, the later passes
    together decay by less than the first; with 0, they do not. Wake passes and first passes are as they were. For what
    is read without gradient.

    Args:
        model: with inserted layers among those that are looped; of no other layer is the decay at hand.
        exponent: 0 or more; 1 changes nothing.

    Raises:
        TypeError: for what is not a sleeping model itself, like one in an adapter's wrapper, or no number.
        ValueError: for an exponent below 0, a model without such layers, or one that is within this already; when
            something is read with gradient.
    """
    if not isinstance(model, SleepForCausalLM):
        raise TypeError(
            f"expected a SleepForCausalLM, got {type(model).__name__}; of an adapter's wrapper give get_base_model()"
        )
    if isinstance(exponent, bool) or not isinstance(exponent, int | float):
        raise TypeError(f"expected an exponent of 0 or more, got {exponent!r}")
    if not exponent >= 0:
        raise ValueError(f"expected an exponent of 0 or more, got {exponent!r}; 1 changes nothing")
    if "host_of" in vars(model):
        raise ValueError("expected a model as it is, got one within later_decay; leave that first")
    first, stop = model.options().loop_range
    inserted: dict[int, Any] = model.blocks.inserted
    mixers = [layer.mixer for index, layer in inserted.items() if first <= index < stop]
    if not mixers:
        raise ValueError(
            f"expected inserted layers among the looped ones, {first} to {stop - 1}, got none; the decay of a base's "
            "own recurrent layers is not at hand"
        )
    own = model.host_of

    def changed(settings: Settings) -> Any:
        return _Blocks(own(settings), mixers, exponent)

    model.host_of = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.host_of


@dataclass
class _Frame:
    """A window's frame, and whether the looped layers have run over it."""

    own: Any
    was_looped: bool = False


class _Blocks:
    """A model's blocks, whose looped layers decay otherwise from the second time on that they run over a window."""

    def __init__(self, own: Any, mixers: list[Any], exponent: float) -> None:
        self._own, self._mixers, self._exponent = own, mixers, exponent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def open(self, *arguments: Any) -> tuple[Tensor, _Frame]:
        if torch.is_grad_enabled():
            # Recomputed, a first pass could not be told from a later one.
            raise ValueError("expected later_decay around what is read without gradient; use torch.no_grad()")
        hidden, frame = self._own.open(*arguments)
        return hidden, _Frame(frame)

    def run(self, hidden_states: Tensor, memory: Memory, frame: _Frame, start: int, stop: int) -> tuple[Tensor, Memory]:
        loops = start <= self._own.loop_range[0] < stop
        later, frame.was_looped = loops and frame.was_looped, frame.was_looped or loops
        with _decaying(self._mixers if later else [], self._exponent):
            result: tuple[Tensor, Memory] = self._own.run(hidden_states, memory, frame.own, start, stop)
        return result


@contextmanager
def _decaying(mixers: list[Any], exponent: float) -> Iterator[None]:
    for mixer in mixers:
        mixer._log_decay = lambda x, usual=mixer._log_decay: exponent * usual(x)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer._log_decay
