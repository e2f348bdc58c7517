"""What inference costs: a wake token, a sleep, a long prompt, and what a session weighs (contract 9 and 10).

    python -m benchmarks.wake [--repeats 200] [--output docs/results/wake.md]

All settings are timed in turn within one run, so that whatever else the machine does hits them alike; figures are
medians, ratios are taken within every round. The base decodes the same text with its growing cache beside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.models import wake_up
from benchmarks.report import Claim, Part, Spread, alternate, page_arguments, publish, ratio
from sleepify import FastWeightConfig, SleepCache, SleepForCausalLM, sleepify


@dataclass(frozen=True)
class Inference:
    """What is measured.

    Attributes:
        model: it sleeps.
        ids: [1, T], a text longer than the most windows that are read.
        window: L.
        n_windows: after how many windows a token is timed.
        n_loops: every N of which a token is timed.
        sleeps: every N of which a sleep and a prompt are timed.
        prompt: windows of the prompt.
        device: "cpu" or "cuda".
    """

    model: SleepForCausalLM
    ids: Tensor
    window: int
    n_windows: Sequence[int]
    n_loops: Sequence[int]
    sleeps: Sequence[int]
    prompt: int
    device: str = "cpu"

    @property
    def base(self) -> PreTrainedModel:
        """The model without sleep."""
        return self.model.unload()


def small_qwen(tiny: bool, window: int, longest: int) -> SleepForCausalLM:
    """A Qwen3 of 8 layers and 256 channels: large enough that arithmetic, not Python, is most of a token."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=32 if tiny else 256,
        intermediate_size=96 if tiny else 768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8 if tiny else 64,
        max_position_embeddings=window * (longest + 2),
    )
    return wake_up(sleepify(Qwen3ForCausalLM(config), window_size=window)).eval()


def demo_qwen(window: int) -> SleepForCausalLM:
    """The demo's model: as many inserted layers as the base has, and hardly any arithmetic in either."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    inserted = FastWeightConfig(rule="gdn", layers=[0, 1], num_heads=2, head_dim=32)
    return wake_up(sleepify(Qwen3ForCausalLM(config), window_size=window, fast_weights=inserted)).eval()


def _windows(count: int) -> str:
    return f"{count} window" + "s" * (count != 1)


def _keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


@torch.no_grad()
def measure_tokens(what: Inference, repeats: int, seconds: float | None = None) -> list[Part]:
    """Latency of a wake token, and bytes of a session, against loops and windows read; half a window is open."""
    half, most = what.window // 2, max(what.n_windows)
    sessions: dict[tuple[int, int], SleepCache] = {}
    for n_loops in what.n_loops:
        cache, read = SleepCache(), 0
        for windows in what.n_windows:
            upto = windows * what.window + half
            what.model(what.ids[:, read:upto], past_key_values=cache, n_loops=n_loops, logits_to_keep=1)
            sessions[n_loops, windows], read = cache.clone(), upto
    grown: dict[int, DynamicCache] = {}
    kept = DynamicCache(config=what.base.config)
    for start in range(0, most * what.window + half, what.window):
        if start // what.window in what.n_windows:
            grown[start // what.window] = copy.deepcopy(kept)
            what.base(what.ids[:, start : start + half], past_key_values=grown[start // what.window], logits_to_keep=1)
        what.base(what.ids[:, start : start + what.window], past_key_values=kept, logits_to_keep=1)
    del kept
    token = what.ids[:, :1]

    def slept(key: tuple[int, int]) -> None:
        what.model(token, past_key_values=sessions[key].clone(), n_loops=key[0], logits_to_keep=1)

    def unslept(windows: int) -> None:
        what.base(token, past_key_values=grown[windows], logits_to_keep=1)
        grown[windows].crop(-1)

    actions: dict[Any, Callable[[], None]] = {key: partial(slept, key) for key in sessions}
    actions |= {("base", windows): partial(unslept, windows) for windows in grown}
    times = alternate(actions, repeats, warmup=min(repeats, 20), device=what.device, seconds=seconds)

    first = (what.n_loops[0], what.n_windows[0])
    latency = Part(
        "One wake token",
        f"Window {what.window:,} tokens, half of one open, batch 1; {len(times[first])} tokens per setting. "
        f"Milliseconds, and ratio to N = {first[0]} after {_windows(first[1])}. Sleep is not in these figures: it "
        "happens once per window, before the token that follows.",
        ["", *(f"after {_windows(n)}" for n in what.n_windows)],
    )
    for label, name in [*((f"N = {n}", n) for n in what.n_loops), ("base, all keys kept", "base")]:
        row = [label]
        for windows in what.n_windows:
            spread, compared = Spread.of(times[name, windows]), ratio(times, (name, windows), first)
            row.append(f"{spread.text(1e3)} ms, x{compared.median:.3f}")
            latency.figures[f"{label}, {windows} windows"] = {"seconds": spread, "ratio": compared}
        latency.rows.append(row)
    low, high = what.n_loops[0], what.n_loops[-1]
    for windows in (what.n_windows[0], most):
        value = ratio(times, (high, windows), (low, windows)).median
        latency.claims.append(
            Claim(f"wake token, N = {high} / N = {low}, {_windows(windows)} read", value, at_most=1.03)
        )
    for n_loops in (low, high):
        value = ratio(times, (n_loops, most), (n_loops, first[1])).median
        what_is = f"wake token, {_windows(most)} read / {_windows(first[1])} read, N = {n_loops}"
        latency.claims.append(Claim(what_is, value, at_most=1.03))

    weight = Part(
        "What a session weighs",
        f"Bytes, half a window open, N = {high}.",
        ["windows read", "state", "keys and values", "base's keys and values"],
    )
    for windows in what.n_windows:
        cache = sessions[high, windows]
        base_bytes = sum(x.nbytes for layer in grown[windows].layers for x in _keys_and_values(layer))
        weight.rows.append([f"{windows:,}", *(f"{n:,}" for n in (cache.state_bytes, cache.kv_bytes, base_bytes))])
        weight.figures[str(windows)] = {"state": cache.state_bytes, "kv": cache.kv_bytes, "base": base_bytes}
    return [latency, weight]


@torch.no_grad()
def measure_overhead(what: Inference, repeats: int, title: str, bound: float | None) -> Part:
    """A wake token beside the base's own with as many keys, and beside the base with the same inserted layers.

    The last is the base's own forward pass with hooks that call the inserted layers, from the same state: what any
    implementation of the architecture must compute. What a wake token takes beyond it is the session's doing, and is
    held to ``bound``.
    """
    half = what.window // 2
    session, keys = SleepCache(), DynamicCache(config=what.base.config)
    what.model(what.ids[:, : what.window + half], past_key_values=session, n_loops=1, logits_to_keep=1)
    what.base(what.ids[:, what.window : what.window + half], past_key_values=keys, logits_to_keep=1)
    token = what.ids[:, :1]
    layers: Any = what.model.blocks.layers
    inserted = what.model.blocks.inserted
    states = {index: session.memory.state[index, 1] for index in inserted}

    def awake() -> None:
        what.model(token, past_key_values=session.clone(), n_loops=1, logits_to_keep=1)

    def alone() -> None:
        what.base(token, past_key_values=keys, logits_to_keep=1)
        keys.crop(-1)

    def hybrid() -> None:
        hooks = [layers[i].register_forward_hook(partial(_insert, inserted[i], states[i])) for i in inserted]
        alone()
        for hook in hooks:
            hook.remove()

    actions: dict[Any, Callable[[], None]] = {"base": alone, "hybrid": hybrid, "slept": awake}
    times = alternate(actions, repeats, warmup=min(repeats, 20), device=what.device)
    config: Any = what.base.config
    part = Part(
        title,
        f"{config.num_hidden_layers} layers of {config.hidden_size} channels, {len(inserted)} inserted. Half a window "
        f"of {half} keys in all three, batch 1, N = 1; {len(times['base'])} tokens each. The second row is the base's "
        "own forward pass with the inserted layers called by hooks.",
        ["", "milliseconds", "over the base's token"],
    )
    for label, key in [("base", "base"), ("base and inserted layers", "hybrid"), ("wake token", "slept")]:
        spread, compared = Spread.of(times[key]), ratio(times, key, "base")
        part.rows.append([label, spread.text(1e3), compared.text(digits=3)])
        part.figures[label] = {"seconds": spread, "over the base's token": compared}
    rounds = list(zip(times["slept"], times["hybrid"], times["base"], strict=True))
    beyond, rest = Spread.of([a - b for a, b, _ in rounds]), Spread.of([(a - b) / c for a, b, c in rounds])
    part.rows.append(["the rest: last less second", beyond.text(1e3), rest.text(digits=3)])
    part.figures["rest"] = {"seconds": beyond, "over the base's token": rest}
    # What disturbs a call makes it longer; the lower quartiles are disturbed least.
    slept, hybrid, base = (Spread.of(times[key]).low for key in ("slept", "hybrid", "base"))
    part.figures["lower quartiles"] = {"over the base's token": (slept - hybrid) / base}
    if bound is not None:
        claim = "wake token less base and inserted layers, over the base's token"
        part.claims.append(Claim(claim, rest.median, at_most=bound))
        part.claims.append(Claim(f"{claim}, of lower quartiles", (slept - hybrid) / base, at_most=bound))
    return part


def _insert(layer: Any, state: Any, module: Any, inputs: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    return layer(hidden, state, None)[0]


@torch.no_grad()
def measure_sleep(what: Inference, repeats: int, seconds: float | None = None) -> Part:
    """The pause that a sleep makes, beside one wake pass over the same window."""
    before = SleepCache()
    what.model(what.ids[:, : what.window + 1], past_key_values=before, n_loops=1, logits_to_keep=1)
    what.model.sleep(before, n_loops=1)
    full = before.clone()
    window = what.ids[:, what.window : 2 * what.window]
    what.model(window, past_key_values=full, n_loops=1, logits_to_keep=1)

    def wake() -> None:
        what.model(window, past_key_values=before.clone(), n_loops=1, logits_to_keep=1)

    def sleep(n_loops: int) -> None:
        what.model.sleep(full.clone(), n_loops=n_loops)

    actions: dict[Any, Callable[[], None]] = {"wake": wake} | {n: partial(sleep, n) for n in what.sleeps}
    times = alternate(actions, repeats, device=what.device, seconds=seconds)
    part = Part(
        "The pause of a sleep",
        f"One window of {what.window:,} tokens, batch 1, and one wake pass over the same window beside. A sleep is N "
        "passes, of which the last ends at the last layer that writes.",
        ["", "milliseconds", "over N wake passes"],
    )
    part.rows.append(["wake pass", Spread.of(times["wake"]).text(1e3), ""])
    for n_loops in what.sleeps:
        spread, compared = Spread.of(times[n_loops]), ratio(times, n_loops, "wake", over=n_loops)
        part.rows.append([f"sleep, N = {n_loops}", spread.text(1e3), compared.text()])
        part.figures[f"N = {n_loops}"] = {"seconds": spread, "over wake passes": compared}
    return part


@torch.no_grad()
def measure_prompt(what: Inference, repeats: int, seconds: float | None = None) -> Part:
    """Reading a long prompt, beside the base that keeps all keys."""
    tokens = what.prompt * what.window + what.window // 2
    prompt = what.ids[:, :tokens]

    def slept(n_loops: int) -> None:
        what.model(prompt, past_key_values=SleepCache(), n_loops=n_loops, logits_to_keep=1)

    def unslept() -> None:
        what.base(prompt, past_key_values=DynamicCache(config=what.base.config), logits_to_keep=1)

    actions: dict[Any, Callable[[], None]] = {"base": unslept} | {n: partial(slept, n) for n in what.sleeps}
    times = alternate(actions, repeats, device=what.device, seconds=seconds)
    part = Part(
        "A long prompt",
        f"{tokens:,} tokens, {what.prompt} windows and a half, batch 1, until the first new token can be chosen.",
        ["", "tokens per second", "time over the base's"],
    )
    for label, key in [("base, full attention", "base"), *((f"N = {n}", n) for n in what.sleeps)]:
        rates = Spread.of([tokens / t for t in times[key]])
        compared = ratio(times, key, "base")
        part.rows.append([label, rates.text(digits=0), compared.text()])
        part.figures[label] = {"tokens per second": rates, "time over the base's": compared}
    return part


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "wake", repeats=200, unit="timed tokens per setting")
    window, n_windows, n_loops = (4, (1, 4), (1, 6)) if arguments.tiny else (64, (1, 8, 32, 128), (1, 2, 6))
    most = max(n_windows)
    model = small_qwen(arguments.tiny, window, most)
    ids = torch.randint(0, 4096, (1, (most + 1) * window), generator=torch.Generator().manual_seed(1))
    sleeps = (1, 2, 4, 6)
    what = Inference(model, ids, window, n_windows, n_loops, sleeps, prompt=2 if arguments.tiny else 32)
    few = -(-arguments.repeats // 40)
    added = "What a session adds to a token"
    demo = Inference(demo_qwen(16), torch.arange(24)[None], 16, (1,), (1,), sleeps, prompt=1)
    parts = [*measure_tokens(what, arguments.repeats), measure_overhead(what, 2 * arguments.repeats, added, 0.05)]
    parts += [measure_overhead(demo, 2 * arguments.repeats, f"{added} of the demo's model", None)]
    parts += [measure_sleep(what, 4 * few), measure_prompt(what, few)]
    intro = (
        "Qwen3 of 8 layers and 256 channels with 2 inserted Gated DeltaNet layers, hard eviction, one thread, float32, "
        "processor time, all settings in turn in one run. Median (quartiles)."
    )
    return publish(arguments, "Waking and sleeping", intro, parts)


if __name__ == "__main__":
    main()
