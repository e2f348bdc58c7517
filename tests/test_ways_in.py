"""What a user does with data of one's own and with the command, where parts that are right alone must agree."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sleepify.cli import generate
from sleepify.conversation import front
from sleepify.training.text_format import Encoder

WORDS = ["<end>", "<begin>", "one", "two", "three"]


def tokenizer(puts_begin: bool) -> PreTrainedTokenizerFast:
    """Words; one that has a token to begin with, and puts it before a text or not."""
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "<end>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if puts_begin:
        plain.post_processor = processors.TemplateProcessing(
            single="<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<begin>", eos_token="<end>", unk_token="<end>")


@pytest.mark.parametrize("puts_begin", [True, False])
def test_rows_prompts_and_sessions_begin_alike(puts_begin: bool) -> None:
    """By what the tokenizer itself puts before a text, whatever other tokens it has."""
    made = tokenizer(puts_begin)
    begin = [1] if puts_begin else []
    assert front(made) == begin
    assert Encoder("text", made, {})({"text": "one two"}, 0)["input_ids"] == [*begin, 2, 3, 0]
    row = Encoder("prompt_completion", made, {})({"prompt": "one", "completion": "two"}, 0)
    assert row["input_ids"] == [*begin, 2, 3, 0]
    assert prompt(made, "one two") == [*begin, 2, 3]


def prompt(made: object, text: str, question: str | None = None) -> list[int]:
    """What `sleepify generate` reads."""
    words = ["anywhere", "--prompt", text, *(("--question", question) if question else ())]
    arguments: argparse.Namespace = generate._parser().parse_args(words)
    return generate._read(arguments, made)


def test_a_prompt_is_not_over_before_the_answer(tmp_path: Path) -> None:
    """Tokenizers of bytes put an end behind every text, after which there would be nothing to say."""
    made = ByT5Tokenizer(extra_ids=0)
    said = made.encode("a\n\nb", add_special_tokens=False)
    assert made.encode("a\n\nb") == [*said, made.eos_token_id]
    assert prompt(made, "a", "b") == said
