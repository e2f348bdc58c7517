"""What the demo measures, and how it shows it: accuracy beside what guessing gives, and what a session costs."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from rich.table import Table
from transformers import DynamicCache

from sleepify import SleepCache, SleepForCausalLM
from sleepify.tasks.base import Example, Query, Split
from sleepify.tasks.gsm_infinite import Problem
from sleepify.training.evaluate import Report, wilson

# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenWindowOnly:
    """The same rows without what sleep consolidates: what the open window alone gives away.

    Args:
        examples: whole rows.
        window_size: L.
    """

    examples: Sequence[Example]
    window_size: int

    def example(self, index: int, split: Split = "test") -> Example:
        """Row ``index``, from the start of the window in which its answer is predicted."""
        whole = self.examples[index]
        (query,) = whole.queries
        cut = (query.start - 1) // self.window_size * self.window_size
        moved = Query(query.difficulty, query.start - cut, query.stop - cut)
        return Example(whole.input_ids[cut:], whole.labels[cut:], [moved])


@dataclass(frozen=True)
class Guesses:
    """What needs no reading, per difficulty: (accuracy, queries)."""

    constant: dict[int, tuple[int, int]]
    number_of_the_text: dict[int, float]


def guesses(problems: Sequence[Problem]) -> Guesses:
    """The best constant answer, and any number of the text at random."""
    constant, drawn = {}, {}
    for operations in sorted({problem.operations for problem in problems}):
        group = [problem for problem in problems if problem.operations == operations]
        constant[operations] = (Counter(problem.answer for problem in group).most_common(1)[0][1], len(group))
        numbers = [(problem.answer, re.findall(r"\d+", problem.problem)) for problem in group]
        drawn[operations] = mean(found.count(str(answer)) / len(found) for answer, found in numbers)
    return Guesses(constant, drawn)


def accuracy_table(report: Report, control: Report, guess: Guesses) -> Table:
    """Per cent of held-out problems by operations, with Wilson's 95% intervals."""
    table = Table(title="exact match on held-out problems, % (95% interval)")
    table.add_column("")
    for operations in report.difficulties:
        table.add_column(f"{operations} operations", justify="right")
    rows = [(f"N = {n}", report.of(n, window)) for n, window in report.settings]
    rows += [("the open window only", control.of(*control.settings[0]))]
    for name, scores in rows:
        table.add_row(name, *(share(scores[d].correct, scores[d].total) for d in report.difficulties))
    table.add_row("best constant answer", *(share(*guess.constant[d]) for d in report.difficulties))
    drawn = guess.number_of_the_text
    table.add_row("a number of the text, at random", *(f"{100 * drawn[d]:.1f}" for d in report.difficulties))
    return table


def share(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{100 * correct / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def plot(losses: list[tuple[int, float]], report: Report, control: Report, guess: Guesses, path: Path) -> None:
    """Loss over steps, and accuracy by operations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses, strict=True))
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training, N drawn from 1 and 3")
    named = [(f"N = {n}", report.of(n, window), "o-") for n, window in report.settings]
    named.append(("open window only", control.of(*control.settings[0]), "s--"))
    for name, scores, style in named:
        points = [scores[d] for d in report.difficulties]
        spread = [[s.accuracy - s.interval[0] for s in points], [s.interval[1] - s.accuracy for s in points]]
        right.errorbar(report.difficulties, [s.accuracy for s in points], yerr=spread, fmt=style, capsize=3, label=name)
    best = [correct / total for correct, total in guess.constant.values()]
    right.plot(report.difficulties, best, "k:", label="best constant answer")
    right.plot(report.difficulties, list(guess.number_of_the_text.values()), "k-.", label="a number of the text")
    right.set(xlabel="operations", ylabel="exact match", ylim=(0, 1.02), xticks=report.difficulties, title="held out")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# --- writing on, memory and time --------------------------------------------------------------------------------------


class Watch:
    """What `generate` streams to; notes how many keys the session holds after every token."""

    def __init__(self, cache: SleepCache) -> None:
        self.cache, self.most = cache, 0

    def put(self, _: torch.Tensor) -> None:
        self.most = max([self.most, *self.cache.memory.kv_lengths])

    def end(self) -> None:
        pass


def write_on(model: SleepForCausalLM, ids: list[int], new_tokens: int) -> tuple[int, int]:
    """Generate far past the window: (windows slept on meanwhile, most keys held)."""
    cache = SleepCache()
    model(torch.tensor([ids[:-1]]), past_key_values=cache)
    slept, watch = cache.windows[0], Watch(cache)
    limits = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    model.generate(torch.tensor([ids]), past_key_values=cache, streamer=watch, **limits)
    return cache.windows[0] - slept, watch.most


@dataclass(frozen=True)
class Cost:
    """Of one session: what was read, bytes of keys and values and of state, seconds of one more token."""

    name: str
    tokens: int
    kv_bytes: int
    state_bytes: int
    seconds: float


@torch.no_grad()
def costs(model: SleepForCausalLM, text: list[int], windows: int, repeats: int) -> list[Cost]:
    """Sessions of the model and of its base, timed in turn so that whatever else runs here hits all alike."""
    base, window = model.language_model, model.config.window_size
    ids = torch.tensor([text[: windows * window]])
    sessions: list[tuple[str, int, SleepCache | DynamicCache]] = []
    for count in (1, windows):
        # The last window is one token short of full: the next one is read awake, and needs no sleep before it.
        length = count * window - 1
        before = SleepCache()
        model(ids[:, :length], past_key_values=before, logits_to_keep=1)
        grown = DynamicCache(config=base.config)
        base(ids[:, :length], past_key_values=grown, logits_to_keep=1)
        named = {"before sleep": before, "after sleep": model.sleep(before.clone()), "base, no sleep": grown}
        sessions += [(name, length, cache) for name, cache in named.items()]
    times: list[list[float]] = [[] for _ in sessions]
    for repeat in range(repeats + 5):
        for (_, _, cache), taken in zip(sessions, times, strict=True):
            once = cache.clone() if isinstance(cache, SleepCache) else cache
            begin = time.perf_counter()
            (model if isinstance(cache, SleepCache) else base)(ids[:, :1], past_key_values=once, logits_to_keep=1)
            if repeat >= 5:
                taken.append(time.perf_counter() - begin)
            if isinstance(cache, DynamicCache):
                cache.crop(-1)
    return [
        Cost(name, length, *_bytes(cache), median(taken))
        for (name, length, cache), taken in zip(sessions, times, strict=True)
    ]


def _bytes(cache: SleepCache | DynamicCache) -> tuple[int, int]:
    if isinstance(cache, SleepCache):
        return cache.kv_bytes, cache.state_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0


def cost_table(found: Sequence[Cost]) -> Table:
    """One row per session."""
    table = Table(title="a session, and one more token of it")
    for name in ("", "tokens read", "KV bytes", "state bytes", "ms per token"):
        table.add_column(name, justify="right" if name else "left")
    for cost in found:
        table.add_row(
            cost.name, f"{cost.tokens:,}", f"{cost.kv_bytes:,}", f"{cost.state_bytes:,}", f"{cost.seconds * 1e3:.2f}"
        )
    return table
