"""Sleep when it is asked for, on a window that is full or not (contract 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleepify import sleep as algorithm
from sleepify.cache import SleepCache
from sleepify.rows import Rows
from sleepify.schedule import Sleep, schedule
from sleepify.settings import Settings, is_whole
from sleepify.snapshot import Snapshot


class SleepOnDemand:
    """``model.sleep(cache)``."""

    def sleep(
        self, past_key_values: SleepCache, n_loops: int | None = None, rows: Sequence[int] | None = None
    ) -> SleepCache:
        """Consolidate what is awake in a session now, also a window that is only part full (contract 2).

        Args:
            past_key_values: the session; it is moved forward and returned.
            n_loops: another N for this sleep.
            rows: which rows sleep; all by default.

        Raises:
            TypeError: for what is no session.
            ValueError: for a session that has read nothing, or rows that it does not have.
        """
        if not isinstance(past_key_values, SleepCache):
            raise TypeError(f"expected past_key_values to be a SleepCache, got {type(past_key_values).__name__}")
        if past_key_values.now is None:
            raise ValueError("expected a cache that has read something, got an empty one; call the model with it first")
        model: Any = self
        settings = model.options(n_loops)
        blocks = model.host_of(settings)
        batch = past_key_values.get_batch_size()
        session = past_key_values.begin(
            model.owner_of(settings), batch, settings.window_size, past_key_values.now.open_ids.device
        )
        chosen = range(batch) if rows is None else rows
        listed = isinstance(chosen, (list, tuple, range)) and all(is_whole(row) and 0 <= row < batch for row in chosen)
        if not listed or len(set(chosen)) != len(chosen):
            raise ValueError(f"expected a list of different rows from 0 to {batch - 1}, got {rows!r}")
        if waiting := [row for row in chosen if session.pending and len(session.pending[row])]:
            read = self._read_pending(blocks, session.select(waiting), settings)
            session = session.put(waiting, read)
        awake: dict[int, list[int]] = {}
        for row in chosen:
            if length := session.open_lengths[row]:
                awake.setdefault(0 if blocks.masks_padding else length, []).append(row)
        for group in awake.values():
            session = algorithm.sleep(blocks, session, Sleep(tuple(group)), settings, watch=model.watch)
        past_key_values.now = session if model.training else session.detached()
        return past_key_values

    def _read_pending(self, blocks: algorithm.Blocks, session: Snapshot, settings: Settings) -> Snapshot:
        """The session with nothing unread."""
        model: Any = self
        first = session.first()
        tokens = Rows.nothing(session.batch_size, session.open_ids.device).after(first)
        session = session.from_start()
        plan = schedule(
            session.open_lengths,
            tokens.lengths,
            tokens.wanted,
            settings.window_size,
            keep=True,
            mixes_lengths=blocks.masks_padding,
        )
        return algorithm.read(blocks, session, tokens.ids, plan.rounds, settings, keep=True, watch=model.watch)[0]
