"""Room for the keys and values of a window, filled column by column and shared by the snapshots of a session.

A column is written once, by the one who claims it first. A snapshot that knows n columns therefore never sees one of
them change, however others read on from it: who comes second to a column takes a copy of what is before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


class Arena:
    """Keys and values of every attention layer, of which the first columns are filled.

    Args:
        kv: what is to be in the first columns, [B, H, S, d] each; it is copied. Of layers of one shape all keys lie in
            one tensor, and all values in another.
        columns: R, how many there are to be.

    Attributes:
        columns: R.
        kv: all R columns per layer, [B, H, R, d] each; zero where nothing was written, since attention multiplies what
            it does not see by 0.
        buffers: the tensors that they lie in, [layers, B, H, R, d] each.
    """

    def __init__(self, kv: Mapping[int, KeysValues], columns: int) -> None:
        pairs = {index: kv[index] for index in sorted(kv)}
        filled = next(iter(pairs.values()))[0].shape[2]
        self.columns = columns
        # Taking from a set is atomic, whatever threads read on from the same session.
        self._free = set(range(filled, columns))
        self.buffers: list[Tensor] = []
        lying: dict[tuple[int, int], Tensor] = {}
        for slot in (0, 1):
            alike: dict[object, list[int]] = {}
            for index, pair in pairs.items():
                tensor = pair[slot]
                alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
            for layers in alike.values():
                like = pairs[layers[0]][slot]
                batch, heads, _, width = like.shape
                buffer = like.new_zeros(len(layers), batch, heads, columns, width)
                self.buffers.append(buffer)
                for place, index in enumerate(layers):
                    lying[index, slot] = buffer[place]
                    lying[index, slot].narrow(2, 0, filled).copy_(pairs[index][slot])
        self.kv: dict[int, KeysValues] = {index: (lying[index, 0], lying[index, 1]) for index in pairs}

    def claim(self, column: int) -> bool:
        """Whether the caller may write this column: the first who asks may, and nobody ever after."""
        if self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        try:
            self._free.remove(column)
        except KeyError:
            return False
        return True

    def first(self, count: int) -> Filled:
        """The first so many columns."""
        return Filled(self, count)


class Filled(Mapping[int, KeysValues]):
    """The first columns of an arena, by layer: views, made when they are looked at.

    Args:
        arena: it.
        count: how many columns.
    """

    def __init__(self, arena: Arena, count: int) -> None:
        self.arena = arena
        self.count = count

    def __getitem__(self, index: int) -> KeysValues:
        keys, values = self.arena.kv[index]
        return keys.narrow(2, 0, self.count), values.narrow(2, 0, self.count)

    def __iter__(self) -> Iterator[int]:
        return iter(self.arena.kv)

    def __len__(self) -> int:
        return len(self.arena.kv)
