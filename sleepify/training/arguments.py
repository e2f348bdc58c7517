"""SleepTrainingArguments: transformers' arguments, and what training a sleeping model adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from sleepify.settings import check_positive
from sleepify.training.objective_arguments import ObjectiveArguments

OPTIMIZERS = ("muon", "adamw")
ADJUSTMENTS = ("original", "match_rms_adamw")
TRAINED = ("all", "fast_weights")
ADAMW_LEARNING_RATE = 5e-5


@dataclass
class SleepTrainingArguments(ObjectiveArguments, TrainingArguments):
    """Arguments of `SleepTrainer`.

    Two fields of transformers mean something else here, and nothing that is given is ignored. ``learning_rate`` is
    AdamW's with ``optimizer="adamw"`` (the same as ``adamw_learning_rate``), and refused with ``"muon"``, which has two
    rates of different size. ``optim``, ``optim_args`` and ``optim_target_modules`` are refused: ``optimizer`` chooses.

    Raises:
        ValueError: for a value that training cannot work with, naming the field.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "With optimizer=adamw the same as adamw_learning_rate; with muon give both rates instead."},
    )
    optim: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Not taken: 'optimizer' chooses between Muon with AdamW and AdamW alone."}
    )

    optimizer: str = field(
        default="muon",
        metadata={"help": "'muon': Muon for hidden matrices and AdamW for the rest; 'adamw': AdamW for all."},
    )
    muon_learning_rate: float = field(
        default=1e-3, metadata={"help": "Muon's, of hidden matrices (the paper: 1e-3, from scratch 2e-3)."}
    )
    adamw_learning_rate: float = field(
        default=ADAMW_LEARNING_RATE,
        metadata={"help": "AdamW's: of embeddings, head, norms, biases and gates; of all with optimizer=adamw."},
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon (Nesterov)."})
    muon_adjust_lr: str = field(
        default="original",
        metadata={
            "help": "What Muon's rate is multiplied by for a matrix [A, B]: 'original', sqrt(max(1, A/B)); "
            "'match_rms_adamw', 0.2 sqrt(max(A, B)), so that rates of AdamW serve."
        },
    )
    loops_schedule: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of loops to draw N from, anew in every optimiser step, so that one checkpoint serves them "
            "all. A number listed twice comes twice as often. Default: the model's n_loops in every step."
        },
    )
    skip_nonfinite: bool = field(
        default=True, metadata={"help": "Skip an update whose loss or gradient is NaN or infinite, and count it."}
    )
    max_nonfinite_steps: int = field(
        default=5, metadata={"help": "Stop when so many updates in a row had to be skipped."}
    )
    train_only: str | None = field(
        default=None,
        metadata={
            "help": "'fast_weights': freeze the base; 'all': freeze nothing. Default: train what requires a gradient."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint-<step> folder of this run, or 'latest' for the newest in output_dir; where there is "
            "none yet, a new run begins ('true': an error)."
        },
    )
    include_num_input_tokens_seen: str | bool = field(
        default="non_padding", metadata={"help": "Count tokens read, and so tokens per second; padding is none."}
    )

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"expected optimizer to be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        # A command line knows words alone; the Trainer's own word for "the latest, or an error" is a truth value.
        resume: Any = self.resume_from_checkpoint
        self.resume_from_checkpoint = {"true": True, "false": None}.get(str(resume).lower(), resume)
        self.check_objectives()
        self.settle_optimizer()
        # transformers' own must be a name that it knows while it looks; afterwards None again, as it was given.
        self.optim = TrainingArguments.default_optim
        super().__post_init__()
        self.optim = None
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            # Of a stream Accelerate would join the batches of all processes, which differ in width.
            accelerator.dispatch_batches = False
        if self.train_only is not None and self.train_only not in TRAINED:
            raise ValueError(f"expected train_only to be one of {', '.join(TRAINED)}, got {self.train_only!r}")
        for name in ("muon_learning_rate", "adamw_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be 0 or more, got {getattr(self, name)!r}")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"expected muon_momentum from 0 to below 1, got {self.muon_momentum!r}")
        if self.muon_adjust_lr not in ADJUSTMENTS:
            raise ValueError(
                f"expected muon_adjust_lr to be one of {', '.join(ADJUSTMENTS)}, got {self.muon_adjust_lr!r}"
            )
        if self.loops_schedule is not None:
            loops = self.loops_schedule
            if not loops or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in loops):
                raise ValueError(f"expected loops_schedule to list whole numbers of at least 1, got {loops!r}")
        check_positive("per_device_eval_batch_size", self.per_device_eval_batch_size)
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"expected max_nonfinite_steps of at least 1, got {self.max_nonfinite_steps}")
        if self.label_smoothing_factor:
            raise ValueError(
                f"expected label_smoothing_factor=0, got {self.label_smoothing_factor}: the model makes its own loss, "
                "and logits only where it needs them"
            )
        if self.fp16:
            raise ValueError(
                "expected bf16=True or full precision, got fp16=True: the state outgrows its range; use bf16"
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "expected enable_jit_checkpoint=False, got True: SleepTrainer saves on SIGTERM itself, on all ranks in "
                "the same step; drop the option"
            )

    @property
    def device(self) -> torch.device:
        """Where this process computes. Accelerate numbers the one CPU too, which torch cannot load to by number."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def settle_optimizer(self) -> None:
        """Make of transformers' ``learning_rate`` what it means here, and refuse what would be ignored.

        Called again when training begins, since ``set_optimizer`` and the like change arguments that exist.

        Raises:
            ValueError: for a rate that would say nothing, or two things; for another optimiser.
        """
        for name in ("optim", "optim_args", "optim_target_modules"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"expected {name} to be left out, got {getattr(self, name)!r}: SleepTrainer brings its own "
                    "optimisers; choose with optimizer='muon' or 'adamw'"
                )
        if self.learning_rate is None:
            return
        if self.optimizer == "muon":
            raise ValueError(
                f"expected muon_learning_rate and adamw_learning_rate with optimizer='muon', got learning_rate="
                f"{self.learning_rate}: one rate does not fit both; give the two, or optimizer='adamw'"
            )
        if self.adamw_learning_rate not in (ADAMW_LEARNING_RATE, self.learning_rate):
            raise ValueError(
                f"expected learning_rate or adamw_learning_rate, which are the same with optimizer='adamw', got "
                f"{self.learning_rate} and {self.adamw_learning_rate}; leave one out"
            )
        self.adamw_learning_rate = self.learning_rate
