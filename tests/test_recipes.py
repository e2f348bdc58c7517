"""Every configuration parses, every recipe runs, and what is misspelt is refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from families import tiny_base
from forked import Program
from transformers import AutoConfig, AutoModelForCausalLM

from sleepify import FastWeightConfig, SleepConfig, SleepForCausalLM, sleepify
from sleepify.retrofit import KEYWORDS
from sleepify.settings import Settings
from sleepify.training import evaluate_checkpoint
from sleepify.training import recipe as recipes
from sleepify.training.model_arguments import ModelArguments, build_model
from sleepify.training.recipe import parse
from sleepify.training.sleep_arguments import SleepArguments

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes"

GSM_MODELS = {
    "jet_nemotron_2b": ["hard", "n1", "n1_compute"],
    "ouro_1.4b": ["hard", "sliding_stage1", "sliding_stage2", "n1", "n1_compute", "full_attention"],
    "qwen3.5_2b": ["hard", "lora"],
    "qwen3_1.7b": ["hard", "lora", "full_attention", "sliding_attention"],
    "olmo_hybrid_7b": ["hard"],
    "gsm_inf": ["tiny", "base", "small"],
}
BASELINES = ["n1", "n1_compute", "n1_deep", "full_attention", "sliding_attention"]
CONFIGS: dict[str, str] = {
    **{f"rule110_{name}": "rule110" for name in ["t32", "small", "tiny", "base", "retrofit", *BASELINES]},
    **{f"depo_{name}": "depo" for name in ["k16", "tiny", *BASELINES]},
    **{f"hops_{name}": "hops" for name in ["base", "small", "demo", "demo_base"]},
    "sft_tiny": "sft",
    **{f"{model}_{name}": "gsm_inf" for model, names in GSM_MODELS.items() for name in names},
}
NO_GPU = ["--use_cpu", "--bf16", "False"]
# Bases that are retrofitted later do not sleep.
BASES = {"hops_base", "hops_demo_base", "rule110_base", "gsm_inf_base"}


def configured(name: str, *overrides: str) -> recipes.Recipe:
    """A configuration of ours; without its GPU, which is not here to be checked for."""
    return parse(None, [str(FOLDER / "configs" / f"{name}.yaml"), *NO_GPU, *overrides])


def test_the_configurations_are_the_expected_ones() -> None:
    found = {path.stem for path in (FOLDER / "configs").rglob("*") if path.is_file()}
    assert found == set(CONFIGS)


def test_every_recipe_has_a_script_and_every_script_a_recipe() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*recipes.KINDS, "evaluate"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_builds_its_task_and_settings(name: str) -> None:
    recipe = configured(name)
    # The file names its recipe, and the recipe's own script takes it.
    assert recipe == parse(CONFIGS[name], [str(FOLDER / "configs" / f"{name}.yaml"), *NO_GPU])
    assert recipe.name == CONFIGS[name]
    assert recipe.training.output_dir == f"outputs/{name}"
    assert recipe.training.max_steps > 0 and recipe.training.seed == 0
    settings = recipe.sleep.settings()
    assert {"n_loops", "window_size", "eviction", "loop_range"} <= settings.keys() or name in BASES
    if CONFIGS[name] in ("rule110", "depo") and recipe.model.architecture is not None:
        task, test_task = recipe.task.build(), recipe.task.build(test=True)
        assert settings.get("window_size", task.window_size) == task.window_size == test_task.window_size
        # The architecture is one that transformers knows, and sleep accepts; no weights are made.
        with torch.device("meta"):
            model = build_model(recipe.model, recipe.sleep, task.vocab_size)
        assert isinstance(model, SleepForCausalLM) == recipe.sleep.sleep
        assert model.config.get_text_config().vocab_size == task.vocab_size


def test_the_papers_settings_are_the_papers() -> None:
    """Section 3 of the paper's description: T, L, N, batch and the two learning rates."""
    for name, length, window, n_loops, batch, muon in (
        ("rule110_t32", 100, 24, 4, 512, 2e-3),
        ("depo_k16", 360, 75, 4, 128, 2e-3),
        ("jet_nemotron_2b_hard", 3300, 2000, 6, 256, 1e-3),
        ("ouro_1.4b_hard", 3300, 2000, 4, 256, 1e-3),
        ("ouro_1.4b_sliding_stage1", 3300, 512, 4, 256, 1e-3),
        ("ouro_1.4b_sliding_stage2", 3300, 512, 4, 256, 1e-3),
    ):
        recipe = configured(name)
        training, sleep = recipe.training, recipe.sleep
        longest = recipe.task.target_tokens[1] if CONFIGS[name] == "gsm_inf" else recipe.task.build().length
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert (longest, sleep.window_size, sleep.n_loops, rows) == (length, window, n_loops, batch)
        assert (training.muon_learning_rate, training.adamw_learning_rate) == (muon, 5e-5)
    stages = [configured(f"ouro_1.4b_sliding_stage{stage}") for stage in (1, 2)]
    assert [(s.sleep.eviction, s.training.train_only) for s in stages] == [("hard", "fast_weights"), ("sliding", "all")]
    assert stages[1].model.model == stages[0].training.output_dir
    assert stages[1].training.max_steps == 2 * stages[0].training.max_steps


def test_baselines_differ_from_their_model_in_what_they_say() -> None:
    for task, model in (("rule110", "t32"), ("depo", "k16")):
        own, n1, compute, deep = (configured(f"{task}_{name}") for name in (model, "n1", "n1_compute", "n1_deep"))
        assert (n1.sleep.n_loops, n1.training.max_steps) == (1, own.training.max_steps)
        assert (compute.sleep.n_loops, compute.training.max_steps) == (1, 4 * own.training.max_steps)
        layers = [recipe.model.architecture["num_hidden_layers"] for recipe in (own, deep)]
        assert layers[1] == 4 * layers[0] and deep.sleep.loop_range == [0, layers[1]]
        for name in ("full_attention", "sliding_attention"):
            recipe = configured(f"{task}_{name}")
            recipe.model.architecture |= {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
            window = recipe.task.build().window_size
            base = build_model(recipe.model, recipe.sleep, recipe.task.build().vocab_size).eval()
            ids = torch.zeros(1, 14 * window, dtype=torch.long)
            changed = ids.clone()
            changed[0, 0] = 1
            with torch.no_grad():
                logits, other = (base(rows, logits_to_keep=1).logits for rows in (ids, changed))
            # L tokens per layer is as far as sliding attention can hand anything on.
            assert torch.equal(logits, other) == (name == "sliding_attention")


def test_command_line_goes_before_file_and_file_before_what_it_extends(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    parent = os.path.relpath(FOLDER / "configs" / "rule110_tiny.yaml", tmp_path)
    lines = {
        "extends": parent,
        "n_loops": 3,
        "width": 9,
        "architecture": {"hidden_size": 16},
        "muon_learning_rate": "1e-3",
    }
    child.write_text(yaml.safe_dump(lines), encoding="utf-8")
    recipe = parse("rule110", ["--config", str(child), "--n_loops", "5", "--steps", "1", "2"])
    assert (recipe.sleep.n_loops, recipe.task.width, recipe.task.steps, recipe.sleep.window_size) == (5, 9, [1, 2], 8)
    assert recipe.model.architecture["hidden_size"] == 16 and recipe.model.architecture["num_hidden_layers"] == 2
    assert recipe.training.muon_learning_rate == 1e-3
    assert recipe.training.resume_from_checkpoint is None
    for word, meant in {"true": True, "False": None, "latest": "latest"}.items():
        assert parse("rule110", [str(child), "--resume_from_checkpoint", word]).training.resume_from_checkpoint == meant
    whole = parse("rule110", [str(child), "--architecture", '{"model_type": "qwen3"}', "--no_sleep"])
    assert whole.model.architecture == {"model_type": "qwen3"} and not whole.sleep.sleep


@pytest.mark.parametrize(
    ("lines", "argv", "message"),
    [
        ({"n_loop": 2}, [], r"child.yaml: unknown field 'n_loop' \(did you mean 'n_loops'\?\)"),
        (
            {"width": 9},
            ["--windowsize", "3"],
            r"unknown on the command line: --windowsize 3 \(did you mean 'window_size'",
        ),
        ({}, ["--architecture", "{"], "architecture: expected a JSON object"),
        ({}, ["--model", "somewhere"], "expected either model or architecture"),
        (["width"], [], "expected `field: value` lines, got list"),
        (
            {"recipe": "depo"},
            [],
            r"for the recipe rule110, got `recipe: depo` \(.*child.yaml\); it is for recipes/depo.py",
        ),
        ({}, ["--recipe", "depo"], r"for the recipe rule110, got `recipe: depo` \(the command line\)"),
        (
            {"recipe": "rule100"},
            [],
            r"one of rule110, depo, hops, gsm_inf, sft, got 'rule100' \(did you mean 'rule110'\?\)",
        ),
        ({"recipe": ["depo"]}, [], r"one of rule110, depo, hops, gsm_inf, sft, got \['depo'\]"),
        ({"learning_rate": 1e-4}, [], "muon_learning_rate and adamw_learning_rate"),
        ({"fast_weights_rule": "gnd"}, [], "rule among gdn, jet, mamba2, got 'gnd'"),
        ({"n_loops": 0}, [], "n_loops to be a whole number of at least 1, got 0"),
        ({"max_steps": 1.0}, [], r"child.yaml: expected max_steps to be a whole number, got 1.0"),
        ({"muon_learning_rate": True}, [], "expected muon_learning_rate to be a number, got True"),
        ({"steps": [1, "two"]}, [], r"expected steps to be a list, each a whole number, got \[1, 'two'\]"),
        ({"form": "other"}, [], "expected form to be one of paper, queries, got 'other'"),
        ({"output_dir": 5}, [], "expected output_dir to be text, in quotes if it looks like something else, got 5"),
        ({"save_strategy": False}, [], "expected save_strategy to be text, in quotes"),
        ({"architecture": 5}, [], "expected architecture to be a mapping or text"),
        ({"dtype": "float17"}, [], "expected dtype to be one of float32, bfloat16, got 'float17'"),
        ({"test_examples": 0}, [], "expected test_examples to be a whole number of at least 1, got 0"),
        ({"curve_examples": 0}, [], "expected curve_examples to be a whole number of at least 1, got 0"),
        ({"curve_steps": -1}, [], "expected curve_steps to be 0 or more, got -1"),
        ({"per_device_eval_batch_size": 0}, [], "expected per_device_eval_batch_size to be a whole number"),
        ({}, ["--config", "other.yaml"], "expected one YAML file, got several"),
        ({"extends": 5}, [], "expected extends to name a file beside it, got 5"),
        ({"extends": "nowhere.yaml"}, [], "expected extends to name a file beside it, got 'nowhere.yaml'"),
        (
            {"extends": "child.yaml"},
            [],
            "expected a file that does not extend itself, got .*child.yaml -> .*child.yaml",
        ),
    ],
)
def test_refuses_by_name(lines: Any, argv: list[str], message: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    if isinstance(lines, dict):
        lines = {"extends": str(FOLDER / "configs" / "rule110_tiny.yaml"), **lines}
    child.write_text(yaml.safe_dump(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse("rule110", [str(child), *argv])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_loops: [", r"child.yaml: expected YAML, got what is none: .* line 1"),
        ("n_loops: 2\nwidth: 8\nn_loops: 3\n", "expected every field once, got n_loops twice"),
        ("architecture: {hidden_size: 8, hidden_size: 16}\n", "expected every field once, got hidden_size twice"),
    ],
)
def test_what_is_no_mapping_of_fields_is_refused(text: str, message: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse("rule110", [str(child)])


def test_a_file_says_what_a_command_line_can_say(tmp_path: Path) -> None:
    """One value is a list of one; null takes a setting back, also where there must be one; numbers may be text."""
    child = tmp_path / "child.yaml"
    parent = os.path.relpath(FOLDER / "configs" / "rule110_tiny.yaml", tmp_path)
    child.write_text(
        f"extends: {parent}\nsteps: 3\ntest_n_loops: 2\nloops_schedule: 4\nmuon_learning_rate: null\nseed: null\n"
        "width: null\nadamw_learning_rate: 1e-4\nmax_grad_norm: 1\nuse_cpu: 1\n",
        encoding="utf-8",
    )
    recipe = parse(None, [str(child)])
    assert (recipe.task.steps, recipe.test.test_n_loops, recipe.training.loops_schedule) == ([3], [2], [4])
    assert (recipe.training.muon_learning_rate, recipe.training.seed, recipe.task.width) == (1e-3, 42, 24)
    assert (recipe.training.adamw_learning_rate, recipe.training.max_grad_norm) == (1e-4, 1)


@pytest.mark.parametrize("name", [*recipes.KINDS, "evaluate"])
def test_help_explains_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate_checkpoint.run(["--help"]) if name == "evaluate" else recipes.run(name, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    kinds: list[Any] = [evaluate_checkpoint.EvaluateArguments]
    if name != "evaluate":
        kinds = [recipes.KINDS[name], ModelArguments, SleepArguments, recipes.TestArguments]
    for kind in kinds:
        for field in fields(kind):
            assert f"--{field.name}" in shown and field.metadata["help"].strip()


def test_accelerate_files_are_the_expected_ones_and_load() -> None:
    kinds = {
        "cpu": "NO",
        "single_gpu": "NO",
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
        "fsdp2_two_nodes": "FSDP",
        "zero3_two_nodes": "DEEPSPEED",
    }
    names = {f"{name}.yaml" for name in kinds} | {"slurm.sh"}
    assert {path.name for path in (FOLDER / "accelerate").iterdir()} == names
    for name, kind in kinds.items():
        config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
        assert str(config.distributed_type).rsplit(".")[-1] == kind
        assert config.use_cpu == (name == "cpu") and config.num_processes == (
            1 if kind == "NO" else 8 * config.num_machines
        )
        assert config.num_machines == (2 if "two_nodes" in name else 1)
        if kind == "DEEPSPEED":
            assert config.deepspeed_config["zero_stage"] == int(name[len("zero")])
        if kind == "FSDP":
            assert config.fsdp_config["fsdp_version"] == 2


def test_documentation_runs_and_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"recipes/[\w./]+\w", text))
    assert len(paths) >= 8 and all((ROOT / path).exists() for path in paths)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "docs/training.md", "exec"), {})
    assert all(f"`{name}" in text or f"{name}`" in text for name in ("rule110_t32", "depo_k16", "qwen3.5_2b_lora"))


def test_a_file_without_a_recipe_is_for_the_script_that_is_started(tmp_path: Path) -> None:
    tiny = yaml.safe_load((FOLDER / "configs" / "rule110_tiny.yaml").read_text(encoding="utf-8"))
    small = yaml.safe_load((FOLDER / "configs" / "rule110_small.yaml").read_text(encoding="utf-8"))
    lines = {**small, **{name: value for name, value in tiny.items() if name not in ("extends", "architecture")}}
    assert lines.pop("recipe") == "rule110"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(lines), encoding="utf-8")
    assert parse("rule110", [str(path)]).name == "rule110"
    with pytest.raises(ValueError, match="expected a recipe, got none: write `recipe: NAME` into the YAML file"):
        parse(None, [str(path)])
    assert parse(None, [str(path), "--recipe=rule110"]) == parse("rule110", [str(path)])
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"extends": "mine.yaml", "recipe": "rule110"}))
    (tmp_path / "grandchild.yaml").write_text(yaml.safe_dump({"extends": "child.yaml"}))
    assert parse(None, [str(tmp_path / "grandchild.yaml")]).name == "rule110"


# A value that is not the default, for every field that says how to sleep and what to insert.
SETTINGS: dict[str, Any] = {
    "n_loops": 3,
    "window_size": 6,
    "eviction": "sliding",
    "loop_range": [1, 3],
    "checkpoint": "window",
    "auto_threshold": 0.5,
    "backprop_loops": 2,
    "backprop_windows": 1,
    "offload": True,
    "check_finite": True,
}
INSERTED: dict[str, Any] = {
    "rule": "jet",
    "num_layers": 2,
    "layers": [1, 2],
    "num_heads": 2,
    "head_dim": 4,
    "expand_v": 1.5,
    "conv_size": 3,
    "dconv_reduction": 4,
    "norm_eps": 1e-5,
}
# What a checkpoint says of itself; the base, which is the model's; and what has another name in recipes.
NOT_SETTINGS = {"model_type", "sub_configs", "is_composition", "text_config", "tie_word_embeddings", "fast_weights"}
NOT_SETTINGS |= {"fast_weights_only", "base_model_name_or_path", "base_model_revision", "base_fingerprint"}


def test_every_setting_is_a_field_of_every_recipe_and_reaches_the_model(tmp_path: Path) -> None:
    assert SETTINGS.keys() == (Settings.__annotations__.keys() | SleepConfig.__annotations__.keys()) - NOT_SETTINGS
    assert INSERTED.keys() == FastWeightConfig.__annotations__.keys()
    values = SETTINGS | {f"fast_weights_{name}": value for name, value in INSERTED.items()}
    assert SleepArguments.__dataclass_fields__.keys() == {"sleep", *values}
    model = {"extends": str(FOLDER / "configs" / "rule110_tiny.yaml"), "architecture": {"num_hidden_layers": 4}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"extends": "model.yaml"} | values), encoding="utf-8")
    words = [str(w) for n, v in values.items() for w in (f"--{n}", *(v if isinstance(v, list) else [v]))]
    for argv in ([str(tmp_path / "all.yaml")], [str(tmp_path / "model.yaml"), *words]):
        recipe = parse("rule110", argv)
        for name, value in values.items():
            assert getattr(recipe.sleep, name) == value and type(getattr(recipe.sleep, name)) is type(value), name
        config = build_model(recipe.model, recipe.sleep, 12).config
        assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
        assert config.fast_weights == FastWeightConfig(**INSERTED)
    # What is left out is not asked for, and a switch may stand alone.
    assert SleepArguments().settings() == {}
    assert parse("rule110", [str(tmp_path / "model.yaml"), "--offload", "--n_loops", "2"]).sleep.offload is True


def test_every_setting_that_sleepify_takes_is_one(tmp_path: Path) -> None:
    """What tells whether a field is for users is what the function takes."""
    assert KEYWORDS - {"fast_weights", "base_model_revision"} == SETTINGS.keys()
    for name in {"fast_weights_only", "text_config", "base_fingerprint"}:
        with pytest.raises(ValueError, match=f"unknown on the command line: --{name}"):
            parse("rule110", [str(FOLDER / "configs" / "rule110_tiny.yaml"), f"--{name}", "1"])


# --- runs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each recipe's two steps: the script of one behind the launcher, as a user starts it, of the others by itself."""
    folder = tmp_path_factory.mktemp("outputs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "accelerate/cpu.yaml")]
    for name in ("rule110", "depo", "gsm_inf"):
        script, tiny = FOLDER / f"{name}.py", str(FOLDER / "configs" / f"{name}_tiny.yaml")
        words = [tiny, "--output_dir", str(folder / name), "--seed", "1"]
        if name == "rule110":
            run = subprocess.run(
                [*launch, str(script), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            code, shown = run.returncode, run.stdout + run.stderr
        else:
            program = Program.script(script, words, folder / f"{name}.log", folder)
            code, shown = program.wait(), program.said()
        assert code == 0, f"{name}: {shown}"
        assert "Muon: " in shown and "| N = 2, L = " in shown
    return folder


@pytest.mark.parametrize("name", ["rule110", "depo", "gsm_inf"])
def test_recipe_trains_saves_and_reports(name: str, outputs: Path) -> None:
    folder = outputs / name
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {row["n_loops"] for row in report["scores"]} == {1, 2}
    assert (folder / "report.png").stat().st_size > 0
    assert json.loads((folder / "task.json").read_text(encoding="utf-8"))["recipe"] == name
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), SleepForCausalLM)


@pytest.mark.parametrize("name", ["rule110", "gsm_inf"])
def test_evaluate_finds_the_task_again(name: str, outputs: Path, tmp_path: Path) -> None:
    argv = ["--model", str(outputs / name), "--n_loops", "1", "2", "--n_examples", "8", "--device", "cpu"]
    files = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    results = evaluate_checkpoint.run([*argv, *files])
    trained = json.loads((outputs / name / "report.json").read_text(encoding="utf-8"))
    assert results["report"]["scores"] == trained["scores"]
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == results
    assert (tmp_path / "out.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"task_arguments: \w+ has no \['widht'\]"):
        evaluate_checkpoint.run([*argv, "--task_arguments", '{"widht": 9}'])
    for words, message in (
        (["--task_arguments", "[1]"], r"task_arguments: expected a JSON object, got '\[1\]'"),
        (["--dtype", "float17"], "expected dtype to be one of float32, bfloat16, got 'float17'"),
        (["--text_file", "nowhere.txt"], "expected text_file to be a file, found nothing at nowhere.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_checkpoint.run([*argv, *words])


def test_evaluate_gives_the_perplexity_of_a_text(outputs: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The number of 5 equals 3 . " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match="give --task, --dataset or --text_file"):
        evaluate_checkpoint.run(["--model", str(save_base(tmp_path / "base"))])
    argv = ["--model", str(outputs / "gsm_inf"), "--task", "gsm_inf", "--n_examples", "1", "--device", "cpu"]
    extra = ["--tokenizer", "words", "--text_file", str(text), "--context", "40", "--n_loops", "1", "2"]
    found = evaluate_checkpoint.run([*argv, *extra])["perplexity"]
    assert found.keys() == {"N = 1", "N = 2"} and all(value > 1 for value in found.values())
    # Windows are those that were asked for.
    by_window = evaluate_checkpoint.run([*argv, *extra, "--window_sizes", "8", "40"])["perplexity"]
    assert by_window.keys() == {f"N = {n}, L = {size}" for n in (1, 2) for size in (8, 40)}
    assert by_window["N = 1, L = 8"] != by_window["N = 1, L = 40"] == by_window["N = 2, L = 40"]


# --- models


def save_base(folder: Path, family: str = "qwen3") -> Path:
    """A tiny base model on disk."""
    tiny_base(family, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_a_sleeping_checkpoint_goes_on_with_other_settings(tmp_path: Path) -> None:
    """As the second stage of the sliding recipe does."""
    sleepify(tiny_base("ouro", dtype=torch.float32), n_loops=2, window_size=8).save_pretrained(tmp_path)
    settings = SleepArguments(n_loops=3, window_size=6, eviction="sliding", loop_range=[0, 4], checkpoint="loop")
    model = build_model(ModelArguments(model=str(tmp_path)), settings)
    assert isinstance(model, SleepForCausalLM)
    config = model.config
    assert (config.n_loops, config.window_size, config.eviction, config.checkpoint) == (3, 6, "sliding", "loop")
    with pytest.raises(ValueError, match="sleeps already has its layers"):
        build_model(ModelArguments(model=str(tmp_path)), SleepArguments(fast_weights_num_layers=2))


def test_the_revision_of_the_base_is_noted(tmp_path: Path) -> None:
    """So that inserted weights saved alone find the base that they were trained on."""
    arguments = ModelArguments(model=str(save_base(tmp_path)), model_revision="v1.2")
    assert build_model(arguments, SleepArguments()).config.base_model_revision == "v1.2"


@pytest.fixture
def recipe_in_process(tmp_path: Path) -> Iterator[Any]:
    """Run rule110's tiny recipe here, with changes."""

    def run(**changes: Any) -> Path:
        lines = {
            "extends": str(FOLDER / "configs" / "rule110_tiny.yaml"),
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        config = tmp_path / "changed.yaml"
        config.write_text(yaml.safe_dump(lines), encoding="utf-8")
        recipes.run("rule110", [str(config)])
        return tmp_path / "out"

    yield run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, False),
        ({"window_size": 6}, True),
        ({"width": 12}, True),
        ({"sleep": False, "test_n_loops": None, "width": 12}, False),
    ],
)
def test_windows_that_the_text_does_not_fill_are_told(
    recipe_in_process: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: bool
) -> None:
    recipe_in_process(max_steps=1, test_examples=4, **changes)
    told = [record.getMessage() for record in caplog.records if "fills windows" in record.getMessage()]
    assert bool(told) == said
    if said:
        text, model = changes.get("width", 8), changes.get("window_size", 8)
        assert f"windows of {text} tokens, and the model's have {model}" in told[0]
        assert f"window_size: {text}" in told[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sleep": False}, "expected a sleeping model to choose n_loops and window_sizes of"),
        ({"test_n_loops": [2, 0]}, "n_loops"),
        ({"test_window_sizes": [-8]}, "window_sizes"),
    ],
)
def test_what_cannot_be_tested_is_refused_before_the_training(
    recipe_in_process: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_in_process(**changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_lora_trains_inserted_layers_whole_and_folds_into_a_loadable_model(
    recipe_in_process: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    out = recipe_in_process(
        architecture=None, model=str(base), tokenizer="words", loop_range=None, fast_weights_num_layers=1, lora_r=4
    )
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"] == 8
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    moved = {
        name.removeprefix("language_model."): not torch.equal(parameter, before[name.removeprefix("language_model.")])
        for name, parameter in merged.named_parameters()
        if name.startswith("language_model.")
    }
    # Two steps: adapters start at zero, so that the second step is the first to move what they multiply.
    assert moved["model.layers.0.self_attn.q_proj.weight"] and moved["model.layers.3.mlp.down_proj.weight"]
    assert not any(changed for name, changed in moved.items() if "norm" in name or "embed" in name or "lm_head" in name)
    assert any(
        parameter.abs().sum() > 0 for name, parameter in merged.fast_weights.named_parameters() if "o_proj" in name
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = evaluate_checkpoint.run(["--model", str(out / "merged"), "--n_loops", "1", "2", "--n_examples", "8"])
    assert found["report"]["scores"] == report["scores"]


def test_a_base_without_sleep_is_trained_by_the_same_recipe(recipe_in_process: Any) -> None:
    sliding = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 8}
    sliding |= {"use_sliding_window": True}
    out = recipe_in_process(architecture=sliding, sleep=False, test_n_loops=None)
    assert AutoConfig.from_pretrained(out).model_type == "qwen3"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {(row["n_loops"], row["window_size"]) for row in report["scores"]} == {(1, None)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lora_alpha": 32.0, "lora_targets": ["q_proj"]},
            "expected lora_r, a rank, with lora_alpha, lora_targets, got",
        ),
        ({"lora_dropout": 0.1}, "expected lora_r, a rank, with lora_dropout, got none"),
    ],
)
def test_a_setting_of_a_model_that_would_do_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(model="mine", **given)
