"""How many processes a run has become, said where a user may have expected more."""

from __future__ import annotations

import logging
import os

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Accelerate's launchers set it for what they start, whatever they start.
_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"


def note_single_process(args: TrainingArguments) -> bool:
    """Say that `accelerate launch` made one process, which it does without a word wherever a file says ``use_cpu`` or
    names no kind of distribution, whatever ``num_processes`` it was given. Whether it was said.

    Args:
        args: of the run.
    """
    is_alone = _BY_ACCELERATE in os.environ and args.world_size == 1
    if is_alone:
        logger.warning(
            "accelerate launch started one process, on %s; if you asked for several, give it a file with a "
            "distributed_type (recipes/accelerate/ddp.yaml), and no use_cpu",
            args.device,
        )
    return is_alone
