"""What `model.compile()` gives, and what it takes: the same steps and tokens with layers compiled, beside uncompiled.

    python -m benchmarks.compiled [--repeats 8] [--output docs/results/compiled.md]

Nothing is taken from the cache of earlier runs, so that the time it takes is that of a first time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.models import Setting, small_ouro, text, windowed_step
from benchmarks.report import Claim, Part, Spread, alternate, page_arguments, publish, ratio
from sleepify import SleepCache, SleepForCausalLM

LOOPS = 4


def compile_anew(model: SleepForCausalLM, backend: str) -> None:
    """Compile without this process's earlier graphs, and count from nought."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend=backend)


def n_graphs() -> int:
    """Compiled since `compile_anew`."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def actions(model: SleepForCausalLM, tokens: int, window: int) -> dict[str, Callable[[], None]]:
    """A step of training, a sleep, and as many wake tokens as fill half a window."""
    batch = text(model, tokens)
    ids = batch[0][:, :window]
    half = window // 2

    def step() -> None:
        windowed_step(model.train(), batch, window, LOOPS, Setting())

    full, begun = SleepCache(), SleepCache()
    with torch.no_grad():
        model.eval()
        model.config.window_size, model.config.eviction = window, "hard"
        model(ids, past_key_values=full, logits_to_keep=1)
        model(ids[:, :half], past_key_values=begun, logits_to_keep=1)

    @torch.no_grad()
    def sleep() -> None:
        model.eval().sleep(full.clone(), n_loops=LOOPS)

    @torch.no_grad()
    def wake() -> None:
        session = begun.clone()
        model.eval()
        for place in range(half, window):
            model(ids[:, place : place + 1], past_key_values=session, logits_to_keep=1)

    return {f"training step, N = {LOOPS}": step, f"sleep, N = {LOOPS}": sleep, f"{window - half} wake tokens": wake}


def measure(tiny: bool, backend: str, repeats: int) -> list[Part]:
    """Times of both, how long compiling took, and how many graphs twice the depth needs."""
    tokens, window = (30, 12) if tiny else (1100, 256)
    deep, shallow = (2, 1) if tiny else (8, 4)
    cost = Part(
        "What it takes",
        "Seconds until a step, a sleep and the wake tokens have run once, and graphs compiled for them. Code is "
        "generated for the smaller base only.",
        ["layers of the base", "graphs", "seconds, compiled", "seconds, uncompiled"],
    )

    def first_time(model: SleepForCausalLM) -> float:
        begin = time.perf_counter()
        for action in actions(model, tokens, window).values():
            action()
        return time.perf_counter() - begin

    large = small_ouro(tiny, deep)
    compile_anew(large, "eager")
    first_time(large)
    of_deep = n_graphs()
    models = {"uncompiled": small_ouro(tiny, shallow), "compiled": small_ouro(tiny, shallow)}
    compile_anew(models["compiled"], backend)
    seconds = {who: first_time(model) for who, model in models.items()}
    of_shallow = n_graphs()
    cost.rows = [
        [str(shallow), str(of_shallow), f"{seconds['compiled']:.0f}", f"{seconds['uncompiled']:.0f}"],
        [str(deep), str(of_deep), "", ""],
    ]
    cost.figures = {"graphs": {shallow: of_shallow, deep: of_deep}, "seconds": seconds}
    cost.claims.append(Claim(f"graphs of {deep} layers / of {shallow}", of_deep / of_shallow, at_most=1.0))

    gain = Part(
        "What it gives",
        f"{shallow} layers, windows of {window:,} tokens, text of {tokens:,}, batch 1. Milliseconds; ratio in every "
        "round.",
        ["", "uncompiled", "compiled", "compiled / uncompiled"],
    )
    both = {who: actions(model, tokens, window) for who, model in models.items()}
    for what in both["compiled"]:
        times: dict[Any, list[float]] = alternate({who: partial(both[who][what]) for who in both}, repeats)
        compared = ratio(times, "compiled", "uncompiled")
        gain.rows.append([what, *(Spread.of(times[who]).text(1e3) for who in both), compared.text()])
        gain.figures[what] = {"ratio": compared}
    torch._dynamo.reset()
    return [gain, cost]


INTRO = (
    "Ouro of 256 channels with two Jet layers, one thread, float32, processor time, both in turn in one run. Median "
    "(quartiles)."
)


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "compiled", repeats=8)
    with TemporaryDirectory() as nothing_yet:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing_yet
        parts = measure(arguments.tiny, "eager" if arguments.tiny else "inductor", arguments.repeats)
    return publish(arguments, "Compiled layers", INTRO, parts)


if __name__ == "__main__":
    main()
