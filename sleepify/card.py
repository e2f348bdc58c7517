"""The model card of a sleep-enabled checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from sleepify.config import SleepConfig

# Licences that a derivative inherits and that a user must not overlook, where the base's own card cannot be read.
_LICENCES = {
    "jet_nemotron": ("other", "NVIDIA's licence for Jet-Nemotron: derivatives are for non-commercial use only"),
    "ouro": ("apache-2.0", "Apache-2.0"),
    "qwen3_5_text": ("apache-2.0", "Apache-2.0"),
    "olmo_hybrid": ("apache-2.0", "Apache-2.0"),
}


def write_card(config: SleepConfig, *, online: bool = False) -> str:
    """The card as Markdown: base and its licence, N, window, eviction, how to load, the paper, use and limits.

    Args:
        config: the checkpoint's configuration.
        online: whether the base's card may be asked for its licence.
    """
    base = config.base_model_name_or_path
    tag, words = _licence(config, online)
    named = (
        f"[{base}](https://huggingface.co/{base})" if base and not os.path.isabs(base) else "a model built in memory"
    )
    header = ["---", "library_name: sleepify", "pipeline_tag: text-generation", "tags: [sleepify, fast-weights]"]
    if tag:
        header.append(f"license: {tag}")
    if base and not os.path.isabs(base):
        header.append(f"base_model: {base}")
    layers = config.fast_weights.layers
    inserted = f"{len(layers)} {config.fast_weights.rule} layers, after layers {layers}" if layers else "none"
    holds = (
        "the inserted layers alone; the base is fetched and its fingerprint checked"
        if config.fast_weights_only
        else "all weights"
    )
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {config.text_config.model_type} with sleep",
            "",
            "A language model that sleeps: when a window of its context is full it reads it again in several recurrent "
            "passes, writes what matters into fast weights of fixed size, and drops the keys and values.",
            "",
            "| | |",
            "|---|---|",
            f"| base | {named} (`{config.text_config.model_type}`) |",
            f"| licence of the base | {words} |",
            f"| passes asleep, N | {config.n_loops} |",
            f"| window, L | {config.window_size} tokens |",
            f"| eviction | {config.eviction} |",
            f"| looped layers | {config.loop_range[0]} to {config.loop_range[1] - 1} |",
            f"| inserted fast-weight layers | {inserted} |",
            f"| this repository holds | {holds} |",
            "",
            "## Load",
            "",
            "```bash",
            "pip install sleepify",
            "```",
            "```python",
            "import sleepify  # registers the architecture; no remote code",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this/repository")',
            "```",
            "",
            "## Use and limits",
            "",
            "Meant for research on long inputs that are read once and asked about later. The state has a fixed size: "
            "what was evicted can be recalled only as far as training taught the model to write it. Evaluate on your "
            "own task, by depth and by number of evictions, before relying on it. The base's limits and biases remain.",
            "",
            "## Method",
            "",
            "Lee, McLeish, Goldstein, Fanti: Do Language Models Need Sleep? Offline Recurrence for Improved Online "
            "Inference, [arXiv:2605.26099](https://arxiv.org/abs/2605.26099).",
            "",
        ]
    )


def _licence(config: SleepConfig, online: bool) -> tuple[str | None, str]:
    """(tag for the header, words for the table)."""
    base = config.base_model_name_or_path
    found: Any = None
    if base and (readme := Path(base) / "README.md").is_file():
        found = ModelCard.load(readme).data.license
    elif base and online and not os.path.exists(base):
        card = HfApi().model_info(base, revision=config.base_model_revision).card_data
        found = None if card is None else card.license
    if found:
        return str(found), str(found)
    return _LICENCES.get(config.text_config.model_type, (None, "see the base's own card"))
