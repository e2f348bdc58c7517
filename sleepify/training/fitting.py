"""What every recipe does around its training: the trainer, what it spent, and the files beside the model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from sleepify.card import renewed
from sleepify.errors import SleepifyError
from sleepify.files import written_beside
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.data import SleepCollator
from sleepify.training.model_arguments import pad_token
from sleepify.training.processes import note_single_process
from sleepify.training.runs import MERGED, remove_drafts
from sleepify.training.trainer import SleepTrainer


class SetupError(SleepifyError):
    """A run that its recipe's fields describe and that cannot be: nothing of it has been trained or written."""


@contextmanager
def setting_up() -> Iterator[None]:
    """Tell what is wrong with a recipe's fields, whoever finds it, from a fault of the training.

    Raises:
        SetupError: in place of other errors of values, files and configurations, which say what was wrong.
    """
    try:
        yield
    except SleepifyError:
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SetupError(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class Spent:
    """On one training.

    Args:
        train_steps: optimiser steps of the run, those before a resume too.
        train_seconds: wall time of the training in this process.
        cpu_seconds: processor time of it; on a busy machine the better measure of work on the CPU.
    """

    train_steps: int
    train_seconds: float
    cpu_seconds: float


def trainer_of(model: Any, training: SleepTrainingArguments, tokenizer: Any, **data: Any) -> SleepTrainer:
    """The trainer of a recipe; ``data`` are its datasets."""
    return SleepTrainer(
        model=model,
        args=training,
        data_collator=SleepCollator(pad_token(tokenizer)),
        processing_class=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
        **data,
    )


def fit(trainer: SleepTrainer) -> Spent:
    """Train, go on where that was asked for, and save the model."""
    training = trainer.args
    note_single_process(training)
    if trainer.is_world_process_zero():
        remove_drafts(Path(str(training.output_dir)) / MERGED)
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    # What is pushed, if anything, is pushed with the notes.
    trainer.save_model(_internal_call=True)
    return Spent(trainer.state.global_step, seconds, cpu_seconds)


def write_notes(trainer: SleepTrainer, tokenizer: Any, has_adapters: bool, notes: Mapping[str, Any]) -> None:
    """JSON files beside the model, and beside the one with its adapters folded in, which anything can load; then all of
    it is pushed, if that was asked for. In a distributed run every rank must call this.

    Args:
        trainer: whose model is trained, and saved already.
        tokenizer: the model's, if it has one.
        has_adapters: whether LoRA's are on it.
        notes: what each file holds.
    """
    output = str(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        _write(output, notes)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if has_adapters and trainer.is_world_process_zero():
        model: Any = trainer.model
        merged = str(Path(output) / MERGED)
        model.merge_and_unload().save_pretrained(merged)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(merged)
        _write(merged, notes)


def _write(folder: str, notes: Mapping[str, Any]) -> None:
    with renewed(Path(folder), folder):
        for name, content in notes.items():
            with written_beside(Path(folder) / name) as draft:
                draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
