"""A sleep in the background: a thread makes it, on CUDA on a stream of its own, while the session is read on.

What a sleep makes is a value and depends on a value, so nothing has to be locked. In front the window stays open beyond
its end, for what comes meanwhile; when the sleep is done, that is read anew behind it. So the result is that of a sleep
at the token where it was asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleepify.memory import Memory
from sleepify.snapshot import Snapshot


def doze(session: Snapshot, sleep: Callable[[Snapshot], Snapshot]) -> Snapshot:
    """The session while ``sleep`` is made of it, on all that it holds: as it is, with room for another window."""
    held = tuple(map(sum, zip(session.open_lengths, _waiting(session), strict=True)))
    room = torch.nn.functional.pad(session.open_ids, (0, max(held)))
    return replace(session, open_ids=room, nap=Nap(Making(sleep, session), session, held))


@dataclass(frozen=True)
class Nap:
    """A sleep that is being made.

    Attributes:
        making: what makes it.
        before: the session when it was asked for.
        held: tokens that are slept on, per row.
    """

    making: Making
    before: Snapshot
    held: tuple[int, ...]

    def woken(self, session: Snapshot, more: Sequence[int] | None) -> Snapshot:
        """What ``session``, which was read on meanwhile, is once the sleep is done; itself as long as it is not.

        Args:
            session: it.
            more: tokens that are to be read next, per row; if a window cannot hold all that came, the sleep is waited
                for. None to wait in any case.

        Raises:
            BaseException: what the sleep failed with, once. After that it is as if it had not been asked for.
        """
        have, waiting = session.open_lengths, _waiting(session)
        came = [max(0, length - held) for length, held in zip(have, self.held, strict=True)]
        if more is not None and not self.making.done:
            counts = zip(have, waiting, more, self.held, strict=True)
            if all(
                length + unread + new - held <= self.before.open_ids.shape[1] for length, unread, new, held in counts
            ):
                return session
        later = [ids[held : held + n] for ids, held, n in zip(session.open_ids, self.held, came, strict=True)]
        # Where nothing was read since, the first of what is pending is slept on.
        first = [max(0, held - length) for held, length in zip(self.held, have, strict=True)]
        pending = tuple(ids[n:] for ids, n in zip(session.pending, first, strict=False))
        if self.making.told:
            unread = pending or tuple(ids[:0] for ids in later)
            known = self.before.pending or tuple(ids[:0] for ids in later)
            whole = tuple(torch.cat(parts) for parts in zip(known, later, unread, strict=True))
            pending = whole if any(map(len, whole)) else ()
            return replace(self.before, pending=pending, columns=_columns(session, pending))
        slept = self.making.result()
        open_ids = slept.open_ids.clone()
        for row, ids in enumerate(later):
            open_ids[row, : len(ids)] = ids
        return replace(
            slept,
            open_ids=open_ids,
            open_lengths=tuple(came),
            seen=tuple(map(sum, zip(slept.seen, came, strict=True))),
            stale=tuple(count > 0 for count in came),
            pending=pending if any(map(len, pending)) else (),
            columns=_columns(session, pending),
        )


def _columns(session: Snapshot, pending: Sequence[Tensor]) -> int:
    """Of what a session has read where these ids wait: all that came to it, less the most of them."""
    return session.columns + max(_waiting(session), default=0) - max(map(len, pending), default=0)


class Making:
    """A session that a thread makes of another, without gradient.

    Args:
        make: makes it.
        source: what it is made of.

    Attributes:
        told: whether somebody has been told that it failed.
    """

    def __init__(self, make: Callable[[Snapshot], Snapshot], source: Snapshot) -> None:
        self.told = False
        self._make, self._source = make, source
        self._made: Snapshot | None = None
        self._error: BaseException | None = None
        self._device = source.open_ids.device
        kind = self._device.type
        # Every thread has its own.
        self._cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._stream: torch.cuda.Stream | None = None
        self._end: torch.cuda.Event | None = None
        if kind == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._thread = threading.Thread(target=self._run, name="sleepify-sleep")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self._thread.is_alive() and (self._end is None or self._end.query())

    def result(self) -> Snapshot:
        """What was made; waits for it.

        Raises:
            BaseException: what making it failed with.
        """
        self._thread.join()
        if self._made is None:
            assert self._error is not None
            self.told = True
            raise self._error
        if self._end is not None:
            front = torch.cuda.current_stream(self._device)
            front.wait_event(self._end)
            _used_on(front, self._made)
        return self._made

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream), self._cast:
                if self._stream is not None:
                    _used_on(self._stream, self._source)
                made = self._make(self._source)
                if self._stream is not None:
                    self._end = self._stream.record_event()
            self._made = made
        except BaseException as error:
            # Raised again where somebody asks for the result.
            self._error = error


def _used_on(stream: torch.cuda.Stream, session: Snapshot) -> None:
    """Tell the allocator, so that it does not give a tensor's memory away while another stream may still read it."""
    start = Memory(session.batch_size, session.at_start).tensors()
    own = [session.open_ids, *session.pending, *([] if session.digest is None else [session.digest])]
    for tensor in (*session.memory.tensors(), *start, *own):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _waiting(session: Snapshot) -> list[int]:
    return [len(ids) for ids in session.pending] or [0] * session.batch_size
