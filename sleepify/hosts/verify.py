"""Whether the driver computes what the base computes.

One pass of the driver is compared with the base's own forward pass, so that a family which departs from the convention
is refused rather than silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from sleepify.errors import UnsupportedModelError
from sleepify.hosts.driver import Host
from sleepify.memory import Memory


@torch.no_grad()
def verify(host: Host) -> None:
    """Compare one pass of the driver with the base's own forward pass, whole and in two parts.

    Raises:
        UnsupportedModelError: if they differ; the base does something outside its layers that the driver misses.
    """
    language_model = host.language_model
    weight: Any = language_model.get_input_embeddings().weight
    if weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return  # nothing to compute with: no memory behind the weights, or a ZeRO-3 partition of them
    n_tokens = min(9, getattr(host.config, "max_position_embeddings", None) or 9)
    ids = (torch.arange(2 * n_tokens, device=weight.device).view(2, n_tokens) * 7 + 1) % weight.shape[0]
    was_training = language_model.training
    language_model.eval()
    try:
        expected = host.base_logits(ids).float()
        memory, pieces = Memory(2), []
        for piece in ids.split([n_tokens - n_tokens // 2 - 1, n_tokens // 2, 1], dim=1):
            if piece.shape[1]:
                lengths, first = (piece.shape[1],) * 2, (memory.columns,) * 2
                hidden, frame = host.open(piece, lengths, first, memory, keep_keys=True)
                hidden, memory = host.run(hidden, memory, frame, 0, host.n_layers)
                memory = memory.advance(lengths, piece.shape[1])
                pieces.append(host.logits(hidden).float())
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        raise UnsupportedModelError(
            f"expected a GPU, found none: transformers hands recurrent layers of {type(language_model).__name__} to "
            "flash-linear-attention whenever that is installed, on a CPU too; uninstall it on this machine"
        ) from error
    finally:
        language_model.train(was_training)
    # Both sides run the same kernels in another order; a missed factor moves logits by far more than rounding does.
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    difference = (torch.cat(pieces, 1) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"expected {type(language_model).__name__} to follow transformers' decoder convention, but walking its "
            f"layers gives logits that differ from its own by {float(difference):.1e} (relative; allowed "
            f"{tolerance:.0e}); it does something between or around its layers that sleepify does not know. "
            "See docs/add-a-host"
        )
