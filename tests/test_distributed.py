"""Two processes give what one gives: DDP, FSDP2, ZeRO-2 and ZeRO-3, over gloo on the CPU.

Rows have different lengths and are supervised at different places (`distributed_worker.Rows`), so that the ranks of a
step have different windows to sleep on.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import randomise, tiny_base, tokens, true_float64
from tolerances import DISTRIBUTED, DISTRIBUTED_MUON, EXACT_GRAD, assert_close

from sleepify import sleepify
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, rounds
from sleepify.training.optim import build_deepspeed_optimizer

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer", "FastWeightLayer"]}}
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ADAMW, MUON = {"optimizer": "adamw"}, {"optimizer": "muon", "max_grad_norm": 0.0}
FROZEN = {"train_only": "fast_weights"}
MIXED = ADAMW | {
    "accumulation": 2,
    "loops_schedule": [1, 2, 3],
    "sleep": {"checkpoint": "window", "backprop_windows": 1},
}
# What is trained, by name; one process is the reference for each.
RUNS = {
    "adamw": ADAMW,
    "muon": MUON,
    "adamw_frozen": ADAMW | FROZEN,
    "muon_frozen": MUON | FROZEN,
    "mixed": MIXED,
}
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPSleepForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def zero(stage):
    return {"deepspeed": {"zero_optimization": {"stage": stage}} | dict.fromkeys(AUTO, "auto")}


MODES = {"ddp": {}, "fsdp2": FSDP, "zero2": zero(2), "zero3": zero(3)}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(directory, world, scenarios):
    """The processes of a run; `finish` waits for them."""
    directory.mkdir()
    script = Path(__file__).parent / "distributed_worker.py"
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent), "DS_ACCELERATOR": "cpu"}
    # DeepSpeed compiles its Muon with torch.compile, which takes longer than these five steps.
    common |= {"TORCHDYNAMO_DISABLE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world):
        own = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        log = open(directory / f"{rank}.log", "w")  # noqa: SIM115
        command = [sys.executable, str(script), str(directory / "out.json"), json.dumps(scenarios)]
        process = subprocess.Popen(command, env=os.environ | common | own, stdout=log, stderr=subprocess.STDOUT)
        processes.append((process, log))
    return directory, processes


def finish(run):
    directory, processes = run
    try:
        codes = [process.wait(timeout=300) for process, _ in processes]
    finally:
        for process, log in processes:
            process.kill()
            log.close()
    assert not any(codes), "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob("*.log")))
    return json.loads((directory / "out.json").read_text())


def compare(directory, plan):
    """Run every (mode, run, options) on two processes and every run on one, and compare the losses."""
    scenarios = {
        mode: [{"name": f"{name}", **RUNS[name], **MODES[mode], **more} for name, more in runs.items()]
        for mode, runs in plan.items()
    }
    names = sorted({name for runs in plan.values() for name in runs})
    started = [launch(directory / "one", 1, [{"name": name, **RUNS[name]} for name in names])]
    started += [launch(directory / mode, 2, scenarios[mode]) for mode in plan]
    one, *two = [finish(run) for run in started]
    for mode, results in zip(plan, two, strict=True):
        for name, result in results.items():
            what = f"{mode}, {name}"
            assert result["wrapped"] == WRAPPERS[mode], what
            tolerance = DISTRIBUTED_MUON if RUNS[name]["optimizer"] == "muon" else DISTRIBUTED
            expected = one[name]["losses"]
            assert len(expected) == 5
            assert_close(torch.tensor(result["losses"]), torch.tensor(expected), tolerance, what)
            if "resumed" in result:
                assert result["resumed"] == result["losses"], what
    return one, dict(zip(plan, two, strict=True))


RESUME = {"resume": True}


def test_ddp_and_fsdp2_give_the_losses_of_one_process_and_resume(tmp_path):
    plan = {
        "ddp": {"adamw": RESUME, "muon_frozen": {}},
        "fsdp2": {"muon": RESUME, "adamw_frozen": {}, "mixed": {}},
    }
    one, _ = compare(tmp_path, plan)
    # What is compared can tell the runs apart.
    assert abs(one["muon"]["losses"][-1] - one["adamw"]["losses"][-1]) > 3 * DISTRIBUTED_MUON.atol
    assert abs(one["adamw_frozen"]["losses"][-1] - one["adamw"]["losses"][-1]) > 3 * DISTRIBUTED.atol


def test_zero2_and_zero3_give_the_losses_of_one_process_and_resume(tmp_path):
    pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    compare(
        tmp_path,
        {"zero2": {"adamw": RESUME, "muon_frozen": {}}, "zero3": {"muon": RESUME, "adamw_frozen": {}}},
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_run_in_every_mode(tmp_path, mode):
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    compare(tmp_path, {mode: dict.fromkeys(RUNS, RESUME)})


def test_what_happens_to_one_rank_happens_to_all(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 100}
    scenarios = [{"name": "spoiled", **ADAMW, "spoil": 1}, {"name": "terminated", **ADAMW, **steps, "terminate": 1}]
    results = finish(launch(tmp_path / "two", 2, scenarios))
    assert results["spoiled"]["nonfinite"] == 1
    assert torch.tensor(results["spoiled"]["losses"]).isfinite().all()
    # The other rank stops in the same step, with a whole checkpoint.
    assert (results["terminated"]["code"], results["terminated"]["saved"]) == (143, ["checkpoint-2"])


def small_model(dtype=torch.float32, **keywords):
    torch.manual_seed(3)
    model = sleepify(tiny_base("qwen3", dtype, num_hidden_layers=2), **({"n_loops": 2, "window_size": 8} | keywords))
    randomise(model.fast_weights)
    return model


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharding_that_would_quietly_be_left_out_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    arguments = SleepTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"{name} to be available.*quietly"):
        SleepTrainer(small_model(), arguments, data_collator=SleepCollator(0))


def test_clipping_of_muons_updates_under_deepspeed_is_refused(tmp_path):
    pytest.importorskip("deepspeed", reason="ZeRO is DeepSpeed's")
    with pytest.raises(ValueError, match="max_grad_norm=0 with Muon under DeepSpeed, got 1.0"):
        build_deepspeed_optimizer(small_model(), SleepTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


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
        model = small_model(torch.float64, **keywords)
        before = [calls(model, batch) for batch in batches]
        after = [calls(model, rounds.equalise(batch, 8, truncated)) for batch in batches]
    assert len({str(order) for order, _ in before}) > 1
    assert len({str(order) for order, _ in after}) == 1
    for (_, expected), (_, actual) in zip(before, after, strict=True):
        for name, gradient in actual.items():
            assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), EXACT_GRAD, name)
