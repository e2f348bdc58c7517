"""What a question costs over a text that was read: the first answer, the next 99, and the bytes that wait for them;
and from which length of the text on an answer of the base costs more.

    python -m benchmarks.sessions [--repeats 3] [--output docs/results/sessions.md]

A session reads the text once, sleeping, and is asked on a fork, one question after the other or all in one batch.
Beside it the base with its whole cache, which is cut back to the text after every answer, and the base that reads the
text anew for every question. Questions and answers have the same number of tokens everywhere, and `generate` makes all
of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
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
        f"{QUESTIONS} are the first and {rest} times the next (a batch: once).\n\n"
        "The base reads all windows side by side in one pass, each layer once; every token attends to all before it. "
        "A session reads them one after the other, since each begins from the state that the one before has left, and "
        f"makes {model.config.n_loops} passes over each, in which a token attends to its own window only: the price of "
        "the sleep, paid once. What a session saves is on every later answer, against reading anew, and against the "
        "cache where the text is long (below).",
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


@torch.no_grad()
def measure_lengths(model: SleepForCausalLM, n_windows: Sequence[int], repeats: int) -> Part:
    """One answer after texts of more and more windows: of a session, and of the base with its whole cache."""
    window, tokenizer, base = int(model.config.window_size), words(4096), model.unload()
    question = text(TOKENS, 2)
    asked = tokenizer(question, return_tensors="pt")["input_ids"]
    session, kept, read = Session(model, tokenizer), DynamicCache(config=base.config), 0
    actions: dict[str, Callable[[], object]] = {}

    def answer(ids: Tensor, cache: Any) -> Callable[[], None]:
        def action() -> None:
            base.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **_HOW)
            cache.crop(ids.shape[1] - TOKENS - cache.get_seq_length())

        return action

    weights = {}
    whole = asked[:, :0]
    for count in n_windows:
        more = text((count - read) * window, 1 + count)
        session.read(more, progress=lambda done, of: None)
        ids = tokenizer(more, return_tensors="pt")["input_ids"]
        base(ids, past_key_values=kept, logits_to_keep=1)
        whole, read = torch.cat([whole, ids], dim=1), count
        slept = session.fork().sleep()
        actions[f"session, {count}"] = partial(slept.ask, question, **_HOW)
        cache = copy.deepcopy(kept)
        actions[f"base, {count}"] = answer(torch.cat([whole, asked], dim=1), cache)
        base_bytes = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        weights[count] = slept.cache.state_bytes + slept.cache.kv_bytes, base_bytes
    times = alternate(actions, repeats)
    longest = n_windows[-1]
    return Part(
        "From which length on",
        f"One answer, milliseconds of processor time, and bytes that wait for it. In a session a token attends to at "
        f"most {window} others, whatever was read, and beside that there are the inserted layers and what a session "
        "keeps account of: a fixed price, which makes the base the faster one after short texts. In the base a token "
        "attends to all that was read, and keys are read from memory for every token: beyond some length that is more.",
        ["text", "session", "base, whole cache", "session / base", "bytes, session", "bytes, base"],
        [
            [
                f"{count} windows, {count * window:,} tokens",
                *(Spread.of(times[f"{who}, {count}"]).text(1e3, 1) for who in ("session", "base")),
                f"{ratio(times, f'session, {count}', f'base, {count}').median:.2f}",
                *(f"{each:,}" for each in weights[count]),
            ]
            for count in n_windows
        ],
        [
            Claim(
                f"an answer of a session after {longest} windows / after {n_windows[0]}",
                ratio(times, f"session, {longest}", f"session, {n_windows[0]}").median,
                at_most=1.2,
            )
        ],
        {name: Spread.of(values) for name, values in times.items()},
    )


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "sessions", repeats=3)
    window, n_windows, lengths = (8, 3, (1, 2)) if arguments.tiny else (128, 64, (4, 16, 64, 128))
    model = small_qwen(arguments.tiny, window, lengths[-1])
    parts = [*measure(model, n_windows, arguments.repeats), measure_lengths(model, lengths, 3 * arguments.repeats)]
    intro = (
        "Qwen3 of 8 layers and 256 channels with 2 inserted Gated DeltaNet layers, hard eviction, one thread, float32, "
        "all settings in turn in one run. Median (quartiles). The weights are random: it is time and bytes that are "
        "compared, not answers."
    )
    return publish(arguments, "Sessions: read once, ask a hundred times", intro, parts)


if __name__ == "__main__":
    main()
