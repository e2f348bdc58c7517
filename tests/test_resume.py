"""Runs that die and go on: kills, SIGTERM, a full disk, checkpoints of another run."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from families import tiny_base
from forked import Program, in_a_fork
from safetensors.torch import load_file
from test_training import build, losses, sleeping
from training_runs import die_within_the_final_save
from transformers import TrainerCallback, TrainingArguments

from sleepify import CheckpointError
from sleepify.tasks import Rule110
from sleepify.training import SleepTrainingArguments, TaskDataset


def deaths(directory, *options):
    script = Path(__file__).parent / "training_runs.py"
    program = Program.script(script, [str(directory), *options], directory / "log", directory)
    assert program.wait() == 0, program.said()
    results = json.loads((directory / "results.json").read_text())
    whole = results.pop("whole")
    assert len(whole["logs"]) == 2
    for name, resumed in results.items():
        assert resumed["logs"] == whole["logs"], name
        assert resumed["weights"] == whole["weights"], name
    return results


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
    results = deaths(tmp_path)
    killed = results["killed in step 4"]
    assert (killed["code"], killed["saved"]) == (-9, ["checkpoint-2"])
    # SIGTERM: the step at hand is finished and saved.
    assert results["terminated in step 3"]["code"] == 143
    assert results["terminated in step 3"]["saved"] == ["checkpoint-2", "checkpoint-3"]
    # What a kill left half-written is not taken for a checkpoint, and goes.
    within = results["killed within a save"]
    assert (within["code"], within["saved"]) == (-9, [".checkpoint-4.draft", "checkpoint-2"])
    assert within["left"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_step_goes_on_bit_for_bit(tmp_path):
    assert len(deaths(tmp_path, "all")) == 9


def saved(tmp_path, **changes):
    trainer = build(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, **changes)
    trainer.train()
    return tmp_path / "checkpoint-2"


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_checkpoint_of_another_run_is_refused_and_untouched(tmp_path):
    checkpoint = saved(tmp_path)
    (tmp_path / ".checkpoint-3.draft").mkdir()
    (tmp_path / ".checkpoint-3.draft" / "config.json").write_text("{}")
    before = contents(tmp_path)
    steps = {"save_strategy": "steps", "save_steps": 1}
    for other, message in (
        ({"model": sleeping(window_size=4)}, "window_size: 8 there, 4 here"),
        ({"seed": 1}, "seed: 42 there, 1 here"),
        ({"model": sleeping(layers=3)}, "parameters"),
        ({"optimizer": "adamw"}, "optimizer: 'muon' there, 'adamw' here"),
        ({"loops_schedule": [1, 2]}, r"n_loops: 2 there, \[1, 2\] here"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'linear' there, 'cosine' here"),
        ({"warmup_steps": 1}, "warmup_steps: 0(.0)? there, 1 here"),
        ({"data_seed": 3}, "data_seed: None there, 3 here"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: 'random' there, 'sequential' here"),
        ({"dataset": TaskDataset(Rule110(width=8, n_strings=2, steps=3))}, "task"),
    ):
        for resume in (str(checkpoint), True, None):
            with pytest.raises(CheckpointError, match=f"another.*{message}.*from_pretrained"):
                build(tmp_path, **(steps | other)).train(resume_from_checkpoint=resume)
    assert contents(tmp_path) == before


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="found no sleep_run.json"):
        build(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "model"))
    checkpoint = saved(tmp_path / "run")
    (checkpoint / "sleep_run.json").write_text("{")
    with pytest.raises(CheckpointError, match="readable sleep_run.json.*older"):
        build(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))


class FullDisk(TrainerCallback):
    """From a step on no file may grow beyond some bytes, so that writing fails as on a full disk."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_checkpoint_without_the_experts_is_refused(tmp_path, shards):
    """transformers saves every expert by itself, and a trainer that looks for all in one goes on from the base's."""
    vocab = {"vocab_size": 16, "dtype": torch.float32}

    def base(family, **changes):
        return tiny_base(family, **vocab, **changes)

    checkpoint = saved(tmp_path / "moe", model=base("qwen3_moe"), save_total_limit=2)
    base("qwen3_moe").save_pretrained(checkpoint, max_shard_size=shards)
    with pytest.raises(
        CheckpointError, match=r"found none for \d+ of them \(model.layers.0.mlp.experts.*from_pretrained"
    ):
        build(tmp_path / "moe", model=base("qwen3_moe"), max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    # Tied weights are saved once, and are all there.
    tied = {"model": base("qwen3", tie_word_embeddings=True), "max_steps": 3}
    checkpoint = saved(tmp_path / "tied", model=base("qwen3", tie_word_embeddings=True))
    build(tmp_path / "tied", **tied).train(resume_from_checkpoint=str(checkpoint))


# The size at which the weights, or only the optimiser's larger file, no longer fit.
@pytest.mark.parametrize("size", [50_000, 150_000])
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path, size):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 1}
    trainer = build(tmp_path, callbacks=[FullDisk(3, size)], **options)
    try:
        with pytest.raises(CheckpointError, match="nothing that was there is lost: free space"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    resumed = build(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[:4] == losses(trainer)
    assert os.listdir(tmp_path) == ["checkpoint-6"]


def test_the_best_checkpoint_is_kept_and_named_by_its_place(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    options |= {"muon_learning_rate": 0.0, "adamw_learning_rate": 0.0}
    trainer = build(tmp_path, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-3"]


def test_optimisers_are_loaded_to_the_cpu_without_a_number(tmp_path, monkeypatch):
    """Of several processes on a CPU, Accelerate gives each its own, and transformers 5.17 loads to args.device."""
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: torch.device("cpu", 1)))
    where = SleepTrainingArguments(str(tmp_path), use_cpu=True).device
    torch.save(torch.ones(2), tmp_path / "optimizer.pt")
    assert torch.equal(torch.load(tmp_path / "optimizer.pt", map_location=where), torch.ones(2))
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: torch.device("cuda", 1)))
    assert SleepTrainingArguments(str(tmp_path), use_cpu=True).device == torch.device("cuda", 1)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("n_examples", "length"),
    [(None, {"max_steps": 4}), (None, {"max_steps": 3}), (16, {"max_steps": -1, "num_train_epochs": 1})],
)
def test_resuming_a_finished_run_trains_no_further(tmp_path, n_examples, length):
    dataset = TaskDataset(Rule110(width=8, n_strings=2, steps=2), n_examples=n_examples)
    steps = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    build(tmp_path, dataset=dataset, max_steps=4, **steps).train()
    before = contents(tmp_path)
    expected = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for resume in (True, str(tmp_path / "checkpoint-4")):
        again = build(tmp_path, dataset=dataset, **(steps | length))
        assert any(not torch.equal(weight, expected[name]) for name, weight in weights(again.model).items())
        again.train(resume_from_checkpoint=resume)
        assert again.state.global_step == 4
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(again.model).items())
    assert contents(tmp_path) == before


def test_drafts_of_dead_saves_go_at_the_next_start_and_nothing_else_does(tmp_path):
    directory = tmp_path / "run"
    code = in_a_fork(lambda: die_within_the_final_save(directory))
    assert code == -9
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (directory / ".draft").is_dir() and not (directory / "config.json").exists()
    (directory / ".checkpoint-7.draft" / "checkpoint-7").mkdir(parents=True)
    (directory / ".checkpoint-7.draft" / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
    # Of other programs, and a user's own.
    kept = [".draft/config.json", "run/.checkpoint-best.draft/mine", "run/.cache/mine", "run/mine/.draft/mine"]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    build(directory, max_steps=1).train()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)
