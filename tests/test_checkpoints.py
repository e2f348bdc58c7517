"""Saving and loading: whole, inserted weights alone, damaged, wrong, and where sleepify is not imported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import FAMILIES, randomise, tiny_base, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import sleeping
from transformers import AutoConfig, AutoModelForCausalLM

from sleepify import CheckpointError, SleepConfig, SleepForCausalLM, checkpoints, sleepify
from sleepify.fingerprint import fingerprint

ALONE = {
    *("config.json", "generation_config.json", "fast_weights.safetensors"),
    *("README.md", "sleep_manifest.json", "modeling_sleepify.py"),
}


@pytest.fixture
def base_dir(tmp_path):
    tiny_base("qwen3", dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model(tokens(1, 12)).logits


@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron", "ouro", "zamba2", "nemotron_h", "gemma3_text"])
def test_a_whole_checkpoint_loads_through_the_auto_classes(tmp_path, family):
    model = sleepify(tiny_base(family, dtype=torch.float32), n_loops=2, window_size=5, eviction="sliding")
    randomise(model.fast_weights)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SleepConfig)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), SleepForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(again, SleepForCausalLM) and not again.training
        assert (again.config.n_loops, again.config.window_size, again.config.eviction) == (2, 5, "sliding")
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_file_holds_is_filled_in_when_a_checkpoint_is_loaded(tmp_path, family):
    """Rotary frequencies, and factors that a base computes from its configuration."""
    model = sleepify(tiny_base(family, dtype=torch.float32), window_size=5)
    model.save_pretrained(tmp_path)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == again.keys()
    assert not [name for name, buffer in buffers.items() if not torch.equal(buffer, again[name])]


def test_weights_are_saved_by_the_names_that_a_resuming_trainer_looks_for(tmp_path):
    """Those of transformers, one by one for every expert, load by `from_pretrained` alone, and are still read."""
    model, other = (sleeping(tiny_base("qwen3_moe", dtype=torch.float32)) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "ours")
    other.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"), strict=True)
    assert torch.equal(logits(other), logits(model))
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    again = SleepForCausalLM.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_dtype_device_map_attention_and_shards(tmp_path):
    model = sleeping(tiny_base("qwen3", dtype=torch.float32))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager"
    )
    assert (again.dtype, again.fast_weights[0].o_proj.weight.dtype) == (torch.bfloat16, torch.float32)
    assert again.language_model.config._attn_implementation == "eager"
    assert logits(again).isfinite().all()
    model.save_pretrained(tmp_path)  # in one piece: the shards of before must not be left to be found
    assert not list(tmp_path.glob("model-*.safetensors")) and not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_from_a_path_and_by_keyword_or_config(base_dir):
    by_path = sleepify(str(base_dir), n_loops=2, window_size=7)
    assert by_path.config.base_model_name_or_path == str(base_dir)
    by_config = sleepify(tiny_base("qwen3", dtype=torch.float32), config=SleepConfig(n_loops=2, window_size=7))
    assert by_path.config.fast_weights == by_config.config.fast_weights
    assert by_path.config.base_fingerprint == by_config.config.base_fingerprint


# --- inserted weights alone


def test_inserted_weights_alone_find_their_base(base_dir, tmp_path):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    files = {path.name for path in (tmp_path / "small").iterdir()}
    assert files == ALONE
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "sleepify" and config["base_model_name_or_path"] == str(base_dir)
    assert len(config["base_fingerprint"]) == 64 and "pip install sleepify" in config["requires"]
    with safe_open(tmp_path / "small" / "fast_weights.safetensors", "pt") as opened:
        assert all(key.startswith("fast_weights.") for key in opened.keys())  # noqa: SIM118
    expected = logits(model)
    for again in (
        SleepForCausalLM.from_pretrained(tmp_path / "small"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
        sleepify(AutoModelForCausalLM.from_pretrained(base_dir), fast_weights=tmp_path / "small"),
    ):
        assert torch.equal(logits(again), expected)
    other = sleepify(AutoModelForCausalLM.from_pretrained(base_dir), fast_weights=str(tmp_path / "small"), n_loops=1)
    assert other.config.n_loops == 1 and not torch.equal(logits(other), expected)
    # A base in half precision is the same base; float16 rounds otherwise, and says so.
    half = SleepForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert (half.dtype, half.fast_weights[0].o_proj.weight.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(CheckpointError, match=r"load it in torch\.bfloat16 or torch\.float32 and cast afterwards"):
        SleepForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float16)


def test_inserted_weights_alone_bring_how_to_generate_and_take_an_attention(base_dir, tmp_path):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [2, 3], 6
    model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    for loader in (SleepForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "small", attn_implementation="eager")
        own = again.generation_config
        assert (own.eos_token_id, own.max_new_tokens) == ([2, 3], 6)
        parts = (again.config, again.language_model.config)
        assert [part._attn_implementation for part in parts] == ["eager", "eager"]
    # What was saved before, without it.
    (tmp_path / "small" / "generation_config.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.generation_config.eos_token_id == AutoModelForCausalLM.from_pretrained(base_dir).config.eos_token_id


def test_a_save_takes_the_place_of_nothing_else(base_dir, tmp_path):
    """The base that inserted weights need, another variant, a copy of the user's."""
    model = sleepify(str(base_dir), n_loops=2, window_size=5)
    with pytest.raises(ValueError, match=r"directory of its own .* \['model.safetensors'\] in it, which would be lost"):
        model.save_pretrained(base_dir, fast_weights_only=True)
    assert not isinstance(AutoModelForCausalLM.from_pretrained(base_dir), SleepForCausalLM)
    kept = tmp_path / "whole" / "model-best-so-far.safetensors"
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(kept.with_name("model.safetensors"), kept)
    model.save_pretrained(tmp_path / "whole")
    assert kept.is_file() and torch.equal(logits(AutoModelForCausalLM.from_pretrained(kept.parent)), logits(model))
    with pytest.raises(ValueError, match=r"weights of another variant, .* \['model.safetensors'\] in it"):
        model.save_pretrained(kept.parent, variant="fp16")
    model.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size=20_000)
    names = {path.name for path in (tmp_path / "variant").glob("model*.safetensors")}
    assert len(names) > 1 and all(name.startswith("model.fp16-0000") for name in names)
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", variant="fp16")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="weights of another variant"):
        model.save_pretrained(tmp_path / "variant")


def test_a_wrong_base_is_refused_with_both_fingerprints(base_dir, tmp_path):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    wrong = tiny_base("qwen3", dtype=torch.float32)
    wrong.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    before = {name: p.clone() for name, p in wrong.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        sleepify(wrong, fast_weights=tmp_path / "small")
    assert fingerprint(wrong) in str(error.value) and model.config.base_fingerprint in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in wrong.state_dict().items())
    wrong.save_pretrained(base_dir)
    with pytest.raises(CheckpointError, match="fingerprint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_trained_base_cannot_be_left_out(base_dir, tmp_path):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    model.language_model.model.norm.weight.data += 0.5
    with pytest.raises(CheckpointError, match="trained or resized"):
        model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="inserted layers"):
        sleepify(tiny_base("jet_nemotron")).save_pretrained(tmp_path / "small", fast_weights_only=True)


# --- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_whole_checkpoint(tmp_path):
    sleeping(tiny_base("qwen3", dtype=torch.float32)).save_pretrained(tmp_path)
    truncate(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing", "added", "renamed"])
def test_an_altered_whole_checkpoint(tmp_path, change):
    sleeping(tiny_base("qwen3", dtype=torch.float32)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "fast_weights.0.mixer.q_proj.weight"
    if change != "added":
        taken = tensors.pop(key)
    if change != "missing":
        tensors[key + ".more"] = tensors[key] if change == "added" else taken
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "sleep_manifest.json").unlink()  # as before there were manifests
    with pytest.warns(UserWarning, match="no sleep_manifest.json"), pytest.raises(CheckpointError, match="q_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "altered", "reshaped"])
def test_damaged_inserted_weights(base_dir, tmp_path, damage):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    file = tmp_path / "small" / "fast_weights.safetensors"
    if damage == "truncated":
        truncate(file)
    elif damage == "altered":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        config = json.loads((tmp_path / "small" / "config.json").read_text())
        config["fast_weights"]["head_dim"] = 4
        (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    expected = base(tokens(1, 5)).logits
    words = {"truncated": "damaged", "altered": "altered", "reshaped": "head_dim was 8.* is 4"}
    with pytest.raises(CheckpointError, match=words[damage]):
        sleepify(base, fast_weights=tmp_path / "small")
    assert torch.equal(base(tokens(1, 5)).logits, expected)


@pytest.mark.parametrize("alone", [False, True])
def test_a_full_disk_leaves_what_was_there(base_dir, tmp_path, monkeypatch, alone):
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    target = tmp_path / "kept"
    model.save_pretrained(target, fast_weights_only=alone)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    model.fast_weights[0].o_proj.weight.data += 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_card", full)  # after the weights were written, before they are renamed
    (target / "README.md").unlink()
    before.pop("README.md")
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(target, fast_weights_only=alone)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "kept"]


# --- elsewhere


def test_the_card_says_what_it_is(tmp_path):
    model = sleepify(tiny_base("ouro", dtype=torch.float32), n_loops=4, window_size=64, eviction="sliding")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "| 4 |",
        "64 tokens",
        "sliding",
        "import sleepify",
        "2605.26099",
        "limits",
        "jet",
    ):
        assert words in card, words
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    jet = sleepify(tiny_base("jet_nemotron"))
    jet.save_pretrained(tmp_path / "jet")
    assert "non-commercial" in (tmp_path / "jet" / "README.md").read_text()


def test_push_to_hub_uploads_what_save_writes(base_dir, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, folder_path, repo_id, **keywords):
            from pathlib import Path

            calls.update(files={p.name for p in Path(folder_path).iterdir()}, repo=repo_id, **keywords)
            calls["card"] = (Path(folder_path) / "README.md").read_text()
            return "commit"

    monkeypatch.setattr(checkpoints, "HfApi", Api)
    model = sleeping(AutoModelForCausalLM.from_pretrained(base_dir))
    assert model.push_to_hub("ouro-sleep", fast_weights_only=True, token="t", revision="main") == "commit"
    assert calls["files"] == ALONE
    assert calls["repo"] == "me/ouro-sleep"
    # Weights that lie there and would be found in the place of these.
    assert {"model*.safetensors", "fast_weights.safetensors"} <= set(calls["delete_patterns"])
    assert calls["token"] == "t" and calls["revision"] == "main" and "inserted layers alone" in calls["card"]
    with pytest.raises(TypeError, match="unknown"):
        model.push_to_hub("x", privat=True)
    model.config.base_model_name_or_path = "me/base"
    with pytest.raises(ValueError, match="a repository of its own for inserted weights, got me/base"):
        model.push_to_hub("base", fast_weights_only=True)
