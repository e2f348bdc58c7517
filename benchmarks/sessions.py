"""What a question costs over a text that was read: the first answer, the next 99, and the bytes that wait for them.

    python -m benchmarks.sessions [--repeats 3] [--output docs/results/sessions.md]

A session reads the text once, sleeping, and is asked on a fork, one question after the other or all in one batch.
Beside it the base with its whole cache, which is cut back to the text after every answer, and the base that reads the
text anew for every question. Questions and answers have the same number of tokens everywhere, and `generate` makes all
of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, PreTrainedTokenizerFast

from benchmarks.report import Claim, Part, Spread, alternate, page_arguments, publish, ratio
from benchmarks.wake import small_qwen
from sleepify import Session, SleepForCausalLM

QUESTIONS = 100
TOKENS = 8
"""Of a question, and of an answer."""
_HOW = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """Every id but that of padding is a word, its number."""
    plain = Tokenizer(
        WordLevel({"<pad>": 0} | {str(place): place for place in range(1, vocabulary)}, unk_token="<pad>")
    )
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")


def text(tokens: int, seed: int) -> str:
    """So many words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(map(str, torch.randint(1, 4096, (tokens,), generator=generator).tolist()))


@torch.no_grad()
def measure(model: SleepForCausalLM, n_windows: int, repeats: int) -> list[Part]:
    """Time and bytes of a hundred answers over one text."""
    window, tokenizer, base = int(model.config.window_size), words(4096), model.unload()
    book = text(n_windows * window, 1)
    questions = [text(TOKENS, 2 + place) for place in range(QUESTIONS - 1)]
    ids = tokenizer(book, return_tensors="pt")["input_ids"]
    whole = torch.cat([ids, tokenizer(questions[0], return_tensors="pt")["input_ids"]], dim=1)
    assert ids.shape[1] == n_windows * window

    def read() -> Session:
        return Session(model, tokenizer).read(book, progress=lambda done, of: None).sleep()

    session = read()
    kept: Any = DynamicCache(config=base.config)
    base(ids, past_key_values=kept, logits_to_keep=1)

    def cached() -> None:
        base.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=kept, **_HOW)
        kept.crop(ids.shape[1] - kept.get_seq_length())

    actions: dict[str, Callable[[], object]] = {
        "read": read,
        "base reads": lambda: base(ids, past_key_values=DynamicCache(config=base.config), logits_to_keep=1),
        "ask": lambda: session.ask(questions[0], **_HOW),
        "batch": lambda: session.ask(questions, **_HOW),
        "cached": cached,
        "anew": lambda: base.generate(whole, attention_mask=torch.ones_like(whole), **_HOW),
    }
    times = alternate(actions, repeats)
    times["batch, each"] = [seconds / len(questions) for seconds in times["batch"]]
    rest = len(questions)
    answers = Part(
        "A hundred answers",
        f"A text of {n_windows} windows of {window} tokens; questions and answers of {TOKENS} tokens; N = "
        f"{model.config.n_loops}. Milliseconds of processor time. The first answer is reading and one answer; all "
        f"{QUESTIONS} are the first and {rest} times the next (a batch: once).",
        ["", "reading", "the first answer", "each of the next 99", f"all {QUESTIONS}, seconds"],
    )
    for label, reads, each in (
        ("session, one question at a time", "read", "ask"),
        ("session, 99 in one batch", "read", "batch, each"),
        ("base, whole cache", "base reads", "cached"),
        ("base, reading per question", None, "anew"),
    ):
        once = "ask" if each == "batch, each" else each
        reading = times[reads] if reads else [0.0] * len(times[each])
        first = [a + b for a, b in zip(reading, times[once], strict=True)]
        everything = [a + rest * b for a, b in zip(first, times[each], strict=True)]
        spreads = [Spread.of(values) for values in (reading, first, times[each])]
        shown = [spread.text(1e3, 1) if spread.median else "" for spread in spreads]
        answers.rows.append([label, *shown, Spread.of(everything).text(1, 1)])
        names = ("reading", "first", "next", "all")
        answers.figures[label] = dict(zip(names, (*spreads, Spread.of(everything)), strict=True))
    for each in ("ask", "batch, each"):
        name = "one at a time" if each == "ask" else "in a batch"
        answers.claims.append(
            Claim(f"next answer, {name} / reading per question", ratio(times, each, "anew").median, at_most=0.5)
        )

    base_bytes = sum(part.nbytes for layer in kept.layers for part in (layer.keys, layer.values))
    mine = session.cache.state_bytes + session.cache.kv_bytes
    weight = Part(
        "What waits for the next question",
        "Bytes of the session, whose state is all that is left after a sleep, and of the base's keys and values.",
        ["session", "base", "session / base"],
        [[f"{mine:,}", f"{base_bytes:,}", f"{mine / base_bytes:.4f}"]],
        [Claim("bytes, session / base with its whole cache", mine / base_bytes, at_most=0.1)],
        {"session": mine, "base": base_bytes},
    )
    return [answers, weight]


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "sessions", repeats=3)
    window, n_windows = (8, 3) if arguments.tiny else (16, 64)
    model = small_qwen(arguments.tiny, window, n_windows)
    parts = measure(model, n_windows, arguments.repeats)
    intro = (
        "Qwen3 of 8 layers and 256 channels with 2 inserted Gated DeltaNet layers, hard eviction, one thread, float32, "
        "all settings in turn in one run. Median (quartiles). The weights are random: it is time and bytes that are "
        "compared, not answers."
    )
    return publish(arguments, "Sessions: read once, ask a hundred times", intro, parts)


if __name__ == "__main__":
    main()
