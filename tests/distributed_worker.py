"""What each process of a distributed test runs: a few training steps per scenario; losses into a file.

A scenario is a dict: ``name``, ``base`` (its family, if not Qwen3), ``sleep`` (fields of SleepConfig),
``accumulation``, ``resume`` (go on from step 3 in a new trainer), ``spoil`` and ``terminate`` (after so many steps the
last rank has a loss that is not a number, or gets a SIGTERM), ``dtype`` (of the base; what was trained is saved, and
the model), and any training argument. The tests call `run` themselves for what one process makes of the same rows.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from families import tiny_base
from safetensors.torch import save_file
from small import sleeping
from torch.utils.data import Dataset
from transformers import training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments

STEPS = 5
ROWS = 4
SAVED = 3


class Rows(Dataset):
    """Rows of 3 to 25 tokens with supervised stretches at different places; some windows have none, some rows too."""

    def __len__(self) -> int:
        return ROWS * STEPS

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(3, 26, (1,), generator=generator))
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length, (1,), generator=generator))
        stop = start if index % 5 == 3 else start + 1 + index % 4
        return {"input_ids": ids, "labels": [t if start <= i < stop else -100 for i, t in enumerate(ids)]}


class WorkerTrainer(SleepTrainer):
    """Accelerate shards on accelerators only, and would quietly take DDP on a CPU; all after that choice works."""

    spoil: int | None = None
    terminate: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.args.process_index == self.args.world_size - 1:
            if self.state.global_step == self.terminate:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.state.global_step == self.spoil:
                return loss * float("nan")
        return loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.args.bf16:
                state.fsdp_plugin.set_mixed_precision("bf16")
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True


def build(scenario: dict[str, Any], directory: Path, world: int) -> SleepTrainer:
    """A trainer for a scenario, with the same weights every time."""
    scenario = {key: value for key, value in scenario.items() if key not in ("name", "resume")}
    spoil, terminate = scenario.pop("spoil", None), scenario.pop("terminate", None)
    sleep = scenario.pop("sleep", {})
    accumulation = scenario.pop("accumulation", 1)
    dtype = getattr(torch, scenario.pop("dtype", "float32"))
    torch.manual_seed(0)
    family = scenario.pop("base", None)
    base = tiny_base("qwen3", dtype, num_hidden_layers=2) if family is None else tiny_base(family, dtype)
    model = sleeping(base, **({"n_loops": 2, "window_size": 6, "fast_weights": None} | sleep))
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "muon_learning_rate": 2e-3,
        "adamw_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    if "deepspeed" in scenario:
        arguments |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    trainer = WorkerTrainer(
        model,
        SleepTrainingArguments(**(arguments | scenario)),
        train_dataset=Rows(),
        data_collator=SleepCollator(0),
    )
    trainer.spoil, trainer.terminate = spoil, terminate
    return trainer


def losses(trainer: SleepTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def float32_values(trainer: SleepTrainer) -> dict[str, torch.Tensor]:
    """What was trained, as the model keeps it, or the optimiser where the model's is narrower, or DeepSpeed."""
    values = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        if parameter.requires_grad:
            if trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_fp32_param

                value = safe_get_full_fp32_param(parameter)
            else:
                value = trainer.optimizer.state[parameter].get("master", parameter)
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            values[name.removeprefix("module.")] = value.detach().clone()
    return values


def note_states(trainer: SleepTrainer) -> set[str]:
    """In what dtypes the inserted layers are handed their states from now on."""
    dtypes = set[str]()

    def note(_: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if given[1] is not None:
            dtypes.add(str(given[1].recurrent.dtype))

    for layer in trainer.accelerator.unwrap_model(trainer.model).fast_weights:
        layer.register_forward_pre_hook(note)
    return dtypes


def run(scenario: dict[str, Any], root: Path, world: int) -> dict[str, Any]:
    """Train; losses, and what wrapped the model."""
    directory = root / scenario["name"]
    if scenario.get("resume"):
        scenario = scenario | {"save_strategy": "steps", "save_steps": SAVED}
    start(scenario)
    trainer = build(scenario, directory, world)
    states = note_states(trainer)
    code = 0
    try:
        trainer.train()
    except SystemExit as end:
        code = int(end.code or 0)
    result = {
        "losses": losses(trainer),
        "wrapped": type(trainer.model_wrapped).__name__,
        "states": sorted(states),
        "nonfinite": trainer.nonfinite_steps,
        "code": code,
        "saved": sorted(os.listdir(directory)),
    }
    if "dtype" in scenario:
        values = float32_values(trainer)
        if trainer.args.process_index == 0:
            save_file(values, directory / "trained.safetensors")
        if not scenario.get("fsdp"):
            trainer.save_model(str(directory / "saved"))
    if scenario.get("resume"):
        start(scenario)
        resumed = build(scenario, directory, world)
        resumed.train(resume_from_checkpoint=str(directory / f"checkpoint-{SAVED}"))
        result["resumed"] = losses(resumed)
    return result


def start(scenario: dict[str, Any]) -> None:
    """Accelerate and transformers as they are in a new process."""
    # A model would be built partitioned as soon as one run had used ZeRO-3.
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if scenario.get("bf16"):
        # transformers asks for a GPU.
        training_args.is_torch_bf16_gpu_available = lambda: True
    if "deepspeed" in scenario:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        on_gloo()


def on_gloo() -> None:
    """What Accelerate does on a GPU; without one it would find no backend, and DeepSpeed would compile its own."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")


def run_all(directory: Path, scenarios: list[dict[str, Any]]) -> None:
    """One after the other, as one of the ranks; what came out goes to results.json."""
    # DeepSpeed compiles its Muon with torch.compile, which takes longer than these five steps.
    torch._dynamo.config.disable = True
    results = {}
    for scenario in scenarios:
        print("=====", scenario["name"], flush=True)
        results[scenario["name"]] = run(scenario, directory, int(os.environ["WORLD_SIZE"]))
    if dist.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
