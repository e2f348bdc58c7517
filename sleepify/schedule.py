"""Who sleeps and who wakes, round by round: whole numbers only, decided before anything runs.

Rows of a batch fill their windows at different steps. In every round each row that has tokens left first sleeps on its
window if that is full, then takes tokens up to the window's end; it reads them awake if something is asked of them.
Ephemeral tokens fill no window: they are taken with the ordinary ones before them.
`schedule` makes the list of rounds from lengths alone. `sleep.read` carries it out, ranks agree on it before a step,
and `cost` says what it takes at least. `passes` does the same for the inside of one sleep.

What nobody reads does not come up: a row ends at the last token of which something is asked, unless its session is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Pass:
    """One of the N passes of a sleep: layers [start, stop), with gradient or not, whether it is the last, and whether
    what it leaves is asked for (that of the last always is)."""

    start: int
    stop: int
    gradient: bool = True
    is_last: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Passes:
    """A sleep from the inside: layers of the prelude and the coda, once each, and the passes between them."""

    prelude: tuple[int, int]
    loops: tuple[Pass, ...]
    coda: tuple[int, int]

    @property
    def layer_calls(self) -> int:
        """Layers of the base that it runs."""
        spans = [self.prelude, self.coda, *((each.start, each.stop) for each in self.loops)]
        return sum(stop - start for start, stop in spans)


def passes(
    n_loops: int,
    loop_range: tuple[int, int],
    last_writer: int,
    backprop_loops: int | None = None,
    every: bool = False,
) -> Passes:
    """The passes of one sleep.

    Args:
        n_loops: N.
        loop_range: layers [start, stop) that are looped.
        last_writer: layers from this one on write nothing that outlives the window, so the last pass ends there.
        backprop_loops: gradient through the last k passes only; None for all.
        every: whether it is asked what each pass leaves.
    """
    start, stop = loop_range
    first = 0 if backprop_loops is None else n_loops - backprop_loops
    loops = tuple(
        Pass(start, max(start, min(stop, last_writer)) if last else stop, loop >= first, last, last or every)
        for loop in range(n_loops)
        for last in (loop + 1 == n_loops,)
    )
    return Passes((0, min(start, last_writer)), loops, (stop, max(stop, last_writer)))


@dataclass(frozen=True)
class Sleep:
    """Rows that sleep together, all on a full window.

    Attributes:
        rows: of the batch.
        gradient: whether the memory they wake up with carries one (truncated backpropagation).
        shares: whether the round before has made its first pass, see `Wake`.
    """

    rows: tuple[int, ...]
    gradient: bool = True
    shares: bool = False


@dataclass(frozen=True)
class Wake:
    """Rows that are read awake together.

    Attributes:
        rows: of the batch.
        counts: tokens of each, from where it stands in this round.
        shares: whether the pass is also the first one of the sleep on the same windows, in the next round.
        picked: places of the wanted tokens among the [b * T] of the pass, T the largest count; None for all of them.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    shares: bool = False
    picked: np.ndarray | None = None


@dataclass(frozen=True)
class Round:
    """Sleep, then take ``counts`` tokens of ``rows`` from column ``starts`` on, of which some are read awake.

    Attributes:
        ephemeral: columns of the ephemeral ones among them, per row; empty if no row of the call has any.
    """

    sleeps: tuple[Sleep, ...]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    wakes: tuple[Wake, ...]
    ephemeral: tuple[tuple[int, ...], ...] = ()

    def ordinary(self) -> dict[int, np.ndarray]:
        """The columns of the others, by row."""
        taken = {}
        for place, (row, start, count) in enumerate(zip(self.rows, self.starts, self.counts, strict=True)):
            columns = np.arange(start, start + count)
            own = self.ephemeral[place] if self.ephemeral else ()
            taken[row] = np.setdiff1d(columns, own, assume_unique=True) if own else columns
        return taken


@dataclass(frozen=True)
class Schedule:
    """All rounds of a call.

    Attributes:
        rounds: in order.
        rows, columns: of the wanted tokens, [M] each, in the order in which the wake passes give them.
    """

    rounds: tuple[Round, ...] = ()
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    columns: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def schedule(
    open_lengths: Sequence[int],
    lengths: Sequence[int],
    wanted: np.ndarray | None,
    window_size: int,
    *,
    keep: bool,
    mixes_lengths: bool = True,
    may_share: bool = False,
    backprop_windows: int | None = None,
    ephemeral: np.ndarray | None = None,
) -> Schedule:
    """The rounds of one call.

    Args:
        open_lengths: ordinary tokens in each row's open window, 0 to L.
        lengths: new tokens per row.
        wanted: [B, T] bool, tokens of which something is asked, in the columns of the new tokens; None for all.
        window_size: L.
        keep: whether the session is read on from, so that every token counts and the open window must end awake.
        mixes_lengths: whether rows of different length leave the state behind that each leaves alone.
        may_share: whether a sleep may begin with the wake pass over the same window, which no ephemeral token saw.
        backprop_windows: gradient through the last k sleeps of a row only; None for all.
        ephemeral: [B, T] bool, new tokens that are; None for none.
    """
    batch = len(lengths)
    fits = all(0 < length <= window_size - have for have, length in zip(open_lengths, lengths, strict=True))
    if wanted is None and ephemeral is None and fits and len(set(lengths)) == 1:
        # A token of every row, or a prompt within the window: nobody sleeps, all are read together.
        return _together(batch, lengths[0])
    windows = _windows(open_lengths, max(lengths, default=0), window_size, ephemeral)
    asked = _Asked.of(lengths, wanted, windows)
    ends = list(lengths) if keep else asked.ends
    stops = _stops(windows)
    n_sleeps = [int(of[end - 1]) if end else 0 for of, end in zip(windows, ends, strict=True)]
    reach = math.inf if backprop_windows is None else backprop_windows
    window, done = [0] * batch, [0] * batch
    active = [row for row in range(batch) if ends[row]]
    rounds: list[Round] = []
    chosen: list[np.ndarray] = []
    shared: tuple[int, ...] = ()
    while active:
        sleeping = [row for row in active if done[row] == stops[row][window[row]]]
        far, near = (tuple(row for row in sleeping if (n_sleeps[row] <= reach) == is_near) for is_near in (False, True))
        sleeps = [Sleep(far, gradient=False)] if far else []
        if near:
            sleeps.append(Sleep(near, shares=near == shared))
        for row in sleeping:
            n_sleeps[row] -= 1
            window[row] += 1
        counts = {row: min(ends[row], stops[row][window[row]]) - done[row] for row in active}
        later = [row for row in active if done[row] + counts[row] < ends[row]]
        ending = {row for row in active if done[row] + counts[row] == ends[row]} if keep else set()
        # Those that sleep next with gradient; a wake pass over just their whole windows may be their first.
        shared = tuple(row for row in later if n_sleeps[row] <= reach)
        number = len(rounds)
        waking = [row for row in active if row in ending or asked.reaches(number, row)]
        wakes = []
        for rows in _groups(waking, counts, together=mixes_lengths or not keep):
            shares = may_share and rows == shared and all(counts[row] == window_size for row in rows)
            reading = tuple(counts[row] for row in rows)
            if not keep and not shares:
                # Nothing is asked of what comes after, and nobody keeps what it leaves.
                width = max(asked.reaches(number, row) - done[row] for row in rows)
                reading = tuple(min(count, width) for count in reading)
            picked, which = asked.pick(number, rows, reading, done)
            wakes.append(Wake(rows, reading, shares, picked))
            chosen.append(which)
        shared = shared if any(wake.shares for wake in wakes) else ()
        starts = tuple(done[row] for row in active)
        taken = tuple(counts[row] for row in active)
        own: tuple[tuple[int, ...], ...] = ()
        if ephemeral is not None:
            spans = ((row, slice(done[row], done[row] + counts[row])) for row in active)
            own = tuple(tuple((ephemeral[row, span].nonzero()[0] + span.start).tolist()) for row, span in spans)
        rounds.append(Round(tuple(sleeps), tuple(active), starts, taken, tuple(wakes), own))
        for row in active:
            done[row] += counts[row]
        active = later
    order = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    return Schedule(tuple(rounds), asked.rows[order], asked.columns[order])


def _windows(open_lengths: Sequence[int], width: int, window_size: int, ephemeral: np.ndarray | None) -> np.ndarray:
    """Of which window of its row each new token is, [B, T], the open one being 0.

    A full window sleeps only when an ordinary token follows it, hence the -1.
    """
    before = np.asarray(open_lengths, dtype=np.int64)[:, None]
    counted = np.arange(1, width + 1)[None, :] if ephemeral is None else (~ephemeral[:, :width]).cumsum(1)
    return np.maximum(before + counted - 1, 0) // window_size


def _stops(windows: np.ndarray) -> list[list[int]]:
    """The column after the last token of each window, by row and window."""
    batch, width = windows.shape
    n_windows = int(windows.max(initial=0)) + 1
    step = np.arange(batch)[:, None] * n_windows
    ends = (windows + step).reshape(-1).searchsorted((np.arange(n_windows) + step).reshape(-1), side="right")
    return (ends.reshape(batch, n_windows) - np.arange(batch)[:, None] * width).tolist()


@lru_cache(maxsize=4)
def _together(batch: int, length: int) -> Schedule:
    """All rows read so many tokens awake, all of which are wanted: the same for every token of a text."""
    rows = tuple(range(batch))
    every = np.repeat(np.arange(batch), length), np.tile(np.arange(length), batch)
    return Schedule((Round((), rows, (0,) * batch, (length,) * batch, (Wake(rows, (length,) * batch),)),), *every)


def _groups(rows: Iterable[int], keys: dict[int, int], together: bool) -> list[tuple[int, ...]]:
    """Rows with equal keys, or all of them at once; no group is empty."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(0 if together else keys[row], []).append(row)
    return [tuple(group) for group in groups.values()]


@dataclass(frozen=True)
class _Asked:
    """The wanted tokens [M], by row and column and in the order of the rounds that they fall in.

    Attributes:
        rows, columns: of each.
        bounds: where each round begins among them, and the end.
        reach: the column after the last wanted one, by round and row; 0 where there is none.
    """

    rows: np.ndarray
    columns: np.ndarray
    bounds: list[int]
    reach: list[list[int]]
    ends: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int], wanted: np.ndarray | None, windows: np.ndarray) -> _Asked:
        width = max(lengths, default=0)
        real = np.arange(width)[None, :] < np.asarray(lengths, dtype=np.int64)[:, None]
        rows, columns = (real if wanted is None else wanted[:, :width] & real).nonzero()
        # A row that begins with a full window closes it in its first round already.
        number = windows[rows, columns] - windows[rows, 0] if width else rows
        order = number.argsort(kind="stable")
        rows, columns, number = rows[order], columns[order], number[order]
        n_rounds = int(number[-1]) + 1 if number.size else 0
        reach = np.zeros((n_rounds, len(lengths)), dtype=np.int64)
        np.maximum.at(reach, (number, rows), columns + 1)
        bounds = number.searchsorted(np.arange(n_rounds + 1))
        return cls(rows, columns, bounds.tolist(), reach.tolist(), reach.max(axis=0, initial=0).tolist())

    def reaches(self, number: int, row: int) -> int:
        """The column after the last wanted one of a row in a round; 0 if there is none."""
        return self.reach[number][row] if number < len(self.reach) else 0

    def pick(
        self, number: int, rows: tuple[int, ...], counts: tuple[int, ...], done: Sequence[int]
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Where in a pass over these rows the wanted tokens are (None: everywhere), and which they are."""
        which = (
            np.arange(*self.bounds[number : number + 2]) if number < len(self.reach) else np.zeros(0, dtype=np.int64)
        )
        place = np.full(len(done), -1, dtype=np.int64)
        place[list(rows)] = np.arange(len(rows))
        which = which[place[self.rows[which]] >= 0]
        width, of = max(counts), self.rows[which]
        picked = place[of] * width + self.columns[which] - np.asarray(done, dtype=np.int64)[of]
        return (None if picked.size == len(rows) * width else picked), which


def cost(rounds: Iterable[Round], window_size: int, inside: Passes, n_layers: int) -> int:
    """Tokens times layers that these rounds run: every sleep with its passes, every wake with all layers."""
    first = inside.prelude[1] - inside.prelude[0] + inside.loops[0].stop - inside.loops[0].start
    total = 0
    for each in rounds:
        for sleep in each.sleeps:
            total += len(sleep.rows) * window_size * (inside.layer_calls - (first if sleep.shares else 0))
        total += sum(sum(wake.counts) for wake in each.wakes) * n_layers
    return total
