"""Sleep when it is asked for, on a window that is full or not (contract 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sleepify import sleep as algorithm
from sleepify.background import doze
from sleepify.cache import SleepCache
from sleepify.rows import Rows
from sleepify.schedule import Sleep, schedule
from sleepify.settings import Loops, Settings, is_whole
from sleepify.snapshot import Snapshot


class SleepOnDemand:
    """``model.sleep(cache)``."""

    def sleep(
        self,
        past_key_values: SleepCache,
        n_loops: Loops | None = None,
        rows: Sequence[int] | None = None,
        background: bool = False,
    ) -> SleepCache:
        """Consolidate what is awake in a session now, also a window that is only part full (contract 2).

        Args:
            past_key_values: the session; it is moved forward and returned.
            n_loops: another N for this sleep; "auto" for as many passes as each row's state needs, at most N.
            rows: which rows sleep; all by default.
            background: return at once, and let a thread (on CUDA with a stream of its own) make the sleep. Tokens that
                come meanwhile, up to L per row, are read awake with the old window's keys still there. The first call
                that finds the sleep done reads them anew behind it, so that the session is what it would be had this
                sleep been waited for. Whatever cannot go on meanwhile waits: more tokens, ephemeral tokens, whole
                conversations, another sleep, ``save``, ``rewind``, rows; `SleepCache.wait` does only that. A sleep that
                fails raises in the call that would have found it done, and is as if it had not been asked for.

        Raises:
            TypeError: for what is no session.
            ValueError: for a session that has read nothing, or rows that it does not have; in the background for some
                of its rows, in training, or with a base some of whose layers are changed for the length of a call.
        """
        if not isinstance(past_key_values, SleepCache):
            raise TypeError(f"expected past_key_values to be a SleepCache, got {type(past_key_values).__name__}")
        if past_key_values.now is None:
            raise ValueError("expected a cache that has read something, got an empty one; call the model with it first")
        model: Any = self
        settings = model.options(n_loops)
        blocks = model.host_of(settings)
        batch = past_key_values.get_batch_size()
        owner, device = model.owner_of(settings), past_key_values.now.open_ids.device
        session = past_key_values.begin(owner, batch, settings.window_size, device)
        chosen = range(batch) if rows is None else rows
        listed = isinstance(chosen, (list, tuple, range)) and all(is_whole(row) and 0 <= row < batch for row in chosen)
        if not listed or len(set(chosen)) != len(chosen):
            raise ValueError(f"expected a list of different rows from 0 to {batch - 1}, got {rows!r}")
        if not background:
            session = self._slept(blocks, session.finished(), settings, chosen)
            past_key_values.now = session if model.training else session.detached()
            return past_key_values
        if rows is not None or model.training or blocks.changes_modules:
            raise ValueError(
                "expected background=True for all rows, in evaluation, and with a base that several threads may call "
                "(not under flash attention with sliding eviction, nor Mamba-2 layers with a least time step), got "
                f"rows={rows}, training={model.training}, {model.config.text_config.model_type}; leave background out"
            )
        past_key_values.now = doze(
            session.finished(), lambda before: self._slept(blocks, before, settings, chosen).detached()
        )
        return past_key_values

    def _slept(
        self, blocks: algorithm.Blocks, session: Snapshot, settings: Settings, chosen: Sequence[int]
    ) -> Snapshot:
        """The session once these rows have slept."""
        model: Any = self
        if waiting := [row for row in chosen if session.pending and len(session.pending[row])]:
            read = self._read_pending(blocks, session.select(waiting), settings)
            came = session.columns + max(map(len, session.pending))
            session = session.put(waiting, read)
            session = replace(session, columns=came - max(map(len, session.pending), default=0))
        session = session.lasting(chosen)
        awake: dict[int, list[int]] = {}
        for row in chosen:
            if length := session.open_lengths[row]:
                awake.setdefault(0 if blocks.masks_padding else length, []).append(row)
        for group in awake.values():
            session = algorithm.sleep(blocks, session, Sleep(tuple(group)), settings, watch=model.watch)
        return session

    def _read_pending(self, blocks: algorithm.Blocks, session: Snapshot, settings: Settings) -> Snapshot:
        """The session with nothing unread."""
        model: Any = self
        first = session.first()
        tokens = Rows.nothing(session.batch_size, session.open_ids.device).after(*first)
        session = session.from_start()
        plan = schedule(
            session.open_lengths,
            tokens.lengths,
            tokens.wanted,
            settings.window_size,
            keep=True,
            mixes_lengths=blocks.masks_padding,
            ephemeral=tokens.ephemeral,
        )
        return algorithm.read(blocks, session, tokens.ids, plan.rounds, settings, keep=True, watch=model.watch)[0]
