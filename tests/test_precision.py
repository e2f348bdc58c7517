"""Half precision: what is trained in it moves, and what is added up over many uses is added up in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from families import randomise, tiny_base, tokens
from safetensors.torch import load_file
from test_distributed import AUTO, FROZEN, FSDP, WRAPPERS, on_two_processes
from tolerances import BFLOAT16, DISTRIBUTED_BFLOAT16, ONE_ROUNDING, ROUNDING32, USES_BFLOAT16, assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sleepify import FastWeightConfig, SleepCache, SleepForCausalLM, sleepify
from sleepify.fast_weights import LAYERS
from sleepify.fast_weights.parts import Linear, cast_once
from sleepify.training import SleepTrainingArguments
from sleepify.training.optim import MuonAdamW, build_optimizer
from sleepify.training.zero import build_zero_optimizer, keep_float32

HALVES = [torch.bfloat16, torch.float16]


def sleeping(base: PreTrainedModel, rule: str = "gdn", **changes: object) -> SleepForCausalLM:
    torch.manual_seed(1)
    inserted = FastWeightConfig(rule=rule, num_layers=2, dconv_reduction=2)
    model = sleepify(base, **{"n_loops": 2, "window_size": 5, "fast_weights": inserted, **changes})
    randomise(model.fast_weights)
    return model


def bits(model: SleepForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.fast_weights.named_parameters()}


def assert_inserted_are(model: SleepForCausalLM, expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The base in ``dtype``, the inserted layers as they are in ``expected``, to the bit."""
    assert model.dtype == dtype and all(p.dtype == dtype for p in model.language_model.parameters())
    for name, parameter in model.fast_weights.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", HALVES)
def test_inserted_layers_stay_in_float32(dtype):
    model = sleeping(tiny_base("qwen3", dtype))
    expected = bits(model)
    assert_inserted_are(model, expected, dtype)
    short = {torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half}[dtype]
    conversions: list[Callable[[nn.Module], nn.Module]] = [
        short,
        lambda model: model.to(dtype),
        lambda model: model.to(device="cpu", dtype=dtype),
        lambda model: model.to(torch.zeros((), dtype=dtype)),
        lambda model: model.type(dtype),
        lambda model: copy.deepcopy(model),
    ]
    for convert in conversions:
        assert_inserted_are(convert(model), expected, dtype)
    whole = sleeping(tiny_base("qwen3", torch.float32))
    whole.fast_weights.load_state_dict(expected)
    assert_inserted_are(short(whole), expected, dtype)
    assert {p.dtype for p in whole.float().parameters()} == {torch.float32}
    assert {p.dtype for p in whole.double().parameters()} == {torch.float64}
    # From float64 down again; gradients follow their parameters.
    whole.fast_weights[0].mixer.A_log.grad = torch.ones_like(whole.fast_weights[0].mixer.A_log)
    assert_inserted_are(short(whole), expected, dtype)
    assert whole.fast_weights[0].mixer.A_log.grad.dtype == torch.float32
    meta = whole.to("meta")
    assert {p.dtype for p in meta.fast_weights.parameters()} == {torch.float32} and meta.device.type == "meta"


def test_inserted_layers_are_loaded_and_made_in_float32(tmp_path):
    base = tiny_base("qwen3", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = sleeping(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = bits(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "alone", fast_weights_only=True)
    for name in ("whole", "alone"):
        for asked in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name, **asked)
            assert_inserted_are(again, expected, torch.bfloat16)
        assert_inserted_are(
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float16), expected, torch.float16
        )
        double = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert {p.dtype for p in double.parameters()} == {torch.float64}
    joined = sleepify(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), fast_weights=tmp_path / "alone")
    assert_inserted_are(joined, expected, torch.bfloat16)
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert {p.dtype for p in made.fast_weights.parameters()} == {torch.float32}
    # Drawn in float32 too, not drawn in bfloat16 and widened.
    weight = made.fast_weights[0].mixer.q_proj.weight
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("rule", LAYERS)
def test_they_compute_in_the_dtype_of_the_base(rule):
    model = sleeping(tiny_base("qwen3", torch.bfloat16), rule)
    layer, exact = model.fast_weights[0], copy.deepcopy(model.fast_weights[0]).double()
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    y, (conv_state, matrix) = layer(x)
    assert (y.dtype, conv_state.dtype, matrix.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected, (_, expected_matrix) = exact(x.double())
    assert (y.double() - expected).norm() < BFLOAT16.rtol * expected.norm()
    assert (matrix.double() - expected_matrix).norm() < BFLOAT16.rtol * expected_matrix.norm()
    ids = tokens(2, 17)
    out = model(ids, labels=ids, logits_to_keep=0)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    for name, parameter in model.fast_weights.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0, name
    generated = model.eval().generate(ids[:, :7], max_new_tokens=6, do_sample=False)
    assert generated.shape == (2, 13)


def test_equal_dtypes_cost_nothing():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer, x = Linear(6, 4).to(dtype), torch.randn(3, 6, dtype=dtype)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert type(layer(x).grad_fn) is type(F.linear(x, layer.weight, layer.bias).grad_fn)


def test_a_cast_linear_layer_has_the_gradients_of_one_in_its_dtype():
    torch.manual_seed(0)
    layer, x = Linear(6, 4), torch.randn(2, 3, 6).bfloat16().requires_grad_()
    narrow = copy.deepcopy(layer).bfloat16()
    results = []
    for module in (layer, narrow):
        inputs = [x, *module.parameters()]
        results.append((module(x), *torch.autograd.grad(module(x).square().sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.bfloat16(), expected, atol=ONE_ROUNDING.atol, rtol=ONE_ROUNDING.rtol)
    assert [gradient.dtype for gradient in results[0][2:]] == [torch.float32, torch.float32]


def train(model: SleepForCausalLM, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        ids = tokens(2, 8, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, tmp_path, name: str, rate: float = 5e-5) -> MuonAdamW:
    arguments = SleepTrainingArguments(str(tmp_path), use_cpu=True, optimizer=name, adamw_learning_rate=rate)
    return build_optimizer(model, arguments)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 5e-5), ("adamw", 5e-5), ("adamw", 2e-4)])
def test_every_trainable_tensor_of_a_bfloat16_model_moves(tmp_path, frozen, optimizer, rate):
    # Half of the layers Jet's, whose decays are the base's own, in its dtype.
    types = {"num_hidden_layers": 2, "layer_types": ["jet", "attn"]}
    inserted = FastWeightConfig(rule="gdn", layers=[1])
    model = sleeping(tiny_base("jet_nemotron", torch.bfloat16, **types), fast_weights=inserted)
    model.freeze_base(frozen)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    own = optimizer_of(model, tmp_path, optimizer, rate)
    train(model.train(), own, 50)
    for name, parameter in model.named_parameters():
        # What is in bfloat16 shows the sum of its steps as soon as that is half a unit of its last place.
        now = own.state[parameter].get("master", parameter) if parameter.requires_grad else parameter
        assert now.dtype == torch.float32 or not parameter.requires_grad, name
        assert torch.equal(now.to(parameter.dtype), parameter), name
        still = (now == before[name]).float().mean()
        assert still < 0.5 if parameter.requires_grad else still == 1, (
            f"{name}: {still:.0%} of the entries are as before"
        )


@pytest.mark.parametrize("whole", [True, False])
def test_lora_trains_inserted_layers_in_float32(tmp_path, whole):
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    model = sleeping(
        tiny_base("qwen3", torch.bfloat16, num_hidden_layers=2), fast_weights=FastWeightConfig(rule="gdn", layers=[1])
    )
    before = bits(model)
    # Beside adapters on the base what is inserted is trained whole, or has adapters itself.
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=r"fast_weights\..*" if whole else None,
        modules_to_save=["fast_weights.0"] if whole else None,
    )
    tuned = peft.get_peft_model(model, config)
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    train(tuned.train(), optimizer_of(tuned, tmp_path, "adamw"), 4)
    assert any("fast_weights" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, start[name]), name
    tuned.save_pretrained(tmp_path / "adapter")
    again = sleeping(
        tiny_base("qwen3", torch.bfloat16, num_hidden_layers=2), fast_weights=FastWeightConfig(rule="gdn", layers=[1])
    )
    again.fast_weights.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    ids = tokens(1, 12)
    assert torch.equal(again(ids).logits, tuned.eval()(ids).logits)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_bfloat16_weights_are_trained_as_float32_ones_and_rounded(tmp_path, name):
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16()
    wide = copy.deepcopy(narrow).float()
    optimizers = [optimizer_of(model, tmp_path, name) for model in (narrow, wide)]
    for step in range(20):
        if step == 10:  # through a checkpoint
            state = optimizers[0].state_dict()
            optimizers[0] = optimizer_of(narrow, tmp_path, name)
            optimizers[0].load_state_dict(copy.deepcopy(state))
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()) and torch.equal(optimizers[0].state[p]["master"], q)
        assert p.grad.dtype == torch.bfloat16 and set(optimizers[0].state[p]) - {"master"} == set(
            optimizers[1].state[q]
        )
    assert len(optimizers[0].state) == 4


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weights_that_are_loaded_between_two_steps_are_trained_on(tmp_path, name):
    """As after ``load_best_model_at_end``: what the optimiser remembers of others must not come back."""
    model = nn.Linear(8, 8).bfloat16()
    optimizer = optimizer_of(model, tmp_path, name)

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    loaded = {key: weight + 1 for key, weight in model.state_dict().items()}
    # Some entries stay what they were: those go on from what is finer than they.
    loaded["weight"][0] = model.weight.detach()[0]
    finer = optimizer.state[model.weight]["master"][0].clone()
    model.load_state_dict(loaded)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step()
    assert all(torch.equal(weight, loaded[key]) for key, weight in model.state_dict().items())
    assert torch.equal(optimizer.state[model.weight]["master"][0], finer)
    assert not torch.equal(finer, finer.bfloat16().float())


def zero(stage):
    how = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    return {"deepspeed": {"zero_optimization": how, "bf16": {"enabled": "auto"}} | dict.fromkeys(AUTO, "auto")}


RATES = {"muon_learning_rate": 1e-3, "adamw_learning_rate": 5e-5, "max_grad_norm": 0.0, "dtype": "bfloat16"}
MODES = {"ddp": {}, "fsdp2": FSDP, "zero2": zero(2) | {"bf16": True}, "zero3": zero(3) | {"bf16": True}}
if find_spec("deepspeed") is None:
    MODES = {mode: MODES[mode] for mode in ("ddp", "fsdp2")}


def test_two_processes_train_a_bfloat16_model_in_float32(tmp_path):
    trained = {"frozen": FROZEN | {"optimizer": "adamw"}, "whole": {"optimizer": "muon"}}
    plan = {"frozen": ("ddp", "fsdp2", "zero3"), "whole": ("ddp", "fsdp2", "zero2")}
    plan = [(mode, name) for name, modes in plan.items() for mode in modes if mode in MODES]
    runs = {f"{mode}-{name}": trained[name] | MODES[mode] | RATES for mode, name in plan}
    results = on_two_processes(tmp_path, [{"name": name, **run} for name, run in runs.items()])
    values = {name: load_file(tmp_path / name / "trained.safetensors") for name in runs}
    for name in runs:
        mode, what = name.split("-")
        assert results[name]["wrapped"] == WRAPPERS[mode], name
        assert torch.tensor(results[name]["losses"]).isfinite().all(), name
        assert any("language_model" in key for key in values[name]) == (what == "whole")
        for key, value in values[name].items():
            # Five steps, and every number off the bfloat16 grid it would lie on: nothing was rounded away.
            assert value.dtype == torch.float32, f"{name}: {key}"
            assert not torch.equal(value, value.bfloat16().float()), f"{name}: {key}"
            assert values[f"ddp-{what}"][key].shape == value.shape
        if mode != "fsdp2":
            saved = load_file(tmp_path / name / "saved" / "model.safetensors")
            inserted = [key for key in values[name] if key.startswith("fast_weights.")]
            assert any("A_log" in key for key in inserted)
            for key in inserted:
                assert saved[key].dtype == torch.float32 and torch.equal(saved[key], values[name][key]), (
                    f"{name}: {key}"
                )


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_under_deepspeed_is_autocast_over_float32(tmp_path, caplog, frozen):
    model = sleeping(tiny_base("qwen3", torch.bfloat16, num_hidden_layers=2), fast_weights=FastWeightConfig(layers=[1]))
    model.freeze_base(frozen)
    expected, config = bits(model), {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    args = SleepTrainingArguments(str(tmp_path), use_cpu=True, optimizer="adamw")
    optimizer = build_zero_optimizer(model, args, config)
    assert config["bf16"] == {"enabled": False}
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
    base = {p.dtype for p in model.language_model.parameters()}
    assert base == {torch.bfloat16 if frozen else torch.float32}
    assert all(torch.equal(p, expected[name]) for name, p in model.fast_weights.named_parameters())
    assert not caplog.records


@pytest.mark.parametrize(("half", "partitioned"), [("fp16", False), ("bf16", True)])
def test_what_deepspeed_rounds_is_said(caplog, half, partitioned):
    model = sleeping(tiny_base("qwen3", torch.bfloat16, num_hidden_layers=2), fast_weights=FastWeightConfig(layers=[1]))
    if partitioned:
        model.fast_weights[0].o_proj.weight.ds_id = 0
    config = {half: {"enabled": True}}
    keep_float32(model, config)
    assert config == {half: {"enabled": True}}
    assert "rounds inserted layers to 16 bits" in caplog.text and "zero_to_fp32.py" in caplog.text
    keep_float32(model, {"bf16": {"enabled": False}, "fp16": {"enabled": False}})
    assert len(caplog.records) == 1


USES = 96


def through(layer: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """The relative error of the gradient of a weight that is used once for each input, each output's gradient given."""
    exact = sum(dy.double().mT @ x.double() for x, dy in zip(inputs, outputs, strict=True))
    layer.zero_grad()
    sum((layer(x).float() * dy).sum() for x, dy in zip(inputs, outputs, strict=True)).backward()
    return (layer.weight.grad.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_of_many_uses_of_an_inserted_weight_add_up_in_float32(autocast):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(64, 64, bias=False)
    inputs, outputs = ([torch.randn(16, 64, generator=generator) for _ in range(USES)] for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        error = through(layer, inputs if autocast else [x.bfloat16() for x in inputs], outputs)
    assert error < USES_BFLOAT16


def gradients(model: SleepForCausalLM, cached: bool = True) -> dict[str, Tensor]:
    ids = tokens(1, 70)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        loss = model(ids, labels=ids).loss
        assert torch.is_autocast_cache_enabled() == cached
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_passes_that_are_recomputed_singly_cast_singly_under_autocast():
    model = sleeping(tiny_base("qwen3", torch.float32, num_hidden_layers=2), checkpoint="loop").train()
    expected = gradients(model, cached=False)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= ROUNDING32 * expected[name].norm(), name
    # Elsewhere it is autocast that decides, and a frozen base has no gradient to lose.
    model.config.checkpoint = "none"
    model.gradient_checkpointing_disable()
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert (gradients(model)[name] - expected[name]).norm() > 100 * ROUNDING32 * expected[name].norm()


class Casts(TorchDispatchMode):
    """Counts the copies in bfloat16 that are made of a model's inserted weights."""

    def __init__(self, model: SleepForCausalLM) -> None:
        super().__init__()
        self.weights = {each.weight.data_ptr() for each in model.fast_weights.modules() if isinstance(each, Linear)}
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.dtype == torch.bfloat16:
            self.made += args[0].data_ptr() in self.weights
        return output


@pytest.mark.parametrize("rule", LAYERS)
def test_an_answer_casts_inserted_weights_once(rule):
    model = sleeping(tiny_base("qwen3", torch.bfloat16), rule).eval()
    prompt = {"input_ids": tokens(2, 7), "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def answer(n: int) -> tuple[int, Tensor]:
        with Casts(model) as casts:
            made = model.generate(**prompt, max_new_tokens=n, min_new_tokens=n)
        return casts.made, torch.stack(made.logits)

    weights = [each.weight for each in model.fast_weights.modules() if isinstance(each, Linear)]
    assert answer(2)[0] == answer(9)[0] == len(weights)
    cache, ids = SleepCache(), prompt["input_ids"]
    with torch.no_grad():
        for expected in answer(9)[1]:
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, 0]
            assert torch.equal(logits.float(), expected.float())
            ids = logits.argmax(1, keepdim=True)


@pytest.mark.parametrize("graphs", [False, True])
def test_what_changes_the_weights_between_answers_is_heard(graphs):
    """Whatever way it goes; and what is trained after an answer is trained in float32."""
    model, ids = sleeping(tiny_base("qwen3", torch.bfloat16)).eval(), tokens(1, 7)
    twin = copy.deepcopy(model)
    with model.captured(lambda function: function) if graphs else nullcontext():
        for change in (lambda weight: weight.data.neg_(), lambda weight: weight.detach().mul_(2), lambda weight: None):
            answer = model.generate(ids, max_new_tokens=8, cache_implementation="static" if graphs else None)
            twin.load_state_dict(model.state_dict())
            assert torch.equal(answer, twin.generate(ids, max_new_tokens=8))
            with pytest.raises(RuntimeError, match="stops"):
                model.generate(ids, max_new_tokens=8, streamer=Stops())
            model(ids, labels=ids).loss.backward()
            for each in model.fast_weights.modules():
                if isinstance(each, Linear):
                    assert each.weight.grad.dtype == torch.float32 and (graphs or each._cast is None)
                    change(each.weight)


class Stops:
    """A streamer whose program has gone."""

    def put(self, value: Tensor) -> None:
        raise RuntimeError("the reader stops")


def test_a_cast_may_go_while_another_thread_computes():
    class Going(Linear):
        looked = 0

        @property
        def _cast(self) -> tuple[Tensor, None] | None:
            self.looked += 1
            return (self.weight.bfloat16(), None) if self.looked == 1 else None

    layer, x = Going(6, 4, bias=False), torch.randn(3, 6).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight.bfloat16()))


def test_bf16_under_fsdp2_is_autocast_that_leaves_states_and_losses_alone(tmp_path):
    how = {"optimizer": "adamw", "adamw_learning_rate": 1e-4, "bf16": True}
    results = on_two_processes(tmp_path, [{"name": mode, **how, **MODES[mode]} for mode in ("ddp", "fsdp2")])
    losses = {mode: torch.tensor(result["losses"]) for mode, result in results.items()}
    assert all(result["states"] == ["torch.float32"] for result in results.values())
    assert not torch.equal(losses["fsdp2"], losses["fsdp2"].bfloat16().float())
    assert_close(losses["fsdp2"], losses["ddp"], DISTRIBUTED_BFLOAT16)


def test_an_answer_that_begins_while_another_ends_keeps_no_cast_of_it():
    """The other one's thread takes its casts away at any moment."""

    class Ending(Linear):
        """A layer whose cast is taken away as soon as somebody has seen it."""

        @property
        def _cast(self):
            found, self.kept = self.kept, None
            return found

        @_cast.setter
        def _cast(self, cast):
            self.kept = cast

    layer = Ending(6, 4)
    layer.kept = (layer.weight.bfloat16(), layer.bias.bfloat16())
    with cast_once(layer, torch.bfloat16):
        pass
