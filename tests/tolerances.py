"""Every tolerance of the test suite, each with its reason. Tests take them from here and nowhere else.

A row is (atol, rtol) for ``torch.testing.assert_close``.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Absolute and relative tolerance, as ``torch.testing.assert_close`` takes them."""

    atol: float
    rtol: float


# float64, the same sums in another order (chunked or token by token, windowed or whole): rounding of about 1e-16
# times the growth over a few hundred steps.
EXACT = Tolerance(1e-10, 1e-9)
# float64 gradients of the same: one more reduction, over parameters used in every window and loop.
EXACT_GRAD = Tolerance(1e-9, 1e-8)
# A central difference quotient with step 1e-7 in float64: rounding of 1e-15 over the step, and the step squared times
# a third derivative, which random weights and several passes make large.
QUOTIENT = Tolerance(1e-5, 1e-4)
# float64 as above after a dozen calls and as many sleeps on random weights, each of which enlarges what the ones before
# it left; and routers of some families take their softmax in float32 in any case (measured over 10,000 calls: 1.1e-8 at
# most). A wrong value is off by 1e-3 and more.
GROWN = Tolerance(1e-6, 1e-5)
# float32 against the published reference implementations (fixtures): what those differ among their own backends.
PARITY = Tolerance(1e-4, 1e-5)
# float32 against float64 or another order of the same few hundred products of size 1.
FLOAT32 = Tolerance(1e-5, 1e-5)
# The same as a relative error in norm, where single entries do not matter: a few units of float32's 6e-8.
ROUNDING32 = 1e-6
# The same behind exp(-50): the exponent's own rounding, half of 3.8e-6.
DECAYED32 = 3e-6
# flash-linear-attention in float32, uncompiled: it takes decays as differences of running sums (measured: 6e-7; wider
# for its own ways of summing in other versions).
FLA32 = 1e-5
# float32 on whatever device against float64, or in another order, through four layers, three passes and three sleeps of
# random weights, each of which enlarges what the ones before it left (measured on a CPU: 2e-4; a wrong value is off by
# 1e-1); and gradients as a relative error in norm (TF32 is off by 1e-3).
DEVICE32 = Tolerance(1e-3, 1e-3)
SINGLE_IN_NORM = 1e-4
# The same model in bfloat16 under two attention kernels, each of which rounds its probabilities to 8 bits: through four
# layers and three passes. Another mask changes logits of size 1 by all of it.
FLASH16 = Tolerance(0.1, 0.05)
# Half precision inputs and results as a relative error in norm: a rounding to 8 bits is 1.7e-3, cutting off 3.4e-3 (as
# Triton's interpreter does), and products on tensor cores add 4e-4.
HALF_IN_NORM = 6e-3
# Shares of a count that a formula leaves out by intention: norms and biases among parameters; the rule's own products,
# and attention in a small window, among operations; the head, which is not looped, beside layers of a tiny model.
NORMS_SHARE, RULE_SHARE, HEAD_SHARE = 1e-3, 0.03, 0.05
# Losses of a few steps of training, on two processes or one, recomputed or not: the same sums in another order, which
# AdamW's division by small second moments enlarges (measured: 2e-5).
DISTRIBUTED = Tolerance(1e-4, 0.0)
# The same with Muon, whose iteration runs in bfloat16 and enlarges small singular values: another order of the same
# products moves an update of a rank-deficient gradient by a third (measured in the loss: 1.3e-2; against AdamW: 1e-1).
DISTRIBUTED_MUON = Tolerance(3e-2, 0.0)
# Under autocast to bfloat16: weights in other pieces are multiplied in another order, each product rounded to 8 bits
# (measured: 5e-3).
DISTRIBUTED_BFLOAT16 = Tolerance(2e-2, 0.0)
# Muon's update of one matrix, made alone or with others of its shape, as a relative error in norm: the same products
# of bfloat16 numbers in another order, each rounded to 8 bits, through five steps that enlarge small singular values.
MUON_IN_NORM = 2e-2
# bfloat16 results (8 bits) that passed through two or three roundings.
BFLOAT16 = Tolerance(2**-5, 2**-5)
# Relative error in norm of a weight's gradient over 96 uses in bfloat16, each of which rounds its inputs and its result
# (measured: 2.9e-3). Added up in bfloat16 too they are off by 1.2e-2.
USES_BFLOAT16 = 5e-3
# Results computed in float32 and rounded to half precision once, against the same in other order: one unit of
# bfloat16's last place.
ONE_ROUNDING = Tolerance(1e-5, 2**-7)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, what: str = "") -> None:
    """``torch.testing.assert_close`` with a row of the table above; ``what`` names the tensor in the message."""
    torch.testing.assert_close(
        actual, expected, atol=tolerance.atol, rtol=tolerance.rtol, msg=lambda text: f"{what}: {text}"
    )
