"""What a model remembers, as a value: the fast-weight state and the keys and values of the open window.

Every operation leaves what others hold alone, so a snapshot is a reference, a rollback is an assignment, and gradient
flows through windows and loops. B rows, S remembered positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sleepify.arena import Arena, Filled

Value = TypeVar("Value")
# (i, 0) is layer i of the host, (i, 1) the fast-weight layer inserted after it: sorted, the order in which they run.
LayerKey = tuple[int, int]


class LayerState(NamedTuple):
    """State of one fast-weight layer.

    Attributes:
        conv: last inputs of its short convolution, [B, C, W], or None for a layer without one.
        recurrent: its matrix state, [B, H, K, V], float32 or wider, or None for a layer that only convolves.
    """

    conv: Tensor | None = None
    recurrent: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """The state of every fast-weight layer, and keys and values of every attention layer.

    Attributes:
        batch_size: B.
        state: one `LayerState` per fast-weight layer that has been written.
        kv: keys and values per attention layer of the host, [B, H, S, d] each; row r holds its entries in the *last*
            ``kv_lengths[r]`` of the S columns, so that one more token is one more column for every row.
        kv_lengths: entries per row.
        arena: what ``kv`` are the first columns of, with room behind them for what is read next; see `with_room`.
        homes: where each of its tensors came from, if it waits on the CPU, see `parked`.
    """

    batch_size: int
    state: dict[LayerKey, LayerState] = field(default_factory=dict)
    kv: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kv_lengths: tuple[int, ...] = ()
    arena: Arena | None = None
    homes: tuple[torch.device, ...] = ()

    def __post_init__(self) -> None:
        if not self.kv_lengths:
            object.__setattr__(self, "kv_lengths", (0,) * self.batch_size)
        if self.arena is not None and not (isinstance(self.kv, Filled) and self.kv.arena is self.arena):
            # Other keys have been put in the place of those that lie in it.
            object.__setattr__(self, "arena", None)

    @property
    def columns(self) -> int:
        """S, the same for all layers."""
        for keys, _ in self.kv.values():
            return keys.shape[2]
        return max(self.kv_lengths, default=0)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, for counting bytes and checking devices."""
        states = [tensor for layer in self.state.values() for tensor in layer if tensor is not None]
        return states + [tensor for pair in self.kv.values() for tensor in pair]

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """The same memory with ``function`` applied to every tensor, and without room."""
        state = {
            key: LayerState(*(None if tensor is None else function(tensor) for tensor in layer))
            for key, layer in self.state.items()
        }
        kv = {i: (function(k), function(v)) for i, (k, v) in self.kv.items()}
        return replace(self, state=state, kv=kv, arena=None)

    def parked(self) -> Memory:
        """The same on the CPU, until it is `fetched`."""
        homes = tuple(tensor.device for tensor in self.tensors())
        return replace(self.map(lambda tensor: tensor.to("cpu", non_blocking=True)), homes=homes)

    def fetched(self) -> Memory:
        """The same where it came from."""
        if not self.homes:
            return self
        home = iter(self.homes)
        return replace(self.map(lambda tensor: tensor.to(next(home), non_blocking=True)), homes=())

    def not_finite(self) -> LayerKey | None:
        """The first layer whose state holds NaN or infinity; looking waits for the device."""
        for key, layer in sorted(self.state.items()):
            if not all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in layer):
                return key
        return None

    def select(self, rows: Sequence[int]) -> Memory:
        """The memory of some rows, in that order; columns that none of them uses are dropped."""
        if _is_all(rows, self.batch_size):
            return self
        lengths = tuple(self.kv_lengths[row] for row in rows)
        columns = max(lengths, default=0)
        index = _Index(torch.tensor(rows))

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.on(tensor.device))

        picked = replace(self, batch_size=len(rows), kv_lengths=lengths).map(pick)
        return replace(picked, kv={i: (_last(k, columns), _last(v, columns)) for i, (k, v) in picked.kv.items()})

    def put(self, rows: Sequence[int], other: Memory) -> Memory:
        """This memory with ``other`` (one row per entry of ``rows``) in the place of these rows."""
        if _is_all(rows, self.batch_size):
            return other
        index = _Index(torch.tensor(rows))
        lengths = list(self.kv_lengths)
        for row, length in zip(rows, other.kv_lengths, strict=True):
            lengths[row] = length
        columns = max(lengths)

        def scatter(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if theirs is None:
                return mine
            if mine is None:
                mine = theirs.new_zeros(self.batch_size, *theirs.shape[1:])
            # Rows that were read by a model of another precision or elsewhere, and not since, go where these are.
            mine = mine.to(theirs)
            return mine.index_copy(0, index.on(theirs.device), theirs)

        state = dict(self.state)
        for key, layer in other.state.items():
            old = state.get(key, LayerState())
            state[key] = LayerState(scatter(old.conv, layer.conv), scatter(old.recurrent, layer.recurrent))
        kv: dict[int, tuple[Tensor, Tensor]] = {}
        for layer_index in self.kv.keys() | other.kv.keys() if columns else ():
            pairs = []
            for slot in (0, 1):
                mine = self.kv[layer_index][slot] if layer_index in self.kv else None
                theirs = other.kv[layer_index][slot] if layer_index in other.kv else None
                if theirs is None:
                    assert mine is not None
                    theirs = mine.new_zeros(len(rows), mine.shape[1], 0, mine.shape[3])
                mine = None if mine is None else _last(mine, columns)
                merged = scatter(mine, _last(theirs, columns))
                assert merged is not None
                pairs.append(merged)
            kv[layer_index] = (pairs[0], pairs[1])
        return Memory(self.batch_size, state, kv, tuple(lengths))

    def or_zeros(self, like: Memory) -> Memory:
        """With zeros for the layers of which only ``like``, a memory of other rows, has a state."""
        state = {
            key: LayerState(
                *(None if tensor is None else tensor.new_zeros(self.batch_size, *tensor.shape[1:]) for tensor in layer)
            )
            for key, layer in like.state.items()
        }
        return replace(self, state=state | self.state)

    def reenter(self, at_start: Memory, start: int, stop: int) -> Memory:
        """This memory as another pass over layers [start, stop) of the same window must find it (contract 5, 6).

        The matrix state goes on. Convolution inputs and keys are those before the window: a pass reads the window's
        first token after the last token of the window before, not after the window's own last.
        """
        state = dict(self.state)
        for key, layer in self.state.items():
            if start <= key[0] < stop:
                state[key] = LayerState(at_start.state.get(key, LayerState()).conv, layer.recurrent)
        kv = {i: pair for i, pair in self.kv.items() if not start <= i < stop}
        kv |= {i: pair for i, pair in at_start.kv.items() if start <= i < stop}
        return replace(self, state=state, kv=kv)

    def advance(self, lengths: Sequence[int], width: int) -> Memory:
        """The memory after ``width`` columns were appended of which row r filled the first ``lengths[r]``."""
        total = tuple(before + new for before, new in zip(self.kv_lengths, lengths, strict=True))
        columns = max(total, default=0)
        if self.arena is not None:
            return changed(self, kv=self.arena.first(columns), kv_lengths=total)
        have, kv = self.columns, self.kv
        if not kv or all(length == width for length in lengths):
            if columns != have:
                kv = {i: (_last(k, columns), _last(v, columns)) for i, (k, v) in kv.items()}
        else:
            # Close the gap between a row's new entries and the right edge; what rolls in on the left is never read.
            shift = torch.tensor([width - length for length in lengths])
            source = _Index((torch.arange(have - columns, have)[None, :] - shift[:, None]).clamp_(min=0))
            kv = {i: (_gather(k, source), _gather(v, source)) for i, (k, v) in self.kv.items()}
        return changed(self, kv=kv, kv_lengths=total)

    def with_room(self, columns: int) -> Memory:
        """The same with room for another column, which is the caller's to fill: columns [B, H, S] of an `Arena`.

        Args:
            columns: how many the arena has if it must be a new one, which copies the keys and values: where there was
                none, it is full, or another snapshot has filled the column.
        """
        have = max(self.kv_lengths, default=0)
        if self.arena is not None and self.arena.claim(have):
            return self
        kv = {i: (_last(k, have), _last(v, have)) for i, (k, v) in self.kv.items()}
        arena = Arena(kv, columns)
        arena.claim(have)
        return replace(self, kv=arena.first(have), arena=arena)

    def without_room(self) -> Memory:
        """The same with keys and values that grow by being copied."""
        return self if self.arena is None else replace(self, arena=None)

    def first_keys(self, counts: Sequence[int]) -> Memory:
        """Only the oldest ``counts[r]`` entries of every row: what was retained when the open window began."""
        counts = tuple(counts)
        columns = max(counts, default=0)
        if not columns or not self.kv:
            return Memory(self.batch_size, self.state)
        last = torch.tensor([self.columns - have + count for have, count in zip(self.kv_lengths, counts, strict=True)])
        source = _Index((last[:, None] - columns + torch.arange(columns)[None, :]).clamp_(min=0))
        kv = {i: (_gather(k, source), _gather(v, source)) for i, (k, v) in self.kv.items()}
        return replace(self, kv=kv, kv_lengths=counts, arena=None)

    def last_keys(self, count: int) -> Memory:
        """Only the latest ``count`` entries of every row (0: none): eviction."""
        lengths = tuple(min(length, count) for length in self.kv_lengths)
        columns = max(lengths, default=0)
        if not columns:
            return replace(self, kv={}, kv_lengths=lengths, arena=None)
        if columns == self.columns:
            return replace(self, kv_lengths=lengths, arena=None)
        # A copy, because a view would keep the evicted part alive.
        kv = {i: (_last(k, columns).clone(), _last(v, columns).clone()) for i, (k, v) in self.kv.items()}
        return replace(self, kv=kv, kv_lengths=lengths, arena=None)


def changed(value: Value, **parts: object) -> Value:
    """``dataclasses.replace`` without the constructor, which checks and fills in: for what every token makes anew."""
    made = object.__new__(type(value))
    vars(made).update(vars(value), **parts)
    return made


class _Index:
    """Whole numbers on the devices where they are needed, copied to each once and without waiting for it."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self.copies:
            self.copies[device] = self.numbers.to(device, non_blocking=True)
        return self.copies[device]


def index_of(rows: Sequence[int], like: Tensor) -> Tensor | slice:
    """Rows as an index; a slice, which copies nothing, where all rows of ``like`` are meant."""
    return slice(None) if _is_all(rows, like.shape[0]) else _Index(torch.tensor(rows)).on(like.device)


def _is_all(rows: Sequence[int], batch_size: int) -> bool:
    return len(rows) == batch_size and all(row == place for place, row in enumerate(rows))


def _last(tensor: Tensor, columns: int) -> Tensor:
    """The last ``columns`` of [B, H, S, d], with zeros in front where there are fewer."""
    missing = columns - tensor.shape[2]
    if missing > 0:
        return torch.nn.functional.pad(tensor, (0, 0, missing, 0))
    return tensor if missing == 0 else tensor.narrow(2, -missing, columns)


def _gather(tensor: Tensor, source: _Index) -> Tensor:
    """Columns ``source`` [B, S'] of [B, H, S, d], row by row."""
    index = source.on(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)
