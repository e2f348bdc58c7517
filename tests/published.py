"""What holds for every base whose published files transformers cannot read by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel


def left_padded(lengths: list[int], vocab: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """ids and mask [B, max(lengths)], real tokens at the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def check_code_is_not_run(
    fixture: Path, folder: Path, kwargs: dict[str, Any], classes: tuple[type, type, type]
) -> None:
    """The published folder loads as our classes (configuration, model, with head), its own code left alone."""
    directory = shutil.copytree(fixture, folder / "checkpoint")
    assert set(json.loads((directory / "config.json").read_text())["auto_map"]) >= {
        "AutoConfig",
        "AutoModelForCausalLM",
    }
    for kind in ("configuration", "modeling"):
        (directory / f"{kind}_{fixture.name}.py").write_text("raise RuntimeError('remote code was run')")
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    found = (AutoConfig.from_pretrained(directory, **kwargs), AutoModel.from_pretrained(directory, **kwargs), model)
    assert tuple(map(type, found)) == classes


def check_saved_as_published(fixture: Path, folder: Path, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Saved under the published names, and the same when loaded; what the saved configuration says."""
    model.save_pretrained(folder)
    saved, published = load_file(folder / "model.safetensors"), load_file(fixture / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in saved)
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(again(ids).logits, model(ids).logits)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    return config


def check_cache_changes_nothing_drawn(model: PreTrainedModel, **settings: Any) -> None:
    """Sampling and beams give the same tokens with the cache and without."""
    ids, mask = left_padded([5, 3], 37)
    tokens = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        more = {"max_new_tokens": 5, "pad_token_id": 0, "use_cache": use_cache}
        tokens.append(model.generate(ids, attention_mask=mask, **settings, **more))
    assert torch.equal(*tokens)


def check_rows_are_generated_as_alone(model: PreTrainedModel, **settings: Any) -> None:
    """Left-padded rows of a batch, greedily."""
    lengths = [9, 4, 1]
    ids, mask = left_padded(lengths, 37)
    settings |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 9:]
    alone = [model.generate(ids[i : i + 1, 9 - n :], **settings)[:, n:] for i, n in enumerate(lengths)]
    assert torch.equal(together, torch.cat(alone))
