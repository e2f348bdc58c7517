"""What a user does with data of one's own and with the command, where parts that are right alone must agree."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
from small import trainable
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from benchmarks.facts import FIRST, PEOPLE, SURNAMES, document
from benchmarks.objectives import Facts, Runs, write_results
from sleepify.cli import generate
from sleepify.conversation import front
from sleepify.training import DatasetArguments, load_text
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


def test_facts_are_told_first_and_asked_where_they_were_told_before() -> None:
    words = document(0, 3).split()
    told = dict(zip(words[0 : 3 * PEOPLE : 3], words[1 : 3 * PEOPLE : 3], strict=True))
    assert told.keys() <= set(FIRST) and set(told.values()) <= set(SURNAMES) and len(told) == PEOPLE
    assert all(told[word] == following for word, following in zip(words, words[1:], strict=False) if word in told)
    assert document(0, 3) == " ".join(words) != document(1, 3)

    number = {word: place for place, word in enumerate(dict.fromkeys(words))}
    rows: list = [{"input_ids": [number[word] for word in words]}]
    asked = Facts(rows, frozenset(number[name] for name in told.values()))[0]["labels"]  # type: ignore[arg-type]
    places = [place for place, label in enumerate(asked) if label >= 0]
    assert [words[place] for place in places] == [word for word in words[3 * PEOPLE :] if word in told.values()]


def test_the_page_of_losses_is_made_of_the_runs_that_are_finished(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", tmp_path, 1, 1)
    runs.folder.mkdir()
    for seed, cost in ((0, 2.0), (1, 8.0)):
        tested = {"perplexity": cost, "perplexity_by_distance": {"1-16": {"perplexity": cost, "tokens": 5}}}
        run = {"arm": "distill", "seed": seed, "steps": 7, "cpu_seconds": 3.0, "facts": tested, "all": tested}
        runs.path("distill", seed).write_text(json.dumps(run), encoding="utf-8")
    write_results(runs, tmp_path / "docs")
    page = (tmp_path / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert "| distill | 2 | 7 | 3 | 4.00 (2.00-8.00) |" in page and "cross entropy |" not in page
    assert (tmp_path / "docs" / "objectives.png").stat().st_size > 1000


def test_tokenising_shows_how_far_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(["one", "two"] * (n + 3))}) for n in range(30)))
    load_text(DatasetArguments(str(path), held_out=0), tokenizer(True), window_size=4)
    assert re.search(r"tokenise: 100%.*30/30", capfd.readouterr().err)


def test_batches_that_page_keys_are_refused_by_name() -> None:
    """Without that, transformers logs a failure for every request, and hands back an empty dict."""
    model = trainable().eval()
    with pytest.raises(ValueError, match=r"expected generate\(\).*continuous batching.*sleepify serve"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
