"""Sessions that wait: in memory under a limit of bytes, on disk if there is a folder, found by id or by what they read.

A session belongs to the API key that it was made with, of which only a hash is kept. With a folder every turn is on
disk when it is answered, so memory is a copy that may go at any time, with the process or under the limit.

What cannot be written did not happen: memory and disk never say different things of a session.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from sleepify.cache import SleepCache
from sleepify.errors import CheckpointError
from sleepify.files import discard
from sleepify.serving.kept import OURS, Message, Session, bytes_of, read_record, record_of, remove, start_of, write
from sleepify.serving.prefixes import NOTHING, common, digests, extended

log = logging.getLogger("sleepify.serve")


class TooManySessionsError(ValueError):
    """A key has as many sessions as it may, all of them called by name."""


class Store:
    """All sessions. Its methods are called in one thread, that of the event loop; files are written in another.

    Args:
        owner: the model that they belong to; those of others are left on disk as they are.
        folder: where they are kept; None to keep them in memory only.
        limit: bytes in memory; beyond it the longest idle ones leave it, to be forgotten if there is no folder.
        per_key: sessions of one key; beyond it the longest idle one that was never called by name is forgotten.
        shared: whether other processes keep sessions in the folder, too. What these have made of one is then taken
            over when it is called; its turns must still come one after the other.
        made_by: weights and settings that a state is of; where a record names others, its text is read anew.
    """

    def __init__(
        self, owner: str, folder: Path | None, limit: int, per_key: int, shared: bool = False, made_by: str = ""
    ) -> None:
        self.owner, self.made_by = owner, made_by
        self.folder, self.limit, self.per_key, self.shared = folder, limit, per_key, shared
        self.bytes = 0
        self._sessions: dict[str, Session] = {}
        self._begun: WeakValueDictionary[str, Session] = WeakValueDictionary()
        self._by_start: dict[tuple[str, int, str], set[str]] = {}
        self._starts: dict[str, dict[int, int]] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="sleepify-files")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._find(folder)

    # --- finding ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, key: str) -> list[Session]:
        """The sessions of a key, without responses, in the order in which they were made."""
        mine = [each for each in self._sessions.values() if each.key == key and not each.is_response]
        return sorted(mine, key=lambda each: each.created)

    def get(self, session_id: str, key: str) -> Session | None:
        """The session of that id if it belongs to the key."""
        if self.shared:
            self._look_again(session_id)
        return _own(self._sessions.get(session_id), key)

    def begun(self, session_id: str, key: str) -> Session | None:
        """One whose first turn is under way: its user knows the id, and may erase it."""
        found = _own(self._begun.get(session_id), key)
        return None if found is None or found.erased or session_id in self._sessions else found

    def longest_prefix(self, key: str, ids: Sequence[int]) -> tuple[Session | None, int]:
        """The session of a key that has read the longest prefix of these ids, and how many of them it has.

        A session can go back as far as the start of its open window; what it has slept on must be there as a whole.
        """
        while True:
            best, longest = self._longest_prefix(key, ids)
            if best is None or not self.shared or not self._look_again(best.id):
                return best, longest

    def _longest_prefix(self, key: str, ids: Sequence[int]) -> tuple[Session | None, int]:
        best, longest = None, 0
        starts = sorted(count for count in self._starts.get(key, {}) if count < len(ids))
        for count, digest in zip(starts, digests(ids, starts), strict=True):
            for session_id in self._by_start.get((key, count, digest), ()):
                session = self._sessions[session_id]
                alike = count + common(session.open_ids, ids[count : count + len(session.open_ids)])
                if alike > longest or (best is not None and alike == longest and session.used > best.used):
                    best, longest = session, alike
        return best, longest

    def idle(self, since: float) -> list[Session]:
        """Sessions with an open window that were not used since then and can sleep."""
        idle = [each for each in self._sessions.values() if self.is_idle(each, since) and not each.busy.locked()]
        return [each for each in idle if not (self.shared and self._is_gone_on(each))]

    def is_idle(self, session: Session, since: float) -> bool:
        """Whether it has an open window, was not used since then and can sleep."""
        is_known = session.digest is not None and not session.is_response and not session.erased
        return is_known and session.used <= since and bool(session.open_ids)

    # --- a session's life ------------------------------------------------------------------------------------------

    def new(self, key: str, kind: str = "sess", named: bool = False) -> Session:
        """A session that has read nothing; it counts from its first `keep` on."""
        session = Session(f"{kind}_{secrets.token_urlsafe(24)}", key, self.owner, self.made_by, named)
        self._begun[session.id] = session
        return session

    async def cache_of(self, session: Session) -> SleepCache | None:
        """Its memory, from disk if it must; None if the file is of no use, so that the text is read anew."""
        if session.cache is not None or self.folder is None or not session.tokens:
            return session.cache
        turn, path = session.turn, session.file(self.folder)
        try:
            cache = await asyncio.get_running_loop().run_in_executor(self._files, SleepCache.load, path)
        except (CheckpointError, OSError) as error:
            log.warning("a session's memory cannot be read and its text will be read anew: %s", error)
            return None
        if not session.erased and session.cache is None and session.turn == turn:
            self._hold(session, cache)
            await self._make_room(but=session)
        return cache

    async def keep(self, session: Session, cache: SleepCache, messages: list[Message], read: Sequence[int]) -> bool:
        """A turn has ended: its memory, the conversation with it, and all ids that were read. False if it was erased.

        Raises:
            TooManySessionsError: for a new session, if the key has too many.
            OSError: if it cannot be written; then it is what it was.
        """
        if session.id not in self._sessions and not session.erased:
            await self._make_place(session.key)
        if session.erased:
            return False
        async with self._moving(session):
            session.messages, session.used = messages, time.time()
            await self._move(session, cache, extended(hashlib.sha256(), read[: start_of(cache)]))
        return not session.erased

    async def keep_slept(self, session: Session, cache: SleepCache) -> None:
        """It has slept on all of its open window."""
        if not session.erased and session.digest is not None:
            async with self._moving(session):
                await self._move(session, cache, extended(session.digest.copy(), session.open_ids))

    @asynccontextmanager
    async def _moving(self, session: Session) -> AsyncIterator[None]:
        """What is done to it within is done, on disk too, or did not happen."""
        before, was_known = copy.copy(session), session.id in self._sessions
        self._forget_start(session)
        try:
            yield
        except Exception:
            self._forget_start(session)
            self._release(session)
            if not session.erased:
                vars(session).update(vars(before) | {"cache": None, "named": session.named})
                if was_known:
                    self._note_start(session)
                else:
                    self._sessions.pop(session.id, None)
                if was_known and before.cache is not None:
                    self._hold(session, before.cache)
            raise
        await self._make_room(but=session)

    async def _move(self, session: Session, cache: SleepCache, digest: hashlib._Hash) -> None:
        assert cache.open_ids is not None
        before = session.file(self.folder) if self.folder is not None and session.turn else None
        session.turn += 1
        session.start, session.digest, session.start_digest = start_of(cache), digest, digest.hexdigest()
        session.open_ids = cache.open_ids[0, : cache.open_lengths[0]].tolist()
        session.windows = cache.windows[0]
        await self._enter(session, cache, before)

    async def _enter(self, session: Session, cache: SleepCache | None, before: Path | None) -> None:
        self._sessions[session.id] = session
        self._note_start(session)
        if cache is not None:
            self._hold(session, cache)
        if self.folder is not None:
            await self._on_disk(write, self.folder, session.file(self.folder), record_of(session), cache, before)

    async def name(self, session: Session) -> None:
        """Its user has called it by its id: it gives way to no other one, also after a restart."""
        session.named = True
        if self.folder is not None:
            await self._on_disk(write, self.folder, session.file(self.folder), record_of(session), None, None)

    async def fork(self, session: Session) -> Session | None:
        """Another session that has read the same; None if it was erased meanwhile.

        Raises:
            TooManySessionsError: if the key has too many.
            OSError: if it cannot be written; then there is none.
        """
        session.named = True
        while True:
            turn, cache = session.turn, await self.cache_of(session)
            await self._make_place(session.key)
            # Its turns go on meanwhile.
            if session.turn == turn:
                break
        if session.erased:
            return None
        other = self.new(session.key, named=True)
        async with self._moving(other):
            for name in ("start", "start_digest", "digest", "open_ids", "windows", "bytes"):
                setattr(other, name, getattr(session, name))
            other.messages, other.turn = list(session.messages), 1
            await self._enter(other, None if cache is None else cache.clone(), None)
        return other

    async def erase(self, session: Session) -> None:
        """Nothing of it is left, in memory or on disk; a turn that is under way leaves nothing behind."""
        session.erased = True
        self._forget_start(session)
        self._release(session)
        self._sessions.pop(session.id, None)
        session.messages, session.open_ids = [], []
        if self.folder is not None:
            # In the one thread that writes, and so after what is being written.
            await self._on_disk(remove, self.folder, session.id)

    async def close(self) -> None:
        """Wait until everything is written."""
        await asyncio.get_running_loop().run_in_executor(None, self._files.shutdown)

    # --- memory ----------------------------------------------------------------------------------------------------

    def _hold(self, session: Session, cache: SleepCache) -> None:
        self._release(session)
        session.cache, session.bytes = cache, bytes_of(cache)
        self.bytes += session.bytes

    def _release(self, session: Session) -> None:
        if session.cache is not None:
            session.cache = None
            self.bytes -= session.bytes

    async def _make_room(self, but: Session) -> None:
        """Let go of those that were idle longest, until the rest is within the limit."""
        if self.bytes <= self.limit:
            return
        for session in sorted(self._sessions.values(), key=lambda each: each.used):
            if self.bytes <= self.limit:
                return
            if session.cache is None or (session is but and self.folder is None):
                continue
            if self.folder is not None:
                self._release(session)
            elif not session.busy.locked():
                await self.erase(session)

    async def _make_place(self, key: str) -> None:
        # Others may come while one is erased.
        while len(mine := [each for each in self._sessions.values() if each.key == key]) >= self.per_key:
            idle = [each for each in mine if not each.named and not each.busy.locked()]
            if not idle:
                raise TooManySessionsError(
                    f"expected at most {self.per_key} sessions of a key, got one more; erase some "
                    "(DELETE /v1/sessions/ID)"
                )
            await self.erase(min(idle, key=lambda each: each.used))

    # --- what was read ---------------------------------------------------------------------------------------------

    def _note_start(self, session: Session) -> None:
        self._by_start.setdefault((session.key, session.start, session.start_digest), set()).add(session.id)
        counts = self._starts.setdefault(session.key, {})
        counts[session.start] = counts.get(session.start, 0) + 1

    def _forget_start(self, session: Session) -> None:
        place = (session.key, session.start, session.start_digest)
        if session.id not in self._by_start.get(place, ()):
            return
        self._by_start[place].discard(session.id)
        if not self._by_start[place]:
            del self._by_start[place]
        counts = self._starts[session.key]
        counts[session.start] -= 1
        if not counts[session.start]:
            del counts[session.start]
        if not counts:
            del self._starts[session.key]

    # --- disk ------------------------------------------------------------------------------------------------------

    async def _on_disk(self, function: Any, *arguments: Any) -> None:
        """What writes. It comes to its end also where nobody waits for it any more: memory then says the same."""
        work = asyncio.get_running_loop().run_in_executor(self._files, function, *arguments)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            work.result()
            raise

    def _find(self, folder: Path) -> None:
        """The sessions of an earlier process; what one that was killed left half done is removed."""
        names = sorted(each.name for each in folder.iterdir() if OURS.fullmatch(each.name))
        records: dict[str, Session | None] = {}
        for name in names:
            session_id, _, rest = name.partition(".")
            if rest == "json":
                records[session_id] = self._take_in(folder / name)
        for name in () if self.shared else names:
            session_id, _, rest = name.partition(".")
            session = records.get(session_id)
            # Next to a record that cannot be read (now, or by this version) nothing is known to be left over.
            is_kept = session is None or rest == "json" or name == session.file(folder).name
            if session_id not in records or not is_kept:
                discard(folder / name)

    def _take_in(self, path: Path) -> Session | None:
        """The session of a record, known from now on if it is of this model; None if it cannot be read."""
        try:
            session = read_record(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("%s is left alone: no session can be read from it: %r", path, error)
            return None
        if session.owner != self.owner:
            log.warning("%s is left alone: it belongs to another model (%s)", path, session.owner)
            return session
        if session.made_by != self.made_by:
            # The conversation stays; what others made of it is not what this model would.
            session.start, session.start_digest, session.open_ids = 0, NOTHING, []
            session.windows, session.bytes, session.made_by = 0, 0, self.made_by
        self._sessions[session.id] = session
        self._note_start(session)
        return session

    def _is_gone_on(self, session: Session) -> bool:
        """Whether another process has moved or erased a session, whose latest file is then not the one known."""
        return self.folder is not None and not session.busy.locked() and not session.file(self.folder).exists()

    def _look_again(self, session_id: str) -> bool:
        """Take over what another process has made of a session, or made anew; whether there was such a thing."""
        known, path = self._sessions.get(session_id), (self.folder or Path()) / f"{session_id}.json"
        if self.folder is None or not OURS.fullmatch(path.name) or (known and not self._is_gone_on(known)):
            return False
        if known:
            self._forget_start(known)
            self._release(known)
            del self._sessions[session_id]
        again = self._take_in(path) if path.exists() else None
        # Of the same turn, whose memory is lost: there is nothing to wait for.
        is_same = known is not None and again is not None and known.turn == again.turn
        return (known is not None or again is not None) and not is_same


def _own(found: Session | None, key: str) -> Session | None:
    return found if found is not None and secrets.compare_digest(found.key, key) else None
