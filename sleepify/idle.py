"""One thing at a time, and something else once nothing has happened for a while."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("sleepify")


class IdleTimer:
    """A lock, and a call that is made when the lock was free for some seconds.

    The call holds the lock itself: it never runs beside what else is done under it, and it is not made if something
    else was done after it had come due. What it raises is logged.

    Args:
        seconds: how long; None for never.
        action: a method; the object that it belongs to is not kept alive by this.

    Raises:
        ValueError: for seconds that are no number above 0.
    """

    def __init__(self, seconds: float | None, action: Callable[[], Any]) -> None:
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 < seconds <= threading.TIMEOUT_MAX):
            raise ValueError(f"expected idle_sleep to be seconds above 0, or None, got {seconds!r}")
        self.seconds = seconds
        self._action = weakref.WeakMethod(action)
        self._lock = threading.RLock()
        self._depth = 0
        self._timer: threading.Timer | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The lock; the seconds are counted from its release on. It may be taken again by who has it."""
        with self._lock:
            self._stop()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self.seconds is not None and not self._depth:
                    self._timer = threading.Timer(self.seconds, self._due)
                    self._timer.args = (self._timer,)
                    self._timer.daemon = True
                    self._timer.start()

    def close(self) -> None:
        """Make no more calls; one that is being made is waited for."""
        with self._lock:
            self._stop()
            self.seconds = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, timer: threading.Timer) -> None:
        with self._lock:
            action = self._action()
            if self._timer is not timer or action is None:
                return
            self._timer = None
            try:
                action()
            except Exception:
                log.exception("sleeping while idle failed; the session is as it was")
