"""Training on one process: who is trained by what, the same update however a batch is cut, resuming, bad steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch
from families import randomise, tiny_base, tokens, true_float64
from small import trainable as sleeping
from tolerances import BFLOAT16, DISTRIBUTED, EXACT_GRAD, assert_close
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
    split_parameters,
)
from sleepify.training.optim import parameter_groups
from sleepify.training.trainer import loops_of_step

TASK = Rule110(width=8, n_strings=2, steps=2)


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


def test_biases_and_decays_are_neither_muons_nor_decayed_whatever_their_dimensions(tmp_path):
    model = torch.nn.Module()
    model.proj = torch.nn.Linear(4, 4)
    model.experts_bias, model.A_log = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    muon, adamw = split_parameters(model)
    assert [name for name, _ in muon] == ["proj.weight"]
    for optimizer in ("muon", "adamw"):
        groups = parameter_groups(model, arguments(tmp_path, optimizer=optimizer, weight_decay=0.1))
        free = [id(p) for group in groups if not group["weight_decay"] for p in group["params"]]
        assert sorted(free) == sorted(id(p) for _, p in adamw)


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_comes_with_a_row_is_not_read(side):
    plain = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    padded = [
        {"input_ids": [0, 0, 5, 6, 7, 0], "labels": [-100, -100, 5, 6, 7, -100], "attention_mask": [0, 0, 1, 1, 1, 0]},
        {"input_ids": [8, 0, 9], "labels": [8, -100, 9], "attention_mask": torch.tensor([1, 0, 1])},
    ]
    wanted, found = (SleepCollator(1, side)(rows) for rows in (plain, padded))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name in ("input_ids", "labels"):
        with pytest.raises(ValueError, match=rf"attention_mask of one value per {name} \(2\), got 1"):
            SleepCollator(1)([{"input_ids": [1], "labels": [1], "attention_mask": [1]} | {name: [1, 2]}])
    with pytest.raises(ValueError, match="at least one token"):
        SleepCollator(1)([{"input_ids": [1], "attention_mask": [0]}])


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
    plain, recomputed = (build(tmp_path, sleeping(**k), optimizer="adamw") for k in ({}, keywords))
    plain.train()
    recomputed.train()
    assert_close(torch.tensor(losses(recomputed)), torch.tensor(losses(plain)), DISTRIBUTED)


def test_compiled_training_is_the_same_run(tmp_path):
    expected = build(tmp_path)
    expected.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = build(tmp_path, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    torch._dynamo.reset()
    # Of layers: the whole model at once would break into more pieces than that.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(compiled.model.state_dict()) == list(expected.model.state_dict())
    assert losses(compiled) == pytest.approx(losses(expected), abs=DISTRIBUTED.atol)


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
    with pytest.raises(ValueError, match="no model_init: make a model and a trainer for every trial"):
        SleepTrainer(None, arguments(tmp_path), model_init=sleeping, train_dataset=TaskDataset(TASK))


def test_each_process_reads_a_stream_itself(tmp_path):
    """Accelerate would join the batches of all processes, which differ in width."""
    assert arguments(tmp_path).accelerator_config.dispatch_batches is False
    chosen = arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    assert chosen.accelerator_config.dispatch_batches


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


# --- what trains, and how fast


def rates(trainer):
    return [group["lr"] for group in trainer.create_optimizer().param_groups]


def test_a_learning_rate_that_is_given_is_used_or_refused(tmp_path):
    adamw = {"optimizer": "adamw"}
    assert set(rates(build(tmp_path, **adamw))) == {5e-5}
    assert set(rates(build(tmp_path, learning_rate=1e-4, **adamw))) == {1e-4}
    assert set(rates(build(tmp_path, adamw_learning_rate=1e-4, **adamw))) == {1e-4}
    assert set(rates(build(tmp_path))) == {1e-3, 5e-5}
    # A copy with one field changed means what the original meant.
    copy = replace(arguments(tmp_path, learning_rate=1e-4, **adamw), max_steps=9)
    assert (copy.adamw_learning_rate, copy.optim) == (1e-4, None)
    for wrong, message in (
        ({"learning_rate": 1e-4}, "muon_learning_rate and adamw_learning_rate.*learning_rate=0.0001"),
        ({"learning_rate": 5e-5}, "muon_learning_rate and adamw_learning_rate"),
        ({"learning_rate": 1e-4, "adamw_learning_rate": 1e-3, **adamw}, "0.0001 and 0.001; leave one out"),
        ({"learning_rate": -1e-4, **adamw}, "learning_rate to be 0 or more, got -0.0001"),
        ({"optim": "adamw_torch", **adamw}, "optim to be left out, got 'adamw_torch'.*optimizer="),
        ({"optim_args": "beta=1"}, "optim_args to be left out"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules to be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **wrong)
    changed = arguments(tmp_path).set_optimizer("sgd", learning_rate=0.1)
    with pytest.raises(ValueError, match="optim to be left out"):
        SleepTrainer(sleeping(), changed, train_dataset=TaskDataset(TASK), data_collator=SleepCollator(0))


@pytest.mark.parametrize(
    ("kind", "given"),
    [("polynomial", {"lr_end": 1e-4}), ("cosine_with_min_lr", {"min_lr": 1e-4})],
)
def test_a_schedule_that_ends_at_a_rate_ends_there(tmp_path, kind, given):
    trainer = build(tmp_path, optimizer="adamw", learning_rate=1e-3, lr_scheduler_type=kind, lr_scheduler_kwargs=given)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_another_learning_rate_is_another_run(tmp_path):
    options = {"optimizer": "adamw", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    build(tmp_path, learning_rate=1e-4, **options).train()
    with pytest.raises(CheckpointError, match="adamw_learning_rate: 0.0001 there, 0.0002 here"):
        build(tmp_path, learning_rate=2e-4, **options).train(resume_from_checkpoint=True)


def count(named):
    return sum(p.numel() for _, p in named)


def test_the_log_says_what_trains_and_what_does_not(tmp_path, capsys):
    model = sleeping()
    inserted, base = count(model.fast_weights.named_parameters()), count(model.language_model.named_parameters())
    trainer = build(tmp_path, model, train_only="fast_weights")
    muon, adamw = (count(part) for part in split_parameters(model))
    assert muon + adamw == inserted
    trainer.create_optimizer()
    shown = capsys.readouterr().out
    for line in (
        f"base: 0 of {base:,} parameters train",
        f"inserted: {inserted:,} of {inserted:,} parameters train",
        f"Muon: {muon:,} parameters in ",
        f"AdamW: {adamw:,} parameters in ",
        f"frozen: {base:,} parameters in ",
    ):
        assert line in shown
    build(tmp_path, model, train_only="all").create_optimizer()
    shown = capsys.readouterr().out
    assert f"base: {base:,} of {base:,} parameters train" in shown and "frozen: 0 parameters in 0 tensors" in shown


def test_inserted_layers_that_can_never_do_anything_are_warned_of(tmp_path, caplog):
    def warnings(model):
        caplog.clear()
        build(tmp_path, model)
        return [record.message for record in caplog.records if "output projection is zero" in record.message]

    def fresh():
        return sleepify(tiny_base("qwen3", torch.float32), window_size=8, fast_weights=FastWeightConfig(layers=[0, 1]))

    assert not warnings(fresh())
    frozen = fresh()
    frozen.fast_weights.requires_grad_(False)
    (warning,) = warnings(frozen)
    assert "(fast_weights.0, fast_weights.1)" in warning
    # peft freezes all that it is not told of.
    lora = {"r": 2, "target_modules": ["q_proj"]}
    (warning,) = warnings(peft.get_peft_model(fresh(), peft.LoraConfig(**lora, modules_to_save=["fast_weights.1"])))
    assert "(base_model.model.fast_weights.0)" in warning
    saved = ["fast_weights.0", "fast_weights.1"]
    whole = peft.get_peft_model(fresh(), peft.LoraConfig(**lora, modules_to_save=saved))
    assert not warnings(whole)
    adapted = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    assert not warnings(adapted)
    randomise(frozen.fast_weights)
    assert not warnings(frozen)


def test_adapters_are_counted_apart_and_what_peft_keeps_of_the_original_is_not(tmp_path, capsys):
    model = sleeping()
    inserted, base = count(model.fast_weights.named_parameters()), count(model.language_model.named_parameters())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fast_weights.0"])
    wrapped = peft.get_peft_model(model, config)
    adapters = count((name, p) for name, p in wrapped.named_parameters() if "lora_" in name)
    build(tmp_path, wrapped).create_optimizer()
    shown = capsys.readouterr().out
    assert f"base: 0 of {base:,} parameters train" in shown
    assert f"inserted: {inserted:,} of {inserted:,} parameters train" in shown
    assert f"adapters: {adapters:,} of {adapters:,} parameters train" in shown
