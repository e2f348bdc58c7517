"""Sleep: the algorithm (Lee et al., arXiv:2605.26099, Algorithm 1), and nothing but the algorithm.

    for each window of L tokens, in order:                                                                    `read`
        asleep:  h <- Embed(window);  repeat N times: h, S <- Blocks(h, S);  drop h and the keys       `consolidate`
        awake:   h, S <- Blocks(Embed(window), S);  predictions from h                                        `wake`

What is decided about it (who sleeps when, which layers a pass runs, where gradient flows) is in `schedule`, before
anything runs, and in `convergence`. This is the only module that loops; what it needs of a model is in `Blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sleepify.convergence import Course
from sleepify.errors import NonFiniteStateError
from sleepify.memory import Memory
from sleepify.recompute import recompute
from sleepify.schedule import Round, Sleep, Wake
from sleepify.settings import Settings
from sleepify.snapshot import Snapshot, Window

Watch = Callable[[Sleep, Memory], None]
Branch = Callable[[Sleep, Sequence[Memory]], None]


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


class FirstPass(NamedTuple):
    """What the first pass of a sleep leaves: hidden states, memory, and the window's frame."""

    hidden_states: Tensor
    memory: Memory
    frame: Any


def consolidate(
    blocks: Blocks, window: Window, memory: Memory, course: Course, settings: Settings, first: FirstPass | None = None
) -> list[Memory]:
    """Sleep on one window: N passes over it, and the memory that they leave (§5, Alg. 1).

    Args:
        blocks: the model.
        window: its tokens.
        memory: as it was *before* the window's first token, so that no wake pass leaks in (contract 2).
        course: prelude, N passes, coda, and which rows stop before the last.
        settings: what is recomputed and what retained.
        first: the first pass, if a wake pass over the whole window has made it already: the two are the same.

    Returns:
        State and, under sliding eviction, latest L-1 keys and values after each row's last pass; before it those after
        every other pass that ``ends``, what a sleep of so few passes leaves.
    """
    memory, plan, ends = memory.fetched(), course.plan, list[Memory]()
    if first is None:
        hidden, frame = blocks.open(window.input_ids, window.lengths, window.positions, memory, settings.sliding)
        hidden, now = _run(settings, blocks, hidden, memory, frame, *plan.prelude)
    else:
        hidden, now, frame = first
    for loop, each in enumerate(plan.loops):
        # Truncated backpropagation: what enters the last passes is a constant (§7 names it as future work).
        with torch.set_grad_enabled(torch.is_grad_enabled() and each.gradient):
            if loop or first is None:
                now = now.reenter(memory, *blocks.loop_range)
                hidden, now = _run(settings, blocks, hidden, now, frame, each.start, each.stop)
            if course.asks(loop, memory, now):
                _, end = _run(settings, blocks, hidden, now, frame, *plan.coda)
                ends.append(end.advance(window.lengths, window.input_ids.shape[1]).last_keys(settings.retained))
            if course.is_over(loop):
                break
            hidden = blocks.close_loop(hidden)
    return course.left(ends)


def wake(
    blocks: Blocks, window: Window, memory: Memory, settings: Settings, keep_keys: bool = True, share: bool = False
) -> tuple[Tensor, Memory, FirstPass | None]:
    """One ordinary pass over the next tokens of a window: hidden states [B, T, D] before the final norm, memory and, if
    the window's sleep is to ``share`` the pass, what that goes on with.
    """
    keep = keep_keys or (share and settings.sliding)
    hidden, frame = blocks.open(window.input_ids, window.lengths, window.positions, memory, keep)
    first, now, middle = None, memory, 0
    if share:
        middle = blocks.loop_range[1]
        hidden, now = _run(settings, blocks, hidden, now, frame, 0, middle)
        first = FirstPass(hidden, now, frame)
    hidden, now = _run(settings, blocks, hidden, now, frame, middle, blocks.n_layers)
    return hidden, now.advance(window.lengths, window.input_ids.shape[1]) if keep_keys else now, first


def sleep(
    blocks: Blocks,
    before: Snapshot,
    each: Sleep,
    settings: Settings,
    first: FirstPass | None = None,
    watch: Watch | None = None,
    branch: Branch | None = None,
) -> Snapshot:
    """Consolidate what is awake in some rows of a session, full window or not (contract 2); ``watch`` is shown it."""
    window, memory = before.open_window(each.rows, settings.sliding), before.before_window(each.rows)
    course = Course(settings, blocks.loop_range, blocks.last_writer(settings.sliding), each.rows, branch is not None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and each.gradient):
        if settings.offload and settings.checkpoint == "window":
            # On the CPU a window boundary costs the accelerator nothing until the backward pass.
            memory = memory.parked()
        *earlier, after = recompute(settings, "window", consolidate, blocks, window, memory, course, settings, first)
    if settings.check_finite and (key := after.not_finite()) is not None:
        raise NonFiniteStateError(key, window=max(before.windows[row] for row in each.rows))
    if watch is not None:
        watch(each, after)
    if branch is not None:
        branch(each, earlier)
    return before.close_window(each.rows, after, course.passes)


def read(
    blocks: Blocks,
    session: Snapshot,
    input_ids: Tensor,
    rounds: Sequence[Round],
    settings: Settings,
    keep: bool,
    watch: Watch | None = None,
    branch: Branch | None = None,
) -> tuple[Snapshot, list[Tensor]]:
    """Read new tokens: sleep whenever a full window is followed by another token, wake where something is asked.

    Args:
        blocks: the model.
        session: what was read before.
        input_ids: [B, T], each row's new tokens left-aligned.
        rounds: who sleeps and who wakes, by `schedule`.
        settings: N, L and the rest.
        keep: whether the session will be read on from (so that the open window must end awake).
        watch: is shown every sleep and the memory that it leaves.
        branch: is shown every sleep and the memories that its passes before the last would have left.

    Returns:
        The session afterwards, and the hidden states [M, D] before the final norm of the tokens that were asked for,
        in the order of the schedule, in pieces.
    """
    hidden_states: list[Tensor] = []
    first: FirstPass | None = None
    for each in rounds:
        for nap in each.sleeps:
            session = sleep(blocks, session, nap, settings, first if nap.shares else None, watch, branch)
        first = None
        for group in each.wakes:
            window = session.next_window(each, group, input_ids, settings.sliding)
            memory = session.awake(group, window.input_ids.shape[1], settings)
            keeping = (settings, keep, group.shares)
            hidden, memory, made = recompute(settings, "window", wake, blocks, window, memory, *keeping)
            first = made or first
            session = session.remember(group.rows, memory) if keep else session
            hidden_states.append(_pick(hidden, group))
        session = session.append(each, input_ids)
    return session, hidden_states


def _run(settings: Settings, blocks: Blocks, *arguments: Any) -> tuple[Tensor, Memory]:
    return recompute(settings, "loop", blocks.run, *arguments)


def _pick(hidden: Tensor, group: Wake) -> Tensor:
    """The wanted ones [m, D] among the hidden states [b, T, D] of a wake pass."""
    states = hidden.reshape(-1, hidden.shape[-1])
    if group.picked is None:
        return states
    return states.index_select(0, torch.from_numpy(group.picked).to(hidden.device, non_blocking=True))
