"""Fine-tuning on one's own data: from a dataset to a model in ``output_dir`` and ``results.json`` beside it, and
``task.json``, by which `sleepify evaluate` tests it again.

What can be wrong with a dataset is said before a model is loaded.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from sleepify.config import SleepConfig
from sleepify.defaults import MAX_DEFAULT_WINDOW, resolve
from sleepify.training.evaluate import settings_of
from sleepify.training.fitting import Spent, fit, setting_up, trainer_of, write_notes
from sleepify.training.model_arguments import (
    build_model,
    load_tokenizer,
    new_architecture,
    pad_token,
    pretrained_config,
)
from sleepify.training.runs import TASK
from sleepify.training.text_data import DatasetArguments, TextData, TextRows, TextStream, load_text
from sleepify.training.text_evaluate import evaluate_text, table
from sleepify.training.text_format import DatasetError

if TYPE_CHECKING:
    from sleepify.training.recipe import Recipe

logger = logging.getLogger(__name__)
RESULTS = "results.json"


def run(recipe: Recipe, data: DatasetArguments) -> tuple[Spent, dict[str, Any]]:
    """Train on a dataset, save, test on its held-out rows.

    Returns:
        What was spent on the training, and what is written to ``results.json``, which says that too.

    Raises:
        DatasetError: for a dataset that does not fit, see `load_text`.
        SetupError: for a model or a setting that cannot be.
    """
    training = recipe.training
    with setting_up():
        if recipe.test.test_window_sizes is not None:
            raise ValueError("expected test_window_sizes to be left out: distances are told by the model's own window")
        if data.streaming and training.max_steps <= 0:
            raise DatasetError("expected max_steps with streaming, since nobody knows how long the data is")
        set_seed(training.seed)
        tokenizer = load_tokenizer(recipe.model)
        window_size, positions = _reach(recipe, tokenizer)
        with training.main_process_first(desc="tokenise"):
            text = load_text(
                data,
                tokenizer,
                window_size=window_size,
                positions=positions,
                batch_size=training.per_device_train_batch_size,
                seed=training.seed,
            )
        if isinstance(text.train, TextStream):
            text.train.check_workers(training.dataloader_num_workers)
        if training.train_sampling_strategy == "random":
            training.train_sampling_strategy = "group_by_length"
        model: Any = build_model(recipe.model, recipe.sleep, len(tokenizer))
        # What cannot be tested is refused now, not after the training.
        settings_of(model, recipe.test.test_n_loops, None)
        trainer = trainer_of(model, training, tokenizer, train_dataset=text.train, eval_dataset=text.held_out)
    spent = fit(trainer)
    results = describe(recipe, text, window_size) | asdict(spent)
    if text.held_out is not None:
        results |= _test(recipe, trainer.model_wrapped, text.held_out, window_size, pad_token(tokenizer))
    described = {
        "recipe": recipe.name,
        "task": asdict(data),
        # A tokenizer of transformers is saved with the model, its chat template too.
        "tokenizer": None if isinstance(tokenizer, PreTrainedTokenizerBase) else recipe.model.tokenizer,
        "seed": training.seed,
        "window_size": window_size,
        "held_out": None if text.held_out is None else text.held_out.digest(),
    }
    write_notes(trainer, tokenizer, bool(recipe.model.lora_r), {RESULTS: results, TASK: described})
    if trainer.is_world_process_zero():
        print(table(results))
    return spent, results


def _reach(recipe: Recipe, tokenizer: Any) -> tuple[int, int | None]:
    """L, and the longest row that the model can read (None: any), by its configuration alone."""
    arguments, settings = recipe.model, recipe.sleep.settings()
    if arguments.architecture is not None:
        config = new_architecture(arguments.architecture, None if tokenizer is None else len(tokenizer))
    else:
        config = pretrained_config(arguments)
    if not recipe.sleep.sleep:
        longest = longest_of(config)
        return settings.get("window_size") or min(MAX_DEFAULT_WINDOW, longest or MAX_DEFAULT_WINDOW), longest
    if isinstance(config, SleepConfig):
        for name in settings.keys() - {"fast_weights"}:
            setattr(config, name, settings[name])
    else:
        config = SleepConfig(text_config=config, **settings)
    return reach(config)


def reach(config: SleepConfig) -> tuple[int, int | None]:
    """L of a model that sleeps, and the longest row that it can read; None for any."""
    resolved = resolve(config)
    return int(resolved.window_size or 0), longest_of(config) if resolved.sliding else None


def longest_of(config: PreTrainedConfig) -> int | None:
    """The positions that a base supports; None if it does not say."""
    base = config.text_config if isinstance(config, SleepConfig) else config
    longest: int | None = getattr(base.get_text_config(), "max_position_embeddings", None)
    return longest


def describe(recipe: Recipe, text: TextData, window_size: int) -> dict[str, Any]:
    """What the run was on."""
    held_out = 0 if text.held_out is None else len(text.held_out)
    return {
        "dataset": recipe.task.__dict__["dataset"],
        "format": text.format,
        "window_size": window_size,
        "train_rows": None if isinstance(text.train, TextStream) else len(text.train),
        "held_out_rows": held_out,
        "windows_per_row": text.windows,
    }


def _test(recipe: Recipe, model: Any, held_out: TextRows, window_size: int, pad_id: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "window_size": window_size,
        "n_examples": recipe.test.test_examples,
        "batch_size": recipe.training.per_device_eval_batch_size,
        "pad_id": pad_id,
    }
    results = evaluate_text(model, held_out, **options)
    loops = recipe.test.test_n_loops
    if loops is not None:
        results["by_n_loops"] = {str(n): evaluate_text(model, held_out, n_loops=n, **options) for n in loops}
    return results
