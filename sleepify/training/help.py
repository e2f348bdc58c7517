"""The page that ``--help`` prints: fields by topic, most used first, a heading each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

# Training has more fields than anyone reads: their topics, and the beginnings of the names of each topic's fields, both
# in the order of the page. What begins otherwise comes last.
TOPICS: dict[str, str] = {
    "Training: how long, where to": "output_dir max_steps num_train_epochs per_device_ gradient_accumulation seed "
    "resume_from",
    "Training: what, and by which optimiser": "train_only loops_schedule optimizer muon_learning adamw_learning muon_ "
    "learning_rate warmup lr_scheduler weight_decay max_grad_norm skip_nonfinite max_nonfinite adam_ optim neftune "
    "label_smoothing",
    "Training: the loss": "cross_entropy distill reconstruct pass_loss",
    "Precision, speed and memory": "bf16 tf32 use_cpu torch_compile gradient_checkpointing activation_checkpointing "
    "dataloader_ fp16 torch_empty use_liger liger_ use_cache auto_find_batch average_tokens length_column "
    "train_sampling",
    "Saving": "save_ load_best metric_for_best greater_is enable_jit restore_callback ignore_data_skip",
    "Logging": "logging_ log_ report_to run_name project trackio disable_tqdm include_num_input",
    "Testing while it trains": "eval_ do_ prediction_loss batch_eval include_for label_names",
    "Several devices": "ddp_ fsdp deepspeed accelerator_config parallelism local_rank full_determinism data_seed",
    "The Hub": "push_to_hub hub_",
    "Others of transformers.TrainingArguments": "",
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """A name and its meaning, with the default where there is one; not the name again in capitals or with hyphens."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(action.option_strings[:1]) or str(action.metavar or action.dest)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if action.default in (None, argparse.SUPPRESS) else f"{text} [%(default)s]"


def arrange(parser: argparse.ArgumentParser, kinds: Sequence[Any], many: type | None) -> None:
    """Put every field of a parser under the heading of its topic.

    Args:
        parser: with all fields.
        kinds: their dataclasses, in the order of the page; the first line of each one's docstring is its heading.
        many: the one of them that has `TOPICS` instead; None if none has.
    """
    # argparse has a second one for every field that is on by default; `--field false` says the same.
    actions = {action.dest: action for action in parser._actions if "--no_" not in str(action.option_strings)}
    page: dict[str, list[str]] = {}
    for kind in kinds:
        names = [field.name for field in fields(kind)]
        if kind is not many:
            page[(kind.__doc__ or kind.__name__).split("\n")[0].rstrip(".")] = names
            continue
        for topic, beginnings in TOPICS.items():
            found = [name for beginning in beginnings.split() for name in names if name.startswith(beginning)]
            page[topic] = list(dict.fromkeys(found)) if beginnings else list(names)
            names = [name for name in names if name not in page[topic]]
    listed = {name for names in page.values() for name in names}
    rest = [name for name in actions if name not in listed]
    groups = []
    for topic, names in ({"The file": rest} | page).items():
        group = argparse._ArgumentGroup(parser, topic)
        group._group_actions += [actions[name] for name in names if name in actions]
        groups.append(group)
    parser._action_groups = [group for group in groups if group._group_actions]
    parser.usage = "%(prog)s [FILE.yaml] [--field value ...]"
