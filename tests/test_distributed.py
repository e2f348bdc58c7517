"""Two processes give what one gives: DDP, FSDP2, ZeRO-2 and ZeRO-3, over gloo on the CPU.

Rows have different lengths and are supervised at different places (`distributed_worker.Rows`), so that the ranks of a
step have different windows to sleep on.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from distributed_worker import run, run_all
from families import tiny_base, tokens, true_float64
from forked import on_two_ranks
from small import sleeping, trainable
from tolerances import DISTRIBUTED, DISTRIBUTED_MUON, EXACT_GRAD, assert_close

from sleepify import FastWeightConfig
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, rounds
from sleepify.training.objective_arguments import ObjectiveArguments
from sleepify.training.objectives import Objectives
from sleepify.training.optim import build_deepspeed_optimizer
from sleepify.training.sharding import give_memory_out

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer", "FastWeightLayer"]}}
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# By itself AdamW makes a whole step of a gradient that is nothing but rounding (1e-8 here), but of none far below its
# epsilon.
ADAMW = {"optimizer": "adamw", "adam_epsilon": 1e-5}
MUON = {"optimizer": "muon", "max_grad_norm": 0.0}
FROZEN = {"train_only": "fast_weights"}
MIXED = ADAMW | {
    "accumulation": 2,
    "loops_schedule": [1, 2, 3],
    "sleep": {"checkpoint": "window", "backprop_windows": 1},
}
# Layers before, in and behind those that are looped, so that what a pass leaves has layers of its own to run.
LOSSES = FROZEN | {
    **{"distill": 0.5, "distill_at": "later", "reconstruct": 0.3, "pass_loss": "all", "pass_loss_weight": 0.5},
    "sleep": {"fast_weights": {"layers": [0, 1]}, "loop_range": [0, 1], "n_loops": 3},
    # Losses twice as large, by which AdamW enlarges rounding.
    "adamw_learning_rate": 3e-3,
}
# What is trained, by name; one process is the reference for each.
RUNS = {
    "adamw": ADAMW,
    "muon": MUON,
    "adamw_frozen": ADAMW | FROZEN,
    "muon_frozen": MUON | FROZEN,
    "mixed": MIXED,
    "losses": ADAMW | LOSSES,
    # Layers of the base have the state, and the last of a sleep leaves nothing else that is used.
    "hybrid": ADAMW | {"base": "jet_nemotron"},
    # Each rank's tokens go to experts of their own.
    "experts": ADAMW | {"base": "qwen3_moe"},
}
LAYER = {"jet_nemotron": "JetNemotronDecoderLayer", "qwen3_moe": "Qwen3MoeDecoderLayer"}
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPSleepForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def zero(stage):
    # So small tensors ZeRO-3 would not partition.
    options = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return {"deepspeed": {"zero_optimization": options} | dict.fromkeys(AUTO, "auto")}


MODES = {"ddp": {}, "fsdp2": FSDP, "zero2": zero(2), "zero3": zero(3)}


def on_two_processes(directory, scenarios):
    """What two processes make of the scenarios, one after the other."""
    on_two_ranks(lambda: run_all(directory, scenarios), directory)
    return json.loads((directory / "results.json").read_text())


def scenario(mode, name, **more):
    made = {"name": f"{mode}-{name}", **RUNS[name], **MODES[mode], **more}
    if mode == "fsdp2" and "base" in made:
        made["fsdp_config"] = {"transformer_layer_cls_to_wrap": [LAYER[made["base"]]]}
    return made


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process, by run."""
    directory = tmp_path_factory.mktemp("one")
    results = {name: run({"name": name, **options}, directory, world=1) for name, options in RUNS.items()}
    return {name: torch.tensor(result["losses"]) for name, result in results.items()}


PLAN = {
    # With recomputation and rows without a label DDP waits for ever for a gradient that one rank lacks.
    "ddp": {"adamw": {"resume": True}, "muon_frozen": {}, "losses": {}, "mixed": {}},
    "fsdp2": {"muon": {"resume": True}, "adamw_frozen": {}, "mixed": {}, "losses": {}, "hybrid": {}},
    "zero2": {"adamw": {"resume": True}, "muon_frozen": {}},
    "zero3": {"muon": {"resume": True}, "adamw_frozen": {}, "losses": {}, "experts": {}},
}
SPOILED = ["ddp", "fsdp2", "zero2"]
if find_spec("deepspeed") is None:
    PLAN, SPOILED = {mode: PLAN[mode] for mode in ("ddp", "fsdp2")}, ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes make of everything here; starting them takes longer than the runs."""
    scenarios = [scenario(mode, name, **more) for mode, runs in PLAN.items() for name, more in runs.items()]
    scenarios += [scenario(mode, "adamw", spoil=1) | {"name": f"{mode}-spoiled"} for mode in SPOILED]
    stopped = {"name": "terminated", "save_strategy": "steps", "save_steps": 100}
    scenarios.append(scenario("ddp", "adamw", terminate=1) | stopped)
    return on_two_processes(tmp_path_factory.mktemp("two"), scenarios)


def assert_same(result, expected, mode, name):
    what = f"{mode}, {name}"
    assert result["wrapped"] == WRAPPERS[mode], what
    assert len(result["losses"]) == len(expected) == 5
    tolerance = DISTRIBUTED_MUON if RUNS[name]["optimizer"] == "muon" else DISTRIBUTED
    assert_close(torch.tensor(result["losses"]), expected, tolerance, what)
    assert result.get("resumed", result["losses"]) == result["losses"], what


@pytest.mark.flow("`SleepTrainer`: DDP, FSDP2, ZeRO")
@pytest.mark.parametrize("mode", PLAN)
def test_two_processes_give_the_losses_of_one_and_resume(one, two, mode):
    for name in PLAN[mode]:
        assert_same(two[f"{mode}-{name}"], one[name], mode, name)


def test_what_is_compared_can_tell_the_runs_apart(one):
    def apart(first, second):
        return (one[first] - one[second]).abs().max()

    assert apart("muon", "adamw") > 3 * DISTRIBUTED_MUON.atol
    assert apart("muon", "muon_frozen") > 3 * DISTRIBUTED_MUON.atol
    assert apart("adamw", "adamw_frozen") > 3 * DISTRIBUTED.atol
    assert apart("adamw", "mixed") > 3 * DISTRIBUTED.atol


@pytest.mark.slow
@pytest.mark.parametrize("mode", PLAN)
def test_every_run_in_every_mode(one, tmp_path, mode):
    results = on_two_processes(tmp_path, [scenario(mode, name, resume=True) for name in RUNS])
    for name in RUNS:
        assert_same(results[f"{mode}-{name}"], one[name], mode, name)


@pytest.mark.parametrize("mode", SPOILED)
def test_a_bad_loss_on_one_rank_is_skipped_on_all(two, mode):
    result = two[f"{mode}-spoiled"]
    assert result["nonfinite"] == 1
    assert torch.tensor(result["losses"]).isfinite().all()


def test_a_signal_to_one_rank_stops_all_in_the_same_step_with_a_checkpoint(two):
    assert (two["terminated"]["code"], two["terminated"]["saved"]) == (143, ["checkpoint-2"])


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharding_that_would_quietly_be_left_out_is_refused(tmp_path, monkeypatch, name):
    if name == "deepspeed":
        pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    arguments = SleepTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"{name} to be available.*quietly"):
        SleepTrainer(trainable(), arguments, data_collator=SleepCollator(0))


def test_clipping_of_muons_updates_under_deepspeed_is_refused(tmp_path):
    pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    with pytest.raises(ValueError, match="max_grad_norm=0 with Muon under DeepSpeed, got 1.0"):
        build_deepspeed_optimizer(trainable(), SleepTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


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


def calls_of(batch) -> rounds.Calls:
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    labels, mask = (batch[name].gather(1, order) for name in ("labels", "attention_mask"))
    return rounds.Calls.of((labels != -100).numpy(), mask.bool().numpy(), 8)


def are_of_ranks(batches, monkeypatch):
    """Let every batch be that of a rank: what all ranks agree on is agreed on by these."""
    own = [calls_of(batch) for batch in batches]
    n_rounds = max(len(one.awake) for one in own)
    together = torch.stack([torch.from_numpy(one.signature(n_rounds)).to(torch.int32) for one in own]).amax(0)

    def all_reduce(tensor, op):
        tensor.copy_(torch.tensor([n_rounds, 2]) if tensor.dtype == torch.long else together)

    monkeypatch.setattr(rounds.dist, "all_reduce", all_reduce)


def assert_equal_calls(before, after):
    """Other layers were called for each batch, now the same are; no gradient has changed."""
    assert len({str(order) for order, _ in before}) > 1
    assert len({str(order) for order, _ in after}) == 1
    for (_, expected), (_, actual) in zip(before, after, strict=True):
        for name, gradient in actual.items():
            assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), EXACT_GRAD, name)


@pytest.mark.parametrize("keywords", [{}, {"backprop_windows": 1}, {"backprop_windows": 2, "backprop_loops": 1}])
def test_ranks_with_different_rows_call_the_same_layers_and_keep_their_gradients(monkeypatch, keywords):
    batches = [
        ragged((30, [4, 29]), (3, [2])),
        ragged((9, [8]), (18, [17])),
        ragged((5, []), (2, [])),
        ragged((44, [20]), (26, [25])),
    ]
    truncated = "backprop_windows" in keywords
    are_of_ranks(batches, monkeypatch)
    with true_float64():
        model = trainable(dtype=torch.float64, **keywords).train()
        before = [calls(model, batch) for batch in batches]
        after = [calls(model, rounds.equalise(batch, 8, truncated)) for batch in batches]
    assert_equal_calls(before, after)


@pytest.mark.parametrize("losses", [{"pass_loss": "all"}, {"pass_loss": "one"}, {"reconstruct": 0.5}])
def test_ranks_call_the_same_layers_for_all_losses(monkeypatch, losses):
    """What earlier passes left is asked of the last sleep of a row alone: which that is must be agreed on."""
    batches = [ragged((30, [4, 29]), (3, [2])), ragged((9, [8]), (18, [17])), ragged((44, [20]), (26, [25]))]
    are_of_ranks(batches, monkeypatch)
    options = {"n_loops": 3, "fast_weights": FastWeightConfig(layers=[0, 1]), "loop_range": (0, 1)}
    model = trainable(dtype=torch.float64, **options).train()
    objectives = Objectives(ObjectiveArguments(**losses), model)

    def of(batch):
        with objectives.on(torch.tensor([7, 7, 7])):
            return calls(model, batch)

    with true_float64():
        before = [of(batch) for batch in batches]
        after = [of(rounds.equalise(batch, 8, objectives.tells_last_sleeps)) for batch in batches]
    assert_equal_calls(before, after)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_layers_return_the_memory_that_they_make(eviction):
    model, ids = sleeping(tiny_base("jet_nemotron"), eviction=eviction, fast_weights=None), tokens(2, 21)
    expected = model(ids).logits
    give_memory_out(model.blocks.layers)
    held, returned = {}, []

    def tensors(keywords):
        cache = keywords["past_key_values"]
        return [each for each in (*cache.state, *(cache.kv or ())) if each is not None]

    def before(layer, _, keywords):
        held[layer] = tensors(keywords)

    def after(layer, _, keywords, output):
        made = [each for each in tensors(keywords) if all(each is not given for given in held[layer])]
        assert all(one is other for one, other in zip(output[1:], made, strict=True))
        returned.append((len(held[layer]), len(made)))

    for layer in model.blocks.layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)
    assert torch.equal(model(ids).logits, expected)
    assert {(0, 2), (2, 2)} <= set(returned)
