"""Which token comes next: every row of a batch by its own parameters and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_UNSOUND = -1


@dataclass(frozen=True)
class Sampling:
    """How one answer is made.

    Attributes:
        temperature: 0 for the likeliest token every time.
        top_p: drawn from the likeliest tokens that together have at least this probability.
        seed: of the random numbers; None for others every time.
        stop: texts at which the answer ends; they are not part of it.
        max_tokens: at most so many.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = 16

    def generator(self) -> torch.Generator | None:
        """The random numbers of one answer, which no other answer in the batch moves; None if it needs none."""
        if not self.temperature:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(
    scores: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int | None]:
    """The next token of every row of the scores [B, V]; None for a row whose scores are not finite.

    Whatever the rows, the device is waited for once, and once more if some of them are drawn.
    """
    # One NaN, or infinity of either sign where all are -inf, shows in the largest.
    unsound = torch.isfinite(scores.amax(-1)).logical_not()
    chosen: list[int | None] = scores.argmax(-1).masked_fill(unsound, _UNSOUND).tolist()
    drawn = [row for row, generator in enumerate(generators) if generator is not None and chosen[row] != _UNSOUND]
    if drawn:
        index = torch.tensor(drawn).to(scores.device, non_blocking=True)
        for row, odds in zip(drawn, scores.index_select(0, index).double().cpu(), strict=True):
            generator = generators[row]
            assert generator is not None
            chosen[row] = _draw(odds, samplings[row], generator)
    return [None if token == _UNSOUND else token for token in chosen]


def _draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token for the scores [V]."""
    # The largest is 0 beforehand, so that a tiny temperature gives no infinity.
    odds = ((scores - scores.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = odds.sort(descending=True, stable=True)
        # Kept is a token if those before it have less than top_p; the first one always, also at 0.
        beyond = (ordered.cumsum(-1) - ordered) >= sampling.top_p
        ordered[1:] = ordered[1:].masked_fill(beyond[1:], 0.0)
        return int(places[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(odds, 1, generator=generator))
