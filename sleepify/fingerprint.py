"""What tells one base from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

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
