"""A fast-weight layer to insert into a pretrained decoder: norm, mixer, residual, no MLP.

    h <- h + mixer(RMSNorm(h))

Its output projection starts at zero, so that a freshly inserted layer changes nothing. This is the paper's way of
giving Ouro fast weights (§6.3): Jet layers without MLP between the pretrained blocks.

Its parameters are float32 at least, whatever the dtype of the base: a step of training is smaller than the distance of
two bfloat16 numbers, and would be rounded away. It computes in the dtype of the hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sleepify.fast_weights.mixer import FastWeightState, Mixer
from sleepify.fast_weights.parts import RMSNorm
from sleepify.ops.chunking import accumulation_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class FastWeightLayer(nn.Module):
    """``h + mixer(norm(h))``.

    Args:
        mixer: one of ``sleepify.fast_weights.LAYERS``; its output projection is set to zero.
        norm_eps: epsilon of the input norm.
    """

    def __init__(self, mixer: Mixer, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.hidden_size, norm_eps)
        self.mixer = mixer
        nn.init.zeros_(self.o_proj.weight)
        drawn = self.norm.weight
        if drawn.dtype != accumulation_dtype(drawn) and not hasattr(drawn, "ds_id"):
            # Built under a default dtype of half precision, as transformers does. (ZeRO-3 has float32 copies.)
            self.float()
            self.reset_parameters()

    @property
    def o_proj(self) -> nn.Linear:
        """The mixer's output projection."""
        return self.mixer.o_proj

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator, the output projection zero."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters()
        nn.init.zeros_(self.o_proj.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves and converts modules ends here: ``half()`` and the like leave float32, all else does as it says.

        DeepSpeed's own bf16 converts past this, so that it is not used (``sleepify.training.zero``).
        """

        def kept(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if not result.is_floating_point() or tensor.dtype != accumulation_dtype(tensor):
                return result
            wide = accumulation_dtype(result)
            return result if result.dtype == wide else tensor.to(device=result.device, dtype=wide)

        return super()._apply(kept, recurse)

    def train(self, mode: bool = True) -> Self:
        """As in torch; warns where somebody has cast what trains past `_apply` (DeepSpeed has float32 copies)."""
        if mode and (narrow := next(filter(_would_round, self.parameters()), None)) is not None:
            warnings.warn(
                f"expected inserted layers of float32 to train, got {narrow.dtype}, in which steps are rounded away "
                "where a weight is not small (TRL casts all that it trains on a quantized base): after the trainer is "
                "made, write trainer.model.fast_weights.float()",
                stacklevel=2,
            )
        return super().train(mode)

    def forward(
        self, hidden_states: Tensor, state: FastWeightState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, FastWeightState]:
        """[B,T,D] -> [B,T,D] and the new state. ``state`` and ``lengths`` as in ``Mixer.forward``."""
        mixed, state = self.mixer(self.norm(hidden_states), state, lengths)
        return hidden_states + mixed, state


def _would_round(parameter: Tensor) -> bool:
    copied = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    return parameter.requires_grad and parameter.dtype != accumulation_dtype(parameter) and not copied
