"""SleepCache: what a session carries from call to call, row by row.

A row of the batch has an *open window*: up to L tokens read awake, whose ids are kept so that sleep can replay them
from the state at the window's start. The cache counts rows separately, because they fill their windows at different
steps. It is a `transformers.Cache` so that `generate` accepts it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sleepify.errors import CacheMismatchError
from sleepify.memory import LayerState, Memory
from sleepify.session_file import Session, read_session, write_session

_COUNTS = ("open_lengths", "retained", "seen", "windows")


@dataclass(frozen=True)
class Window:
    """Tokens of one window, one row each, left-aligned: ids [B, T], tokens per row, position of each row's first."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    positions: tuple[int, ...]


class SleepCache(Cache):
    """An empty session; hand it to ``model(..., past_key_values=cache)`` or ``model.generate`` and keep it.

    Args:
        fixed_shapes: give every token of a window the same shapes, by room for the keys of a whole window from its
            third token on. Single tokens then need one compiled graph, and a CUDA graph can be captured of them;
            attention looks at L keys (sliding: 2L-1), however few are filled.

    Attributes:
        memory: fast-weight state and the keys and values of the open window, as they are awake.
        open_lengths: tokens in the open window, per row.
        seen: tokens read, per row.
        windows: windows consolidated, per row.
    """

    def __init__(self, fixed_shapes: bool = False) -> None:
        super().__init__(layers=[])
        self.fixed_shapes = fixed_shapes
        self.owner: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the cache is as new and may serve another model or batch."""
        self.owner = None
        self.memory = Memory(0)
        self.at_start: dict[tuple[int, int], LayerState] = {}
        self.open_ids: Tensor | None = None
        self.open_lengths: list[int] = []
        self.retained: list[int] = []
        self.seen: list[int] = []
        self.windows: list[int] = []
        self.columns = 0

    # --- belonging -------------------------------------------------------------------------------------------------

    def bind(self, owner: str, batch_size: int, window_size: int, device: torch.device) -> None:
        """Make the cache that of one model and batch, or check that it is.

        Raises:
            CacheMismatchError: if it belongs to another.
        """
        if self.owner is None:
            self.owner = owner
            self.memory = Memory(batch_size)
            self.open_ids = torch.zeros(batch_size, window_size, dtype=torch.long, device=device)
            self.open_lengths, self.retained = [0] * batch_size, [0] * batch_size
            self.seen, self.windows = [0] * batch_size, [0] * batch_size
        elif self.owner != owner:
            raise CacheMismatchError(
                f"expected a cache of this model ({owner}), got one of another ({self.owner}); "
                "start a new SleepCache() or call cache.reset()"
            )
        elif len(self.seen) != batch_size:
            raise CacheMismatchError(
                f"expected {len(self.seen)} rows as in the calls before, got {batch_size}; "
                "start a new SleepCache() or pick rows with cache.batch_select_indices"
            )

    def get_batch_size(self) -> int:
        """Rows, 0 before the first call."""
        return len(self.seen)

    @property
    def state_bytes(self) -> int:
        """Bytes of the fast-weight state alone: constant, however much was read (contract 9)."""
        return sum(_bytes(tensor) for layer in self.memory.state.values() for tensor in layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values: at most one window (sliding: two)."""
        return sum(_bytes(tensor) for pair in self.memory.kv.values() for tensor in pair)

    # --- windows (called by sleep.py) ------------------------------------------------------------------------------

    def sleeps_ahead(self, lengths: Sequence[int], window_size: int) -> list[int]:
        """How often each row will sleep while it reads ``lengths`` more tokens."""
        # A full window sleeps only when a token follows it, hence the -1.
        totals = [have + new for have, new in zip(self.open_lengths, lengths, strict=True)]
        return [max(0, total - 1) // window_size if new else 0 for total, new in zip(totals, lengths, strict=True)]

    def next_window(
        self, rows: Sequence[int], input_ids: Tensor, done: Sequence[int], take: dict[int, int], sliding: bool
    ) -> Window:
        """The next ``take[row]`` tokens of each row, left-aligned."""
        lengths = tuple(take[row] for row in rows)
        width = max(lengths)
        starts = [done[row] for row in rows]
        if len(set(starts)) == 1:
            ids = input_ids[_index(rows, input_ids), starts[0] : starts[0] + width]
        else:
            columns = torch.tensor(starts)[:, None] + torch.arange(width)[None, :]
            columns = columns.clamp_(max=input_ids.shape[1] - 1).to(input_ids.device)
            ids = input_ids[_index(rows, input_ids)].gather(1, columns)
        firsts = tuple(self.seen[row] if sliding else self.open_lengths[row] for row in rows)
        return Window(ids, lengths, firsts)

    def append(self, rows: Sequence[int], input_ids: Tensor, done: Sequence[int], take: dict[int, int]) -> None:
        """Count the tokens in and keep their ids for the replay."""
        assert self.open_ids is not None
        width = max(take[row] for row in rows)
        offset = torch.arange(width)[None, :]
        counts = torch.tensor([take[row] for row in rows])[:, None]
        row_index = torch.tensor(list(rows))[:, None].expand(-1, width)
        source = torch.tensor([done[row] for row in rows])[:, None] + offset
        target = torch.tensor([self.open_lengths[row] for row in rows])[:, None] + offset
        real = offset < counts
        device = self.open_ids.device
        row_at, source_at, target_at = (index[real].to(device) for index in (row_index, source, target))
        self.open_ids = self.open_ids.index_put((row_at, target_at), input_ids[row_at, source_at])
        for row in rows:
            self.open_lengths[row] += take[row]
            self.seen[row] += take[row]

    def open_window(self, rows: Sequence[int], sliding: bool) -> Window:
        """The open window of each row as sleep replays it."""
        assert self.open_ids is not None
        lengths = tuple(self.open_lengths[row] for row in rows)
        ids = self.open_ids[_index(rows, self.open_ids), : max(lengths)]
        firsts = tuple(self.seen[row] - self.open_lengths[row] if sliding else 0 for row in rows)
        return Window(ids, lengths, firsts)

    def before_window(self, rows: Sequence[int]) -> Memory:
        """The memory at the start of each row's open window: the state then, and the keys retained then."""
        memory = Memory(self.memory.batch_size, self.at_start, self.memory.kv, self.memory.kv_lengths)
        return memory.select(rows).first_keys([self.retained[row] for row in rows])

    def close_window(self, rows: Sequence[int], memory: Memory) -> None:
        """Put what sleep left in the place of the open window; gone is everything else of it (contract 5)."""
        at_start = Memory(self.memory.batch_size, self.at_start)
        self.at_start = at_start.put(rows, Memory(memory.batch_size, memory.state)).state
        self.memory = self.memory.put(rows, memory)
        for row, length in zip(rows, memory.kv_lengths, strict=True):
            self.open_lengths[row] = 0
            self.retained[row] = length
            self.windows[row] += 1

    # --- what transformers asks of a cache -------------------------------------------------------------------------

    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ``input_ids`` consumed, padding included: where `generate` goes on."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a session has no end."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        rows = [row for row in range(len(self.seen)) for _ in range(repeats)]
        self.batch_select_indices(torch.tensor(rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows, in the order given."""
        rows = [int(row) for row in indices.tolist()]
        if self.owner is None:
            return
        assert self.open_ids is not None
        at_start = Memory(self.memory.batch_size, self.at_start).select(rows)
        self.memory, self.at_start = self.memory.select(rows), at_start.state
        self.open_ids = self.open_ids[_index(rows, self.open_ids)]
        for name in _COUNTS:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

    def clone(self) -> SleepCache:
        """An independent copy: reading on from one leaves the other as it is. Shares tensors, which never change."""
        other = SleepCache()
        other.__dict__.update(self.__dict__)
        for name in _COUNTS:
            setattr(other, name, list(getattr(self, name)))
        return other

    def detach_(self) -> SleepCache:
        """Cut the gradient: what was read so far becomes a constant."""
        self.memory = self.memory.map(Tensor.detach)
        self.at_start = Memory(self.memory.batch_size, self.at_start).map(Tensor.detach).state
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SleepCache:
        """Move to a device. The state stays in float32: 16 bits round away what was written.

        Raises:
            ValueError: if a ``dtype`` narrower than float32 is asked for.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and torch.promote_types(dtype, torch.float32) != dtype:
            raise ValueError(
                f"expected a state of float32 or wider, got {dtype}: 16 bits round away what sleep wrote; "
                "leave the state as it is, the model may still be half precision"
            )

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        self.memory = self.memory.map(move)
        self.at_start = Memory(self.memory.batch_size, self.at_start).map(move).state
        if self.open_ids is not None:
            self.open_ids = self.open_ids.to(device)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the session to one safetensors file, beside and renamed, with a digest of all that is in it.

        Whoever loads it needs the same model.
        """
        if self.owner is None or self.open_ids is None:
            raise ValueError("expected a cache that has read something, got an empty one")
        counts = {name: getattr(self, name) for name in (*_COUNTS, "owner", "columns")}
        write_session(path, Session(self.memory, self.at_start, {"open_ids": self.open_ids}, counts))

    @classmethod
    def load(cls, path: str | os.PathLike, verify: bool = True) -> SleepCache:
        """Read a session that `save` wrote; which model it belongs to is checked when it is used.

        Args:
            path: the file.
            verify: compare its digest; with False, only names, shapes and counts are compared with each other.

        Raises:
            CheckpointError: for a file that is damaged, altered or not whole, or a state narrower than float32.
        """
        session = read_session(path, verify=verify)
        cache = cls()
        cache.memory, cache.at_start, cache.open_ids = session.memory, session.at_start, session.ids["open_ids"]
        for name, value in session.counts.items():
            setattr(cache, name, value)
        return cache

    def __len__(self) -> int:
        return len(self.memory.kv)

    def __repr__(self) -> str:
        return f"SleepCache(rows={len(self.seen)}, seen={self.seen}, open={self.open_lengths}, windows={self.windows})"


def _index(rows: Sequence[int], like: Tensor) -> Tensor | slice:
    """Rows as an index; a slice, which copies nothing, where all rows are meant."""
    if list(rows) == list(range(like.shape[0])):
        return slice(None)
    return torch.tensor(list(rows), device=like.device)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
