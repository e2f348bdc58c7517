"""Files that were damaged, mixed, edited or half saved: found, named, and never loaded in silence."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import randomise, tiny_base, tokens
from forked import in_a_fork
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sleepify import CheckpointError, FastWeightConfig, SleepCache, SleepConfig, SleepForCausalLM, sleepify
from sleepify.files import is_sealed, read_tensors, write_sealed
from sleepify.manifest import begin_in_place, finish_save, write_manifest

MANIFEST = "sleep_manifest.json"
SHARDED = {"max_shard_size": "20KB"}


def sleeping(**keywords):
    keywords = {"n_loops": 2, "window_size": 4, "fast_weights": FastWeightConfig(layers=[0, 2])} | keywords
    model = sleepify(tiny_base("qwen3", dtype=torch.float32), **keywords).eval()
    randomise(model.fast_weights)
    return model


@pytest.fixture(scope="module")
def old():
    return sleeping()


@pytest.fixture(scope="module")
def new():
    """The same, every weight another."""
    model = sleeping(n_loops=3)
    for parameter in model.parameters():
        parameter.data += 0.25
    return model


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base("qwen3", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def alone(base_dir, tmp_path):
    """The folder of a checkpoint of inserted weights alone."""
    model = sleepify(str(base_dir), n_loops=2, window_size=4, fast_weights=FastWeightConfig(layers=[0, 2]))
    randomise(model.fast_weights)
    model.save_pretrained(tmp_path / "alone", fast_weights_only=True)
    return tmp_path / "alone"


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# --- flipped bytes


@pytest.mark.parametrize("sharded", [False, True])
def test_a_flip_anywhere_in_a_whole_checkpoint_is_found(old, tmp_path, sharded):
    old.save_pretrained(tmp_path, **(SHARDED if sharded else {}))
    weights = sorted(path for path in tmp_path.iterdir() if ".safetensors" in path.name)
    assert len(weights) == 1 or sharded
    for path in weights:
        whole = path.read_bytes()
        for place in {0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            flip(path, place)
            with pytest.raises(CheckpointError, match=f"{path.name}.*altered.*fetch or save it again"):
                SleepForCausalLM.from_pretrained(tmp_path)
            path.write_bytes(whole)
    assert equal(state(AutoModelForCausalLM.from_pretrained(tmp_path)), state(old))


def test_the_check_can_be_left_out(old, alone, tmp_path):
    old.save_pretrained(tmp_path / "whole")
    flip(tmp_path / "whole" / "model.safetensors", -1)
    for loader in (SleepForCausalLM, AutoModelForCausalLM):
        with pytest.raises(CheckpointError, match="verify=False"):
            loader.from_pretrained(tmp_path / "whole")
        assert not equal(state(loader.from_pretrained(tmp_path / "whole", verify=False)), state(old))
    flip(alone / "fast_weights.safetensors", -1)
    AutoModelForCausalLM.from_pretrained(alone, verify=False)
    # Cheap checks stay.
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="bytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", verify=False)


def test_a_flip_in_inserted_weights_is_found(alone):
    path = alone / "fast_weights.safetensors"
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        flip(path, place)
        with pytest.raises(CheckpointError, match="fast_weights.safetensors.*altered"):
            AutoModelForCausalLM.from_pretrained(alone)
        path.write_bytes(whole)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_flip_anywhere_in_a_session_is_found(tmp_path, eviction):
    path = tmp_path / "session.safetensors"
    cache = sleeping(eviction=eviction)(tokens(2, 11)).past_key_values
    cache.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # The whole header, where names, shapes, counts and the digest are, and places in every tensor.
    for place in [*range(0, header, 3), *range(header, len(whole), 97), len(whole) - 1]:
        flip(path, place)
        with pytest.raises(CheckpointError):
            SleepCache.load(path)
        path.write_bytes(whole)
    assert repr(SleepCache.load(path)) == repr(cache)


def test_a_damaged_manifest_is_refused(old, tmp_path):
    old.save_pretrained(tmp_path)
    path = tmp_path / MANIFEST
    whole = json.loads(path.read_text())
    for text in ("{", "[]", '"x"', "{}", json.dumps(whole | {"files": {"model.safetensors": {}}})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="manifest"):
            SleepForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(whole | {"version": 99}))
    with pytest.raises(CheckpointError, match="version 99.*install"):
        SleepForCausalLM.from_pretrained(tmp_path)


# --- sets of files


def test_a_missing_and_a_foreign_file_are_named(old, new, tmp_path):
    old.save_pretrained(tmp_path, **SHARDED)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}.*no such file"):
        SleepForCausalLM.from_pretrained(tmp_path)
    shard.write_bytes(content)
    # transformers would take this one, not the shards.
    new.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="found.*'model.safetensors'.*take them away"):
        SleepForCausalLM.from_pretrained(tmp_path)


KINDS = {"one file": {}, "shards": SHARDED, "other shards": {"max_shard_size": "45KB"}}


class Killed(BaseException):
    """As far as files go a kill: nothing is tidied up."""


SAVES = [(before, after) for before in ("nothing", "one file", "shards") for after in KINDS]
SAVES += [("one file, no manifest", "shards"), ("shards, no manifest", "one file")]


@pytest.mark.parametrize(("before", "after"), SAVES)
def test_a_save_that_is_killed_between_renames_leaves_no_mixture(old, new, tmp_path, monkeypatch, before, after):
    template, target = tmp_path / "template", tmp_path / "target"
    template.mkdir()
    kind, _, bare = before.partition(", ")
    if kind != "nothing":
        old.save_pretrained(template, **KINDS[kind])
        if bare:
            (template / MANIFEST).unlink()
    expected = {"old": old, "new": new}
    seen = []
    for last in range(100):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(template, target)
        done = changes_until(monkeypatch, last, lambda: new.save_pretrained(target, **KINDS[after]))
        seen.append(outcome(target, expected))
        if done:
            break
        if (target / ".draft" / MANIFEST).exists() and seen[-1] == "refused" and kind != "nothing":
            assert finish_save(target)
            assert outcome(target, expected) == "new" and not (target / ".draft").exists()
    assert seen[-1] == "new" and not (target / ".draft").exists() and len(seen) > 3
    # First what was there, then a refusal, then what is new: never anything else.
    order = {"nothing": 0, "old": 0, "refused": 1, "new": 2}
    assert [order[result] for result in seen] == sorted(order[result] for result in seen), seen
    assert len(list(target.glob("*.safetensors"))) == len(json.loads((target / MANIFEST).read_text())["files"]) - (
        "shards" in after
    )


def changes_until(monkeypatch, last, save):
    """Run ``save`` and stop it, as a kill would, before its ``last``-th change among finished files."""
    count = 0

    def counted(function):
        def change(*args, **kwargs):
            nonlocal count
            if count == last:
                raise Killed
            count += 1
            return function(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            save()
        except Killed:
            return False
    return True


def outcome(target, expected):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SleepForCausalLM.from_pretrained(target)
    except CheckpointError as error:
        assert "finish_save" in str(error) or "save it again" in str(error), error
        return "refused"
    except OSError:
        assert not (target / "config.json").exists()
        return "nothing"
    return next(name for name, other in expected.items() if same(model, other))


def same(first, second):
    """In weights and in how they sleep."""
    return equal(state(first), state(second)) and first.config.n_loops == second.config.n_loops


def test_a_process_that_dies_between_renames(old, tmp_path):
    """The same with a process that is gone, and a next one that saves to the same place."""
    old.save_pretrained(tmp_path / "kept", **SHARDED)

    def die_in_the_fifth_rename():
        model = sleeping(n_loops=3)
        for p in model.parameters():
            p.data += 0.25
        real, count = os.replace, 0

        def replace(*args):
            nonlocal count
            count += 1
            os._exit(9) if count == 5 else real(*args)

        os.replace = replace
        model.save_pretrained(tmp_path / "kept", **SHARDED)

    assert in_a_fork(die_in_the_fifth_rename) == 9
    with pytest.raises(CheckpointError, match=r"finish_save\('.*kept'\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    old.save_pretrained(tmp_path / "kept")
    assert equal(state(AutoModelForCausalLM.from_pretrained(tmp_path / "kept")), state(old))
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", MANIFEST,
        "modeling_sleepify.py",
    }  # fmt: skip


def test_inserted_weights_and_whole_models_take_each_others_place(base_dir, tmp_path, monkeypatch):
    model = sleepify(str(base_dir), n_loops=2, window_size=4, fast_weights=FastWeightConfig(layers=[0, 2]))
    randomise(model.fast_weights)
    expected = {"new": model}
    for alone in (True, False, True):
        for last in range(100):
            done = changes_until(
                monkeypatch, last, lambda alone=alone: model.save_pretrained(tmp_path, fast_weights_only=alone)
            )
            assert outcome(tmp_path, expected) in ("new", "refused", "nothing")
            if done:
                break
        assert (tmp_path / "fast_weights.safetensors").exists() == alone != (tmp_path / "model.safetensors").exists()


def test_processes_that_do_not_write_leave_no_trace(old, tmp_path, monkeypatch):
    old.save_pretrained(tmp_path / "a", is_main_process=False)
    old.save_pretrained(tmp_path / "a", False)
    old.save_pretrained(tmp_path / "a", is_main_process=False, fast_weights_only=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    old.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())


def test_a_set_that_many_processes_write_in_place_is_refused_until_it_is_whole(old, tmp_path):
    """As with ``distributed_checkpoint``: what was there is lost first, and cannot be mixed with what is written."""
    old.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    begin_in_place(tmp_path)
    for content in (None, weights):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="finished save.*cut short"):
            SleepForCausalLM.from_pretrained(tmp_path)
    write_manifest(tmp_path)
    assert equal(state(SleepForCausalLM.from_pretrained(tmp_path)), state(old))


def test_a_resumed_run_checks_what_it_reads(tmp_path):
    from test_resume import build, saved

    checkpoint = saved(tmp_path)
    described = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert list(described) == ["model.safetensors"]
    flip(checkpoint / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="model.safetensors.*checkpoint-2.*altered"):
        build(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train(resume_from_checkpoint=True)


def test_a_given_state_dict_is_what_is_described(old, new, tmp_path):
    old.save_pretrained(tmp_path, state_dict=state(new))
    assert equal(state(SleepForCausalLM.from_pretrained(tmp_path)), state(new))


def test_what_was_saved_before_manifests_loads_with_a_warning(old, alone, tmp_path):
    old.save_pretrained(tmp_path / "whole")
    for folder in (tmp_path / "whole", alone):
        (folder / MANIFEST).unlink()
        with pytest.warns(UserWarning, match="no sleep_manifest.json.*save it again"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_repository_is_checked_through_the_cache_of_the_hub(old, tmp_path, monkeypatch):
    """As downloads lie: blobs, and a snapshot of links to them."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--me--it" / "blobs"
    old.save_pretrained(tmp_path / "saved", **SHARDED)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "models--me--it" / "refs").mkdir()
    (tmp_path / "models--me--it" / "refs" / "main").write_text("a" * 40)
    for path in (tmp_path / "saved").iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert equal(state(SleepForCausalLM.from_pretrained("me/it", **options)), state(old))
    shard = sorted(blobs.glob("model-*.safetensors"))[-1]
    flip(shard, -1)
    with pytest.raises(CheckpointError, match=f"{shard.name} in me/it.*altered"):
        SleepForCausalLM.from_pretrained("me/it", **options)
    (snapshot / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="no sleep_manifest.json"):
        SleepForCausalLM.from_pretrained("me/it", **options)


# --- edited configurations

EDITS = {
    "another rule": (lambda c: c["fast_weights"].update(rule="mamba2"), "fast_weights.rule was 'gdn'"),
    "other layers": (lambda c: c["fast_weights"].update(layers=[1, 3]), r"fast_weights.layers was \[0, 2\]"),
    "other heads of equal shapes": (
        lambda c: c["fast_weights"].update(
            num_heads=c["fast_weights"]["num_heads"] * 2, head_dim=c["fast_weights"]["head_dim"] // 2
        ),
        "fast_weights.head_dim was",
    ),
    "another norm": (lambda c: c["fast_weights"].update(norm_eps=1e-2), "norm_eps"),
    "a field of the layers deleted": (lambda c: c["fast_weights"].pop("layers"), r"fast_weights.layers was \[0, 2\]"),
    "the layers deleted": (lambda c: c.pop("fast_weights"), "fast_weights"),
    "a setting deleted": (lambda c: c.pop("n_loops"), r"n_loops \(it was 2\) is gone"),
    "the base's identity deleted": (lambda c: c.pop("base_fingerprint"), "base_fingerprint"),
    "another base": (lambda c: c.update(base_fingerprint="0" * 64), "base_fingerprint was"),
    "the base's shape": (lambda c: c["text_config"].update(rms_norm_eps=0.5), "text_config.rms_norm_eps was"),
    "of another kind": (lambda c: c.update(fast_weights_only=not c["fast_weights_only"]), "fast_weights_only was"),
    "tied": (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings was False"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_config_that_does_not_fit_the_weights_is_refused(old, alone, tmp_path, what):
    change, words = EDITS[what]
    old.save_pretrained(tmp_path / "whole")
    for folder in (alone, tmp_path / "whole"):
        edit(folder, change)
        for verify in (True, False):
            with pytest.raises(CheckpointError, match=f"config.json.*{words}"):
                SleepForCausalLM.from_pretrained(folder, verify=verify)
        with pytest.raises(CheckpointError):
            AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=words):
        sleepify(tiny_base("qwen3", dtype=torch.float32), fast_weights=alone)


def test_how_it_sleeps_may_be_edited(old, alone, base_dir, tmp_path):
    old.save_pretrained(tmp_path / "whole")
    shutil.copytree(base_dir, tmp_path / "moved")
    free = {
        "n_loops": 5, "window_size": 3, "eviction": "sliding", "loop_range": [0, 3], "checkpoint": "loop",
        "backprop_loops": 1, "backprop_windows": 1, "check_finite": True, "dtype": "bfloat16",
        "base_model_name_or_path": str(tmp_path / "moved"), "something_of_mine": [1],
    }  # fmt: skip
    for folder in (alone, tmp_path / "whole"):
        edit(folder, lambda config: config.update(free))
        edit(folder, lambda config: config["text_config"].update(pad_token_id=1))
        (folder / "README.md").write_text("mine")
        (folder / "tokenizer.json").write_text("{}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.n_loops, model.config.window_size, model.config.eviction) == (5, 3, "sliding")
        # Written by transformers, with all its defaults.
        config = AutoConfig.from_pretrained(folder)
        config.n_loops = 6
        config.save_pretrained(folder)
        assert AutoModelForCausalLM.from_pretrained(folder).config.n_loops == 6
        assert AutoModelForCausalLM.from_pretrained(folder, n_loops=7).config.n_loops == 7


def test_a_config_that_is_handed_over_must_fit_too(old, alone, tmp_path):
    old.save_pretrained(tmp_path / "whole")
    for folder in (alone, tmp_path / "whole"):
        config = SleepConfig.from_pretrained(folder)
        config.fast_weights = FastWeightConfig(**config.fast_weights.to_dict() | {"layers": [1, 3]})
        with pytest.raises(CheckpointError, match=r"inserted layers.*\[0, 2\].*\[1, 3\]"):
            SleepForCausalLM.from_pretrained(folder, config=config)


# --- sessions


def resave(path, change, verified=True):
    """The session with its tensors or counts changed; the digest that of before, or made anew."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors, manifest = load_file(path), json.loads(metadata["sleep_cache"])
    change(tensors, manifest)
    if verified:
        manifest["tensors"] = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
        write_sealed(path, tensors, {"sleep_cache": json.dumps(manifest)})
    else:
        save_file(tensors, path, metadata=metadata)


COUNTS = {
    "another row": lambda t, m: m["counts"]["seen"].append(1),
    "more in the window than was read": lambda t, m: m["counts"].update(seen=[0, 0]),
    "more than a window": lambda t, m: m["counts"].update(open_lengths=[9, 9]),
    "keys that were not read": lambda t, m: m["counts"].update(retained=[1, 1]),
    "keys that are not there": lambda t, m: m["counts"].update(kv_lengths=[99, 99], retained=[96, 96]),
    "negative": lambda t, m: m["counts"].update(windows=[-1, 0]),
    "not a number": lambda t, m: m["counts"].update(columns="9"),
    "no counts": lambda t, m: m["counts"].pop("windows"),
    "no ids": lambda t, m: t.pop("open_ids"),
    "no keys": lambda t, m: t.pop("keys.1"),
    "no start": lambda t, m: [t.pop(name) for name in list(t) if name.startswith("start.2.")],
    "rows of the state": lambda t, m: t.update({"state.0.1.recurrent": t["state.0.1.recurrent"][:1].clone()}),
    "columns of the values": lambda t, m: t.update({"values.1": t["values.1"][:, :, 1:].contiguous()}),
    "half precision": lambda t, m: t.update({"state.0.1.recurrent": t["state.0.1.recurrent"].half()}),
    "a stranger": lambda t, m: t.update({"state.x": torch.zeros(2, 1)}),
}


@pytest.mark.parametrize("what", COUNTS)
def test_a_session_that_contradicts_itself_is_refused(old, tmp_path, what):
    path = tmp_path / "session.safetensors"
    old(tokens(2, 11)).past_key_values.save(path)
    resave(path, COUNTS[what])
    with pytest.raises(CheckpointError, match="session.safetensors"):
        SleepCache.load(path)


def test_a_missing_tensor_is_named(old, tmp_path):
    path = tmp_path / "session.safetensors"
    old(tokens(2, 11)).past_key_values.save(path)
    resave(path, lambda tensors, _: tensors.pop("state.0.1.recurrent"), verified=False)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="state.0.1.recurrent.*missing"):
            SleepCache.load(path, verify=verify)


def test_the_digest_of_a_session_can_be_left_out(old, tmp_path):
    path = tmp_path / "session.safetensors"
    cache = old(tokens(2, 11)).past_key_values
    cache.save(path)
    flip(path, -1)
    with pytest.raises(CheckpointError, match="verify=False"):
        SleepCache.load(path)
    assert repr(SleepCache.load(path, verify=False)) == repr(cache)


def test_a_seal_covers_names_kinds_and_shapes(tmp_path):
    path = tmp_path / "sealed"
    write_sealed(path, {"a": torch.zeros(2, 3), "b": torch.zeros(0)}, {"of": "mine"})
    tensors, metadata = read_tensors(path)
    assert is_sealed(tensors, metadata) and not is_sealed(tensors, metadata | {"of": "yours"})
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3)):
        assert not is_sealed(tensors | {"a": other}, metadata)
    assert not is_sealed({"c": tensors["a"], "b": tensors["b"]}, metadata)
    assert not is_sealed(tensors, {"of": "mine"})


@pytest.mark.parametrize("family", ["qwen3", "ouro", "zamba2", "gemma3_text", "jet_nemotron"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("fixed", [False, True])
def test_sound_sessions_of_every_kind_are_taken(tmp_path, family, eviction, fixed):
    """With padding, at a window's end and within, after a sleep, and with room for a whole window's keys."""
    model = sleepify(tiny_base(family, dtype=torch.float32), n_loops=2, window_size=4, eviction=eviction).eval()
    path = tmp_path / "session.safetensors"
    for length in (1, 4, 11):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, : length // 2] = 0
        cache = SleepCache(fixed_shapes=fixed)
        model(tokens(2, length), attention_mask=mask, past_key_values=cache)
        taken(cache, path)
        taken(model.sleep(cache), path)
        model(tokens(2, 3), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        taken(cache, path)


def taken(cache, path):
    cache.save(path)
    assert repr(SleepCache.load(path)) == repr(cache)


def test_a_kill_in_the_save_of_a_session_keeps_the_one_before(old, tmp_path, monkeypatch):
    path = tmp_path / "session.safetensors"
    cache = old(tokens(2, 11)).past_key_values
    cache.save(path)
    before = repr(cache)
    old(tokens(2, 3), past_key_values=cache)
    assert not changes_until(monkeypatch, 0, lambda: cache.save(path))
    assert repr(SleepCache.load(path)) == before
    cache.save(path)
    assert repr(SleepCache.load(path)) == repr(cache) and os.listdir(tmp_path) == [path.name]
