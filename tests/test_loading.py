"""Checkpoints elsewhere: loaded by tools that know nothing of sleepify, described by their cards, pushed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import tiny_base, tokens
from huggingface_hub import ModelCard
from small import sleeping
from transformers import AutoConfig, AutoModelForCausalLM

from sleepify import SleepConfig, SleepForCausalLM, checkpoints, sleepify
from sleepify.card import write_card

LOADER = "modeling_sleepify.py"
ROOT = Path(__file__).resolve().parent.parent
# Written apart, as in test_package: the package itself never says it.
TRUST = {"trust_remote" + "_code": True}
STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "sleepify" not in sys.modules
for path in sys.argv[2:]:
    # Nobody is trusted: an error, and not the base.
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except ValueError as error:
        assert "custom code" in str(error), error
    else:
        raise SystemExit("loaded")
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, **json.loads(sys.argv[1])).eval()
    assert type(model).__module__ == "sleepify.modeling", type(model)
    with torch.no_grad():
        print("\\nsaid", model(torch.arange(3, 15)[None]).logits.sum().item())
"""
WITHOUT = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sleepify":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from transformers import AutoModelForCausalLM
def said(path, **keywords):
    try:
        AutoModelForCausalLM.from_pretrained(path, **keywords)
    except Exception as error:
        return type(error).__name__, str(error)
for path in sys.argv[2:]:
    print("\\nsaid", json.dumps([said(path, **json.loads(sys.argv[1])), said(path)]))
"""


def run(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """In a fresh process, whose copies of loader files are its own."""
    environment = os.environ | {"HF_MODULES_CACHE": str(cwd / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, stdin=subprocess.DEVNULL
    )


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What the code has to say, without the questions of transformers in between."""
    return [line.removeprefix("said ") for line in done.stdout.splitlines() if line.startswith("said ")]


@pytest.fixture
def both(tmp_path):
    """A whole checkpoint and one of inserted weights alone."""
    tiny_base("qwen3", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = sleeping(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "small", fast_weights_only=True)
    return model, [tmp_path / "whole", tmp_path / "small"]


# --- without ceremony


@pytest.mark.flow("`trust_remote_code`")
def test_a_tool_that_may_trust_loads_it_without_importing_sleepify(both, tmp_path):
    model, paths = both
    with torch.no_grad():
        expected = model(torch.arange(3, 15)[None]).logits.sum().item()
    done = run(STRANGER, json.dumps(TRUST), *map(str, paths), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in said(done)] == [expected, expected]
    for path in paths:
        code = (path / LOADER).read_text()
        assert len(code.splitlines()) < 10 and "class " not in code and "from sleepify import" in code
        assert json.loads((path / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "modeling_sleepify.SleepConfig",
            "AutoModelForCausalLM": "modeling_sleepify.SleepForCausalLM",
        }


@pytest.mark.flow("without sleepify installed")
def test_where_sleepify_is_missing_the_error_names_it(both, tmp_path):
    _, paths = both
    done = run(WITHOUT, json.dumps(TRUST), *map(str, paths), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(said(done)) == len(paths)
    for trusted, nobody in map(json.loads, said(done)):
        assert "pip install sleepify" in trusted[1], trusted
        # Nobody is trusted: as ever, an error and not the base.
        assert nobody[0] == "ValueError", nobody


@pytest.mark.flow("`import sleepify`, Auto classes")
def test_with_sleepify_nobody_has_to_be_trusted_and_nothing_is_copied(both, tmp_path, monkeypatch):
    model, (whole, small) = both
    for keywords in ({}, TRUST):
        again = AutoModelForCausalLM.from_pretrained(whole, **keywords)
        assert type(again) is SleepForCausalLM and type(AutoConfig.from_pretrained(whole, **keywords)) is SleepConfig
        again.save_pretrained(tmp_path / "again")
        assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in whole.iterdir())
        assert (tmp_path / "again" / LOADER).read_text() == (whole / LOADER).read_text()
    # What transformers does to a class that it found by a checkpoint's file.
    for owner in (SleepConfig, SleepForCausalLM):
        owner.register_for_auto_class()
        assert not owner.is_remote_code()
    config = AutoConfig.from_pretrained(small)
    assert config.auto_map == {} and SleepConfig().auto_map == {}
    config = SleepConfig(text_config=model.language_model.config, window_size=8)
    assert type(AutoModelForCausalLM.from_config(config)) is SleepForCausalLM


def test_transformers_knows_the_architecture_by_name(both):
    _, (whole, _) = both
    (name,) = json.loads((whole / "config.json").read_text())["architectures"]
    again = getattr(transformers, name).from_pretrained(whole)  # as its server does
    assert type(again) is SleepForCausalLM


# --- cards


def card_of(path: Path) -> ModelCard:
    return ModelCard.load(path / "README.md")


def test_the_card_tells_base_relation_licence_and_results(tmp_path):
    config = sleepify(tiny_base("jet_nemotron"), window_size=8).config
    config.base_model_name_or_path = "someone/jet"
    results = {"task": "depo", "perplexity": 3.5, "exact_match": 0.25, "by_distance": {"0-8": 2.0}, "seeds": [1]}
    data = ModelCard(write_card(config, "me/jet-asleep", results, tags=["mine"])).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("someone/jet", "finetune")
    assert data.license == "other" and data.license_name and data.license_link.startswith("https://")
    assert data.model_name == "jet-asleep" and {"sleepify", "mine"} <= set(data.tags)
    metrics = {each.metric_name: each.metric_value for each in data.eval_results}
    assert metrics == {"perplexity": 3.5, "exact_match": 0.25, "by_distance/0-8": 2.0}
    text = write_card(config, "me/jet-asleep", results)
    assert "from_pretrained('me/jet-asleep')" in text and "| exact_match | 0.25 |" in text and "this/repo" not in text
    config.fast_weights_only = True
    assert ModelCard(write_card(config, "me/jet")).data.to_dict()["base_model_relation"] == "adapter"


def test_a_local_base_is_no_link_and_its_card_tells_the_licence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for base in ("base", "runs/base"):
        tiny_base("qwen3", dtype=torch.float32).save_pretrained(base)
        head = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
        (Path(base) / "README.md").write_text(head)
        model = sleepify(AutoModelForCausalLM.from_pretrained(base), window_size=8)
        model.save_pretrained(f"{base}-asleep")
        card = card_of(Path(f"{base}-asleep"))
        assert "huggingface.co" not in card.content and "base_model" not in card.data.to_dict()
        assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "mine", "LICENSE")
    assert not card.data.eval_results
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "results.json").write_text('{"perplexity": 2.0}')
    model.save_pretrained("new")
    assert [each.metric_value for each in card_of(tmp_path / "new").data.eval_results] == [2.0]


def test_the_example_of_a_card_runs(both, tmp_path, monkeypatch, capsys):
    _, paths = both
    monkeypatch.chdir(tmp_path)
    for path in paths:
        code = (path / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert str(path) in code
        exec(compile(code, str(path), "exec"), {"__name__": "card"})
        assert "tensor" in capsys.readouterr().out


# --- pushing


def test_push_to_hub_takes_what_transformers_takes(both, tmp_path, monkeypatch):
    _, (whole, _) = both
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **keywords):
            calls.update(keywords)
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls["branch"] = (repo_id, branch, exist_ok)

        def upload_folder(self, *, folder_path, **keywords):
            calls.update(keywords, files={path.name for path in Path(folder_path).iterdir()})
            calls["card"] = (Path(folder_path) / "README.md").read_text()
            return "commit"

    monkeypatch.setattr(checkpoints, "HfApi", Api)
    (whole / "results.json").write_text('{"exact_match": 0.5}')
    model = SleepForCausalLM.from_pretrained(whole)
    said = {"commit_message": "m", "commit_description": "d", "create_pr": True, "revision": "b", "token": "t"}
    assert model.push_to_hub("asleep", private=True, tags=["x"], max_shard_size="1GB", **said) == "commit"
    assert said.items() <= calls.items() and calls["private"] is True and calls["branch"] == ("me/asleep", "b", True)
    assert LOADER in calls["files"] and "from_pretrained('me/asleep')" in calls["card"]
    data = ModelCard(calls["card"]).data
    assert "x" in data.tags and data.eval_results[0].metric_value == 0.5
    # The same by save_pretrained.
    calls.clear()
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="other", commit_message="now", private=False)
    assert (calls["repo_id"], calls["commit_message"], calls["private"]) == ("me/other", "now", False)
    assert torch.equal(
        SleepForCausalLM.from_pretrained(tmp_path / "out")(tokens(1, 9)).logits, model(tokens(1, 9)).logits
    )


HOLDER = """
import sys, types
import transformers
held = types.ModuleType("transformers")
sys.modules["holder"] = types.ModuleType("holder")
sys.modules["holder"].transformers = held
import sleepify
assert held.SleepForCausalLM is transformers.SleepForCausalLM is sleepify.SleepForCausalLM
"""


def test_whoever_holds_an_earlier_copy_of_transformers_finds_the_architecture(tmp_path):
    """transformers' server does: loading a configuration that is not its own imports transformers a second time."""
    done = run(HOLDER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
