"""Adapters of peft on models that sleep: what they train, hold, refuse; merged, quantized, loaded again."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from families import VOCAB, tiny_base, tokens
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from quantized import SIZES, each_way, quantization
from safetensors.torch import load_file, save_file
from small import sleeping
from tolerances import EXACT, FLOAT32, assert_close
from torch import nn
from transformers import AutoModelForCausalLM

import sleepify as package
from sleepify import CheckpointError, FastWeightConfig, SleepForCausalLM, lora_config, sleepify

WEIGHTS = "adapter_model.safetensors"
FAMILIES = ["qwen3", "ouro", "nemotron_h", "zamba2", "jet_nemotron", "qwen3_moe"]


def fresh(family: str = "qwen3", dtype: torch.dtype = torch.float32, **keywords):
    """As a user gets it: inserted layers drawn anew, with output projections that are zero."""
    return sleepify(tiny_base(family, dtype), n_loops=2, window_size=5, **keywords)


def disturb(model: nn.Module) -> nn.Module:
    """What training would change, changed."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module, **keywords) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2, 13), **keywords).logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def bare() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, task_type="CAUSAL_LM")


def everywhere() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


# --- what is trained


@pytest.mark.flow("`lora_config(model)`")
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_config_adapts_the_base_and_trains_what_was_inserted(family):
    inserted = None if family in ("ouro", "qwen3") else FastWeightConfig(layers=[1])
    model = fresh(family, fast_weights=inserted)
    config = lora_config(model, r=3)
    assert (config.r, config.lora_alpha, config.task_type) == (3, 6, "CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    names = trained(wrapped)
    whole = {name for name in names if "fast_weights" in name}
    assert whole == {
        f"base_model.model.fast_weights.{place}.modules_to_save.default.{name}"
        for place, layer in enumerate(model.fast_weights)
        for name, _ in layer.original_module.named_parameters()
    }
    assert all("language_model" in name and "lora_" in name and "lm_head" not in name for name in names - whole)
    ids = tokens(2, 13)
    disturb(wrapped).train()(input_ids=ids, labels=ids).loss.backward()
    still = [name for name, parameter in wrapped.named_parameters() if name in names and parameter.grad is None]
    assert not still, f"trained in several processes, these would be an error: {still}"


def test_all_linear_layers_of_the_base_are_targets_unless_said_otherwise():
    model = fresh()
    wrapped = peft.get_peft_model(model, lora_config(model))
    found = {name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    base = tiny_base("qwen3")
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert found == {f"base_model.model.language_model.{name}" for name in linear}
    # What is trained whole is not adapted too, whatever the targets are called.
    narrow = lora_config(fresh(), r=2, lora_alpha=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert (narrow.lora_alpha, narrow.modules_to_save) == (1, ["fast_weights.0", "lm_head"])
    names = trained(peft.get_peft_model(fresh(), narrow))
    assert not any("fast_weights" in name and "lora_" in name for name in names)
    with pytest.raises(TypeError, match="sleepify"):
        lora_config(tiny_base("qwen3"))


@pytest.mark.flow("bare `LoraConfig`")
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "second"])
def test_a_configuration_without_targets_trains_base_and_inserted_layers(way):
    assert "sleepify" in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    model = fresh()
    if way == "add_adapter":
        model.add_adapter(bare())
    else:
        wrapped = peft.get_peft_model(model, bare())
    if way == "second":
        wrapped.add_adapter("second", bare())
        wrapped.set_adapter("second")
    name = "second" if way == "second" else "default"
    names = trained(model)
    assert f"fast_weights.0.modules_to_save.{name}.mixer.o_proj.weight" in names
    assert f"language_model.model.layers.3.mlp.down_proj.lora_B.{name}.weight" in names
    assert not any("fast_weights" in each and "lora_" in each for each in names)


@pytest.mark.flow("targets without the inserted layers")
def test_targets_that_leave_sleep_out_are_warned_of():
    def said(config, model=None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft.get_peft_model(model or fresh(), config)
        return [str(each.message) for each in caught if "lora_config" in str(each.message)]

    # By the tutorial: the mixers have layers of these names, too, behind which a zero waits.
    (message,) = said(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert "sleepify.lora_config(model)" in message and "modules_to_save=['fast_weights.0']" in message
    assert not said(lora_config(fresh())) and not said(bare()) and not said(everywhere())
    assert not said(peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["fast_weights.0"]))
    assert not said(peft.LoraConfig(target_modules=["q_proj"]), sleeping(dtype=torch.float32))
    assert not said(peft.LoraConfig(target_modules=["q_proj"]), fresh("jet_nemotron"))


# --- what an adapter holds


@pytest.mark.flow("saved, loaded onto a fresh base", "an adapter without inserted weights")
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("make", [lora_config, lambda _: bare(), lambda _: everywhere()], ids=["ours", "bare", "all"])
def test_an_adapter_of_a_model_made_in_memory_can_be_loaded(tmp_path, make, way):
    model = fresh()
    if way == "add_adapter":
        model.add_adapter(make(model))
        tuned = model
    else:
        tuned = peft.get_peft_model(model, make(model))
    expected = logits(disturb(tuned))
    tuned.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", WEIGHTS} <= {path.name for path in (tmp_path / "adapter").iterdir()}
    for again in (peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter"), fresh()):
        if again is not None and isinstance(again, SleepForCausalLM):
            again.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(again), expected)
    bare_again = sleepify(tiny_base("qwen3", torch.float32), n_loops=2, window_size=5)
    assert not torch.equal(logits(bare_again), expected)

    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("fast_weights.0.norm.weight")}
    assert len(kept) == len(tensors) - 1
    save_file(kept, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    for load in (
        lambda: peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter"),
        lambda: fresh().load_adapter(str(tmp_path / "adapter")),
    ):
        with pytest.raises(CheckpointError, match=r"fast_weights\.0\.norm\.weight.*lora_config"):
            load()


@pytest.mark.flow("`add_adapter`, `save_pretrained`")
def test_a_save_of_an_adapter_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = fresh()
    model.add_adapter(lora_config(model))
    model.save_pretrained(tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    disturb(model)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match="fast_weights_only"):
        model.save_pretrained(tmp_path / "kept", fast_weights_only=True)


@pytest.mark.flow("`AutoPeftModelForCausalLM`")
def test_an_adapter_of_a_checkpoint_finds_it(tmp_path):
    sleeping(dtype=torch.float32).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    # Trained on the base alone: the checkpoint has the inserted weights.
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    expected = logits(disturb(tuned))
    tuned.save_pretrained(tmp_path / "adapter")
    assert not any("fast_weights" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.get_base_model(), SleepForCausalLM) and torch.equal(logits(again), expected)
    # On a model that has them from nowhere it would say other things.
    with pytest.raises(CheckpointError, match="whole"):
        peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")


# --- adapters at work


@pytest.mark.parametrize(
    "dora",
    [
        pytest.param(False, id="lora", marks=pytest.mark.flow("LoRA, `merge_and_unload`")),
        pytest.param(True, id="dora", marks=pytest.mark.flow("DoRA, `merge_and_unload`")),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "nemotron_h", "zamba2"])
def test_merged_it_says_the_same(tmp_path, family, dora):
    model = fresh(family, torch.float64, fast_weights=FastWeightConfig(layers=[1]))
    before = logits(model)
    # In float64: recurrent layers make float32's rounding, in which W x + B A x and (W + B A) x differ, large.
    tuned = disturb(peft.get_peft_model(model, lora_config(model, r=2, use_dora=dora))).double()
    expected = logits(tuned)
    ids = tokens(2, 13)
    with torch.no_grad():
        first = tuned(input_ids=ids[:, :11], use_cache=True)
        pieces = [first.logits]
        for place in (11, 12):
            first = tuned(input_ids=ids[:, place : place + 1], past_key_values=first.past_key_values)
            pieces.append(first.logits)
    assert_close(torch.cat(pieces, 1), expected, FLOAT32, "token by token")
    with tuned.disable_adapter():
        assert_close(logits(tuned), before, EXACT, "off")
    merged = tuned.merge_and_unload()
    assert type(merged) is SleepForCausalLM and not hasattr(merged.fast_weights[0], "modules_to_save")
    assert_close(logits(merged), expected, FLOAT32, "merged")
    if family != "qwen3":
        return  # how these are saved is no matter of adapters
    merged.float().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_norms_heads_and_layers_may_be_trained_whole(tmp_path):
    def config(model):
        return lora_config(model, r=2, modules_to_save=["lm_head", "model.norm", "layers.2", "embed_tokens"])

    model = fresh()
    before = logits(model)
    tuned = peft.get_peft_model(model, config(model))
    assert torch.equal(logits(tuned), before)
    for part in ("lm_head", "model.norm", "layers.2.", "embed_tokens"):
        changed = [p for name, p in tuned.named_parameters() if part in name and p.requires_grad]
        now = logits(tuned)
        for parameter in changed:
            parameter.data += 0.1
        assert changed and not torch.equal(logits(tuned), now), f"{part} is not looked up anew"
    tuned.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path)), logits(tuned))


@pytest.mark.flow("several adapters")
def test_adapters_take_turns():
    model = fresh()
    tuned = peft.get_peft_model(model, lora_config(model, r=2))
    first = logits(disturb(tuned))
    tuned.add_adapter("second", lora_config(tuned, r=4))
    tuned.set_adapter("second")
    assert not torch.equal(logits(tuned), first)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)


# --- quantized bases


class Int8Head(nn.Module):
    """A head whose weight is stored in whole numbers, as quantization libraries do."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.scale = head.weight.abs().amax(1, keepdim=True).detach() / 127
        self.weight = nn.Parameter((head.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).to(x.dtype).T


def test_a_quantized_head_gets_hidden_states_as_they_are():
    base = tiny_base("qwen3", torch.float32)
    base.lm_head = Int8Head(base.lm_head)
    model = sleepify(base, n_loops=2, window_size=20)
    assert_close(logits(model), base(tokens(2, 13)).logits, FLOAT32, "a text of less than a window")
    ids = tokens(2, 13)
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@each_way
def test_a_quantized_base_learns_by_adapters(tmp_path, bits):
    """As far as a CPU can show it: loaded, checked, trained, saved, loaded again."""
    how = quantization(bits, include_input_output_embeddings=True)
    tiny_base("qwen3", torch.float32, **SIZES).save_pretrained(tmp_path / "base")

    def quantized():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, device_map="cpu")
        return sleepify(base, n_loops=2, window_size=5)

    model = quantized()
    assert model.is_quantized and model.quantization_method == model.language_model.quantization_method
    model = peft.prepare_model_for_kbit_training(model)
    tuned = peft.get_peft_model(model, lora_config(model, r=2))
    # Not the plain layer, which would read whole numbers as weights where it merges.
    kinds = {type(module).__name__ for name, module in tuned.named_modules() if name.endswith("q_proj")}
    assert kinds & {"Linear8bitLt", "Linear4bit", "TorchaoLoraLinear"}, kinds
    ids, losses = tokens(2, 13), []
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = tuned.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(tuned))


def test_it_is_a_name_of_the_package():
    assert "lora_config" in package.__all__ and VOCAB


def test_an_adapter_of_a_sleeping_model_is_none_for_its_base(tmp_path):
    """peft would leave out what does not fit, with a warning, and the base would say what it always says."""
    model = fresh()
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a model that sleeps.*got .* around Qwen3ForCausalLM.*sleepify\(base"):
        peft.PeftModel.from_pretrained(tiny_base("qwen3", torch.float32), tmp_path)


def test_prompts_of_vectors_are_refused_by_name():
    """Sleep replays ids, and there is no id for what was learnt as an embedding."""
    tuned = peft.get_peft_model(fresh(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="inputs_embeds to be off, got it on: sleep replays the ids"):
        tuned(input_ids=tokens(2, 13))
    with pytest.raises(ValueError, match="expected input_ids .batch, tokens., got none"):
        fresh()(labels=tokens(2, 13))
