"""What DeepSpeed is told: inserted layers in float32, whatever the base computes in, and Muon in its own form."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.optim import build_deepspeed_optimizer, build_optimizer, is_narrow

logger = logging.getLogger(__name__)


def build_zero_optimizer(model: nn.Module, args: SleepTrainingArguments, config: dict[str, Any]) -> Optimizer:
    """The optimiser of a run under DeepSpeed; completes DeepSpeed's configuration, before it is read.

    Args:
        model: not yet DeepSpeed's.
        args: those of the run.
        config: DeepSpeed's configuration, without a place that says "auto" for a dtype.

    Raises:
        ValueError: as `build_optimizer` and `build_deepspeed_optimizer`.
    """
    keep_float32(model, config)
    if config["zero_optimization"].get("stage") == 3:
        call_experts_alike(model, config)
    if args.optimizer != "muon":
        return build_optimizer(model, args)
    # ZeRO-3 could not put a matrix together from scattered gradients, and says so.
    config["zero_optimization"].setdefault("reduce_scatter", False)
    return build_deepspeed_optimizer(model, args)


def keep_float32(model: nn.Module, config: dict[str, Any]) -> None:
    """Have bf16 mean under DeepSpeed what it means elsewhere: autocast over weights as they are, trained in float32.

    DeepSpeed's own bf16 casts every parameter, and inserted ones are then used and saved rounded. Its ZeRO wants one
    dtype for all that trains, so a base of 16 bits that trains becomes float32 too.
    """
    half = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True), None)
    if half is None:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    if half == "fp16" or any(hasattr(p, "ds_id") for p in trained):
        why = "fp16" if half == "fp16" else "a model that ZeRO-3 partitioned while it was built (zero3_init_flag)"
        logger.warning(
            "with %s DeepSpeed rounds inserted layers to 16 bits where they are used and saved; their float32 values "
            "are in its optimiser's checkpoint alone (zero_to_fp32.py); bf16 with zero3_init_flag: false keeps them",
            why,
        )
        return
    for parameter in trained:
        if is_narrow(parameter):
            parameter.data = parameter.data.float()
    config["bf16"] = {"enabled": False}
    # No module's weights travel in 16 bits: ZeRO-3 would put what it gathered for a save back in place of the masters.
    config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def call_experts_alike(model: nn.Module, config: dict[str, Any]) -> None:
    """Have all ranks call the same modules of a mixture of experts, as ZeRO-3 needs it.

    The activation of the experts is a module, called once for every expert that a token was sent to: it becomes a
    function. DeepSpeed's own way, leaf modules, reduces gradients each time that such a module was gone through
    backwards, and fails where one is called several times in a step, as every looped layer is: it is turned off.
    """
    found = [getattr(module, "experts", None) for module in model.modules()]
    for experts in [each for each in found if isinstance(each, nn.Module)]:
        for name, child in list(experts.named_children()):
            # Dropout must stay what `eval` and `train` reach.
            if next(child.parameters(), None) is None and not isinstance(child, nn.Dropout):
                delattr(experts, name)
                setattr(experts, name, child.forward)
    if find_spec("deepspeed.runtime.zero.leaf_module_config") is not None:
        config["zero_optimization"].setdefault("leaf_module", {"classes": []})
