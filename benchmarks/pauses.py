"""The pause that a sleep makes between two tokens that arrive: waited for, and in the background.

    python -m benchmarks.pauses [--repeats 7] [--output docs/results/pauses.md]

A window is read, a sleep is asked for, and single tokens follow as fast as they are read. The longest gap between two
of them is what a user sees. Then a `Session` reads a text that comes in pieces, of which one fills a window. Seconds of
the clock, because two threads work: unlike on the other pages, whatever else the machine does is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from statistics import median

import torch

from benchmarks import sessions
from benchmarks.models import text
from benchmarks.report import Claim, Part, Spread, page_arguments, publish, ratio
from benchmarks.wake import small_qwen
from sleepify import Session, SleepCache, SleepForCausalLM

WAYS = ("waited for", "in the background")
PIECE = 16
"""Tokens of a text that comes in pieces."""


@torch.no_grad()
def gaps(model: SleepForCausalLM, n_tokens: int, background: bool) -> list[float]:
    """Seconds from one token to the next, of which the first has the call of the sleep in it; and of them all."""
    window = int(model.config.window_size)
    ids, _ = text(model, window + n_tokens)
    session = SleepCache()
    model(ids[:, :window], past_key_values=session, logits_to_keep=1)
    times = [time.perf_counter()]
    model.sleep(session, background=background)
    for place in range(window, window + n_tokens):
        if place == window + n_tokens - 1:
            # A sleep that lasts longer than the tokens is seen by the last of them.
            session.wait()
        model(ids[:, place : place + 1], past_key_values=session)
        times.append(time.perf_counter())
    assert session.windows == [1]
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def reads(model: SleepForCausalLM, background: bool) -> list[float]:
    """Seconds of every call that reads a piece of a text of one and a half windows."""
    session = Session(model, sessions.words(4096), background=background)
    times = []
    for place in range(model.config.window_size * 3 // 2 // PIECE):
        piece = sessions.text(PIECE, place)
        begun = time.perf_counter()
        session.read(piece, progress=lambda done, of: None)
        times.append(time.perf_counter() - begun)
    session.cache.wait()
    assert session.cache.windows == [1]
    return times


def measure(model: SleepForCausalLM, title: str, what: str, calls: Callable[[bool], list[float]], repeats: int) -> Part:
    """The longest and the middle of some calls, and all of them, in both ways in turn."""
    longest: dict[str, list[float]] = {way: [] for way in WAYS}
    middle: dict[str, list[float]] = {way: [] for way in WAYS}
    whole: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        for way in Random(turn).sample(WAYS, 2):
            seconds = calls(way == WAYS[1])
            if turn:
                longest[way].append(max(seconds))
                middle[way].append(median(seconds))
                whole[way].append(sum(seconds))
    spreads = {way: [Spread.of(times[way]) for times in (longest, middle, whole)] for way in WAYS}
    quotient = ratio(longest, WAYS[1], WAYS[0]).median
    return Part(
        title,
        f"{what} N = {model.config.n_loops}. Milliseconds of the clock. In the background the longest one is that "
        "which finds the sleep done and reads again, in one pass, what came meanwhile.",
        ["", "longest", "middle", "all"],
        [[way, *(spread.text(1e3, 1) for spread in spreads[way])] for way in WAYS],
        [Claim(f"{title.lower()}: longest, in the background / waited for", quotient, at_most=0.5)],
        {way: dict(zip(("longest", "middle", "all"), spreads[way], strict=True)) for way in WAYS},
    )


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "pauses", repeats=7)
    window, n_tokens = (32, 6) if arguments.tiny else (256, 96)
    model = small_qwen(arguments.tiny, window, 2)
    parts = [
        measure(
            model,
            "Between two tokens",
            f"The gap from one of {n_tokens} tokens to the next, after a sleep on {window} was asked for.",
            lambda background: gaps(model, n_tokens, background),
            arguments.repeats,
        ),
        measure(
            model,
            "A text that comes in pieces",
            f"A call of `Session.read` with {PIECE} tokens; {window * 3 // 2} tokens in all, of which {window} fill a "
            "window.",
            lambda background: reads(model, background),
            arguments.repeats,
        ),
    ]
    intro = (
        "Qwen3 of 8 layers and 256 channels with 2 inserted Gated DeltaNet layers, hard eviction, float32, one thread "
        "for each of the two who work. Median (quartiles)."
    )
    return publish(arguments, "The pause that a sleep makes", intro, parts)


if __name__ == "__main__":
    main()
