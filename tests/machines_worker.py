"""What a process on each of two "machines" runs: training that goes on from its last checkpoint, and an evaluation.

    accelerate launch --config_file FILE ... machines_worker.py DIRECTORY SCENARIO

A scenario is one of `distributed_worker`. If there is a file "wait" in the directory, training stands still before its
fourth step, so that one of the launchers can be killed there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import SAVED, build, losses, on_gloo, start
from test_evaluate import Ragged
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from sleepify.training.evaluate import evaluate


class Wait(TrainerCallback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        while state.global_step == SAVED and (self.directory / "wait").exists():
            (self.directory / f"waiting-{args.process_index}").touch()
            time.sleep(0.2)


def main() -> None:
    directory, scenario = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    launched = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    start(scenario)
    if launched.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ.update(launched)
        on_gloo()
        scenario |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    trainer = build(scenario, directory / "run", int(os.environ["WORLD_SIZE"]))
    trainer.add_callback(Wait(directory))
    run = directory / "run"
    last = get_last_checkpoint(str(run)) if run.exists() else None
    trainer.train(resume_from_checkpoint=last)
    report = evaluate(trainer.model_wrapped, Ragged(), n_examples=11, n_loops=[1, 2], batch_size=2)
    result = {
        "losses": losses(trainer),
        "wrapped": type(trainer.model_wrapped).__name__,
        "from": last and Path(last).name,
        "report": report.to_json(),
        "world": dist.get_world_size(),
    }
    (directory / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
