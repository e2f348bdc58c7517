"""An adapter says which inserted layers it was trained with, and is not loaded onto others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import tiny_base, tokens
from quantized import SIZES, each_way, quantization
from small import sleeping
from transformers import AutoModelForCausalLM

from sleepify import CheckpointError, FastWeightConfig, SleepForCausalLM, lora_config, sleepify


def made(**inserted: Any) -> SleepForCausalLM:
    base = tiny_base("qwen3", torch.float32)
    return sleepify(base, n_loops=3, window_size=5, eviction="sliding", fast_weights=FastWeightConfig(**inserted))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2, 13)).logits


def adapter(folder: Path, way: str = "get_peft_model", task_type: str | None = "CAUSAL_LM") -> torch.Tensor:
    """Saved to a folder: of one layer, inserted after layer 1 of the base. What the model says with it."""
    model = made(layers=[1])
    tuned: Any = model
    if way == "add_adapter":
        model.add_adapter(lora_config(model, r=2, task_type=task_type))
    else:
        tuned = peft.get_peft_model(model, lora_config(model, r=2, task_type=task_type))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    tuned.save_pretrained(folder)
    return logits(tuned)


def by_peft(model: SleepForCausalLM, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder)


def by_transformers(model: SleepForCausalLM, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model


WAYS = [("get_peft_model", "CAUSAL_LM"), ("get_peft_model", None), ("add_adapter", "CAUSAL_LM")]


@pytest.mark.flow("saved, loaded onto other inserted layers")
@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("way, task_type", WAYS)
@pytest.mark.parametrize(
    "other, message",
    [
        ({"layers": [2]}, r"layers=\[2\], not \[1\]"),  # of the same shapes: the tensors say nothing
        ({"layers": [1], "norm_eps": 1e-3}, r"norm_eps=0\.001, not 1e-06"),
        ({"layers": [1], "rule": "jet"}, r"rule='jet', not 'gdn'"),
        ({"layers": [1], "conv_size": 3}, r"conv_size=3, not 4"),
        ({"layers": [0, 1]}, r"layers=\[0, 1\], not \[1\]"),
    ],
)
def test_other_inserted_layers_are_refused_by_name(tmp_path, way, task_type, load, other, message):
    expected = adapter(tmp_path, way, task_type)
    model = made(**other)
    before = logits(model)
    with pytest.raises(CheckpointError, match=rf"{message}.*auto_mapping\['sleepify'\]"):
        load(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(load(made(layers=[1]), tmp_path)), expected)


@pytest.mark.parametrize("way, task_type", WAYS)
def test_an_adapter_tells_how_its_model_slept(tmp_path, way, task_type):
    expected = adapter(tmp_path, way, task_type)
    slept = peft.PeftConfig.from_pretrained(tmp_path).auto_mapping["sleepify"]
    model = sleepify(tiny_base("qwen3", torch.float32), **slept)
    assert (model.config.n_loops, model.config.window_size, model.config.eviction) == (3, 5, "sliding")
    again = by_peft(model, tmp_path)
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").auto_mapping["sleepify"] == slept


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_who_sleeps_otherwise_than_the_adapter_was_trained_is_warned(tmp_path, load, recwarn):
    """As the checkpoint of an adapter does, whose settings were changed before it was trained."""
    made(layers=[1]).save_pretrained(tmp_path / "whole")
    model = SleepForCausalLM.from_pretrained(tmp_path / "whole", n_loops=2, window_size=4)
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path / "adapter")
    load(SleepForCausalLM.from_pretrained(tmp_path / "whole", n_loops=2, window_size=4), tmp_path / "adapter")
    assert not [each for each in recwarn if "slept otherwise" in str(each.message)]
    with pytest.warns(UserWarning, match="slept otherwise than this one: n_loops=3, not 2; window_size=5, not 4; set"):
        load(SleepForCausalLM.from_pretrained(tmp_path / "whole"), tmp_path / "adapter")


def test_a_configuration_may_serve_several_models_and_an_adapter_of_before_says_nothing(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fast_weights.0"], task_type="CAUSAL_LM")
    peft.get_peft_model(made(layers=[1]), config).save_pretrained(tmp_path)
    peft.get_peft_model(made(layers=[2]), config)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(written["auto_mapping"]) == ["sleepify"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"auto_mapping": None}))
    by_peft(made(layers=[2]), tmp_path)
    # Of a model that does not sleep there is nothing to say.
    base = peft.get_peft_model(tiny_base("qwen3", torch.float32), peft.LoraConfig(target_modules=["q_proj"]))
    base.save_pretrained(tmp_path / "base")
    assert "sleepify" not in (tmp_path / "base" / "adapter_config.json").read_text()


@each_way
def test_a_sleeping_checkpoint_that_is_loaded_quantized_keeps_its_inserted_layers(tmp_path, bits):
    how = quantization(bits)
    saved = sleeping(tiny_base("qwen3", torch.float32, **SIZES), fast_weights=FastWeightConfig(rule="jet", layers=[1]))
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, device_map="cpu")
    for (name, mine), theirs in zip(
        model.fast_weights.named_parameters(), saved.fast_weights.parameters(), strict=True
    ):
        assert type(mine.data) is torch.Tensor and torch.equal(mine, theirs), name
    base = model.language_model.model.layers[0].self_attn.q_proj.weight
    assert type(base.data) is not torch.Tensor or base.dtype != torch.float32, "nothing was quantized"
    tuned = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora_config(model, r=2))
    ids = tokens(2, 13)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    still = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not still
