"""The pause that a sleep makes between two tokens that arrive: waited for, and in the background.

    python -m benchmarks.pauses [--repeats 7] [--output docs/results/pauses.md]

A window is read, a sleep is asked for, and single tokens follow as fast as they are read. The longest gap between two
of them is what a user sees. Seconds of the clock, because two threads work: unlike on the other pages, whatever else
the machine does is in them.
"""

from __future__ import annotations

import time
from random import Random
from statistics import median

import torch

from benchmarks.models import text
from benchmarks.report import Claim, Part, Spread, page_arguments, publish, ratio
from benchmarks.wake import small_qwen
from sleepify import SleepCache, SleepForCausalLM

WAYS = ("waited for", "in the background")


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


def measure(model: SleepForCausalLM, n_tokens: int, repeats: int) -> Part:
    """The longest and the middle gap, and all tokens, in turn."""
    longest: dict[str, list[float]] = {way: [] for way in WAYS}
    middle: dict[str, list[float]] = {way: [] for way in WAYS}
    whole: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        for way in Random(turn).sample(WAYS, 2):
            seconds = gaps(model, n_tokens, way == WAYS[1])
            if turn:
                longest[way].append(max(seconds))
                middle[way].append(median(seconds))
                whole[way].append(sum(seconds))
    spreads = {way: [Spread.of(times[way]) for times in (longest, middle, whole)] for way in WAYS}
    return Part(
        "Between two tokens",
        f"A sleep on {model.config.window_size} tokens, N = {model.config.n_loops}, then {n_tokens} tokens one by one. "
        "Milliseconds of the clock. In the background the longest gap is that of the token that finds the sleep done "
        "and reads again, in one pass, what came meanwhile.",
        ["", "longest gap", "middle gap", f"all {n_tokens} tokens"],
        [[way, *(spread.text(1e3, 1) for spread in spreads[way])] for way in WAYS],
        [Claim("longest gap, in the background / waited for", ratio(longest, WAYS[1], WAYS[0]).median, at_most=0.5)],
        {way: dict(zip(("longest", "middle", "all"), spreads[way], strict=True)) for way in WAYS},
    )


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "pauses", repeats=7)
    window, n_tokens = (8, 6) if arguments.tiny else (256, 96)
    part = measure(small_qwen(arguments.tiny, window, 2), n_tokens, arguments.repeats)
    intro = (
        "Qwen3 of 8 layers and 256 channels with 2 inserted Gated DeltaNet layers, hard eviction, float32, one thread "
        "for each of the two who work. Median (quartiles)."
    )
    return publish(arguments, "The pause that a sleep makes", intro, [part])


if __name__ == "__main__":
    main()
