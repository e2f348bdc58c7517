"""What each process of a distributed test runs: a few training steps per scenario, the losses and weights into a file.

python distributed_worker.py OUTPUT SCENARIOS     (torch's RANK, WORLD_SIZE ... in the environment)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from families import randomise, tiny_base
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sleepify import sleepify
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments

STEPS = 5
WINDOW = 6


class Rows(Dataset):
    """Rows of 3 to 25 tokens with supervised stretches at different places; some windows have none, some rows too."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(3, 26, (1,), generator=generator))
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length, (1,), generator=generator))
        stop = start if index % 5 == 3 else start + 1 + index % 4
        return {"input_ids": ids, "labels": [t if start <= i < stop else -100 for i, t in enumerate(ids)]}


class FsdpOnCpuTrainer(SleepTrainer):
    """Accelerate shards on accelerators only, and would quietly take DDP on a CPU; all after that choice works."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def run(scenario: dict[str, Any], directory: Path, world: int) -> dict[str, Any]:
    """Train; returns losses and the weights' norm."""
    scenario = dict(scenario)
    name = scenario.pop("name")
    sleep = scenario.pop("sleep", {})
    torch.manual_seed(0)
    base = tiny_base(scenario.pop("family", "qwen3"), torch.float32, num_hidden_layers=2)
    model = sleepify(base, **({"n_loops": 2, "window_size": WINDOW} | sleep))
    randomise(model.fast_weights)
    accumulation = scenario.pop("accumulation", 1)
    arguments = {
        "output_dir": str(directory / name),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "muon_learning_rate": 0.02,
        "adamw_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    if "deepspeed" in scenario:
        arguments |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    losses = Losses()
    trainer = FsdpOnCpuTrainer(
        model,
        SleepTrainingArguments(**(arguments | scenario)),
        train_dataset=Rows(),
        data_collator=SleepCollator(0),
        callbacks=[losses],
    )
    trainer.train()
    return {"losses": losses.values, "wrapped": type(trainer.model_wrapped).__name__}


def start_deepspeed_on_cpu() -> None:
    """What Accelerate does on a GPU; without one it would not find a backend, and DeepSpeed would compile its own."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def main() -> None:
    output, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    import torch.distributed as dist

    torch.set_num_threads(1)
    results = {}
    for scenario in scenarios:
        AcceleratorState._reset_state()
        if "deepspeed" in scenario:
            start_deepspeed_on_cpu()
        GradientState._reset_state()
        # Otherwise models would be built partitioned as soon as one run had used ZeRO-3.
        unset_hf_deepspeed_config()
        world = int(os.environ.get("WORLD_SIZE", 1))
        results[scenario["name"]] = run(scenario, output.parent, world)
        print(scenario["name"], results[scenario["name"]], flush=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
