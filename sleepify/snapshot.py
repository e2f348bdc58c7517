"""Snapshot: a session at one moment, as a value. Row by row, because rows fill their windows at different steps.

A row has an *open window*: up to L tokens read awake, whose ids are kept so that sleep can replay them from the state
at the window's start. Ephemeral tokens may stand between them until the next sleep: they count nowhere, and `lasting`
is the session that never read them. Every operation returns a new snapshot and leaves the old one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sleepify.ephemeral import Ephemeral, among, note, take_back
from sleepify.memory import LayerKey, LayerState, Memory, changed, index_of
from sleepify.schedule import Round, Wake
from sleepify.settings import Settings

_COUNTS = ("open_lengths", "retained", "seen", "windows", "passes", "stale", "ephemeral")
# An odd multiplier of full period modulo 2^64 (Knuth's), so that every token of a text moves every later digest.
_MULTIPLIER = 6364136223846793005
# Columns by which room for keys grows where ephemeral tokens fill more than a window.
_PIECE = 64


@dataclass(frozen=True)
class Window:
    """Tokens of one window, one row each, left-aligned: ids [B, T], tokens per row, position of each row's first."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    positions: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [self.input_ids]


class Nap(Protocol):
    """A sleep that is being made in the background, on so many tokens of each row."""

    @property
    def held(self) -> tuple[int, ...]:
        """How many."""

    def woken(self, session: Snapshot, more: Sequence[int] | None) -> Snapshot:
        """See `Snapshot.finished`."""


@dataclass(frozen=True)
class Snapshot:
    """A session at one moment.

    Attributes:
        owner: the model that it belongs to.
        memory: fast-weight state and the keys and values of the open window, as they are awake.
        at_start: fast-weight state as it was at the start of each row's open window.
        open_ids: ids of the open window, [B, L]; row r has ``open_lengths[r]``.
        open_lengths: tokens in the open window, per row.
        retained: keys and values that were there when the open window began, per row (sliding eviction).
        seen: tokens read, per row.
        windows: windows consolidated, per row.
        passes: passes of the latest sleep, per row.
        stale: rows whose memory is that at the start of the open window, although ``open_ids`` says what was read
            since: it is to be read again before anything else is.
        ephemeral: ephemeral tokens in the open window, per row.
        pending: ids [n] per row that belong to the text but were not read yet; empty if there are none in any row.
        digest: of all ids up to the start of the open window, [B]; None where nobody will ask.
        columns: columns of ``input_ids`` consumed, padding included.
        fixed_shapes: whether every token of a window is to find the same shapes.
        nap: a sleep that is being made of it in the background; ``open_ids`` is wider meanwhile.
    """

    owner: str
    memory: Memory
    at_start: dict[LayerKey, LayerState]
    open_ids: Tensor
    open_lengths: tuple[int, ...]
    retained: tuple[int, ...]
    seen: tuple[int, ...]
    windows: tuple[int, ...]
    passes: tuple[int, ...]
    stale: tuple[bool, ...]
    ephemeral: tuple[Ephemeral, ...]
    pending: tuple[Tensor, ...] = ()
    digest: Tensor | None = None
    columns: int = 0
    fixed_shapes: bool = False
    nap: Nap | None = None

    @classmethod
    def empty(
        cls,
        owner: str,
        batch_size: int,
        window_size: int,
        device: torch.device | None,
        kept: bool = False,
        fixed_shapes: bool = False,
    ) -> Snapshot:
        """Of a model that has read nothing yet; ``kept`` if it will be asked what it has read."""
        ids = torch.zeros(batch_size, window_size, dtype=torch.long, device=device)
        digest = ids.new_zeros(batch_size) if kept else None
        counts: dict[str, Any] = dict.fromkeys(_COUNTS, (0,) * batch_size)
        counts |= {"stale": (False,) * batch_size, "ephemeral": ((),) * batch_size}
        return cls(owner, Memory(batch_size), {}, ids, digest=digest, fixed_shapes=fixed_shapes, **counts)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.seen)

    @property
    def awake_lengths(self) -> tuple[int, ...]:
        """Tokens that are awake, ephemeral ones too, per row."""
        return tuple(length + len(extra) for length, extra in zip(self.open_lengths, self.ephemeral, strict=True))

    def finished(self, more: Sequence[int] | None = None) -> Snapshot:
        """Behind the sleep that is being made of it, if that is done; it is waited for if ``more`` tokens per row have
        no room meanwhile, or None are said.

        Raises:
            BaseException: what the sleep failed with.
        """
        return self if self.nap is None else self.nap.woken(self, more)

    # --- text ------------------------------------------------------------------------------------------------------

    def first(self) -> tuple[list[Tensor], list[list[int]]]:
        """What each row must read before anything new, its open window if that is stale and what is pending, and which
        of it is ephemeral; of no row where none must."""
        if not self.pending and not any(self.stale):
            return [], []
        nothing = self.open_ids[0, :0] if self.batch_size else self.open_ids.new_zeros(0)
        pending = self.pending or (nothing,) * self.batch_size
        reread = [
            among(self.open_ids[row, :length], self.ephemeral[row]) if stale else (nothing, [])
            for row, (length, stale) in enumerate(zip(self.open_lengths, self.stale, strict=True))
        ]
        whole = [torch.cat([ids, more]) for (ids, _), more in zip(reread, pending, strict=True)]
        return whole, [places for _, places in reread]

    def from_start(self) -> Snapshot:
        """Where stale rows have read nothing of their open window, and nothing is pending: `first` is read next.

        What was pending has its columns, which came with no call.
        """
        if not self.pending and not any(self.stale):
            return self
        columns = self.columns + max(map(len, self.pending), default=0)
        if not any(self.stale):
            return replace(self, pending=(), columns=columns)
        back = [length if stale else 0 for length, stale in zip(self.open_lengths, self.stale, strict=True)]
        return replace(
            self,
            open_lengths=_minus(self.open_lengths, back),
            seen=_minus(self.seen, back),
            stale=(False,) * self.batch_size,
            ephemeral=tuple(() if stale else own for own, stale in zip(self.ephemeral, self.stale, strict=True)),
            pending=(),
            columns=columns,
        )

    def rewind(self, counts: Sequence[int]) -> Snapshot:
        """Without the last ``counts[r]`` ids of every row: first pending ones, then of the open window.

        Raises:
            ValueError: for more than there are.
        """
        if self.nap is not None:
            return self.finished().rewind(counts)
        waiting = [len(ids) for ids in self.pending] or [0] * self.batch_size
        most = [have + more for have, more in zip(self.awake_lengths, waiting, strict=True)]
        if any(not 0 <= count <= limit for count, limit in zip(counts, most, strict=True)):
            raise ValueError(
                f"expected to take back at most {most} tokens, those of the open window (what was slept on is in the "
                f"state for good), got {list(counts)}; keep a cache.clone() to go back further"
            )
        unread = [min(count, more) for count, more in zip(counts, waiting, strict=True)]
        back = [count - gone for count, gone in zip(counts, unread, strict=True)]
        pending = tuple(ids[: len(ids) - gone] for ids, gone in zip(self.pending, unread, strict=False))
        texts = zip(self.open_lengths, self.ephemeral, back, strict=True)
        ordinary, ephemeral = zip(*(take_back(*text) for text in texts), strict=True)
        return replace(
            self._stale_in([row for row, count in enumerate(back) if count]),
            open_lengths=_minus(self.open_lengths, ordinary),
            seen=_minus(self.seen, ordinary),
            ephemeral=ephemeral,
            pending=pending if any(len(ids) for ids in pending) else (),
            columns=max(0, self.columns - max(ordinary)),
        )

    def at_rest(self) -> Snapshot:
        """The same without the keys of its open window, which the next call reads again: to be set aside."""
        return self._stale_in([row for row, length in enumerate(self.awake_lengths) if length])

    def lasting(self, rows: Sequence[int] | None = None) -> Snapshot:
        """The same where these rows (all by default) have read no ephemeral token, and nothing in sight of one."""
        chosen = range(self.batch_size) if rows is None else rows
        contaminated = [row for row in chosen if self.ephemeral[row]]
        if not contaminated:
            return self
        session = self._stale_in(contaminated)
        # Where nothing else is open there is nothing to read again.
        stale = (
            old and (own > 0 or row not in contaminated)
            for row, (old, own) in enumerate(zip(session.stale, self.open_lengths, strict=True))
        )
        ephemeral = (() if row in contaminated else own for row, own in enumerate(self.ephemeral))
        return replace(session, stale=tuple(stale), ephemeral=tuple(ephemeral))

    def _stale_in(self, rows: Sequence[int]) -> Snapshot:
        """With the memory of these rows as it was at the start of their open window."""
        rows = [row for row in rows if not self.stale[row]]
        if not rows:
            return self
        before = self.before_window(rows)
        if len(rows) < self.batch_size:
            before = before.or_zeros(self.memory)
        memory = self.memory.put(rows, before)
        return replace(self, memory=memory, stale=tuple(old or row in rows for row, old in enumerate(self.stale)))

    # --- awake -----------------------------------------------------------------------------------------------------

    def next_window(self, each: Round, group: Wake, input_ids: Tensor, sliding: bool) -> Window:
        """The tokens that these rows read awake in this round."""
        start = dict(zip(each.rows, each.starts, strict=True))
        starts, width = [start[row] for row in group.rows], max(group.counts)
        ids = input_ids[index_of(group.rows, input_ids)]
        if len(set(starts)) == 1:
            ids = ids.narrow(1, starts[0], width)
        else:
            columns = torch.tensor(starts)[:, None] + torch.arange(width)[None, :]
            ids = ids.gather(1, columns.clamp_(max=input_ids.shape[1] - 1).to(ids.device, non_blocking=True))
        first = self.seen if sliding else self.open_lengths
        return Window(ids, group.counts, tuple(first[row] + len(self.ephemeral[row]) for row in group.rows))

    def awake(self, group: Wake, n_tokens: int, settings: Settings) -> Memory:
        """The memory that these rows go on with when they read so many tokens."""
        memory = self.memory.select(group.rows)
        # What is written in place is no value that a gradient could be taken through. A sleep that shares this pass
        # begins again before it, where there was no room.
        if not self.fixed_shapes or n_tokens > 1 or not memory.kv or group.shares or torch.is_grad_enabled():
            return memory.without_room()
        # The window that is open, longer while one is slept on in the background; ephemeral tokens come beyond it.
        columns, needed = self.open_ids.shape[1] + settings.retained, max(memory.kv_lengths) + 1
        return memory.with_room(columns if needed <= columns else -(-needed // _PIECE) * _PIECE)

    def remember(self, rows: Sequence[int], memory: Memory) -> Snapshot:
        """With what reading awake left in these rows."""
        return changed(self, memory=self.memory.put(rows, memory))

    def append(self, each: Round, input_ids: Tensor) -> Snapshot:
        """Count a round's tokens in and keep their ids, for the replay if they are not ephemeral."""
        open_lengths, seen, ephemeral = list(self.open_lengths), list(self.seen), list(self.ephemeral)
        together = len(each.rows) == self.batch_size and not any(each.ephemeral)
        if together and all(len(set(values)) == 1 for values in (each.starts, each.counts, open_lengths)):
            have, start, count = open_lengths[0], each.starts[0], each.counts[0]
            new = input_ids[:, start : start + count]
            open_ids = self.open_ids.slice_scatter(new, 1, have, have + count)
        else:
            taken = each.ordinary()
            index = [(np.full(len(c), row), c, open_lengths[row] + np.arange(len(c))) for row, c in taken.items()]
            places = torch.from_numpy(np.concatenate(index, axis=1)).to(input_ids.device, non_blocking=True)
            row_at, source, target = places
            open_ids = self.open_ids.index_put((row_at, target), input_ids[row_at, source])
        for place, (row, start, count) in enumerate(zip(each.rows, each.starts, each.counts, strict=True)):
            own = each.ephemeral[place] if each.ephemeral else ()
            ephemeral[row] += note(input_ids[row], own, start, open_lengths[row])
            open_lengths[row] += count - len(own)
            seen[row] += count - len(own)
        return changed(
            self,
            open_ids=open_ids,
            open_lengths=tuple(open_lengths),
            seen=tuple(seen),
            ephemeral=tuple(ephemeral),
        )

    # --- asleep ----------------------------------------------------------------------------------------------------

    def open_window(self, rows: Sequence[int], sliding: bool) -> Window:
        """The open window of each row as sleep replays it."""
        lengths = tuple(self.open_lengths[row] for row in rows)
        ids = self.open_ids[index_of(rows, self.open_ids), : max(lengths)]
        firsts = tuple(self.seen[row] - self.open_lengths[row] if sliding else 0 for row in rows)
        return Window(ids, lengths, firsts)

    def before_window(self, rows: Sequence[int]) -> Memory:
        """The memory at the start of each row's open window: the state then, and the keys retained then."""
        memory = Memory(self.batch_size, self.at_start, self.memory.kv, self.memory.kv_lengths)
        return memory.select(rows).first_keys([self.retained[row] for row in rows])

    def close_window(self, rows: Sequence[int], memory: Memory, passes: Sequence[int]) -> Snapshot:
        """With what sleep, of so many passes per row, left in the place of the open window; all else of it is gone."""
        at_start = Memory(self.batch_size, self.at_start).put(rows, Memory(memory.batch_size, memory.state))
        lengths = [length if row in set(rows) else 0 for row, length in enumerate(self.open_lengths)]
        counts = {name: list(getattr(self, name)) for name in _COUNTS}
        for row, length, made in zip(rows, memory.kv_lengths, passes, strict=True):
            counts["open_lengths"][row], counts["retained"][row], counts["stale"][row] = 0, length, False
            counts["windows"][row] += 1
            counts["passes"][row], counts["ephemeral"][row] = made, ()
        closed: dict[str, Any] = {name: tuple(values) for name, values in counts.items()}
        return replace(
            self,
            memory=self.memory.put(rows, memory),
            at_start=at_start.state,
            digest=None if self.digest is None else extend(self.digest, self.open_ids, lengths),
            **closed,
        )

    # --- rows and tensors ------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> Snapshot:
        """Only these rows, in this order."""
        if self.nap is not None:
            return self.finished().select(rows)
        at_start = Memory(self.batch_size, self.at_start).select(rows)
        counts: dict[str, Any] = {name: tuple(getattr(self, name)[row] for row in rows) for name in _COUNTS}
        return replace(
            self,
            memory=self.memory.select(rows),
            at_start=at_start.state,
            open_ids=self.open_ids[index_of(rows, self.open_ids)],
            pending=tuple(self.pending[row] for row in rows) if self.pending else (),
            digest=None if self.digest is None else self.digest[index_of(rows, self.digest)],
            **counts,
        )

    @classmethod
    def join(cls, parts: Sequence[Snapshot]) -> Snapshot:
        """The rows of several, all of one model, one after the other."""
        parts = [part.finished() for part in parts]
        whole = sum(part.batch_size for part in parts)
        memory, at_start, begin = Memory(whole), Memory(whole), 0
        for part in parts:
            rows = range(begin, begin := begin + part.batch_size)
            memory = memory.put(rows, part.memory)
            at_start = at_start.put(rows, Memory(part.batch_size, part.at_start))
        waiting = any(part.pending for part in parts)
        counts: dict[str, Any] = {name: tuple(v for part in parts for v in getattr(part, name)) for name in _COUNTS}
        nothing = parts[0].open_ids.new_zeros(0)
        return replace(
            parts[0],
            memory=memory,
            at_start=at_start.state,
            open_ids=torch.cat([part.open_ids for part in parts]),
            pending=tuple(ids for part in parts for ids in part.pending or (nothing,) * part.batch_size)
            if waiting
            else (),
            digest=torch.cat([part.digest for part in parts if part.digest is not None]),
            columns=max(part.columns for part in parts),
            **counts,
        )

    def put(self, rows: Sequence[int], part: Snapshot) -> Snapshot:
        """With a session of other rows in the place of these."""
        others = [row for row in range(self.batch_size) if row not in set(rows)]
        parts = [part, self.select(others)] if others else [part]
        places = [*rows, *others]
        return Snapshot.join(parts).select([places.index(row) for row in range(self.batch_size)])

    def detached(self) -> Snapshot:
        """As a constant; itself, if it is one."""
        # What was written into room has none.
        pairs = () if self.memory.arena is not None else self.memory.kv.values()
        held = chain(*self.memory.state.values(), *self.at_start.values(), *pairs)
        return self.map(Tensor.detach) if any(x is not None and x.requires_grad for x in held) else self

    def map(self, function: Callable[[Tensor], Tensor], ids: bool = False) -> Snapshot:
        """With ``function`` applied to every tensor of the memory, and to the ids if it is to be."""
        at_start = Memory(self.batch_size, self.at_start).map(function)
        mapped = replace(self, memory=self.memory.map(function), at_start=at_start.state)
        if not ids:
            return mapped
        pending = tuple(function(each) for each in self.pending)
        digest = None if self.digest is None else function(self.digest)
        return replace(mapped, open_ids=function(self.open_ids), pending=pending, digest=digest)


def extend(digest: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The digest [B] of a text after ``lengths[r]`` more of the ids [B, T]: a polynomial in them modulo 2^64."""
    width = max(lengths, default=0)
    if not width:
        return digest
    counts = torch.tensor(lengths).to(ids.device, non_blocking=True)[:, None]
    powers = torch.full((width + 1,), _MULTIPLIER, device=ids.device).index_fill_(0, counts.new_zeros(1), 1).cumprod(0)
    left = counts - 1 - torch.arange(width, device=ids.device)
    weights = powers[left.clamp(min=0)] * (left >= 0)
    return digest * powers[counts[:, 0]] + ((ids[:, :width] + 1) * weights).sum(1)


def _minus(values: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    return tuple(value - other for value, other in zip(values, others, strict=True))
