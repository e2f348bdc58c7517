"""What the demo measures, and how it shows it: answers beside what guessing gives, and what a session costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from sleepify import SleepCache, SleepForCausalLM
from sleepify.tasks.base import Example, Query, Split
from sleepify.tasks.hops import Hops
from sleepify.training.evaluate import Report, wilson

# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithoutText:
    """The same rows without their text: what a model has whose cache was dropped and that did not sleep.

    Args:
        task: with the text.
    """

    task: Hops
    difficulty_name: str = Hops.difficulty_name

    def example(self, index: int, split: Split = "test") -> Example:
        """Row ``index``, from its first question on."""
        whole = self.task.example(index, split)
        cut = whole.queries[0].start - 2
        moved = [Query(query.difficulty, query.start - cut, query.stop - cut) for query in whole.queries]
        return Example(whole.input_ids[cut:], whole.labels[cut:], moved)


def accuracy_table(reports: Mapping[str, Report], guess: float) -> Table:
    """Per cent of held-out questions by k, with Wilson's 95% intervals; what guessing gives below."""
    table = Table(title="answered right, % of held-out questions (95% interval)")
    table.add_column("")
    difficulties = next(iter(reports.values())).difficulties
    for difficulty in difficulties:
        table.add_column(f"{difficulty} step{'s' if difficulty > 1 else ''}", justify="right")
    for name, report in reports.items():
        scores = report.of(*report.settings[0])
        table.add_row(name, *(share(scores[d].correct, scores[d].total) for d in difficulties))
    table.add_row("a guess", *(f"{100 * guess:.1f}" for _ in difficulties))
    return table


def share(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{100 * correct / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def plot(reports: Mapping[str, Report], guess: float, path: Path) -> None:
    """Accuracy by k, a line per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, report in reports.items():
        points = list(report.of(*report.settings[0]).values())
        below = [max(0.0, point.accuracy - point.interval[0]) for point in points]
        above = [max(0.0, point.interval[1] - point.accuracy) for point in points]
        steps = [point.difficulty for point in points]
        axes.errorbar(steps, [p.accuracy for p in points], yerr=[below, above], marker="o", capsize=3, label=name)
    axes.axhline(guess, color="k", linestyle=":", label="a guess")
    axes.set(xlabel="steps along the cycle that was read and evicted", ylabel="answered right", ylim=(-0.02, 1.02))
    axes.set_xticks(steps)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def answers(model: PreTrainedModel, task: Hops, example: Example) -> list[str]:
    """What a model says to each question of a row, as names of nodes."""
    logits = model(torch.tensor([example.input_ids]), use_cache=False).logits[0]
    said = list(example.input_ids)
    for query in example.queries:
        said[query.start] = int(logits[query.start - 1, task.max_hops + 1 :].argmax()) + task.max_hops + 1
    return [asked.split("? ")[1] for asked in task.decode(said).split(" | ")[1].split(", ")]


# --- memory and time --------------------------------------------------------------------------------------------------


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
