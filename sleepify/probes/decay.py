"""Whether N passes forget N times as fast: what later passes of a sleep do if they decay less than the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

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
        ValueError: for an exponent below 0, or a model without such layers.
    """
    if not exponent >= 0:
        raise ValueError(f"expected an exponent of 0 or more, got {exponent!r}; 1 changes nothing")
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
        hidden, frame = self._own.open(*arguments)
        return hidden, _Frame(frame)

    def run(self, hidden_states: Tensor, memory: Memory, frame: _Frame, start: int, stop: int) -> tuple[Tensor, Memory]:
        loops = start <= self._own.loop_range[0] < stop
        with ExitStack() as stack:
            if loops and frame.was_looped:
                for mixer in self._mixers:
                    stack.enter_context(_decaying(mixer, self._exponent))
            frame.was_looped |= loops
            result: tuple[Tensor, Memory] = self._own.run(hidden_states, memory, frame.own, start, stop)
        return result


@contextmanager
def _decaying(mixer: Any, exponent: float) -> Iterator[None]:
    usual = mixer._log_decay
    mixer._log_decay = lambda x: exponent * usual(x)
    try:
        yield
    finally:
        del mixer._log_decay
