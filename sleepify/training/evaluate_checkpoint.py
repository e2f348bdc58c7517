"""A trained checkpoint, tested again: at any N and windows, on its task or data or others; and perplexity of a text.

A model that a recipe has trained on one's own data is tested on the rows that it held out; with ``--dataset`` any model
is tested on all rows of another, by distance as in `text_evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sleepify.config import SleepConfig
from sleepify.devices import device_of
from sleepify.files import written_beside
from sleepify.modeling import SleepForCausalLM
from sleepify.training.evaluate import at_window, check_image, evaluate, perplexity, plot, settings_of
from sleepify.training.model_arguments import ModelArguments, check_dtype, load_tokenizer, pad_token
from sleepify.training.runs import MERGED, TASK
from sleepify.training.settings import json_object, parse_dataclasses
from sleepify.training.sft import longest_of, reach
from sleepify.training.task_arguments import RECIPES
from sleepify.training.text_data import DatasetArguments, TextRows, TextStream, load_text
from sleepify.training.text_evaluate import evaluate_text, table


@dataclass
class EvaluateArguments:
    """What to test, and how."""

    model: str = field(metadata={"help": "Name or path of the checkpoint."})
    task: str | None = field(
        default=None, metadata={"help": f"{', '.join(RECIPES)}; by default what it was trained on, if anything."}
    )
    task_arguments: dict | str | None = field(
        default=None, metadata={"help": "Fields of the task to change, as JSON; see the recipe's --help."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Name or path; by default the model's."})
    n_loops: list[int] | None = field(default=None, metadata={"help": "Numbers of loops; by default the model's."})
    window_sizes: list[int] | None = field(default=None, metadata={"help": "Windows; by default the model's."})
    n_examples: int = field(default=1600, metadata={"help": "Held-out rows to test on."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time."})
    text_file: str | None = field(default=None, metadata={"help": "Perplexity of this text, for side effects."})
    context: int = field(default=2048, metadata={"help": "Tokens of the text that are read as one."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32 or bfloat16."})
    device: str | None = field(default=None, metadata={"help": "By default an accelerator if there is one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    plot: str | None = field(default=None, metadata={"help": "Image file for accuracy by difficulty."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        self.task_arguments = json_object("task_arguments", self.task_arguments)
        if self.text_file is not None and not Path(self.text_file).is_file():
            raise ValueError(f"expected text_file to be a file, found nothing at {self.text_file}")


def run(argv: Sequence[str] | None = None, description: str | None = None, prog: str | None = None) -> dict[str, Any]:
    """Evaluate.

    Args:
        argv: the command line without the program's name; None for that of the process.
        description, prog: for ``--help``.

    Returns:
        What goes into the JSON file.

    Raises:
        ValueError: for a field that does not exist, nothing to test on, or settings that the model cannot have.
        DatasetError: for a dataset that does not fit, before the model is loaded.
    """
    arguments, data = parse_dataclasses([EvaluateArguments, DatasetArguments], argv, description, prog=prog)
    check_whole(arguments.model)
    if arguments.plot is not None:
        check_image(arguments.plot)
    name, fields, trained_with = _task_of(arguments)
    rows = _rows(arguments, data)
    if name is None and rows is None and arguments.text_file is None:
        raise ValueError(
            f"expected a task, a dataset or a text_file: {arguments.model} has no {TASK}; give --task, --dataset or "
            "--text_file"
        )
    if name is None and arguments.plot is not None:
        raise ValueError("expected plot with a task, whose accuracy it shows; leave it out, or give --task")
    device: Any = device_of(arguments.device)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(device)
    results: dict[str, Any] = {"model": arguments.model}
    if name is not None:
        # Rows of these two tasks are ids already.
        tokenizer = (
            load_tokenizer(ModelArguments(arguments.model, tokenizer=trained_with)) if name == "gsm_inf" else None
        )
        report = evaluate(
            model,
            RECIPES[name](**fields).build(test=True, tokenizer=tokenizer),
            n_examples=arguments.n_examples,
            n_loops=arguments.n_loops,
            window_sizes=arguments.window_sizes,
            batch_size=arguments.batch_size,
            pad_id=pad_token(tokenizer),
        )
        results["report"] = json.loads(report.to_json())
        print(report.table())
        if arguments.plot is not None:
            plot(report, arguments.plot)
    if rows is not None:
        results["text"] = _by_distance(model, rows, arguments)
    if arguments.text_file is not None:
        results["perplexity"] = _perplexities(model, arguments)
        print(results["perplexity"])
    if arguments.output is not None:
        with written_beside(Path(arguments.output)) as draft:
            draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def check_whole(model: str) -> None:
    """See that what lies in a folder is no adapter whose base nobody can name, or beside which the whole model lies: a
    base that sleeps would do so as it was saved, not as the adapter was trained.

    Raises:
        ValueError: if it is; the message names the model with the adapter folded in, if there is one.
    """
    adapter, merged = Path(model) / "adapter_config.json", Path(model) / MERGED
    if not adapter.is_file() or (Path(model) / "config.json").exists():
        return
    if merged.exists():
        raise ValueError(f"expected a whole model, found an adapter in {model}; give {merged}")
    if json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") is None:
        raise ValueError(
            f"expected a whole model, found an adapter in {model} whose base has no name; load it onto its base, and "
            "save what merge_and_unload() gives"
        )


def check_sleeps(model: str) -> None:
    """See that a checkpoint is a whole model, and one that sleeps.

    Raises:
        ValueError, OSError: if it is not, or is not there.
    """
    check_whole(model)
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, SleepConfig):
        raise ValueError(f"expected a model that sleeps, got {model}, a {config.model_type}; train it with a recipe")


def _task_of(arguments: EvaluateArguments) -> tuple[str | None, dict[str, Any], str | None]:
    """Name and fields of the task, and the tokenizer: as given, else as noted beside the checkpoint."""
    changes: Any = arguments.task_arguments or {}
    noted = _noted(arguments.model)
    name = arguments.task or (noted.get("recipe") if noted.get("recipe") in RECIPES else None)
    if name is not None and name not in RECIPES:
        raise ValueError(f"expected a task among {sorted(RECIPES)}, got {name!r}")
    fields = noted["task"] if noted.get("recipe") == name and noted else {}
    if name is not None and (unknown := sorted(changes.keys() - RECIPES[name].__dataclass_fields__.keys())):
        raise ValueError(
            f"task_arguments: {name} has no {unknown}; it has {sorted(RECIPES[name].__dataclass_fields__)}"
        )
    return name, fields | changes, arguments.tokenizer or noted.get("tokenizer")


def _rows(arguments: EvaluateArguments, data: DatasetArguments) -> TextRows | None:
    """All rows of the dataset that is given, else those that the recipe held out; None if there is neither."""
    noted = _noted(arguments.model)
    seed = 0
    if data.dataset is not None:
        if data.streaming or data.held_out != DatasetArguments.held_out:
            raise ValueError(
                "expected held_out and streaming to be left out, since all rows of a dataset are tested; choose them "
                "with --dataset_split and --n_examples"
            )
        data = replace(data, held_out=0)
    elif data != DatasetArguments():
        raise ValueError("expected dataset beside what says how its rows are written, got none; give --dataset")
    elif noted.get("recipe") == "sft" and arguments.task is None:
        # The template is that of the tokenizer, which was saved with it.
        data, seed = DatasetArguments(**noted["task"] | {"chat_template": None}), noted["seed"]
        if not data.held_out:
            raise ValueError(
                f"expected rows that were held out, {arguments.model} was trained on all of {data.dataset}; give "
                "--dataset"
            )
    else:
        return None
    config: Any = AutoConfig.from_pretrained(arguments.model)
    own: tuple[Any, int | None] = reach(config) if isinstance(config, SleepConfig) else (None, longest_of(config))
    window: Any = arguments.window_sizes[0] if arguments.window_sizes else own[0] or noted.get("window_size")
    if window is None:
        raise ValueError(f"expected window_sizes, by which to tell distances: {arguments.model} does not sleep")
    tokenizer = tokenizer_of(arguments.model, arguments.tokenizer)
    text = load_text(data, tokenizer, window_size=window, positions=own[1], seed=seed)
    if text.held_out is not None:
        if noted.get("held_out") not in (None, text.held_out.digest()):
            raise ValueError(
                f"expected {data.dataset} to hold out the rows that it held out in training, got others, which may "
                "have been trained on: the data or the tokenizer has changed; give --dataset, to be tested as a whole"
            )
        return text.held_out
    assert not isinstance(text.train, TextStream)
    return text.train


def _by_distance(model: Any, rows: TextRows, arguments: EvaluateArguments) -> list[dict[str, Any]]:
    """What `evaluate_text` finds at every setting; for a model that does not sleep windows tell distances only."""
    options: dict[str, Any] = {
        "n_examples": arguments.n_examples,
        "batch_size": arguments.batch_size,
        "pad_id": pad_token(tokenizer_of(arguments.model, arguments.tokenizer)),
    }
    sleeps = isinstance(model, SleepForCausalLM)
    sizes: list[Any] = [_noted(arguments.model).get("window_size")]
    if arguments.window_sizes:
        sizes = arguments.window_sizes
    settings: list[Any] = [(None, size) for size in sizes]
    if sleeps or arguments.n_loops is not None:
        settings = settings_of(model, arguments.n_loops, arguments.window_sizes)
    found = []
    for n_loops, size in settings:
        with at_window(model, size) if sleeps else nullcontext():
            each = evaluate_text(model, rows, window_size=size, n_loops=n_loops, **options)
        found.append({"n_loops": n_loops, "window_size": size, **each})
        print(f"\n{'' if n_loops is None else f'N = {n_loops}, '}L = {size}\n\n{table(each)}")
    return found


def _noted(model: str) -> dict[str, Any]:
    """What the recipe that made a checkpoint wrote beside it; empty if none did.

    Raises:
        ValueError: for a file of that name that no recipe has written.
    """
    path = Path(model) / TASK
    if not path.exists():
        return {}
    noted = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(noted, dict) or not {"recipe", "task", "tokenizer"} <= noted.keys():
        raise ValueError(f"expected {path} to be what a recipe wrote, got another file; move it away")
    return noted


def tokenizer_of(model: str, name: str | None = None) -> Any:
    """The tokenizer of a checkpoint: ``name``, else what it was trained with, else its own; None if it has none.

    Args:
        model: name or path of the checkpoint.
        name: name or path of another tokenizer.
    """
    noted = _noted(model)
    if name is None and noted and noted["tokenizer"] is None and not (Path(model) / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(ModelArguments(model, tokenizer=name or noted.get("tokenizer")))


def _perplexities(model: Any, arguments: EvaluateArguments) -> dict[str, float]:
    tokenizer = load_tokenizer(ModelArguments(arguments.model, tokenizer=arguments.tokenizer))
    text = Path(arguments.text_file or "").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = {}
    for n_loops, size in settings_of(model, arguments.n_loops, arguments.window_sizes):
        name = f"N = {n_loops if arguments.n_loops else 'default'}"
        with nullcontext() if size is None else at_window(model, size):
            each = perplexity(model, ids, context=arguments.context, n_loops=n_loops)
        found[f"{name}, L = {size}" if arguments.window_sizes else name] = each
    return found
