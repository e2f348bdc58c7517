"""Pure tensor functions: the recurrences of the fast weights and their short convolutions."""

from __future__ import annotations

from sleepify.ops.conv import dynamic_conv, dynamic_conv_reference, short_conv, short_conv_reference
from sleepify.ops.gated_delta import gated_delta_chunked, gated_delta_reference, gated_delta_rule
from sleepify.ops.gated_hebbian import gated_hebbian_chunked, gated_hebbian_reference, gated_hebbian_rule
from sleepify.ops.kernels import describe

__all__ = [
    "describe",
    "dynamic_conv",
    "dynamic_conv_reference",
    "gated_delta_chunked",
    "gated_delta_reference",
    "gated_delta_rule",
    "gated_hebbian_chunked",
    "gated_hebbian_reference",
    "gated_hebbian_rule",
    "short_conv",
    "short_conv_reference",
]
