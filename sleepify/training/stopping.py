"""SIGTERM and Ctrl-C as a wish to stop: the step at hand is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        asked: the first signal that asked; None if none did.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    @property
    def status(self) -> int:
        """What the process ends with. A process that was not asked itself ends as its rank's fellows on SIGTERM."""
        return 128 + (self.asked or signal.SIGTERM)

    @contextmanager
    def listening(self, speaks: bool) -> Iterator[None]:
        """Take note of signals instead of dying of them; outside of the main thread, where that cannot be, nothing.

        Args:
            speaks: whether this process is the one that tells the user what Ctrl-C does.
        """
        self.asked = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, _: FrameType | None) -> None:
            self.asked = self.asked or signal.Signals(number)
            # A second one of its kind is not held up. The other kind may come from a launcher that heard this one.
            signal.signal(number, before[signal.Signals(number)])
            if number == signal.SIGINT and speaks:
                print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
