"""Sleep: the algorithm (Lee et al., arXiv:2605.26099, Algorithm 1), and nothing but the algorithm.

    for each window of L tokens, in order:
        asleep:  h <- Embed(window);  repeat N times: h, S <- Blocks(h, S);  drop h and the keys
        awake:   h, S <- Blocks(Embed(window), S);  predictions from h

`consolidate` is the first line, `wake` the second, `read` the loop over windows, for rows that fill their windows at
different steps. This is the only module that loops, and it knows no model: what it needs of one is in `Blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from sleepify.cache import SleepCache, Window
from sleepify.errors import NonFiniteStateError
from sleepify.memory import Memory

T_ = TypeVar("T_")


class Blocks(Protocol):
    """What the algorithm asks of a model: a stack of layers that can be run in parts."""

    n_layers: int
    loop_range: tuple[int, int]

    @property
    def masks_padding(self) -> bool:
        """Whether right-padded rows leave the state that each row alone leaves."""

    def open(
        self, input_ids: Tensor, lengths: Sequence[int], positions: Sequence[int], memory: Memory, keep_keys: bool
    ) -> tuple[Tensor, Any]:
        """Embed a window [B, T] and make its masks and rotary tables, once for all passes: (hidden_states, frame)."""

    def run(self, hidden_states: Tensor, memory: Memory, frame: Any, start: int, stop: int) -> tuple[Tensor, Memory]:
        """Layers [start, stop) with the fast-weight layers among them."""

    def close_loop(self, hidden_states: Tensor) -> Tensor:
        """What the architecture does between one pass and the next (Ouro: its final norm)."""

    def last_writer(self, keep_keys: bool) -> int:
        """Layers [0, last_writer) are all that write what survives the window."""


@dataclass(frozen=True)
class Options:
    """How to sleep; the fields are those of `SleepConfig`."""

    n_loops: int
    window_size: int
    sliding: bool = False
    checkpoint: str = "none"
    backprop_loops: int | None = None
    backprop_windows: int | None = None
    check_finite: bool = False
    offload: bool = False
    uniform: bool = False

    @property
    def shares_first_pass(self) -> bool:
        """Whether a sleep may begin with the wake pass over its window instead of making the same pass again.

        Not if calls must be ``uniform``: whether it can depends on which rows are together in a batch.
        """
        return not self.uniform and self.checkpoint != "window" and self.backprop_loops is None

    @property
    def retained(self) -> int:
        """Keys and values that outlive their window."""
        return self.window_size - 1 if self.sliding else 0

    def recompute(self, level: str, function: Callable[..., T_], *arguments: Any) -> T_:
        """Call, and drop the activations to recompute them in the backward pass if ``checkpoint`` is this level."""
        if self.checkpoint == level and torch.is_grad_enabled():
            return recompute(function, *arguments, use_reentrant=False)
        return function(*arguments)


@dataclass(frozen=True)
class FirstPass:
    """A pass over a whole window as far as the last looped layer, from the memory at its start."""

    hidden_states: Tensor
    memory: Memory
    frame: Any


def consolidate(
    blocks: Blocks, window: Window, memory: Memory, options: Options, first: FirstPass | None = None
) -> Memory:
    """Sleep on one window: N passes over it, and the memory that they leave (§5, Alg. 1).

    Args:
        blocks: the model.
        window: its tokens.
        memory: as it was *before* the window's first token, so that no wake pass leaks in (contract 2).
        options: N, and how gradient flows.
        first: the first pass, if a wake pass over the whole window has made it already: the two are the same.

    Returns:
        The state after the last pass and, under sliding eviction, its latest L-1 keys and values.
    """
    keep_keys = options.sliding
    start, stop = blocks.loop_range
    end = blocks.last_writer(keep_keys)
    if first is None:
        hidden, frame = blocks.open(window.input_ids, window.lengths, window.positions, memory, keep_keys)
        hidden, now = options.recompute("loop", blocks.run, hidden, memory, frame, 0, min(start, end))
    else:
        hidden, now, frame = first.hidden_states, first.memory, first.frame
        if options.n_loops > 1:
            hidden = blocks.close_loop(hidden)
    for loop in range(0 if first is None else 1, options.n_loops):
        is_last = loop + 1 == options.n_loops
        # Truncated backpropagation: what enters the last k passes is a constant (§7 names it as future work).
        truncated = options.backprop_loops is not None and loop < options.n_loops - options.backprop_loops
        with torch.no_grad() if truncated else nullcontext():
            now = now.reenter(memory, start, stop)
            # Nothing reads what the last pass computes beyond the last layer that writes.
            until = min(stop, end) if is_last else stop
            hidden, now = options.recompute("loop", blocks.run, hidden, now, frame, start, until)
            if not is_last:
                hidden = blocks.close_loop(hidden)
    hidden, now = options.recompute("loop", blocks.run, hidden, now, frame, stop, max(stop, end))
    return now.advance(window.lengths, window.input_ids.shape[1]).last_keys(options.retained)


def wake(
    blocks: Blocks, window: Window, memory: Memory, options: Options, keep_keys: bool = True, share: bool = False
) -> tuple[Tensor, Memory, FirstPass | None]:
    """One ordinary pass over the next tokens of a window.

    Returns:
        Hidden states [B, T, D] before the final norm, memory and, if the pass is to be shared with the window's
        sleep, what it was at the last looped layer.
    """
    keep = keep_keys or (share and options.sliding)
    hidden, frame = blocks.open(window.input_ids, window.lengths, window.positions, memory, keep)
    stop = blocks.loop_range[1] if share else 0
    hidden, now = options.recompute("loop", blocks.run, hidden, memory, frame, 0, stop) if share else (hidden, memory)
    first = FirstPass(hidden, now, frame) if share else None
    hidden, now = options.recompute("loop", blocks.run, hidden, now, frame, stop, blocks.n_layers)
    return hidden, now.advance(window.lengths, window.input_ids.shape[1]) if keep_keys else now, first


def sleep(
    blocks: Blocks,
    cache: SleepCache,
    rows: Sequence[int],
    options: Options,
    gradient: bool = True,
    first: FirstPass | None = None,
) -> None:
    """Consolidate what is awake in these rows of a cache, full window or not (contract 2).

    Without ``gradient`` the memory that these rows wake up with is a constant; that of other rows is as it was.
    ``first`` is the first pass over the windows of just these rows, if there is one to share.
    """
    for group in _groups(rows, [cache.open_lengths[row] for row in rows], together=blocks.masks_padding):
        window = cache.open_window(group, options.sliding)
        before = cache.before_window(group)
        with nullcontext() if gradient else torch.no_grad():
            if options.offload and options.checkpoint == "window":
                parked = before.map(lambda tensor: tensor.to("cpu", non_blocking=True))
                homes = [tensor.device for tensor in before.tensors()]
                after = options.recompute("window", _fetch_and_consolidate, blocks, window, parked, homes, options)
            else:
                after = options.recompute("window", consolidate, blocks, window, before, options, first)
        if options.check_finite:
            for key, layer in sorted(after.state.items()):
                if not all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in layer):
                    raise NonFiniteStateError(key, window=max(cache.windows[row] for row in group))
        cache.close_window(group, after)


def _fetch_and_consolidate(
    blocks: Blocks, window: Window, parked: Memory, homes: Sequence[torch.device], options: Options
) -> Memory:
    """`consolidate` from a memory that waits on the CPU, where a window boundary costs the accelerator nothing."""
    home = iter(homes)
    return consolidate(blocks, window, parked.map(lambda tensor: tensor.to(next(home), non_blocking=True)), options)


@dataclass(frozen=True)
class Reading:
    """Hidden states of wanted tokens: [M, D], and for each the row and column of ``input_ids`` it belongs to, [M]."""

    hidden_states: Tensor
    rows: Tensor
    columns: Tensor


def read(
    blocks: Blocks,
    cache: SleepCache,
    input_ids: Tensor,
    lengths: Sequence[int],
    wanted: Tensor,
    options: Options,
    keep: bool,
) -> list[Reading]:
    """Read new tokens: sleep whenever a full window is followed by another token, wake where something is asked.

    Args:
        blocks: the model.
        cache: what was read before; it is moved forward.
        input_ids: [B, T], each row's new tokens left-aligned.
        lengths: how many of them are real, per row.
        wanted: [B, T] bool on the CPU: tokens whose hidden states are asked for.
        options: N, L and the rest.
        keep: whether the cache will be read on from (so that the open window must end awake).

    Returns:
        The hidden states asked for, in the order in which they were computed.
    """
    done = [0] * len(lengths)
    sleeps_left = cache.sleeps_ahead(lengths, options.window_size)
    readings: list[Reading] = []
    first_passes: dict[tuple[int, ...], FirstPass | None] = {}
    while rows := [row for row, length in enumerate(lengths) if done[row] < length]:
        full = [row for row in rows if cache.open_lengths[row] == options.window_size]
        for group in _groups(full, [_has_gradient(sleeps_left[row], options) for row in full]):
            gradient = _has_gradient(sleeps_left[group[0]], options)
            first = first_passes.get(tuple(group)) if gradient else None
            sleep(blocks, cache, group, options, gradient, first)
        for row in full:
            sleeps_left[row] -= 1

        take = {row: min(lengths[row] - done[row], options.window_size - cache.open_lengths[row]) for row in rows}
        awake = [
            row
            for row in rows
            if (keep and done[row] + take[row] == lengths[row])
            or bool(wanted[row, done[row] : done[row] + take[row]].any())
        ]
        # Where padding would spoil the state that is kept, rows of one length go together instead.
        groups = _groups(awake, [take[row] for row in awake], together=blocks.masks_padding or not keep)
        windows = [cache.next_window(group, input_ids, done, take, options.sliding) for group in groups]
        first_passes.clear()
        for group, window in zip(groups, windows, strict=True):
            memory = cache.memory.select(group)
            if cache.fixed_shapes and window.input_ids.shape[1] == 1:
                memory = memory.with_columns(options.window_size - 1 + options.retained)
            # A window read whole and slept on next; not where activations are to be dropped at its end.
            share = options.shares_first_pass and all(
                take[row] == options.window_size and done[row] + take[row] < lengths[row] for row in group
            )
            hidden, memory, first = options.recompute("window", wake, blocks, window, memory, options, keep, share)
            first_passes[tuple(group)] = first
            if keep:
                cache.memory = cache.memory.put(group, memory)
            readings.append(_pick(hidden, group, done, take, wanted))
        cache.append(rows, input_ids, done, take)
        for row in rows:
            done[row] += take[row]
    return readings


def _has_gradient(sleeps_left: int, options: Options) -> bool:
    """Whether a sleep that is followed by ``sleeps_left - 1`` others of its row is among the last k."""
    return options.backprop_windows is None or sleeps_left <= options.backprop_windows


def _groups(rows: Sequence[int], keys: Sequence[int], together: bool = False) -> list[list[int]]:
    """Rows with equal keys, or all of them at once; no group is empty."""
    if together:
        return [list(rows)] if rows else []
    groups: dict[int, list[int]] = {}
    for row, key in zip(rows, keys, strict=True):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _pick(hidden: Tensor, group: Sequence[int], done: Sequence[int], take: dict[int, int], wanted: Tensor) -> Reading:
    """The wanted ones among the hidden states [b, T, D] of a wake pass."""
    rows, columns, flat = [], [], []
    width = hidden.shape[1]
    for place, row in enumerate(group):
        local = wanted[row, done[row] : done[row] + take[row]].nonzero().flatten()
        rows.append(torch.full_like(local, row))
        columns.append(local + done[row])
        flat.append(local + place * width)
    index = torch.cat(flat)
    states = hidden.reshape(-1, hidden.shape[-1])
    if index.numel() != states.shape[0]:
        states = states.index_select(0, index.to(hidden.device))
    return Reading(states, torch.cat(rows), torch.cat(columns))
