"""Settings: how to sleep, as plain values. `SleepConfig` has the same fields and hands a checked view to every call."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

AUTO: Literal["auto"] = "auto"
# N of one call: so many passes, or as many as the state needs.
Loops = int | Literal["auto"]
EVICTIONS = ("hard", "sliding")
CHECKPOINTS = ("none", "window", "loop", "selective")


@dataclass(kw_only=True)
class Settings:
    """What may differ from call to call of one model; the fields are explained at `SleepConfig`."""

    n_loops: int = 4
    window_size: Any = None
    eviction: str = "hard"
    loop_range: Any = None
    checkpoint: str = "none"
    backprop_loops: int | None = None
    backprop_windows: int | None = None
    offload: bool = False
    check_finite: bool = False
    auto_threshold: float | None = None

    def check(self) -> None:
        """See that every field could hold for some base.

        Raises:
            ValueError: if not, naming the field.
        """
        for name in ("n_loops", "window_size", "backprop_loops", "backprop_windows"):
            value = getattr(self, name)
            if value is not None or name == "n_loops":
                check_positive(name, value)
        for name, allowed in (("eviction", EVICTIONS), ("checkpoint", CHECKPOINTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("offload", "check_finite"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected {name} to be true or false, got {getattr(self, name)!r}")
        threshold = self.auto_threshold
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf
        ):
            raise ValueError(f"expected auto_threshold to be a number above 0, or None, got {threshold!r}")
        if self.loop_range is not None:
            bounds = list(self.loop_range) if isinstance(self.loop_range, (list, tuple)) else []
            if len(bounds) != 2 or not all(is_whole(b) for b in bounds) or not 0 <= bounds[0] < bounds[1]:
                raise ValueError(f"expected loop_range=(start, stop) with 0 <= start < stop, got {self.loop_range!r}")

    @property
    def sliding(self) -> bool:
        """Whether keys and values outlive their window."""
        return self.eviction == "sliding"

    @property
    def retained(self) -> int:
        """How many keys and values outlive their window."""
        return self.window_size - 1 if self.sliding else 0

    @property
    def may_share(self) -> bool:
        """Whether a sleep may begin with the wake pass over its window instead of making the same pass again."""
        return self.checkpoint != "window" and self.backprop_loops is None


@dataclass(kw_only=True)
class Adaptive(Settings):
    """Settings of a call in which a row makes passes until its state has settled, N of them at most."""


SETTINGS = tuple(field.name for field in fields(Settings))


def with_loops(settings: Settings, n_loops: Loops | None) -> Settings:
    """The settings of a call that chooses its own N.

    Args:
        settings: the model's.
        n_loops: N, "auto" for as many passes as the state needs (at most the model's N), None for the model's N.

    Raises:
        ValueError: for what is neither, or "auto" without a threshold.
    """
    if n_loops is None:
        return settings
    if not isinstance(n_loops, str):
        own = check_positive("n_loops", n_loops)
        return settings if own == settings.n_loops else replace(settings, n_loops=own)
    if n_loops != AUTO:
        raise ValueError(f'expected n_loops to be a whole number of at least 1, or "auto", got {n_loops!r}')
    if settings.auto_threshold is None:
        raise ValueError(
            'expected a threshold for n_loops="auto", got auto_threshold=None: sleepify.calibrate(model, rows, '
            "mean_n_loops=...) finds one; set model.config.auto_threshold"
        )
    return Adaptive(**vars(settings))


def check_positive(name: str, value: Any) -> int:
    """``value`` if it is a whole number of at least 1.

    Raises:
        ValueError: if not, naming the field.
    """
    if not is_whole(value) or value < 1:
        raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    return value


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
