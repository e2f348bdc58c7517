"""SleepCache: a session, carried from call to call. What transformers asks of a cache, around a `Snapshot`.

It is a `transformers.Cache` so that `generate` accepts it. Everything that it knows is one value, which a call replaces
when it has succeeded: a call that fails leaves the session as it was, and a copy is independent at no cost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sleepify.errors import CacheMismatchError
from sleepify.memory import LayerKey, LayerState, Memory
from sleepify.session_file import read_session, write_session
from sleepify.settings import check_positive, is_whole
from sleepify.snapshot import Snapshot, extend


class SleepCache(Cache):
    """An empty session; hand it to ``model(..., past_key_values=cache)`` or ``model.generate`` and keep it.

    Args:
        fixed_shapes: give every token of a window the same shapes, by room for the keys of a whole window from its
            second token on, into which those of every token are written. Single tokens then need one compiled graph,
            and a CUDA graph can be captured of them; attention looks at L keys (sliding: 2L-1), however few are filled.

    Attributes:
        now: everything that it knows, a `Snapshot`; None before the first call.
    """

    is_compileable = False
    # transformers would take back a token that it has read too many, and does not know that the last made is pending.
    is_croppable = False

    def __init__(self, fixed_shapes: bool = False) -> None:
        super().__init__(layers=[])
        self.fixed_shapes = fixed_shapes
        self.now: Snapshot | None = None

    def reset(self) -> None:
        """Forget everything; the cache is as new and may serve another model or batch."""
        self.now = None

    # --- what there is to see --------------------------------------------------------------------------------------

    @property
    def owner(self) -> str | None:
        """The model that the session belongs to."""
        return None if self.now is None else self.now.owner

    @property
    def memory(self) -> Memory:
        """Fast-weight state and the keys and values of the open window, as they are awake."""
        return Memory(0) if self.now is None else self.now.memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._replace(memory=memory)

    @property
    def at_start(self) -> dict[LayerKey, LayerState]:
        """Fast-weight state at the start of each row's open window."""
        return {} if self.now is None else self.now.at_start

    @at_start.setter
    def at_start(self, at_start: dict[LayerKey, LayerState]) -> None:
        self._replace(at_start=at_start)

    @property
    def open_ids(self) -> Tensor | None:
        """Ids of the open window, [B, L], of which row r has filled ``open_lengths[r]``."""
        return None if self.now is None else self.now.open_ids

    @property
    def open_lengths(self) -> list[int]:
        """Tokens in the open window, per row."""
        return [] if self.now is None else list(self.now.open_lengths)

    @property
    def seen(self) -> list[int]:
        """Tokens read, per row."""
        return [] if self.now is None else list(self.now.seen)

    @property
    def windows(self) -> list[int]:
        """Windows consolidated, per row."""
        return [] if self.now is None else list(self.now.windows)

    @property
    def ephemeral(self) -> list[int]:
        """Ephemeral tokens that are awake, per row; nothing else counts them."""
        return [] if self.now is None else [len(own) for own in self.now.ephemeral]

    @property
    def passes(self) -> list[int]:
        """Passes of the latest sleep, per row; 0 before the first."""
        return [] if self.now is None else list(self.now.passes)

    @property
    def pending(self) -> list[list[int]]:
        """Ids that belong to the text but are read with the next call only: `generate` does not read its last."""
        if self.now is None or not self.now.pending:
            return [[] for _ in self.seen]
        return [ids.tolist() for ids in self.now.pending]

    def _replace(self, **parts: Any) -> None:
        if self.now is None:
            raise ValueError(
                f"expected a session that has read something, to set its {', '.join(parts)}, got an empty one"
            )
        self.now = replace(self.now.finished(), **parts)

    @property
    def state_bytes(self) -> int:
        """Bytes of the fast-weight state alone: constant, however much was read (contract 9)."""
        return sum(_bytes(tensor) for layer in self.memory.state.values() for tensor in layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, with the room that is made for them: at most one window (sliding: two)."""
        if (arena := self.memory.arena) is not None:
            return sum(map(_bytes, arena.buffers))
        return sum(_bytes(tensor) for pair in self.memory.kv.values() for tensor in pair)

    def get_batch_size(self) -> int:
        """Rows, 0 before the first call."""
        return len(self.seen)

    def __len__(self) -> int:
        return len(self.memory.kv)

    def __repr__(self) -> str:
        return f"SleepCache(rows={len(self.seen)}, seen={self.seen}, open={self.open_lengths}, windows={self.windows})"

    # --- called by the model ---------------------------------------------------------------------------------------

    def begin(self, owner: str, batch_size: int, window_size: int, device: torch.device) -> Snapshot:
        """What a call of this model and batch goes on from.

        Raises:
            CacheMismatchError: if the session belongs to another.
        """
        if self.now is None:
            return Snapshot.empty(owner, batch_size, window_size, device, kept=True, fixed_shapes=self.fixed_shapes)
        if self.now.owner != owner:
            raise CacheMismatchError(
                f"expected a cache of this model ({owner}), got one of another ({self.now.owner}); "
                "start a new SleepCache() or call cache.reset()"
            )
        if self.now.batch_size != batch_size:
            raise CacheMismatchError(
                f"expected {self.now.batch_size} rows as in the calls before, got {batch_size}; "
                "start a new SleepCache() or pick rows with cache.batch_select_indices"
            )
        return self.now

    def unread(self, input_ids: Tensor, real: Tensor) -> list[Tensor]:
        """What of whole conversations, ids [B, T] of which some are real, each row has not read yet.

        Raises:
            CacheMismatchError: if a row does not begin with what the session has read.
        """
        assert self.now is not None and self.now.digest is not None
        # Of ephemeral tokens a session knows no more than that they are there: they are no part of the conversation.
        seen = self.now.seen
        rows = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)]
        shown = max(seen)
        begun = torch.stack([torch.nn.functional.pad(ids[:shown], (0, shown - min(shown, len(ids)))) for ids in rows])
        mine = extend(self.now.digest, self.now.open_ids, self.now.open_lengths)
        given = extend(torch.zeros_like(self.now.digest), begun, seen)
        for row, (ids, same) in enumerate(zip(rows, mine.eq(given).tolist(), strict=True)):
            if len(ids) <= seen[row] or not same:
                raise CacheMismatchError(
                    f"expected the whole conversation, which begins with the {seen[row]} tokens that row {row} of the "
                    f"session has read and goes on after them, got {len(ids)} tokens "
                    f"{'that begin so' if same and len(ids) == seen[row] else 'of another text'}; to send only what "
                    "is new, generate(new_ids, past_key_values=cache, new_tokens=True)"
                )
        return [ids[count:] for ids, count in zip(rows, seen, strict=True)]

    def text_lengths(self) -> list[int]:
        """The position of each row's next token: all that were read or made, and ephemeral ones that are awake."""
        waiting = map(len, self.pending)
        return [sum(counts) for counts in zip(self.seen, self.ephemeral, waiting, strict=True)]

    # --- what transformers asks of a cache -------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ``input_ids`` consumed, padding included."""
        return 0 if self.now is None else self.now.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a session has no end."""
        return -1

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` columns, or all but the last ``-max_length``; see `rewind`."""
        if not is_whole(max_length):
            raise ValueError(f"expected max_length to be a whole number, got {max_length!r}")
        if max_length >= 0 and any(self.ephemeral):
            raise ValueError(
                f"expected no ephemeral tokens in the open window, of which columns know nothing, got {self.ephemeral} "
                "per row; take back so many tokens with rewind(n) or crop(-n)"
            )
        columns = self.get_seq_length() + max(map(len, self.pending), default=0)
        self.rewind(-max_length if max_length < 0 else max(0, columns - max_length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        check_positive("repeats", repeats)
        self.batch_select_indices([row for row in range(len(self.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Only some rows, in the order given.

        Args:
            indices: their numbers, or a mask of one bool per row.

        Raises:
            ValueError: for rows that there are not.
        """
        chosen = indices.tolist() if isinstance(indices, Tensor) else indices
        if not isinstance(chosen, (list, tuple, range)) or not all(isinstance(row, int) for row in chosen):
            raise ValueError(f"expected row numbers, or one boolean per row, got {indices!r}")
        if self.now is None:
            return
        batch = self.now.batch_size
        if chosen and len(chosen) == batch and all(isinstance(row, bool) for row in chosen):
            chosen = [row for row, taken in enumerate(chosen) if taken]
        if not chosen or not all(is_whole(row) for row in chosen):
            raise ValueError(f"expected row numbers, or {batch} booleans of which one is true, got {indices!r}")
        if any(not -batch <= row < batch for row in chosen):
            raise ValueError(f"expected rows from 0 to {batch - 1}, got {chosen}")
        self.now = self.now.select([row % batch for row in chosen])

    # --- a session as a value --------------------------------------------------------------------------------------

    def clone(self) -> SleepCache:
        """An independent copy at no cost: reading on from one leaves the other as it is."""
        other = SleepCache(self.fixed_shapes)
        other.now = self.now
        return other

    def rewind(self, n: int | Sequence[int]) -> None:
        """Take back the last ``n`` tokens of every row (or n per row), at most to the start of the open window.

        Ephemeral tokens count, as long as they are awake.

        What is left of the open window is read again with the next call.

        Raises:
            ValueError: for more tokens than are awake: what was slept on is in the state for good.
        """
        counts: Any = [n] * max(1, len(self.seen)) if is_whole(n) else n
        if not isinstance(counts, (list, tuple)) or not all(is_whole(count) and count >= 0 for count in counts):
            raise ValueError(f"expected how many tokens to take back, 0 or more, or one number per row, got {n!r}")
        if self.now is None:
            if any(counts):
                raise ValueError(f"expected to take back at most 0 tokens of an empty session, got {n!r}")
            return
        if len(counts) != self.now.batch_size:
            raise ValueError(f"expected one number per row ({self.now.batch_size}), got {n!r}")
        self.now = self.now.rewind(counts)

    @staticmethod
    def join(caches: Sequence[SleepCache]) -> SleepCache:
        """The rows of several sessions of one model as one batch.

        Raises:
            CacheMismatchError: for sessions of different models, or none that has read something.
        """
        if not isinstance(caches, (list, tuple)) or not all(isinstance(cache, SleepCache) for cache in caches):
            raise TypeError(f"expected a list of SleepCache, got {caches!r}")
        parts = [cache.now for cache in caches if cache.now is not None]
        if not parts or len(parts) != len(caches) or len({part.owner for part in parts}) != 1:
            owners = [cache.owner for cache in caches]
            raise CacheMismatchError(f"expected sessions of one model that have read something, got owners {owners}")
        joined = SleepCache(caches[0].fixed_shapes)
        joined.now = Snapshot.join(parts)
        return joined

    def split(self) -> list[SleepCache]:
        """One session per row."""
        parts = []
        for row in range(len(self.seen)):
            part = self.clone()
            part.batch_select_indices([row])
            parts.append(part)
        return parts

    @property
    def is_sleeping(self) -> bool:
        """Whether a sleep in the background has still to take its place, see ``model.sleep``."""
        return self.now is not None and self.now.nap is not None

    def wait(self) -> SleepCache:
        """Wait for a sleep in the background; what came meanwhile is read again with the next call.

        Raises:
            Exception: what the sleep failed with, once; after that the session is as if it had not been asked for.
        """
        if self.now is not None:
            self.now = self.now.finished()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Without room for more, in which another session may have written.
        alone = None if self.now is None else self.now.finished().map(Tensor.clone)
        return self.__dict__ | {"now": alone}

    def detach_(self) -> SleepCache:
        """Cut the gradient: what was read so far becomes a constant."""
        if self.now is not None:
            self.now = self.now.map(Tensor.detach)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SleepCache:
        """Move to a device. The state stays in float32: 16 bits round away what was written.

        Raises:
            ValueError: if another ``dtype`` than float32 is asked for.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32):
            raise ValueError(
                f"expected a state of float32, got {dtype}: 16 bits round away what sleep wrote, and a wider one is "
                "made by a model that is in float64; leave the state as it is, the model may still be half precision"
            )

        if self.now is not None:
            self.now = self.now.finished().map(lambda tensor: tensor.to(device), ids=True)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the session to one safetensors file, beside and renamed, with a digest of all that is in it.

        Ephemeral tokens are left out, as if they had not been read: what follows them is read again after loading.
        Whoever loads it needs the same model.
        """
        if self.now is None:
            raise ValueError("expected a cache that has read something, got an empty one")
        write_session(path, self.now)

    @classmethod
    def load(cls, path: str | os.PathLike, verify: bool = True) -> SleepCache:
        """Read a session that `save` wrote; which model it belongs to is checked when it is used.

        Args:
            path: the file.
            verify: compare its digest; with False, only names, shapes and counts are compared with each other.

        Raises:
            CheckpointError: for a file that is damaged, altered or not whole, or a state narrower than float32.
        """
        snapshot = read_session(path, verify=verify)
        cache = cls(snapshot.fixed_shapes)
        cache.now = snapshot
        return cache


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
