"""The model card of a sleep-enabled checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from sleepify.config import SleepConfig
from sleepify.files import written_beside

CARD = "README.md"
_JET: dict[str, Any] = {
    "license": "other",
    "license_name": "nvidia-jet-nemotron",
    "license_link": "https://github.com/NVlabs/Jet-Nemotron",
}
_JET_WORDS = "NVIDIA's licence for Jet-Nemotron: derivatives are for non-commercial use only"
_APACHE: dict[str, Any] = {"license": "apache-2.0"}
# Licences that a derivative inherits and that a user must not overlook, where the base's own card cannot be read.
_LICENCES = {
    "jet_nemotron": (_JET, _JET_WORDS),
    "ouro": (_APACHE, "Apache-2.0"),
    "qwen3_5_text": (_APACHE, "Apache-2.0"),
    "olmo_hybrid": (_APACHE, "Apache-2.0"),
}


def read_results(directory: Path) -> dict[str, Any]:
    """What an evaluation has left as ``results.json`` beside a model, if anything."""
    try:
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


@contextmanager
def renewed(folder: Path, saved_as: str, name: str | None = None) -> Iterator[None]:
    """Write the card in a folder again at the end, if it is still the one that saving wrote there.

    Args:
        folder: of a model that sleeps; any other is left alone.
        saved_as: what the card says to load the model by.
        name: what it shall say; by default the same, with the results that then lie in the folder.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    ours = "library_name: sleepify" in text and _words(text) == _words(_card_in(folder, saved_as))
    yield
    if ours:
        with written_beside(path) as draft:
            draft.write_text(_card_in(folder, saved_as if name is None else name), encoding="utf-8")


def _words(card: str) -> str:
    """Without the example: where a tokenizer came after the model, it would be another one now."""
    return re.sub(r"```python\n.*?```", "", card, flags=re.DOTALL)


def _card_in(folder: Path, name: str) -> str:
    return write_card(SleepConfig.from_pretrained(folder), name, read_results(folder))


def write_card(
    config: SleepConfig,
    repository: str,
    results: dict[str, Any] | None = None,
    *,
    tags: Sequence[str] = (),
    online: bool = False,
) -> str:
    """The card as Markdown: base and its licence, N, window, eviction, how to load, the paper, use and limits.

    Args:
        config: the checkpoint's configuration.
        repository: what to load it by, a repository or a directory.
        results: of an evaluation; its numbers, also nested ones, become metrics.
        tags: more of them.
        online: whether the base's card may be asked for its licence.
    """
    base = config.base_model_name_or_path
    on_hub = base is not None and _is_on_hub(base)
    licence, words = _licence(config, online)
    named = f"[{base}](https://huggingface.co/{base})" if on_hub else "a model that is not on the Hub"
    numbers = _numbers(results or {})
    header = ModelCardData(
        library_name="sleepify",
        pipeline_tag="text-generation",
        tags=["sleepify", "fast-weights", *tags],
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if config.fast_weights_only else "finetune") if on_hub else None,
        model_name=re.split(r"[/\\]", repository.rstrip("/\\"))[-1] or "model",
        eval_results=[_metric(name, value, results or {}) for name, value in numbers.items()] or None,
        **licence,
    )
    layers = config.fast_weights.layers
    inserted = f"{len(layers)} {config.fast_weights.rule} layers, after layers {layers}" if layers else "none"
    holds = (
        "the inserted layers alone; the base is fetched and its fingerprint checked"
        if config.fast_weights_only
        else "all weights"
    )
    return "\n".join(
        [
            "---",
            header.to_yaml(),
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
            *_example(config, repository),
            "```",
            "",
            "Or without `import sleepify` where `trust_remote_code` is set: the one file of code here, "
            "`modeling_sleepify.py`, imports the package and does nothing else.",
            "",
            *_table(numbers),
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


def _is_on_hub(base: str) -> bool:
    """Whether a base is named as repositories are, and is no directory here."""
    return bool(re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", base)) and not os.path.exists(base)


def _example(config: SleepConfig, repository: str) -> list[str]:
    """Python that runs: with the tokenizer where there is one by name, and without where there is none."""
    base = config.base_model_name_or_path
    tokenizer = (
        repository
        if _has_tokenizer(repository)
        else base
        if base and (_is_on_hub(base) or _has_tokenizer(base))
        else None
    )
    lines = [
        "import sleepify  # registers the architecture",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenizer else ''}",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({repository!r})",
    ]
    if tokenizer is None:
        return ["import torch", *lines, "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8))"]
    return [
        *lines,
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})",
        'ids = tokenizer("Long ago", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))",
    ]


def _has_tokenizer(directory: str) -> bool:
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _numbers(results: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a JSON object by name, "perplexity/0-512" where one is inside another."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def _metric(name: str, value: float, results: dict[str, Any]) -> EvalResult:
    dataset = str(results.get("dataset") or results.get("task") or "held-out")
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
        dataset_name=dataset,
        metric_type=re.split("/", name)[0],
        metric_name=name,
        metric_value=value,
    )


def _table(numbers: dict[str, float]) -> list[str]:
    if not numbers:
        return []
    rows = [f"| {name} | {value:g} |" for name, value in numbers.items()]
    return ["## Results", "", "| | |", "|---|---|", *rows, ""]


def _licence(config: SleepConfig, online: bool) -> tuple[dict[str, Any], str]:
    """(fields for the header, words for the table)."""
    base = config.base_model_name_or_path
    found: Any = None
    if base and (readme := Path(base) / "README.md").is_file():
        found = ModelCard.load(readme).data
    elif base and online and _is_on_hub(base):
        # A base that only looks like a name on the Hub, or is not for everybody, is no reason not to upload.
        with suppress(HfHubHTTPError):
            found = HfApi().model_info(base, revision=config.base_model_revision).card_data
    names = ("license", "license_name", "license_link")
    fields: dict[str, Any] = {name: str(value) for name in names if (value := getattr(found, name, None))}
    if "license" in fields:
        link = fields.get("license_link")
        if link and base and _is_on_hub(base) and "://" not in link:
            # A file beside the base's card.
            fields["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
        return fields, fields.get("license_name") or fields["license"]
    return _LICENCES.get(config.text_config.model_type, ({}, "see the base's own card"))
