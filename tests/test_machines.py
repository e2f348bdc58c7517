"""Two machines, played by two launchers over loopback: the launch files of two nodes as they are, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from distributed_worker import ROWS, SAVED, STEPS, build, losses, start
from test_distributed import ADAMW, MODES, WRAPPERS
from test_evaluate import Ragged
from tolerances import DISTRIBUTED, assert_close

from sleepify.training.evaluate import evaluate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FILES = {"fsdp2": "fsdp2_two_nodes", "zero3": "zero3_two_nodes"}
SCENARIO = ADAMW | {"save_strategy": "steps", "save_steps": SAVED}
# What DeepSpeed is to do stands in the launch file alone; FSDP on a CPU is the worker's doing.
CHOSEN = {"fsdp2": MODES["fsdp2"], "zero3": {}}
LIMIT = 900  # seconds that a launch may take on a busy machine


class Machines:
    """Two launchers."""

    def __init__(self, mode: str, directory: Path) -> None:
        self.logs = [directory / f"machine-{rank}.log" for rank in range(2)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        environment |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        file = ROOT / "recipes" / "accelerate" / f"{FILES[mode]}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        command += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        worker = [str(ROOT / "tests" / "machines_worker.py"), str(directory), json.dumps(SCENARIO | CHOSEN[mode])]
        self.launchers = []
        for rank, log in enumerate(self.logs):
            with open(log, "a") as output:
                launcher = subprocess.Popen(
                    [*command, "--machine_rank", str(rank), *worker],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.launchers.append(launcher)

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def kill(self, rank: int) -> None:
        """The launcher and what it started, which has a session of its own, at once, as when a machine fails."""
        launcher = self.launchers[rank]
        if launcher.poll() is None:
            started = psutil.Process(launcher.pid).children(recursive=True)
            for process in (launcher, *started):
                process.kill()
        launcher.wait()

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in range(2):
            self.kill(rank)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and evaluation of one process."""
    directory = tmp_path_factory.mktemp("alone")
    start(SCENARIO)
    trainer = build(SCENARIO, directory, 1)
    trainer.train()
    report = evaluate(trainer.model, Ragged(), n_examples=11, n_loops=[1, 2], batch_size=2)
    return torch.tensor(losses(trainer)), json.loads(report.to_json())


@pytest.mark.parametrize("mode", FILES)
def test_two_machines_give_what_one_process_gives_also_when_one_of_them_fails(alone, mode, tmp_path):
    if mode == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    (tmp_path / "wait").touch()
    with Machines(mode, tmp_path) as machines:
        deadline = time.monotonic() + LIMIT
        while len(list(tmp_path.glob("waiting-*"))) < 2:
            assert time.monotonic() < deadline, machines.said()
            assert all(launcher.poll() is None for launcher in machines.launchers), machines.said()
            time.sleep(0.5)
        machines.kill(1)
        (tmp_path / "wait").unlink()
        # The one that is left does not wait for ever.
        assert machines.launchers[0].wait(timeout=LIMIT) != 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]

    with Machines(mode, tmp_path) as machines:
        codes = [launcher.wait(timeout=LIMIT) for launcher in machines.launchers]
        assert codes == [0, 0], machines.said()
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    expected, report = alone
    for result in results:
        assert (result["world"], result["from"], result["wrapped"]) == (2, f"checkpoint-{SAVED}", WRAPPERS[mode])
        # Two ranks shared the rows out, and both have the whole report.
        assert json.loads(result["report"]) == report
    assert len(expected) == STEPS and ROWS % 2 == 0
    assert_close(torch.tensor(results[0]["losses"]), expected, DISTRIBUTED, mode)


@pytest.mark.parametrize("mode", FILES)
def test_the_launch_files_of_two_nodes_are_those_of_one_but_for_the_machines(mode):
    one, two = (
        yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text()) for name in (mode, FILES[mode])
    )
    names = {"num_machines", "num_processes", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"}
    two.get("deepspeed_config", {}).pop("deepspeed_multinode_launcher", None)
    assert {name for name in one | two if one.get(name) != two.get(name)} == names
    assert (two["num_machines"], two["num_processes"]) == (2, 2 * one["num_processes"])
