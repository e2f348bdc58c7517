"""What to train on beside the cross entropy of the labels, as fields; the losses themselves are in `objectives`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

PLACES = ("labels", "later", "all")
PASS_LOSSES = ("none", "all", "one")
PASS_LOSS_WEIGHT = {"all": 1.0, "one": 0.5}


@dataclass
class ObjectiveArguments:
    """Weights and options of the losses; by default cross entropy alone."""

    cross_entropy: float = field(default=1.0, metadata={"help": "Weight of the cross entropy of the labels."})
    distill: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence from what the base predicts with everything in its context."},
    )
    distill_at: str = field(
        default="labels",
        metadata={"help": "Where: 'labels', 'later' (from the second window on, labels or not) or 'all'."},
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Of both distributions that are compared."})
    distill_teacher: str | None = field(
        default=None,
        metadata={"help": "Name or path of another base; by default the model's own, which must be frozen or LoRA's."},
    )
    reconstruct: float = field(
        default=0.0, metadata={"help": "Weight of predicting tokens of a slept window again from the state alone."}
    )
    reconstruct_share: float = field(default=0.25, metadata={"help": "Share of a window's tokens to predict again."})
    pass_loss: str = field(
        default="none",
        metadata={"help": "Wake also after passes before the last: 'none', 'all' of them, or 'one' drawn per step."},
    )
    pass_loss_weight: float | None = field(
        default=None, metadata={"help": "Of pass_loss; by default 1 for 'all' and 0.5 for 'one'."}
    )

    def check_objectives(self) -> None:
        """See that the losses can be.

        Raises:
            ValueError: if not, naming the field.
        """
        for name in ("cross_entropy", "distill", "reconstruct", "pass_loss_weight"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"expected {name} to be a weight of 0 or more, got {value!r}")
        for name, allowed in (("distill_at", PLACES), ("pass_loss", PASS_LOSSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.distill_temperature > 0:
            raise ValueError(f"expected distill_temperature above 0, got {self.distill_temperature!r}")
        if not 0 < self.reconstruct_share <= 1:
            raise ValueError(f"expected reconstruct_share above 0 and up to 1, got {self.reconstruct_share!r}")
        if not (self.cross_entropy or self.distill or self.reconstruct or self.pass_loss != "none"):
            raise ValueError("expected something to train on, got cross_entropy=0 and no other loss")
        if not self.distill and (self.distill_teacher or self.distill_at != "labels"):
            raise ValueError("expected distill, a weight, with distill_teacher or distill_at; got distill=0")

    def objectives(self) -> dict[str, Any]:
        """What differs from cross entropy alone."""
        given = {each.name: getattr(self, each.name) for each in fields(ObjectiveArguments)}
        defaults = {each.name: each.default for each in fields(ObjectiveArguments)}
        return {name: value for name, value in given.items() if value != defaults[name]}
