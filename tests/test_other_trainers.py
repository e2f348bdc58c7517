"""Two processes and a trainer that is not ours: equal to one process, or refused, and never a hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import plain_worker
import pytest
import torch
from tolerances import DISTRIBUTED, assert_close

SCRIPT = Path(__file__).parent / "plain_worker.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes leaves: losses, and what it was told."""
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1]), *sys.path])}
    shared |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command, processes = [sys.executable, str(SCRIPT), str(directory)], []
    try:
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(directory / f"{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(command, env=os.environ | shared | own, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=1500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.flow("DDP with another trainer")
def test_transformers_trainer_gives_the_losses_of_one_process(two, tmp_path):
    alone = torch.tensor(plain_worker.run(tmp_path, world=1))
    assert len(set(alone.tolist())) == plain_worker.STEPS
    assert_close(torch.tensor(two[0][0]), alone, DISTRIBUTED)


@pytest.mark.flow("FSDP2, ZeRO-3 with another trainer")
def test_sharded_layers_are_refused_on_every_rank(two):
    for _, said in two:
        assert "FSDP gathers layers" in said and "SleepTrainer" in said
