"""Settings: how to sleep, as plain values. `SleepConfig` has the same fields and hands a checked view to every call."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

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


SETTINGS = tuple(field.name for field in fields(Settings))


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
