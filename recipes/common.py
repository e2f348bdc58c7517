"""What the recipes share: arguments, the model, and a run from training to the report.

A recipe is started with a YAML file, and every field of it, or any other, can be changed on the command line:

    accelerate launch recipes/rule110.py recipes/configs/rule110_t32.yaml --n_loops 2
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sleepify import FastWeightConfig, SleepConfig, sleepify
from sleepify.defaults import resolve
from sleepify.tasks.gsm_infinite import PETS, THEMES, WordTokenizer
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.data import SleepCollator, Task, TaskDataset
from sleepify.training.evaluate import Report, evaluate, plot
from sleepify.training.trainer import SleepTrainer

REPORT = "report.json"
TASK = "task.json"
MERGED = "merged"


@dataclass
class ModelArguments:
    """Which model; exactly one of ``model`` and ``architecture``."""

    model: str | None = field(
        default=None, metadata={"help": "Name or path of a base model, or of a sleeping one to go on with."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the model's own configuration to change, as JSON."}
    )
    architecture: dict | str | None = field(
        default=None,
        metadata={
            "help": "A model with random weights instead: a configuration of transformers as JSON, with its "
            "model_type, or the name of a model whose configuration to take. The task fills in vocab_size."
        },
    )
    embedding_std: float | None = field(
        default=None, metadata={"help": "Of a new architecture's embeddings at the start; by default the family's."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or path, by default the model's; 'words' for one made on the spot."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; by default the base's."}
    )
    lora_r: int = field(
        default=0, metadata={"help": "Rank of LoRA on a frozen base, trained together with what is inserted; 0: none."}
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "Scale of LoRA, over its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the base's linear layers to adapt; by default all but its head."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.architecture is None):
            raise ValueError(f"expected either model or architecture, got {self.model!r} and {self.architecture!r}")
        self.model_config = _as_dict("model_config", self.model_config)
        if self.model_config and self.architecture is not None:
            raise ValueError("model_config changes a pretrained model's configuration; write it into architecture")
        if isinstance(self.architecture, str) and self.architecture.lstrip().startswith("{"):
            self.architecture = _as_dict("architecture", self.architecture)


@dataclass
class SleepArguments:
    """How it sleeps; what is left out is sleepify's default, or what the checkpoint says."""

    sleep: bool = field(
        default=True, metadata={"help": "False: the base as it is, for baselines; N, L and the like are then not used."}
    )
    n_loops: int | None = field(default=None, metadata={"help": "N, passes over a full window."})
    window_size: int | None = field(default=None, metadata={"help": "L, tokens in a window."})
    eviction: str | None = field(default=None, metadata={"help": "hard or sliding."})
    loop_range: list[int] | None = field(default=None, metadata={"help": "Looped layers: first, and last plus one."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Recompute activations per window or loop; or none."}
    )
    backprop_loops: int | None = field(
        default=None, metadata={"help": "Gradient through the last so many passes only."}
    )
    backprop_windows: int | None = field(
        default=None, metadata={"help": "Gradient through the last so many sleeps only."}
    )
    check_finite: bool | None = field(default=None, metadata={"help": "Look for NaN in the state after each sleep."})
    fast_weights_rule: str | None = field(default=None, metadata={"help": "Of inserted layers: gdn, jet or mamba2."})
    fast_weights_num_layers: int | None = field(default=None, metadata={"help": "How many to insert, evenly spaced."})
    fast_weights_layers: list[int] | None = field(default=None, metadata={"help": "After which layers instead."})
    fast_weights_num_heads: int | None = field(default=None, metadata={"help": "Their heads."})
    fast_weights_head_dim: int | None = field(default=None, metadata={"help": "Their width of a key."})
    fast_weights_expand_v: float | None = field(default=None, metadata={"help": "Their values' width over the keys'."})
    fast_weights_conv_size: int | None = field(default=None, metadata={"help": "Taps of their short convolution."})

    def settings(self) -> dict[str, Any]:
        """What was given, as keywords of `sleepify`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sleep"}
        given = {name: value for name, value in values.items() if value is not None}
        prefix = "fast_weights_"
        inserted = {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}
        if inserted:
            given["fast_weights"] = FastWeightConfig(**inserted)
        return given


@dataclass
class TestArguments:
    """The test after training."""

    test_examples: int = field(default=1600, metadata={"help": "Held-out rows to test on (the paper: 1,600)."})
    test_n_loops: list[int] | None = field(default=None, metadata={"help": "Numbers of loops to test; default: N."})
    test_window_sizes: list[int] | None = field(default=None, metadata={"help": "Windows to test; default: L."})


class TaskArguments(Protocol):
    """What a recipe's own dataclass gives: its task, from its fields."""

    def build(self, test: bool = False, tokenizer: Any = None) -> Task:
        """The task to train on, or to test on where that differs."""


@dataclass
class Recipe:
    """A parsed command line: the task's own arguments, and those of every recipe."""

    task: TaskArguments
    model: ModelArguments
    sleep: SleepArguments
    test: TestArguments
    training: SleepTrainingArguments


@dataclass(frozen=True)
class Result:
    """What a run returns to a caller in the same process.

    Args:
        report: of the test.
        train_steps: optimiser steps that this process made.
        train_seconds: wall time of them.
        cpu_seconds: processor time of them; on a busy machine the better measure of work on the CPU.
    """

    report: Report
    train_steps: int
    train_seconds: float
    cpu_seconds: float


# --- arguments --------------------------------------------------------------------------------------------------------


def parse(task_arguments: type, argv: Sequence[str] | None, description: str | None) -> Recipe:
    """Command line to arguments; ``argv`` without the program's name, None for that of the process.

    Raises:
        ValueError: for a field, in the YAML file or on the command line, that does not exist.
    """
    types = [task_arguments, ModelArguments, SleepArguments, TestArguments, SleepTrainingArguments]
    return Recipe(*parse_dataclasses(types, argv, description))


def parse_dataclasses(types: Sequence[type], argv: Sequence[str] | None, description: str | None) -> tuple[Any, ...]:
    """As `parse`, for any dataclasses."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "--config")
    parser = _Parser(types, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of fields; it may also come first, without --config.")
    known = sorted({f.name for kind in types for f in fields(kind)})
    given, _ = parser.parse_known_args(arguments)
    if given.config is not None:
        parser.set_defaults(**load_config(given.config, known))
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown on the command line: {' '.join(unknown)}{_suggest(name, known)}; see --help")
    return tuple(parsed)


class _Parser(HfArgumentParser):
    """transformers' parser; it takes every field that may be a bool for nothing else, which loses words like "all"."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("nargs") == "?" and isinstance(options.get("default"), str):
            options["type"] = str
        return super().add_argument(*names, **options)


def load_config(path: str | Path, known: Sequence[str]) -> dict[str, Any]:
    """The fields in a YAML file, after those of the file that it ``extends`` (a path relative to its own).

    Raises:
        ValueError: for a file that is no mapping, or a field that is not ``known``, by name.
    """
    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    parent = values.pop("extends", None)
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown field {name!r}{_suggest(str(name), known)}")
    return values if parent is None else _merge(load_config(path.parent / parent, known), values)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, mappings field by field; an architecture with its own model_type is whole as it is."""
    merged = old | new
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict) and "model_type" not in new[name]:
            merged[name] = _merge(old[name], new[name])
    return merged


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _as_dict(name: str, value: dict | str | None) -> dict[str, Any] | None:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object, got {value!r} ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name}: expected a JSON object, got {value!r}")
    return parsed


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(arguments: ModelArguments, sleep: SleepArguments, vocab_size: int | None = None) -> PreTrainedModel:
    """The model to train: loaded or from random weights, sleeping unless told not to, with LoRA if asked for."""
    settings = sleep.settings()
    options = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.architecture is not None:
        model = AutoModelForCausalLM.from_config(_architecture(arguments.architecture, vocab_size), **options)
        if arguments.embedding_std is not None:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=arguments.embedding_std)
    else:
        config = AutoConfig.from_pretrained(
            arguments.model, revision=arguments.model_revision, **(arguments.model_config or {})
        )
        if isinstance(config, SleepConfig):
            config, settings = _change(config, settings), {}
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, config=config, revision=arguments.model_revision, **options
        )
    if sleep.sleep and not isinstance(model.config, SleepConfig):
        model = sleepify(model, **settings)
    return add_lora(model, arguments) if arguments.lora_r else model


def _architecture(architecture: dict | str, vocab_size: int | None) -> Any:
    if isinstance(architecture, str):
        return AutoConfig.from_pretrained(architecture)
    values = dict(architecture)
    if "model_type" not in values:
        raise ValueError(f"architecture: expected a model_type among its fields, got {sorted(values)}")
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _change(config: SleepConfig, settings: dict[str, Any]) -> SleepConfig:
    """A sleeping checkpoint's configuration with other settings; its layers stay."""
    if fixed := sorted(settings.keys() & {"fast_weights"}):
        raise ValueError(f"a model that sleeps already has its layers; leave out {fixed}")
    for name, value in settings.items():
        setattr(config, name, value)
    config.validate_sleep()
    return resolve(config)


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> Any:
    """LoRA on the base, frozen; inserted layers are trained whole and saved beside the adapters."""
    import peft

    inserted = [f"fast_weights.{place}" for place in range(len(getattr(model, "fast_weights", [])))]
    config = peft.LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_targets or "all-linear",
        exclude_modules=r"fast_weights\..*",
        modules_to_save=inserted or None,
    )
    # Without a task type peft hands all arguments through, n_loops among them.
    return peft.get_peft_model(model, config)


# --- run --------------------------------------------------------------------------------------------------------------


def run(name: str, task_arguments: type, argv: Sequence[str] | None, description: str | None) -> Result:
    """A whole recipe: build the model, train, save, test by difficulty; the report goes beside the checkpoint.

    Args:
        name: of the recipe, by which evaluate.py finds the task again.
        task_arguments: the recipe's own dataclass.
        argv: the command line without the program's name; None for that of the process.
        description: for ``--help``.
    """
    recipe = parse(task_arguments, argv, description)
    training = recipe.training
    set_seed(training.seed)
    tokenizer = load_tokenizer(recipe.model)
    task, test_task = (recipe.task.build(test, tokenizer) for test in (False, True))
    pad_id = pad_token(tokenizer)
    model = build_model(recipe.model, recipe.sleep, getattr(task, "vocab_size", None) or len(tokenizer))
    trainer = SleepTrainer(
        model=model,
        args=training,
        train_dataset=TaskDataset(task),
        data_collator=SleepCollator(pad_id),
        processing_class=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    trainer.save_model()
    report = evaluate(
        trainer.model_wrapped,
        test_task,
        n_examples=recipe.test.test_examples,
        n_loops=recipe.test.test_n_loops,
        window_sizes=recipe.test.test_window_sizes,
        batch_size=training.per_device_eval_batch_size,
        pad_id=pad_id,
    )
    if trainer.is_world_process_zero():
        output = Path(training.output_dir)
        write_report(report, output / REPORT)
        described = {"recipe": name, "task": asdict(recipe.task), "tokenizer": recipe.model.tokenizer}
        folders = [output]
        if recipe.model.lora_r:
            # The adapters are saved already; a model with them folded in is one that anything can load.
            model.merge_and_unload().save_pretrained(output / MERGED)
            folders.append(output / MERGED)
        for folder in folders:
            (folder / TASK).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return Result(report, trainer.state.global_step, seconds, cpu_seconds)


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The tokenizer, or None for a model from random weights that was given none."""
    name = arguments.tokenizer or arguments.model
    if name == "words":
        return WordTokenizer([*THEMES, PETS])
    return None if name is None else AutoTokenizer.from_pretrained(name, revision=arguments.model_revision)


def pad_token(tokenizer: Any) -> int:
    """What to pad with: attention never sees it, so any token will do."""
    return next((i for name in ("pad", "eos") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None), 0)


def write_report(report: Report, path: Path) -> None:
    """The JSON, a plot of the same name, and the table on the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json() + "\n", encoding="utf-8")
    plot(report, path.with_suffix(".png"))
    print(report.table())
