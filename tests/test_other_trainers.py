"""Two processes and a trainer that is not ours: equal to one process, or refused, and never a hang."""

from __future__ import annotations

import json

import plain_worker
import pytest
import torch
from forked import on_two_ranks
from tolerances import DISTRIBUTED, assert_close


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes leaves: losses, and what it was told."""
    directory = tmp_path_factory.mktemp("two")
    on_two_ranks(lambda: plain_worker.run_both(directory), directory)
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
