"""SleepTrainer: transformers' Trainer for models that sleep.

The loop, accumulation, logging, Accelerate, FSDP and DeepSpeed are the Trainer's. Added here: Muon beside AdamW, N
drawn per step, updates skipped when they are not finite, checkpoints that are whole or not there, a save on SIGTERM and
Ctrl-C, and the same layer calls on all ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from sleepify.config import SleepConfig
from sleepify.errors import SleepifyError
from sleepify.manifest import check
from sleepify.modeling import SleepForCausalLM
from sleepify.rows import NO_COLUMNS
from sleepify.training import runs
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.data import SeededByLength, SleepCollator, TaskDataset
from sleepify.training.norms import not_finite, state_norms
from sleepify.training.objectives import SUPERVISED, Criterion, objectives_of, sleeping_model
from sleepify.training.optim import build_optimizer, idle_layers
from sleepify.training.pushing import SleepPushes
from sleepify.training.rounds import equalise, restore
from sleepify.training.sharding import autocast_under_fsdp, check_sharding, give_memory_out
from sleepify.training.stopping import StopRequest
from sleepify.training.zero import build_zero_optimizer

logger = logging.getLogger(__name__)

LATEST = "latest"
"""What ``resume_from_checkpoint`` may say instead of a folder."""


class NonFiniteStepsError(SleepifyError):
    """Too many updates in a row had a loss or gradient that is NaN or infinite."""


def loops_of_step(schedule: Sequence[int], seed: int, step: int) -> int:
    """N of an optimiser step: the same on all ranks, in all accumulated batches and after a resume."""
    return Random(f"{seed}/{step}").choice(schedule)


class SleepTrainer(SleepPushes):
    """Trains a `SleepForCausalLM` (or a peft model around one), or a plain model that it is compared with.

    Args:
        model: the model.
        args: `SleepTrainingArguments`.
        criterion: a loss of one's own in the place of cross entropy: a function of logits [m, V] and targets [m], -100
            where there is none, that returns their sum. It is called for some places at a time.
        kwargs: those of ``transformers.Trainer``. The collator defaults to `SleepCollator` with the pad token of
            ``processing_class``. A `TaskDataset` is read in its order.

    Attributes:
        nonfinite_steps: updates skipped so far.

    Raises:
        TypeError: for arguments of another class.
        ValueError: for ``model_init``, if no pad token is known, or ``train_only`` or a loss does not fit the model.
    """

    args: SleepTrainingArguments

    def __init__(
        self, model: PreTrainedModel, args: SleepTrainingArguments, criterion: Criterion | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(args, SleepTrainingArguments):
            raise TypeError(f"expected args to be SleepTrainingArguments, got {type(args).__name__}")
        if model is None or kwargs.get("model_init") is not None:
            raise ValueError("expected a model, and no model_init: make a model and a trainer for every trial")
        args.settle_optimizer()
        if kwargs.get("data_collator") is None:
            pad_id = getattr(kwargs.get("processing_class"), "pad_token_id", None)
            if pad_id is None:
                raise ValueError("expected data_collator=SleepCollator(pad_id), or a processing_class with a pad token")
            kwargs["data_collator"] = SleepCollator(pad_id)
        if args.train_only is not None:
            if not isinstance(model, SleepForCausalLM):
                raise ValueError(
                    f"expected train_only=None for a {type(model).__name__}, got {args.train_only!r}: "
                    "set requires_grad as you need it"
                )
            model.freeze_base(args.train_only == "fast_weights")
        if args.process_index == 0 and (idle := idle_layers(model)):
            logger.warning(
                "inserted layers are frozen while their output projection is zero, so that nothing that sleeps can "
                "change what the model says (%s): let them train (requires_grad_, peft's modules_to_save), or load "
                "weights for them",
                ", ".join(idle),
            )
        self._draft_directory: Path | None = None
        self._loss_only = False
        super().__init__(model, args, **kwargs)
        check_sharding(self.args, self.accelerator)
        self._autocast = autocast_under_fsdp(self.accelerator)
        self.nonfinite_steps = self._nonfinite_in_a_row = 0
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=args.device)
        self._stop, self._stop_agreed = StopRequest(), False
        self._loops_since_log: list[int] = []
        self._state_norms: dict[str, float] = {}
        self._config: Any = model.config
        self._sleeps = isinstance(model.config, SleepConfig)  # a baseline's plain model has no windows, no state
        if self._sleeps and self.is_fsdp_enabled:
            give_memory_out(sleeping_model(model).blocks.layers)
        if self._sleeps and args.torch_compile:
            # Layer by layer; Accelerate would wrap the whole model, whose loop over windows is no graph.
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
            sleeping_model(model).compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._objectives = objectives_of(args, model, criterion, self.compute_loss_func)
        self._counts: Tensor | None = None
        self._run = runs.describe_run(model, args, self.train_dataset)
        self._progress: dict[str, Any] = {}
        self.add_callback(_RestoreProgress(self))

    # --- data and optimiser ----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, TaskDataset):
            return SequentialSampler(dataset)
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
            return SeededByLength(dataset, self.args, lambda: self.state.epoch)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `build_optimizer`, and under DeepSpeed `build_zero_optimizer`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            if self.is_deepspeed_enabled:
                config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
                self.optimizer = build_zero_optimizer(trained, self.args, config)
            else:
                self.optimizer = build_optimizer(trained, self.args)
        return self.optimizer

    # --- one step --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        if self._objectives is None or not batch_samples:
            # A step without a label has a loss of 0.
            return items.clamp(min=1) if isinstance(items, Tensor) else items
        self._counts = self._objectives.count(batch_samples).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self._counts = self.accelerator.reduce(self._counts, "sum")
        return self._counts.sum().clamp(min=1)  # to the Trainer it matters only that something was counted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's, with N of this step."""
        inputs = dict(inputs)
        if model.training and self._sleeps and self.args.loops_schedule is not None:
            inputs["n_loops"] = loops_of_step(self.args.loops_schedule, self.args.seed, self.state.global_step)
        if model.training:
            self._loops_since_log.append(inputs.get("n_loops") or self._run["n_loops"] or 1)
        # A loss of another's making is made of all logits, as are metrics.
        every = self.compute_loss_func is not None or (return_outputs and not self._loss_only)
        if self._sleeps and "labels" in inputs and not (every or model.training):
            inputs["logits_to_keep"] = NO_COLUMNS
        objectives = self._objectives if model.training else None
        counts = self._counts
        if objectives is not None:
            inputs = objectives.prepare(inputs)
            counts = objectives.count([inputs]) if num_items_in_batch is None or counts is None else counts
        given, sharded = inputs, (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.args.world_size > 1
        if self._sleeps and sharded and "labels" in inputs:
            apart = self._config.backprop_windows is not None or (objectives and objectives.tells_last_sleeps)
            inputs = equalise(inputs, self._config.window_size, bool(apart), every)
        with ExitStack() as stack:
            if model.training and self._sleeps and self._logs_after_this_step():
                self._state_norms = stack.enter_context(state_norms(sleeping_model(model)))
            if objectives is not None and counts is not None:
                number, last = self.state.global_step, max(1, self.state.max_steps)
                stack.enter_context(objectives.on(counts, inputs.pop(SUPERVISED, None), number, number / last))
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if inputs is not given and outputs.logits is not None:
            # Rows that were added are nobody's predictions.
            outputs.logits = restore(outputs.logits, given.get("attention_mask"), given["input_ids"].shape)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any) -> Any:
        """The Trainer's; logits are made only where somebody will look at them. The loss is cross entropy."""
        objectives, self._objectives, self._loss_only = self._objectives, None, prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)
        finally:
            self._objectives, self._loss_only = objectives, False

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Around every call of the model: autocast where Accelerate sees to none."""
        return self._autocast()

    def _logs_after_this_step(self) -> bool:
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps)) == 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's; takes note of a loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_is_bad |= ~torch.isfinite(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once per step, between backward and update, with the gradient's norm: the place to drop a bad one."""
        norm = super()._get_grad_norm(model, grad_norm)
        is_bad = not_finite(self._loss_is_bad, norm)
        self._loss_is_bad.zero_()
        is_bad, self._stop_agreed = self._agree(is_bad, self._stop.asked is not None)
        if is_bad and self.args.skip_nonfinite:
            # Without gradients the optimiser leaves parameters and its own state as they are. DeepSpeed has made its
            # step by now, and skipped it for such a gradient.
            if not self.is_deepspeed_enabled:
                model.zero_grad(set_to_none=True)
            self._count_nonfinite(float(norm))
        elif not is_bad:
            self._nonfinite_in_a_row = 0
        return norm

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is on any rank."""
        if self.args.world_size == 1:
            return list(flags)
        both = torch.tensor(flags, dtype=torch.int32, device=self.args.device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in both.tolist()]

    def _count_nonfinite(self, norm: float) -> None:
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        step = self.state.global_step + 1
        logger.warning("step %d skipped: loss or gradient not finite (gradient norm %s)", step, norm)
        if self._nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            raise NonFiniteStepsError(
                f"expected a finite loss and gradient, got NaN or infinity in {self._nonfinite_in_a_row} steps in a "
                f"row (up to step {step}, {self.nonfinite_steps} in all); the weights are as they were before. "
                "Lower the learning rates or max_grad_norm, check the data, and resume from the last checkpoint"
            )

    # --- log -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log line, with N, the norm of each layer's state and the skipped updates."""
        if "loss" in logs:
            if self._loops_since_log:
                logs["n_loops"] = sum(self._loops_since_log) / len(self._loops_since_log)
            logs["nonfinite_steps"] = self.nonfinite_steps
            logs |= self._state_norms
            self._loops_since_log, self._state_norms = [], {}
        super().log(logs, start_time)

    # --- stop and resume -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. On SIGTERM or Ctrl-C the step is finished, a checkpoint saved, and the process exits with
        status 143 or 130; a second Ctrl-C does not wait.

        Args:
            resume_from_checkpoint: a checkpoint-<step> folder; True for the latest in ``output_dir``; "latest" for the
                same, or for a new run where there is none yet, so that one command starts a run and goes on with it.
            args, kwargs: those of ``Trainer.train``.

        Raises:
            CheckpointError: if the checkpoint, or one in the way in ``output_dir``, belongs to another run.
            NonFiniteStepsError: if too many updates in a row are not finite.
        """
        directory = self.args.output_dir or ""
        last = get_last_checkpoint(directory) if os.path.isdir(directory) else None
        if resume_from_checkpoint == LATEST:
            if last is None and self.args.process_index == 0:
                logger.warning("no checkpoint in %s to resume from: a new run begins", directory)
            resume_from_checkpoint = last
        elif resume_from_checkpoint is True:
            resume_from_checkpoint = last or True
        self._progress = {}
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._progress = runs.read_manifest(Path(resume_from_checkpoint), self._run)
        elif last is not None and self.args.save_strategy != "no":
            # Otherwise this run would write over the other's checkpoints.
            runs.read_manifest(Path(last), self._run)
        if self.args.should_save:
            runs.remove_drafts(Path(directory))
        with self._stop.listening(speaks=self.args.process_index == 0):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._stop_agreed:
            raise SystemExit(self._stop.status)
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        runs.refuse_missing(cast(nn.Module, self.model), load_result.missing_keys)
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            check(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which makes a step before it asks whether there is one left to make."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called after every step, when logs and checkpoints are due."""
        if self._stop_agreed and not self.control.should_training_stop:
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_directory = Path(super()._get_output_dir(trial))
        final = run_directory / f"checkpoint-{self.state.global_step}"
        with runs.whole_or_not_at_all(final, self.args.should_save, self.accelerator.wait_for_everyone) as draft:
            self._draft_directory = draft
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._draft_directory = None
            unlogged = self._unlogged_loss()
            if self.args.should_save:
                self.name_card(draft / final.name, final)
                self._name_best_checkpoint(run_directory)
                self.state.save_to_json(str(draft / final.name / "trainer_state.json"))
                progress = {
                    "nonfinite_steps": self.nonfinite_steps,
                    "nonfinite_in_a_row": self._nonfinite_in_a_row,
                    "loss_since_log": unlogged,
                    "loops_since_log": self._loops_since_log,
                    "last_log": self._globalstep_last_logged,
                }
                runs.write_manifest(draft / final.name, self._run, progress)
        self._name_best_checkpoint(run_directory)
        if self.args.push_to_hub:
            self.push_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(
                str(run_directory), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial: Any) -> str:
        if self._draft_directory is not None:
            return str(self._draft_directory)
        return super()._get_output_dir(trial)

    def _name_best_checkpoint(self, run_directory: Path) -> None:
        """By its place in the run directory, not in the draft."""
        if self.state.best_global_step:
            best = run_directory / f"checkpoint-{self.state.best_global_step}"
            is_there = best.exists() or self.state.best_global_step == self.state.global_step
            self.state.best_model_checkpoint = str(best) if is_there else None

    def _unlogged_loss(self) -> float:
        """The loss summed since the last log line, averaged over ranks."""
        loss = self._tr_loss.detach().double()
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss, "mean")
        return loss.item()

    def restore_progress(self) -> None:
        """Go on counting where the checkpoint stopped; called when training begins."""
        self._stop_agreed = False
        if self._progress:
            self.nonfinite_steps = self._progress["nonfinite_steps"]
            self._nonfinite_in_a_row = self._progress["nonfinite_in_a_row"]
            self._tr_loss += self._progress["loss_since_log"]
            self._loops_since_log = self._progress["loops_since_log"]
            self._globalstep_last_logged = self._progress["last_log"]


class _RestoreProgress(TrainerCallback):
    def __init__(self, trainer: SleepTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.restore_progress()
