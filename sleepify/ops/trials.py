"""Our Triton kernels tried out on the GPU before anything depends on them.

Compilers have returned wrong numbers for such kernels on some GPUs, and a machine may lack the C compiler that Triton
needs. The case is small, its widths are those that will be used, and the expected result is PyTorch's on the CPU, where
autograd needs no thread of the GPU's: the first use may itself be inside of a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOKENS = 130  # three chunks, the last of two tokens
# Relative errors in norm. Half precision: results rounded to 8 bits are off by 2e-3; float32: sums of a few hundred
# products by 1e-6. A miscompiled kernel is off by far more.
_HALF, _SINGLE = 1e-2, 1e-4
_NAMES = ("output", "state", "gradient of q", "of k", "of v", "of g", "of beta", "of the state")


# The chunked form in PyTorch, of the gated delta rule (True) and the Hebbian one; each puts itself here, because the
# rules import the choice of kernels, and the choice imports this.
EXACT: dict[bool, Callable[..., tuple[Tensor, Tensor]]] = {}


def try_rule(
    delta: bool, dtype: torch.dtype, key_dim: int, value_dim: int, with_grad: bool, device: str = "cuda"
) -> None:
    """Compile and run both directions, or the forward one; raise unless the results are right.

    Raises:
        ArithmeticError: a result that is not within rounding of the expected one.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(1, _TOKENS, 2, width).to(dtype) for width in (key_dim, key_dim, value_dim))
    g, beta = -normal(1, _TOKENS, 2).square() / 8, normal(1, _TOKENS, 2).sigmoid().to(dtype)
    state, do, dstate = normal(1, 2, key_dim, value_dim), normal(*v.shape).to(dtype), normal(1, 2, key_dim, value_dim)
    operations = torch.ops.sleepify  # there since their module was imported
    inputs, scale = (q, k, v, g, beta, state), key_dim**-0.5
    expected = _expected(delta, inputs, (do, dstate), scale)
    there = [x.to(device) for x in inputs]
    with torch.no_grad():
        actual = list(operations.chunked_rule(*there, scale, True, delta, None))
        if with_grad:
            grads = do.to(device), dstate.to(device)
            actual[2:] = operations.chunked_rule_backward(*grads, *there, *actual[2:], scale, True, delta, None)
    limit = _SINGLE if dtype == torch.float32 else _HALF
    for name, ours, exact in zip(_NAMES, actual if with_grad else actual[:2], expected, strict=False):
        error = ((ours.double().cpu() - exact).norm() / exact.norm()).item()
        if not error < limit:  # nan is not
            raise ArithmeticError(f"{name} is off by {error:.1e}")


def _expected(delta: bool, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in inputs]
    results = EXACT[delta](*leaves, scale=scale, qk_l2norm=True)
    gradients = torch.autograd.grad(results, leaves, [x.double() for x in grads])
    return [x.detach() for x in (*results, *gradients)]


def try_convolution(convolve: Callable[[Tensor, Tensor, str | None], Tensor]) -> None:
    """Compile and run the smallest case, or raise."""
    one = torch.ones(1, 1, 1, device="cuda")
    convolve(one, one.unsqueeze(-1), None)
