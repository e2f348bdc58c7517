"""Errors of our own, each also a ValueError so that callers may catch the common kind."""

from __future__ import annotations


class SleepifyError(ValueError):
    """Something that a user asked for cannot be done; the message says what was expected, what came, what to do."""


class UnsupportedModelError(SleepifyError):
    """The base model does not follow the conventions that sleep needs."""


class CacheMismatchError(SleepifyError):
    """A cache that belongs to another model or another batch."""


class CheckpointError(SleepifyError):
    """A checkpoint that is damaged, or does not belong to this base."""


class NonFiniteStateError(SleepifyError):
    """The fast-weight state holds NaN or infinity after a sleep.

    Args:
        key: (i, 0) for layer i of the base, (i, 1) for the fast-weight layer inserted after it.
        window: number of the window that was consolidated, from 0.
    """

    def __init__(self, key: tuple[int, int], window: int) -> None:
        self.layer, self.window = key[0], window
        name = f"base layer {key[0]}" if key[1] == 0 else f"the fast-weight layer inserted after base layer {key[0]}"
        super().__init__(
            f"expected a finite state after sleep, found NaN or infinity in {name}, window {window}; "
            "lower the learning rate or clip gradients, and check the input for corrupted weights"
        )
