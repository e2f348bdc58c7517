"""Which rows of a generation have ended, and how the host learns whether all have: without waiting, where that can be.

transformers' loop asks after every token whether a row goes on, and waits for the device to say so. Where only a limit
of tokens ends the rows the host knows. Of a single row it is told one token late, while the device makes the next,
which is then taken back. Of several rows it looks once, for the loop and for what they read next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

# Devices beside which the host computes. (Apple's is left to transformers, which is late there itself.)
_TOGETHER = ("cpu", "mps")


class Ended(StoppingCriteriaList):
    """Stopping criteria that remember which rows have met them, and the last token of each row.

    Args:
        criteria: of one call.
        may_be_late: whether a token too many can be taken back. (Its random number is drawn all the same.)

    Attributes:
        rows: [B] bool; None before the first token.
        last: the last token that each row made, [B, 1]; a row that has ended makes no more.
        is_over: whether all rows have ended, as far as the host knows.
        surplus: whether a token was made after that.
        before: for the caller: the session before the latest token was read.
    """

    def __init__(self, criteria: Sequence[Any], may_be_late: bool = False) -> None:
        super().__init__(criteria)
        self.rows: Tensor | None = None
        self.last: Tensor | None = None
        self.is_over = self.surplus = False
        self.before: Any = None
        kinds = {type(each) for each in self}
        self._knows = kinds <= {MaxLengthCriteria}
        # Others may look at what is on the device, or count how often they are asked.
        self._may_be_late = may_be_late and kinds <= {MaxLengthCriteria, EosTokenCriteria}
        self._limit = min((each.max_length for each in self if type(each) is MaxLengthCriteria), default=math.inf)
        self._here: Tensor | None = None
        self._told: _Told | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """What transformers takes for [B] bool."""
        last, before = input_ids[:, -1:], self.rows
        self.last = last if before is None or self.last is None else torch.where(before[:, None], self.last, last)
        met = super().__call__(input_ids, scores, **kwargs)
        self.rows = met if before is None else before | met
        self.is_over = self._look(self.rows, input_ids.shape[1])
        return _Going(met, self)

    def _look(self, rows: Tensor, length: int) -> bool:
        """Whether all have ended, after so many tokens."""
        is_full = length >= self._limit
        if self._knows:
            return is_full
        if not self._may_be_late or len(rows) > 1 or rows.device.type in _TOGETHER:
            self._here = rows.cpu()
            return bool(self._here.all())
        told, self._told = self._told, _Told(rows.all())
        self.surplus = told is not None and told.value()
        return self.surplus or is_full

    def going_on(self) -> Tensor | None:
        """Mask [B, 1], on the host, of the rows that read another token; None if all do."""
        return None if self._here is None or not self._here.any() else ~self._here[:, None]


class _Told:
    """A truth of the device on its way to the host, which goes on meanwhile."""

    def __init__(self, truth: Tensor) -> None:
        self._copy = truth.to("cpu", non_blocking=True)
        self._arrived = torch.get_device_module(truth.device).current_stream(truth.device).record_event()

    def value(self) -> bool:
        self._arrived.synchronize()
        return bool(self._copy)


class _Going:
    """Rows as transformers' loop reckons with them; whether one goes on, it says without asking the device."""

    def __init__(self, rows: Tensor, ended: Ended) -> None:
        self._rows, self._ended = rows, ended

    def __invert__(self) -> _Going:
        return _Going(~self._rows, self._ended)

    def __and__(self, other: Any) -> _Going:
        return _Going(self._rows & _plain(other), self._ended)

    __rand__ = __and__

    def __rsub__(self, other: Any) -> Tensor:
        return other - self._rows

    def max(self) -> Tensor:
        """1 if a row goes on."""
        return torch.tensor(0 if self._ended.is_over else 1)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a loop may ask, the rows answer, and are waited for."""
        return getattr(self._rows, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__and__:
            return args[1] & args[0]
        return func(*map(_plain, args), **(kwargs or {}))


def _plain(value: Any) -> Any:
    return value._rows if isinstance(value, _Going) else value
