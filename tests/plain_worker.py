"""What each process runs of a training by transformers' own Trainer; losses into a file.

Under DDP it trains. With layers sharded by FSDP2, where ranks would wait for each other, a call must be refused on
every rank, so that both processes come to their end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist
from families import tokens
from small import trainable
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from sleepify import SleepifyError
from sleepify.training import SleepCollator

STEPS = 3
ROWS = 4


def rows() -> list[dict[str, list[int]]]:
    """Of one to four windows."""
    lengths = [5 + 7 * (index % 4) for index in range(STEPS * ROWS)]
    return [{"input_ids": (row := tokens(1, n, seed=i)[0].tolist()), "labels": row} for i, n in enumerate(lengths)]


def run(directory: Path, world: int) -> list[float]:
    """The losses of a few steps of plain gradient descent."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(trainable(), arguments, train_dataset=rows(), data_collator=SleepCollator(0))
    trainer.train()
    if world > 1:
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def refused() -> str:
    """What a model says whose layers are sharded, called without the ranks having agreed."""
    model = trainable().train()
    for layer in [*model.language_model.model.layers, *model.fast_weights]:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    ids = tokens(1, 6 + 20 * dist.get_rank())
    try:
        model(ids, labels=ids)
    except SleepifyError as error:
        return str(error)
    return "nothing"


def run_both(directory: Path) -> None:
    """As one of the ranks."""
    found = run(directory, int(os.environ["WORLD_SIZE"]))
    said = refused()
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps([found, said]))
    dist.destroy_process_group()
