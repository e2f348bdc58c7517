"""What makes a checkpoint directory one run's own, and writing it whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from sleepify.errors import CheckpointError
from sleepify.files import discard, draft_of
from sleepify.manifest import finish_save
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.text_data import TextRows, TextStream

MERGED = "merged"
"""Folder of a model with its adapters merged, in a run's folder."""
TASK = "task.json"
"""File beside a checkpoint that says what it was trained on."""
MANIFEST = "sleep_run.json"
_SETTINGS = ("optimizer", "muon_learning_rate", "adamw_learning_rate", "muon_momentum", "weight_decay", "seed")
_SINCE = ("lr_scheduler_type", "warmup_steps", "data_seed", "train_sampling_strategy")
"""Settings that older checkpoints say nothing of."""
_ROWS = "rows"
_HELD_OUT = "held_out"
_SLEEP = ("window_size", "eviction", "loop_range", "n_loops", "backprop_loops", "backprop_windows")


def describe_run(model: nn.Module, args: SleepTrainingArguments, dataset: Any) -> dict[str, Any]:
    """What must agree for a resumed run to go on as if it had not stopped."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        digest.update(f"{name} {shape} {parameter.requires_grad}".encode())
    config = getattr(model, "config", None)
    run = {name: getattr(config, name, None) for name in _SLEEP}
    if args.loops_schedule is not None:
        run["n_loops"] = args.loops_schedule
    run |= {name: getattr(args, name) for name in (*_SETTINGS, *_SINCE)}
    # Absent from checkpoints of before there was a choice.
    run["muon_adjust_lr"] = None if args.muon_adjust_lr == "original" else args.muon_adjust_lr
    run["objectives"] = args.objectives() or None
    run["rows_per_step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    run["task"] = repr(dataset.task) if hasattr(dataset, "task") else None
    run[_ROWS] = dataset.sample() if isinstance(dataset, TextRows) else None
    # Of a stream nobody knows the rows beforehand, but which it begins with.
    run[_HELD_OUT] = dataset.skip if isinstance(dataset, TextStream) else None
    run["parameters"] = digest.hexdigest()[:16]
    return json.loads(json.dumps(run))


def read_manifest(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The progress noted in a checkpoint of this run.

    Raises:
        CheckpointError: if it is not a checkpoint, or that of another run; the message says in what they differ.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"expected a checkpoint of SleepTrainer in {checkpoint}, found no {MANIFEST}; "
            "give the checkpoint-<step> folder of a run, or start a new run in another output_dir"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        then, progress = manifest["run"], manifest["progress"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"expected a readable {MANIFEST} in {checkpoint}, got {error!r}; take an older one"
        ) from error
    for name in (_ROWS, _HELD_OUT, *_SINCE):
        then.setdefault(name, run[name])
    differing = [f"{name}: {then.get(name)!r} there, {run[name]!r} here" for name in run if then.get(name) != run[name]]
    if differing:
        raise CheckpointError(
            f"expected a checkpoint of this run in {checkpoint}, got one of another ({'; '.join(differing)}); "
            "use the settings of that run, or start a new run from its weights with from_pretrained and in another "
            "output_dir"
        )
    return dict(progress)


def refuse_missing(model: nn.Module, missing: Iterable[str]) -> None:
    """See that a checkpoint had all weights of the model that goes on from it.

    Args:
        model: into which it was loaded.
        missing: what ``load_state_dict`` did not find. Weights that share their storage with one that it found are
            there.

    Raises:
        CheckpointError: if some are missing, with which a run would go on from the base's.
    """
    missing = set(missing)
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    there = {id(weight) for name, weight in weights.items() if name not in missing}
    if lacking := sorted(name for name in missing if id(weights.get(name)) not in there):
        raise CheckpointError(
            f"expected the weights of {type(model).__name__} by its modules' names, found none for {len(lacking)} of "
            f"them ({', '.join(lacking[:3])}): transformers saves some families under other names, which a trainer "
            "cannot load; start a new run from the checkpoint with from_pretrained and in another output_dir"
        )


def write_manifest(checkpoint: Path, run: dict[str, Any], progress: dict[str, Any]) -> None:
    """Note whose checkpoint this is."""
    text = json.dumps({"run": run, "progress": progress}, indent=2, sort_keys=True)
    (checkpoint / MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextmanager
def whole_or_not_at_all(final: Path, is_writer: bool, wait_for_all: Callable[[], None]) -> Iterator[Path]:
    """A folder to write ``final.name`` in, which takes its place when all ranks are done.

    A kill leaves a hidden draft for `remove_drafts`; an error removes it at once. What was there stays there.

    Raises:
        CheckpointError: if the files could not be written (a full disk, a quota).
    """
    draft = draft_of(final)
    if is_writer:
        discard(draft)
    wait_for_all()
    try:
        draft.mkdir(parents=True, exist_ok=True)
        yield draft
    # torch's and safetensors' writers have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        discard(draft)
        raise CheckpointError(
            f"expected to write {final}, got {error}; nothing that was there is lost: free space (or raise the quota) "
            "and resume from the checkpoint before"
        ) from error
    wait_for_all()
    if is_writer:
        discard(final)
        (draft / final.name).rename(final)
        discard(draft)
    wait_for_all()


def remove_drafts(directory: Path) -> None:
    """Remove what saves that were killed have left in a run's folder, or finish them where all was written.

    Only folders of exactly such a name. A folder is one run's, so that nobody else is saving to it.
    """
    for draft in directory.glob(".checkpoint-*.draft"):
        if re.fullmatch(r"\.checkpoint-\d+\.draft", draft.name) and draft.is_dir() and not draft.is_symlink():
            discard(draft)
    for folder in (directory, directory / MERGED):
        finish_save(folder)
