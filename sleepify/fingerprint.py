"""What tells one base from another."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import nn

from sleepify.errors import CheckpointError

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str | None:
    """sha256 over names, shapes and a sample of every parameter.

    Values are compared in bfloat16, so that a base loaded in float32 and in bfloat16 is the same base. None where
    weights cannot be seen (on the meta device, or partitioned by ZeRO-3).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta" or hasattr(parameter, "ds_id"):
            return None
        values = parameter.detach()
        if type(values) is not torch.Tensor and type(values) is not nn.Parameter and hasattr(values, "dequantize"):
            # Of torchao, whose tensors know few operations.
            values = values.dequantize()
        flat = values.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def check_unchanged(base: nn.Module, then: str | None) -> None:
    """See that a base is as it was when sleep was added.

    Raises:
        CheckpointError: if it is not.
    """
    if (now := fingerprint(base)) != then:
        raise CheckpointError(
            f"expected the base to be as it was when sleep was added (fingerprint {then}), got {now}: it was "
            "trained or resized, or cast to float16, since; save the whole model, without fast_weights_only"
        )


def check_same(base: nn.Module, wanted: str | None, base_name: str | None, name: str | os.PathLike) -> None:
    """See that a base is the one that inserted weights were trained on.

    Args:
        base: that is at hand.
        wanted: fingerprint of the other.
        base_name: where that came from, if it has a name.
        name: of the checkpoint of inserted weights.

    Raises:
        CheckpointError: if it is another.
    """
    found = fingerprint(base)
    if found in (None, wanted):
        return
    if any(parameter.dtype == torch.float16 for parameter in base.parameters()):
        # Rounded twice, a value may be another in bfloat16.
        way = "load it in torch.bfloat16 or torch.float32 and cast afterwards: in float16 bases cannot be told apart"
    else:
        way = f"load the base that {name} was trained on"
    raise CheckpointError(
        f"expected the base with fingerprint {wanted} ({base_name or 'built in memory'}), got one with {found}; {way}"
    )
