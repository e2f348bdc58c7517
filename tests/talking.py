"""A tokenizer of few words with a chat template, and a small model for it: what sessions and the chat are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import VOCAB
from small import sleeping
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sleepify import SleepForCausalLM

SPECIAL = ["<pad>", "<s>", "<end>", "<user>", "<assistant>", "<think>", "</think>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz?.,! \n()0123456789"
# Pairs, so that the same text has several spellings in ids and few of the model's own are the tokenizer's.
PAIRS = [one + other for one in "abcdefgh" for other in "abcdefgh"][: VOCAB - len(SPECIAL) - len(LETTERS)]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Leaves the reasoning of earlier turns out, as many published templates do; here the first two letters.
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[2:] }}{% else %}{{ m.content }}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, **settings: Any) -> PreTrainedTokenizerFast:
    """Every letter a token, pairs of some letters another; BOS in front."""
    words = [*SPECIAL, *LETTERS, *PAIRS]
    assert len(words) == VOCAB
    vocabulary = {word: place for place, word in enumerate(words)}
    plain = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in PAIRS]))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    plain.decoder = decoders.Fuse()
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:5],
        chat_template=template,
        **settings,
    )


def talker(**keywords: Any) -> SleepForCausalLM:
    """Windows of 12 letters, three passes, float64; it says the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return sleeping(dtype=keywords.pop("dtype", torch.float64), **({"window_size": 12} | keywords))


def saved_talker(folder: Path, **settings: Any) -> Path:
    """A checkpoint of one in float32 with its tokenizer, generating by these settings."""
    model = talker(dtype=torch.float32)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run_example(example: str, model: SleepForCausalLM, words: Any, text: str, monkeypatch: Any) -> dict[str, Any]:
    """What a page's example leaves: run in this folder, beside the checkpoint and the book that it names.

    Args:
        example: Python as a page has it.
        model: saved as "my-model".
        words: its tokenizer.
        text: of "book.txt".
        monkeypatch: shortens answers that the example does not limit.
    """
    Path("book.txt").write_text(text, encoding="utf-8")
    model.save_pretrained("my-model")
    words.save_pretrained("my-model")
    monkeypatch.setattr("sleepify.generation.ANSWER", 5)
    names: dict[str, Any] = {}
    exec(compile(example, "example", "exec"), names)
    return names
