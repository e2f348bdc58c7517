"""Whether a host computes what its base computes.

Its passes are compared with the base's own forward pass, so that a family which departs from the convention is refused
rather than silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleepify.errors import UnsupportedModelError
from sleepify.hosts.driver import Host
from sleepify.memory import Memory

# Read at once, both sides make the same calls with the same shapes: all tested families agree to the bit, in float32
# and in half precision. What is left over is for kernels that sum in another order from call to call.
_WHOLE = {True: 1e-3, False: 5e-3}
# Read in pieces, sums are taken in another order, of up to a hundred layers; relative to the largest logit.
_PIECES = {True: 1e-3, False: 5e-2}
# That rounding has no direction, so that it hardly changes how long logits are along the base's own; a factor does.
_ALONG = {True: 1e-3, False: 1e-2}


@torch.no_grad()
def verify(host: Host) -> None:
    """Compare passes of a host with its base's own forward pass: whole, and in three pieces, of which one is one token.

    Raises:
        UnsupportedModelError: if they differ; the base does something outside its layers that the host misses.
    """
    language_model = host.language_model
    weight: Any = language_model.get_input_embeddings().weight
    if weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return  # nothing to compute with: no memory behind the weights, or a ZeRO-3 partition of them
    n_tokens = min(9, getattr(host.config, "max_position_embeddings", None) or 9)
    ids = (torch.arange(2 * n_tokens, device=weight.device).view(2, n_tokens) * 7 + 1) % weight.shape[0]
    sizes = [size for size in (n_tokens - n_tokens // 2 - 1, n_tokens // 2, 1) if size]
    modes = [(module, module.training) for module in language_model.modules()]
    language_model.eval()
    try:
        expected = host.base_logits(ids).float().to(ids.device)
        whole = _walk(host, ids, [n_tokens])[0]
        pieces = _walk(host, ids, sizes)
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        raise UnsupportedModelError(
            f"expected a GPU, found none: transformers hands recurrent layers of {type(language_model).__name__} to "
            "flash-linear-attention whenever that is installed, on a CPU too; uninstall it on this machine"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    # Layers with whole numbers round their inputs, by scales that depend on what else is in the batch.
    is_wide = weight.dtype in (torch.float32, torch.float64) and not getattr(language_model, "is_quantized", False)
    largest = expected.abs().max().clamp_min(1e-6)
    found = {
        "read at once": ((whole - expected).norm() / expected.norm().clamp_min(1e-6), _WHOLE[is_wide]),
        "read in pieces": ((torch.cat(pieces, 1) - expected).abs().max() / largest, _PIECES[is_wide]),
    }
    for piece, own in zip(pieces, expected.split(sizes, dim=1), strict=True):
        along = (piece * own).sum() / own.square().sum().clamp_min(1e-12) - 1
        found[f"in length, {piece.shape[1]} tokens"] = (along.abs(), _ALONG[is_wide])
    for what, (difference, allowed) in found.items():
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"expected {type(language_model).__name__} to follow transformers' decoder convention, but walking its "
                f"layers gives logits that differ from its own by {float(difference):.1e} {what} (relative; allowed "
                f"{allowed:.0e}); it does something between or around its layers that sleepify does not know. "
                "See docs/add-a-host"
            )


def _walk(host: Host, ids: Tensor, sizes: list[int]) -> list[Tensor]:
    """Logits [B, T, V] of each of the pieces in which a text is read."""
    memory, logits = Memory(ids.shape[0]), []
    for piece in ids.split(sizes, dim=1):
        lengths = (piece.shape[1],) * ids.shape[0]
        hidden, frame = host.open(piece, lengths, memory.kv_lengths, memory, keep_keys=True)
        hidden, memory = host.run(hidden, memory, frame, 0, host.n_layers)
        memory = memory.advance(lengths, piece.shape[1])
        logits.append(host.logits(hidden).float().to(ids.device))
    return logits
