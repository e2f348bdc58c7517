"""A trained checkpoint, tested again: at any N and windows, on its own task or another; and perplexity of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sleepify.files import written_beside
from sleepify.training.evaluate import evaluate, perplexity, plot
from sleepify.training.model_arguments import ModelArguments, load_tokenizer, pad_token
from sleepify.training.recipe import TASK
from sleepify.training.settings import parse_dataclasses
from sleepify.training.task_arguments import RECIPES


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


def run(argv: Sequence[str] | None = None, description: str | None = None) -> dict[str, Any]:
    """Evaluate.

    Args:
        argv: the command line without the program's name; None for that of the process.
        description: for ``--help``.

    Returns:
        What goes into the JSON file.

    Raises:
        ValueError: for a field that does not exist, or nothing to test on.
    """
    (arguments,) = parse_dataclasses([EvaluateArguments], argv, description)
    name, fields, trained_with = _task_of(arguments)
    if name is None and arguments.text_file is None:
        raise ValueError(f"expected a task or a text_file: {arguments.model} has no {TASK}; give --task or --text_file")
    device: Any = arguments.device or (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    )
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
    if arguments.text_file is not None:
        results["perplexity"] = _perplexities(model, arguments)
        print(results["perplexity"])
    if arguments.output is not None:
        with written_beside(Path(arguments.output)) as draft:
            draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _task_of(arguments: EvaluateArguments) -> tuple[str | None, dict[str, Any], str | None]:
    """Name and fields of the task, and the tokenizer: as given, else as noted beside the checkpoint."""
    given = arguments.task_arguments or {}
    changes: dict[str, Any] = json.loads(given) if isinstance(given, str) else given
    noted = _noted(arguments.model)
    name = arguments.task or noted.get("recipe")
    if name is not None and name not in RECIPES:
        raise ValueError(f"expected a task among {sorted(RECIPES)}, got {name!r}")
    fields = noted["task"] if noted.get("recipe") == name and noted else {}
    if name is not None and (unknown := sorted(changes.keys() - RECIPES[name].__dataclass_fields__.keys())):
        raise ValueError(
            f"task_arguments: {name} has no {unknown}; it has {sorted(RECIPES[name].__dataclass_fields__)}"
        )
    return name, fields | changes, arguments.tokenizer or noted.get("tokenizer")


def _noted(model: str) -> dict[str, Any]:
    """What the recipe that made a checkpoint wrote beside it; empty if none did."""
    path = Path(model) / TASK
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
    loops: list[int | None] = [*arguments.n_loops] if arguments.n_loops else [None]
    return {f"N = {n or 'default'}": perplexity(model, ids, context=arguments.context, n_loops=n) for n in loops}
