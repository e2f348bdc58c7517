"""Bases and checkpoints that are loaded with 8 or 4 bits, by packages that are optional."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BitsAndBytesConfig, TorchAoConfig

# Of a small base: what the packages can quantize.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "vocab_size": 128}
each_way = pytest.mark.parametrize(
    "bits",
    [
        pytest.param("8 bits", marks=pytest.mark.flow("bitsandbytes, 8 bits")),
        pytest.param("4 bits", marks=pytest.mark.flow("bitsandbytes, 4 bits")),
        pytest.param("torchao", marks=pytest.mark.flow("torchao, int8")),
    ],
)


def quantization(bits: str, **torchao: Any) -> BitsAndBytesConfig | TorchAoConfig:
    """How to load; ``torchao`` are further options of that package. Skips the test where the package is missing."""
    if bits == "torchao":
        kinds = pytest.importorskip("torchao.quantization", reason="torchao is optional")
        return TorchAoConfig(kinds.Int8WeightOnlyConfig(), **torchao)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    return BitsAndBytesConfig(**{f"load_in_{bits[0]}bit": True})
