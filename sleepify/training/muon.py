"""`torch.optim.Muon`, whose iteration takes all matrices of one shape together: few large products, not many small.

A model has many matrices of few shapes. torch orthogonalises them one by one, some twenty launches each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Numbers in the matrices that are taken together, at most: more of them would only take memory, since a product of that
# size keeps any device busy.
_TOGETHER = 1 << 26


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss that an optimiser's step is asked to evaluate first; None where it is not asked to."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class GroupedMuon(torch.optim.Muon):
    """As `torch.optim.Muon`, with the same groups and the same state; parameters of a class of their own (sharded ones)
    are taken one by one, as there."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = evaluated(closure)
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            for indices in _alike(parameters):
                picked = [[tensors[i] for i in indices] for tensors in (parameters, gradients, momenta)]
                _update(group, *picked)
        return loss


def _alike(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Which parameters are updated together."""
    groups: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        is_plain = type(parameter) in (Tensor, nn.Parameter)
        alone = None if is_plain else index
        groups.setdefault((parameter.shape, parameter.dtype, parameter.device, alone), []).append(index)
    for indices in groups.values():
        most = max(1, _TOGETHER // parameters[indices[0]].numel())
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


def _update(group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]) -> None:
    """One step of parameters of one shape."""
    momentum, updates = group["momentum"], momenta
    for mine, gradient in zip(momenta, gradients, strict=True):
        mine.lerp_(gradient, 1 - momentum)
    if group["nesterov"]:
        updates = [gradient.lerp(mine, momentum) for mine, gradient in zip(momenta, gradients, strict=True)]
    rate, shape = float(group["lr"]), parameters[0].shape
    scaled = rate * (
        0.2 * math.sqrt(max(shape))
        if group["adjust_lr_fn"] == "match_rms_adamw"
        else math.sqrt(max(1, shape[0] / shape[1]))
    )
    whole = updates[0] if len(updates) == 1 else torch.stack(updates)
    made = _orthogonal(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
    for parameter, update in zip(parameters, [made] if len(updates) == 1 else made.unbind(), strict=True):
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-scaled)


def _orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton and Schulz' iteration of matrices [..., A, B], in bfloat16, as torch makes it of one."""
    a, b, c = coefficients
    alone = matrices.dim() == 2
    product = torch.addmm if alone else torch.baddbmm
    x, is_tall = matrices.bfloat16(), matrices.shape[-2] > matrices.shape[-1]
    if is_tall:
        x = x.mT
    # At most 1, so that the iteration converges.
    x = x / (x.norm() if alone else x.norm(dim=(-2, -1), keepdim=True)).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
