"""Training on one process: who is trained by what, the same update however a batch is cut, resuming, bad steps."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import randomise, tiny_base, tokens, true_float64
from tolerances import BFLOAT16, EXACT, EXACT_GRAD, assert_close
from transformers import TrainerCallback

from sleepify import CheckpointError, FastWeightConfig, sleepify
from sleepify.tasks import Rule110
from sleepify.training import (
    MuonAdamW,
    NonFiniteStepsError,
    SleepCollator,
    SleepTrainer,
    SleepTrainingArguments,
    TaskDataset,
    rounds,
    split_parameters,
)
from sleepify.training.trainer import loops_of_step

TASK = Rule110(width=8, n_strings=2, steps=2)


def sleeping(family="qwen3", dtype=torch.float32, layers=2, **keywords):
    torch.manual_seed(3)
    base = tiny_base(family, dtype, **({"num_hidden_layers": layers} if layers else {}))
    model = sleepify(base, **({"n_loops": 2, "window_size": 8} | keywords))
    randomise(model.fast_weights)
    return model


def arguments(directory, **changes):
    settings = {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SleepTrainingArguments(**(settings | changes))


def build(directory, model=None, dataset=None, collator=None, trainer=SleepTrainer, callbacks=None, **changes):
    return trainer(
        sleeping() if model is None else model,
        arguments(directory, **changes),
        train_dataset=TaskDataset(TASK) if dataset is None else dataset,
        eval_dataset=TaskDataset(TASK, "test", n_examples=4),
        data_collator=SleepCollator(0) if collator is None else collator,
        callbacks=callbacks,
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# --- the split


def test_muon_gets_hidden_matrices_and_adamw_everything_else():
    muon, adamw = split_parameters(sleeping(fast_weights=FastWeightConfig(rule="jet", layers=[1])))
    inside = "language_model.model.layers.0."
    mixer = "fast_weights.0.mixer."
    names = {name for name, _ in muon}
    assert {f"{inside}self_attn.{p}_proj.weight" for p in "qkvo"} <= names
    assert {f"{inside}mlp.gate_proj.weight", f"{mixer}g_proj.weight", f"{mixer}o_proj.weight"} <= names
    rest = {name for name, _ in adamw}
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= rest
    assert {
        f"{mixer}a_proj.weight",
        f"{mixer}b_proj.weight",
        f"{mixer}A_log",
        f"{inside}input_layernorm.weight",
    } <= rest
    assert all(parameter.dim() == 2 for _, parameter in muon)
    assert len(muon) + len(adamw) == len(
        list(sleeping(fast_weights=FastWeightConfig(rule="jet", layers=[1])).parameters())
    )


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "jet_nemotron", "granitemoehybrid"])
def test_no_gate_router_or_expert_stack_of_a_hybrid_goes_to_muon(family):
    muon, _ = split_parameters(sleeping(family, layers=None))
    for name, parameter in muon:
        assert parameter.dim() == 2
        # A matrix of so few rows gives every head or expert a number, not a vector (but for a bottleneck so narrow).
        assert min(parameter.shape) > 4 or "kernel_generator" in name, name
        assert not {"conv1d", "embed_tokens", "lm_head"} & set(name.split("."))


def test_a_tied_head_is_an_embedding_and_frozen_parameters_are_nobodys():
    model = sleepify(tiny_base("qwen3", torch.float32, tie_word_embeddings=True), window_size=8)
    assert not any("embed_tokens" in name or "lm_head" in name for name, _ in split_parameters(model)[0])
    model.freeze_base()
    muon, adamw = split_parameters(model)
    assert muon and all(name.startswith("fast_weights") for name, _ in muon + adamw)


def test_nothing_for_muon_is_an_error_that_says_what_to_do():
    model = sleeping()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match="hidden matrices for Muon.*optimizer='adamw'"):
        split_parameters(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none that requires a gradient"):
        split_parameters(model)


def groups(matrix, vector):
    return [
        {"params": [matrix], "algorithm": "muon", "lr": 0.1, "weight_decay": 0.01},
        {"params": [vector], "algorithm": "adamw", "lr": 0.2, "weight_decay": 0.0},
    ]


def test_the_combined_optimiser_is_muon_and_adamw_also_after_a_round_trip():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(6)]

    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    combined = MuonAdamW(groups(*ours), momentum=0.9, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda step: 1 / (1 + step))
    apart = [
        torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=0.01, momentum=0.9),
        torch.optim.AdamW(theirs[1:], lr=0.2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(part, lambda step: 1 / (1 + step)) for part in apart]
    for step, gradient in enumerate(gradients):
        if step == 3:
            state = combined.state_dict()
            ours = [torch.nn.Parameter(p.detach().clone()) for p in ours]
            combined = MuonAdamW(groups(*ours), momentum=0.9, betas=(0.9, 0.95), eps=1e-8)
            schedule, old = torch.optim.lr_scheduler.LambdaLR(combined, lambda step: 1 / (1 + step)), schedule
            combined.load_state_dict(state)
            schedule.load_state_dict(old.state_dict())
        for parameter, value in zip(ours + theirs, gradient * 2, strict=True):
            parameter.grad = value.clone()
        for part in (combined, *apart, schedule, *schedules):
            part.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), step


# --- data


def test_collation_pads_and_clears_the_label_that_nothing_predicts():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    left = SleepCollator(1)(rows)
    assert left["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    wide = SleepCollator(1, padding_side="right", window_size=3, pad_to_windows=2)(rows)
    assert wide["input_ids"].tolist() == [[5, 6, 7, 1, 1, 1], [8, 1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="at least one token"):
        SleepCollator(1)([{"input_ids": []}])
    with pytest.raises(ValueError, match="one label per token"):
        SleepCollator(1)([{"input_ids": [1, 2], "labels": [1]}])


def test_rows_of_a_task_have_an_index_and_no_end():
    endless = TaskDataset(TASK)
    assert endless[12345] == TaskDataset(TASK, start=12340)[5]
    assert len(TaskDataset(TASK, "test", n_examples=7)) == 7
    with pytest.raises(IndexError, match="from 0 to 6"):
        TaskDataset(TASK, n_examples=7)[7]


class Ragged(torch.utils.data.Dataset):
    """Rows of 5 to 29 tokens, all of them supervised or only some."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tokens(1, 5 + (index * 7) % 25, seed=index)[0].tolist()
        return {"input_ids": ids, "labels": [t if index % 2 or i % 5 == 4 else -100 for i, t in enumerate(ids)]}


class Gradients(TrainerCallback):
    """The gradients of the first update."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        control.should_training_stop = True


def first_gradients(directory, collator, **changes):
    found = Gradients()
    with true_float64():
        model = sleeping(dtype=torch.float64)
        build(
            directory, model, Ragged(), collator, callbacks=[found], max_grad_norm=0.0, logging_steps=9, **changes
        ).train()
    return found.found


def test_accumulation_batch_split_and_padding_side_do_not_change_the_update(tmp_path):
    plain = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    expected = first_gradients(tmp_path, SleepCollator(0), **plain)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    for collator, split in (
        (SleepCollator(9, padding_side="right"), {}),
        (SleepCollator(0), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (SleepCollator(0, "right", 8, 5), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    ):
        actual = first_gradients(tmp_path, collator, **(plain | split))
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(actual[name], gradient, EXACT_GRAD, f"{name}, {split}")


# --- settings of a step


def test_n_is_drawn_per_step_and_is_a_function_of_seed_and_step(tmp_path):
    schedule = [1, 2, 3]
    drawn = [loops_of_step(schedule, 7, step) for step in range(40)]
    assert set(drawn) == set(schedule) and drawn != [loops_of_step(schedule, 8, step) for step in range(40)]
    used = []
    model = sleeping()
    model.register_forward_pre_hook(lambda _, __, kwargs: used.append(kwargs.get("n_loops")), with_kwargs=True)
    trainer = build(tmp_path, model, loops_schedule=schedule, seed=7, gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert used == [n for n in drawn[:4] for _ in range(2)]
    assert [line["n_loops"] for line in trainer.state.log_history if "loss" in line] == drawn[:4]


def test_training_in_bfloat16_keeps_float32_weights_and_is_close(tmp_path):
    full, half = (build(tmp_path, bf16=bf16, optimizer="adamw") for bf16 in (False, True))
    for trainer in (full, half):
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(full) != losses(half)
    assert_close(torch.tensor(losses(half)), torch.tensor(losses(full)), BFLOAT16)


@pytest.mark.parametrize("keywords", [{"checkpoint": "loop"}, {"checkpoint": "window"}])
def test_recomputing_activations_gives_the_same_run(tmp_path, keywords):
    plain, recomputed = build(tmp_path), build(tmp_path, sleeping(**keywords))
    plain.train()
    recomputed.train()
    assert_close(torch.tensor(losses(recomputed)), torch.tensor(losses(plain)), EXACT)


def test_truncated_backpropagation_trains_and_is_another_gradient(tmp_path):
    dataset = Ragged()
    runs = [
        build(tmp_path, sleeping(**keywords), dataset, train_sampling_strategy="sequential")
        for keywords in ({}, {"backprop_windows": 1}, {"backprop_loops": 1})
    ]
    for run in runs:
        run.train()
    first, *others = [losses(run) for run in runs]
    assert all(other[0] == first[0] and other[1:] != first[1:] for other in others)


def test_only_the_inserted_layers_are_trained_when_asked(tmp_path):
    trainer = build(tmp_path, train_only="fast_weights", muon_learning_rate=0.1, adamw_learning_rate=0.1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("language_model"), name
    assert all(p.requires_grad for p in build(tmp_path, trainer.model, train_only="all").model.parameters())


def test_what_is_logged(tmp_path):
    trainer = build(tmp_path)
    assert trainer.args.report_to == []
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "n_loops",
        "train_tokens_per_second",
        "nonfinite_steps",
    } <= line.keys()
    assert line["state_norm/inserted_after_1"] > 0
    assert line["num_input_tokens_seen"] == 4 * TASK.length


def test_arguments_are_checked(tmp_path):
    for wrong, message in (
        ({"optimizer": "sgd"}, "optimizer.*muon, adamw.*'sgd'"),
        ({"train_only": "head"}, "train_only"),
        ({"loops_schedule": [1, 0]}, "loops_schedule"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate"),
        ({"muon_momentum": 1.0}, "muon_momentum"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"enable_jit_checkpoint": True}, "SIGTERM"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **wrong)
    with pytest.raises(ValueError, match="data_collator"):
        SleepTrainer(sleeping(), arguments(tmp_path), train_dataset=TaskDataset(TASK))


# --- steps that are not finite


class Spoiled(SleepTrainer):
    """Its loss (or only its gradient) is not finite in some steps."""

    bad_losses: tuple[int, ...] = ()
    bad_gradients: tuple[int, ...] = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step in self.bad_gradients:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss * float("nan") if self.state.global_step in self.bad_losses else loss


class Weights(TrainerCallback):
    """Weights and optimiser state after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, optimizer, **_):
        moments = [t.clone() for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
        self.seen.append([p.detach().clone() for p in model.parameters()] + moments)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    weights = Weights()
    trainer = build(tmp_path, trainer=Spoiled, callbacks=[weights], max_steps=5, lr_scheduler_type="constant")
    trainer.bad_losses, trainer.bad_gradients = (1,), (3,)
    trainer.train()
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(weights.seen)]
    assert same == [True, False, True, False]
    assert trainer.nonfinite_steps == 2
    assert [line["nonfinite_steps"] for line in trainer.state.log_history if "loss" in line] == [0, 1, 1, 2, 2]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_steps_that_stay_bad_stop_the_run_and_leave_good_weights(tmp_path):
    trainer = build(tmp_path, trainer=Spoiled, max_steps=9, max_nonfinite_steps=2)
    trainer.bad_losses = (1, 3, 4, 5)
    with pytest.raises(NonFiniteStepsError, match="2 steps in a row.*up to step 5, 3 in all"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# --- dying and resuming


def deaths(directory, *options):
    script = Path(__file__).parent / "training_runs.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)}
    command = [sys.executable, str(script), str(directory), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
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
    before = contents(tmp_path)
    steps = {"save_strategy": "steps", "save_steps": 1}
    for other, message in (
        ({"model": sleeping(window_size=4)}, "window_size: 8 there, 4 here"),
        ({"seed": 1}, "seed: 42 there, 1 here"),
        ({"model": sleeping(layers=3)}, "parameters"),
        ({"optimizer": "adamw"}, "optimizer: 'muon' there, 'adamw' here"),
        ({"loops_schedule": [1, 2]}, r"n_loops: 2 there, \[1, 2\] here"),
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


# --- the same calls on all ranks


def calls(model, batch):
    """Which layers are called, with gradient or without, in which order, forwards and backwards; and the gradients."""
    order, handles = [], []
    layers = [*model.language_model.model.layers, *model.fast_weights]
    for place, layer in enumerate(layers):
        note = lambda *_, i=place: order.append((i, torch.is_grad_enabled()))  # noqa: E731
        handles.append(layer.register_forward_pre_hook(note))
        handles.append(layer.register_full_backward_hook(lambda *_, i=place: order.append(i)))
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return order, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ragged(*rows):
    """A left-padded batch: (tokens, supervised places)."""
    collator, made = SleepCollator(0), []
    for seed, (length, places) in enumerate(rows):
        ids = tokens(1, length, seed=seed)[0].tolist()
        made.append({"input_ids": ids, "labels": [t if i in places else -100 for i, t in enumerate(ids)]})
    return collator(made)


@pytest.mark.parametrize("keywords", [{}, {"backprop_windows": 1}, {"backprop_windows": 2, "backprop_loops": 1}])
def test_ranks_with_different_rows_call_the_same_layers_and_keep_their_gradients(monkeypatch, keywords):
    batches = [
        ragged((30, [4, 29]), (3, [2])),
        ragged((9, [8]), (18, [17])),
        ragged((5, []), (2, [])),
        ragged((44, [20]), (26, [25])),
    ]
    truncated = "backprop_windows" in keywords
    own = [rounds.Rounds.of(batch["labels"], batch["attention_mask"], 8) for batch in batches]
    n_windows = max(int(one.sleeps.max()) for one in own) + 1
    signatures = [one.signature(n_windows, truncated) for one in own]
    together = torch.stack([torch.cat([mine, ~mine]).to(torch.int32) for mine in signatures]).amax(0)

    def all_reduce(tensor, op):
        tensor.copy_(torch.tensor(n_windows) if tensor.dim() == 0 else together)

    monkeypatch.setattr(rounds.dist, "all_reduce", all_reduce)
    with true_float64():
        model = sleeping(dtype=torch.float64, **keywords)
        before = [calls(model, batch) for batch in batches]
        after = [calls(model, rounds.equalise(batch, 8, truncated)) for batch in batches]
    assert len({str(order) for order, _ in before}) > 1
    assert len({str(order) for order, _ in after}) == 1
    for (_, expected), (_, actual) in zip(before, after, strict=True):
        for name, gradient in actual.items():
            assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), EXACT_GRAD, name)
