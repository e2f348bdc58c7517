"""What a step of training costs: over the arithmetic that it must do, and over the parallel hybrid.

    python -m benchmarks.train [--repeats 4] [--output docs/results/train.md]

The paper's figure 6 at an eighth of its length: T = 1,500 and windows of 64 to 512 (there T = 12,000, 512 to 4K). What
``ideal`` and the parallel hybrid are is said in benchmarks/models.py and, in words, on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.models import (
    Setting,
    count_flops,
    ideal,
    looped_share,
    parallel_step,
    small_ouro,
    text,
    windowed_step,
)
from benchmarks.report import Claim, Part, Spread, alternate, page_arguments, publish, ratio
from sleepify import SleepForCausalLM

LOOPS = (1, 2, 4, 6)
Key = tuple[str, int, int]
"""("hard" or "sliding" eviction, or "parallel"; L; N)."""


@dataclass(frozen=True)
class Steps:
    """What is trained and how.

    Attributes:
        model: it sleeps.
        counted: the same on the meta device, to count arithmetic.
        tokens: T.
        windows: every L.
        n_loops: every N.
        attention: of the parallel hybrid.
        device: "cpu" or "cuda".
    """

    model: SleepForCausalLM
    counted: SleepForCausalLM
    tokens: int
    windows: Sequence[int]
    n_loops: Sequence[int]
    attention: str = "blocks"
    device: str = "cpu"

    def action(self, key: Key, setting: Setting) -> Callable[[], None]:
        """The step that a key names."""
        kind, window, n_loops = key
        batch = text(self.model, self.tokens, setting.batch_size)
        if kind == "parallel":
            return partial(parallel_step, self.model, batch, window, setting, self.attention)
        return partial(windowed_step, self.model, batch, window, n_loops, setting, kind)

    def passes(self, window: int, n_loops: int) -> float:
        """`ideal` of these."""
        return ideal(self.tokens, window, n_loops, looped_share(self.model))

    def keys(self) -> list[Key]:
        """Every N under hard eviction, and at N = 1 sliding eviction and the parallel hybrid."""
        slept = [("hard", window, n) for window in self.windows for n in self.n_loops]
        others = [(kind, window, 1) for window in self.windows for kind in ("sliding", "parallel")]
        return slept + others


def measure(
    steps: Steps, repeats: int, settings: dict[Key, Setting] | None = None, seconds: float | None = None
) -> dict[Key, list[float]]:
    """Seconds per row of every step in every round; ``settings`` other than `Setting()` by key."""
    chosen = {key: (settings or {}).get(key, Setting()) for key in steps.keys()}
    actions = {key: steps.action(key, setting) for key, setting in chosen.items()}
    if steps.device == "cpu":
        actions[steps.keys()[-1]]()  # what only a first call does
    times = alternate(actions, repeats, warmup=steps.device != "cpu", device=steps.device, seconds=seconds)
    return {key: [t / chosen[key].batch_size for t in times[key]] for key in chosen}


def over_ideal(steps: Steps, times: dict[Key, list[float]], window: int, n_loops: int) -> Spread:
    """Time of N over N = 1, over the same ratio of `ideal`."""
    below = steps.passes(window, 1)
    return ratio(times, ("hard", window, n_loops), ("hard", window, 1), steps.passes(window, n_loops) / below)


def over_parallel(steps: Steps, times: dict[Key, list[float]], window: int, n_loops: int) -> Spread:
    """Time of N over that of the parallel hybrid, over `ideal` per ordinary pass."""
    below = steps.passes(window, 1)
    return ratio(times, ("hard", window, n_loops), ("parallel", window, 1), steps.passes(window, n_loops) / below)


def tabulate(steps: Steps, times: dict[Key, list[float]], title: str, intro: str) -> Part:
    """One row per window and N, and the parallel hybrid beside."""
    head = ["L", "step", "ideal, passes", "arithmetic / ideal", "seconds per row", "time / ideal", "time / parallel"]
    part = Part(title, intro, head)
    for window in steps.windows:
        least = count_flops(steps.counted, steps.tokens, window, 1)
        for n_loops in steps.n_loops:
            passes = steps.passes(window, n_loops)
            factor = passes / steps.passes(window, 1)
            arithmetic = count_flops(steps.counted, steps.tokens, window, n_loops) / least / factor
            to_ideal = over_ideal(steps, times, window, n_loops)
            cells = [f"{window:,}", f"N = {n_loops}", f"{passes:.2f}", f"{arithmetic:.3f}"]
            cells += [Spread.of(times["hard", window, n_loops]).text(digits=3), to_ideal.text()]
            figures = {"time / ideal": to_ideal, "arithmetic / ideal": arithmetic}
            if ("parallel", window, 1) in times:
                figures["time / parallel / ideal"] = to_parallel = over_parallel(steps, times, window, n_loops)
                cells.append(to_parallel.text())
            part.rows.append(cells if len(cells) == len(head) else [*cells, ""])
            part.figures[f"L={window} N={n_loops}"] = figures
        for kind, label in (("sliding", "N = 1, sliding eviction"), ("parallel", "parallel hybrid")):
            if (kind, window, 1) in times:
                compared = ratio(times, (kind, window, 1), ("parallel", window, 1))
                seconds = Spread.of(times[kind, window, 1]).text(digits=3)
                part.rows.append([f"{window:,}", label, "", "", seconds, "", compared.text()])
                part.figures[f"L={window} {label}"] = {"time / parallel": compared}
    return part


INTRO = """A step is forward and backward of one row of T tokens without the optimiser. The last 8 tokens are
supervised, so that the windows before are only slept on. *Ideal*: `Wc (1 + (N-1) f) + r` passes over a window, for Wc
full windows, a rest of r windows that is read once, and a fraction f of the layers that is looped. *Time / ideal*: step
time over that of N = 1 in the same round, divided by ideal(N) / ideal(1). *Arithmetic / ideal*: the same of the matrix
products that are counted while the forward pass runs on the meta device; it departs from 1 where a sleep's last pass
ends before the last layer, because nothing after the last layer that writes is run. *Parallel hybrid*: the same base
and inserted layers over all T tokens in one call, each token attending to the latest L positions, no loops. Its
attention is computed in blocks of L queries against 2 L keys (exact), since a mask over all T would make it slower than
anybody's. *Time / parallel*: over its time, divided by ideal(N) / ideal(1). Median over rounds (quartiles)."""


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "train", repeats=4)
    tokens, windows = (75, (16, 32)) if arguments.tiny else (1500, (64, 128, 256, 512))
    loops = (1, 4) if arguments.tiny else LOOPS
    middle = windows[-2]

    def build(loop_range: tuple[int, int]) -> SleepForCausalLM:
        return small_ouro(arguments.tiny, loop_range=loop_range)

    parts = []
    shape = "Ouro with 4 layers of 256 channels, Jet layers after the second and the last"
    for loop_range, sizes, where in (((0, 4), windows, "all layers"), ((1, 3), (middle,), "the middle half")):
        with torch.device("meta"):
            counted = build(loop_range)
        steps = Steps(build(loop_range), counted, tokens, sizes, loops)
        times = measure(steps, arguments.repeats)
        intro = f"{shape}; T = {tokens:,}."
        part = tabulate(steps, times, f"Loops over {where}", intro)
        bound = 1.10 if loop_range == (0, 4) else 1.15
        for window in sizes:
            value = over_ideal(steps, times, window, 4).median
            part.claims.append(Claim(f"step time / ideal, N = 4, {where} looped, L = {window}", value, at_most=bound))
        parts.append(part)
    intro = INTRO.replace("\n", " ") + " One thread, float32, processor time."
    return publish(arguments, "A step of training", intro, parts)


if __name__ == "__main__":
    main()
